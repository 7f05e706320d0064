//! Completion windows of batches: when a batch is urgent.

use std::time::Duration;

/// A batch is urgent if at most one in this many parts of its window is left.
pub const URGENT_SHARE: u32 = 10;

/// Maximum rest of the window of an urgent batch.
pub const MAX_URGENT_REST: Duration = Duration::from_secs(3 * 3600);

/// Returns true if little is left of a window.
pub fn is_urgent(left: Duration, window: Duration) -> bool {
    left <= MAX_URGENT_REST && left.saturating_mul(URGENT_SHARE) <= window
}
