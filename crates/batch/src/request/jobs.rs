//! Jobs: requests that a provider processes asynchronously and that the adapter polls.
//!
//! The polling state of a job is stored, so that the adapter can continue to poll after a restart.

use std::sync::Arc;
use std::time::Duration;

use batchwright_domain::clock::Clock;
use batchwright_plugin::Plugin;
use batchwright_store::{Claim, Job, Result, Store};
use tokio_util::sync::CancellationToken;

/// Interval between attempts to write a job state after the store has failed.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// Jobs of a batch.
pub(crate) struct Jobs {
    store: Arc<dyn Store>,
    claim: Claim,
    /// True if a previous process left jobs, in which case every request is looked up.
    has_stored_jobs: bool,
}

impl Jobs {
    /// Loads the job information of a batch.
    pub(crate) async fn of_batch(store: &Arc<dyn Store>, claim: &Claim) -> Result<Self> {
        let has_stored_jobs = store.has_jobs(claim).await?;
        Ok(Self { store: store.clone(), claim: claim.clone(), has_stored_jobs })
    }

    /// Returns true if a previous process or an earlier turn left jobs.
    pub(crate) fn has_stored(&self) -> bool {
        self.has_stored_jobs
    }

    /// Returns the job state of a request, or `None` if this plugin has not started a job for it.
    ///
    /// A later version of the plugin gets the state of an earlier version. `known` is true if the
    /// caller knows that a job exists.
    pub(crate) async fn of(
        &self,
        line: u64,
        plugin: &Plugin,
        known: bool,
    ) -> Result<Option<Vec<u8>>> {
        if !self.has_stored_jobs && !known {
            return Ok(None);
        }
        let job = self.store.job(&self.claim, line).await?;
        Ok(job.filter(|job| job.plugin == plugin.name()).map(|job| job.state))
    }

    /// Stores a job state and returns true if the write succeeded.
    ///
    /// After a failed write the job is lost if the process ends.
    pub(crate) async fn keep(&self, line: u64, plugin: &Plugin, state: &[u8]) -> bool {
        let job = Job { plugin: plugin.name().to_owned(), state: state.to_vec() };
        let kept = self.store.save_job(&self.claim, line, job).await;
        if let Err(error) = &kept {
            tracing::warn!(
                tenant = %self.claim.tenant,
                batch = %self.claim.batch_id,
                line,
                plugin = plugin.name(),
                %error,
                "job state write failed"
            );
        }
        kept.is_ok()
    }

    /// Retries [`Self::keep`] until the write succeeds or `leave` is cancelled.
    ///
    /// A job whose state is lost would be started and paid for twice.
    pub(crate) async fn insist(
        &self,
        line: u64,
        plugin: &Plugin,
        state: &[u8],
        clock: &Clock,
        leave: &CancellationToken,
    ) {
        while !self.keep(line, plugin, state).await {
            if leave.run_until_cancelled(clock.sleep(RETRY_INTERVAL)).await.is_none() {
                return;
            }
        }
    }

    /// Deletes the job state of a request that starts again from the beginning.
    pub(crate) async fn forget(&self, line: u64) {
        if let Err(error) = self.store.delete_job(&self.claim, line).await {
            tracing::warn!(
                tenant = %self.claim.tenant,
                batch = %self.claim.batch_id,
                line,
                %error,
                "job state delete failed"
            );
        }
    }
}
