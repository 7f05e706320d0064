//! Progress of batches, for listeners: one query for all of them, at most once a second.
//!
//! **Problem.** A thousand pages and scripts that follow batches must cost no more than one, a
//! listener that reads slowly must not grow a queue, and none may hold the shutdown.
//!
//! **Hub.** While there are listeners, a task reads all batches that have not ended, and those that
//! have ended since, once a second, and publishes what has changed, by tenant: listeners share the
//! list of their tenant and copy one state at a time. One that falls behind skips what it has
//! missed and gets the current state of everything it follows: states are absolute, so nothing is
//! lost, and an older state never follows a later one. The number of listeners is bounded, and a
//! stream ends after a while, so that a key that was deleted shows nothing for long.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use batchwright_domain::clock::Clock;
use batchwright_domain::ids::{BatchId, TenantId};
use batchwright_domain::status::Status;
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

/// Maximum number of batches whose last state a listener remembers, and that a new one is shown.
const MAX_SHOWN: usize = 1000;

/// Time after which a stream ends.
const MAX_LIFETIME: Duration = Duration::from_secs(15 * 60);

/// Maximum number of batches that are followed.
const MAX_FOLLOWED: usize = 20_000;

/// States of the batches of a tenant, in the order of their ids.
type States = Arc<[BatchProgress]>;

/// Changes of one read, by tenant.
type Changes = Arc<HashMap<TenantId, States>>;

