//! Why work on a batch ends early.

use std::sync::OnceLock;

use tokio_util::sync::CancellationToken;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    Cancelled,
    Expired,
    /// The process ends; the batch goes on at the next start.
    Shutdown,
}

/// A request to stop, and its reason: the first one given counts.
#[derive(Default)]
pub struct Stop {
    reason: OnceLock<Reason>,
    token: CancellationToken,
    shutdown: CancellationToken,
}

impl Stop {
    pub fn because(&self, reason: Reason) {
        if reason == Reason::Shutdown {
            self.shutdown.cancel();
        }
        self.reason.get_or_init(|| reason);
        self.token.cancel();
    }

    pub fn reason(&self) -> Option<Reason> {
        self.reason.get().copied()
    }

    /// The process ends, whatever else was asked before.
    pub async fn shutting_down(&self) {
        self.shutdown.cancelled().await;
    }

    /// A token that is cancelled when a stop is asked for; it can also be cancelled by itself.
    pub fn child(&self) -> CancellationToken {
        self.token.child_token()
    }

    pub async fn asked(&self) {
        self.token.cancelled().await;
    }
}
