//! Small state files of the data folder, replaced atomically.

use std::path::Path;

use serde::Serialize;

/// Writes a value to its state file, if there is one.
///
/// A write error is only logged: the value still applies to this process.
pub(crate) fn save<T: Serialize>(file: Option<&Path>, value: &T) {
    let Some(file) = file else { return };
    if let Err(error) = write(file, value) {
        tracing::warn!(path = %file.display(), %error, "state file not written");
    }
}

/// Writes and syncs a temporary file beside the target, then renames it over the target.
fn write<T: Serialize>(file: &Path, value: &T) -> std::io::Result<()> {
    let temporary = tempfile::NamedTempFile::new_in(file.parent().unwrap_or(Path::new(".")))?;
    serde_json::to_writer(temporary.as_file(), value)?;
    temporary.as_file().sync_all()?;
    temporary.persist(file)?;
    Ok(())
}
