//! Service: what clients ask of a server. Every method is safe to call at any moment, whatever the
//! worker does.

pub(crate) mod create;
mod credentials;
pub(crate) mod files;
pub(crate) mod uploading;

use std::collections::BTreeSet;
use std::sync::Arc;

use batchwright_domain::clock::Clock;
use batchwright_domain::ids::{BatchId, ProjectId, TenantId};
use batchwright_domain::limits::{Limits, Permissions};
use batchwright_domain::status::Status;
use batchwright_memory::Memory;
use batchwright_plugin::Registry;
use batchwright_store::accounts::{Actor, ProjectRecord, StorageBounds};
use batchwright_store::{
    BatchError, BatchRecord, Cancel, Objects, Paged, PluginVersion, Result, Store, StoreError,
    WaitCause,
};
use tokio::sync::Notify;

use crate::config::Config;
use crate::credentials::ProjectCredentials;
use crate::objects::AbortedUploads;
use crate::parts::{Parts, Shared};
use crate::policy::Policy;
use crate::schedule::breaker::Outage;
use crate::schedule::breakers::{BreakerKey, Breakers};
use crate::schedule::quotas::Quotas;
use crate::schedule::running::Running;
use crate::schedule::stop::Reason;
use crate::service::uploading::{Uploading, UploadingBytes};
use crate::spans::Spans;

/// Batches and files of all tenants, as clients see them.
pub struct Service {
    store: Arc<dyn Store>,
    objects: Arc<dyn Objects>,
    registry: Arc<Registry>,
    credentials: Option<Arc<ProjectCredentials>>,
    clock: Clock,
    config: Arc<Config>,
    memory: Memory,
    running: Arc<Running>,
    breakers: Arc<Breakers>,
    quotas: Arc<Quotas>,
    work_available: Arc<Notify>,
    aborted_uploads: Arc<AbortedUploads>,
    spans: Spans,
    uploading: Arc<Uploading>,
    cleanup_needed: Arc<Notify>,
}

/// Plugins that have served a batch, and the cause of its wait.
#[derive(Debug)]
pub struct BatchPlugins {
    /// Exact versions of the plugins, in order of first use.
    pub served_by: Vec<PluginVersion>,
    /// Cause of the wait, or `None` if the batch is not waiting.
    pub waits_for: Option<WaitCause>,
}

impl Service {
    pub(crate) fn new(
        parts: &Parts,
        shared: &Shared,
        breakers: Arc<Breakers>,
        quotas: Arc<Quotas>,
    ) -> Self {
        Self {
            store: parts.store.clone(),
            objects: parts.objects.clone(),
            registry: parts.registry.clone(),
            credentials: parts.credentials.clone(),
            clock: parts.clock.clone(),
            config: parts.config.clone(),
            memory: parts.memory.clone(),
            running: shared.running.clone(),
            breakers,
            quotas,
            work_available: shared.work_available.clone(),
            aborted_uploads: shared.aborted_uploads.clone(),
            spans: shared.spans.clone(),
            uploading: Arc::default(),
            cleanup_needed: shared.cleanup_needed.clone(),
        }
    }

    /// Returns a batch with the first few of its errors, or `None` if the batch is unknown.
    pub async fn get(&self, tenant: &TenantId, id: &BatchId) -> Result<Option<BatchRecord>> {
        self.store.batch(tenant, id).await
    }

    /// Returns all errors of a batch.
    pub async fn errors(&self, tenant: &TenantId, id: &BatchId) -> Result<Vec<BatchError>> {
        self.store.batch_errors(tenant, id).await
    }

    /// Returns the plugins that have served a batch so far, or `None` if the batch is unknown.
    pub async fn plugins(&self, tenant: &TenantId, id: &BatchId) -> Result<Option<BatchPlugins>> {
        let Some(batch) = self.store.batch(tenant, id).await? else { return Ok(None) };
        let Some(served_by) = self.store.plugin_versions(tenant, id).await? else {
            return Ok(None);
        };
        Ok(Some(BatchPlugins { served_by, waits_for: self.waits_for(tenant, &batch) }))
    }

