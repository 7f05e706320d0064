//! Watch of the plugin directory: reads the directory again when the directory, or a file that its
//! plugins name, changes.
//!
//! **Polling** detects every kind of change: a replaced directory, a link with a new target
//! (Kubernetes swaps `..data`), a secret in another folder, a file on a network mount.
//! **Notifications** of the file system only shorten the delay. Network file systems do not report
//! changes made on other machines, so there the watch polls only.
//!
//! A poll compares cheap metadata: inode, size, mode and times. The registry then compares the
//! contents of the files and decides which plugins are loaded again.
//!
//! **Coarse times.** Two writes within one tick of the file system's clock leave the same times.
//! So after a recent change the next poll reads the directory again, even without a difference.
//!
//! **Quiet period.** Copying a component takes several writes. So after a notification the watch
//! waits until the directory is quiet, up to a maximum.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use notify::{RecursiveMode, Watcher};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use crate::directory::registry::Registry;

/// Interval at which all metadata is compared.
const POLL_INTERVAL: Duration = Duration::from_secs(2);

/// Time without notifications after which the directory is read.
const QUIET_PERIOD: Duration = Duration::from_millis(200);

/// Maximum wait for a quiet period.
const MAX_QUIET_WAIT: Duration = Duration::from_secs(2);

/// Resolution of file times. A file that changed this recently may change again with equal times.
const TIME_RESOLUTION: Duration = Duration::from_secs(1);

/// Maximum number of files of the directory that are compared.
const MAX_COMPARED_FILES: usize = 10_000;

/// Type numbers (statfs(2)) and names of file systems that do not report changes made on other
/// machines.
const NETWORK_FILE_SYSTEMS: [(u64, &str); 6] = [
    (0x6969, "NFS"),
    (0x517B, "SMB"),
    (0xFF53_4D42, "CIFS"),
    (0xFE53_4D42, "SMB2"),
    (0x0102_1997, "9p"),
    (0x6573_5546, "FUSE"),
];

/// Metadata of the directory and of the files that its plugins name, at one moment.
#[derive(Clone, Default, PartialEq, Eq)]
struct DirectoryState {
    /// Real path, device and inode of the directory.
    folder: Option<(PathBuf, u64, u64)>,
    /// Hash of the metadata of all files.
    files: u64,
    /// True if a file changed so recently that another change may leave equal times.
    is_recent: bool,
}

impl DirectoryState {
    #[expect(clippy::disallowed_methods, reason = "compared with times of the file system")]
    fn read(folder: &Path, others: &BTreeSet<PathBuf>) -> Self {
        let (mut hash, mut newest) = (DefaultHasher::new(), 0);
        let mut add = |path: &Path| {
            path.hash(&mut hash);
            if let Ok(found) = std::fs::metadata(path) {
                newest = newest.max(found.ctime());
                let times = (found.mtime(), found.mtime_nsec(), found.ctime(), found.ctime_nsec());
                (found.dev(), found.ino(), found.size(), found.mode(), times).hash(&mut hash);
            }
        };
        add(folder);
        let found =
            std::fs::read_dir(folder).into_iter().flatten().flatten().take(MAX_COMPARED_FILES);
        let mut files: Vec<PathBuf> =
            found.map(|entry| entry.path()).filter(|path| !is_hidden(path)).collect();
        files.sort();
        files.iter().chain(others).for_each(|path| add(path));
        let real = std::fs::canonicalize(folder).ok();
        let folder = real.and_then(|real| {
            let found = std::fs::metadata(&real).ok()?;
            Some((real, found.dev(), found.ino()))
        });
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let changed = Duration::from_secs(u64::try_from(newest).unwrap_or(0));
        // The clock of a file server may be ahead.
        let age = now.checked_sub(changed);
        let is_recent =
            age.is_some_and(|age| age <= TIME_RESOLUTION.saturating_add(Duration::from_secs(1)));
        Self { folder, files: hash.finish(), is_recent }
    }
}

/// Returns true if the file name begins with a dot, as in temporary files of editors and file
/// systems: `.#x.toml`, `._x.toml`, `.x.toml.swp`.
pub fn is_hidden(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."))
}

/// Subscription to the file system notifications of one directory.
struct Notifications {
    _watcher: notify::RecommendedWatcher,
}

impl Notifications {
    fn start(folder: &Path, changed: mpsc::Sender<()>) -> notify::Result<Self> {
        let on_event = move |event: notify::Result<notify::Event>| {
            // Reads are events too and are ignored. An error may mean that an event was lost.
            if event.is_ok_and(|event| event.kind.is_access()) {
                return;
            }
            // A full channel already holds a pending notification.
            changed.try_send(()).ok();
        };
        // A link out of the directory must not extend the watch to its target.
        let config = notify::Config::default().with_follow_symlinks(false);
        let mut watcher = notify::RecommendedWatcher::new(on_event, config)?;
        watcher.watch(folder, RecursiveMode::Recursive)?;
        Ok(Self { _watcher: watcher })
    }
}

/// Starts to watch the registry's directory. Dropping the returned handle stops the watch.
pub fn watch(registry: &Arc<Registry>) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(run(Arc::downgrade(registry))))
}

