//! Admission: decides which waiting exchange may start next, within the operator's limit and within
//! the limit that [`concurrency`](super::concurrency) estimates.
//!
//! **Fair share.** A queue is one batch of one tenant. A free permit goes to the tenant that is
//! furthest below its share, then to the queue of the tenant that is, and within a queue to the
//! oldest request; see [`shares`]. So a tenant with one batch does not wait behind the many batches
//! of another, and a batch of one line does not wait behind the thousands of lines of other
//! batches.
//!
//! **Limit of a tenant.** A tenant that has as many exchanges in flight as it may, over all
//! plugins, is passed over; see [`in_flight`](super::in_flight).
//!
//! **Permits.** [`Permit`] is a permit for one exchange in flight, and dropping it releases the
//! permit. The release itself admits the next request. A request that is canceled while it waits
//! leaves its queue, and a permit that was already granted to that request is released.
//!
//! **Held permits.** After a refusal the limit may hold a permit for up to the usual time of an
//! exchange. A provider refuses within milliseconds, so immediate releases would raise the rate of
//! requests exactly when the provider asks for less.
//!
//! **Hung exchanges.** An exchange that takes [`HANG_FACTOR`] times the usual time no longer counts
//! against the estimated limit; it still counts against the operator's limit. Otherwise a single
//! hung exchange would stop a plugin whose limit is one.
//!
//! **Long pauses.** If the provider asks for a pause of more than [`MAX_QUEUE_WAIT`], the admission
//! returns the end of the pause to all waiting requests: a request must not wait in memory for
//! minutes. The batch then keeps the request's position in the input file instead.
//!
//! **Refusals of one request.** A request that is refused again while others are accepted is no
//! evidence about the provider. [`Refusals`] counts per request, so that such a request does not
//! slow down the others.
//!
//! **Online requests.** A person waits for an online request. While there are online requests, or
//! were within [`ONLINE_MEMORY`], lines of batches leave a share of the limit free for them.
//!
//! **Own credentials.** A tenant whose credential is its own has limits of its own at the provider.
//! What such an exchange says about limits slows nobody else down.
//!
//! **Wake-ups.** A limit below one, a held permit and a hung exchange change with time and without
//! an event. A timer task checks the queues again at the earliest of these times.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use batchwright_domain::ids::TenantId;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::concurrency::{Began, Limit, LimitFeedback, Next};
use super::in_flight::{TenantsInFlight, WaitingRequests};

use shares::Shares;
pub use shares::{Priority, QueueId, ShareBy};

/// Multiple of the usual time after which an exchange no longer counts against the estimated limit.
const HANG_FACTOR: u32 = 8;
/// Minimum time after which an exchange no longer counts against the estimated limit.
const MIN_HANG_TIME: Duration = Duration::from_secs(5);

/// Maximum pause that a request waits for in memory.
const MAX_QUEUE_WAIT: Duration = Duration::from_secs(5);

/// Time after an online request in which a share of the limit stays free for the next one.
const ONLINE_MEMORY: Duration = Duration::from_secs(300);

/// Admission control for the exchanges of one plugin.
pub(crate) struct AdmissionQueue(Arc<Inner>);

struct Inner {
    /// Operator's limit.
    max: usize,
    /// Percent of the limit that lines of batches leave free for online requests.
    online_percent: usize,
    /// Exchanges of all plugins in flight, by tenant.
    tenants: Arc<TenantsInFlight>,
    state: Mutex<State>,
}

/// Exchange in flight.
struct InFlight {
    started_at: Instant,
    is_online: bool,
    /// False for a stream that has begun: it lasts as long as its client reads.
    may_hang: bool,
}

struct State {
    limit: Limit,
    in_flight: usize,
    /// Exchanges in flight that are online requests.
    online_in_flight: usize,
    /// Time of the last online request.
    online_at: Option<Instant>,
    /// Queues with waiting requests or exchanges in flight, and their shares.
    shares: Shares<(u64, oneshot::Sender<Permit>)>,
    /// Last number of a waiting request or of an exchange.
    last_number: u64,
    /// Exchanges in flight by number, oldest first.
    started_at: BTreeMap<u64, InFlight>,
    /// Permits that refused exchanges hold, with the time of their release.
    held: BinaryHeap<Reverse<(Instant, QueueId)>>,
    /// Number of requests accepted.
    accepted: u64,
    /// Time of the scheduled wake-up.
    wakeup_at: Option<Instant>,
}

/// Permit for one exchange in flight; dropping it releases the permit.
pub struct Permit {
    /// Absent once the permit is released.
    admission: Option<Arc<Inner>>,
    queue: QueueId,
    number: u64,
    began: Began,
    /// Time until which the permit is held after the drop.
    held: Option<Instant>,
    /// True if the exchange has a credential of its tenant alone.
    has_own_credential: bool,
}

