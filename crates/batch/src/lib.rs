//! Batch lifecycle: create, validate, execute, finalize, cancel, expire and recover; and the files
//! that batches read and write.
//!
//! Architecture invariant: this module contains no HTTP routes, no SQL and no WebAssembly. Durable
//! state goes through `store`, calls to providers go through `plugin`, and the time comes from
//! `clock`.

#![deny(missing_docs)]
#![warn(unreachable_pub)]

mod backoff;
mod breaker;
mod config;
mod create;
mod deferred;
mod envelope;
mod exchange;
mod execute;
mod files;
mod finalize;
mod gate;
mod input;
mod janitor;
mod jobs;
mod lanes;
mod line;
mod lines;
mod not_json;
mod outages;
mod readiness;
mod record;
mod request;
mod rests;
mod result_line;
mod scheduler;
mod served_by;
mod stop;
mod validate;
mod verdict;
mod whole;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use breaker::Outage;
pub use config::{BatchConfig, Config, ExecutionConfig, RetentionConfig};
pub use create::{CreateError, Request};
pub use files::{NewFile, Upload, UploadError};
pub use outages::Key as OutageKey;

use batchwright_domain::clock::Clock;
use batchwright_egress::Queue;
use batchwright_memory::Memory;
use batchwright_plugin::Registry;
use batchwright_store::{
    BatchError, BatchRecord, Blobs, Cancel, Claim, Paged, Result, ServedBy, Status, Store,
    StoreError, WaitsFor,
};

use backoff::Backoff;
use gate::Gate;
use outages::Outages;
use readiness::Probes;
use rests::Rests;
use stop::{Reason, Stop};

/// API endpoints that a batch can target.
pub const ENDPOINTS: [&str; 5] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/moderations",
];

/// Timeout for closing the store. A store that is not closed in time loses no committed data.
const STORE_CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// Batch that this process works on.
struct Running {
    stop: Arc<Stop>,
    claim: Claim,
}

/// Service for all batches and files of a server.
pub struct Batches {
    store: Arc<dyn Store>,
    blobs: Blobs,
    registry: Arc<Registry>,
    clock: Clock,
    settings: Config,
    memory: Memory,
    gate: Gate,
    next_queue_number: AtomicU64,
    probes: Probes,
    /// Batches that this process works on, by tenant and batch id.
    running: Mutex<HashMap<(String, String), Running>>,
    outages: Arc<Outages>,
    rests: Rests,
    /// Backoffs of batches whose processing failed, by tenant and batch id.
    backoffs: Mutex<HashMap<(String, String), Backoff>>,
    /// Notified when a batch may be ready to claim.
    work_available: Arc<Notify>,
    /// Objects whose upload was aborted in this process, as tenant and object id.
    aborted_objects: Mutex<Vec<(String, String)>>,
    /// Notified when the janitor may have something to remove.
    cleanup_needed: Notify,
    /// Cancelled when the server starts to drain and reports not ready.
    draining: CancellationToken,
    /// Cancelled when the server shuts down and starts no more work.
    closing: CancellationToken,
    tasks: TaskTracker,
}

impl Batches {
    /// Creates the service. Processing begins with [`Self::start`].
    pub fn new(
        store: Arc<dyn Store>,
        blobs: Blobs,
        registry: Arc<Registry>,
        clock: Clock,
        settings: Config,
        memory: Memory,
    ) -> Arc<Self> {
        Arc::new(Self {
            store,
            blobs,
            registry,
            clock,
            memory,
            gate: Gate::default(),
            next_queue_number: AtomicU64::new(0),
            probes: Probes::default(),
            running: Mutex::default(),
            outages: Arc::new(Outages::new(&settings.execution)),
            rests: Rests::default(),
            backoffs: Mutex::default(),
            work_available: Arc::default(),
            aborted_objects: Mutex::default(),
            cleanup_needed: Notify::new(),
            draining: CancellationToken::new(),
            closing: CancellationToken::new(),
            tasks: TaskTracker::new(),
            settings,
        })
    }

    /// Starts to process batches, including those that a previous process left unfinished.
    pub fn start(self: &Arc<Self>) {
        self.tasks.spawn(self.clone().schedule());
        self.tasks.spawn(self.clone().watch_changes());
        self.tasks.spawn(self.clone().run_janitor());
    }

