//! Exponential backoff after transient failures.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use batchwright_store::{BatchKey, Claim};

/// First pause.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// Upper limit of a pause.
const MAX_PAUSE: Duration = Duration::from_secs(5);

/// Exponential backoff.
///
/// The first pauses are short, so that a transient failure costs little time. Each pause is twice
/// as long as the pause before, so that a permanent failure costs little load.
pub(crate) struct Backoff {
    next: Duration,
    pauses: u32,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { next: FIRST_PAUSE, pauses: 0 }
    }
}

impl Backoff {
    /// Returns the next pause and doubles the one after it, up to the limit.
    pub(crate) fn pause(&mut self) -> Duration {
        let pause = self.next;
        self.next = pause.saturating_mul(2).min(MAX_PAUSE);
        self.pauses = self.pauses.saturating_add(1);
        pause
    }

    /// Returns the number of pauses so far.
    pub(crate) fn pauses(&self) -> u32 {
        self.pauses
    }
}

/// Backoffs of batches whose processing failed.
#[derive(Default)]
pub(crate) struct Backoffs(Mutex<HashMap<BatchKey, Backoff>>);

impl Backoffs {
    fn lock(&self) -> MutexGuard<'_, HashMap<BatchKey, Backoff>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the next pause of a batch.
    pub(crate) fn pause(&self, claim: &Claim) -> Duration {
        self.lock().entry(claim.key.clone()).or_default().pause()
    }

    /// Returns the number of pauses of a batch since its last success.
    pub(crate) fn pauses(&self, claim: &Claim) -> u32 {
        self.lock().get(&claim.key).map_or(0, Backoff::pauses)
    }

    /// Resets the backoff of a batch after a success.
    pub(crate) fn reset(&self, claim: &Claim) {
        self.lock().remove(&claim.key);
    }
}
