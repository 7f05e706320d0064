//! A pool of bytes, shared between holders. See the [module](super) for threat and reasons.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use super::Holder;

/// A number of bytes that holders share.
///
/// A request for `n` bytes is granted if, in this order,
/// 1. its holder then holds no more than is left free,
/// 2. the share is the holder's *first*, and no more than a quarter of the pool is overdrawn then,
/// 3. the share is the holder's first and the pool's first.
///
/// A share becomes the first when its request cannot be granted by rule 1 while there is no first. It stays so until it holds nothing any
/// more. What the pool's first holds is outside of the pool, so that others go on as if it were not there: it may be held for hours.
#[derive(Clone)]
pub struct Pool(Arc<Inner>);

struct Inner {
    size: usize,
    /// How far below zero `free` may go for the first share of a holder.
    overdraft: i64,
    state: Mutex<State>,
}

struct State {
    /// Below zero by what is overdrawn.
    free: i64,
    holders: HashMap<Holder, HolderState>,
    /// Holders with a waiting share, in the order in which they are asked.
    waiting: VecDeque<Holder>,
    /// The share that may exceed the pool.
    first: Option<u64>,
    next_id: u64,
}

#[derive(Default)]
struct HolderState {
    held: i64,
    first: Option<u64>,
    queue: VecDeque<Waiter>,
}

struct Waiter {
    share: u64,
    /// What the share holds, and what it waits for.
    has: i64,
    bytes: i64,
    granted: oneshot::Sender<()>,
}

/// Bytes taken from a [`Pool`], given back when it is dropped.
pub struct Share {
    pool: Pool,
    holder: Holder,
    id: u64,
    bytes: i64,
}

fn signed(bytes: usize) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX / 4).min(i64::MAX / 4)
}

impl Pool {
    pub fn new(size: usize) -> Self {
        let overdraft = size / 4;
        let state = State {
            free: signed(size.saturating_sub(overdraft)),
            holders: HashMap::new(),
            waiting: VecDeque::new(),
            first: None,
            next_id: 0,
        };
        Self(Arc::new(Inner { size, overdraft: signed(overdraft), state: Mutex::new(state) }))
    }

    /// Bytes of the whole pool.
    pub fn size(&self) -> usize {
        self.0.size
    }

    /// A share without any bytes yet.
    pub fn share(&self, holder: &Holder) -> Share {
        let mut state = self.lock();
        state.next_id = state.next_id.wrapping_add(1);
        Share { pool: self.clone(), holder: holder.clone(), id: state.next_id, bytes: 0 }
    }

    /// Waits for a share of this size.
    pub async fn take(&self, holder: &Holder, bytes: usize) -> Share {
        let mut share = self.share(holder);
        share.cover(bytes).await;
        share
    }

    /// A share of this size, if there is room at once.
    pub fn try_take(&self, holder: &Holder, bytes: usize) -> Option<Share> {
        let mut share = self.share(holder);
        share.try_cover(bytes).then_some(share)
    }

    /// Whether some share waits for bytes.
    pub fn is_short(&self) -> bool {
        !self.lock().waiting.is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives back bytes of a share, and its place as the first if it is done.
    fn give_back(&self, holder: &Holder, share: u64, bytes: i64, done: bool) {
        let mut state = self.lock();
        let inside = if state.first == Some(share) { 0 } else { bytes };
        state.free = state.free.saturating_add(inside);
        if let Some(found) = state.holders.get_mut(holder) {
            found.held = found.held.saturating_sub(inside);
            if done && found.first == Some(share) {
                found.first = None;
            }
            if found.held == 0 && found.first.is_none() && found.queue.is_empty() {
                state.holders.remove(holder);
            }
        }
        if done && state.first == Some(share) {
            state.first = None;
        }
        let granted = state.serve(self.0.overdraft);
        drop(state);
        for waiter in granted {
            // One that has gone gives its bytes back itself.
            waiter.send(()).ok();
        }
    }
}

impl State {
    /// Grants a request by the rules of [`Pool`], or not. `has` is what the share holds before.
    fn grant(
        &mut self,
        holder: &Holder,
        (share, has): (u64, i64),
        bytes: i64,
        overdraft: i64,
        may_be_first: bool,
    ) -> bool {
        if self.first == Some(share) {
            return true;
        }
        let free = self.free.saturating_sub(bytes);
        if !self.holders.contains_key(holder) {
            self.holders.insert(holder.clone(), HolderState::default());
        }
        let Some(found) = self.holders.get_mut(holder) else { return false };
        let held = found.held.saturating_add(bytes);
        if held > free {
            if !may_be_first || *found.first.get_or_insert(share) != share {
                return false;
            }
            if free < -overdraft {
                if self.first.is_some() {
                    return false;
                }
                self.first = Some(share);
                found.held = found.held.saturating_sub(has);
                self.free = self.free.saturating_add(has);
                return true;
            }
        }
        found.held = held;
        self.free = free;
        true
    }

