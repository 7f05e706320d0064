//! Folder of secrets: `<folder>/<slug>/<plugin>/<credential>`.
//!
//! The states of the files are looked at before each exchange, and a file is read again when its
//! state has changed.

use std::collections::{BTreeMap, HashMap};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use async_trait::async_trait;
use batchwright_domain::ids::TenantId;
use batchwright_egress::{Secrets, SecretsSource};
use tokio::sync::Semaphore;

use crate::package::credentials::{Credentials, MAX_CACHED_TENANTS, warn};
use crate::package::manifest::Source;

/// Number of threads that read the folder for one plugin at a time.
const MAX_READS: usize = 4;

/// State of a secret's file, which differs after each replacement: device, inode, size, and the
/// time of the last change of the file or of its metadata.
type FileState = Option<(u64, u64, u64, i64, i64)>;

/// Returns the state of a file; none if it does not exist. A link to nowhere is an error, as its
/// secret is missing and not unknown.
fn state_of(file: &Path) -> Result<FileState, String> {
    let failed = |error: std::io::Error| format!("failed to read {}: {error}", file.display());
    let found = match std::fs::metadata(file) {
        Ok(found) => found,
        Err(error) if error.kind() == ErrorKind::NotFound && file.symlink_metadata().is_err() => {
            return Ok(None);
        }
        Err(error) => return Err(failed(error)),
    };
    Ok(Some((found.dev(), found.ino(), found.len(), found.ctime(), found.ctime_nsec())))
}

/// Secrets of a tenant, and the states of the files that they were read from.
type Cached = (Vec<FileState>, Option<Arc<Secrets>>);

/// Folder with secrets of tenants.
pub(super) struct Folder {
    path: PathBuf,
    plugin: String,
    credentials: Arc<Credentials>,
    cache: Mutex<HashMap<TenantId, Cached>>,
    /// Permits to read, held by the threads, so that a folder that hangs occupies few.
    reads: Arc<Semaphore>,
    itself: Weak<Self>,
}

#[async_trait]
impl SecretsSource for Folder {
    async fn of(&self, tenant: &TenantId) -> Result<Option<Arc<Secrets>>, String> {
        let permit = self.reads.clone().acquire_owned().await;
        let (Some(folder), tenant) = (self.itself.upgrade(), tenant.clone()) else {
            return Ok(None);
        };
        let read = tokio::task::spawn_blocking(move || {
            let found = folder.read(&tenant);
            drop(permit);
            found
        });
        read.await.map_err(|error| error.to_string())?
    }
}

impl Folder {
    /// Returns the secrets of a plugin in a folder.
    pub(super) fn new(path: &Path, plugin: &str, credentials: Arc<Credentials>) -> Arc<Self> {
        Arc::new_cyclic(|itself| Self {
            path: path.to_owned(),
            plugin: plugin.to_owned(),
            credentials,
            cache: Mutex::default(),
            reads: Arc::new(Semaphore::new(MAX_READS)),
            itself: itself.clone(),
        })
    }

    /// Reads the secrets of a tenant. Blocks the thread.
    fn read(&self, tenant: &TenantId) -> Result<Option<Arc<Secrets>>, String> {
        // A folder that is not mounted says nothing about its secrets.
        if !self.path.is_dir() {
            return Err(format!("{} is no folder", self.path.display()));
        }
        let folder = self.path.join(tenant.as_str()).join(&self.plugin);
        let files = self.credentials.bound.iter().map(|bound| folder.join(&bound.name));
        let files: Vec<PathBuf> = files.collect();
        let states: Vec<FileState> =
            files.iter().map(|file| state_of(file)).collect::<Result<_, _>>()?;
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, secrets)) = cache.get(tenant)
            && *known == states
        {
            return Ok(secrets.clone());
        }
        let mut found = BTreeMap::new();
        for ((bound, file), state) in self.credentials.bound.iter().zip(&files).zip(&states) {
            if state.is_some() {
                let source = Source::File(file);
                let secret = source.read()?;
                warn(file, &bound.name, &source, &secret);
                found.insert(bound.name.clone(), secret);
            }
        }
        let secrets = self.credentials.of_source(tenant, &found)?;
        if cache.len() >= MAX_CACHED_TENANTS {
            cache.clear();
        }
        cache.insert(tenant.clone(), (states, secrets.clone()));
        Ok(secrets)
    }
}
