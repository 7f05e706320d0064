//! Requests that a provider works on by itself, and that it is asked about: what the adapter has to know for that outlives the process.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::plugin::Plugin;
use crate::store::{Claim, Job, Result, Store};

/// How soon a state is written again that the store did not take.
const AGAIN: Duration = Duration::from_secs(1);

/// The jobs of a batch.
pub struct Jobs {
    store: Arc<dyn Store>,
    claim: Claim,
    /// Whether a former process left some: each request is looked up then.
    left: bool,
}

impl Jobs {
    pub async fn of_batch(store: &Arc<dyn Store>, claim: &Claim) -> Result<Self> {
        let left = store.has_jobs(claim).await?;
        Ok(Self { store: store.clone(), claim: claim.clone(), left })
    }

    /// The state of a request's job, if it has one that this plugin began. A later version of the plugin gets it too.
    pub async fn of(&self, line: u64, plugin: &Plugin, known: bool) -> Result<Option<Vec<u8>>> {
        if !self.left && !known {
            return Ok(None);
        }
        let job = self.store.job(&self.claim, line).await?;
        Ok(job.filter(|job| job.plugin == plugin.name).map(|job| job.state))
    }

    /// Keeps a state; whether the store took it. If not, the job is lost with the process.
    pub async fn keep(&self, line: u64, plugin: &Plugin, state: &[u8]) -> bool {
        let job = Job { plugin: plugin.name.clone(), state: state.to_vec() };
        let kept = self.store.keep_job(&self.claim, line, job).await;
        if let Err(error) = &kept {
            tracing::warn!(
                batch = self.claim.batch_id,
                line,
                "the state of a job is not kept: {error}"
            );
        }
        kept.is_ok()
    }

    /// Keeps a state for as long as it takes, or until the batch is to be left: a job that is not known any more would be paid for twice.
    pub async fn insist(
        &self,
        line: u64,
        plugin: &Plugin,
        state: &[u8],
        clock: &Clock,
        leave: &CancellationToken,
    ) {
        while !self.keep(line, plugin, state).await {
            if leave.run_until_cancelled(clock.sleep(AGAIN)).await.is_none() {
                return;
            }
        }
    }

    /// Forgets a job, as its request begins anew.
    pub async fn forget(&self, line: u64) {
        if let Err(error) = self.store.drop_job(&self.claim, line).await {
            tracing::warn!(batch = self.claim.batch_id, line, "the state of a job stays: {error}");
        }
    }
}
