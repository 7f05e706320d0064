//! Whose exchange is next, within the limit that [`limit`](super::limit) finds.
//!
//! A place that becomes free goes to the batch that has the fewest exchanges under way among those that wait, and within a batch to the
//! request that waits longest. So a batch of one line is not behind the thousands of lines of the others.
//!
//! An exchange that takes much longer than others counts against the operator's bound, and no more against the limit that was found: one
//! that hangs must not be the only one.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::limit::{Began, Limit, Next, Taken};

/// Whose request it is: requests of one batch have the same number.
pub type Queue = u64;

/// After how many times the usual time an exchange does not count against the limit any more, and the least of it.
const HANGS: u32 = 8;
const LEAST_HANG: Duration = Duration::from_secs(5);

/// A wait for the provider's own time that nobody waits here for.
const LONG: Duration = Duration::from_secs(5);

pub struct Throttle(Arc<Inner>);

struct Inner {
    /// The operator's bound.
    max: usize,
    state: Mutex<State>,
}

struct State {
    limit: Limit,
    under_way: usize,
    /// Those that wait, and those that have something under way.
    queues: Vec<QueueState>,
    next_waiter: u64,
    /// When each exchange under way was let out; the oldest first.
    since: BTreeMap<u64, Instant>,
    /// Places that stay taken for a while though their exchange was refused.
    held: BinaryHeap<Reverse<(Instant, Queue)>>,
    /// Accepted so far.
    accepted: u64,
    /// When the next look is due.
    armed: Option<Instant>,
}

struct QueueState {
    name: Queue,
    under_way: usize,
    waiting: VecDeque<(u64, oneshot::Sender<Admitted>)>,
}

/// The right to one exchange at a time.
pub struct Admitted {
    /// None once the place is given back.
    throttle: Option<Arc<Inner>>,
    queue: Queue,
    number: u64,
    began: Began,
    /// How long its place stays taken when it is given back.
    held: Option<Instant>,
}

/// How a request was refused before.
#[derive(Clone, Copy, Debug, Default)]
pub struct Refusals {
    /// In a row.
    pub number: u32,
    /// What had been accepted of all requests when it was refused last.
    accepted: u64,
}

impl Throttle {
    pub fn new(max: usize) -> Self {
        let max = max.max(1);
        let state = State {
            limit: Limit::new(max),
            under_way: 0,
            queues: Vec::new(),
            next_waiter: 0,
            since: BTreeMap::new(),
            held: BinaryHeap::new(),
            accepted: 0,
            armed: None,
        };
        Self(Arc::new(Inner { max, state: Mutex::new(state) }))
    }

    /// Waits until one more exchange may begin. An error is the time until which the provider asks to wait, if that is long: nobody waits
    /// for it here.
    pub async fn admit(&self, queue: Queue) -> Result<Admitted, Instant> {
        loop {
            let (number, granted) = {
                let mut state = self.0.lock();
                let now = Instant::now();
                state.give_back_held(now);
                let nobody = state.queues.iter().all(|queue| queue.waiting.is_empty());
                let next = if nobody { state.next(now, self.0.max) } else { Next::Later };
                if next == Next::Now {
                    return Ok(state.let_out(&self.0, queue, now));
                }
                if let Some(until) = state.closed_for_long(now) {
                    return Err(until);
                }
                state.next_waiter = state.next_waiter.wrapping_add(1);
                let number = state.next_waiter;
                let (sender, granted) = oneshot::channel();
                state.queue(queue).waiting.push_back((number, sender));
                if let Some(at) = state.look_at(next, self.0.max) {
                    self.0.arm(&mut state, at);
                }
                (number, granted)
            };
            let mut waiting = Waiting { throttle: &self.0, queue, number };
            let admitted = granted.await;
            waiting.number = 0;
            // Without an answer there is something to look at again.
            if let Ok(admitted) = admitted {
                return Ok(admitted);
            }
        }
    }

    /// Takes note of what the provider says is left, as an answer to this exchange.
    pub fn told(&self, admitted: &Admitted, remaining: u64, reset: Duration) {
        let mut state = self.0.lock();
        let Some(until) = Instant::now().checked_add(reset) else { return };
        state.limit.told(remaining, until, admitted.began);
    }

