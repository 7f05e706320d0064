//! Backpressure from the store: no request is sent to a provider while results cannot be written.
//!
//! A result that cannot be stored would be lost with the process, and the request would be sent and
//! paid for again.

use std::sync::Arc;

use batchwright_store::StoreError;
use tokio::sync::watch;

/// Gate that is open while no [`GateGuard`] exists.
#[derive(Clone, Default)]
pub(crate) struct Gate(Arc<watch::Sender<State>>);

#[derive(Default)]
struct State {
    /// Number of guards.
    guards: usize,
    /// Why the latest guard was made.
    cause: Cause,
}

/// Guard that keeps a gate closed until the guard is dropped.
pub(crate) struct GateGuard(Gate);

/// Why a gate is closed.
#[derive(Clone, Copy, Default)]
pub(crate) enum Cause {
    /// The disk is full.
    Full,
    /// Writes fail for another reason.
    #[default]
    Failing,
}

impl Gate {
    /// Returns true if no guard keeps the gate closed.
    pub(crate) fn is_open(&self) -> bool {
        self.0.borrow().guards == 0
    }

    /// Returns why the gate is closed; none if it is open.
    pub(crate) fn cause(&self) -> Option<Cause> {
        let state = self.0.borrow();
        (state.guards > 0).then_some(state.cause)
    }

    /// Waits until the gate is open.
    pub(crate) async fn open(&self) {
        if !self.is_open() {
            // `self` holds the sender, so the channel cannot close.
            self.0.subscribe().wait_for(|state| state.guards == 0).await.ok();
        }
    }

    /// Closes the gate, because of an error, until the returned guard is dropped.
    pub(crate) fn close(&self, error: &StoreError) -> GateGuard {
        self.0.send_modify(|state| {
            state.guards = state.guards.saturating_add(1);
            state.cause = match error {
                StoreError::Full(_) => Cause::Full,
                _ => Cause::Failing,
            };
        });
        GateGuard(self.clone())
    }
}

impl Drop for GateGuard {
    fn drop(&mut self) {
        self.0.0.send_modify(|state| state.guards = state.guards.saturating_sub(1));
    }
}