    /// Grants what can be granted now to those that wait: each holder's in a row, so that something large is not passed by for ever.
    fn serve(&mut self, overdraft: i64) -> Vec<oneshot::Sender<()>> {
        let mut granted = Vec::new();
        let mut round = self.waiting.len();
        while round > 0 {
            round = round.saturating_sub(1);
            let Some(holder) = self.waiting.pop_front() else { break };
            loop {
                let next = self.holders.get(&holder).and_then(|found| found.queue.front());
                let Some((share, bytes)) =
                    next.map(|waiter| ((waiter.share, waiter.has), waiter.bytes))
                else {
                    break;
                };
                if !self.grant(&holder, share, bytes, overdraft, true) {
                    break;
                }
                let waiter =
                    self.holders.get_mut(&holder).and_then(|found| found.queue.pop_front());
                granted.extend(waiter.map(|waiter| waiter.granted));
            }
            if self.holders.get(&holder).is_some_and(|found| !found.queue.is_empty()) {
                self.waiting.push_back(holder);
            }
        }
        granted
    }
}

impl Share {
    /// Bytes it holds.
    pub fn bytes(&self) -> usize {
        usize::try_from(self.bytes).unwrap_or(0)
    }

    /// Grows to this size, if there is room at once. A share that is large enough stays as it is.
    pub fn try_cover(&mut self, bytes: usize) -> bool {
        self.try_grow(bytes, false).is_ok()
    }

    /// Grows to this size, and waits for room if there is none.
    pub async fn cover(&mut self, bytes: usize) {
        let Err(waiting) = self.try_grow(bytes, true) else { return };
        let Some((more, granted)) = waiting else { return };
        let mut place = Waiting { share: self, bytes: more, granted };
        if (&mut place.granted).await.is_ok() {
            place.share.bytes = place.share.bytes.saturating_add(more);
        }
        place.bytes = 0;
    }

    /// Gives back what it has beyond this size. One that still holds something stays the first: the next one would exceed the pool
    /// beside it.
    pub fn settle(&mut self, bytes: usize) {
        let kept = signed(bytes).min(self.bytes);
        self.pool.give_back(&self.holder, self.id, self.bytes.saturating_sub(kept), kept == 0);
        self.bytes = kept;
    }

    /// Grows now, or takes a place in its holder's queue if it is to wait: at the front if it is the first.
    fn try_grow(
        &mut self,
        bytes: usize,
        wait: bool,
    ) -> Result<(), Option<(i64, oneshot::Receiver<()>)>> {
        let more = signed(bytes).saturating_sub(self.bytes);
        if more <= 0 {
            return Ok(());
        }
        let overdraft = self.pool.0.overdraft;
        let mut state = self.pool.lock();
        let found = state.holders.get(&self.holder);
        let is_first = found.is_some_and(|found| found.first == Some(self.id));
        let others_wait = found.is_some_and(|found| !found.queue.is_empty());
        if (is_first || !others_wait)
            && state.grant(&self.holder, (self.id, self.bytes), more, overdraft, wait || is_first)
        {
            self.bytes = self.bytes.saturating_add(more);
            return Ok(());
        }
        if !wait {
            return Err(None);
        }
        let (sender, granted) = oneshot::channel();
        let waiter = Waiter { share: self.id, has: self.bytes, bytes: more, granted: sender };
        if let Some(found) = state.holders.get_mut(&self.holder) {
            if is_first || found.first == Some(self.id) {
                found.queue.push_front(waiter);
            } else {
                found.queue.push_back(waiter);
            }
        }
        if !state.waiting.contains(&self.holder) {
            let holder = self.holder.clone();
            state.waiting.push_back(holder);
        }
        Err(Some((more, granted)))
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.pool.give_back(&self.holder, self.id, self.bytes, true);
    }
}

/// A place in a queue, given up when it is dropped.
struct Waiting<'a> {
    share: &'a mut Share,
    bytes: i64,
    granted: oneshot::Receiver<()>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if self.bytes == 0 {
            return;
        }
        let Share { pool, holder, id, .. } = &*self.share;
        let mut state = pool.lock();
        let mut left = false;
        if let Some(found) = state.holders.get_mut(holder) {
            let before = found.queue.len();
            found.queue.retain(|waiter| waiter.share != *id);
            left = found.queue.len() < before;
            if found.queue.is_empty() {
                state.waiting.retain(|waiting| waiting != holder);
            }
        }
        drop(state);
        // What was granted at the last moment goes back; and whoever waited behind may have its turn.
        pool.give_back(holder, *id, if left { 0 } else { self.bytes }, false);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use proptest::prelude::*;

    use super::*;

    fn holder(name: &str) -> Holder {
        name.into()
    }

    fn free(pool: &Pool) -> i64 {
        pool.lock().free
    }