    /// Returns the cause of the wait of a batch, as text for the client, or `None` if the batch is
    /// not waiting.
    pub fn waits_for(&self, tenant: &TenantId, batch: &BatchRecord) -> Option<WaitCause> {
        match batch.status {
            Status::InProgress => {}
            // A valid batch may wait for the enqueued tokens of its project.
            Status::Validating => return batch.waits_for.clone(),
            _ => return None,
        }
        match self.running.claim(tenant, &batch.new.id) {
            Some(claim) => {
                let now = self.clock.now();
                let limited = self.quotas.wait_cause(tenant, &self.registry, batch, now);
                if limited.is_some() {
                    return limited;
                }
                let next = batch.waits_for.as_ref().map_or(now, |known| known.next);
                self.breakers.wait_cause(&claim, batch.new.endpoint, now, next)
            }
            None => batch.waits_for.clone(),
        }
    }

    /// Returns all open circuit breakers with their keys.
    pub fn outages(&self) -> Vec<(BreakerKey, Outage)> {
        self.breakers.list()
    }

    /// Returns a page of batches, newest first.
    ///
    /// The page has at most `limit` entries, and fewer if the entries exceed `bytes`.
    pub async fn list(
        &self,
        tenant: &TenantId,
        after: Option<BatchId>,
        limit: usize,
        bytes: usize,
    ) -> Result<Paged<BatchRecord>> {
        self.store.batches(tenant, after, limit, bytes).await
    }

    /// Requests the cancellation of a batch.
    ///
    /// The request runs on a separate task, so that a disconnected client cannot interrupt it. A
    /// worker of another process learns of it when it renews its lease.
    pub async fn cancel(self: &Arc<Self>, tenant: &TenantId, id: &BatchId) -> Result<Cancel> {
        let (service, tenant, id) = (self.clone(), tenant.clone(), id.clone());
        let cancelling = tokio::spawn(async move {
            let found = service.store.request_cancel(&tenant, &id, service.clock.now()).await?;
            if !service.running.stop(&tenant, &id, Reason::Cancelled) {
                // The batch waits for a place in its lane. The finish lane may have a free place.
                service.work_available.notify_one();
            }
            Ok(found)
        });
        cancelling.await.unwrap_or(Err(StoreError::Closed))
    }

    /// Returns the policy of a tenant.
    pub(crate) async fn policy(&self, tenant: &TenantId) -> Result<Policy> {
        Policy::read(&*self.store, &self.config.tenant_defaults, tenant).await
    }

    /// Begins to count an upload. Fails if the project has reached a bound, before the content is
    /// read.
    pub(crate) async fn begin_upload(&self, tenant: &TenantId) -> Result<UploadingBytes> {
        let bounds = self.policy(tenant).await?.storage();
        let room = match bounds {
            StorageBounds { bytes: None, files: None } => None,
            bounds => self.store.storage_room(tenant, bounds).await?,
        };
        Ok(self.uploading.begin(tenant.clone(), room))
    }

    /// Returns what a tenant may use.
    pub async fn permissions(&self, tenant: &TenantId) -> Result<Permissions> {
        Ok(self.policy(tenant).await?.permissions)
    }

    /// Returns the limits that hold for a project, given its own.
    pub fn limits(&self, own: Limits) -> Limits {
        self.config.retention.fill(self.config.tenant_defaults.fill(own))
    }

    /// Lets batches that wait for a limit of their project try again.
    pub async fn limits_changed(&self) {
        self.quotas.expire();
        if let Err(error) = self.store.end_backoff(self.clock.now()).await {
            tracing::warn!(%error, "wake of parked batches failed");
        }
        self.work_available.notify_one();
    }

    /// Returns the names that providers know of the models that a tenant may use.
    pub fn models_at_providers(&self, tenant: &TenantId) -> BTreeSet<String> {
        let plugins = self.registry.current();
        let models = plugins.allowed_models(tenant, &Permissions::default());
        models.iter().filter_map(|(model, _)| Some(plugins.route(tenant, model)?.model)).collect()
    }

    /// Returns the name that the provider knows of a model; none if no plugin serves the model.
    pub fn model_at_provider(&self, tenant: &TenantId, model: &str) -> Option<String> {
        Some(self.registry.current().route(tenant, model)?.model)
    }

    /// Archives a project, and stops its batches at once. The archiving continues if its caller is
    /// dropped.
    pub async fn archive_project(
        self: &Arc<Self>,
        id: &ProjectId,
        by: Actor,
    ) -> Result<ProjectRecord> {
        let (service, id) = (self.clone(), id.clone());
        let archiving = tokio::spawn(async move {
            let project = service.store.archive_project(&id, by).await?;
            service.running.stop_tenant(&project.slug, Reason::Cancelled);
            service.work_available.notify_one();
            Ok(project)
        });
        archiving.await.unwrap_or(Err(StoreError::Closed))
    }
}