/// Consecutive refusals of one request.
#[derive(Clone, Copy, Debug, Default)]
pub struct Refusals {
    /// Number of consecutive refusals.
    pub number: u32,
    /// Accepted requests of the plugin at the time of the last refusal.
    accepted: u64,
}

impl AdmissionQueue {
    /// Returns an admission that never exceeds `max` exchanges in flight.
    pub(crate) fn new(
        (max, online_percent): (usize, usize),
        share_by: ShareBy,
        tenants: &Arc<TenantsInFlight>,
    ) -> Self {
        let max = max.max(1);
        let state = State {
            limit: Limit::new(max),
            in_flight: 0,
            online_in_flight: 0,
            online_at: None,
            shares: Shares::new(share_by),
            last_number: 0,
            started_at: BTreeMap::new(),
            held: BinaryHeap::new(),
            accepted: 0,
            wakeup_at: None,
        };
        let (tenants_in_flight, state) = (tenants.clone(), Mutex::new(state));
        let inner = Inner { max, online_percent, tenants: tenants_in_flight, state };
        let inner = Arc::new(inner);
        let queue: Arc<dyn WaitingRequests> = inner.clone();
        tenants.add_queue(Arc::downgrade(&queue));
        Self(inner)
    }

    /// Waits for a permit for one more exchange. The error is the end of a pause that is too long
    /// to wait for in memory.
    pub(crate) async fn admit(
        &self,
        queue: QueueId,
        priority: Priority,
    ) -> Result<Permit, Instant> {
        loop {
            let (number, granted, may_start) = {
                let mut state = self.0.lock();
                let now = Instant::now();
                state.release_expired_holds(now);
                let next = state.next(now, self.0.max);
                if queue.batch.is_none() {
                    state.online_at = Some(now);
                }
                if next == Next::Now
                    && !state.shares.has_waiting()
                    && (queue.batch.is_none() || state.has_room_for_batches(now, &self.0))
                    && self.0.tenants.take(&queue.tenant, priority.max_in_flight)
                {
                    state.shares.set_priority(&queue, priority);
                    return Ok(state.grant(&self.0, (&queue, priority.tokens), now));
                }
                if let Some(until) = state.long_pause(now) {
                    return Err(until);
                }
                state.last_number = state.last_number.wrapping_add(1);
                let number = state.last_number;
                let (sender, granted) = oneshot::channel();
                state.shares.wait(&queue, priority, (number, sender));
                if let Some(at) = state.next_wakeup(next, self.0.max) {
                    self.0.schedule_wakeup(&mut state, at);
                }
                (number, granted, next == Next::Now)
            };
            let mut waiter = Waiter { admission: &self.0, queue: &queue, number };
            if may_start {
                // Those who wait may have no right to the free permit.
                self.0.admit_waiting();
            }
            let admitted = granted.await;
            waiter.number = 0;
            // A dropped sender means that a long pause has begun: check again.
            if let Ok(admitted) = admitted {
                return Ok(admitted);
            }
        }
    }

    /// Records the remaining requests that the response to an exchange reported.
    pub(crate) fn update_remaining(&self, admitted: &Permit, remaining: u64, reset: Duration) {
        if admitted.has_own_credential {
            return;
        }
        let mut state = self.0.lock();
        let Some(until) = Instant::now().checked_add(reset) else { return };
        state.limit.update_remaining(remaining, until, admitted.began);
    }

    /// Returns the exchanges of a tenant in flight, over all plugins.
    pub(crate) fn in_flight_of(&self, tenant: &TenantId) -> u64 {
        self.0.tenants.of(tenant)
    }

    /// Returns the exchanges in flight.
    pub(crate) fn in_flight(&self) -> usize {
        self.0.lock().in_flight
    }

    /// Returns the estimated limit of exchanges in flight; below one, a rate.
    pub(crate) fn limit(&self) -> f64 {
        self.0.lock().limit.current()
    }
}

