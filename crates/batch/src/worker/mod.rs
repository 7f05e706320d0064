//! Worker: claims batches in the order of their turns and processes each one to its end.

mod execute;
mod finalize;
mod process;
mod record;
mod unfinished_lines;
mod validate;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use batchwright_domain::clock::{Clock, Timestamp};
use batchwright_domain::ids::TenantId;
use batchwright_egress::QueueId;
use batchwright_memory::Memory;
use batchwright_plugin::Registry;
use batchwright_store::{Objects, Result, Store, Waiting};
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::Config;
use crate::metrics::EngineMetrics;
use crate::parts::{Parts, Shared};
use crate::schedule::backoff::{Backoff, Backoffs};
use crate::schedule::breakers::Breakers;
use crate::schedule::gate::Gate;
use crate::schedule::lanes::{Lanes, Next};
use crate::schedule::parked::Parked;
use crate::schedule::quotas::Quotas;
use crate::schedule::running::Running;
use crate::spans::Spans;

/// Duration of a lease without renewal.
const LEASE_DURATION: Duration = Duration::from_secs(30);

/// Poll interval for batches whose lease or wait has ended, which sends no notification.
const POLL_INTERVAL: Duration = Duration::from_secs(5);

/// Multiple of the time of a read of waiting batches that passes before the next read.
const READ_SPACING: u32 = 10;

/// Maximum time between two reads of waiting batches.
const MAX_READ_SPACING: Duration = Duration::from_millis(200);

/// Batches that waited when the store was read, without those that were claimed since.
///
/// A read looks at each tenant that waits. With thousands of them the reads are spaced, so that
/// they take a small part of the time, and places are given from what was read last.
#[derive(Default)]
struct Candidates {
    waiting: Vec<Waiting>,
    /// Time from which the store may be read again; none before the first read.
    readable_at: Option<Instant>,
    /// True if the last attempt to give a place did not read the store.
    is_stale: bool,
}

impl Candidates {
    /// Waits until the store may be read, if it was not read before.
    async fn readable(&self) {
        match self.readable_at {
            Some(at) if self.is_stale => tokio::time::sleep_until(at).await,
            _ => std::future::pending().await,
        }
    }

    /// Reads the store if that is allowed now.
    async fn refresh(&mut self, store: &dyn Store, now: Timestamp) -> Result<()> {
        self.is_stale = self.readable_at.is_some_and(|at| at > Instant::now());
        if self.is_stale {
            return Ok(());
        }
        let started = Instant::now();
        self.waiting = store.waiting(now).await?;
        let spacing = started.elapsed().saturating_mul(READ_SPACING).min(MAX_READ_SPACING);
        self.readable_at = Instant::now().checked_add(spacing);
        Ok(())
    }
}

/// Worker of one process.
pub(crate) struct Worker {
    store: Arc<dyn Store>,
    objects: Arc<dyn Objects>,
    registry: Arc<Registry>,
    clock: Clock,
    config: Arc<Config>,
    memory: Memory,
    running: Arc<Running>,
    breakers: Arc<Breakers>,
    quotas: Arc<Quotas>,
    metrics: Arc<EngineMetrics>,
    spans: Spans,
    /// Closed while results cannot be written.
    gate: Gate,
    parked: Parked,
    /// Backoffs of batches whose processing failed.
    backoffs: Backoffs,
    next_queue_number: AtomicU64,
    work_available: Arc<Notify>,
    cleanup_needed: Arc<Notify>,
    closing: CancellationToken,
    tasks: TaskTracker,
}

impl Worker {
    /// Creates a worker. Batches are processed on `tasks`.
    pub(crate) fn new(
        parts: &Parts,
        shared: &Shared,
        breakers: Arc<Breakers>,
        quotas: Arc<Quotas>,
        tasks: TaskTracker,
    ) -> Self {
        Self {
            store: parts.store.clone(),
            objects: parts.objects.clone(),
            registry: parts.registry.clone(),
            clock: parts.clock.clone(),
            config: parts.config.clone(),
            memory: parts.memory.clone(),
            running: shared.running.clone(),
            breakers,
            quotas,
            metrics: shared.metrics.clone(),
            spans: shared.spans.clone(),
            gate: shared.gate.clone(),
            parked: Parked::default(),
            backoffs: Backoffs::default(),
            next_queue_number: AtomicU64::new(0),
            work_available: shared.work_available.clone(),
            cleanup_needed: shared.cleanup_needed.clone(),
            closing: shared.closing.clone(),
            tasks,
        }
    }

    /// Returns the queue of a batch that begins to execute, unique in this process.
    fn next_queue(&self, tenant: &TenantId) -> QueueId {
        let batch = self.next_queue_number.fetch_add(1, Ordering::Relaxed);
        QueueId { tenant: tenant.clone(), batch: Some(batch) }
    }

    /// Claims and processes batches until the server closes.
    pub(crate) async fn claim_batches(self: Arc<Self>) {
        let lanes = Lanes::new(
            self.config.execution.max_concurrent_batches.get(),
            self.config.execution.max_executing_batches.get(),
            self.work_available.clone(),
        );
        let mut backoff = Backoff::default();
        let mut candidates = Candidates::default();
        while !self.closing.is_cancelled() {
            match self.claim_next(&lanes, &mut candidates).await {
                Ok(true) => {}
                Ok(false) => {
                    let hint = async {
                        tokio::select! {
                            () = self.work_available.notified() => {}
                            () = self.clock.sleep(POLL_INTERVAL) => {}
                            () = self.parked.next_wake_up(&self.clock) => {}
                            () = candidates.readable() => {}
                        }
                    };
                    self.closing.run_until_cancelled(hint).await;
                }
                Err(error) => {
                    tracing::error!(%error, "batch claim failed");
                    self.closing.run_until_cancelled(self.clock.sleep(backoff.pause())).await;
                    continue;
                }
            }
            backoff = Backoff::default();
        }
    }

    /// Gives the next batch its turn and returns false if no batch can run now.
    async fn claim_next(
        self: &Arc<Self>,
        lanes: &Arc<Lanes>,
        candidates: &mut Candidates,
    ) -> Result<bool> {
        let now = self.clock.now();
        candidates.refresh(&*self.store, now).await?;
        let index = match lanes.next(&candidates.waiting) {
            Next::Nothing => return Ok(false),
            Next::Returned => return Ok(true),
            Next::Claim(index) => index,
        };
        if index >= candidates.waiting.len() {
            return Ok(false);
        }
        let waiting = candidates.waiting.swap_remove(index);
        if let Some(claim) = self.store.claim(&waiting, now, now.after(LEASE_DURATION)).await? {
            // Only this task takes places, so the place is still free.
            let place = lanes.take(&claim.lane, &claim.tenant);
            let (worker, lanes) = (self.clone(), lanes.clone());
            self.tasks.spawn(async move { worker.run(claim, &lanes, place).await });
        }
        Ok(true)
    }

    /// Wakes all parked batches whenever an outage ends or plugins change.
    pub(crate) async fn watch_changes(self: Arc<Self>) {
        let (mut plugins, mut outages) = (self.registry.changes(), self.breakers.changes());
        loop {
            tokio::select! {
                _ = plugins.changed() => {
                    self.breakers.plugins_changed(&self.registry.current());
                    self.breakers.notify();
                }
                _ = outages.changed() => {
                    if let Err(error) = self.store.end_backoff(self.clock.now()).await {
                        tracing::warn!(%error, "wake of parked batches failed");
                    }
                    self.work_available.notify_one();
                }
                () = self.closing.cancelled() => return,
            }
        }
    }
}
