//! How many exchanges of a plugin may be under way: as many as its limit says, and fewer while the provider answers that it is too many.
//!
//! Additive increase, multiplicative decrease: a 429 halves the number, at most once for those that were let out together; a
//! round of answers without one raises it by an eighth. At one at a time, a further 429 makes everybody pause, longer each time.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::Instant;

/// The first pause, and the longest.
const PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

pub struct Throttle {
    permits: Semaphore,
    most: usize,
    state: Mutex<State>,
}

struct State {
    limit: usize,
    /// Permits to be kept back when they are returned, since none were free when the limit was lowered.
    owed: usize,
    /// Counts the lowerings: an answer to what was let out before the last one says nothing new.
    lowered: u64,
    /// Good answers since the limit was changed.
    good: usize,
    pause: Duration,
    closed_until: Option<Instant>,
}

/// The right to one exchange.
pub struct Admitted<'a> {
    throttle: &'a Throttle,
    permit: Option<SemaphorePermit<'a>>,
    lowered: u64,
}

impl Throttle {
    pub fn new(most: usize) -> Self {
        let most = most.clamp(1, Semaphore::MAX_PERMITS);
        let state = State { limit: most, owed: 0, lowered: 0, good: 0, pause: PAUSE, closed_until: None };
        Self { permits: Semaphore::new(most), most, state: Mutex::new(state) }
    }

    pub async fn admit(&self) -> Admitted<'_> {
        // It never closes, so there is always a permit.
        let permit = self.permits.acquire().await.ok();
        let (lowered, closed_until) = {
            let state = self.lock();
            (state.lowered, state.closed_until)
        };
        if let Some(until) = closed_until {
            tokio::time::sleep_until(until).await;
        }
        Admitted { throttle: self, permit, lowered }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Admitted<'_> {
    /// Takes note of how the provider answered.
    pub fn answered(&self, status: u16) {
        let throttle = self.throttle;
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
            let limit = state.limit / 2;
            let fewer = state.limit.saturating_sub(limit);
            state.owed = state.owed.saturating_add(fewer.saturating_sub(throttle.permits.forget_permits(fewer)));
            state.limit = limit;
            tracing::info!(limit, "the provider answers 429: fewer exchanges at a time");
        } else if (200..300).contains(&status) {
            state.pause = PAUSE;
            state.closed_until = None;
            state.good = state.good.saturating_add(1);
            if state.limit >= throttle.most || state.good < state.limit {
                return;
            }
            let more = (state.limit / 8).max(1).min(throttle.most.saturating_sub(state.limit));
            let paid = more.min(state.owed);
            state.owed = state.owed.saturating_sub(paid);
            throttle.permits.add_permits(more.saturating_sub(paid));
            state.limit = state.limit.saturating_add(more);
            state.good = 0;
        }
    }
}

impl Drop for Admitted<'_> {
    fn drop(&mut self) {
        let mut state = self.throttle.lock();
        if state.owed > 0
            && let Some(permit) = self.permit.take()
        {
            state.owed = state.owed.saturating_sub(1);
            permit.forget();
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn let_out(throttle: &Throttle) -> Vec<Admitted<'_>> {
        std::iter::from_fn(|| throttle.admit().now_or_never()).collect()
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
        while throttle.lock().limit < 16 {
            let_out(&throttle).iter().for_each(|admitted| admitted.answered(200));
        }
        assert_eq!(let_out(&throttle).len(), 16);
    }

    #[tokio::test]
    async fn one_at_a_time_that_is_refused_makes_a_pause_that_grows_and_ends() {
        let throttle = Throttle::new(2);
        throttle.admit().await.answered(429);
        let pauses: Vec<_> = std::iter::repeat_with(|| {
            throttle.lock().closed_until = None;
            let admitted = throttle.admit().now_or_never().unwrap();
            let begun = Instant::now();
            admitted.answered(429);
            drop(admitted);
            assert!(throttle.admit().now_or_never().is_none());
            throttle.lock().closed_until.unwrap().duration_since(begun).as_secs_f64().round()
        })
        .take(8)
        .collect();
        assert_eq!(pauses, [1.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]);
        throttle.lock().closed_until = None;
        throttle.admit().await.answered(200);
        assert_eq!(let_out(&throttle).len(), 2);
    }
}
