//! Single source of time. No other code in the host reads the system's time, so that a test can
//! advance the clock.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use chrono::{DateTime, Datelike, Months};
use tokio::sync::watch;

/// Length of a day.
const MILLIS_PER_DAY: i64 = 86_400_000;

/// Maximum time that a sleeping task goes without checking the clock.
const CLOCK_CHECK_INTERVAL: Duration = Duration::from_secs(30);

/// Point in time, in milliseconds since 1970-01-01T00:00:00Z.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp(i64);

impl Timestamp {
    /// Time that never comes.
    pub const NEVER: Self = Self(i64::MAX);

    /// Returns the timestamp `millis` milliseconds since 1970.
    pub const fn from_millis(millis: i64) -> Self {
        Self(millis)
    }

    /// Returns the milliseconds since 1970.
    pub const fn as_millis(self) -> i64 {
        self.0
    }

    /// Returns the whole seconds since 1970, as the API shows times.
    pub fn as_seconds(self) -> i64 {
        self.0.div_euclid(1000)
    }

    /// Returns the timestamp `span` later; saturates.
    pub fn after(self, span: Duration) -> Self {
        Self(self.0.saturating_add(i64::try_from(span.as_millis()).unwrap_or(i64::MAX)))
    }

    /// Returns the timestamp `span` earlier; saturates.
    pub fn before(self, span: Duration) -> Self {
        Self(self.0.saturating_sub(i64::try_from(span.as_millis()).unwrap_or(i64::MAX)))
    }

    /// Returns the beginning of the day, in UTC.
    pub fn start_of_day(self) -> Self {
        Self(self.0.saturating_sub(self.0.rem_euclid(MILLIS_PER_DAY)))
    }

    /// Returns the beginning of the next day, in UTC.
    pub fn next_day(self) -> Self {
        Self(self.start_of_day().0.saturating_add(MILLIS_PER_DAY))
    }

    /// Returns the number of the month since the year 0, in UTC.
    pub fn month(self) -> i64 {
        let date = DateTime::from_timestamp_millis(self.0).unwrap_or_default();
        i64::from(date.year()).saturating_mul(12).saturating_add(i64::from(date.month0()))
    }

    /// Returns the beginning of the next month, in UTC.
    pub fn next_month(self) -> Self {
        let first = DateTime::from_timestamp_millis(self.0)
            .and_then(|date| date.date_naive().with_day(1))
            .and_then(|first| first.checked_add_months(Months::new(1)))
            .and_then(|first| first.and_hms_opt(0, 0, 0));
        first.map_or(self.next_day(), |first| Self(first.and_utc().timestamp_millis()))
    }

    /// Returns the time from `self` until `later`; zero if `later` is not later.
    pub fn until(self, later: Self) -> Duration {
        Duration::from_millis(u64::try_from(later.0.saturating_sub(self.0)).unwrap_or(0))
    }
}

/// System clock, plus the time by which a test advanced it.
#[derive(Clone, Debug)]
pub struct Clock {
    started: Instant,
    ahead: watch::Sender<Duration>,
}

impl Clock {
    /// Returns the system clock.
    pub fn system() -> Self {
        Self { started: Instant::now(), ahead: watch::Sender::new(Duration::ZERO) }
    }

    /// Returns the current time.
    #[expect(clippy::disallowed_methods, reason = "the one place that reads the time of day")]
    pub fn now(&self) -> Timestamp {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let since = since.saturating_add(*self.ahead.borrow());
        Timestamp(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
    }

    /// Advances the clock by a span, and wakes sleeping tasks whose time has come.
    pub fn advance(&self, by: Duration) {
        self.ahead.send_modify(|ahead| *ahead = ahead.saturating_add(by));
    }

    /// Returns the monotonic time since the start, plus the advance; a change of the time of day
    /// does not affect it.
    fn elapsed(&self) -> Duration {
        self.started.elapsed().saturating_add(*self.ahead.borrow())
    }

    /// Sleeps for a span, by the monotonic clock.
    pub async fn sleep(&self, span: Duration) {
        let end = self.elapsed().saturating_add(span);
        self.sleep_for(|| end.saturating_sub(self.elapsed())).await;
    }

    /// Sleeps until a point in time, by the time of day.
    pub async fn sleep_until(&self, at: Timestamp) {
        self.sleep_for(|| self.now().until(at)).await;
    }

    async fn sleep_for(&self, left: impl Fn() -> Duration) {
        let mut advanced = self.ahead.subscribe();
        loop {
            let left = left();
            if left.is_zero() {
                return;
            }
            tokio::select! {
                // The time of day may be set, and the machine may be suspended, meanwhile.
                () = tokio::time::sleep(left.min(CLOCK_CHECK_INTERVAL)) => {}
                _ = advanced.changed() => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn advancing_the_clock_wakes_sleeping_tasks() {
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