    /// How many exchanges at a time are thought right.
    pub fn limit(&self) -> f64 {
        self.0.lock().limit.current()
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets out whoever is next, as far as there are places.
    fn let_out(self: &Arc<Self>) {
        loop {
            let (waiter, admitted) = {
                let mut state = self.lock();
                let now = Instant::now();
                state.give_back_held(now);
                if state.queues.iter().all(|queue| queue.waiting.is_empty()) {
                    return;
                }
                let next = state.next(now, self.max);
                if next != Next::Now {
                    if let Some(at) = state.look_at(next, self.max) {
                        self.arm(&mut state, at);
                    }
                    return;
                }
                let waiting = state.queues.iter_mut().filter(|queue| !queue.waiting.is_empty());
                let Some(queue) = waiting.min_by_key(|queue| queue.under_way) else { return };
                let (name, Some((_, waiter))) = (queue.name, queue.waiting.pop_front()) else {
                    return;
                };
                let admitted = state.let_out(self, name, now);
                (waiter, admitted)
            };
            // One that has gone gives its place back at once.
            if let Err(mut unused) = waiter.send(admitted)
                && let Some(throttle) = unused.throttle.take()
            {
                throttle.lock().leave(unused.queue, unused.number);
            }
        }
    }

    /// Has a look at this time, unless there is one before.
    fn arm(self: &Arc<Self>, state: &mut State, at: Instant) {
        if state.armed.is_some_and(|armed| armed <= at) {
            return;
        }
        state.armed = Some(at);
        let throttle: Weak<Self> = Arc::downgrade(self);
        tokio::spawn(async move {
            tokio::time::sleep_until(at).await;
            let Some(throttle) = throttle.upgrade() else { return };
            {
                let mut state = throttle.lock();
                if state.armed.is_some_and(|armed| armed >= at) {
                    state.armed = None;
                }
            }
            throttle.let_out();
        });
    }
}

impl State {
    /// When one more may be let out.
    fn next(&mut self, now: Instant, max: usize) -> Next {
        if self.under_way >= max {
            return Next::Later;
        }
        let counted = self.under_way.saturating_sub(self.hanging(now));
        self.limit.next(now, counted)
    }

    /// Until when nothing is let out, if that is too long to wait with a line in memory.
    fn closed_for_long(&self, now: Instant) -> Option<Instant> {
        self.limit.closed_until(now).filter(|until| until.saturating_duration_since(now) > LONG)
    }

    fn hang(&self) -> Duration {
        self.limit.usual_time().unwrap_or_default().saturating_mul(HANGS).max(LEAST_HANG)
    }

    /// Exchanges that take much longer than usual.
    fn hanging(&self, now: Instant) -> usize {
        let hang = self.hang();
        self.since
            .values()
            .take_while(|since| now.saturating_duration_since(**since) >= hang)
            .count()
    }

    /// When to look again whether somebody can be let out, if no exchange ends before.
    fn look_at(&self, next: Next, max: usize) -> Option<Instant> {
        match next {
            Next::Now => Some(Instant::now()),
            Next::At(at) => Some(at),
            Next::Later => {
                let held = self.held.peek().map(|Reverse((until, _))| *until);
                let hang = self.hang();
                // The oldest that does not hang yet.
                let now = Instant::now();
                let mut hangs = self
                    .since
                    .values()
                    .filter_map(|since| since.checked_add(hang))
                    .filter(|at| *at > now);
                let hangs = if self.under_way < max { hangs.next() } else { None };
                held.into_iter().chain(hangs).min()
            }
        }
    }

    fn let_out(&mut self, throttle: &Arc<Inner>, queue: Queue, now: Instant) -> Admitted {
        self.under_way = self.under_way.saturating_add(1);
        self.next_waiter = self.next_waiter.wrapping_add(1);
        let number = self.next_waiter;
        self.since.insert(number, now);
        let began = self.limit.begin(now);
        let found = self.queue(queue);
        found.under_way = found.under_way.saturating_add(1);
        Admitted { throttle: Some(throttle.clone()), queue, number, began, held: None }
    }

