//! Engine: the parts of a server that work on batches, and their start and stop.

use std::sync::Arc;
use std::time::Duration;

use batchwright_domain::clock::Clock;
use batchwright_memory::Memory;
use batchwright_plugin::Registry;
use batchwright_store::{Objects, Store};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::Config;
use crate::health::Health;
use crate::janitor::Janitor;
use crate::schedule::breakers::Breakers;
use crate::schedule::running::Running;
use crate::schedule::stop::Reason;
use crate::service::Service;
use crate::worker::Worker;

/// Timeout for closing the store. A store that is not closed in time loses no committed data.
const STORE_CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// Parts that the engine uses and that the composition root creates.
#[derive(Clone)]
pub struct Parts {
    /// Database of files, batches and results.
    pub store: Arc<dyn Store>,
    /// Object store of file contents.
    pub objects: Arc<dyn Objects>,
    /// Plugins that serve now.
    pub registry: Arc<Registry>,
    /// Clock of the server.
    pub clock: Clock,
    /// Settings of batches.
    pub config: Arc<Config>,
    /// Memory pools of the server.
    pub memory: Memory,
}

/// State that the parts of an engine share.
#[derive(Clone, Default)]
pub(crate) struct Shared {
    /// Batches that this process works on.
    pub running: Arc<Running>,
    /// Notified when a batch may be ready to claim.
    pub work_available: Arc<Notify>,
    /// Notified when the janitor may have something to remove.
    pub cleanup_needed: Arc<Notify>,
    /// Cancelled when the server starts to drain and reports not ready.
    pub draining: CancellationToken,
    /// Cancelled when the server shuts down and starts no more work.
    pub closing: CancellationToken,
}

/// Batch engine of a server.
pub struct Engine {
    service: Arc<Service>,
    health: Arc<Health>,
    worker: Arc<Worker>,
    janitor: Arc<Janitor>,
    parts: Parts,
    shared: Shared,
    tasks: TaskTracker,
}

impl Engine {
    /// Creates the engine. Processing begins with [`Self::start`].
    pub fn new(parts: Parts) -> Self {
        let shared = Shared::default();
        let breakers = Arc::new(Breakers::new(&parts.config.execution));
        let tasks = TaskTracker::new();
        Self {
            service: Arc::new(Service::new(&parts, &shared, breakers.clone())),
            health: Arc::new(Health::new(&parts, &shared)),
            worker: Arc::new(Worker::new(&parts, &shared, breakers, tasks.clone())),
            janitor: Arc::new(Janitor::new(&parts, &shared)),
            parts,
            shared,
            tasks,
        }
    }

    /// Returns the service that answers clients.
    pub fn service(&self) -> &Arc<Service> {
        &self.service
    }

    /// Returns the probes of the server.
    pub fn health(&self) -> &Arc<Health> {
        &self.health
    }

    /// Returns the parts that the engine was created with.
    pub fn parts(&self) -> &Parts {
        &self.parts
    }

    /// Starts to process batches, including those that a previous process left unfinished.
    pub fn start(&self) {
        self.tasks.spawn(self.worker.clone().claim_batches());
        self.tasks.spawn(self.worker.clone().watch_changes());
        self.tasks.spawn(self.janitor.clone().run());
    }

    /// Reports the server as not ready from now on, without stopping any work.
    pub fn drain(&self) {
        self.shared.draining.cancel();
    }

    /// Stops all work and returns when all tasks have ended.
    ///
    /// No new request is sent. Requests in flight have `shutdown_grace` to finish. The next start
    /// continues the rest.
    pub async fn close(&self) {
        self.shared.draining.cancel();
        self.shared.closing.cancel();
        self.shared.running.stop_all(Reason::Shutdown);
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Closes the store and flushes its writes. Must be the last call.
    pub async fn close_store(&self) {
        tokio::time::timeout(STORE_CLOSE_TIMEOUT, self.parts.store.close()).await.ok();
    }
}
