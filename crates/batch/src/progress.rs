//! Progress of batches, for listeners: one query for all of them, at most once a second.
//!
//! **Problem.** A thousand pages and scripts that follow batches must cost no more than one, a
//! listener that reads slowly must not grow a queue, and none may hold the shutdown.
//!
//! **Hub.** While there are listeners, a task reads all batches that have not ended, and those that
//! have ended since, once a second, and publishes what has changed, by tenant: listeners share the
//! list of their tenant and copy one state at a time. One that falls behind skips what it has
//! missed and gets the current state of everything it follows: states are absolute, so nothing is
//! lost. A stream ends after a while, so that a key that was deleted shows nothing for long.
//!
//! **Order.** An older state never follows a later one. Reads are numbered. Only the states with
//! which a listener begins can be later than a read that has begun before them, so a listener
//! remembers them until the next read has ended, and nothing from then on.
//!
//! **Shares.** The setting `max_event_streams` bounds the listeners of all tenants. Seven eighths
//! are shared: a tenant has at most as many of them as it leaves free, so half if it is alone. The
//! rest is for tenants with few.
//!
//! **Bounds.** A read has at most [`MAX_FOLLOWED`] open batches, shared equally by the tenants with
//! listeners, and of each its oldest. Of a tenant with more, the batches that are followed one by
//! one are read too.

mod listener;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use batchwright_domain::clock::Clock;
use batchwright_domain::ids::{BatchId, TenantId};
use batchwright_store::{BatchProgress, Result, Store, StoreError};
use tokio::sync::{Notify, broadcast};
use tokio_util::sync::CancellationToken;

pub use self::listener::ProgressListener;
use crate::parts::{Parts, Shared};

/// Interval between reads.
const INTERVAL: Duration = Duration::from_secs(1);

/// Time for which the end of a batch is read. A listener that falls behind for longer is cut off by
/// the bound on slow clients.
const END_WINDOW: Duration = Duration::from_secs(120);

/// Number of reads that a listener may fall behind.
const CHANNEL_READS: usize = 16;

/// Maximum number of batches that a new listener is shown.
const MAX_SHOWN: usize = 1000;

/// Maximum number of batches that are followed.
const MAX_FOLLOWED: usize = 20_000;

/// Number of listeners that a tenant may have of the last eighth.
const FEW: usize = 4;

/// States of the batches of a tenant, in the order of their ids.
type States = Arc<[BatchProgress]>;

/// What one read has changed.
#[derive(Clone)]
struct Changes {
    /// Number of the read.
    read: u64,
    of_tenant: Arc<HashMap<TenantId, States>>,
}

/// What was read last.
#[derive(Default)]
struct Known {
    /// Number of the read.
    read: u64,
    of_tenant: HashMap<TenantId, States>,
}

/// Progress of the batches of all tenants.
pub struct ProgressHub {
    store: Arc<dyn Store>,
    clock: Clock,
    changes: broadcast::Sender<Changes>,
    known: Mutex<Known>,
    /// Number of reads that have begun.
    reads: AtomicU64,
    /// Number of reads that had begun when the newest listener began.
    newest: AtomicU64,
    listeners: Mutex<HashMap<TenantId, Listeners>>,
    /// Maximum number of listeners of all tenants.
    max_listeners: usize,
    listener_added: Notify,
    draining: CancellationToken,
}

