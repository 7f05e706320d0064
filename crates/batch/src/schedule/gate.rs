//! Backpressure from the store: no request is sent to a provider while results cannot be written.
//!
//! A result that cannot be stored would be lost with the process, and the request would be sent and
//! paid for again.

use std::sync::Arc;

use tokio::sync::watch;

/// Gate that is open while no [`GateGuard`] guard exists.
#[derive(Clone)]
pub(crate) struct Gate(Arc<watch::Sender<usize>>);

/// Guard that keeps a gate closed until the guard is dropped.
pub(crate) struct GateGuard(Gate);

impl Default for Gate {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(0)))
    }
}

impl Gate {
    /// Returns true if no guard keeps the gate closed.
    pub(crate) fn is_open(&self) -> bool {
        *self.0.borrow() == 0
    }

    /// Waits until the gate is open.
    pub(crate) async fn open(&self) {
        if !self.is_open() {
            // `self` holds the sender, so the channel cannot close.
            self.0.subscribe().wait_for(|closed| *closed == 0).await.ok();
        }
    }

    /// Closes the gate until the returned guard is dropped.
    pub(crate) fn close(&self) -> GateGuard {
        self.0.send_modify(|closed| *closed = closed.saturating_add(1));
        GateGuard(self.clone())
    }
}

impl Drop for GateGuard {
    fn drop(&mut self) {
        self.0.0.send_modify(|closed| *closed = closed.saturating_sub(1));
    }
}
