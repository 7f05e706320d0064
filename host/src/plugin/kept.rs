//! Small files of the data folder, written whole or not at all.

use std::path::Path;

use serde::Serialize;

pub fn write<T: Serialize>(file: &Path, value: &T) -> std::io::Result<()> {
    let beside = tempfile::NamedTempFile::new_in(file.parent().unwrap_or(Path::new(".")))?;
    serde_json::to_writer(beside.as_file(), value)?;
    beside.as_file().sync_all()?;
    beside.persist(file)?;
    Ok(())
}
