//! Completion windows of batches: when a batch is urgent, and when it can wait.

use std::time::Duration;

use crate::clock::Timestamp;

/// A batch is urgent if at most one in this many parts of its window is left.
pub const URGENT_SHARE: u32 = 10;

/// Maximum rest of the window of an urgent batch.
pub const MAX_URGENT_REST: Duration = Duration::from_secs(3 * 3600);

/// Name of the window without an end.
pub const NO_WINDOW: &str = "none";

/// Urgency of a batch, most urgent first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Urgency {
    /// Little is left of the window.
    Urgent,
    /// The window has an end.
    #[default]
    Dated,
    /// The window has no end: the batch runs when nothing else waits.
    Undated,
}

impl Urgency {
    /// Returns the urgency of a batch.
    pub fn of(created_at: Timestamp, expires_at: Timestamp, now: Timestamp) -> Self {
        let (left, window) = (now.until(expires_at), created_at.until(expires_at));
        if expires_at == Timestamp::NEVER {
            Self::Undated
        } else if left <= MAX_URGENT_REST && left.saturating_mul(URGENT_SHARE) <= window {
            Self::Urgent
        } else {
            Self::Dated
        }
    }
}
