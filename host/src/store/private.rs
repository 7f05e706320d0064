//! Who may read what is kept: prompts, answers and plugins' secrets are the operator's, not every local user's.
//!
//! What the server makes is made for its own user alone, by the umask of the process ([`umask`]) and by the modes given here. What an
//! earlier version made for others, too, is corrected when it is opened. A folder that holds other things than the server's is somebody's
//! and keeps its mode: what the server has in it is corrected all the same.

use std::fs::{DirBuilder, Permissions};
use std::io::Result;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;
use std::sync::OnceLock;

/// What a data folder holds. Everything else is somebody's.
const OWN: [&str; 10] = [
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

/// The umask that the process was started with.
static STARTED_WITH: OnceLock<u32> = OnceLock::new();

/// Makes every file of this process from now on readable for its own user alone, unless its mode is set otherwise.
pub fn umask() {
    let before = rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
    STARTED_WITH.get_or_init(|| before.bits());
}

/// The mode of a file that is made for the user who gave the command, as their umask has it; none if the process has it still.
pub fn users_mode() -> Option<u32> {
    STARTED_WITH.get().map(|umask| 0o666 & !umask)
}

/// Makes a folder, and those it is in, for this user alone; one that is there stays as it is.
pub fn make_folder(folder: &Path) -> Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder)
}

/// Takes a data folder away from other users, as far as it is ours to do so. What cannot be corrected is logged.
pub fn correct(folder: &Path) {
    // Without a database it is not ours, whatever the names in it.
    if !folder.join("batchwright.db").exists() {
        return;
    }
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    let mut all_ours = true;
    for entry in entries.flatten() {
        let is_own = entry.file_name().to_str().is_some_and(|name| OWN.contains(&name));
        all_ours &= is_own;
        // The cache sees to itself.
        if is_own && entry.file_name() != "cache" {
            correct_one(&entry.path());
        }
    }
    if all_ours {
        correct_one(folder);
    } else if is_open(folder).unwrap_or(false) {
        tracing::debug!("the data folder holds other files, so its own mode is left as it is");
    }
}

fn is_open(path: &Path) -> Result<bool> {
    Ok(std::fs::metadata(path)?.permissions().mode() & 0o077 != 0)
}

fn correct_one(path: &Path) {
    let corrected = || {
        let found = std::fs::symlink_metadata(path)?;
        let mode = found.permissions().mode() & 0o777;
        if found.is_symlink() || mode & 0o077 == 0 {
            return Ok(());
        }
        std::fs::set_permissions(path, Permissions::from_mode(mode & 0o700))
    };
    if let Err(error) = corrected() {
        tracing::warn!(
            path = %path.display(),
            "other users of this machine may read prompts and answers, as the mode of this path cannot be changed: {error}"
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
    fn what_the_server_made_is_corrected_and_what_is_somebodys_is_not() {
        for others in [false, true] {
            let outer = tempfile::tempdir().unwrap();
            let folder = outer.path().join("data");
            std::fs::create_dir(&folder).unwrap();
            std::fs::create_dir(folder.join("objects")).unwrap();
            std::fs::write(folder.join("batchwright.db"), b"x").unwrap();
            for (name, old) in [("", 0o755), ("objects", 0o755), ("batchwright.db", 0o644)] {
                std::fs::set_permissions(folder.join(name), Permissions::from_mode(old)).unwrap();
            }
            if others {
                std::fs::write(folder.join("thesis.txt"), b"x").unwrap();
                std::fs::set_permissions(folder.join("thesis.txt"), Permissions::from_mode(0o644))
                    .unwrap();
            }
            correct(&folder);
            assert_eq!(mode(&folder), if others { 0o755 } else { 0o700 });
            assert_eq!(
                (mode(&folder.join("objects")), mode(&folder.join("batchwright.db"))),
                (0o700, 0o600)
            );
            if others {
                assert_eq!(mode(&folder.join("thesis.txt")), 0o644);
            }
        }
    }
}