    fn queue(&mut self, name: Queue) -> &mut QueueState {
        let place = self.queues.iter().position(|queue| queue.name == name).unwrap_or_else(|| {
            self.queues.push(QueueState { name, under_way: 0, waiting: VecDeque::new() });
            self.queues.len().saturating_sub(1)
        });
        #[expect(clippy::indexing_slicing, reason = "found, or pushed just now")]
        &mut self.queues[place]
    }

    /// Gives back the places that were held until now.
    fn give_back_held(&mut self, now: Instant) {
        while let Some(Reverse((until, queue))) = self.held.peek().copied()
            && until <= now
        {
            self.held.pop();
            self.free(queue);
        }
    }

    /// An exchange has ended.
    fn leave(&mut self, queue: Queue, number: u64) {
        self.since.remove(&number);
        self.free(queue);
    }

    fn free(&mut self, queue: Queue) {
        self.under_way = self.under_way.saturating_sub(1);
        let place = self.queues.iter().position(|found| found.name == queue);
        if let Some(place) = place
            && let Some(found) = self.queues.get_mut(place)
        {
            found.under_way = found.under_way.saturating_sub(1);
            // After its turn it is behind those that have as many under way; the others keep their order.
            let found = self.queues.remove(place);
            if found.under_way > 0 || !found.waiting.is_empty() {
                self.queues.push(found);
            }
        }
    }
}

impl Admitted {
    /// The exchange begins only now.
    pub fn begins(&mut self) {
        self.began.at = Instant::now();
    }

