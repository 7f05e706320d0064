//! Manifest of a backup: what it consists of, one JSON object per line.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::failed;
use crate::{Result, StoreError};

/// Name of the manifest.
pub(super) const MANIFEST: &str = "manifest.jsonl";

/// Version of the format of the manifest.
pub(super) const FORMAT: u32 = 1;

/// Maximum size of a line: a damaged manifest must not fill the memory.
const MAX_LINE_BYTES: u64 = 64 << 10;

/// Line of the manifest.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(super) enum Line {
    /// First line.
    Backup {
        format: u32,
        /// Version of the program.
        version: String,
        /// Time of the copy of the database, in Unix seconds.
        created_at: i64,
    },
    /// Copy of the database, or another file of the data folder.
    File { name: String, restored_as: String, bytes: u64, sha256: String },
    /// Object that was deleted while the backup ran, or that is lost.
    Missing { tenant: String, id: String },
    /// Object, in the order of tenants and ids.
    Object { tenant: String, id: String, bytes: u64, sha256: String },
    /// Last line, with the number of objects.
    End { objects: u64 },
}

/// Lines of a manifest, with a check of its beginning and of its end.
pub(super) struct Manifest {
    path: PathBuf,
    reader: BufReader<File>,
    objects: u64,
}

impl Manifest {
    /// Opens the manifest of a backup; none if there is none.
    pub(super) fn open(backup: &Path) -> Result<Option<Self>> {
        let path = backup.join(MANIFEST);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(&path, "cannot be read", &error)),
        };
        let mut manifest = Self { path, reader: BufReader::new(file), objects: 0 };
        match manifest.next()? {
            Some(Line::Backup { format: FORMAT, .. }) => Ok(Some(manifest)),
            Some(Line::Backup { format, .. }) => {
                Err(manifest.damaged(&format!("its format {format} is unknown to this version")))
            }
            _ => Err(manifest.damaged("it does not begin with a backup")),
        }
    }

    pub(super) fn damaged(&self, message: &str) -> StoreError {
        failed(&self.path, "the backup is damaged", &message)
    }

    /// Returns the next line; none after the last one.
    pub(super) fn next(&mut self) -> Result<Option<Line>> {
        let mut line = Vec::new();
        let mut reader = (&mut self.reader).take(MAX_LINE_BYTES);
        reader
            .read_until(b'\n', &mut line)
            .map_err(|error| failed(&self.path, "cannot be read", &error))?;
        if line.is_empty() {
            return Err(self.damaged("its manifest is cut off"));
        }
        if line.len() as u64 == MAX_LINE_BYTES {
            return Err(self.damaged("its manifest has a line that is too long"));
        }
        let line = serde_json::from_slice(&line)
            .map_err(|error| failed(&self.path, "the backup is damaged", &error))?;
        match line {
            Line::End { objects } if objects == self.objects => Ok(None),
            Line::End { .. } => Err(self.damaged("its manifest lacks objects")),
            Line::Object { .. } => {
                self.objects = self.objects.saturating_add(1);
                Ok(Some(line))
            }
            line => Ok(Some(line)),
        }
    }

    /// Returns the name of a file, which must not lead out of its folder.
    pub(super) fn checked_name(&self, name: String) -> Result<String> {
        if name.is_empty() || name.starts_with('.') || name.contains('/') {
            return Err(self.damaged("it names a file outside of its folder"));
        }
        Ok(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first_error(content: &str) -> String {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(MANIFEST), content).unwrap();
        let mut manifest = match Manifest::open(folder.path()) {
            Ok(manifest) => manifest.unwrap(),
            Err(error) => return error.to_string(),
        };
        loop {
            match manifest.next() {
                Ok(Some(_)) => {}
                Ok(None) => return String::new(),
                Err(error) => return error.to_string(),
            }
        }
    }

    #[test]
    fn damaged_manifest_is_refused_and_read_in_bounded_memory() {
        let head = r#"{"kind":"backup","format":1,"version":"1","created_at":1}"#;
        let object = r#"{"kind":"object","tenant":"t","id":"f","bytes":1,"sha256":"0"}"#;
        let end = |objects: u64| format!(r#"{{"kind":"end","objects":{objects}}}"#);
        assert_eq!(first_error(&format!("{head}\n{object}\n{}\n", end(1))), "");
        let long = "x".repeat(1 << 20);
        for (content, expected) in [
            (String::new(), "cut off"),
            (format!("{head}\n{object}\n"), "cut off"),
            (format!("{head}\n{object}\n{}\n", end(2)), "lacks objects"),
            (format!("{head}\n{object}\n{long}\n{}\n", end(1)), "too long"),
            (long, "too long"),
            (head.replace("1,", "9,"), "is unknown to this version"),
            (object.to_owned(), "does not begin with a backup"),
        ] {
            let error = first_error(&content);
            assert!(error.contains(expected), "{expected}: {error}");
        }
    }
}
