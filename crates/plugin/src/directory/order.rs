//! Order in which plugins started to serve, kept across restarts.
//!
//! If two plugins claim one model, the order decides which plugin serves it.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use crate::package::state_file;

/// Names of plugins in the order in which they started to serve, in a file of the data folder.
pub(crate) struct Order {
    /// None keeps the names in memory only.
    file: Option<PathBuf>,
    names: Mutex<Vec<String>>,
}

impl Order {
    /// Reads the order that a former process stored. Without a readable file the order is empty.
    pub(crate) fn open(file: Option<PathBuf>) -> Self {
        let text = file.as_ref().and_then(|file| std::fs::read(file).ok());
        let names = text.and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
        Self { file, names: Mutex::new(names) }
    }

    /// Returns the position of a plugin. A new plugin comes after all others.
    pub(crate) fn position(&self, name: &str) -> usize {
        let names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        names.iter().position(|known| known == name).unwrap_or(usize::MAX)
    }

    /// Records the plugins that serve now: removes other names and appends new ones.
    pub(crate) fn record<'a>(&self, serving: impl Iterator<Item = &'a str>) {
        let serving: Vec<&str> = serving.collect();
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        let mut now: Vec<String> =
            names.iter().filter(|name| serving.contains(&name.as_str())).cloned().collect();
        let new: Vec<&&str> =
            serving.iter().filter(|name| !now.iter().any(|known| known == **name)).collect();
        now.extend(new.into_iter().map(|name| (*name).to_owned()));
        if *names == now {
            return;
        }
        *names = now;
        state_file::save(self.file.as_deref(), &*names);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_is_kept_across_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("order");
        let order = Order::open(Some(file.clone()));
        order.record(["b", "c"].into_iter());
        order.record(["a", "b", "c"].into_iter());
        let again = Order::open(Some(file.clone()));
        assert!(
            again.position("b") < again.position("c") && again.position("c") < again.position("a")
        );
        again.record(["a", "c"].into_iter());
        assert_eq!(again.position("b"), usize::MAX);
        std::fs::write(&file, "damaged").unwrap();
        assert_eq!(Order::open(Some(file)).position("a"), usize::MAX);
    }
}
