//! Files of one plugin, read once, so that checks and loading see the same bytes.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use batchwright_domain::text::hex;
use sha2::{Digest, Sha256};

use crate::error::LoadError;
use crate::package::manifest::{Manifest, Source};
use crate::package::read::{read_bounded, read_text, sha256};

/// Maximum size of a component, in bytes.
pub const MAX_COMPONENT_BYTES: u64 = 64 << 20;

/// Contents of a component file.
pub struct ComponentFile {
    /// Path that the component was read from.
    pub path: PathBuf,
    /// Bytes of the component.
    pub bytes: Arc<Vec<u8>>,
    /// SHA-256 digest in hexadecimal.
    pub sha256: String,
}

impl ComponentFile {
    /// Reads a component of at most [`MAX_COMPONENT_BYTES`] bytes.
    pub fn read(path: &Path) -> Result<Self, LoadError> {
        let unreadable = |source| LoadError::Unreadable { path: path.to_owned(), source };
        let bytes = read_bounded(path, MAX_COMPONENT_BYTES).map_err(unreadable)?;
        let sha256 = sha256(&bytes);
        Ok(Self { path: path.to_owned(), bytes: Arc::new(bytes), sha256 })
    }
}

/// Folders where a component is looked up that is not beside its TOML file. An operator names them,
/// so that plugin files alone can be in a folder of settings.
#[derive(Clone, Debug, Default)]
pub struct ComponentFolders(Arc<[PathBuf]>);

impl ComponentFolders {
    /// Creates a list of folders, in the order in which they are searched.
    pub fn new(folders: impl IntoIterator<Item = PathBuf>) -> Self {
        Self(folders.into_iter().collect())
    }

    /// Returns the path of the component that a TOML file names: beside the file, unless only
    /// another folder has it.
    fn find(&self, file: &Path, manifest: &Manifest) -> PathBuf {
        // A link whose target is gone for a moment is there: another component must not take its
        // place.
        let is_there = |path: &PathBuf| path.symlink_metadata().is_ok();
        let candidates = self.candidates(file, manifest);
        let found = candidates.iter().find(|path| is_there(path)).or(candidates.first());
        found.cloned().unwrap_or_default()
    }

    /// Returns the paths where a component may be, in order.
    fn candidates(&self, file: &Path, manifest: &Manifest) -> Vec<PathBuf> {
        let beside = file.with_file_name("").join(&manifest.component);
        let elsewhere = self.0.iter().map(|folder| folder.join(&manifest.component));
        std::iter::once(beside).chain(elsewhere).collect()
    }
}

/// TOML file of a plugin, with its component and its signature.
pub struct Files {
    /// Path of the TOML file.
    pub file: PathBuf,
    /// Text of the TOML file.
    pub text: String,
    /// Parsed TOML file.
    pub manifest: Manifest,
    /// Component that the TOML file names.
    pub component: ComponentFile,
    /// Text of the signature file, if there is one.
    pub signature: Option<String>,
}

impl Files {
    /// Reads the files of a plugin. Returns [`LoadError::Disabled`] if the plugin is disabled.
    pub fn read(file: &Path, folders: &ComponentFolders) -> Result<Self, LoadError> {
        Self::read_checked(file, folders, true)
    }

    /// Reads the files of a plugin, even if the plugin is disabled.
    pub fn read_any(file: &Path, folders: &ComponentFolders) -> Result<Self, LoadError> {
        Self::read_checked(file, folders, false)
    }

    fn read_checked(
        file: &Path,
        folders: &ComponentFolders,
        must_be_enabled: bool,
    ) -> Result<Self, LoadError> {
        let text = read_text(file)?;
        let manifest = Manifest::parse(file, &text)?;
        if must_be_enabled && !manifest.enabled {
            return Err(LoadError::Disabled { file: file.to_owned() });
        }
        let component = folders.find(file, &manifest);
        if !component.exists() {
            let or_in: Vec<String> =
                folders.0.iter().map(|folder| format!(", nor in {}", folder.display())).collect();
            let message = format!(
                "there is no {} beside this file{}; build or copy the component there, or name its \
                 folder in the setting `components`",
                manifest.component.display(),
                or_in.concat()
            );
            return Err(LoadError::Key { file: file.to_owned(), key: "component".into(), message });
        }
        let signature = signature_file(file);
        let signature = if signature.exists() { Some(read_text(&signature)?) } else { None };
        let component = ComponentFile::read(&component)?;
        Ok(Self { file: file.to_owned(), text, manifest, component, signature })
    }

    /// Returns a digest of the TOML file, the component, the signature and the secrets.
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
            for source in given.0.sources() {
                let secret = Source::parse(source).and_then(|source| source.read().ok());
                add(secret.as_deref().unwrap_or_default());
            }
        }
        hex(&digest.finalize())
    }
}

/// Returns the other files that a TOML file depends on: component, signature and secrets.
///
/// The list includes files that do not exist. None if the TOML file cannot be read or parsed.
pub(crate) fn named_files(file: &Path, folders: &ComponentFolders) -> Option<Vec<PathBuf>> {
    let manifest = Manifest::parse(file, &read_text(file).ok()?).ok()?;
    let secrets =
        manifest.credentials.values().flat_map(|given| given.0.sources()).filter_map(|source| {
            match Source::parse(source) {
                Some(Source::File(path)) => Some(path.to_owned()),
                _ => None,
            }
        });
    // A component may appear in any of the folders.
    let components = folders.candidates(file, &manifest);
    Some(secrets.chain(components).chain([signature_file(file)]).collect())
}

/// Returns the path of a TOML file's signature: the path of the file with `.sig` appended.
pub fn signature_file(file: &Path) -> PathBuf {
    let mut name = file.file_name().unwrap_or_default().to_owned();
    name.push(".sig");
    file.with_file_name(name)
}
