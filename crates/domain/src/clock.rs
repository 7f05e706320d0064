//! The one source of time. Nothing else in the host asks the system for it, so that a test can turn it.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::watch;

/// How long a sleeper goes without a look at the time.
const LOOK: Duration = Duration::from_secs(30);

/// A point in time, in milliseconds since 1970-01-01T00:00:00Z.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp(i64);

impl Timestamp {
    pub fn from_millis(millis: i64) -> Self {
        Self(millis)
    }

    pub fn as_millis(self) -> i64 {
        self.0
    }

    /// Whole seconds, as the API shows times.
    pub fn as_seconds(self) -> i64 {
        self.0.div_euclid(1000)
    }

    pub fn after(self, span: Duration) -> Self {
        Self(self.0.saturating_add(i64::try_from(span.as_millis()).unwrap_or(i64::MAX)))
    }

    pub fn before(self, span: Duration) -> Self {
        Self(self.0.saturating_sub(i64::try_from(span.as_millis()).unwrap_or(i64::MAX)))
    }

    /// How long it is from `self` until `later`; zero if that is past.
    pub fn until(self, later: Self) -> Duration {
        Duration::from_millis(u64::try_from(later.0.saturating_sub(self.0)).unwrap_or(0))
    }
}

/// The system's clock, ahead by as much as it was turned.
#[derive(Clone, Debug)]
pub struct Clock {
    begun: Instant,
    ahead: watch::Sender<Duration>,
}

impl Clock {
    pub fn system() -> Self {
        Self { begun: Instant::now(), ahead: watch::Sender::new(Duration::ZERO) }
    }

    pub fn now(&self) -> Timestamp {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let since = since.saturating_add(*self.ahead.borrow());
        Timestamp(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
    }

    /// Turns the clock forward; whoever sleeps past that point wakes.
    pub fn advance(&self, by: Duration) {
        self.ahead.send_modify(|ahead| *ahead = ahead.saturating_add(by));
    }

    /// How long this process has run, as its clock was turned: what the system's clock does to the time of day changes nothing here.
    fn elapsed(&self) -> Duration {
        self.begun.elapsed().saturating_add(*self.ahead.borrow())
    }

    pub async fn sleep(&self, span: Duration) {
        let end = self.elapsed().saturating_add(span);
        self.sleep_for(|| end.saturating_sub(self.elapsed())).await;
    }

    pub async fn sleep_until(&self, at: Timestamp) {
        self.sleep_for(|| self.now().until(at)).await;
    }

    async fn sleep_for(&self, left: impl Fn() -> Duration) {
        let mut turned = self.ahead.subscribe();
        loop {
            let left = left();
            if left.is_zero() {
                return;
            }
            tokio::select! {
                // The system's clock may be set, or may have slept, meanwhile.
                () = tokio::time::sleep(left.min(LOOK)) => {}
                _ = turned.changed() => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn turning_the_clock_wakes_who_sleeps() {
        let clock = Clock::system();
        let before = clock.now();
        let sleeper = tokio::spawn({
            let clock = clock.clone();
            async move { clock.sleep_until(before.after(Duration::from_secs(86_400))).await }
        });
        clock.advance(Duration::from_secs(86_400));
        sleeper.await.unwrap();
        assert!(before.until(clock.now()) >= Duration::from_secs(86_400));
    }
}