impl WaitingRequests for Inner {
    fn wake(self: Arc<Self>) {
        self.admit_waiting();
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Admits waiting requests while permits are free.
    fn admit_waiting(self: &Arc<Self>) {
        loop {
            let (waiter, admitted) = {
                let mut state = self.lock();
                let now = Instant::now();
                state.release_expired_holds(now);
                if !state.shares.has_waiting() {
                    return;
                }
                let next = state.next(now, self.max);
                if next != Next::Now {
                    if let Some(at) = state.next_wakeup(next, self.max) {
                        self.schedule_wakeup(&mut state, at);
                    }
                    return;
                }
                let (tenants, has_room) = (&self.tenants, state.has_room_for_batches(now, self));
                let next =
                    state.shares.take_next(has_room, |tenant, max| tenants.take(tenant, max));
                let Some((queue, tokens, (_, waiter))) = next else {
                    if !has_room && let Some(at) = state.next_room_for_batches(now) {
                        self.schedule_wakeup(&mut state, at);
                    }
                    return;
                };
                let admitted = state.grant(self, (&queue, tokens), now);
                (waiter, admitted)
            };
            // The waiting request was canceled: release its permit immediately.
            if let Err(mut unused) = waiter.send(admitted)
                && let Some(admission) = unused.admission.take()
            {
                admission.lock().end_exchange(&unused.queue, unused.number);
                admission.tenants.release(&unused.queue.tenant);
            }
        }
    }

    /// Schedules [`Self::admit_waiting`] at a time, unless an earlier wake-up is scheduled.
    fn schedule_wakeup(self: &Arc<Self>, state: &mut State, at: Instant) {
        if state.wakeup_at.is_some_and(|wakeup_at| wakeup_at <= at) {
            return;
        }
        state.wakeup_at = Some(at);
        let admission: Weak<Self> = Arc::downgrade(self);
        tokio::spawn(async move {
            tokio::time::sleep_until(at).await;
            let Some(admission) = admission.upgrade() else { return };
            {
                let mut state = admission.lock();
                if state.wakeup_at.is_some_and(|wakeup_at| wakeup_at >= at) {
                    state.wakeup_at = None;
                }
            }
            admission.admit_waiting();
        });
    }
}

impl State {
    /// Returns when one more exchange may start.
    fn next(&mut self, now: Instant, max: usize) -> Next {
        if self.in_flight >= max {
            return Next::Later;
        }
        let counted = self.in_flight.saturating_sub(self.hanging(now));
        self.limit.next(now, counted)
    }

    /// Returns true if one more exchange of a batch leaves the places of online requests free.
    fn has_room_for_batches(&self, now: Instant, admission: &Inner) -> bool {
        let is_recent = |at: Instant| now.saturating_duration_since(at) < ONLINE_MEMORY;
        if !self.online_at.is_some_and(is_recent) {
            return true;
        }
        let limit = (self.limit.current() as usize).clamp(1, admission.max);
        let reserved = limit.saturating_mul(admission.online_percent).div_ceil(100);
        // Lines of batches have at least one place.
        let places = limit.saturating_sub(reserved).max(1);
        let hanging = self.hung(now).filter(|exchange| !exchange.is_online).count();
        let of_batches = self.in_flight.saturating_sub(self.online_in_flight);
        of_batches.saturating_sub(hanging) < places
    }

    /// Returns when batches may have room again if no exchange ends before.
    fn next_room_for_batches(&self, now: Instant) -> Option<Instant> {
        let held = self.held.peek().map(|Reverse((until, _))| *until);
        let forgotten = self.online_at.and_then(|at| at.checked_add(ONLINE_MEMORY));
        let times = [held, self.next_hang(now), forgotten];
        times.into_iter().flatten().filter(|at| *at > now).min()
    }

    /// Returns the end of the current pause if it is too long to wait for in memory.
    fn long_pause(&self, now: Instant) -> Option<Instant> {
        self.limit
            .closed_until(now)
            .filter(|until| until.saturating_duration_since(now) > MAX_QUEUE_WAIT)
    }

    /// Returns the time after which an exchange counts as hung.
    fn hang_time(&self) -> Duration {
        self.limit.usual_time().unwrap_or_default().saturating_mul(HANG_FACTOR).max(MIN_HANG_TIME)
    }

    /// Returns the hung exchanges.
    fn hung(&self, now: Instant) -> impl Iterator<Item = &InFlight> {
        let hang_time = self.hang_time();
        let is_old = move |exchange: &&InFlight| {
            now.saturating_duration_since(exchange.started_at) >= hang_time
        };
        self.started_at.values().take_while(is_old).filter(|exchange| exchange.may_hang)
    }

    /// Returns the number of hung exchanges.
    fn hanging(&self, now: Instant) -> usize {
        self.hung(now).count()
    }

    /// Returns when the next exchange counts as hung.
    fn next_hang(&self, now: Instant) -> Option<Instant> {
        let hang_time = self.hang_time();
        let running = self.started_at.values().filter(|exchange| exchange.may_hang);
        let mut times = running.filter_map(|exchange| exchange.started_at.checked_add(hang_time));
        times.find(|at| *at > now)
    }

    /// Returns when to check the queues again if no exchange ends before.
    fn next_wakeup(&self, next: Next, max: usize) -> Option<Instant> {
        match next {
            Next::Now => Some(Instant::now()),
            Next::At(at) => Some(at),
            Next::Later => {
                let held = self.held.peek().map(|Reverse((until, _))| *until);
                let next_hang = match self.in_flight < max {
                    true => self.next_hang(Instant::now()),
                    false => None,
                };
                held.into_iter().chain(next_hang).min()
            }
        }
    }

