//! Registry of the plugins in a directory, updated while the directory changes.
//!
//! **Problem.** Operators edit, replace and delete plugin files while batches run. A file arrives
//! in several writes, a component does not compile, a mount disappears. None of these may take a
//! serving plugin away from its batches.
//!
//! **Change detection.** [`crate::directory::watch`] polls the directory and the files that its
//! plugins name,
//! and uses notifications of the file system where there are any. The watch only decides when
//! [`Registry::read`] runs. `read` compares the contents of the files and decides which plugins
//! are loaded again.
//!
//! **Snapshots.** The current plugins are one immutable [`Snapshot`] behind an atomic pointer.
//! Readers take the pointer without a lock. A call in flight finishes on the plugin that it
//! started with, because the snapshot keeps that plugin alive. A mutex allows one `read` at a time.
//!
//! **Replacement.** `read` handles each TOML file separately:
//! - The fingerprint covers the TOML file, the component, the signature, the secrets and the
//!   trusted keys. A file with the fingerprint of before keeps its plugin.
//! - A file that loads replaces its plugin at once. A plugin that compiles slowly does not delay
//!   the other plugins.
//! - A file that does not load leaves the previous plugin in service, and its entry has the error.
//!   The next read tries the file again.
//! - A file with `enabled = false`, or a deleted file, removes the plugin.
//! - A plugin whose signing key is no longer trusted stops serving, even if its new files fail.
//!
//! **Failures of the directory.** If the directory cannot be read, all plugins stay. An empty
//! directory on another file system than before is treated as a missing mount: all plugins stay.
//!
//! **Conflicts.** If two plugins claim one model, the plugin that serves it already keeps it.
//! [`Order`] extends this rule across restarts.

use std::collections::BTreeSet;
use std::future::Future;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use arc_swap::ArcSwap;
use batchwright_domain::ids::TenantId;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{Notify, watch};

use crate::directory::order::Order;
use crate::directory::snapshot::{Entry, Snapshot};
use crate::directory::watch::is_hidden;
use crate::error::LoadError;
use crate::load::{Loader, plugin_name};
use crate::package::files::{Files, named_files};
use crate::package::read::read_text;

/// Checks that a directory can be read. Callers check before they create anything.
pub fn check_directory(folder: &Path) -> Result<(), LoadError> {
    let found = std::fs::read_dir(folder);
    found.map(drop).map_err(|source| LoadError::Directory { path: folder.to_owned(), source })
}

/// Plugins of a directory.
pub struct Registry {
    folder: PathBuf,
    loader: Loader,
    current: ArcSwap<Snapshot>,
    /// Allows one read of the directory at a time.
    read_lock: tokio::sync::Mutex<()>,
    changed: watch::Sender<()>,
    is_read_requested: AtomicBool,
    read_requests: Arc<Notify>,
    order: Order,
    /// Device number of the directory at the last read; zero before the first read.
    device: AtomicU64,
}

impl Registry {
    /// Loads every plugin of the directory.
    ///
    /// A plugin that does not load is reported in its entry. Fails if the directory cannot be read.
    pub async fn open(folder: &Path, loader: Loader) -> Result<Arc<Self>, LoadError> {
        let order = Order::open(loader.order_file.clone());
        let registry = Arc::new(Self {
            folder: folder.to_owned(),
            loader,
            current: ArcSwap::default(),
            read_lock: tokio::sync::Mutex::default(),
            changed: watch::Sender::new(()),
            is_read_requested: AtomicBool::new(false),
            read_requests: Arc::default(),
            order,
            device: AtomicU64::new(0),
        });
        registry.read().await?;
        Ok(registry)
    }