    /// Reports the server as not ready from now on, without stopping any work.
    pub fn drain(&self) {
        self.draining.cancel();
    }

    /// Stops all work and returns when all tasks have ended.
    ///
    /// No new request is sent. Requests in flight have `shutdown_grace` to finish. The next start
    /// continues the rest.
    pub async fn close(&self) {
        self.draining.cancel();
        self.closing.cancel();
        for running in self.running.lock().unwrap_or_else(PoisonError::into_inner).values() {
            running.stop.because(Reason::Shutdown);
        }
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Closes the store and flushes its writes. Must be the last call.
    pub async fn close_store(&self) {
        tokio::time::timeout(STORE_CLOSE_TIMEOUT, self.store.close()).await.ok();
    }

    /// Returns the clock of the server.
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    /// Returns the memory pools of the server.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Returns a queue number that is unique in this process.
    fn next_queue(&self) -> Queue {
        self.next_queue_number.fetch_add(1, Ordering::Relaxed)
    }

    /// Returns the store.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// Returns the settings of the server.
    pub fn settings(&self) -> &Config {
        &self.settings
    }

    /// Returns the plugin registry of the server.
    pub fn registry(&self) -> &Arc<Registry> {
        &self.registry
    }

    /// Returns a batch with the first few of its errors, or `None` if the batch is unknown.
    pub async fn get(&self, tenant: &str, id: &str) -> Result<Option<BatchRecord>> {
        self.store.batch(tenant, id).await
    }

    /// Returns all errors of a batch.
    pub async fn errors(&self, tenant: &str, id: &str) -> Result<Vec<BatchError>> {
        self.store.batch_errors(tenant, id).await
    }

    /// Returns the plugins that have served a batch so far, or `None` if the batch is unknown.
    pub async fn served_by(&self, tenant: &str, id: &str) -> Result<Option<Vec<ServedBy>>> {
        self.store.served_by(tenant, id).await
    }

    /// Returns the cause of the wait of a batch, as text for the client, or `None` if the batch is
    /// not waiting.
    pub fn waits(&self, tenant: &str, batch: &BatchRecord) -> Option<WaitsFor> {
        if batch.status != Status::InProgress {
            return None;
        }
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let claim = running
            .get(&(tenant.to_owned(), batch.new.id.clone()))
            .map(|running| running.claim.clone());
        drop(running);
        match claim {
            Some(claim) => {
                let next =
                    batch.waits_for.as_ref().map_or_else(|| self.clock.now(), |known| known.next);
                self.waits_for(&claim, batch, next)
            }
            None => batch.waits_for.clone(),
        }
    }

    /// Returns all open circuit breakers with their keys.
    pub fn outages(&self) -> Vec<(OutageKey, Outage)> {
        self.outages.list()
    }

    /// Returns a page of batches, newest first.
    ///
    /// The page has at most `limit` entries, and fewer if the entries exceed `bytes`.
    pub async fn list(
        &self,
        tenant: &str,
        after: Option<String>,
        limit: usize,
        bytes: usize,
    ) -> Result<Paged<BatchRecord>> {
        self.store.batches(tenant, after, limit, bytes).await
    }

    /// Requests the cancellation of a batch.
    ///
    /// The request runs on a separate task, so that a disconnected client cannot interrupt it.
    pub async fn cancel(self: &Arc<Self>, tenant: &str, id: &str) -> Result<Cancel> {
        let (batches, tenant, id) = (self.clone(), tenant.to_owned(), id.to_owned());
        let cancelling = tokio::spawn(async move {
            let found = batches.store.request_cancel(&tenant, &id, batches.clock.now()).await?;
            let running = batches.running.lock().unwrap_or_else(PoisonError::into_inner);
            match running.get(&(tenant, id)) {
                Some(running) => running.stop.because(Reason::Cancelled),
                // The batch waits for a place in its lane. The finish lane may have a free place.
                None => batches.work_available.notify_one(),
            }
            drop(running);
            Ok(found)
        });
        cancelling.await.unwrap_or(Err(StoreError::Closed))
    }
}
