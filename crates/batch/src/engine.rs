//! Engine: the parts of a server that work on batches, and their start and stop.

use std::sync::Arc;
use std::time::Duration;

use batchwright_telemetry::Error;
use tokio_util::task::TaskTracker;

use crate::health::Health;
use crate::janitor::Janitor;
use crate::metrics::EngineMetrics;
use crate::observer::{self, Observer};
use crate::online::Online;
use crate::parts::{Parts, Shared};
use crate::progress::ProgressHub;
use crate::schedule::breakers::Breakers;
use crate::schedule::quotas::Quotas;
use crate::schedule::stop::Reason;
use crate::service::Service;
use crate::spans::Spans;
use crate::worker::Worker;

/// Timeout for closing the store. A store that is not closed in time loses no committed data.
const STORE_CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// Batch engine of a server.
pub struct Engine {
    service: Arc<Service>,
    online: Arc<Online>,
    health: Arc<Health>,
    worker: Arc<Worker>,
    janitor: Arc<Janitor>,
    observer: Arc<Observer>,
    progress: Arc<ProgressHub>,
    parts: Parts,
    shared: Shared,
    tasks: TaskTracker,
}

impl Engine {
    /// Creates the engine and registers its metrics. Processing begins with [`Self::start`].
    pub fn new(parts: Parts) -> Result<Self, Error> {
        let shared = Shared::new(
            EngineMetrics::register(&parts.metrics)?,
            Spans { traces: parts.traces.clone(), gen_ai: parts.gen_ai.clone() },
        );
        let breakers = Arc::new(Breakers::new(&parts.config.execution));
        let (store, clock, config) =
            (parts.store.clone(), parts.clock.clone(), parts.config.clone());
        let quotas = Arc::new(Quotas::new(store, clock, config));
        let tasks = TaskTracker::new();
        let health = Arc::new(Health::new(&parts, &shared));
        let engine = Self {
            service: Arc::new(Service::new(&parts, &shared, breakers.clone(), quotas.clone())),
            online: Arc::new(Online::new(&parts, &shared, breakers.clone(), quotas.clone())),
            worker: Arc::new(Worker::new(&parts, &shared, breakers, quotas, tasks.clone())),
            janitor: Arc::new(Janitor::new(&parts, &shared)),
            observer: Observer::new(&parts, &shared, health.clone()),
            health,
            progress: ProgressHub::new(&parts, &shared),
            parts,
            shared,
            tasks,
        };
        observer::register(&engine.parts, &engine.service, &engine.observer)?;
        Ok(engine)
    }

    /// Returns the service that answers clients.
    pub fn service(&self) -> &Arc<Service> {
        &self.service
    }

    /// Returns what answers online requests.
    pub fn online(&self) -> &Arc<Online> {
        &self.online
    }

    /// Returns the progress of batches, for listeners.
    pub fn progress(&self) -> &Arc<ProgressHub> {
        &self.progress
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
        let (janitor, worker, tasks) =
            (self.janitor.clone(), self.worker.clone(), self.tasks.clone());
        self.tasks.spawn(async move {
            // What an earlier process left behind is removed before a worker writes it again.
            janitor.remove_abandoned_objects().await;
            tasks.spawn(janitor.run());
            worker.claim_batches().await;
        });
        self.tasks.spawn(self.worker.clone().watch_changes());
        self.tasks.spawn(self.progress.clone().run());
        if self.parts.metrics.is_enabled() {
            self.tasks.spawn(self.observer.clone().run());
        }
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

    /// Ends the online requests that are still in flight, then closes the store and flushes its
    /// writes. Must be the last call.
    pub async fn close_store(&self) {
        self.online.end().await;
        tokio::time::timeout(STORE_CLOSE_TIMEOUT, self.parts.store.close()).await.ok();
    }
}
