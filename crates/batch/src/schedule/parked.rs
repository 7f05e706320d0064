//! Parked batches: released to the store until a wake-up time, because none of their requests can
//! be sent before. This module also keeps the position from which each batch continues.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use batchwright_domain::clock::{Clock, Timestamp};
use batchwright_store::{BatchKey, Claim};

use crate::formats::input::Position;
use crate::schedule::retry_queue::RetryQueue;

/// Maximum number of saved positions. Batches beyond this limit read their input from the start.
const MAX_POSITIONS: usize = 10_000;

/// Maximum number of saved deferred lines of all parked batches together. Batches beyond this
/// limit read these lines again and lose the count of their attempts.
const MAX_DEFERRED_LINES: usize = 65_536;

/// Wait while no batch is parked.
const IDLE_WAIT: std::time::Duration = std::time::Duration::from_secs(3600);

/// Saved state of parked batches. A batch without saved state reads its input from the start.
#[derive(Default)]
pub(crate) struct Parked {
    /// Earliest wake-up time.
    next: Mutex<Option<Timestamp>>,
    kept: Mutex<HashMap<BatchKey, Checkpoint>>,
}

/// State from which a batch continues.
#[derive(Default)]
pub(crate) struct Checkpoint {
    /// Position in the input. Each line before it has a result or is a deferred line.
    pub position: Position,
    /// Lines that are due for another attempt.
    pub deferred: Arc<RetryQueue>,
    /// Number of lines read so far. Lines from the position up to this number may be deferred
    /// lines.
    pub read_before: u64,
}

impl Parked {
    /// Waits until a wake-up time.
    pub(crate) async fn next_wake_up(&self, clock: &Clock) {
        let next = *self.next.lock().unwrap_or_else(PoisonError::into_inner);
        match next {
            Some(at) => clock.sleep_until(at).await,
            None => clock.sleep(IDLE_WAIT).await,
        }
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        if next.is_some_and(|at| at <= clock.now()) {
            *next = None;
        }
    }

    /// Registers a wake-up time.
    pub(crate) fn wake_at(&self, at: Timestamp) {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        *next = Some(next.map_or(at, |known| known.min(at)));
    }

    /// Removes and returns the saved state of a claimed batch, or the start of the input.
    pub(crate) fn take(&self, claim: &Claim) -> Checkpoint {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.remove(&claim.key).unwrap_or_default()
    }

    /// Saves the state of a batch that has no requests in flight.
    ///
    /// If there is no room for the deferred lines, the position moves back to the first of them.
    pub(crate) fn save(&self, claim: &Claim, state: Checkpoint) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = kept.values().map(|kept| kept.deferred.len()).sum();
        let has_room = all.saturating_add(state.deferred.len()) <= MAX_DEFERRED_LINES;
        let state = if has_room {
            state
        } else {
            let first = state.deferred.first();
            Checkpoint {
                position: first.map_or(state.position, |first| first.min(state.position)),
                ..Checkpoint::default()
            }
        };
        if kept.len() < MAX_POSITIONS {
            kept.insert(claim.key.clone(), state);
        }
    }

    /// Removes the saved state of a batch that has ended.
    pub(crate) fn forget(&self, claim: &Claim) {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).remove(&claim.key);
    }
}
