//! When the plugin directory is read again: when something in it, or a file that its plugins name, has changed.
//!
//! Polling decides, as it sees every kind of change: a directory that is a link or was replaced, a link that leads elsewhere (Kubernetes swaps
//! `..data`), a secret in another folder, a network mount. Notifications of the system make it quicker where there are any. What is compared
//! is cheap (inode, size, times); whether a plugin is loaded again is decided by the contents of its files.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use notify::{RecursiveMode, Watcher};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use super::registry::Registry;

/// How often everything is looked at.
const POLL_INTERVAL: Duration = Duration::from_secs(2);

/// How long the directory must be quiet before it is read again, as copying a component takes several writes; and how long that is waited for.
const QUIET: Duration = Duration::from_millis(200);
const MAX_QUIET_WAIT: Duration = Duration::from_secs(2);

/// Times of files are coarse: a file that changed so lately may change again without another time.
const COARSE: Duration = Duration::from_secs(1);

/// Files of a directory that are compared.
const MAX_FILES: usize = 10_000;

/// File systems that tell nobody of changes made on other machines, by their numbers (statfs(2)), and what they are called.
const NETWORK: [(u64, &str); 6] = [
    (0x6969, "NFS"),
    (0x517B, "SMB"),
    (0xFF53_4D42, "CIFS"),
    (0xFE53_4D42, "SMB2"),
    (0x0102_1997, "9p"),
    (0x6573_5546, "FUSE"),
];

/// The directory and everything that belongs to its plugins, as they were at one moment.
#[derive(Clone, Default, PartialEq, Eq)]
struct Seen {
    /// The directory itself, with links followed.
    folder: Option<(PathBuf, u64, u64)>,
    files: u64,
    /// Something changed just now.
    is_fresh: bool,
}

impl Seen {
    fn look(folder: &Path, others: &BTreeSet<PathBuf>) -> Self {
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
        let found = std::fs::read_dir(folder).into_iter().flatten().flatten().take(MAX_FILES);
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
        // The clock of a server of files may be ahead.
        let age = now.checked_sub(changed);
        let is_fresh = age.is_some_and(|age| age <= COARSE.saturating_add(Duration::from_secs(1)));
        Self { folder, files: hash.finish(), is_fresh }
    }
}

/// Files that editors and file systems put beside others begin with a dot: `.#x.toml`, `._x.toml`, `.x.toml.swp`.
pub fn is_hidden(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."))
}

/// Notifications of the system, of one directory.
struct Notified {
    _watcher: notify::RecommendedWatcher,
}

impl Notified {
    fn start(folder: &Path, changed: mpsc::Sender<()>) -> notify::Result<Self> {
        let note = move |event: notify::Result<notify::Event>| {
            // Reading is an event, too. What went wrong may be that one was lost.
            if event.is_ok_and(|event| event.kind.is_access()) {
                return;
            }
            // One note that something changed is as good as many.
            changed.try_send(()).ok();
        };
        // A link out of the directory must not have everything there watched.
        let config = notify::Config::default().with_follow_symlinks(false);
        let mut watcher = notify::RecommendedWatcher::new(note, config)?;
        watcher.watch(folder, RecursiveMode::Recursive)?;
        Ok(Self { _watcher: watcher })
    }
}

/// Watches the directory from now on. The watch ends when what it returns is dropped.
pub fn watch(registry: &Arc<Registry>) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(run(Arc::downgrade(registry))))
}

async fn run(registry: Weak<Registry>) {
    let (changed, mut changes) = mpsc::channel(1);
    let mut notified: Option<Notified> = None;
    // What was there when it was read for the first time is not known, so it is read once more.
    let mut seen = Seen::default();
    loop {
        let Some(registry) = registry.upgrade() else { return };
        let now = look(&registry).await;
        if now.folder != seen.folder {
            notified = follow(&registry, &now, &changed);
        }
        let asked = registry.take_request();
        if asked || now != seen || seen.is_fresh {
            seen = now;
            let read = tokio::select! {
                read = registry.read() => Some(read),
                // It is read again with the change. What is being compiled goes on meanwhile.
                _ = changes.recv() => None,
            };
            match read {
                Some(Ok(())) => {}
                Some(Err(error)) => tracing::error!("the plugins stay as they are: {error}"),
                None => {
                    quiet(&mut changes).await;
                    seen = Seen::default();
                    continue;
                }
            }
        }
        let requested = registry.requested();
        drop(registry);
        tokio::select! {
            _ = changes.recv(), if notified.is_some() => quiet(&mut changes).await,
            () = requested => {}
            () = tokio::time::sleep(POLL_INTERVAL) => {}
        }
    }
}

