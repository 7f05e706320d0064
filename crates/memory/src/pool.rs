//! Pool of bytes that holders share. The [parent module](super) has the threat and the reasons.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use super::Holder;

/// Pool of bytes that holders share.
///
/// A quarter of the pool is the *overdraft*: the bytes below a free count of zero.
///
/// A request for bytes is granted if one of these rules holds, tested in this order:
/// 1. After the grant, the holder holds no more than the pool has free.
/// 2. The share is the *priority share* of its holder, and the overdraft suffices.
/// 3. The share is the priority share of its holder, and the pool has no *oversized share*.
///    The share becomes the oversized share.
///
/// A share becomes the priority share when rule 1 refuses its request, the request may wait, and
/// the holder has no priority share yet.
/// The share keeps both roles until it is dropped or shrunk to zero bytes.
/// The bytes of the oversized share do not count against the pool, so that other holders continue
/// as before: the oversized share may be held for hours.
#[derive(Clone)]
pub struct Pool(Arc<Inner>);

struct Inner {
    size: usize,
    /// Limit of `State::free` below zero, for priority shares.
    overdraft: i64,
    state: Mutex<State>,
}

struct State {
    /// Free bytes; negative while the overdraft is in use.
    free: i64,
    holders: HashMap<Holder, HolderState>,
    /// Holders with a waiting share, in the order in which grants are tried.
    waiting: VecDeque<Holder>,
    /// Id of the oversized share.
    oversized: Option<u64>,
    next_id: u64,
}

#[derive(Default)]
struct HolderState {
    held: i64,
    /// Id of the priority share.
    priority: Option<u64>,
    queue: VecDeque<Waiter>,
}

struct Waiter {
    reservation: u64,
    /// Bytes that the share holds already.
    held: i64,
    /// Bytes that the share waits for.
    bytes: i64,
    granted: oneshot::Sender<()>,
}

/// Bytes reserved from a [`Pool`], released on drop.
pub struct Reservation {
    pool: Pool,
    holder: Holder,
    id: u64,
    bytes: i64,
}

/// Converts to a signed size, capped so that sums of a few sizes do not overflow.
fn signed(bytes: usize) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX / 4).min(i64::MAX / 4)
}

impl Pool {
    /// Creates a pool of `size` bytes.
    pub fn new(size: usize) -> Self {
        let overdraft = size / 4;
        let state = State {
            free: signed(size.saturating_sub(overdraft)),
            holders: HashMap::new(),
            waiting: VecDeque::new(),
            oversized: None,
            next_id: 0,
        };
        Self(Arc::new(Inner { size, overdraft: signed(overdraft), state: Mutex::new(state) }))
    }

    /// Returns the size of the whole pool in bytes.
    pub fn size(&self) -> usize {
        self.0.size
    }

    /// Returns a share that holds no bytes yet.
    pub fn reservation(&self, holder: &Holder) -> Reservation {
        let mut state = self.lock();
        state.next_id = state.next_id.wrapping_add(1);
        Reservation { pool: self.clone(), holder: holder.clone(), id: state.next_id, bytes: 0 }
    }

    /// Reserves a share of `bytes`; waits until the pool has room.
    pub async fn reserve(&self, holder: &Holder, bytes: usize) -> Reservation {
        let mut reservation = self.reservation(holder);
        reservation.grow_to(bytes).await;
        reservation
    }

    /// Reserves a share of `bytes`, or returns `None` if the pool has no room now.
    pub fn try_reserve(&self, holder: &Holder, bytes: usize) -> Option<Reservation> {
        let mut reservation = self.reservation(holder);
        reservation.try_grow_to(bytes).then_some(reservation)
    }

    /// Returns true if a share waits for bytes.
    pub fn is_short(&self) -> bool {
        !self.lock().waiting.is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Releases bytes of a share and, if the share is then `empty`, its roles. Grants the bytes to
    /// waiting shares.
    fn release(&self, holder: &Holder, reservation: u64, bytes: i64, empty: bool) {
        let mut state = self.lock();
        let counted = if state.oversized == Some(reservation) { 0 } else { bytes };
        state.free = state.free.saturating_add(counted);
        if let Some(found) = state.holders.get_mut(holder) {
            found.held = found.held.saturating_sub(counted);
            if empty && found.priority == Some(reservation) {
                found.priority = None;
            }
            if found.held == 0 && found.priority.is_none() && found.queue.is_empty() {
                state.holders.remove(holder);
            }
        }
        if empty && state.oversized == Some(reservation) {
            state.oversized = None;
        }
        let granted = state.grant_waiting(self.0.overdraft);
        drop(state);
        for waiter in granted {
            // A waiter that was dropped meanwhile releases its grant in `Waiting::drop`.
            waiter.send(()).ok();
        }
    }
}

impl State {
    /// Grants a request by the rules of [`Pool`] and returns true, or returns false.
    ///
    /// `share_held` is the number of bytes that the share holds already.
    fn grant(
        &mut self,
        holder: &Holder,
        (reservation, share_held): (u64, i64),
        bytes: i64,
        overdraft: i64,
        may_take_priority: bool,
    ) -> bool {
        if self.oversized == Some(reservation) {
            return true;
        }
        let free = self.free.saturating_sub(bytes);
        if !self.holders.contains_key(holder) {
            self.holders.insert(holder.clone(), HolderState::default());
        }
        let Some(found) = self.holders.get_mut(holder) else { return false };
        let held = found.held.saturating_add(bytes);
        if held > free {
            if !may_take_priority || *found.priority.get_or_insert(reservation) != reservation {
                return false;
            }
            if free < -overdraft {
                if self.oversized.is_some() {
                    return false;
                }
                self.oversized = Some(reservation);
                found.held = found.held.saturating_sub(share_held);
                self.free = self.free.saturating_add(share_held);
                return true;
            }
        }
        found.held = held;
        self.free = free;
        true
    }

