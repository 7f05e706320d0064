//! Progress of batches, for listeners: one query for all of them, at most once a second.
//!
//! **Problem.** A thousand pages and scripts that follow batches must cost no more than one, a
//! listener that reads slowly must not grow a queue, and none may hold the shutdown.
//!
//! **Hub.** While there are listeners, a task reads all batches that have not ended, and those that
//! have ended since, once a second, and publishes what has changed. A listener gets the changes of
//! its tenant through a bounded channel. One that falls behind skips what it has missed and gets
//! the current state of everything it follows: states are absolute, so nothing is lost, and an
//! older state never follows a later one. The number of listeners is bounded, and a stream ends
//! after a while, so that a key that was deleted shows nothing for long.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use batchwright_domain::clock::Clock;
use batchwright_domain::ids::{BatchId, TenantId};
use batchwright_store::{BatchProgress, Result, Store, StoreError};
use tokio::sync::{Notify, broadcast};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::parts::{Parts, Shared};

/// Interval between reads.
const INTERVAL: Duration = Duration::from_secs(1);

/// Time for which the end of a batch is read. A listener that falls behind for longer is cut off by
/// the bound on slow clients.
const END_WINDOW: Duration = Duration::from_secs(120);

/// Number of reads that a listener may fall behind.
const CHANNEL_READS: usize = 16;

/// Maximum number of listeners of a tenant.
const MAX_OF_TENANT: usize = 100;

/// Maximum number of listeners of all tenants.
const MAX_LISTENERS: usize = 512;

/// Maximum number of states that a listener holds.
const MAX_SHOWN: usize = 1000;

/// Time after which a stream ends.
const MAX_LIFETIME: Duration = Duration::from_secs(15 * 60);

/// Maximum number of batches that are followed.
const MAX_FOLLOWED: usize = 20_000;

/// Changes of one read.
type Changes = Arc<Vec<BatchProgress>>;

/// Progress of the batches of all tenants.
pub struct ProgressHub {
    store: Arc<dyn Store>,
    clock: Clock,
    changes: broadcast::Sender<Changes>,
    /// What was read last, by tenant and id.
    known: Mutex<HashMap<(TenantId, BatchId), BatchProgress>>,
    /// Number of listeners by tenant.
    listeners: Mutex<HashMap<TenantId, usize>>,
    listener_added: Notify,
    draining: CancellationToken,
}

/// Reason why a stream is refused.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The tenant, or all tenants together, have as many listeners as they may.
    #[error("There are too many streams of events; close some, or poll.")]
    TooMany,
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Listener of one tenant, or of one of its batches.
pub struct ProgressListener {
    hub: Arc<ProgressHub>,
    tenant: TenantId,
    /// Batch that is followed; none follows all.
    batch: Option<BatchId>,
    changes: broadcast::Receiver<Changes>,
    /// States that are passed on next.
    ready: std::vec::IntoIter<BatchProgress>,
    /// Finished requests that were shown last, of batches that have not ended.
    shown: HashMap<BatchId, u64>,
    /// End of the stream. The client opens another one, and shows its key again.
    ends_at: Instant,
    is_over: bool,
}

impl Drop for ProgressListener {
    fn drop(&mut self) {
        let mut listeners = self.hub.listeners();
        if let Some(own) = listeners.get_mut(&self.tenant) {
            *own = own.saturating_sub(1);
            if *own == 0 {
                listeners.remove(&self.tenant);
            }
        }
    }
}

impl ProgressHub {
    pub(crate) fn new(parts: &Parts, shared: &Shared) -> Arc<Self> {
        Arc::new(Self {
            store: parts.store.clone(),
            clock: parts.clock.clone(),
            changes: broadcast::Sender::new(CHANNEL_READS),
            known: Mutex::default(),
            listeners: Mutex::default(),
            listener_added: Notify::new(),
            draining: shared.draining.clone(),
        })
    }

    /// Follows a batch; none if it is unknown.
    pub async fn follow(
        self: &Arc<Self>,
        tenant: &TenantId,
        id: &BatchId,
    ) -> std::result::Result<Option<ProgressListener>, ListenError> {
        // Subscribed before the batch is read, so that no change falls between.
        let mut listener = self.subscribe(tenant, Some(id.clone()))?;
        let Some(batch) = self.store.batch(tenant, id).await? else { return Ok(None) };
        let (tenant, id, counts) = (tenant.clone(), id.clone(), batch.counts);
        let now = BatchProgress { tenant, id, status: batch.status, counts };
        listener.ready = vec![now].into_iter();
        self.listener_added.notify_one();
        Ok(Some(listener))
    }