async fn quiet(changes: &mut mpsc::Receiver<()>) {
    let quiet =
        async { while let Ok(Some(())) = tokio::time::timeout(QUIET, changes.recv()).await {} };
    tokio::time::timeout(MAX_QUIET_WAIT, quiet).await.ok();
}

async fn look(registry: &Registry) -> Seen {
    let (folder, others) = (registry.folder().to_owned(), registry.named_files());
    // A mount that is away may hold up whoever asks it.
    tokio::task::spawn_blocking(move || Seen::look(&folder, &others)).await.unwrap_or_default()
}

/// Has the system tell of changes, if it does for this directory.
fn follow(registry: &Registry, now: &Seen, changed: &mpsc::Sender<()>) -> Option<Notified> {
    let (folder, _, _) = now.folder.as_ref()?;
    let shown = registry.folder().display();
    let seconds = POLL_INTERVAL.as_secs();
    if let Some(name) = network(folder) {
        tracing::info!(
            "the plugin directory {shown} is on {name}; changes are found within {seconds} s, by polling"
        );
        return None;
    }
    match Notified::start(folder, changed.clone()) {
        Ok(notified) => Some(notified),
        Err(error) => {
            let hint = match error.kind {
                notify::ErrorKind::MaxFilesWatch => " (raise fs.inotify.max_user_watches)",
                notify::ErrorKind::Io(ref error) if error.raw_os_error() == Some(24) => {
                    " (raise fs.inotify.max_user_instances)"
                }
                _ => "",
            };
            tracing::warn!(
                "the system does not tell of changes in the plugin directory {shown}: {error}{hint}; they are found within {seconds} s, by polling"
            );
            None
        }
    }
}

#[cfg(target_os = "linux")]
fn network(folder: &Path) -> Option<&'static str> {
    let found = rustix::fs::statfs(folder).ok()?;
    let kind = u64::try_from(found.f_type).unwrap_or(0) & 0xFFFF_FFFF;
    NETWORK.iter().find(|(number, _)| *number == kind).map(|(_, name)| *name)
}

#[cfg(not(target_os = "linux"))]
fn network(_: &Path) -> Option<&'static str> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_change_is_seen() {
        let outer = tempfile::tempdir().unwrap();
        let at = |name: &str| outer.path().join(name);
        for name in ["one", "two"] {
            std::fs::create_dir(at(name)).unwrap();
            std::fs::write(at(name).join("a.toml"), "x").unwrap();
        }
        std::os::unix::fs::symlink(at("one"), at("plugins")).unwrap();
        std::fs::write(at("secret"), "s").unwrap();
        let others = BTreeSet::from([at("secret")]);
        let look = || {
            let seen = Seen::look(&at("plugins"), &others);
            (seen.folder, seen.files)
        };
        let mut last = look();
        let mut changed = |what: &str, is_change: bool| {
            let now = look();
            assert_eq!(now != last, is_change, "{what}");
            last = now;
        };
        std::fs::write(at("one").join(".#a.toml"), "x").unwrap();
        std::fs::remove_file(at("one").join(".#a.toml")).unwrap();
        changed("the directory's own time", true);
        changed("nothing", false);
        let file = std::fs::File::options().write(true).open(at("one").join("a.toml")).unwrap();
        let time = file.metadata().unwrap().modified().unwrap();
        std::thread::sleep(Duration::from_millis(20));
        std::io::Write::write_all(&mut &file, b"y").unwrap();
        file.set_modified(time).unwrap();
        changed("another content with the time and the size of before", true);
        std::fs::write(at("secret"), "t2").unwrap();
        changed("a secret", true);
        std::fs::remove_file(at("plugins")).unwrap();
        std::os::unix::fs::symlink(at("two"), at("plugins")).unwrap();
        changed("a link that leads elsewhere", true);
        std::fs::rename(at("two"), at("old")).unwrap();
        std::fs::rename(at("one"), at("two")).unwrap();
        changed("a directory that was replaced", true);
        std::fs::remove_dir_all(at("two")).unwrap();
        changed("a directory that is gone", true);
    }
}
