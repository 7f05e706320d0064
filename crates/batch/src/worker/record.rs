//! Recorder: writes the results of requests to the store in groups.

use std::sync::Arc;

use batchwright_memory::Reservation;
use batchwright_plugin::Plugin;
use batchwright_store::{Claim, NewBatch, Result, ResultKind, ResultRow, StoreError};
use tokio::sync::mpsc;

use crate::metrics::{Counted, Outcome, Source};
use crate::request::served_by::served_by;
use crate::schedule::backoff::Backoff;
use crate::schedule::quotas::Hold;
use crate::worker::Worker;

/// Maximum number of results in one write. Further results wait in the channel.
pub(crate) const MAX_GROUP_ROWS: usize = 1024;

/// Maximum number of plugins kept in memory because the store already has their records.
const MAX_KNOWN_PLUGINS: usize = 64;

/// Delay that collects results into one write. A commit costs the same for one result as for many,
/// and no client waits for a single result.
const GROUP_DELAY: std::time::Duration = std::time::Duration::from_millis(10);

/// Result to be written.
pub(crate) struct Recorded {
    /// Result.
    pub row: ResultRow,
    /// Plugin that answered, or `None` if the host created the result.
    pub by: Option<Arc<Plugin>>,
    /// Memory reserved for the result.
    pub reservation: Option<Reservation>,
    /// What the request has reserved of the quota of its project.
    pub hold: Option<Hold>,
    /// Entry of the plugin file that names the model.
    pub listed: Option<Arc<str>>,
}

impl Recorded {
    /// Creates the result of a request that no plugin answered.
    pub(crate) fn of_host(row: ResultRow) -> Self {
        Self { row, by: None, reservation: None, hold: None, listed: None }
    }
}

impl Worker {
    /// Writes results in groups until the channel closes.
    ///
    /// A failed write is retried as long as the claim is valid, so that no answered request is sent
    /// again.
    pub(super) async fn record(
        &self,
        claim: &Claim,
        batch: &NewBatch,
        mut results: mpsc::Receiver<Recorded>,
    ) -> Result<()> {
        let mut group = Vec::new();
        let mut known: Vec<Arc<Plugin>> = Vec::new();
        while results.recv_many(&mut group, MAX_GROUP_ROWS).await > 0 {
            if group.len() < MAX_GROUP_ROWS && !results.is_closed() {
                tokio::time::sleep(GROUP_DELAY).await;
                while let Ok(more) = results.try_recv() {
                    group.push(more);
                }
            }
            let (mut rows, mut memory, mut new) = (Vec::new(), Vec::new(), Vec::new());
            let (mut holds, mut counted) = (Vec::new(), Vec::new());
            for Recorded { row, by, reservation, hold, listed } in group.drain(..) {
                counted.push((by.clone(), listed));
                // A request that no model answered gives its reservation back now.
                if let Some((hold, charge)) = hold.zip(row.charge.as_ref()) {
                    holds.push((hold, row.usage, charge.price));
                }
                rows.push(row);
                memory.push(reservation);
                // The list is short: one plugin for each model, and one more after each change.
                if let Some(by) = by.filter(|by| !known.iter().any(|known| Arc::ptr_eq(known, by)))
                {
                    new.push(served_by(&by));
                    known.push(by);
                }
            }
            if known.len() > MAX_KNOWN_PLUGINS {
                known.clear();
            }
            let rows = Arc::new(rows);
            let mut backoff = Backoff::default();
            let mut closed = None;
            loop {
                match self
                    .store
                    .insert_results(claim, rows.clone(), new.clone(), self.clock.now())
                    .await
                {
                    Ok(()) => break,
                    Err(error @ (StoreError::Fenced | StoreError::Closed)) => return Err(error),
                    // A process that shuts down does not wait for disk space.
                    Err(error) if self.closing.is_cancelled() => return Err(error),
                    Err(error) => {
                        // Backpressure: further results could not be written either.
                        closed.get_or_insert_with(|| self.gate.close(&error));
                        tracing::error!(
                            tenant = %claim.tenant,
                            batch = %claim.batch_id,
                            %error,
                            "result write failed, will be retried"
                        );
                        self.closing.run_until_cancelled(self.clock.sleep(backoff.pause())).await;
                    }
                }
            }
            drop(closed);
            drop(memory);
            for (hold, usage, price) in holds {
                hold.record(usage, price);
            }
            for (row, (by, listed)) in rows.iter().zip(counted) {
                let of = Counted {
                    source: Source::Batch,
                    tenant: &claim.tenant,
                    plugin: by.as_ref().map_or("", |by| by.name()),
                    model: listed.as_deref().unwrap_or_default(),
                    endpoint: batch.endpoint,
                };
                let outcome = match row.kind {
                    ResultKind::Completed => Outcome::Succeeded,
                    ResultKind::Failed => Outcome::Failed,
                };
                self.metrics.requests(of, outcome, 1);
                self.metrics.tokens(of, row.usage);
            }
            if self.clock.now() > batch.expires_at {
                self.metrics.overtaken(true, rows.len() as u64);
            }
        }
        Ok(())
    }
}
