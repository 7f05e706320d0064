//! The life of a batch: create, validate, execute, finalize, cancel, expire, recover; and of the files around it.
//!
//! Architecture invariant: this room knows no HTTP routes, no SQL and no WebAssembly. What is to last it hands to `store`, what
//! concerns a provider to `plugin`, and it asks `clock` what time it is.

mod create;
mod execute;
mod files;
mod finalize;
mod input;
mod janitor;
mod lanes;
mod line;
mod memory;
mod patience;
mod request;
mod result_line;
mod scheduler;
mod served_by;
mod stop;
#[cfg(test)]
mod tests;
mod validate;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use create::{CreateError, Request, shortened};
pub use files::{NewFile, Upload, UploadError};

use crate::clock::Clock;
use crate::config::Settings;
use crate::plugin::Registry;
use crate::store::{BatchRecord, Blobs, Cancel, Paged, Result, ServedBy, Store, StoreError};
use memory::Memory;
use patience::Patience;
use stop::{Reason, Stop};

/// The API's endpoints that a batch can be for.
pub const ENDPOINTS: [&str; 5] =
    ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/moderations"];

/// All batches and files of a server.
pub struct Batches {
    store: Arc<dyn Store>,
    blobs: Blobs,
    registry: Arc<Registry>,
    clock: Clock,
    settings: Settings,
    memory: Memory,
    /// How to stop the batches that are being worked on here, by tenant and id.
    running: Mutex<HashMap<(String, String), Arc<Stop>>>,
    /// Batches that could not go on, and how long they rest.
    resting: Mutex<HashMap<(String, String), Patience>>,
    /// There may be a batch to work on.
    work: Arc<Notify>,
    /// Objects whose writing was given up here, as tenant and id.
    given_up: Mutex<Vec<(String, String)>>,
    /// There may be something to clear away.
    garbage: Notify,
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
    ) -> Arc<Self> {
        let memory = Memory::new(settings.memory_budget.in_memory());
        Arc::new(Self {
            store,
            blobs,
            registry,
            clock,
            settings,
            memory,
            running: Mutex::default(),
            resting: Mutex::default(),
            work: Arc::default(),
            given_up: Mutex::default(),
            garbage: Notify::new(),
            closing: CancellationToken::new(),
            tasks: TaskTracker::new(),
        })
    }

    /// Begins to work on batches, those that a former process left included.
    pub fn start(self: &Arc<Self>) {
        self.tasks.spawn(self.clone().schedule());
        self.tasks.spawn(self.clone().clear_away());
    }

    /// Stops work: nothing new is begun, what is in flight gets `shutdown_grace`, the rest is left for the next start.
    pub async fn close(&self) {
        self.closing.cancel();
        for stop in self.running.lock().unwrap_or_else(PoisonError::into_inner).values() {
            stop.because(Reason::Shutdown);
        }
        self.tasks.close();
        self.tasks.wait().await;
    }

    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    pub async fn get(&self, tenant: &str, id: &str) -> Result<Option<BatchRecord>> {
        self.store.batch(tenant, id).await
    }

    /// The plugins that served a batch so far, if there is such a batch.
    pub async fn served_by(&self, tenant: &str, id: &str) -> Result<Option<Vec<ServedBy>>> {
        self.store.served_by(tenant, id).await
    }

    /// Newest first.
    pub async fn list(&self, tenant: &str, after: Option<String>, limit: usize) -> Result<Paged<BatchRecord>> {
        self.store.batches(tenant, after, limit).await
    }

    /// On a task of its own: a client who goes away does not leave it half done.
    pub async fn cancel(self: &Arc<Self>, tenant: &str, id: &str) -> Result<Cancel> {
        let (batches, tenant, id) = (self.clone(), tenant.to_owned(), id.to_owned());
        let cancelling = tokio::spawn(async move {
            let found = batches.store.request_cancel(&tenant, &id, batches.clock.now()).await?;
            let running = batches.running.lock().unwrap_or_else(PoisonError::into_inner);
            match running.get(&(tenant, id)) {
                Some(stop) => stop.because(Reason::Cancelled),
                // It waits for a place; to be ended it need not wait any longer.
                None => batches.work.notify_one(),
            }
            drop(running);
            Ok(found)
        });
        cancelling.await.unwrap_or(Err(StoreError::Closed))
    }
}
