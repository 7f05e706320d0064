//! Who works on what: claims batches, the oldest first, and takes each through its life.

use std::panic::AssertUnwindSafe;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use tokio_util::task::AbortOnDropHandle;

use super::Batches;
use super::lanes::{Lanes, Place};
use super::patience::Patience;
use super::stop::{Reason, Stop};
use super::validate::Verdict;
use crate::store::{BatchRecord, Claim, Result, Status, StoreError};

/// How long a claim holds without being renewed, and how often it is renewed.
const LEASE: Duration = Duration::from_secs(30);
const RENEWAL: Duration = Duration::from_secs(10);

/// How often work is looked for without a hint: a lease or a rest may have ended.
const LOOK: Duration = Duration::from_secs(5);

impl Batches {
    /// Claims and runs batches until the server closes.
    pub(super) async fn schedule(self: Arc<Self>) {
        // Before anything of the same name can be written.
        if let Err(error) = self.remove_abandoned().await {
            tracing::warn!("what a former process left half done stays for now: {error}");
        }
        let lanes = Lanes::new(self.settings.max_concurrent_batches.get(), self.work.clone());
        let mut patience = Patience::default();
        while !self.closing.is_cancelled() {
            let now = self.clock.now();
            let claimed = self.store.claim(now, now.after(LEASE), lanes.full()).await;
            match claimed {
                Ok(Some(claim)) => {
                    // Places are taken here alone, so there is one still.
                    let place = lanes.enter(claim.lane.clone());
                    let batches = self.clone();
                    self.tasks.spawn(async move { batches.run(claim, place).await });
                }
                Ok(None) => {
                    let hint = async {
                        tokio::select! {
                            () = self.work.notified() => {}
                            () = self.clock.sleep(LOOK) => {}
                        }
                    };
                    self.closing.run_until_cancelled(hint).await;
                }
                Err(error) => {
                    tracing::error!("no batch can be claimed: {error}");
                    self.closing.run_until_cancelled(self.clock.sleep(patience.pause())).await;
                    continue;
                }
            }
            patience = Patience::default();
        }
    }

    async fn run(self: &Arc<Self>, claim: Claim, place: Option<Place>) {
        let key = (claim.tenant.clone(), claim.batch_id.clone());
        let stop = Arc::new(Stop::default());
        self.running.lock().unwrap_or_else(PoisonError::into_inner).insert(key.clone(), stop.clone());
        if self.closing.is_cancelled() {
            stop.because(Reason::Shutdown);
        }
        let _renewal = AbortOnDropHandle::new(tokio::spawn(self.clone().keep(claim.clone())));
        let lived = AssertUnwindSafe(self.live(&claim, &stop)).catch_unwind().await;
        // A batch that is given back to go on in another lane may have been taken up anew already.
        {
            let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
            if running.get(&key).is_some_and(|current| Arc::ptr_eq(current, &stop)) {
                running.remove(&key);
            }
        }
        drop(place);
        let lived = lived.unwrap_or_else(|_| Err(StoreError::Database("the work on it panicked".into())));
        let batch = claim.batch_id.as_str();
        match lived {
            Err(StoreError::Fenced) => tracing::warn!(batch, "another worker has taken over the batch"),
            Err(error) => {
                tracing::error!(batch, "the batch rests and goes on later: {error}");
                return self.rest(&claim, key).await;
            }
            Ok(()) => {}
        }
        self.resting.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
    }

    /// Gives a batch back that could not go on, after a while. As long as it is not given back nobody takes it up.
    async fn rest(&self, claim: &Claim, key: (String, String)) {
        let pause = self.resting.lock().unwrap_or_else(PoisonError::into_inner).entry(key).or_default().pause();
        self.closing.run_until_cancelled(self.clock.sleep(pause)).await;
        let mut patience = Patience::default();
        while let Err(error) = self.store.release(claim).await {
            if matches!(error, StoreError::Fenced | StoreError::Closed) || self.closing.is_cancelled() {
                return;
            }
            self.closing.run_until_cancelled(self.clock.sleep(patience.pause())).await;
        }
        self.work.notify_one();
    }

