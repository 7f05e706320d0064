//! Which plugins there are: those of a directory, kept up to date while it changes.

use std::collections::BTreeSet;
use std::future::Future;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use arc_swap::ArcSwap;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{Notify, watch};

use super::error::LoadError;
use super::files::{Files, named_by};
use super::load::{Loader, plugin_name};
use super::order::Order;
use super::read::read_text;
use super::snapshot::{Entry, Snapshot};
use super::watch::is_hidden;

/// Whether a directory can be read: asked before anything is made that would be left behind.
pub fn check_directory(folder: &Path) -> Result<(), LoadError> {
    let found = std::fs::read_dir(folder);
    found.map(drop).map_err(|source| LoadError::Directory { path: folder.to_owned(), source })
}

/// The plugins of a directory.
pub struct Registry {
    folder: PathBuf,
    loader: Loader,
    current: ArcSwap<Snapshot>,
    /// One reading of the directory at a time.
    reading: tokio::sync::Mutex<()>,
    changed: watch::Sender<()>,
    is_requested: AtomicBool,
    requests: Arc<Notify>,
    order: Order,
    /// The file system of the directory when it was read last; zero before.
    device: AtomicU64,
}

impl Registry {
    /// Loads every plugin of the directory. One that fails does not stop the others; a directory that cannot be read does.
    pub async fn open(folder: &Path, loader: Loader) -> Result<Arc<Self>, LoadError> {
        let order = Order::open(loader.order_file.clone());
        let registry = Arc::new(Self {
            folder: folder.to_owned(),
            loader,
            current: ArcSwap::default(),
            reading: tokio::sync::Mutex::default(),
            changed: watch::Sender::new(()),
            is_requested: AtomicBool::new(false),
            requests: Arc::default(),
            order,
            device: AtomicU64::new(0),
        });
        registry.read().await?;
        Ok(registry)
    }