    /// A pool of 1000 bytes without the quarter that can be overdrawn.
    fn pool() -> Pool {
        Pool::new(1333)
    }

    #[tokio::test]
    async fn a_holder_leaves_as_much_as_it_holds_and_a_new_one_finds_room() {
        let pool = pool();
        let whole = free(&pool);
        let held: Vec<_> = std::iter::from_fn(|| pool.try_take(&holder("stuck"), 100)).collect();
        assert_eq!(held.len(), 5);
        let others: Vec<_> = std::iter::from_fn(|| pool.try_take(&holder("next"), 100)).collect();
        assert_eq!(others.len(), 2);
        // By rule 2 and then by rule 3: one item may be larger than the pool.
        let oversized = pool.take(&holder("large"), 5000).now_or_never().unwrap();
        assert!(pool.take(&holder("larger"), 5000).now_or_never().is_none());
        drop((held, others, oversized));
        assert_eq!(free(&pool), whole);
        assert!(pool.lock().holders.is_empty() && pool.lock().waiting.is_empty());
    }

    #[tokio::test]
    async fn many_small_holders_fit_into_the_overdraft_and_one_item_exceeds_the_pool() {
        let pool = Pool::new(4000);
        let hog = pool.take(&holder("hog"), 3000).await;
        let small: Vec<_> =
            (0..90).map(|name| pool.take(&holder(&name.to_string()), 10).now_or_never()).collect();
        assert!(small.iter().all(Option::is_some));
        let first = pool.take(&holder("first"), 2000).now_or_never();
        assert!(first.is_some());
        assert!(
            pool.take(&holder("second"), 2000).now_or_never().is_none(),
            "two items exceed the pool"
        );
        // Beside it the pool is as it was.
        assert!(pool.take(&holder("small"), 10).now_or_never().is_some());
        drop(first);
        assert!(pool.take(&holder("second"), 2000).now_or_never().is_some());
        drop((hog, small));
    }

    #[tokio::test]
    async fn something_large_gets_its_turn_before_what_came_after() {
        let pool = pool();
        let one = holder("one");
        let first = pool.take(&one, 300).await;
        // It becomes the first and waits for nobody, unless another is the first.
        let large = pool.take(&one, 450).now_or_never().unwrap();
        let mut second = Box::pin(pool.take(&one, 450));
        let mut third = Box::pin(pool.take(&one, 1));
        assert!((&mut second).now_or_never().is_none() && (&mut third).now_or_never().is_none());
        drop(first);
        drop(large);
        let second = second.await;
        let third = third.await;
        assert_eq!((second.bytes(), third.bytes()), (450, 1));
    }

    #[tokio::test]
    async fn shares_that_grow_step_by_step_come_to_their_end() {
        let pool = Pool::new(1000);
        let tasks: Vec<_> = (0..40)
            .map(|number| {
                let pool = pool.clone();
                tokio::spawn(async move {
                    let mut share = pool.share(&holder(&(number % 4).to_string()));
                    for size in 1..=20 {
                        share.cover(size * 50).await;
                        tokio::task::yield_now().await;
                    }
                    share.settle(10);
                    tokio::task::yield_now().await;
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(free(&pool), 750);
    }

    proptest! {
        #[test]
        fn nothing_is_lost_and_the_bound_holds(steps in prop::collection::vec((0_usize..7, 0_usize..3, 1_usize..400), 1..200)) {
            let pool = Pool::new(1000);
            let mut shares: Vec<Share> = Vec::new();
            let mut largest = 0;
            for (what, name, bytes) in steps {
                match what {
                    0..3 => shares.extend(pool.take(&holder(&name.to_string()), bytes).now_or_never()),
                    3 => shares.extend(pool.try_take(&holder(&name.to_string()), bytes)),
                    4 => {
                        if let Some(share) = shares.get_mut(name) {
                            // Given up while it waits, if it has to.
                            share.cover(bytes).now_or_never();
                        }
                    }
                    5 => {
                        if let Some(share) = shares.get_mut(name) {
                            share.settle(bytes);
                        }
                    }
                    _ if name < shares.len() => drop(shares.remove(name)),
                    _ => {}
                }
                largest = largest.max(bytes);
                let held: usize = shares.iter().map(Share::bytes).sum();
                prop_assert!(held <= 1000 + largest, "{held}");
                let first = pool.lock().first;
                let inside: usize = shares.iter().filter(|share| first != Some(share.id)).map(Share::bytes).sum();
                prop_assert!(inside <= 1000, "{inside}");
                prop_assert_eq!(free(&pool), 750 - i64::try_from(inside).unwrap());
            }
            drop(shares);
            prop_assert_eq!(free(&pool), 750);
            prop_assert!(pool.lock().holders.is_empty() && pool.lock().waiting.is_empty() && pool.lock().first.is_none());
        }
    }
}