    /// Renews a claim for as long as it is worked on.
    async fn keep(self: Arc<Self>, claim: Claim) {
        loop {
            self.clock.sleep(RENEWAL).await;
            if let Err(error) = self.store.renew(&claim, self.clock.now().after(LEASE)).await {
                tracing::warn!(batch = claim.batch_id, "the claim was not renewed: {error}");
            }
        }
    }

    /// Takes a batch from wherever it is to its end, or to where it was told to stop.
    async fn live(&self, claim: &Claim, stop: &Arc<Stop>) -> Result<()> {
        let Some(batch) = self.store.batch(&claim.tenant, &claim.batch_id).await? else { return Ok(()) };
        tracing::info!(batch = claim.batch_id, tenant = claim.tenant, status = batch.status.as_str(), "batch taken up");
        let expires_at = batch.new.expires_at;
        let expiry = async {
            self.clock.sleep_until(expires_at).await;
            stop.because(Reason::Expired);
            std::future::pending::<()>().await;
        };
        let living = async {
            if batch.status == Status::Cancelling {
                stop.because(Reason::Cancelled);
            } else if self.clock.now() >= expires_at {
                stop.because(Reason::Expired);
            }
            if batch.times.in_progress_at.is_none() {
                return self.begin(claim, &batch, stop).await;
            }
            let stopped = match batch.status {
                // Finalizing was begun before, with every result there is; if some lines have none, the batch had expired.
                Status::Finalizing => Some(Reason::Expired),
                _ => self.execute(claim, &batch, stop).await?,
            };
            let whole = self.is_whole(claim).await?;
            match stopped {
                Some(Reason::Shutdown) => self.store.release(claim).await,
                // In time after all.
                Some(Reason::Expired) if whole => self.finalize_in_time(claim, &batch, None).await,
                None if !whole => Err(StoreError::Incomplete),
                stopped => self.finalize_in_time(claim, &batch, stopped).await,
            }
        };
        let lived = tokio::select! {
            lived = living => lived,
            () = expiry => Ok(()),
        };
        if lived.is_ok()
            && let Some(ended) = self.store.batch(&claim.tenant, &claim.batch_id).await?
        {
            let counts = ended.counts;
            tracing::info!(
                batch = claim.batch_id,
                status = ended.status.as_str(),
                total = counts.total,
                completed = counts.completed,
                failed = counts.failed,
                "batch left"
            );
        }
        lived
    }

    /// Whether every line of a batch has its result.
    async fn is_whole(&self, claim: &Claim) -> Result<bool> {
        let batch = self.store.batch(&claim.tenant, &claim.batch_id).await?;
        Ok(batch.is_none_or(|batch| batch.counts.is_whole()))
    }

    /// Finalizes a batch, unless the process ends and it takes too long: it can be repeated.
    async fn finalize_in_time(&self, claim: &Claim, batch: &BatchRecord, stopped: Option<Reason>) -> Result<()> {
        let too_late = async {
            self.closing.cancelled().await;
            self.clock.sleep(self.settings.shutdown_grace.duration()).await;
        };
        tokio::select! {
            finalized = self.finalize(claim, batch, stopped) => finalized,
            () = too_late => self.store.release(claim).await,
        }
    }

    /// Validates a batch. If it is good it goes on when its turn comes, in the lane of its provider.
    async fn begin(&self, claim: &Claim, batch: &BatchRecord, stop: &Stop) -> Result<()> {
        // A batch that is cancelled or has expired is validated all the same: only then is it known which lines to tell of.
        let verdict = tokio::select! {
            biased;
            () = stop.shutting_down() => return self.store.release(claim).await,
            verdict = self.validate(claim, batch) => verdict?,
        };
        match verdict {
            Verdict::Good(found) => self.store.start_execution(claim, found, self.clock.now()).await,
            Verdict::Bad(errors, judged_by) => self.store.fail(claim, errors, judged_by, self.clock.now()).await,
        }
    }
}
