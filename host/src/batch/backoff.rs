//! Pauses after failures that may pass.

use std::time::Duration;

const FIRST: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_secs(5);

/// Short at first, so that a failure which passes costs little; longer with each that follows, so that one which stays costs little too.
pub struct Backoff {
    next: Duration,
    pauses: u32,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { next: FIRST, pauses: 0 }
    }
}

impl Backoff {
    pub fn pause(&mut self) -> Duration {
        let pause = self.next;
        self.next = pause.saturating_mul(2).min(LONGEST);
        self.pauses = self.pauses.saturating_add(1);
        pause
    }

    /// Pauses so far.
    pub fn pauses(&self) -> u32 {
        self.pauses
    }
}
