//! What a plugin is made of, each file read once: nothing is judged by other bytes than those that are loaded.

use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::OFlags;
use sha2::{Digest, Sha256};

use super::error::LoadError;
use super::load::MOST_COMPONENT;
use super::manifest::{Manifest, Source};
use super::signature::signature_file;

/// Largest TOML file and signature, in bytes.
const MOST_TEXT: u64 = 1 << 20;

/// A component's file.
pub struct ComponentFile {
    pub path: PathBuf,
    pub bytes: Arc<Vec<u8>>,
    /// In hexadecimal.
    pub sha256: String,
}

impl ComponentFile {
    pub fn read(path: &Path) -> Result<Self, LoadError> {
        let unreadable = |source| LoadError::Unreadable { path: path.to_owned(), source };
        let bytes = read_bounded(path, MOST_COMPONENT).map_err(unreadable)?;
        let sha256 = sha256(&bytes);
        Ok(Self { path: path.to_owned(), bytes: Arc::new(bytes), sha256 })
    }
}

/// All that a TOML file stands for.
pub struct Files {
    pub file: PathBuf,
    pub text: String,
    pub manifest: Manifest,
    pub component: ComponentFile,
    /// The text of its signature, if there is one.
    pub signature: Option<String>,
}

impl Files {
    /// The files of a plugin that is to be loaded.
    pub fn read(file: &Path) -> Result<Self, LoadError> {
        Self::read_if(file, true)
    }

    /// The files of a plugin, whether it is turned off or not.
    pub fn read_any(file: &Path) -> Result<Self, LoadError> {
        Self::read_if(file, false)
    }

    fn read_if(file: &Path, enabled: bool) -> Result<Self, LoadError> {
        let text = read_text(file)?;
        let manifest = Manifest::parse(file, &text)?;
        if enabled && !manifest.enabled {
            return Err(LoadError::Disabled { file: file.to_owned() });
        }
        let component = file.with_file_name("").join(&manifest.component);
        if !component.exists() {
            let message = format!(
                "there is no {} beside this file; build or copy the component there",
                manifest.component.display()
            );
            return Err(LoadError::Key { file: file.to_owned(), key: "component".into(), message });
        }
        let signature = signature_file(file);
        let signature = if signature.exists() { Some(read_text(&signature)?) } else { None };
        let component = ComponentFile::read(&component)?;
        Ok(Self { file: file.to_owned(), text, manifest, component, signature })
    }

    /// Changes when any of them does, or a secret.
    pub fn fingerprint(&self) -> String {
        let mut digest = Sha256::new();
        let mut add = |part: &str| {
            digest.update(part.len().to_le_bytes());
            digest.update(part);
        };
        add(&self.text);
        add(&self.component.sha256);
        add(self.signature.as_deref().unwrap_or_default());
        for source in self.manifest.credentials.values() {
            let secret = Source::parse(source).and_then(|source| source.read().ok());
            add(secret.as_deref().unwrap_or_default());
        }
        hex(&digest.finalize())
    }
}

/// Reads a file of text.
pub fn read_text(path: &Path) -> Result<String, LoadError> {
    let bytes = read_bounded(path, MOST_TEXT);
    let text = bytes.and_then(|bytes| String::from_utf8(bytes).map_err(std::io::Error::other));
    text.map_err(|source| LoadError::Unreadable { path: path.to_owned(), source })
}

/// Reads a file of so many bytes at the most. What stands in the plugin directory may be anything: a pipe that nobody writes to, a device
/// without an end, a file that grows.
pub fn read_bounded(path: &Path, most: u64) -> std::io::Result<Vec<u8>> {
    let mut options = std::fs::OpenOptions::new();
    options.read(true).custom_flags(i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or(0));
    let file = options.open(path)?;
    if !file.metadata()?.is_file() {
        return Err(std::io::Error::other("it is no ordinary file"));
    }
    let mut bytes = Vec::new();
    file.take(most.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > most {
        return Err(std::io::Error::other(format!("it has more than {most} bytes")));
    }
    Ok(bytes)
}

pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

pub fn hex(bytes: &[u8]) -> String {
    let digit = |value: u8| char::from_digit(u32::from(value), 16).unwrap_or_default();
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}
