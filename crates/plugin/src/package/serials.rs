//! Serials of signed plugins, stored to refuse a rollback to an older signed file.
//!
//! **Threat.** An attacker without a signing key restores an older file, whose signature is still
//! valid: with a rule that was fixed since, or a component with a known fault. The serial is part
//! of the signed file, so the attacker cannot raise it. See [`crate::package::trust`] for the other
//! layers.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use crate::package::state_file;

/// Highest loaded serial of each plugin, by name, in a file of the data folder.
pub(crate) struct Serials {
    /// None keeps the serials in memory only.
    file: Option<PathBuf>,
    highest: Mutex<BTreeMap<String, u64>>,
}

impl Serials {
    /// Reads the stored serials. Fails if the file exists but cannot be read or parsed.
    pub(crate) fn open(file: Option<PathBuf>) -> Result<Self, String> {
        let highest = match file.as_ref().map(std::fs::read) {
            None => BTreeMap::new(),
            Some(Err(error)) if error.kind() == std::io::ErrorKind::NotFound => BTreeMap::new(),
            Some(read) => {
                let shown =
                    file.as_ref().map(|file| file.display().to_string()).unwrap_or_default();
                let bytes = read.map_err(|error| format!("failed to read {shown}: {error}"))?;
                serde_json::from_slice(&bytes).map_err(|error| {
                    format!(
                        "{shown} is damaged ({error}); it prevents a rollback to older signed \
                         plugins. Restore it, or delete it to accept older signed plugins again"
                    )
                })?
            }
        };
        Ok(Self { file, highest: Mutex::new(highest) })
    }

    /// Returns an error if the serial is lower than the highest loaded serial of the plugin.
    pub(crate) fn check(&self, name: &str, serial: u64) -> Result<(), String> {
        let highest = self.highest.lock().unwrap_or_else(PoisonError::into_inner);
        match highest.get(name).filter(|highest| serial < **highest) {
            None => Ok(()),
            Some(highest) => Err(format!(
                "its serial is {serial}, lower than {highest}, which was loaded before; to load \
                 this older file, sign it again"
            )),
        }
    }

    /// Stores the serial of a loaded plugin if it is higher than the stored one.
    pub(crate) fn raise(&self, name: &str, serial: u64) {
        let mut highest = self.highest.lock().unwrap_or_else(PoisonError::into_inner);
        if highest.get(name).is_some_and(|highest| *highest >= serial) || serial == 0 {
            return;
        }
        highest.insert(name.to_owned(), serial);
        state_file::save(self.file.as_deref(), &*highest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serials_refuse_an_older_file_before_and_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("serials");
        let serials = Serials::open(Some(file.clone())).unwrap();
        assert!(serials.check("a", 0).is_ok());
        serials.raise("a", 7);
        serials.raise("a", 5);
        let again = Serials::open(Some(file.clone())).unwrap();
        for serials in [serials, again] {
            assert!(
                serials.check("a", 7).is_ok()
                    && serials.check("a", 8).is_ok()
                    && serials.check("b", 0).is_ok()
            );
            assert!(serials.check("a", 6).unwrap_err().contains("its serial is 6, lower than 7"));
        }
        std::fs::write(&file, "{").unwrap();
        assert!(Serials::open(Some(file)).is_err());
    }
}
