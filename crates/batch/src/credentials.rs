//! Credentials that projects set themselves: sealed in the store, and opened for exchanges.
//!
//! Opened secrets are kept for [`MAX_STALENESS`], so that a change through another process takes
//! effect within that time. A change through this process takes effect with the next request.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use batchwright_domain::ids::TenantId;
use batchwright_plugin::ProjectSecrets;
use batchwright_store::accounts::{Actor, SecretRecord};
use batchwright_store::{Store, StoreError};
use batchwright_tenancy::{SealingError, SealingKey};
use tokio::time::Instant;

/// Maximum age of opened secrets.
const MAX_STALENESS: Duration = Duration::from_millis(500);

/// Maximum number of pairs of a project and a plugin whose secrets are kept.
const MAX_CACHED: usize = 1000;

/// Opened secrets of a project for a plugin.
struct Cached {
    read_at: Instant,
    secrets: Arc<BTreeMap<String, String>>,
}

/// Credentials of all projects.
pub struct ProjectCredentials {
    store: Arc<dyn Store>,
    key: SealingKey,
    cache: Mutex<HashMap<(TenantId, String), Cached>>,
    /// Number of changes, so that a read that a change has overtaken is not kept.
    changes: AtomicU64,
}

/// Error of a change of a credential. The texts are shown to clients.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    /// No plugin of the project takes the credential from projects.
    #[error(
        "There is no credential '{name}' that a project may set for the plugin '{plugin}'. The \
         operator allows it with from_projects in the plugin's file."
    )]
    NotAccepted {
        /// Name of the plugin.
        plugin: String,
        /// Name of the credential.
        name: String,
    },
    /// The secret could not be sealed.
    #[error(transparent)]
    Sealing(#[from] SealingError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl ProjectCredentials {
    /// Returns the credentials in a store, sealed with a key.
    pub fn new(store: Arc<dyn Store>, key: SealingKey) -> Arc<Self> {
        Arc::new(Self { store, key, cache: Mutex::default(), changes: AtomicU64::new(0) })
    }

    fn cache(&self) -> MutexGuard<'_, HashMap<(TenantId, String), Cached>> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets a secret.
    pub(crate) async fn set(
        &self,
        tenant: &TenantId,
        (plugin, name): (&str, &str),
        secret: &str,
        by: Actor,
    ) -> Result<SecretRecord, CredentialError> {
        let sealed = self.key.seal(secret, &[tenant.as_str(), plugin, name])?;
        let written = self.store.set_secret(tenant, plugin, name, sealed, by).await?;
        self.forget(tenant, plugin);
        Ok(written)
    }

    /// Deletes a secret; returns false if there is none.
    pub(crate) async fn delete(
        &self,
        tenant: &TenantId,
        (plugin, name): (&str, &str),
        by: Actor,
    ) -> Result<bool, StoreError> {
        let is_deleted = self.store.delete_secret(tenant, plugin, name, by).await?;
        self.forget(tenant, plugin);
        Ok(is_deleted)
    }

    fn forget(&self, tenant: &TenantId, plugin: &str) {
        let mut cache = self.cache();
        self.changes.fetch_add(1, Ordering::Relaxed);
        cache.remove(&(tenant.clone(), plugin.to_owned()));
    }
}

#[async_trait]
impl ProjectSecrets for ProjectCredentials {
    async fn of(
        &self,
        tenant: &TenantId,
        plugin: &str,
    ) -> Result<Arc<BTreeMap<String, String>>, String> {
        let pair = (tenant.clone(), plugin.to_owned());
        let known = self.cache().get(&pair).map(|found| (found.read_at, found.secrets.clone()));
        if let Some((read_at, secrets)) = &known
            && read_at.elapsed() < MAX_STALENESS
        {
            return Ok(secrets.clone());
        }
        let (read_at, changes) = (Instant::now(), self.changes.load(Ordering::Relaxed));
        let records = self.store.secrets(tenant, Some(plugin)).await;
        let records = records.map_err(|error| error.to_string())?;
        let opened = records.into_iter().map(|record| {
            let purpose = [tenant.as_str(), plugin, record.name.as_str()];
            let secret = self.key.open(&record.sealed, &purpose);
            let secret = secret.map_err(|error| format!("{}: {error}", record.name))?;
            Ok((record.name, secret))
        });
        let opened = opened.collect::<Result<BTreeMap<_, _>, String>>()?;
        let known = known.map(|(_, secrets)| secrets).filter(|secrets| **secrets == opened);
        let secrets = known.unwrap_or_else(|| Arc::new(opened));
        let mut cache = self.cache();
        if cache.len() >= MAX_CACHED {
            cache.retain(|_, cached| cached.read_at.elapsed() < MAX_STALENESS);
        }
        if cache.len() >= MAX_CACHED {
            cache.clear();
        }
        if self.changes.load(Ordering::Relaxed) == changes {
            cache.insert(pair, Cached { read_at, secrets: secrets.clone() });
        }
        Ok(secrets)
    }
}