/// Listeners of a tenant.
#[derive(Default)]
struct Listeners {
    number: usize,
    /// Batches that are followed one by one, each with the number of its listeners.
    batches: HashMap<BatchId, usize>,
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

impl ProgressHub {
    pub(crate) fn new(parts: &Parts, shared: &Shared) -> Arc<Self> {
        Arc::new(Self {
            store: parts.store.clone(),
            clock: parts.clock.clone(),
            changes: broadcast::Sender::new(CHANNEL_READS),
            known: Mutex::default(),
            reads: AtomicU64::new(0),
            newest: AtomicU64::new(0),
            listeners: Mutex::default(),
            max_listeners: parts.config.batch.max_event_streams.get(),
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
        listener.begin(Arc::new([now]));
        Ok(Some(listener))
    }

    /// Follows the batches of a tenant: the oldest [`MAX_SHOWN`] that have not ended, and changes.
    pub async fn follow_all(
        self: &Arc<Self>,
        tenant: &TenantId,
    ) -> std::result::Result<ProgressListener, ListenError> {
        let mut listener = self.subscribe(tenant, None)?;
        let open = self.store.batch_progress(vec![tenant.clone()], None, MAX_SHOWN).await?;
        listener.begin(open.into());
        Ok(listener)
    }

    fn subscribe(
        self: &Arc<Self>,
        tenant: &TenantId,
        batch: Option<BatchId>,
    ) -> std::result::Result<ProgressListener, ListenError> {
        let mut listeners = self.listeners();
        let all: usize = listeners.values().map(|listeners| listeners.number).sum();
        let own = listeners.get(tenant).map_or(0, |listeners| listeners.number);
        let shared = self.max_listeners.saturating_sub(self.max_listeners / 8);
        let is_few = own < FEW && all < self.max_listeners;
        if !is_few && own >= shared.saturating_sub(all) {
            return Err(ListenError::TooMany);
        }
        let of_tenant = listeners.entry(tenant.clone()).or_default();
        of_tenant.number = own.saturating_add(1);
        if let Some(batch) = &batch {
            let number = of_tenant.batches.entry(batch.clone()).or_default();
            *number = number.saturating_add(1);
        }
        drop(listeners);
        Ok(ProgressListener::new(self.clone(), tenant.clone(), batch))
    }

    /// Gives the share of a listener back.
    fn release(&self, tenant: &TenantId, batch: Option<&BatchId>) {
        let mut listeners = self.listeners();
        let Some(own) = listeners.get_mut(tenant) else { return };
        own.number = own.number.saturating_sub(1);
        if let Some(batch) = batch
            && let Some(number) = own.batches.get_mut(batch)
        {
            *number = number.saturating_sub(1);
            if *number == 0 {
                own.batches.remove(batch);
            }
        }
        if own.number == 0 {
            listeners.remove(tenant);
        }
    }

    fn listeners(&self) -> MutexGuard<'_, HashMap<TenantId, Listeners>> {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads and publishes until the server drains.
    pub(crate) async fn run(self: Arc<Self>) {
        while !self.draining.is_cancelled() {
            if self.changes.receiver_count() == 0 {
                self.lock().of_tenant.clear();
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
        let tenants: Vec<_> = self.listeners().keys().cloned().collect();
        let limit = MAX_FOLLOWED / tenants.len().max(1);
        let read = self.begin_read();
        let mut found = self.store.batch_progress(tenants, Some(since), limit).await?;
        for (tenant, id) in self.hidden(&found, limit) {
            if let Some(batch) = self.store.batch(&tenant, &id).await? {
                found.push(BatchProgress {
                    tenant,
                    id,
                    status: batch.status,
                    counts: batch.counts,
                });
            }
        }
        self.publish(read, found);
        Ok(())
    }

    /// Returns the followed batches that were not found because their tenants have more open
    /// batches than are read.
    fn hidden(&self, found: &[BatchProgress], limit: usize) -> Vec<(TenantId, BatchId)> {
        let mut ids: HashMap<&TenantId, HashSet<&BatchId>> = HashMap::new();
        for progress in found {
            ids.entry(&progress.tenant).or_default().insert(&progress.id);
        }
        let mut hidden = Vec::new();
        for (tenant, listeners) in &*self.listeners() {
            let Some(ids) = ids.get(tenant).filter(|ids| ids.len() >= limit) else { continue };
            let followed = listeners.batches.keys().filter(|id| !ids.contains(id));
            hidden.extend(followed.map(|id| (tenant.clone(), id.clone())));
        }
        hidden
    }

    /// Returns the number of a read that begins now.
    fn begin_read(&self) -> u64 {
        self.reads.fetch_add(1, Ordering::SeqCst).saturating_add(1)
    }

    /// Publishes what has changed since the read before.
    fn publish(&self, read: u64, found: Vec<BatchProgress>) {
        let mut of_tenant: HashMap<TenantId, Vec<BatchProgress>> = HashMap::new();
        for progress in found {
            of_tenant.entry(progress.tenant.clone()).or_default().push(progress);
        }
        let (mut next, mut changes) = (HashMap::new(), HashMap::new());
        let mut known = self.lock();
        for (tenant, mut states) in of_tenant {
            states.sort_unstable_by(|one, other| one.id.cmp(&other.id));
            let before = known.of_tenant.get(&tenant).map_or(&[] as &[_], |states| states);
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
        known.of_tenant = next;
        let before = std::mem::replace(&mut known.read, read);
        drop(known);
        // Also without changes, a new listener has to forget the states that it began with.
        if !changes.is_empty() || self.newest.load(Ordering::SeqCst) >= before {
            // Without listeners there is nobody to tell.
            self.changes.send(Changes { read, of_tenant: Arc::new(changes) }).ok();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use batchwright_domain::status::Status;
    use batchwright_store::{Counts, SqliteStore};

    use super::*;

    const MAX_LISTENERS: usize = 16;

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
            reads: AtomicU64::new(0),
            newest: AtomicU64::new(0),
            listeners: Mutex::default(),
            max_listeners: MAX_LISTENERS,
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
            hub.publish(hub.begin_read(), vec![state("b", Status::InProgress, read), a]);
        }
        let last = CHANNEL_READS as u64 * 2;
        let expected =
            [("a".to_owned(), Status::Completed, 20), ("b".to_owned(), Status::InProgress, last)];
        assert_eq!(shown(&mut listener).await, expected);
        // It goes on with what changes.
        let next = vec![state("a", Status::Completed, 20), state("b", Status::Finalizing, last)];
        hub.publish(hub.begin_read(), next);
        let expected = [("b".to_owned(), Status::Finalizing, last)];
        assert_eq!(shown(&mut listener).await, expected);
    }

    #[tokio::test]
    async fn older_read_after_the_state_of_a_followed_batch_is_not_shown() {
        let folder = tempfile::tempdir().unwrap();
        let hub = hub(folder.path());
        let mut listener = hub.subscribe(&"tenant".into(), Some("a".into())).unwrap();
        let (older, old) = (hub.begin_read(), hub.begin_read());
        listener.begin(Arc::new([state("a", Status::Finalizing, 7)]));
        hub.publish(
            older,
            vec![state("a", Status::InProgress, 7), state("b", Status::InProgress, 1)],
        );
        let expected = [("a".to_owned(), Status::Finalizing, 7)];
        assert_eq!(shown(&mut listener).await, expected);
        assert!(listener.first.is_some());
        // A read that began before and saw more is shown, and so is every read that began after.
        hub.publish(old, vec![state("a", Status::Cancelling, 7)]);
        let expected = [("a".to_owned(), Status::Cancelling, 7)];
        assert_eq!(shown(&mut listener).await, expected);
        hub.publish(hub.begin_read(), vec![state("a", Status::Completed, 7)]);
        let expected = [("a".to_owned(), Status::Completed, 7)];
        assert_eq!(shown(&mut listener).await, expected);
        assert!(listener.first.is_none(), "nothing is remembered");
    }

    #[tokio::test]
    async fn followed_batch_is_read_behind_many_others() {
        let folder = tempfile::tempdir().unwrap();
        let hub = hub(folder.path());
        let follow = |id: &str| hub.subscribe(&"tenant".into(), Some(id.into())).unwrap();
        let (one, same, _other) = (follow("late"), follow("late"), follow("a"));
        let found = [state("a", Status::InProgress, 1), state("b", Status::InProgress, 1)];
        assert_eq!(hub.hidden(&found, 2), [("tenant".into(), "late".into())]);
        assert_eq!(hub.hidden(&found, 3), [], "there are no more open batches");
        drop(one);
        assert_eq!(hub.hidden(&found, 2).len(), 1);
        drop(same);
        assert_eq!(hub.hidden(&found, 2), []);
    }

    #[tokio::test]
    async fn waiting_listener_holds_no_states() {
        let folder = tempfile::tempdir().unwrap();
        let hub = hub(folder.path());
        let mut listener = hub.subscribe(&"tenant".into(), None).unwrap();
        let read = hub.begin_read();
        listener.begin(Arc::new([state("a", Status::InProgress, 1)]));
        hub.publish(read, vec![state("a", Status::InProgress, 1)]);
        assert_eq!(shown(&mut listener).await.len(), 2);
        assert!(listener.first.is_some(), "the read has begun before the listener");
        // The next read changes nothing.
        hub.publish(hub.begin_read(), vec![state("a", Status::InProgress, 1)]);
        assert_eq!(shown(&mut listener).await, []);
        assert!(listener.first.is_none() && listener.ready.is_none());
        // And nobody is woken by the ones after it.
        hub.publish(hub.begin_read(), vec![state("a", Status::InProgress, 1)]);
        assert!(listener.changes.is_empty());
    }

    #[test]
    fn tenant_has_as_many_listeners_as_it_leaves_free_and_each_has_some() {
        let folder = tempfile::tempdir().unwrap();
        let hub = hub(folder.path());
        let all_of = |tenant: &str| {
            let listeners = std::iter::from_fn(|| hub.subscribe(&tenant.into(), None).ok());
            listeners.take(MAX_LISTENERS + 1).collect::<Vec<_>>()
        };
        let one = all_of("one");
        let others: Vec<_> = ["two", "three", "four"].map(all_of).into();
        let numbers: Vec<_> = others.iter().map(Vec::len).collect();
        assert_eq!((one.len(), numbers), (7, vec![4, 4, 1]));
        let refused = hub.subscribe(&"one".into(), None).map(drop);
        assert!(matches!(refused, Err(ListenError::TooMany)));
        drop(one);
        assert_eq!(hub.listeners().len(), 3, "a listener that ended leaves nothing behind");
        drop(others);
        assert!(hub.listeners().is_empty());
    }
}