    pub fn current(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// Told whenever plugins may have changed.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Reads the directory again and swaps in what changed. What is under way finishes on the plugins it began with.
    pub async fn read(&self) -> Result<(), LoadError> {
        let _one_at_a_time = self.reading.lock().await;
        let before = self.current.load_full();
        self.loader.trust.read_keys();
        let files = self.files(!before.entries.is_empty())?;
        // Until its turn comes, each stays as it was.
        let mut entries: Vec<Entry> =
            before.entries.iter().filter(|entry| files.contains(&entry.file)).cloned().collect();
        let mut loading: FuturesUnordered<_> =
            files.into_iter().map(|file| self.entry(file, &before)).collect();
        while let Some(entry) = loading.next().await {
            entries.retain(|known| known.name != entry.name);
            entries.push(entry);
            // One that takes long to compile does not hold up the others; at the start there is nobody to wait for them.
            if !before.entries.is_empty() {
                self.publish(&entries, &before);
            }
        }
        self.publish(&entries, &before);
        Ok(())
    }

    /// Makes these the plugins from now on. Where two want the same, those of `before` go first.
    fn publish(&self, entries: &[Entry], before: &Snapshot) {
        let last =
            self.current.swap(Arc::new(Snapshot::build(entries.to_vec(), before, &self.order)));
        let now = self.current.load();
        let known_in =
            |entries: &'_ [Entry], name: &str| entries.iter().position(|entry| entry.name == name);
        for entry in &now.entries {
            let known =
                known_in(&last.entries, &entry.name).and_then(|place| last.entries.get(place));
            if known.is_none_or(|known| {
                known.fingerprint != entry.fingerprint
                    || known.error != entry.error
                    || known.serving.is_some() != entry.serving.is_some()
            }) {
                announce(entry);
            }
        }
        self.order.note(
            now.entries
                .iter()
                .filter(|entry| entry.serving.is_some())
                .map(|entry| entry.name.as_str()),
        );
        for entry in last.entries.iter().filter(|old| known_in(&now.entries, &old.name).is_none()) {
            tracing::info!(plugin = entry.name, "plugin removed");
        }
        self.changed.send_replace(());
    }

    fn files(&self, had_some: bool) -> Result<Vec<PathBuf>, LoadError> {
        let unreadable = |source| LoadError::Directory { path: self.folder.clone(), source };
        let mut files = Vec::new();
        for found in std::fs::read_dir(&self.folder).map_err(unreadable)? {
            let path = found.map_err(unreadable)?.path();
            if path.extension().is_some_and(|extension| extension == "toml") && !is_hidden(&path) {
                files.push(path);
            }
        }
        let device = std::fs::metadata(&self.folder).map_err(unreadable)?.dev();
        if files.is_empty() && had_some && device != self.device.load(Ordering::Relaxed) {
            let message =
                "it is empty and on another file system than before, as if a mount were missing";
            return Err(unreadable(std::io::Error::other(message)));
        }
        self.device.store(device, Ordering::Relaxed);
        Ok(files)
    }

    async fn entry(&self, file: PathBuf, before: &Snapshot) -> Entry {
        let (name, mut error) = match plugin_name(&file) {
            Ok(name) => (name, None),
            Err(error) => (file.display().to_string(), Some(error.to_string())),
        };
        let known = before.entries.iter().find(|known| known.name == name);
        // What serves is held to its own signature, whatever has become of its files.
        let mut serving = known
            .and_then(|known| known.serving.clone())
            .filter(|plugin| self.loader.trust.still_counts(plugin));
        let _turn = self.loader.turn().await;
        let read = file.clone();
        // With its secrets, which are files too.
        let files = tokio::task::spawn_blocking(move || {
            Files::read(&read).map(|files| (files.fingerprint(), files))
        })
        .await;
        let named = named_by(&file);
        let mut fingerprint = String::new();
        let named_files =
            named.or_else(|| known.map(|known| known.named_files.clone())).unwrap_or_default();
        let tenants = tenants_of(&file);
        if error.is_none() {
            match files {
                Ok(Ok((read, files))) => {
                    fingerprint = format!("{read} {}", self.loader.trust.keys_digest());
                    // One that failed is tried again: what was in its way may be gone.
                    let unchanged = known.is_some_and(|known| {
                        known.fingerprint == fingerprint && known.error.is_none()
                    });
                    if !unchanged {
                        match self.loader.load_files(files).await {
                            Ok(plugin) => serving = Some(Arc::new(plugin)),
                            Err(failed) => error = Some(failed.to_string()),
                        }
                    }
                }
                Ok(Err(LoadError::Disabled { .. })) => {
                    match self.loader.check_disabled(&file).await {
                        Ok(()) => serving = None,
                        Err(failed) => error = Some(failed.to_string()),
                    }
                }
                Ok(Err(failed)) => error = Some(failed.to_string()),
                Err(failed) => error = Some(failed.to_string()),
            }
        }
        Entry { name, file, serving, error, tenants, fingerprint, named_files }
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Files that plugins name and the loader asks for, wherever they are: components, signatures, secrets, trusted keys.
    pub fn named_files(&self) -> BTreeSet<PathBuf> {
        let current = self.current.load();
        let of_plugins = current.entries.iter().flat_map(|entry| entry.named_files.iter().cloned());
        of_plugins.chain(self.loader.trust.keys_file()).collect()
    }

    /// Has the directory and the keys read again soon, whether anything seems to have changed or not.
    pub fn request_read(&self) {
        self.is_requested.store(true, Ordering::Relaxed);
        self.requests.notify_one();
    }

    pub(super) fn take_request(&self) -> bool {
        self.is_requested.swap(false, Ordering::Relaxed)
    }

    pub(super) fn requested(self: &Arc<Self>) -> impl Future<Output = ()> + use<> {
        let requests = self.requests.clone();
        async move { requests.notified().await }
    }
}

/// The tenants that a TOML file names, whatever else is wrong with it.
fn tenants_of(file: &Path) -> Option<Vec<String>> {
    #[derive(serde::Deserialize)]
    struct Tenants {
        #[serde(default)]
        tenants: Vec<String>,
    }
    let text = read_text(file).ok()?;
    toml::from_str::<Tenants>(&text).ok().map(|found| found.tenants)
}

fn announce(entry: &Entry) {
    match (&entry.error, &entry.serving) {
        (None, Some(plugin)) => tracing::info!(
            plugin = entry.name, kind = %plugin.kind, version = plugin.description.version, sha256 = plugin.sha256, "plugin loaded"
        ),
        (Some(error), Some(_)) => {
            tracing::error!(
                plugin = entry.name,
                "plugin not changed, the one before serves on: {error}"
            )
        }
        (Some(error), None) => tracing::error!(plugin = entry.name, "plugin not loaded: {error}"),
        (None, None) => tracing::info!(plugin = entry.name, "plugin turned off"),
    }
}
