//! How many exchanges of a plugin may be under way, and whose is next.
//!
//! How many: additive increase, multiplicative decrease. A 429 halves the number, at most once for those that were let out together; a
//! round of answers without one raises it by an eighth. At one at a time, a further 429 makes everybody pause, longer each time.
//!
//! Whose: a place that becomes free goes to the batch that has the fewest exchanges under way among those that wait, and within a batch to
//! the request that waits longest. So a batch of one line is not behind the thousands of lines of the others.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

/// The first pause, and the longest.
const PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Whose request it is: requests of one batch have the same number.
pub type Queue = u64;

pub struct Throttle(Arc<Inner>);

struct Inner {
    max: usize,
    state: Mutex<State>,
}

struct State {
    limit: usize,
    under_way: usize,
    /// Those that wait, and those that have something under way.
    queues: Vec<QueueState>,
    /// Counts the lowerings: an answer to what was let out before the last one says nothing new.
    lowered: u64,
    /// Good answers since the limit was changed.
    good: usize,
    pause: Duration,
    closed_until: Option<Instant>,
}

struct QueueState {
    name: Queue,
    under_way: usize,
    waiting: VecDeque<oneshot::Sender<Admitted>>,
}

/// The right to one exchange at a time.
pub struct Admitted {
    /// None once the place is given back.
    throttle: Option<Arc<Inner>>,
    queue: Queue,
    lowered: u64,
}

impl Throttle {
    pub fn new(max: usize) -> Self {
        let max = max.max(1);
        let state = State {
            limit: max,
            under_way: 0,
            queues: Vec::new(),
            lowered: 0,
            good: 0,
            pause: PAUSE,
            closed_until: None,
        };
        Self(Arc::new(Inner { max, state: Mutex::new(state) }))
    }

    pub async fn admit(&self, queue: Queue) -> Admitted {
        loop {
            let waiting = {
                let mut state = self.0.lock();
                if state.under_way < state.limit && state.queues.iter().all(|queue| queue.waiting.is_empty()) {
                    state.under_way = state.under_way.saturating_add(1);
                    let found = state.queue(queue);
                    found.under_way = found.under_way.saturating_add(1);
                    Err(Admitted { throttle: Some(self.0.clone()), queue, lowered: state.lowered })
                } else {
                    let (sender, granted) = oneshot::channel();
                    state.queue(queue).waiting.push_back(sender);
                    Ok(granted)
                }
            };
            let mut admitted = match waiting {
                Err(admitted) => admitted,
                // It is never given up without an answer.
                Ok(granted) => match granted.await {
                    Ok(admitted) => admitted,
                    Err(_) => continue,
                },
            };
            let closed_until = {
                let state = self.0.lock();
                admitted.lowered = state.lowered;
                state.closed_until
            };
            if let Some(until) = closed_until {
                tokio::time::sleep_until(until).await;
            }
            return admitted;
        }
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets out whoever is next, as far as there are places.
    fn let_out(self: &Arc<Self>) {
        loop {
            let (next, admitted) = {
                let mut state = self.lock();
                if state.under_way >= state.limit {
                    return;
                }
                let lowered = state.lowered;
                let waiting = state.queues.iter_mut().filter(|queue| !queue.waiting.is_empty());
                let Some(queue) = waiting.min_by_key(|queue| queue.under_way) else { return };
                let Some(next) = queue.waiting.pop_front() else { return };
                queue.under_way = queue.under_way.saturating_add(1);
                let admitted = Admitted { throttle: Some(self.clone()), queue: queue.name, lowered };
                state.under_way = state.under_way.saturating_add(1);
                (next, admitted)
            };
            // One that has gone gives its place back at once.
            if let Err(unused) = next.send(admitted) {
                unused.leave();
            }
        }
    }

    fn leave(&self, queue: Queue) {
        let mut state = self.lock();
        state.under_way = state.under_way.saturating_sub(1);
        let place = state.queues.iter().position(|found| found.name == queue);
        if let Some(place) = place
            && let Some(found) = state.queues.get_mut(place)
        {
            found.under_way = found.under_way.saturating_sub(1);
            if found.under_way == 0 && found.waiting.is_empty() {
                // The others keep their order: among equals the first has its turn.
                state.queues.remove(place);
            } else {
                // After its turn it is behind those that have as many under way.
                let found = state.queues.remove(place);
                state.queues.push(found);
            }
        }
    }
}

impl State {
    fn queue(&mut self, name: Queue) -> &mut QueueState {
        let place = self.queues.iter().position(|queue| queue.name == name).unwrap_or_else(|| {
            self.queues.push(QueueState { name, under_way: 0, waiting: VecDeque::new() });
            self.queues.len().saturating_sub(1)
        });
        #[expect(clippy::indexing_slicing, reason = "found, or pushed just now")]
        &mut self.queues[place]
    }
}

impl Admitted {
    /// Takes note of how the provider answered.
    pub fn answered(&self, status: u16) {
        let Some(throttle) = &self.throttle else { return };
        let mut state = throttle.lock();
        if self.lowered != state.lowered {
            return;
        }
        if status == 429 {
            state.lowered = state.lowered.wrapping_add(1);
            state.good = 0;
            if state.limit == 1 {
                state.closed_until = Instant::now().checked_add(state.pause);
                state.pause = state.pause.saturating_mul(2).min(LONGEST_PAUSE);
                return;
            }
            state.limit /= 2;
            let limit = state.limit;
            tracing::info!(limit, "the provider answers 429: fewer exchanges at a time");
        } else if (200..300).contains(&status) {
            state.pause = PAUSE;
            state.closed_until = None;
            state.good = state.good.saturating_add(1);
            if state.limit >= throttle.max || state.good < state.limit {
                return;
            }
            let more = (state.limit / 8).max(1).min(throttle.max.saturating_sub(state.limit));
            state.limit = state.limit.saturating_add(more);
            state.good = 0;
            drop(state);
            throttle.let_out();
        }
    }

