//! Results on their way from requests to the store.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::Batches;
use super::backoff::Backoff;
use super::served_by::served_by;
use crate::memory::Share;
use crate::plugin::Plugin;
use crate::store::{Claim, Result, ResultRow, StoreError};

/// Results written in one go at most; more of them wait in the channel.
pub const GROUP: usize = 1024;

/// Plugins that have answered and are known to the store: held on to, so at most so many.
const KNOWN: usize = 64;

/// How long results are gathered before they are written. A commit costs the same for one as for many, and nobody waits for a single one.
const GATHER: std::time::Duration = std::time::Duration::from_millis(10);

/// A result on its way to the store, with who gave it and the memory that it takes.
pub type Recorded = (ResultRow, By, Option<Share>);

/// The plugin that answered, if one did.
type By = Option<Arc<Plugin>>;

impl Batches {
    /// Writes results as they come, as many at a time as are there. A write that fails is tried again for as long as the batch is ours:
    /// what was answered is not asked twice.
    pub(super) async fn record(
        &self,
        claim: &Claim,
        mut results: mpsc::Receiver<Recorded>,
    ) -> Result<()> {
        let mut group = Vec::new();
        let mut known: Vec<Arc<Plugin>> = Vec::new();
        while results.recv_many(&mut group, GROUP).await > 0 {
            if group.len() < GROUP && !results.is_closed() {
                tokio::time::sleep(GATHER).await;
                while let Ok(more) = results.try_recv() {
                    group.push(more);
                }
            }
            let (mut rows, mut memory, mut new) = (Vec::new(), Vec::new(), Vec::new());
            for (row, by, share) in group.drain(..) {
                rows.push(row);
                memory.push(share);
                // There are few: one for each model, and one more whenever the operator changes it.
                if let Some(by) = by.filter(|by| !known.iter().any(|known| Arc::ptr_eq(known, by)))
                {
                    new.push(served_by(&by));
                    known.push(by);
                }
            }
            if known.len() > KNOWN {
                known.clear();
            }
            let rows = Arc::new(rows);
            let mut backoff = Backoff::default();
            let mut closed = None;
            loop {
                match self.store.record(claim, rows.clone(), new.clone()).await {
                    Ok(()) => break,
                    Err(error @ (StoreError::Fenced | StoreError::Closed)) => return Err(error),
                    // A process that must end does not wait for room on the disk.
                    Err(error) if self.closing.is_cancelled() => return Err(error),
                    Err(error) => {
                        // Nothing is asked for whose answer could not be kept either.
                        closed.get_or_insert_with(|| self.gate.close());
                        tracing::error!(
                            batch = claim.batch_id,
                            "results wait to be written: {error}"
                        );
                        self.closing.run_until_cancelled(self.clock.sleep(backoff.pause())).await;
                    }
                }
            }
            drop(closed);
            drop(memory);
        }
        Ok(())
    }
}
