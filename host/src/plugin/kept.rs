//! Small files of the data folder, written whole or not at all.

use std::path::Path;

use serde::Serialize;

/// Keeps a value, if there is a file for it. A file that cannot be written is logged: the value holds for this process.
pub fn keep<T: Serialize>(file: Option<&Path>, what: &str, value: &T) {
    let Some(file) = file else { return };
    if let Err(error) = write(file, value) {
        tracing::warn!("{what} cannot be kept in {}: {error}", file.display());
    }
}

fn write<T: Serialize>(file: &Path, value: &T) -> std::io::Result<()> {
    let beside = tempfile::NamedTempFile::new_in(file.parent().unwrap_or(Path::new(".")))?;
    serde_json::to_writer(beside.as_file(), value)?;
    beside.as_file().sync_all()?;
    beside.persist(file)?;
    Ok(())
}