    /// Returns the current plugins.
    pub fn current(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// Returns a receiver that is notified whenever plugins may have changed.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Reads the directory again and replaces the plugins whose files changed.
    ///
    /// Calls in flight finish on the plugins that they started with.
    pub async fn read(&self) -> Result<(), LoadError> {
        let _guard = self.read_lock.lock().await;
        let before = self.current.load_full();
        self.loader.trust.read_keys();
        let files = self.toml_files(!before.entries.is_empty())?;
        // Each entry stays unchanged until its file was loaded.
        let mut entries: Vec<Entry> =
            before.entries.iter().filter(|entry| files.contains(&entry.file)).cloned().collect();
        let mut loading: FuturesUnordered<_> =
            files.into_iter().map(|file| self.load_entry(file, &before)).collect();
        while let Some(entry) = loading.next().await {
            entries.retain(|known| known.name != entry.name);
            entries.push(entry);
            // A slow compilation must not delay the other plugins. At the start nobody waits yet.
            if !before.entries.is_empty() {
                self.publish(&entries, &before);
            }
        }
        self.publish(&entries, &before);
        Ok(())
    }

    /// Makes these entries the current plugins. In conflicts, the plugins of `before` win.
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
                log_entry(entry);
            }
        }
        self.order.record(
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

    /// Returns the TOML files of the directory, except hidden files.
    ///
    /// `had_plugins` tells whether a missing mount would remove plugins.
    fn toml_files(&self, had_plugins: bool) -> Result<Vec<PathBuf>, LoadError> {
        let unreadable = |source| LoadError::Directory { path: self.folder.clone(), source };
        let mut files = Vec::new();
        for found in std::fs::read_dir(&self.folder).map_err(unreadable)? {
            let path = found.map_err(unreadable)?.path();
            if path.extension().is_some_and(|extension| extension == "toml") && !is_hidden(&path) {
                files.push(path);
            }
        }
        let device = std::fs::metadata(&self.folder).map_err(unreadable)?.dev();
        if files.is_empty() && had_plugins && device != self.device.load(Ordering::Relaxed) {
            let message = "it is empty and on another file system than before; check whether a \
                           mount is missing";
            return Err(unreadable(std::io::Error::other(message)));
        }
        self.device.store(device, Ordering::Relaxed);
        Ok(files)
    }

    /// Loads the plugin of a file if its files changed, or if the last load failed.
    async fn load_entry(&self, file: PathBuf, before: &Snapshot) -> Entry {
        let (name, mut error) = match plugin_name(&file) {
            Ok(name) => (name, None),
            Err(error) => (file.display().to_string(), Some(error.to_string())),
        };
        let known = before.entries.iter().find(|known| known.name == name);
        // The serving plugin needs a trusted signature of its own, also if its files changed.
        let mut serving = known
            .and_then(|known| known.serving.clone())
            .filter(|plugin| self.loader.trust.is_still_trusted(plugin.name(), plugin.signature()));
        let _permit = self.loader.permit().await;
        let (read, folders) = (file.clone(), self.loader.components.clone());
        // The fingerprint reads secrets, which may be files, so it is computed here too.
        let files = tokio::task::spawn_blocking(move || {
            Files::read(&read, &folders).map(|files| (files.fingerprint(), files))
        })
        .await;
        let named = named_files(&file, &self.loader.components);
        let mut fingerprint = String::new();
        let named_files =
            named.or_else(|| known.map(|known| known.named_files.clone())).unwrap_or_default();
        let tenants = tenants_of(&file);
        if error.is_none() {
            match files {
                Ok(Ok((read, files))) => {
                    fingerprint = format!("{read} {}", self.loader.trust.keys_digest());
                    // A failed load is tried again, because its cause may be gone.
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

    /// Returns the path of the directory.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Returns the other files that the plugins depend on, in any directory: components,
    /// signatures, secrets and trusted keys.
    pub fn named_files(&self) -> BTreeSet<PathBuf> {
        let current = self.current.load();
        let of_plugins = current.entries.iter().flat_map(|entry| entry.named_files.iter().cloned());
        of_plugins.chain(self.loader.trust.keys_file()).collect()
    }

    /// Requests a read of the directory and the trusted keys, even without a detected change.
    pub fn request_read(&self) {
        self.is_read_requested.store(true, Ordering::Relaxed);
        self.read_requests.notify_one();
    }

    /// Returns true if a read was requested, and clears the request.
    pub(crate) fn take_request(&self) -> bool {
        self.is_read_requested.swap(false, Ordering::Relaxed)
    }

    /// Waits until a read is requested. The future does not keep the registry alive.
    pub(crate) fn requested(self: &Arc<Self>) -> impl Future<Output = ()> + use<> {
        let requests = self.read_requests.clone();
        async move { requests.notified().await }
    }
}

/// Returns the tenants that a TOML file names, even if the file has errors in other keys.
fn tenants_of(file: &Path) -> Option<Vec<TenantId>> {
    #[derive(serde::Deserialize)]
    struct Tenants {
        #[serde(default)]
        tenants: Vec<String>,
    }
    let text = read_text(file).ok()?;
    toml::from_str::<Tenants>(&text)
        .ok()
        .map(|found| found.tenants.into_iter().map(TenantId::from).collect())
}

fn log_entry(entry: &Entry) {
    match (&entry.error, &entry.serving) {
        (None, Some(plugin)) => tracing::info!(
            plugin = entry.name,
            kind = %plugin.kind(),
            version = plugin.description().version,
            sha256 = plugin.sha256(),
            "plugin loaded"
        ),
        (Some(error), Some(_)) => {
            tracing::error!(
                plugin = entry.name,
                %error,
                "plugin not replaced, previous version still serving"
            )
        }
        (Some(error), None) => tracing::error!(plugin = entry.name, %error, "plugin not loaded"),
        (None, None) => tracing::info!(plugin = entry.name, "plugin disabled"),
    }
}
