//! Whether a plugin's files may be loaded: signed by a key that counts, and not older than what was loaded before.

use std::path::PathBuf;
use std::sync::Arc;

use arc_swap::ArcSwap;

use super::error::LoadError;
use super::files::Files;
use super::plugin::Plugin;
use super::serials::Serials;
use super::signature::{TrustedKeys, statement};

/// Whose signatures count, as their file says at the moment, and the serials that were loaded.
pub struct Trust {
    /// None if unsigned plugins are loaded too.
    keys: Option<ArcSwap<TrustedKeys>>,
    serials: Serials,
}

/// What a plugin was loaded on the strength of.
pub struct Signed {
    /// Fingerprint of the key, and its comment.
    pub by: String,
    serial: u64,
    statement: String,
    signature: String,
}

impl Trust {
    pub fn open(keys: Option<TrustedKeys>, serials: Option<PathBuf>) -> Result<Self, String> {
        Ok(Self { keys: keys.map(ArcSwap::from_pointee), serials: Serials::open(serials)? })
    }

    /// Whether signatures are asked for at all.
    pub fn is_asked_for(&self) -> bool {
        self.keys.is_some()
    }

    /// Who signed these files; nobody where signatures are not asked for.
    pub fn signed(&self, name: &str, files: &Files) -> Result<Option<Signed>, LoadError> {
        let Some(keys) = &self.keys else { return Ok(None) };
        let refused = |message| LoadError::Signature { file: files.file.clone(), message };
        let statement = statement(name, &files.text, &files.component.sha256);
        let by =
            keys.load().verify(name, &statement, files.signature.as_deref()).map_err(refused)?;
        let (serial, signature) =
            (files.manifest.serial, files.signature.clone().unwrap_or_default());
        self.serials.check(name, serial).map_err(refused)?;
        Ok(Some(Signed { by, serial, statement, signature }))
    }

    /// From now on nothing that was signed before is loaded under this name.
    pub fn loaded(&self, name: &str, signed: Option<&Signed>) {
        if let Some(signed) = signed {
            self.serials.raise(name, signed.serial);
        }
    }

    /// Whether the signature that a plugin was loaded with still counts.
    pub fn still_counts(&self, plugin: &Plugin) -> bool {
        let Some(keys) = &self.keys else { return true };
        let signed = plugin.signed.as_ref();
        signed.is_some_and(|signed| {
            keys.load().verify(&plugin.name, &signed.statement, Some(&signed.signature)).is_ok()
        })
    }

    /// Reads the trusted keys again; keys that cannot be read leave those of before.
    pub fn read_keys(&self) {
        let Some(keys) = &self.keys else { return };
        let current = keys.load_full();
        match TrustedKeys::read_any(&current.file) {
            Ok(read) if read.digest != current.digest => {
                tracing::info!(file = %current.file.display(), "trusted keys changed");
                keys.store(Arc::new(read));
            }
            Ok(_) => {}
            Err(error) => tracing::error!("the trusted keys stay as they are: {error}"),
        }
    }

    pub fn keys_file(&self) -> Option<PathBuf> {
        self.keys.as_ref().map(|keys| keys.load().file.clone())
    }

    /// Changes with the trusted keys.
    pub fn keys_digest(&self) -> String {
        self.keys.as_ref().map(|keys| keys.load().digest.clone()).unwrap_or_default()
    }
}
