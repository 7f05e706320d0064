//! Batches that rest, as nothing of theirs can be sent for a while; and where each begins when it goes on.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::Batches;
use super::deferred::Deferred;
use super::input::Position;
use super::lines::LinesToDo;
use crate::clock::{Clock, Timestamp};
use crate::store::{BatchRecord, Claim, Release, Result, WaitsFor};

/// Batches whose position is remembered. The input of others is read from the start.
const POSITIONS: usize = 10_000;

/// Lines of batches that rest which are remembered with what became of them, of all together. Those of others are read anew.
const DEFERRED: usize = 65_536;

/// A longest wait, where there is none to wait for.
const NEVER: std::time::Duration = std::time::Duration::from_secs(3600);

/// What is remembered of batches that nobody works on.
#[derive(Default)]
pub struct Rests {
    /// When the first rest ends.
    next: Mutex<Option<Timestamp>>,
    kept: Mutex<HashMap<(String, String), Kept>>,
}

/// Where a batch goes on.
#[derive(Default)]
pub struct Kept {
    /// Where the input is to be read from: every line before has a result, or is among the deferred ones.
    pub position: Position,
    pub deferred: Arc<Deferred>,
    /// Lines that were read so far: those from the position on may be among the deferred ones.
    pub read_before: u64,
}

impl Rests {
    /// Returns when a rest ends.
    pub async fn next_end(&self, clock: &Clock) {
        let next = *self.next.lock().unwrap_or_else(PoisonError::into_inner);
        match next {
            Some(at) => clock.sleep_until(at).await,
            None => clock.sleep(NEVER).await,
        }
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        if next.is_some_and(|at| at <= clock.now()) {
            *next = None;
        }
    }

    fn until(&self, at: Timestamp) {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        *next = Some(next.map_or(at, |known| known.min(at)));
    }
}

fn key(claim: &Claim) -> (String, String) {
    (claim.tenant.clone(), claim.batch_id.clone())
}

impl Batches {
    /// Where to begin with a batch that is taken up.
    pub(super) fn kept(&self, claim: &Claim) -> Kept {
        self.rests
            .kept
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&key(claim))
            .unwrap_or_default()
    }

    /// Remembers where to begin, as nothing is under way.
    pub(super) fn keep(&self, claim: &Claim, lines: &LinesToDo<'_>) {
        let mut kept = self.rests.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = kept.values().map(|kept| kept.deferred.len()).sum();
        let room = all.saturating_add(lines.deferred.len()) <= DEFERRED;
        let here = if room {
            lines.kept()
        } else {
            let first = lines.deferred.first();
            Kept {
                position: first.map_or(lines.position(), |first| first.min(lines.position())),
                ..Kept::default()
            }
        };
        if kept.len() < POSITIONS {
            kept.insert(key(claim), here);
        }
    }

    /// Forgets where a batch would have gone on, as it has ended.
    pub(super) fn forget(&self, claim: &Claim) {
        self.rests.kept.lock().unwrap_or_else(PoisonError::into_inner).remove(&key(claim));
    }

    /// Gives a batch back until then.
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
        self.work.notify_one();
        Ok(())
    }

    /// Counts a batch's requests among those that wait for their providers.
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

    /// What a batch waits for now, in the client's words.
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
            // Nothing is wrong, but the provider has asked to wait.
            None => (self.clock.now() < next).then(|| WaitsFor {
                cause: "The provider asks to wait.".into(),
                since: self.clock.now(),
                next,
            }),
        }
    }
}
