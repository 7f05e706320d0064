//! Trust in plugin files: signatures, serials and trusted keys.
//!
//! **Threat.** An attacker can write to the plugin directory but holds no signing key. A plugin
//! handles the operator's credentials and the requests of every tenant. So the attacker must not
//! be able to load another component, change a setting, or restore an older file.
//!
//! **Signatures.** With the setting `trusted_keys`, each TOML file needs a signature in a `.sig`
//! file beside it. The signed statement contains the plugin's name, the digest of the TOML file
//! and the digest of the component (see [`crate::package::signature`]). So a signature is not valid
//! for
//! another name, other settings or another component. The line of a key can limit the key to
//! certain plugin names. A file with `enabled = false` needs a signature too, because disabling a
//! validator weakens the checks.
//!
//! **Serials.** An older file keeps its valid signature, even if its component has a known fault.
//! So each signed file has a serial, which `batchwright plugin sign` increases. The data folder
//! stores the highest loaded serial of each plugin, and a file with a lower serial is refused (see
//! [`crate::package::serials`]). The serial is part of the signed text, so it cannot be raised
//! without a
//! key.
//!
//! **One read.** The checks use the bytes that are loaded afterwards ([`Files`]). A file that
//! changes between check and load therefore has no effect.
//!
//! **Revocation.** Each read of the plugin directory reads the trusted keys again. A serving
//! plugin stops serving once its signing key is no longer trusted. If the key file cannot be read,
//! the previous keys stay in force.
//!
//! **Limits.** Signatures do not protect availability: deleting a TOML file removes its plugin. An
//! attacker who can also delete the stored serials can restore an older signed file.

use std::path::PathBuf;
use std::sync::Arc;

use arc_swap::ArcSwap;

use crate::error::LoadError;
use crate::package::files::Files;
use crate::package::serials::Serials;
use crate::package::signature::{TrustedKeys, statement};

/// Trusted keys, reloaded with the plugin directory, and the serials of loaded plugins.
pub(crate) struct Trust {
    /// None if unsigned plugins are loaded too.
    keys: Option<ArcSwap<TrustedKeys>>,
    serials: Serials,
}

/// Verified signature of a loaded plugin, kept so that it can be verified again.
pub struct VerifiedSignature {
    /// Fingerprint and comment of the key.
    pub by: String,
    serial: u64,
    statement: String,
    signature: String,
}

impl Trust {
    /// Opens the file of serials. Without keys, signatures are not required.
    pub(crate) fn open(
        keys: Option<TrustedKeys>,
        serials: Option<PathBuf>,
    ) -> Result<Self, String> {
        Ok(Self { keys: keys.map(ArcSwap::from_pointee), serials: Serials::open(serials)? })
    }

    /// Returns true if signatures are required.
    pub(crate) fn is_required(&self) -> bool {
        self.keys.is_some()
    }

    /// Verifies the signature and the serial of the files. Returns None if no signature is
    /// required.
    pub(crate) fn verify(
        &self,
        name: &str,
        files: &Files,
    ) -> Result<Option<VerifiedSignature>, LoadError> {
        let Some(keys) = &self.keys else { return Ok(None) };
        let refused = |message| LoadError::Signature { file: files.file.clone(), message };
        let statement = statement(name, &files.text, &files.component.sha256);
        let by =
            keys.load().verify(name, &statement, files.signature.as_deref()).map_err(refused)?;
        let (serial, signature) =
            (files.manifest.serial, files.signature.clone().unwrap_or_default());
        self.serials.check(name, serial).map_err(refused)?;
        Ok(Some(VerifiedSignature { by, serial, statement, signature }))
    }

    /// Stores the serial of a loaded plugin. Files with a lower serial are refused afterwards.
    pub(crate) fn record_loaded(&self, name: &str, signed: Option<&VerifiedSignature>) {
        if let Some(signed) = signed {
            self.serials.raise(name, signed.serial);
        }
    }

    /// Returns true if a loaded plugin's signature is valid under the current keys.
    pub(crate) fn is_still_trusted(&self, name: &str, signed: Option<&VerifiedSignature>) -> bool {
        let Some(keys) = &self.keys else { return true };
        signed.is_some_and(|signed| {
            keys.load().verify(name, &signed.statement, Some(&signed.signature)).is_ok()
        })
    }

    /// Reads the trusted keys again. If the file cannot be read, the previous keys stay in force.
    pub(crate) fn read_keys(&self) {
        let Some(keys) = &self.keys else { return };
        let current = keys.load_full();
        match TrustedKeys::read_or_empty(&current.file) {
            Ok(read) if read.digest != current.digest => {
                tracing::info!(path = %current.file.display(), "trusted keys changed");
                keys.store(Arc::new(read));
            }
            Ok(_) => {}
            Err(error) => tracing::error!(
                path = %current.file.display(),
                %error,
                "trusted keys not read, previous keys stay in force"
            ),
        }
    }

    /// Returns the path of the file of trusted keys, if signatures are required.
    pub(crate) fn keys_file(&self) -> Option<PathBuf> {
        self.keys.as_ref().map(|keys| keys.load().file.clone())
    }

    /// Returns the digest of the file of trusted keys; empty if signatures are not required.
    pub(crate) fn keys_digest(&self) -> String {
        self.keys.as_ref().map(|keys| keys.load().digest.clone()).unwrap_or_default()
    }
}
