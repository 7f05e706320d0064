//! Requests to stop the processing of a batch early.

use std::sync::OnceLock;

use tokio_util::sync::CancellationToken;

/// Reason to stop a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// A client cancelled the batch.
    Cancelled,
    /// The completion window has ended.
    Expired,
    /// The process shuts down. The next start continues the batch.
    Shutdown,
}

/// Stop request of a batch. The first reason given is kept.
#[derive(Default)]
pub(crate) struct Stop {
    reason: OnceLock<Reason>,
    token: CancellationToken,
    shutdown: CancellationToken,
}

impl Stop {
    /// Requests a stop for a reason.
    pub(crate) fn because(&self, reason: Reason) {
        if reason == Reason::Shutdown {
            self.shutdown.cancel();
        }
        self.reason.get_or_init(|| reason);
        self.token.cancel();
    }

    /// Returns the reason, or `None` if no stop has been requested.
    pub(crate) fn reason(&self) -> Option<Reason> {
        self.reason.get().copied()
    }

    /// Waits until the process shuts down, even if the stop had another reason before.
    pub(crate) async fn shutting_down(&self) {
        self.shutdown.cancelled().await;
    }

    /// Returns a child token that a stop cancels and that can also be cancelled separately.
    pub(crate) fn child(&self) -> CancellationToken {
        self.token.child_token()
    }

    /// Waits until a stop is requested.
    pub(crate) async fn asked(&self) {
        self.token.cancelled().await;
    }
}