async fn run(registry: Weak<Registry>) {
    let (changed, mut changes) = mpsc::channel(1);
    let mut notifications: Option<Notifications> = None;
    // The state at the registry's first read is unknown, so the directory is read once more.
    let mut last = DirectoryState::default();
    loop {
        let Some(registry) = registry.upgrade() else { return };
        let now = read_state(&registry).await;
        if now.folder != last.folder {
            notifications = subscribe(&registry, &now, &changed);
        }
        let is_requested = registry.take_request();
        if is_requested || now != last || last.is_recent {
            last = now;
            let read = tokio::select! {
                read = registry.read() => Some(read),
                // The directory is read again with the change. Running compilations continue.
                _ = changes.recv() => None,
            };
            match read {
                Some(Ok(())) => {}
                Some(Err(error)) => {
                    tracing::error!(%error, "plugin directory not read, plugins unchanged")
                }
                None => {
                    wait_until_quiet(&mut changes).await;
                    last = DirectoryState::default();
                    continue;
                }
            }
        }
        let requested = registry.requested();
        drop(registry);
        tokio::select! {
            _ = changes.recv(), if notifications.is_some() => wait_until_quiet(&mut changes).await,
            () = requested => {}
            () = tokio::time::sleep(POLL_INTERVAL) => {}
        }
    }
}

/// Waits for a quiet period, up to the maximum wait.
async fn wait_until_quiet(changes: &mut mpsc::Receiver<()>) {
    let quiet = async {
        while let Ok(Some(())) = tokio::time::timeout(QUIET_PERIOD, changes.recv()).await {}
    };
    tokio::time::timeout(MAX_QUIET_WAIT, quiet).await.ok();
}

async fn read_state(registry: &Registry) -> DirectoryState {
    let (folder, others) = (registry.folder().to_owned(), registry.named_files());
    // Access to an unavailable mount may block.
    tokio::task::spawn_blocking(move || DirectoryState::read(&folder, &others))
        .await
        .unwrap_or_default()
}

/// Subscribes to notifications of the directory. None if the watch polls only.
fn subscribe(
    registry: &Registry,
    now: &DirectoryState,
    changed: &mpsc::Sender<()>,
) -> Option<Notifications> {
    let (folder, _, _) = now.folder.as_ref()?;
    let path = registry.folder().display();
    if let Some(file_system) = network_file_system(folder) {
        tracing::info!(
            %path,
            file_system,
            poll_interval = ?POLL_INTERVAL,
            "plugin directory is on a network file system, changes are found by polling"
        );
        return None;
    }
    match Notifications::start(folder, changed.clone()) {
        Ok(notifications) => Some(notifications),
        Err(error) => {
            let hint = match error.kind {
                notify::ErrorKind::MaxFilesWatch => Some("raise fs.inotify.max_user_watches"),
                notify::ErrorKind::Io(ref error) if error.raw_os_error() == Some(24) => {
                    Some("raise fs.inotify.max_user_instances")
                }
                _ => None,
            };
            tracing::warn!(
                %path,
                %error,
                hint,
                poll_interval = ?POLL_INTERVAL,
                "no notifications of the file system, plugin changes are found by polling"
            );
            None
        }
    }
}

/// Returns the name of the network file system that holds the directory, if there is one.
#[cfg(target_os = "linux")]
fn network_file_system(folder: &Path) -> Option<&'static str> {
    let found = rustix::fs::statfs(folder).ok()?;
    let kind = u64::try_from(found.f_type).unwrap_or(0) & 0xFFFF_FFFF;
    NETWORK_FILE_SYSTEMS.iter().find(|(number, _)| *number == kind).map(|(_, name)| *name)
}

#[cfg(not(target_os = "linux"))]
fn network_file_system(_: &Path) -> Option<&'static str> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directory_state_detects_every_kind_of_change() {
        let outer = tempfile::tempdir().unwrap();
        let at = |name: &str| outer.path().join(name);
        for name in ["one", "two"] {
            std::fs::create_dir(at(name)).unwrap();
            std::fs::write(at(name).join("a.toml"), "x").unwrap();
        }
        std::os::unix::fs::symlink(at("one"), at("plugins")).unwrap();
        std::fs::write(at("secret"), "s").unwrap();
        let others = BTreeSet::from([at("secret")]);
        let read = || {
            let state = DirectoryState::read(&at("plugins"), &others);
            (state.folder, state.files)
        };
        let mut last = read();
        let mut changed = |what: &str, is_change: bool| {
            let now = read();
            assert_eq!(now != last, is_change, "{what}");
            last = now;
        };
        std::fs::write(at("one").join(".#a.toml"), "x").unwrap();
        std::fs::remove_file(at("one").join(".#a.toml")).unwrap();
        changed("a new time of the directory", true);
        changed("no change", false);
        let file = std::fs::File::options().write(true).open(at("one").join("a.toml")).unwrap();
        let time = file.metadata().unwrap().modified().unwrap();
        std::thread::sleep(Duration::from_millis(20));
        std::io::Write::write_all(&mut &file, b"y").unwrap();
        file.set_modified(time).unwrap();
        changed("other content with the same time and size", true);
        std::fs::write(at("secret"), "t2").unwrap();
        changed("a changed secret", true);
        std::fs::remove_file(at("plugins")).unwrap();
        std::os::unix::fs::symlink(at("two"), at("plugins")).unwrap();
        changed("a link with another target", true);
        std::fs::rename(at("two"), at("old")).unwrap();
        std::fs::rename(at("one"), at("two")).unwrap();
        changed("a replaced directory", true);
        std::fs::remove_dir_all(at("two")).unwrap();
        changed("a removed directory", true);
    }
}
