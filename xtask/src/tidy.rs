//! Tidy rules of `cargo xtask check`: names in documents, words, line lengths, crate imports.

mod crates;
mod lines;
mod links;
mod names;
mod rooms;
mod words;

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::run::root;

/// Text file that git tracks or would track.
struct Source {
    /// Path, relative to the root of the repository.
    path: String,
    text: String,
}

impl Source {
    /// Returns true if the path ends with one of the extensions.
    fn has_extension(&self, extensions: &[&str]) -> bool {
        extensions.iter().any(|extension| self.path.ends_with(extension))
    }

    /// Returns the lines with their numbers, from 1.
    fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        (1..).zip(self.text.lines())
    }
}

/// Runs every check and reports all faults at once, one a line.
pub fn all() -> Result<()> {
    let sources = sources()?;
    let mut faults = Vec::new();
    faults.extend(crates::faults(&sources)?);
    faults.extend(lines::faults(&sources));
    faults.extend(links::faults(&sources));
    faults.extend(words::faults(&sources));
    faults.extend(names::faults(&sources));
    faults.extend(rooms::faults(&sources));
    if faults.is_empty() {
        return Ok(());
    }
    for fault in &faults {
        eprintln!("{fault}");
    }
    bail!("tidy: {} faults, listed above", faults.len())
}

/// Reads every text file that git tracks or would track.
fn sources() -> Result<Vec<Source>> {
    let mut git = Command::new("git");
    git.args(["ls-files", "--cached", "--others", "--exclude-standard", "-z"]).current_dir(root());
    let listed = git.output().context("failed to start git")?;
    let listed = String::from_utf8(listed.stdout)?;
    let mut sources = Vec::new();
    for path in listed.split('\0').filter(|path| !path.is_empty()) {
        let whole: PathBuf = root().join(path);
        // Skips deleted files that are not committed yet, and binary files.
        let Ok(text) = fs::read_to_string(&whole) else { continue };
        sources.push(Source { path: path.to_owned(), text });
    }
    Ok(sources)
}
