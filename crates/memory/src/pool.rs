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
/// 1. After the grant, the group of the holder holds no more than the pool has free. If the group
///    has several holders, the holder holds no more than the group could still reserve.
/// 2. The reservation is the *priority reservation* of its holder, and the overdraft suffices.
/// 3. The reservation is the priority reservation of its holder, and the pool has no *oversized
///    reservation*. The reservation becomes the oversized reservation.
///
/// The group is the part of the holder's name before a slash: a plugin, whose tenants are holders.
///
/// A reservation becomes the priority reservation when rule 1 refuses its request, the request may
/// wait, and the holder has no priority reservation yet. The reservation keeps both roles until it
/// is dropped or shrunk to zero bytes. The bytes of the oversized reservation do not count against
/// the pool, so that other holders continue as before: the oversized reservation may be held for
/// hours.
#[derive(Clone)]
pub struct Pool(Arc<Inner>);

struct Inner {
    size: usize,
    /// Limit of `State::free` below zero, for priority reservations.
    overdraft: i64,
    state: Mutex<State>,
}

struct State {
    /// Free bytes; negative while the overdraft is in use.
    free: i64,
    holders: HashMap<Holder, HolderState>,
    groups: HashMap<Holder, GroupState>,
    /// Holders with a waiting reservation, in the order in which grants are tried.
    waiting: VecDeque<Holder>,
    /// Id of the oversized reservation.
    oversized: Option<u64>,
    next_id: u64,
}

/// Holders of a group.
#[derive(Default)]
struct GroupState {
    held: i64,
    holders: usize,
}

#[derive(Default)]
struct HolderState {
    held: i64,
    /// Id of the priority reservation.
    priority: Option<u64>,
    queue: VecDeque<Waiter>,
}

