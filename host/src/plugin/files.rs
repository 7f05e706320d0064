//! What a plugin is made of, of one reading: nothing is judged by other bytes than those that are loaded.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::error::LoadError;
use super::manifest::{Manifest, Source};
use super::read::{hex, read_bounded, read_text, sha256};

/// Largest component, in bytes.
pub const MOST_COMPONENT: u64 = 64 << 20;

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
        for given in self.manifest.credentials.values() {
            let secret = Source::parse(&given.from).and_then(|source| source.read().ok());
            add(secret.as_deref().unwrap_or_default());
        }
        hex(&digest.finalize())
    }
}

/// The files besides itself that a TOML file depends on, whether they are there or not: its component, its signature, secrets. None if it
/// cannot be read.
pub fn named_by(file: &Path) -> Option<Vec<PathBuf>> {
    let manifest = Manifest::parse(file, &read_text(file).ok()?).ok()?;
    let secrets =
        manifest.credentials.values().filter_map(|given| match Source::parse(&given.from) {
            Some(Source::File(path)) => Some(path.to_owned()),
            _ => None,
        });
    Some(
        secrets
            .chain([file.with_file_name("").join(&manifest.component), signature_file(file)])
            .collect(),
    )
}

/// Where the signature of a TOML file lies: beside it, with `.sig` at the end of its name.
pub fn signature_file(file: &Path) -> PathBuf {
    let mut name = file.file_name().unwrap_or_default().to_owned();
    name.push(".sig");
    file.with_file_name(name)
}
