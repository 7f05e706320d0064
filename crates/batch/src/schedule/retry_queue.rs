//! Retry queue of a batch: deferred lines.
//!
//! The queue holds the position, the due time and the retry state of each line. The text of a line
//! is read again from the input when the line is due.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use batchwright_domain::clock::Timestamp;
use batchwright_egress::Refusals;
use tokio::sync::Notify;

use crate::formats::input::Position;

/// Maximum number of deferred lines of a batch. Further lines wait in their tasks or in the input.
const MAX_LINES: usize = 1024;

/// Retry state of a line between its attempts.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RetryState {
    /// Attempts that ended with a transient error.
    pub answered: u32,
    /// Attempts that may have reached the provider but got no response.
    pub unanswered: u32,
    /// Total time of these attempts and of the pauses between them.
    pub spent: Duration,
    /// Refusals by the limits of the provider.
    pub refusals: Refusals,
    /// Number of successes of the breaker when the provider last refused the line.
    pub refused_at: Option<u64>,
    /// Failed attempts during an outage. Lines with fewer failed attempts go first.
    pub outage_failures: u32,
    /// True if the line waits for the end of an outage or for a limit, instead of a backoff.
    pub waits: bool,
    /// True if the provider works on a job of the line and the job state is in the store.
    pub has_job: bool,
    /// Time of the first attempt in this process.
    pub began: Option<Timestamp>,
}

/// Deferred line.
///
/// Entries are ordered by due time, then by failed attempts, then by line number.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    /// Due time.
    pub at: Timestamp,
    /// Line number, from 1.
    pub number: u64,
    /// Byte range of the line in the input file.
    pub range: Range<u64>,
    /// Retry state.
    pub retry_state: RetryState,
}

impl Entry {
    /// Returns the sort key.
    fn order(&self) -> (Timestamp, u32, u64) {
        (self.at, self.retry_state.outage_failures, self.number)
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

/// Retry queue of a batch.
#[derive(Default)]
pub(crate) struct RetryQueue {
    entries: Mutex<BinaryHeap<Reverse<Entry>>>,
    /// Notified when a line was added.
    added: Notify,
}

impl RetryQueue {
    fn lock(&self) -> MutexGuard<'_, BinaryHeap<Reverse<Entry>>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a line, or returns the line if the queue is full.
    pub(crate) fn add(&self, entry: Entry) -> Result<(), Entry> {
        let mut entries = self.lock();
        if entries.len() >= MAX_LINES {
            return Err(entry);
        }
        entries.push(Reverse(entry));
        drop(entries);
        self.added.notify_one();
        Ok(())
    }

    /// Removes and returns the next line that is due.
    ///
    /// A line that has failed during an outage is returned only if `include_failed` is true.
    pub(crate) fn due(&self, now: Timestamp, include_failed: bool) -> Option<Entry> {
        let mut entries = self.lock();
        let Reverse(first) = entries.peek()?;
        if first.at > now || (first.retry_state.outage_failures > 0 && !include_failed) {
            return None;
        }
        entries.pop().map(|Reverse(entry)| entry)
    }

    /// Makes all lines due that wait for the end of an outage or for a limit.
    pub(crate) fn wake(&self, now: Timestamp) {
        let mut entries = self.lock();
        let mut all = std::mem::take(&mut *entries).into_vec();
        for Reverse(entry) in all.iter_mut().filter(|Reverse(entry)| entry.retry_state.waits) {
            entry.at = entry.at.min(now);
        }
        *entries = all.into();
    }

    /// Returns the number of lines.
    pub(crate) fn len(&self) -> usize {
        self.lock().len()
    }

    /// Returns true if the line with this number is in the queue.
    pub(crate) fn contains(&self, number: u64) -> bool {
        self.lock().iter().any(|Reverse(entry)| entry.number == number)
    }

    /// Returns the due time of the next line.
    pub(crate) fn next(&self) -> Option<Timestamp> {
        self.lock().peek().map(|Reverse(entry)| entry.at)
    }

    /// Returns the first position of a line in the input.
    pub(crate) fn first(&self) -> Option<Position> {
        let entries = self.lock();
        let positions = entries.iter().map(|Reverse(entry)| Position {
            lines: entry.number.saturating_sub(1),
            bytes: entry.range.start,
        });
        positions.min()
    }

    /// Waits until a line is added.
    pub(crate) async fn added(&self) {
        self.added.notified().await;
    }
}
