//! The serial numbers of signed plugins: a file that was signed before the one that was loaded last is not loaded again.
//!
//! **Threat.** Whoever may write to the plugin directory, but has no key, puts an older file back, whose signature is still good: with a rule
//! that was repaired since, or a component with a known fault. The number is in the signed file, so it cannot be raised without a key.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use super::kept;

/// The highest number of each plugin, by name, in a file of the data folder.
pub struct Serials {
    /// None keeps them for this process alone.
    file: Option<PathBuf>,
    highest: Mutex<BTreeMap<String, u64>>,
}

impl Serials {
    pub fn open(file: Option<PathBuf>) -> Result<Self, String> {
        let highest = match file.as_ref().map(std::fs::read) {
            None => BTreeMap::new(),
            Some(Err(error)) if error.kind() == std::io::ErrorKind::NotFound => BTreeMap::new(),
            Some(read) => {
                let shown =
                    file.as_ref().map(|file| file.display().to_string()).unwrap_or_default();
                let bytes = read.map_err(|error| format!("failed to read {shown}: {error}"))?;
                serde_json::from_slice(&bytes).map_err(|error| {
                    format!(
                        "{shown} is damaged ({error}); it keeps older signed plugins from being loaded again. Restore it, or delete it if that is not to be feared"
                    )
                })?
            }
        };
        Ok(Self { file, highest: Mutex::new(highest) })
    }

    /// Refuses a number lower than one that was loaded.
    pub fn check(&self, name: &str, serial: u64) -> Result<(), String> {
        let highest = self.highest.lock().unwrap_or_else(PoisonError::into_inner);
        match highest.get(name).filter(|highest| serial < **highest) {
            None => Ok(()),
            Some(highest) => Err(format!(
                "is of an older file: its serial is {serial}, and {highest} was loaded before; if that is what you want, sign it again"
            )),
        }
    }

    /// Remembers a number that was loaded.
    pub fn raise(&self, name: &str, serial: u64) {
        let mut highest = self.highest.lock().unwrap_or_else(PoisonError::into_inner);
        if highest.get(name).is_some_and(|highest| *highest >= serial) || serial == 0 {
            return;
        }
        highest.insert(name.to_owned(), serial);
        kept::keep(self.file.as_deref(), "the serials of signed plugins", &*highest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_older_file_is_refused_also_after_a_restart() {
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
            assert!(serials.check("a", 6).unwrap_err().contains("its serial is 6, and 7"));
        }
        std::fs::write(&file, "{").unwrap();
        assert!(Serials::open(Some(file)).is_err());
    }
}