/// Progress of the batches of all tenants.
pub struct ProgressHub {
    store: Arc<dyn Store>,
    clock: Clock,
    changes: broadcast::Sender<Changes>,
    /// What was read last, by tenant.
    known: Mutex<HashMap<TenantId, States>>,
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
    /// States that are passed on next, and the place of the first one.
    ready: (States, usize),
    /// What was shown last of batches that have not ended: the step, and the finished requests.
    shown: HashMap<BatchId, (u8, u64)>,
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
        listener.ready = (Arc::new([now]), 0);
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
        listener.ready = (open.into(), 0);
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
        let own = listeners.get(tenant).copied().unwrap_or(0);
        if own >= MAX_OF_TENANT || all >= MAX_LISTENERS {
            return Err(ListenError::TooMany);
        }
        listeners.insert(tenant.clone(), own.saturating_add(1));
        drop(listeners);
        Ok(ProgressListener {
            hub: self.clone(),
            tenant: tenant.clone(),
            batch,
            changes: self.changes.subscribe(),
            ready: (Arc::new([]), 0),
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
        self.publish(self.store.batch_progress(None, Some(since), MAX_FOLLOWED).await?);
        Ok(())
    }

    /// Publishes what has changed since the last read.
    fn publish(&self, found: Vec<BatchProgress>) {
        let mut of_tenant: HashMap<TenantId, Vec<BatchProgress>> = HashMap::new();
        for progress in found {
            of_tenant.entry(progress.tenant.clone()).or_default().push(progress);
        }
        let (mut next, mut changes) = (HashMap::new(), HashMap::new());
        let mut known = self.lock();
        for (tenant, mut states) in of_tenant {
            states.sort_unstable_by(|one, other| one.id.cmp(&other.id));
            let before = known.get(&tenant).map_or(&[] as &[_], |states| states);
            let is_known = |progress: &BatchProgress| {
                let place = before.binary_search_by(|known| known.id.cmp(&progress.id));
                place.is_ok_and(|place| before.get(place) == Some(progress))
            };
            let changed: States =
                states.iter().filter(|progress| !is_known(progress)).cloned().collect();
            if !changed.is_empty() {
                changes.insert(tenant.clone(), changed);
            }
            next.insert(tenant, states.into());
        }
        *known = next;
        drop(known);
        if !changes.is_empty() {
            // Without listeners there is nobody to tell.
            self.changes.send(Arc::new(changes)).ok();
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<TenantId, States>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ProgressListener {
    /// Takes the next ready state of what is followed.
    fn take_ready(&mut self) -> Option<BatchProgress> {
        loop {
            let (states, place) = &mut self.ready;
            let progress = states.get(*place)?;
            *place = place.saturating_add(1);
            if self.batch.as_ref().is_none_or(|batch| *batch == progress.id) {
                return Some(progress.clone());
            }
        }
    }

    /// Returns true if a state is older than the one that was shown, as its read began earlier.
    fn is_older(&mut self, progress: &BatchProgress) -> bool {
        let step = match progress.status {
            Status::Validating => 0,
            Status::InProgress => 1,
            Status::Finalizing => 2,
            Status::Cancelling => 3,
            Status::Failed | Status::Completed | Status::Expired | Status::Cancelled => {
                self.shown.remove(&progress.id);
                return false;
            }
        };
        let now = (step, progress.counts.completed.saturating_add(progress.counts.failed));
        let shown = self.shown.get(&progress.id).copied();
        if shown.is_none() && self.shown.len() >= MAX_SHOWN {
            self.shown.clear();
        }
        self.shown.insert(progress.id.clone(), shown.unwrap_or(now).max(now));
        shown.is_some_and(|shown| shown > now)
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
                Ok(changes) => {
                    self.ready = (changes.get(&self.tenant).cloned().unwrap_or_default(), 0);
                }
                Err(broadcast::error::RecvError::Lagged(_)) => {
                    // The changes that the channel still holds are older than what is known.
                    self.changes = self.changes.resubscribe();
                    let known = self.hub.lock().get(&self.tenant).cloned();
                    self.ready = (known.unwrap_or_default(), 0);
                }
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use batchwright_store::{Counts, SqliteStore};

    use super::*;

    fn state(id: &str, status: Status, completed: u64) -> BatchProgress {
        let counts = Counts { total: 100, completed, failed: 0 };
        BatchProgress { tenant: "tenant".into(), id: id.into(), status, counts }
    }

    fn hub(folder: &std::path::Path) -> Arc<ProgressHub> {
        Arc::new(ProgressHub {
            store: Arc::new(SqliteStore::open(folder).unwrap()),
            clock: Clock::system(),
            changes: broadcast::Sender::new(CHANNEL_READS),
            known: Mutex::default(),
            listeners: Mutex::default(),
            listener_added: Notify::new(),
            draining: CancellationToken::new(),
        })
    }

    /// Returns the states that a listener gets before it has to wait.
    async fn shown(listener: &mut ProgressListener) -> Vec<(String, Status, u64)> {
        let mut shown = Vec::new();
        let wait = Duration::from_millis(50);
        while let Ok(Some(next)) = tokio::time::timeout(wait, listener.next()).await {
            shown.push((next.id.to_string(), next.status, next.counts.completed));
        }
        shown
    }

    #[tokio::test]
    async fn listener_that_falls_behind_sees_no_older_state_after_a_later_one() {
        let folder = tempfile::tempdir().unwrap();
        let hub = hub(folder.path());
        let mut listener = hub.follow_all(&"tenant".into()).await.unwrap();
        // More reads than the channel keeps, and one batch ends on the way.
        for read in 1..=CHANNEL_READS as u64 * 2 {
            let a = match read {
                ..20 => state("a", Status::InProgress, read),
                _ => state("a", Status::Completed, 20),
            };
            hub.publish(vec![state("b", Status::InProgress, read), a]);
        }
        let last = CHANNEL_READS as u64 * 2;
        let expected =
            [("a".to_owned(), Status::Completed, 20), ("b".to_owned(), Status::InProgress, last)];
        assert_eq!(shown(&mut listener).await, expected);
        // It goes on with what changes.
        hub.publish(vec![state("a", Status::Completed, 20), state("b", Status::Finalizing, last)]);
        let expected = [("b".to_owned(), Status::Finalizing, last)];
        assert_eq!(shown(&mut listener).await, expected);
    }

    #[tokio::test]
    async fn older_read_after_the_state_of_a_followed_batch_is_not_shown() {
        let folder = tempfile::tempdir().unwrap();
        let hub = hub(folder.path());
        let mut listener = hub.subscribe(&"tenant".into(), Some("a".into())).unwrap();
        listener.ready = (Arc::new([state("a", Status::Finalizing, 7)]), 0);
        hub.publish(vec![state("a", Status::InProgress, 7), state("b", Status::InProgress, 1)]);
        hub.publish(vec![state("a", Status::Completed, 7)]);
        let expected =
            [("a".to_owned(), Status::Finalizing, 7), ("a".to_owned(), Status::Completed, 7)];
        assert_eq!(shown(&mut listener).await, expected);
    }

    #[test]
    fn refused_listener_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let hub = hub(folder.path());
        let tenants = (0..MAX_LISTENERS).map(|number| TenantId::from(format!("t{number}")));
        let open: Vec<_> = tenants.map(|tenant| hub.subscribe(&tenant, None).unwrap()).collect();
        assert!(matches!(hub.subscribe(&"late".into(), None), Err(ListenError::TooMany)));
        assert_eq!(hub.listeners().len(), MAX_LISTENERS);
        drop(open);
        assert!(hub.listeners().is_empty());
    }
}
