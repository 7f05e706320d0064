//! Listener of the hub: which states it passes on, and when it ends.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use batchwright_domain::ids::{BatchId, TenantId};
use batchwright_domain::status::Status;
use batchwright_store::BatchProgress;
use tokio::sync::broadcast;
use tokio::time::Instant;

use super::{Changes, ProgressHub, States};

/// Time after which a stream ends.
const MAX_LIFETIME: Duration = Duration::from_secs(15 * 60);

/// Listener of one tenant, or of one of its batches.
pub struct ProgressListener {
    hub: Arc<ProgressHub>,
    tenant: TenantId,
    /// Batch that is followed; none follows all.
    batch: Option<BatchId>,
    pub(super) changes: broadcast::Receiver<Changes>,
    /// States that are passed on next, and the place of the first one.
    pub(super) ready: Option<(States, usize)>,
    /// Number of the last read that is passed on.
    read: u64,
    /// The states that it began with, until a read that began after them.
    pub(super) first: Option<FirstStates>,
    /// End of the stream. The client opens another one, and shows its key again.
    ends_at: Instant,
    is_over: bool,
}

/// States that a listener began with, which no earlier read may follow.
pub(super) struct FirstStates {
    /// Number of reads that had begun when these states were known.
    reads: u64,
    /// Step and finished requests of each batch that had not ended.
    states: HashMap<BatchId, (u8, u64)>,
}

impl Drop for ProgressListener {
    fn drop(&mut self) {
        self.hub.release(&self.tenant, self.batch.as_ref());
    }
}

impl ProgressListener {
    /// Creates a listener that the hub has counted.
    pub(super) fn new(hub: Arc<ProgressHub>, tenant: TenantId, batch: Option<BatchId>) -> Self {
        Self {
            changes: hub.changes.subscribe(),
            hub,
            tenant,
            batch,
            ready: None,
            read: 0,
            first: None,
            ends_at: Instant::now() + MAX_LIFETIME,
            is_over: false,
        }
    }

    /// Takes the next ready state of what is followed.
    fn take_ready(&mut self) -> Option<BatchProgress> {
        while let Some((states, place)) = &mut self.ready {
            let Some(progress) = states.get(*place) else { break };
            *place = place.saturating_add(1);
            if self.batch.as_ref().is_none_or(|batch| *batch == progress.id) {
                return Some(progress.clone());
            }
        }
        // A listener may wait for long, and holds nothing meanwhile.
        self.ready = None;
        None
    }

    /// Shows states that were read just now, before everything else.
    pub(super) fn begin(&mut self, states: States) {
        let open = states.iter().filter_map(|state| Some((state.id.clone(), place_of(state)?)));
        let reads = self.hub.reads.load(Ordering::SeqCst);
        self.first = Some(FirstStates { reads, states: open.collect() });
        self.ready = Some((states, 0));
        self.hub.newest.fetch_max(reads, Ordering::SeqCst);
        self.hub.listener_added.notify_one();
    }

    /// Returns true if a state is older than the one that this listener began with.
    fn is_older(&self, progress: &BatchProgress) -> bool {
        let first = self.first.as_ref().and_then(|first| first.states.get(&progress.id));
        let (Some(first), Some(now)) = (first, place_of(progress)) else { return false };
        now < *first
    }

    /// Returns the next state, or none at the end: after the final state of the batch that is
    /// followed, after [`MAX_LIFETIME`], or when the server drains.
    pub async fn next(&mut self) -> Option<BatchProgress> {
        loop {
            if self.is_over {
                return None;
            }
            if let Some(progress) = self.take_ready() {
                if self.is_older(&progress) {
                    continue;
                }
                self.is_over = self.batch.is_some() && progress.status.is_final();
                return Some(progress);
            }
            let draining = self.hub.draining.clone();
            let next = tokio::time::timeout_at(self.ends_at, self.changes.recv());
            match draining.run_until_cancelled(next).await?.ok()? {
                Ok(changes) if changes.read <= self.read => {}
                Ok(changes) => {
                    self.first.take_if(|first| first.reads < changes.read);
                    self.ready = changes.of_tenant.get(&self.tenant).map(|own| (own.clone(), 0));
                    self.read = changes.read;
                }
                Err(broadcast::error::RecvError::Lagged(_)) => {
                    // The changes that the channel still holds are older than what is known.
                    self.changes = self.changes.resubscribe();
                    let known = self.hub.lock();
                    self.first.take_if(|first| first.reads < known.read);
                    self.ready = known.of_tenant.get(&self.tenant).map(|own| (own.clone(), 0));
                    self.read = known.read;
                }
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    }
}

/// Returns the step and the finished requests of a batch that has not ended; both only grow.
fn place_of(progress: &BatchProgress) -> Option<(u8, u64)> {
    let step = match progress.status {
        Status::Validating => 0,
        Status::InProgress => 1,
        Status::Finalizing => 2,
        Status::Cancelling => 3,
        Status::Failed | Status::Completed | Status::Expired | Status::Cancelled => return None,
    };
    Some((step, progress.counts.completed.saturating_add(progress.counts.failed)))
}