    /// Follows the batches of a tenant: the first [`MAX_SHOWN`] that have not ended, and all
    /// changes.
    pub async fn follow_all(
        self: &Arc<Self>,
        tenant: &TenantId,
    ) -> std::result::Result<ProgressListener, ListenError> {
        let mut listener = self.subscribe(tenant, None)?;
        let open = self.store.batch_progress(Some(tenant), None, MAX_SHOWN).await?;
        listener.ready = open.into_iter();
        self.listener_added.notify_one();
        Ok(listener)
    }

    fn subscribe(
        self: &Arc<Self>,
        tenant: &TenantId,
        batch: Option<BatchId>,
    ) -> std::result::Result<ProgressListener, ListenError> {
        let mut listeners = self.listeners();
        let all: usize = listeners.values().sum();
        let own = listeners.entry(tenant.clone()).or_default();
        if *own >= MAX_OF_TENANT || all >= MAX_LISTENERS {
            return Err(ListenError::TooMany);
        }
        *own = own.saturating_add(1);
        drop(listeners);
        Ok(ProgressListener {
            hub: self.clone(),
            tenant: tenant.clone(),
            batch,
            changes: self.changes.subscribe(),
            ready: Vec::new().into_iter(),
            shown: HashMap::new(),
            ends_at: Instant::now() + MAX_LIFETIME,
            is_over: false,
        })
    }

    fn listeners(&self) -> MutexGuard<'_, HashMap<TenantId, usize>> {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads and publishes until the server drains.
    pub(crate) async fn run(self: Arc<Self>) {
        while !self.draining.is_cancelled() {
            if self.changes.receiver_count() == 0 {
                self.lock().clear();
                let added = self.listener_added.notified();
                if self.draining.run_until_cancelled(added).await.is_none() {
                    return;
                }
            }
            if let Err(error) = self.read().await {
                tracing::warn!(%error, "progress of batches not read");
            }
            self.draining.run_until_cancelled(tokio::time::sleep(INTERVAL)).await;
        }
    }

    async fn read(&self) -> Result<()> {
        // A batch that ended between two reads is found by the time of its end.
        let since = self.clock.now().before(END_WINDOW);
        let found = self.store.batch_progress(None, Some(since), MAX_FOLLOWED).await?;
        let mut known = self.lock();
        let mut changed = Vec::new();
        let mut next = HashMap::with_capacity(found.len());
        for progress in found {
            let key = (progress.tenant.clone(), progress.id.clone());
            if known.get(&key) != Some(&progress) {
                changed.push(progress.clone());
            }
            next.insert(key, progress);
        }
        *known = next;
        drop(known);
        if !changed.is_empty() {
            // Without listeners there is nobody to tell.
            self.changes.send(Arc::new(changed)).ok();
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(TenantId, BatchId), BatchProgress>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ProgressListener {
    fn follows(&self, progress: &BatchProgress) -> bool {
        progress.tenant == self.tenant
            && self.batch.as_ref().is_none_or(|batch| *batch == progress.id)
    }

    /// Returns true if a state is older than the one that was shown, as its read began earlier.
    fn is_older(&mut self, progress: &BatchProgress) -> bool {
        let done = progress.counts.completed.saturating_add(progress.counts.failed);
        if progress.status.is_final() {
            self.shown.remove(&progress.id);
            return false;
        }
        let shown = self.shown.get(&progress.id).copied();
        if shown.is_none() && self.shown.len() >= MAX_SHOWN {
            self.shown.clear();
        }
        self.shown.insert(progress.id.clone(), shown.unwrap_or(0).max(done));
        shown.is_some_and(|shown| shown > done)
    }

    /// Returns the next state, or none at the end: after the final state of the batch that is
    /// followed, after [`MAX_LIFETIME`], or when the server drains.
    pub async fn next(&mut self) -> Option<BatchProgress> {
        loop {
            if self.is_over {
                return None;
            }
            if let Some(progress) = self.ready.next() {
                if self.is_older(&progress) {
                    continue;
                }
                self.is_over = self.batch.is_some() && progress.status.is_final();
                return Some(progress);
            }
            let draining = self.hub.draining.clone();
            let next = tokio::time::timeout_at(self.ends_at, self.changes.recv());
            match draining.run_until_cancelled(next).await?.ok()? {
                Ok(changes) => {
                    let ours = changes.iter().filter(|change| self.follows(change)).cloned();
                    self.ready = ours.collect::<Vec<_>>().into_iter();
                }
                Err(broadcast::error::RecvError::Lagged(_)) => {
                    let known = self.hub.lock();
                    let ours = known.values().filter(|known| self.follows(known)).cloned();
                    let ours: Vec<_> = ours.take(MAX_SHOWN).collect();
                    drop(known);
                    self.ready = ours.into_iter();
                }
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    }
}
