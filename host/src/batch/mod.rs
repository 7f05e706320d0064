//! The life of a batch: create, validate, execute, finalize, cancel, expire, recover; and of the files around it.
//!
//! Architecture invariant: this room knows no HTTP routes, no SQL and no WebAssembly. What is to last it hands to `store`, what
//! concerns a provider to `plugin`, and it asks `clock` what time it is.

mod backoff;
mod breaker;
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
#[cfg(test)]
mod tests;
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
pub use create::{CreateError, Request, shortened};
pub use files::{NewFile, Upload, UploadError};
pub use outages::Key as OutageKey;

use crate::clock::Clock;
use crate::config::Settings;
use crate::egress::Queue;
use crate::memory::Memory;
use crate::plugin::Registry;
use crate::store::{
    BatchError, BatchRecord, Blobs, Cancel, Claim, Paged, Result, ServedBy, Status, Store,
    StoreError, WaitsFor,
};
use backoff::Backoff;
use gate::Gate;
use outages::Outages;
use readiness::Probes;
use rests::Rests;
use stop::{Reason, Stop};

/// The API's endpoints that a batch can be for.
pub const ENDPOINTS: [&str; 5] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/moderations",
];

/// How long the store may take to be closed; it can also be left as it is.
const STORE_TIMEOUT: Duration = Duration::from_secs(10);

/// A batch that is worked on here.
struct Running {
    stop: Arc<Stop>,
    claim: Claim,
}

/// All batches and files of a server.
pub struct Batches {
    store: Arc<dyn Store>,
    blobs: Blobs,
    registry: Arc<Registry>,
    clock: Clock,
    settings: Settings,
    memory: Memory,
    gate: Gate,
    queues: AtomicU64,
    probes: Probes,
    /// How to stop the batches that are being worked on here, by tenant and id.
    running: Mutex<HashMap<(String, String), Running>>,
    outages: Arc<Outages>,
    rests: Rests,
    /// Batches that could not go on, and how long they rest.
    resting: Mutex<HashMap<(String, String), Backoff>>,
    /// There may be a batch to work on.
    work: Arc<Notify>,
    /// Objects whose writing was given up here, as tenant and id.
    given_up: Mutex<Vec<(String, String)>>,
    /// There may be something to clear away.
    garbage: Notify,
    /// The end has been announced: the server is not ready any more.
    draining: CancellationToken,
    closing: CancellationToken,
    tasks: TaskTracker,
}

impl Batches {
    pub fn new(
        store: Arc<dyn Store>,
        blobs: Blobs,
        registry: Arc<Registry>,
        clock: Clock,
        settings: Settings,
        memory: Memory,
    ) -> Arc<Self> {
        Arc::new(Self {
            store,
            blobs,
            registry,
            clock,
            memory,
            gate: Gate::default(),
            queues: AtomicU64::new(0),
            probes: Probes::default(),
            running: Mutex::default(),
            outages: Arc::new(Outages::new(&settings)),
            rests: Rests::default(),
            resting: Mutex::default(),
            work: Arc::default(),
            given_up: Mutex::default(),
            garbage: Notify::new(),
            draining: CancellationToken::new(),
            closing: CancellationToken::new(),
            tasks: TaskTracker::new(),
            settings,
        })
    }

    /// Begins to work on batches, those that a former process left included.
    pub fn start(self: &Arc<Self>) {
        self.tasks.spawn(self.clone().schedule());
        self.tasks.spawn(self.clone().wake());
        self.tasks.spawn(self.clone().clear_away());
    }

    /// Says from now on that the server is not ready, and works on.
    pub fn drain(&self) {
        self.draining.cancel();
    }

    /// Stops work: nothing new is begun, what is in flight gets `shutdown_grace`, the rest is left for the next start.
    pub async fn close(&self) {
        self.draining.cancel();
        self.closing.cancel();
        for running in self.running.lock().unwrap_or_else(PoisonError::into_inner).values() {
            running.stop.because(Reason::Shutdown);
        }
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Ends the use of the store, after everything else: what was written is put into its place.
    pub async fn close_store(&self) {
        tokio::time::timeout(STORE_TIMEOUT, self.store.close()).await.ok();
    }

    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// A number that no other batch has.
    fn next_queue(&self) -> Queue {
        self.queues.fetch_add(1, Ordering::Relaxed)
    }

    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// A batch, with the first few of its errors.
    pub async fn get(&self, tenant: &str, id: &str) -> Result<Option<BatchRecord>> {
        self.store.batch(tenant, id).await
    }

    /// All errors of a batch.
    pub async fn errors(&self, tenant: &str, id: &str) -> Result<Vec<BatchError>> {
        self.store.batch_errors(tenant, id).await
    }

    /// The plugins that served a batch so far, if there is such a batch.
    pub async fn served_by(&self, tenant: &str, id: &str) -> Result<Option<Vec<ServedBy>>> {
        self.store.served_by(tenant, id).await
    }

    /// What a batch waits for now, in the client's words, if it waits.
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

    /// What is the matter with providers, each with what it is for.
    pub fn outages(&self) -> Vec<(OutageKey, Outage)> {
        self.outages.list()
    }

    /// Newest first. The page ends before the limit where its entries take more than so many bytes.
    pub async fn list(
        &self,
        tenant: &str,
        after: Option<String>,
        limit: usize,
        bytes: usize,
    ) -> Result<Paged<BatchRecord>> {
        self.store.batches(tenant, after, limit, bytes).await
    }

    /// On a task of its own: a client who goes away does not leave it half done.
    pub async fn cancel(self: &Arc<Self>, tenant: &str, id: &str) -> Result<Cancel> {
        let (batches, tenant, id) = (self.clone(), tenant.to_owned(), id.to_owned());
        let cancelling = tokio::spawn(async move {
            let found = batches.store.request_cancel(&tenant, &id, batches.clock.now()).await?;
            let running = batches.running.lock().unwrap_or_else(PoisonError::into_inner);
            match running.get(&(tenant, id)) {
                Some(running) => running.stop.because(Reason::Cancelled),
                // It waits for a place; to be ended it need not wait any longer.
                None => batches.work.notify_one(),
            }
            drop(running);
            Ok(found)
        });
        cancelling.await.unwrap_or(Err(StoreError::Closed))
    }
}
