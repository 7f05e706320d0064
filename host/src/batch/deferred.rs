//! Lines that are to be tried again: where each stands in the input, when, and what became of it before. The line itself is read again.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use super::input::Position;
use crate::clock::Timestamp;
use crate::egress::Refusals;

/// Lines that a batch remembers so. Further ones wait where they are.
const MOST: usize = 1024;

/// What is remembered of a request between its attempts.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tries {
    /// Attempts that were answered with what may pass.
    pub answered: u32,
    /// Attempts that may have reached the provider, and had no answer.
    pub unanswered: u32,
    /// Time that these attempts and the pauses between them took.
    pub spent: Duration,
    /// How often the provider's limits refused it.
    pub refusals: Refusals,
    /// What had passed when its credential was refused.
    pub refused_at: Option<u64>,
    /// How often it was tried in vain during an outage: those that were not go first.
    pub in_vain: u32,
    /// It waits for an outage to end, and not for a time of its own.
    pub waits: bool,
    /// The provider works on it; the state of that is in the store.
    pub has_job: bool,
}

/// A line that is to be tried again.
#[derive(Clone, Debug)]
pub struct Entry {
    pub at: Timestamp,
    pub number: u64,
    pub range: Range<u64>,
    pub tries: Tries,
}

impl Entry {
    fn order(&self) -> (Timestamp, u32, u64) {
        (self.at, self.tries.in_vain, self.number)
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.order() == other.order()
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.order().cmp(&other.order())
    }
}

#[derive(Default)]
pub struct Deferred {
    entries: Mutex<BinaryHeap<Reverse<Entry>>>,
    added: Notify,
}

impl Deferred {
    fn lock(&self) -> MutexGuard<'_, BinaryHeap<Reverse<Entry>>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a line, if there is room.
    pub fn add(&self, entry: Entry) -> Result<(), Entry> {
        let mut entries = self.lock();
        if entries.len() >= MOST {
            return Err(entry);
        }
        entries.push(Reverse(entry));
        drop(entries);
        self.added.notify_one();
        Ok(())
    }

    /// The next line that is due; one that was tried in vain only if that is asked for.
    pub fn due(&self, now: Timestamp, in_vain: bool) -> Option<Entry> {
        let mut entries = self.lock();
        let Reverse(first) = entries.peek()?;
        if first.at > now || (first.tries.in_vain > 0 && !in_vain) {
            return None;
        }
        entries.pop().map(|Reverse(entry)| entry)
    }

    /// Has those that wait for an outage to end be due now.
    pub fn wake(&self, now: Timestamp) {
        let mut entries = self.lock();
        let mut all = std::mem::take(&mut *entries).into_vec();
        for Reverse(entry) in all.iter_mut().filter(|Reverse(entry)| entry.tries.waits) {
            entry.at = entry.at.min(now);
        }
        *entries = all.into();
    }

    pub fn len(&self) -> usize {
        self.lock().len()
    }

    pub fn contains(&self, number: u64) -> bool {
        self.lock().iter().any(|Reverse(entry)| entry.number == number)
    }

    /// When the next one is due.
    pub fn next(&self) -> Option<Timestamp> {
        self.lock().peek().map(|Reverse(entry)| entry.at)
    }

    /// Where the first of them stands.
    pub fn first(&self) -> Option<Position> {
        let entries = self.lock();
        let positions = entries.iter().map(|Reverse(entry)| Position {
            lines: entry.number.saturating_sub(1),
            bytes: entry.range.start,
        });
        positions.min()
    }

    /// Returns when one was added.
    pub async fn added(&self) {
        self.added.notified().await;
    }
}