    /// Takes a permit for an exchange of a queue and its tokens, which the tenant's limit allows.
    fn grant(
        &mut self,
        admission: &Arc<Inner>,
        (queue, tokens): (&QueueId, u64),
        now: Instant,
    ) -> Permit {
        self.in_flight = self.in_flight.saturating_add(1);
        if queue.batch.is_none() {
            self.online_in_flight = self.online_in_flight.saturating_add(1);
        }
        self.last_number = self.last_number.wrapping_add(1);
        let number = self.last_number;
        let is_online = queue.batch.is_none();
        let exchange = InFlight { started_at: now, is_online, may_hang: true };
        self.started_at.insert(number, exchange);
        let began = self.limit.begin(now);
        self.shares.begin(queue, tokens);
        let queue = queue.clone();
        Permit {
            admission: Some(admission.clone()),
            queue,
            number,
            began,
            held: None,
            has_own_credential: false,
        }
    }

    /// Releases the held permits whose time has passed.
    fn release_expired_holds(&mut self, now: Instant) {
        while self.held.peek().is_some_and(|Reverse((until, _))| *until <= now) {
            if let Some(Reverse((_, queue))) = self.held.pop() {
                self.release(&queue);
            }
        }
    }

    /// Removes an exchange in flight and releases its permit.
    fn end_exchange(&mut self, queue: &QueueId, number: u64) {
        self.started_at.remove(&number);
        self.release(queue);
    }

    /// Releases one permit of a queue.
    fn release(&mut self, queue: &QueueId) {
        self.in_flight = self.in_flight.saturating_sub(1);
        if queue.batch.is_none() {
            self.online_in_flight = self.online_in_flight.saturating_sub(1);
        }
        self.shares.end(queue);
    }
}

impl Permit {
    /// Restarts the exchange's clock, when the request is actually sent.
    pub fn start(&mut self) {
        self.began.at = Instant::now();
    }

    /// Notes that the exchange has a credential of its tenant alone, so that its limits say nothing
    /// about those of other tenants.
    pub(crate) fn set_own_credential(&mut self, is_own: bool) {
        self.has_own_credential = is_own;
    }

    /// Notes that a stream has begun, which does not hang however long it lasts.
    pub fn begin_stream(&mut self) {
        let Some(admission) = &self.admission else { return };
        if let Some(exchange) = admission.lock().started_at.get_mut(&self.number) {
            exchange.may_hang = false;
        }
    }

    /// Records the outcome of the request; `refusals` belongs to that request.
    pub fn finish(&mut self, feedback: LimitFeedback, refusals: &mut Refusals) {
        let Some(admission) = &self.admission else { return };
        let now = Instant::now();
        let mut state = admission.lock();
        let feedback = match feedback {
            LimitFeedback::Refused(_) if self.has_own_credential => LimitFeedback::Unknown,
            LimitFeedback::Refused(asked) => {
                let alone = refusals.number >= 2 && state.accepted > refusals.accepted;
                *refusals = Refusals {
                    number: refusals.number.saturating_add(1),
                    accepted: state.accepted,
                };
                if alone { LimitFeedback::RefusedAlone } else { LimitFeedback::Refused(asked) }
            }
            LimitFeedback::Accepted => {
                state.accepted = state.accepted.wrapping_add(1);
                refusals.number = 0;
                feedback
            }
            LimitFeedback::RefusedAlone | LimitFeedback::Unknown => feedback,
        };
        let in_flight = state.in_flight;
        self.held = state.limit.ended(now, self.began, feedback, in_flight);
        if state.long_pause(now).is_some() {
            state.shares.clear_waiting();
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let Some(admission) = self.admission.take() else { return };
        {
            let mut state = admission.lock();
            match self.held.filter(|until| *until > Instant::now()) {
                Some(until) => {
                    state.started_at.remove(&self.number);
                    state.held.push(Reverse((until, self.queue.clone())));
                }
                None => state.end_exchange(&self.queue, self.number),
            }
        }
        admission.tenants.release(&self.queue.tenant);
        admission.admit_waiting();
    }
}

/// Position in a queue; dropping it leaves the queue, unless its number is zero.
struct Waiter<'a> {
    admission: &'a Arc<Inner>,
    queue: &'a QueueId,
    number: u64,
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        if self.number == 0 {
            return;
        }
        let number = self.number;
        self.admission.lock().shares.leave(self.queue, |waiting| waiting.0 == number);
    }
}

mod shares;

#[cfg(test)]
mod tests;