    /// Takes note of how the provider took the request. `refusals` is of the request.
    pub fn ended(&mut self, taken: Taken, refusals: &mut Refusals) {
        let Some(throttle) = &self.throttle else { return };
        let now = Instant::now();
        let mut state = throttle.lock();
        let taken = match taken {
            Taken::Refused(asked) => {
                let alone = refusals.number >= 2 && state.accepted > refusals.accepted;
                *refusals = Refusals {
                    number: refusals.number.saturating_add(1),
                    accepted: state.accepted,
                };
                if alone { Taken::RefusedAlone } else { Taken::Refused(asked) }
            }
            Taken::Accepted => {
                state.accepted = state.accepted.wrapping_add(1);
                refusals.number = 0;
                taken
            }
            Taken::RefusedAlone | Taken::Unknown => taken,
        };
        let under_way = state.under_way;
        self.held = state.limit.ended(now, self.began, taken, under_way);
        if state.closed_for_long(now).is_some() {
            for queue in &mut state.queues {
                queue.waiting.clear();
            }
        }
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        let Some(throttle) = self.throttle.take() else { return };
        {
            let mut state = throttle.lock();
            match self.held.filter(|until| *until > Instant::now()) {
                Some(until) => {
                    state.since.remove(&self.number);
                    state.held.push(Reverse((until, self.queue)));
                }
                None => state.leave(self.queue, self.number),
            }
        }
        throttle.let_out();
    }
}

/// A place in a queue, given up when it is dropped.
struct Waiting<'a> {
    throttle: &'a Arc<Inner>,
    queue: Queue,
    number: u64,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if self.number == 0 {
            return;
        }
        let mut state = self.throttle.lock();
        if let Some(place) = state.queues.iter().position(|queue| queue.name == self.queue)
            && let Some(queue) = state.queues.get_mut(place)
        {
            queue.waiting.retain(|(number, _)| *number != self.number);
            if queue.waiting.is_empty() && queue.under_way == 0 {
                state.queues.remove(place);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn all(throttle: &Throttle) -> Vec<Admitted> {
        std::iter::from_fn(|| throttle.admit(1).now_or_never()?.ok()).collect()
    }

    fn answer(mut admitted: Admitted, taken: Taken) {
        admitted.ended(taken, &mut Refusals::default());
    }

    /// A throttle that has seen enough good answers to let out as many as it may.
    fn open(max: usize) -> Throttle {
        let throttle = Throttle::new(max);
        for _ in 0..max {
            all(&throttle).into_iter().for_each(|admitted| answer(admitted, Taken::Accepted));
        }
        throttle
    }

    #[tokio::test]
    async fn a_place_goes_to_the_batch_with_the_fewest_under_way() {
        let throttle = open(4);
        let mut large = all(&throttle);
        assert_eq!(large.len(), 4);
        let mut waiting: Vec<_> = (0..100).map(|_| Box::pin(throttle.admit(1))).collect();
        for one in &mut waiting {
            assert!(one.now_or_never().is_none());
        }
        let mut small = Box::pin(throttle.admit(2));
        assert!((&mut small).now_or_never().is_none());
        large.pop();
        let small = small.await.unwrap();
        assert!(waiting.iter_mut().all(|one| one.now_or_never().is_none()));
        drop(small);
        // Those that have gone leave nothing behind.
        drop(waiting);
        assert_eq!(
            throttle.0.lock().queues.iter().map(|queue| queue.waiting.len()).sum::<usize>(),
            0
        );
        assert!(throttle.admit(3).now_or_never().is_some());
        large.clear();
        assert_eq!(throttle.0.lock().queues.len(), 0);
        assert_eq!(throttle.0.lock().under_way, 0);
        assert_eq!(throttle.0.lock().since.len(), 0);
    }

    #[tokio::test]
    async fn an_exchange_that_hangs_does_not_keep_others_from_a_lowered_limit() {
        let throttle = open(8);
        let began = Instant::now();
        // Everything is refused until one at a time is left.
        while throttle.limit() > 1.0 {
            let mut state = throttle.0.lock();
            let exchange = state.limit.begin(began);
            state.limit.ended(began, exchange, Taken::Refused(None), 1);
        }
        let later = Instant::now().checked_add(LEAST_HANG * 2).unwrap();
        let hanging = throttle.admit(1).await.unwrap();
        {
            let mut state = throttle.0.lock();
            let soon = Instant::now().checked_add(LEAST_HANG / 2).unwrap();
            assert_eq!(state.next(soon, 8), Next::Later);
            assert!(
                state.look_at(Next::Later, 8).is_some_and(|at| at < later),
                "nobody looks again"
            );
            assert_eq!(state.next(later, 8), Next::Now);
            // The operator's own bound stands.
            assert_eq!(state.next(later, 1), Next::Later);
        }
        drop(hanging);
    }

    #[tokio::test]
    async fn what_the_provider_says_is_left_is_kept_to() {
        let throttle = open(8);
        let first = throttle.admit(1).await.unwrap();
        throttle.told(&first, 2, Duration::from_millis(400));
        drop(first);
        let begun = Instant::now();
        for _ in 0..2 {
            answer(throttle.admit(1).now_or_never().unwrap().unwrap(), Taken::Accepted);
        }
        answer(throttle.admit(1).await.unwrap(), Taken::Accepted);
        assert!(begun.elapsed() >= Duration::from_millis(300));
    }

    #[tokio::test]
    async fn nobody_waits_here_for_a_time_that_is_long() {
        let throttle = open(4);
        let mut waiting = Box::pin(throttle.admit(2));
        let mut under_way = all(&throttle);
        assert!((&mut waiting).now_or_never().is_none());
        for admitted in &mut under_way {
            admitted
                .ended(Taken::Refused(Some(Duration::from_secs(3600))), &mut Refusals::default());
        }
        let until = waiting.await.err().unwrap();
        let left = until.saturating_duration_since(Instant::now());
        assert!(left > LONG && left <= Duration::from_secs(60), "{left:?}");
        assert!(throttle.admit(3).await.is_err());
    }

    #[tokio::test]
    async fn a_request_that_is_refused_while_others_pass_delays_nobody() {
        let throttle = open(8);
        let mut refusals = Refusals::default();
        for _ in 0..100 {
            answer(throttle.admit(1).await.unwrap(), Taken::Accepted);
            let mut alone = throttle.admit(1).await.unwrap();
            alone.ended(Taken::Refused(Some(Duration::from_secs(60))), &mut refusals);
            drop(alone);
        }
        assert_eq!(throttle.0.lock().limit.closed_until(Instant::now()), None);
        assert!(throttle.limit() >= 8.0, "{}", throttle.limit());
    }
}
