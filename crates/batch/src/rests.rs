//! Resting batches: released to the store until a wake-up time, because none of their requests can
//! be sent before. This module also keeps the position from which each batch continues.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use batchwright_domain::clock::{Clock, Timestamp};
use batchwright_store::{BatchRecord, Claim, Release, Result, WaitsFor};

use super::Batches;
use super::deferred::Deferred;
use super::input::Position;
use super::lines::LinesToDo;

/// Maximum number of saved positions. Batches beyond this limit read their input from the start.
const MAX_POSITIONS: usize = 10_000;

/// Maximum number of saved deferred lines of all resting batches together. Batches beyond this
/// limit read these lines again and lose the count of their attempts.
const MAX_DEFERRED_LINES: usize = 65_536;

/// Wait while no rest has an end.
const IDLE_WAIT: std::time::Duration = std::time::Duration::from_secs(3600);

/// Saved state of resting batches. A batch without saved state reads its input from the start.
#[derive(Default)]
pub(crate) struct Rests {
    /// End of the earliest rest.
    next: Mutex<Option<Timestamp>>,
    kept: Mutex<HashMap<(String, String), Kept>>,
}

/// State from which a batch continues.
#[derive(Default)]
pub(crate) struct Kept {
    /// Position in the input. Each line before it has a result or is a deferred line.
    pub position: Position,
    /// Lines that are due for another attempt.
    pub deferred: Arc<Deferred>,
    /// Number of lines read so far. Lines from the position up to this number may be deferred
    /// lines.
    pub read_before: u64,
}

impl Rests {
    /// Waits until a rest ends.
    pub(crate) async fn next_end(&self, clock: &Clock) {
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

    /// Registers the end of a rest.
    fn until(&self, at: Timestamp) {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        *next = Some(next.map_or(at, |known| known.min(at)));
    }
}

fn key(claim: &Claim) -> (String, String) {
    (claim.tenant.clone(), claim.batch_id.clone())
}

impl Batches {
    /// Removes and returns the saved state of a claimed batch, or the start of the input.
    pub(super) fn kept(&self, claim: &Claim) -> Kept {
        self.rests
            .kept
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&key(claim))
            .unwrap_or_default()
    }

    /// Saves the state of a batch that has no requests in flight.
    ///
    /// If there is no room for the deferred lines, the position moves back to the first of them.
    pub(super) fn keep(&self, claim: &Claim, lines: &LinesToDo<'_>) {
        let mut kept = self.rests.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = kept.values().map(|kept| kept.deferred.len()).sum();
        let room = all.saturating_add(lines.deferred.len()) <= MAX_DEFERRED_LINES;
        let state = if room {
            lines.kept()
        } else {
            let first = lines.deferred.first();
            Kept {
                position: first.map_or(lines.position(), |first| first.min(lines.position())),
                ..Kept::default()
            }
        };
        if kept.len() < MAX_POSITIONS {
            kept.insert(key(claim), state);
        }
    }

    /// Removes the saved state of a batch that has ended.
    pub(super) fn forget(&self, claim: &Claim) {
        self.rests.kept.lock().unwrap_or_else(PoisonError::into_inner).remove(&key(claim));
    }

    /// Releases a batch to rest until a time.
    pub(super) async fn let_rest(
        &self,
        claim: &Claim,
        batch: &BatchRecord,
        until: Timestamp,
    ) -> Result<()> {
        let waits_for = self.waits_for(claim, batch, until);
        self.count_waiting(claim, &batch.new.endpoint).await?;
        self.store.release(claim, Release::Rest(until, waits_for)).await?;
        self.rests.until(until);
        self.work_available.notify_one();
        Ok(())
    }

    /// Reports the number of unfinished requests of a batch to its breakers as waiting.
    pub(super) async fn count_waiting(&self, claim: &Claim, endpoint: &str) -> Result<()> {
        let left = self.store.batch(&claim.tenant, &claim.batch_id).await?.map_or(0, |batch| {
            let counts = batch.counts;
            counts.total.saturating_sub(counts.completed).saturating_sub(counts.failed)
        });
        for breaker in self.outages.of_batch(claim, endpoint) {
            breaker.rests(&claim.batch_id, left);
        }
        Ok(())
    }

    /// Returns the cause of the wait of a batch, as text for the client.
    pub(super) fn waits_for(
        &self,
        claim: &Claim,
        batch: &BatchRecord,
        next: Timestamp,
    ) -> Option<WaitsFor> {
        let outages = self.outages.of_batch(claim, &batch.new.endpoint);
        let outage =
            outages.iter().filter_map(|breaker| breaker.outage()).min_by_key(|outage| outage.since);
        match outage {
            Some(outage) => Some(WaitsFor {
                cause: outage.trouble.message,
                since: outage.since,
                next: next.max(outage.next_probe),
            }),
            // No breaker is open, so the provider has asked for a delay.
            None => (self.clock.now() < next).then(|| WaitsFor {
                cause: "The provider asks to wait.".into(),
                since: self.clock.now(),
                next,
            }),
        }
    }
}
