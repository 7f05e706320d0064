//! The memory that lines and results under way may take, over all batches.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{Mutex as Turn, Notify, OwnedSemaphorePermit, Semaphore};

/// A share of a pool, given back when it is dropped.
pub type Share = Option<OwnedSemaphorePermit>;

/// Four pools. Lines in flight are held for as long as a provider thinks, so validation and results, which always move on, must not wait
/// for them.
pub struct Memory {
    /// Lines in flight: half of the budget, shared between the providers they go to.
    pub lines: SharedPool,
    /// What adapters made of lines that is much larger than these, until it is sent: as much again, shared in the same way.
    pub bodies: SharedPool,
    /// Results on their way to the store: a quarter.
    pub results: Pool,
    /// Pieces being validated: a quarter.
    pub validation: Pool,
}

impl Memory {
    pub fn new(budget: usize) -> Self {
        let shared = || SharedPool::new(budget / 2);
        Self { lines: shared(), bodies: shared(), results: Pool::new(budget / 4), validation: Pool::new(budget / 4) }
    }
}

#[derive(Clone)]
pub struct Pool {
    permits: Arc<Semaphore>,
    whole: u32,
}

impl Pool {
    fn new(bytes: usize) -> Self {
        let whole = kib(bytes).max(1);
        Self { permits: Arc::new(Semaphore::new(whole as usize)), whole }
    }

    /// Waits for room. What is larger than the pool takes the whole of it.
    pub async fn take(&self, bytes: usize) -> Share {
        // It never closes, so there is always a share.
        self.permits.clone().acquire_many_owned(kib(bytes).min(self.whole)).await.ok()
    }
}

/// Pools count in KiB, which fits a semaphore's range whatever the setting.
fn kib(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX).min(u32::MAX >> 4)
}

/// A pool in which no holder can take everything: one that takes more must leave as much free as it then holds. So the first gets up to
/// a half, a second half of the rest, and so on; and one that holds nothing is always given what it asks for, so that however many are
/// stuck, the next one moves. What is held beyond the pool for that is one item each.
#[derive(Clone)]
pub struct SharedPool(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    freed: Notify,
}

struct State {
    free: i64,
    holders: HashMap<Arc<str>, Holder>,
}

#[derive(Default)]
struct Holder {
    held: i64,
    /// Those of one holder wait in a row, so that something large is not passed by for ever.
    turn: Arc<Turn<()>>,
}

/// A share of a [`SharedPool`], given back when it is dropped.
pub struct HolderShare {
    pool: Arc<Shared>,
    holder: Arc<str>,
    bytes: i64,
}

impl SharedPool {
    fn new(bytes: usize) -> Self {
        let state = State { free: i64::try_from(bytes).unwrap_or(i64::MAX), holders: HashMap::new() };
        Self(Arc::new(Shared { state: Mutex::new(state), freed: Notify::new() }))
    }

    /// A share, if there is room at once.
    pub fn try_take(&self, holder: &Arc<str>, bytes: usize) -> Option<HolderShare> {
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        let taken = self.0.lock().take(holder, bytes);
        taken.then(|| HolderShare { pool: self.0.clone(), holder: holder.clone(), bytes })
    }

    pub async fn take(&self, holder: &Arc<str>, bytes: usize) -> HolderShare {
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        let turn = self.0.lock().holders.entry(holder.clone()).or_default().turn.clone();
        let _turn = turn.lock().await;
        loop {
            let freed = self.0.freed.notified();
            let mut freed = std::pin::pin!(freed);
            // From here on nothing that is given back is missed.
            freed.as_mut().enable();
            if self.0.lock().take(holder, bytes) {
                return HolderShare { pool: self.0.clone(), holder: holder.clone(), bytes };
            }
            freed.await;
        }
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn take(&mut self, holder: &Arc<str>, bytes: i64) -> bool {
        let found = self.holders.entry(holder.clone()).or_default();
        let (held, free) = (found.held.saturating_add(bytes), self.free.saturating_sub(bytes));
        let fits = found.held == 0 || held <= free;
        if fits {
            found.held = held;
            self.free = free;
        }
        fits
    }
}

impl Drop for HolderShare {
    fn drop(&mut self) {
        let mut state = self.pool.lock();
        state.free = state.free.saturating_add(self.bytes);
        if let Some(found) = state.holders.get_mut(&self.holder) {
            found.held = found.held.saturating_sub(self.bytes);
            if found.held == 0 && Arc::strong_count(&found.turn) == 1 {
                state.holders.remove(&self.holder);
            }
        }
        drop(state);
        self.pool.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn who_holds_nothing_is_served_however_much_others_hold() {
        let pool = SharedPool::new(1000);
        let [stuck, next, large]: [Arc<str>; 3] = ["stuck".into(), "next".into(), "large".into()];
        let mut held = Vec::new();
        while let Some(share) = pool.take(&stuck, 100).now_or_never() {
            held.push(share);
        }
        assert_eq!(held.len(), 5);
        let others: Vec<_> = std::iter::from_fn(|| pool.take(&next, 100).now_or_never()).collect();
        assert_eq!(others.len(), 2);
        let oversized = pool.take(&large, 5000).now_or_never().unwrap();
        assert!(pool.take(&large, 1).now_or_never().is_none());
        assert!(pool.take(&"new".into(), 1).now_or_never().is_some());
        drop((held, others, oversized));
        assert_eq!(pool.0.lock().free, 1000);
        assert!(pool.0.lock().holders.is_empty());
    }

    #[tokio::test]
    async fn something_large_gets_its_turn_before_what_came_after() {
        let pool = Arc::new(SharedPool::new(1000));
        let holder: Arc<str> = "one".into();
        let first = pool.take(&holder, 300).await;
        let order = Arc::new(Mutex::new(Vec::new()));
        let waiting: Vec<_> = [450, 100]
            .map(|bytes| {
                let (pool, holder, order) = (pool.clone(), holder.clone(), order.clone());
                tokio::spawn(async move {
                    let _share = pool.take(&holder, bytes).await;
                    order.lock().unwrap().push(bytes);
                })
            })
            .into();
        tokio::task::yield_now().await;
        assert!(order.lock().unwrap().is_empty());
        drop(first);
        for task in waiting {
            task.await.unwrap();
        }
        assert_eq!(*order.lock().unwrap(), [450, 100]);
    }
}
