//! The memory that lines and results under way may take, over all batches.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// A share of a pool, given back when it is dropped.
pub type Share = Option<OwnedSemaphorePermit>;

/// Three pools. Lines in flight are held for as long as a provider thinks, so validation and results, which always move on, must not wait
/// for them.
pub struct Memory {
    /// Lines in flight: half of the budget.
    pub lines: Pool,
    /// Results on their way to the store: a quarter.
    pub results: Pool,
    /// Pieces being validated: a quarter.
    pub validation: Pool,
}

impl Memory {
    pub fn new(budget: usize) -> Self {
        Self { lines: Pool::new(budget / 2), results: Pool::new(budget / 4), validation: Pool::new(budget / 4) }
    }
}

#[derive(Clone)]
pub struct Pool {
    permits: Arc<Semaphore>,
    whole: u32,
}

impl Pool {
    fn new(bytes: usize) -> Self {
        let whole = kib(bytes).max(1);
        Self { permits: Arc::new(Semaphore::new(whole as usize)), whole }
    }

    /// Waits for room. What is larger than the pool takes the whole of it.
    pub async fn take(&self, bytes: usize) -> Share {
        // It never closes, so there is always a share.
        self.permits.clone().acquire_many_owned(kib(bytes).min(self.whole)).await.ok()
    }
}

/// Pools count in KiB, which fits a semaphore's range whatever the setting.
fn kib(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX).min(u32::MAX >> 4)
}