    /// Gives the place back without letting anybody out.
    fn leave(mut self) {
        if let Some(throttle) = self.throttle.take() {
            throttle.leave(self.queue);
        }
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        if let Some(throttle) = self.throttle.take() {
            throttle.leave(self.queue);
            throttle.let_out();
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn let_out(throttle: &Throttle) -> Vec<Admitted> {
        std::iter::from_fn(|| throttle.admit(1).now_or_never()).collect()
    }

    // Outside of a runtime, which would have a task yield now and then.
    #[test]
    fn a_refusal_halves_and_good_answers_raise_again() {
        let throttle = Throttle::new(16);
        let first = let_out(&throttle);
        assert_eq!(first.len(), 16);
        // All sixteen are refused, which is one message and not sixteen.
        first.iter().for_each(|admitted| admitted.answered(429));
        drop(first);
        let second = let_out(&throttle);
        assert_eq!(second.len(), 8);
        second.iter().for_each(|admitted| admitted.answered(200));
        drop(second);
        assert_eq!(let_out(&throttle).len(), 9);
        // Lowered while most permits are out: those that come back are kept.
        let third = let_out(&throttle);
        third.first().unwrap().answered(429);
        drop(third);
        assert_eq!(let_out(&throttle).len(), 4);
        while throttle.0.lock().limit < 16 {
            let_out(&throttle).iter().for_each(|admitted| admitted.answered(200));
        }
        assert_eq!(let_out(&throttle).len(), 16);
    }

    #[tokio::test]
    async fn one_at_a_time_that_is_refused_makes_a_pause_that_grows_and_ends() {
        let throttle = Throttle::new(2);
        throttle.admit(1).await.answered(429);
        let pauses: Vec<_> = std::iter::repeat_with(|| {
            throttle.0.lock().closed_until = None;
            let admitted = throttle.admit(1).now_or_never().unwrap();
            let begun = Instant::now();
            admitted.answered(429);
            drop(admitted);
            assert!(throttle.admit(1).now_or_never().is_none());
            throttle.0.lock().closed_until.unwrap().duration_since(begun).as_secs_f64().round()
        })
        .take(8)
        .collect();
        assert_eq!(pauses, [1.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]);
        throttle.0.lock().closed_until = None;
        throttle.admit(1).await.answered(200);
        assert_eq!(let_out(&throttle).len(), 2);
    }

    #[tokio::test]
    async fn a_place_goes_to_the_batch_with_the_fewest_under_way() {
        let throttle = Throttle::new(4);
        let mut large = let_out(&throttle);
        assert_eq!(large.len(), 4);
        let mut waiting: Vec<_> = (0..100).map(|_| Box::pin(throttle.admit(1))).collect();
        for one in &mut waiting {
            assert!(one.now_or_never().is_none());
        }
        let mut small = Box::pin(throttle.admit(2));
        assert!((&mut small).now_or_never().is_none());
        large.pop();
        let small = small.await;
        assert!(waiting.iter_mut().all(|one| one.now_or_never().is_none()));
        drop(small);
        // Waiters that have gone leave their turn to others.
        drop(waiting);
        assert!(throttle.admit(3).now_or_never().is_some());
        large.clear();
        assert_eq!(throttle.0.lock().queues.len(), 0);
        assert_eq!(throttle.0.lock().under_way, 0);
    }
}
