//! File modes: only the server's own user may read prompts, responses and plugin secrets.
//!
//! The server creates files and folders for its own user alone, by the umask of the process
//! ([`umask`]) and by explicit modes.
//! Files that an earlier version created with wider modes are restricted when the data folder is
//! opened.
//! A data folder that also contains foreign files keeps its mode, because its user chose the mode;
//! the server's own files in the folder are restricted all the same.

use std::fs::{DirBuilder, Permissions};
use std::io::Result;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;
use std::sync::OnceLock;

/// Names of the server's own entries in a data folder; all other entries are foreign.
const OWN_ENTRIES: [&str; 10] = [
    "batchwright.db",
    "batchwright.db-wal",
    "batchwright.db-shm",
    "lock",
    "objects",
    "cache",
    "serials",
    "plugin-order",
    "run.json",
    "run.json.new",
];

/// Umask with which the process was started.
static INITIAL_UMASK: OnceLock<u32> = OnceLock::new();

/// Restricts files that this process creates from now on to its own user, unless a mode is set.
pub fn umask() {
    let before = rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
    INITIAL_UMASK.get_or_init(|| before.bits());
}

/// Returns the mode of a new file under the user's own umask, or `None` if the umask is unchanged.
pub fn users_mode() -> Option<u32> {
    INITIAL_UMASK.get().map(|umask| 0o666 & !umask)
}

/// Creates a folder and its parents for this user alone; an existing folder keeps its mode.
pub(crate) fn create_folder(folder: &Path) -> Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder)
}

/// Removes the access of other users to a data folder; logs paths whose mode cannot be changed.
pub(crate) fn restrict_modes(folder: &Path) {
    // A folder without a database is no data folder, whatever its entries are called.
    if !folder.join("batchwright.db").exists() {
        return;
    }
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    let mut all_own = true;
    for entry in entries.flatten() {
        let is_own = entry.file_name().to_str().is_some_and(|name| OWN_ENTRIES.contains(&name));
        all_own &= is_own;
        // The compile cache checks its own modes.
        if is_own && entry.file_name() != "cache" {
            restrict_mode(&entry.path());
        }
    }
    if all_own {
        restrict_mode(folder);
    } else if is_open(folder).unwrap_or(false) {
        tracing::debug!(
            path = %folder.display(),
            "data folder contains foreign files, mode unchanged"
        );
    }
}

/// Returns true if other users have any access to a path.
fn is_open(path: &Path) -> Result<bool> {
    Ok(std::fs::metadata(path)?.permissions().mode() & 0o077 != 0)
}

/// Removes the access of other users to a path; logs a failure.
fn restrict_mode(path: &Path) {
    let restrict = || {
        let found = std::fs::symlink_metadata(path)?;
        let mode = found.permissions().mode() & 0o777;
        if found.is_symlink() || mode & 0o077 == 0 {
            return Ok(());
        }
        std::fs::set_permissions(path, Permissions::from_mode(mode & 0o700))
    };
    if let Err(error) = restrict() {
        tracing::warn!(
            %error,
            path = %path.display(),
            "mode not changed, other users of this machine may read prompts and responses"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn own_entries_are_restricted_and_foreign_files_keep_their_modes() {
        for has_foreign_file in [false, true] {
            let outer = tempfile::tempdir().unwrap();
            let folder = outer.path().join("data");
            std::fs::create_dir(&folder).unwrap();
            std::fs::create_dir(folder.join("objects")).unwrap();
            std::fs::write(folder.join("batchwright.db"), b"x").unwrap();
            for (name, old) in [("", 0o755), ("objects", 0o755), ("batchwright.db", 0o644)] {
                std::fs::set_permissions(folder.join(name), Permissions::from_mode(old)).unwrap();
            }
            if has_foreign_file {
                std::fs::write(folder.join("thesis.txt"), b"x").unwrap();
                std::fs::set_permissions(folder.join("thesis.txt"), Permissions::from_mode(0o644))
                    .unwrap();
            }
            restrict_modes(&folder);
            assert_eq!(mode(&folder), if has_foreign_file { 0o755 } else { 0o700 });
            assert_eq!(
                (mode(&folder.join("objects")), mode(&folder.join("batchwright.db"))),
                (0o700, 0o600)
            );
            if has_foreign_file {
                assert_eq!(mode(&folder.join("thesis.txt")), 0o644);
            }
        }
    }
}
