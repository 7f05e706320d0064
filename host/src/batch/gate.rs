//! A gate that is closed while results cannot be written: nothing is asked of a provider whose answer could not be kept.

use std::sync::Arc;

use tokio::sync::watch;

/// Open as long as nobody keeps it closed.
#[derive(Clone)]
pub struct Gate(Arc<watch::Sender<usize>>);

/// Keeps a gate closed until it is dropped.
pub struct Closed(Gate);

impl Default for Gate {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(0)))
    }
}

impl Gate {
    pub fn is_open(&self) -> bool {
        *self.0.borrow() == 0
    }

    /// Returns once it is open.
    pub async fn open(&self) {
        if !self.is_open() {
            // Its sender is here, so it does not end.
            self.0.subscribe().wait_for(|closed| *closed == 0).await.ok();
        }
    }

    pub fn close(&self) -> Closed {
        self.0.send_modify(|closed| *closed = closed.saturating_add(1));
        Closed(self.clone())
    }
}

impl Drop for Closed {
    fn drop(&mut self) {
        self.0.0.send_modify(|closed| *closed = closed.saturating_sub(1));
    }
}
