//! Which plugin came first, so that the same one serves a model that two ask for, before and after a restart.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use super::kept;

/// Names of plugins in the order in which they came to serve, in a file of the data folder.
pub struct Order {
    /// None keeps them for this process alone.
    file: Option<PathBuf>,
    names: Mutex<Vec<String>>,
}

impl Order {
    /// Reads what a former process left. Without it, names decide.
    pub fn open(file: Option<PathBuf>) -> Self {
        let text = file.as_ref().and_then(|file| std::fs::read(file).ok());
        let names = text.and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
        Self { file, names: Mutex::new(names) }
    }

    /// The place of a plugin; one that is new comes after all others.
    pub fn place(&self, name: &str) -> usize {
        let names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        names.iter().position(|known| known == name).unwrap_or(usize::MAX)
    }

    /// Takes note of those that serve now.
    pub fn note<'a>(&self, serving: impl Iterator<Item = &'a str>) {
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
        kept::keep(self.file.as_deref(), "the order of plugins", &*names);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_to_serve_stays_the_first_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("order");
        let order = Order::open(Some(file.clone()));
        order.note(["b", "c"].into_iter());
        order.note(["a", "b", "c"].into_iter());
        let again = Order::open(Some(file.clone()));
        assert!(again.place("b") < again.place("c") && again.place("c") < again.place("a"));
        again.note(["a", "c"].into_iter());
        assert_eq!(again.place("b"), usize::MAX);
        std::fs::write(&file, "damaged").unwrap();
        assert_eq!(Order::open(Some(file)).place("a"), usize::MAX);
    }
}
