//! Progress of batches, for listeners: one query for all of them, at most once a second.
//!
//! **Problem.** A thousand pages and scripts that follow batches must cost no more than one, a
//! listener that reads slowly must not grow a queue, and none may hold the shutdown.
//!
//! **Hub.** While there are listeners, a task reads all batches that have not ended, and those that
//! have ended since, once a second, and publishes what has changed. A listener gets the changes of
//! its tenant through a bounded channel. One that falls behind skips what it has missed and gets
//! the current state of everything it follows: states are absolute, so nothing is lost, and an older
//! state never follows a later one.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use batchwright_domain::clock::Clock;
use batchwright_domain::ids::{BatchId, TenantId};
use batchwright_store::{BatchProgress, Result, Store};
use tokio::sync::{Notify, broadcast};
use tokio_util::sync::CancellationToken;

use crate::parts::{Parts, Shared};

/// Interval between reads.
const INTERVAL: Duration = Duration::from_secs(1);

/// Time for which the end of a batch is read. A listener that falls behind for longer is cut off by
/// the bound on slow clients.
const END_WINDOW: Duration = Duration::from_secs(120);

/// Number of reads that a listener may fall behind.
const CHANNEL_READS: usize = 16;

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
    listener_added: Notify,
    draining: CancellationToken,
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
    is_over: bool,
}

impl ProgressHub {
    pub(crate) fn new(parts: &Parts, shared: &Shared) -> Arc<Self> {
        Arc::new(Self {
            store: parts.store.clone(),
            clock: parts.clock.clone(),
            changes: broadcast::Sender::new(CHANNEL_READS),
            known: Mutex::default(),
            listener_added: Notify::new(),
            draining: shared.draining.clone(),
        })
    }

    /// Follows a batch from its state `now`, or all batches of a tenant.
    pub async fn listen(
        self: &Arc<Self>,
        tenant: &TenantId,
        batch: Option<BatchProgress>,
    ) -> Result<ProgressListener> {
        let changes = self.changes.subscribe();
        let (batch, ready) = match batch {
            Some(progress) => (Some(progress.id.clone()), vec![progress]),
            None => (None, self.store.batch_progress(Some(tenant), None, MAX_FOLLOWED).await?),
        };
        self.listener_added.notify_one();
        let (hub, ready) = (self.clone(), ready.into_iter());
        let tenant = tenant.clone();
        Ok(ProgressListener { hub, tenant, batch, changes, ready, is_over: false })
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

    /// Returns the next state, or none at the end: after the final state of the batch that is
    /// followed, or when the server drains.
    pub async fn next(&mut self) -> Option<BatchProgress> {
        loop {
            if self.is_over {
                return None;
            }
            if let Some(progress) = self.ready.next() {
                self.is_over = self.batch.is_some() && progress.status.is_final();
                return Some(progress);
            }
            let draining = self.hub.draining.clone();
            match draining.run_until_cancelled(self.changes.recv()).await? {
                Ok(changes) => {
                    let ours = changes.iter().filter(|change| self.follows(change)).cloned();
                    self.ready = ours.collect::<Vec<_>>().into_iter();
                }
                Err(broadcast::error::RecvError::Lagged(_)) => {
                    let known = self.hub.lock();
                    let ours = known.values().filter(|known| self.follows(known)).cloned();
                    let ours: Vec<_> = ours.collect();
                    drop(known);
                    self.ready = ours.into_iter();
                }
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    }
}