struct Waiter {
    reservation: u64,
    /// Bytes that the reservation holds already.
    held: i64,
    /// Bytes that the reservation waits for.
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

/// Returns the group of a holder.
fn group(holder: &str) -> &str {
    holder.split_once('/').map_or(holder, |(group, _)| group)
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
            groups: HashMap::new(),
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

    /// Returns a reservation that holds no bytes yet.
    pub fn reservation(&self, holder: &Holder) -> Reservation {
        let mut state = self.lock();
        state.next_id = state.next_id.wrapping_add(1);
        Reservation { pool: self.clone(), holder: holder.clone(), id: state.next_id, bytes: 0 }
    }

    /// Creates a reservation of `bytes`; waits until the pool has room.
    pub async fn reserve(&self, holder: &Holder, bytes: usize) -> Reservation {
        let mut reservation = self.reservation(holder);
        reservation.grow_to(bytes).await;
        reservation
    }

    /// Creates a reservation of `bytes`, or returns `None` if the pool has no room now.
    pub fn try_reserve(&self, holder: &Holder, bytes: usize) -> Option<Reservation> {
        let mut reservation = self.reservation(holder);
        reservation.try_grow_to(bytes).then_some(reservation)
    }

    /// Returns true if a reservation waits for bytes.
    pub fn is_short(&self) -> bool {
        !self.lock().waiting.is_empty()
    }

    /// Returns the reserved bytes, without those of the oversized reservation.
    pub(crate) fn used(&self) -> usize {
        let most_free = signed(self.0.size).saturating_sub(self.0.overdraft);
        usize::try_from(most_free.saturating_sub(self.lock().free)).unwrap_or(0)
    }

    /// Returns the number of holders with a reservation that waits for bytes.
    pub(crate) fn waiting_holders(&self) -> usize {
        self.lock().waiting.len()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Releases bytes of a reservation and, if the reservation is then `empty`, its roles. Grants
    /// the bytes to waiting reservations.
    fn release(&self, holder: &Holder, reservation: u64, bytes: i64, empty: bool) {
        let mut state = self.lock();
        let counted = if state.oversized == Some(reservation) { 0 } else { bytes };
        state.free = state.free.saturating_add(counted);
        if let Some(found) = state.groups.get_mut(group(holder)) {
            found.held = found.held.saturating_sub(counted);
        }
        if let Some(found) = state.holders.get_mut(holder) {
            found.held = found.held.saturating_sub(counted);
            if empty && found.priority == Some(reservation) {
                found.priority = None;
            }
            if found.held == 0 && found.priority.is_none() && found.queue.is_empty() {
                state.remove_holder(holder);
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
    fn add_holder(&mut self, holder: &Holder) {
        if self.holders.contains_key(holder) {
            return;
        }
        self.holders.insert(holder.clone(), HolderState::default());
        let name = group(holder);
        match self.groups.get_mut(name) {
            Some(found) => found.holders = found.holders.saturating_add(1),
            None => drop(self.groups.insert(name.into(), GroupState { held: 0, holders: 1 })),
        }
    }

    fn remove_holder(&mut self, holder: &Holder) {
        self.holders.remove(holder);
        let name = group(holder);
        if let Some(found) = self.groups.get_mut(name) {
            found.holders = found.holders.saturating_sub(1);
            if found.holders == 0 {
                self.groups.remove(name);
            }
        }
    }

    /// Grants a request by the rules of [`Pool`] and returns true, or returns false.
    ///
    /// `already_held` is the number of bytes that the reservation holds already.
    fn grant(
        &mut self,
        holder: &Holder,
        (reservation, already_held): (u64, i64),
        bytes: i64,
        overdraft: i64,
        may_take_priority: bool,
    ) -> bool {
        if self.oversized == Some(reservation) {
            return true;
        }
        let free = self.free.saturating_sub(bytes);
        self.add_holder(holder);
        let Some(found) = self.holders.get_mut(holder) else { return false };
        let Some(of_group) = self.groups.get_mut(group(holder)) else { return false };
        let held = found.held.saturating_add(bytes);
        let held_by_group = of_group.held.saturating_add(bytes);
        let rest_of_group = free.saturating_sub(held_by_group) / 2;
        if held_by_group > free || (of_group.holders > 1 && held > rest_of_group) {
            if !may_take_priority || *found.priority.get_or_insert(reservation) != reservation {
                return false;
            }
            if free < -overdraft {
                if self.oversized.is_some() {
                    return false;
                }
                self.oversized = Some(reservation);
                found.held = found.held.saturating_sub(already_held);
                of_group.held = of_group.held.saturating_sub(already_held);
                self.free = self.free.saturating_add(already_held);
                return true;
            }
        }
        found.held = held;
        of_group.held = held_by_group;
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
    /// Returns the number of bytes that the reservation holds.
    pub fn bytes(&self) -> usize {
        usize::try_from(self.bytes).unwrap_or(0)
    }

    /// Grows the reservation to `bytes` and returns true, or returns false if the pool has no room
    /// now.
    ///
    /// A reservation that is large enough does not change.
    pub fn try_grow_to(&mut self, bytes: usize) -> bool {
        self.try_grow(bytes, false).is_ok()
    }

    /// Grows the reservation to `bytes`; waits until the pool has room. A larger reservation does
    /// not change.
    pub async fn grow_to(&mut self, bytes: usize) {
        let Err(waiting) = self.try_grow(bytes, true) else { return };
        let Some((more, granted)) = waiting else { return };
        let mut waiting = Waiting { reservation: self, bytes: more, granted };
        if (&mut waiting.granted).await.is_ok() {
            waiting.reservation.bytes = waiting.reservation.bytes.saturating_add(more);
        }
        waiting.bytes = 0;
    }

    /// Shrinks the reservation to `bytes` and releases the rest.
    ///
    /// A reservation that still holds bytes keeps its roles: a second oversized reservation beside
    /// it would exceed the pool further.
    pub fn shrink_to(&mut self, bytes: usize) {
        let kept = signed(bytes).min(self.bytes);
        self.pool.release(&self.holder, self.id, self.bytes.saturating_sub(kept), kept == 0);
        self.bytes = kept;
    }

    /// Grows the reservation now, or joins the queue of its holder if `wait` is set.
    ///
    /// The priority reservation joins at the front. An error without a channel means no room, not
    /// queued.
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

/// Queued request of a reservation, removed from the queue on drop.
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
mod tests;