    /// Grants waiting requests as far as the pool has room and returns their channels.
    ///
    /// The requests of one holder are granted in queue order, so that small requests do not starve
    /// a large one.
    fn grant_waiting(&mut self, overdraft: i64) -> Vec<oneshot::Sender<()>> {
        let mut granted = Vec::new();
        let mut round = self.waiting.len();
        while round > 0 {
            round = round.saturating_sub(1);
            let Some(holder) = self.waiting.pop_front() else { break };
            loop {
                let next = self.holders.get(&holder).and_then(|found| found.queue.front());
                let Some((reservation, bytes)) =
                    next.map(|waiter| ((waiter.reservation, waiter.held), waiter.bytes))
                else {
                    break;
                };
                if !self.grant(&holder, reservation, bytes, overdraft, true) {
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

impl Reservation {
    /// Returns the number of bytes that the share holds.
    pub fn bytes(&self) -> usize {
        usize::try_from(self.bytes).unwrap_or(0)
    }

    /// Grows the share to `bytes` and returns true, or returns false if the pool has no room now.
    ///
    /// A share that is large enough does not change.
    pub fn try_grow_to(&mut self, bytes: usize) -> bool {
        self.try_grow(bytes, false).is_ok()
    }

    /// Grows the share to `bytes`; waits until the pool has room. A larger share does not change.
    pub async fn grow_to(&mut self, bytes: usize) {
        let Err(waiting) = self.try_grow(bytes, true) else { return };
        let Some((more, granted)) = waiting else { return };
        let mut waiting = Waiting { reservation: self, bytes: more, granted };
        if (&mut waiting.granted).await.is_ok() {
            waiting.reservation.bytes = waiting.reservation.bytes.saturating_add(more);
        }
        waiting.bytes = 0;
    }

    /// Shrinks the share to `bytes` and releases the rest.
    ///
    /// A share that still holds bytes keeps its roles: a second oversized share beside it would
    /// exceed the pool further.
    pub fn shrink_to(&mut self, bytes: usize) {
        let kept = signed(bytes).min(self.bytes);
        self.pool.release(&self.holder, self.id, self.bytes.saturating_sub(kept), kept == 0);
        self.bytes = kept;
    }

    /// Grows the share now, or joins the queue of its holder if `wait` is set.
    ///
    /// The priority share joins at the front. An error without a channel means no room, not queued.
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
        let has_priority = found.is_some_and(|found| found.priority == Some(self.id));
        let others_wait = found.is_some_and(|found| !found.queue.is_empty());
        if (has_priority || !others_wait)
            && state.grant(
                &self.holder,
                (self.id, self.bytes),
                more,
                overdraft,
                wait || has_priority,
            )
        {
            self.bytes = self.bytes.saturating_add(more);
            return Ok(());
        }
        if !wait {
            return Err(None);
        }
        let (sender, granted) = oneshot::channel();
        let waiter =
            Waiter { reservation: self.id, held: self.bytes, bytes: more, granted: sender };
        if let Some(found) = state.holders.get_mut(&self.holder) {
            if has_priority || found.priority == Some(self.id) {
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

impl Drop for Reservation {
    fn drop(&mut self) {
        self.pool.release(&self.holder, self.id, self.bytes, true);
    }
}

/// Queued request of a share, removed from the queue on drop.
struct Waiting<'a> {
    reservation: &'a mut Reservation,
    bytes: i64,
    granted: oneshot::Receiver<()>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if self.bytes == 0 {
            return;
        }
        let Reservation { pool, holder, id, .. } = &*self.reservation;
        let mut state = pool.lock();
        let mut was_queued = false;
        if let Some(found) = state.holders.get_mut(holder) {
            let before = found.queue.len();
            found.queue.retain(|waiter| waiter.reservation != *id);
            was_queued = found.queue.len() < before;
            if found.queue.is_empty() {
                state.waiting.retain(|waiting| waiting != holder);
            }
        }
        drop(state);
        // A request that is no longer queued was granted meanwhile, so its bytes are released.
        // In both cases, the requests behind it may be grantable now.
        pool.release(holder, *id, if was_queued { 0 } else { self.bytes }, false);
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

    /// Creates a pool of 1000 bytes beside the overdraft.
    fn pool() -> Pool {
        Pool::new(1333)
    }

    #[tokio::test]
    async fn holder_leaves_as_much_free_as_it_holds_and_new_holder_finds_room() {
        let pool = pool();
        let whole = free(&pool);
        let held: Vec<_> = std::iter::from_fn(|| pool.try_reserve(&holder("stuck"), 100)).collect();
        assert_eq!(held.len(), 5);
        let others: Vec<_> =
            std::iter::from_fn(|| pool.try_reserve(&holder("next"), 100)).collect();
        assert_eq!(others.len(), 2);
        // Rule 3: one item may be larger than the pool.
        let oversized = pool.reserve(&holder("large"), 5000).now_or_never().unwrap();
        assert!(pool.reserve(&holder("larger"), 5000).now_or_never().is_none());
        drop((held, others, oversized));
        assert_eq!(free(&pool), whole);
        assert!(pool.lock().holders.is_empty() && pool.lock().waiting.is_empty());
    }

    #[tokio::test]
    async fn small_holders_fit_into_the_overdraft_and_only_one_item_exceeds_the_pool() {
        let pool = Pool::new(4000);
        let hog = pool.reserve(&holder("hog"), 3000).await;
        let small: Vec<_> = (0..90)
            .map(|name| pool.reserve(&holder(&name.to_string()), 10).now_or_never())
            .collect();
        assert!(small.iter().all(Option::is_some));
        let oversized = pool.reserve(&holder("first"), 2000).now_or_never();
        assert!(oversized.is_some());
        assert!(
            pool.reserve(&holder("second"), 2000).now_or_never().is_none(),
            "a second item exceeds the pool"
        );
        // The oversized share leaves the rest of the pool unchanged.
        assert!(pool.reserve(&holder("small"), 10).now_or_never().is_some());
        drop(oversized);
        assert!(pool.reserve(&holder("second"), 2000).now_or_never().is_some());
        drop((hog, small));
    }

    #[tokio::test]
    async fn large_request_is_granted_before_later_requests() {
        let pool = pool();
        let one = holder("one");
        let first = pool.reserve(&one, 300).await;
        // The large share becomes the priority share and does not wait; the next one must.
        let large = pool.reserve(&one, 450).now_or_never().unwrap();
        let mut second = Box::pin(pool.reserve(&one, 450));
        let mut third = Box::pin(pool.reserve(&one, 1));
        assert!((&mut second).now_or_never().is_none() && (&mut third).now_or_never().is_none());
        drop(first);
        drop(large);
        let second = second.await;
        let third = third.await;
        assert_eq!((second.bytes(), third.bytes()), (450, 1));
    }

    #[tokio::test]
    async fn shares_that_grow_in_steps_all_complete() {
        let pool = Pool::new(1000);
        let tasks: Vec<_> = (0..40)
            .map(|number| {
                let pool = pool.clone();
                tokio::spawn(async move {
                    let mut reservation = pool.reservation(&holder(&(number % 4).to_string()));
                    for size in 1..=20 {
                        reservation.grow_to(size * 50).await;
                        tokio::task::yield_now().await;
                    }
                    reservation.shrink_to(10);
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
        fn pool_loses_no_bytes_and_never_exceeds_its_bound(
            steps in prop::collection::vec((0_usize..7, 0_usize..3, 1_usize..400), 1..200)
        ) {
            let pool = Pool::new(1000);
            let mut shares: Vec<Reservation> = Vec::new();
            let mut largest = 0;
            for (action, name, bytes) in steps {
                match action {
                    0..3 => {
                        let name = holder(&name.to_string());
                        shares.extend(pool.reserve(&name, bytes).now_or_never());
                    }
                    3 => shares.extend(pool.try_reserve(&holder(&name.to_string()), bytes)),
                    4 => {
                        if let Some(reservation) = shares.get_mut(name) {
                            // A request that has to wait is dropped at once.
                            reservation.grow_to(bytes).now_or_never();
                        }
                    }
                    5 => {
                        if let Some(reservation) = shares.get_mut(name) {
                            reservation.shrink_to(bytes);
                        }
                    }
                    _ if name < shares.len() => drop(shares.remove(name)),
                    _ => {}
                }
                largest = largest.max(bytes);
                let held: usize = shares.iter().map(Reservation::bytes).sum();
                prop_assert!(held <= 1000 + largest, "{held}");
                let oversized = pool.lock().oversized;
                let counted: usize = shares
                    .iter()
                    .filter(|reservation| oversized != Some(reservation.id))
                    .map(Reservation::bytes)
                    .sum();
                prop_assert!(counted <= 1000, "{counted}");
                prop_assert_eq!(free(&pool), 750 - i64::try_from(counted).unwrap());
            }
            drop(shares);
            prop_assert_eq!(free(&pool), 750);
            let state = pool.lock();
            prop_assert!(state.holders.is_empty() && state.waiting.is_empty());
            prop_assert!(state.oversized.is_none());
        }
    }
}
