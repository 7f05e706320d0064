//! Scheduler: claims batches in the order of their turns and processes each one to its end.

use std::panic::AssertUnwindSafe;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use batchwright_domain::error_code::ErrorCode;
use batchwright_store::{BatchError, BatchRecord, Claim, Release, Result, Status, StoreError};
use futures_util::FutureExt;
use tokio_util::task::AbortOnDropHandle;

use super::backoff::Backoff;
use super::execute::Executed;
use super::finalize::End;
use super::lanes::{Lanes, Next, Place};
use super::stop::{Reason, Stop};
use super::validate::Verdict;
use super::{Batches, Running};

/// Duration of a lease without renewal.
const LEASE_DURATION: Duration = Duration::from_secs(30);

/// Interval between renewals of a lease.
const RENEWAL_INTERVAL: Duration = Duration::from_secs(10);

/// Consecutive failures after which a cancelled or expired batch ends without its unreadable data.
const MAX_CONSECUTIVE_FAILURES: u32 = 20;

/// Poll interval for batches whose lease or rest has ended, which sends no notification.
const POLL_INTERVAL: Duration = Duration::from_secs(5);

impl Batches {
    /// Claims and runs batches until the server closes.
    pub(super) async fn schedule(self: Arc<Self>) {
        // Must run before this process can write an object with the same name.
        if let Err(error) = self.remove_abandoned().await {
            tracing::warn!(%error, "abandoned object cleanup failed");
        }
        let max_executing = self.settings.execution.max_executing_batches.get();
        let lanes = Lanes::new(
            self.settings.execution.max_concurrent_batches.get(),
            max_executing,
            self.work_available.clone(),
        );
        let mut backoff = Backoff::default();
        while !self.closing.is_cancelled() {
            match self.claim_next(&lanes).await {
                Ok(true) => {}
                Ok(false) => {
                    let hint = async {
                        tokio::select! {
                            () = self.work_available.notified() => {}
                            () = self.clock.sleep(POLL_INTERVAL) => {}
                            () = self.rests.next_end(&self.clock) => {}
                        }
                    };
                    self.closing.run_until_cancelled(hint).await;
                }
                Err(error) => {
                    tracing::error!(%error, "batch claim failed");
                    self.closing.run_until_cancelled(self.clock.sleep(backoff.pause())).await;
                    continue;
                }
            }
            backoff = Backoff::default();
        }
    }

    /// Gives the next batch its turn and returns false if no batch can run now.
    async fn claim_next(self: &Arc<Self>, lanes: &Arc<Lanes>) -> Result<bool> {
        let now = self.clock.now();
        let waiting = self.store.waiting(now).await?;
        let index = match lanes.next(&waiting) {
            Next::Nothing => return Ok(false),
            Next::Returned => return Ok(true),
            Next::Claim(index) => index,
        };
        let Some(waiting) = waiting.get(index) else { return Ok(false) };
        if let Some(claim) = self.store.claim(waiting, now, now.after(LEASE_DURATION)).await? {
            // Only this task takes places, so the place is still free.
            let place = lanes.take(&claim.lane);
            let (batches, lanes) = (self.clone(), lanes.clone());
            self.tasks.spawn(async move { batches.run(claim, &lanes, place).await });
        }
        Ok(true)
    }

    /// Processes a claimed batch and handles its failure.
    async fn run(self: &Arc<Self>, claim: Claim, lanes: &Arc<Lanes>, place: Place) {
        let key = (claim.tenant.clone(), claim.batch_id.clone());
        let stop = Arc::new(Stop::default());
        self.running
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(key.clone(), Running { stop: stop.clone(), claim: claim.clone() });
        if self.closing.is_cancelled() {
            stop.because(Reason::Shutdown);
        }
        let _renewal = AbortOnDropHandle::new(tokio::spawn(self.clone().renew(claim.clone())));
        let outcome =
            AssertUnwindSafe(self.process(&claim, &stop, lanes, place)).catch_unwind().await;
        // A batch that was released to another lane may have been claimed again already.
        {
            let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
            if running.get(&key).is_some_and(|current| Arc::ptr_eq(&current.stop, &stop)) {
                running.remove(&key);
            }
        }
        let outcome = outcome
            .unwrap_or_else(|_| Err(StoreError::Database("batch processing panicked".into())));
        let (tenant, batch) = (claim.tenant.as_str(), claim.batch_id.as_str());
        match outcome {
            Err(StoreError::Fenced) => {
                tracing::warn!(tenant, batch, "batch claimed by another worker")
            }
            Err(error) => {
                tracing::error!(tenant, batch, %error, "batch processing failed, will be retried");
                return self.release_after_backoff(&claim, key).await;
            }
            Ok(()) => {}
        }
        self.backoffs.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
    }

    /// Wakes all resting batches whenever an outage ends or plugins change.
    pub(super) async fn watch_changes(self: Arc<Self>) {
        let (mut plugins, mut outages) = (self.registry.changes(), self.outages.changes());
        loop {
            tokio::select! {
                _ = plugins.changed() => {
                    self.outages.plugins_changed(&self.registry.current());
                    self.outages.tell();
                }
                _ = outages.changed() => {
                    if let Err(error) = self.store.wake(self.clock.now()).await {
                        tracing::warn!(%error, "wake of resting batches failed");
                    }
                    self.work_available.notify_one();
                }
                () = self.closing.cancelled() => return,
            }
        }
    }

    /// Releases a failed batch after a backoff.
    ///
    /// The claim is held during the backoff, so that no other worker claims the batch.
    async fn release_after_backoff(&self, claim: &Claim, key: (String, String)) {
        let pause = self
            .backoffs
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(key)
            .or_default()
            .pause();
        self.closing.run_until_cancelled(self.clock.sleep(pause)).await;
        let mut backoff = Backoff::default();
        while let Err(error) = self.store.release(claim, Release::AsItWas).await {
            if matches!(error, StoreError::Fenced | StoreError::Closed)
                || self.closing.is_cancelled()
            {
                return;
            }
            self.closing.run_until_cancelled(self.clock.sleep(backoff.pause())).await;
        }
        self.work_available.notify_one();
    }

    /// Renews the lease of a claim until the task is aborted.
    async fn renew(self: Arc<Self>, claim: Claim) {
        loop {
            self.clock.sleep(RENEWAL_INTERVAL).await;
            if let Err(error) =
                self.store.renew(&claim, self.clock.now().after(LEASE_DURATION)).await
            {
                tracing::warn!(
                    tenant = claim.tenant,
                    batch = claim.batch_id,
                    %error,
                    "lease renewal failed"
                );
            }
        }
    }

    /// Processes a batch from its current status to its end, or until it is stopped or released.
    async fn process(
        &self,
        claim: &Claim,
        stop: &Arc<Stop>,
        lanes: &Arc<Lanes>,
        place: Place,
    ) -> Result<()> {
        // An executing batch releases its place between its turns, and counts as active until its
        // files are written. Batches in other lanes hold their places to the end.
        let _active = lanes.work_on(&claim.lane);
        let mut place = Some(place);
        let Some(batch) = self.store.batch(&claim.tenant, &claim.batch_id).await? else {
            return Ok(());
        };
        tracing::info!(
            tenant = claim.tenant,
            batch = claim.batch_id,
            status = batch.status.as_str(),
            "batch claimed"
        );
        let expires_at = batch.new.expires_at;
        let expiry = async {
            self.clock.sleep_until(expires_at).await;
            stop.because(Reason::Expired);
            std::future::pending::<()>().await;
        };
        let processing = async {
            if batch.status == Status::Cancelling {
                stop.because(Reason::Cancelled);
            } else if self.clock.now() >= expires_at {
                stop.because(Reason::Expired);
            }
            if batch.times.in_progress_at.is_none() {
                return self.validate_and_start(claim, &batch, stop).await;
            }
            let stopped = match (batch.status, stop.reason()) {
                // Finalizing started before and all results are recorded. If some lines have no
                // result, the batch had expired.
                (Status::Finalizing, _) => Ok(Executed::Stopped(Reason::Expired)),
                (_, Some(reason)) => Ok(Executed::Stopped(reason)),
                (_, None) => self.execute(claim, &batch, stop, lanes, &mut place).await,
            };
            let complete = self.has_all_results(claim).await?;
            let end = match stopped {
                Ok(Executed::Stopped(Reason::Shutdown)) => {
                    return self.store.release(claim, Release::AsItWas).await;
                }
                Ok(Executed::Stopped(Reason::Cancelled)) => End::Stopped(Reason::Cancelled),
                // A batch with all results is complete, even if its window has ended.
                Ok(_) if complete => End::Complete,
                Ok(Executed::Stopped(reason)) => End::Stopped(reason),
                Ok(Executed::TurnOver) => {
                    return self.store.release(claim, Release::Turn(self.clock.now())).await;
                }
                Ok(Executed::Rests(until)) => return self.let_rest(claim, &batch, until).await,
                Ok(Executed::All) => return Err(StoreError::Incomplete),
                Err(StoreError::Missing(cause)) => {
                    tracing::error!(
                        tenant = claim.tenant,
                        batch = claim.batch_id,
                        error = cause,
                        "input file unreadable, batch ends"
                    );
                    match stop.reason() {
                        Some(Reason::Shutdown) => {
                            return self.store.release(claim, Release::AsItWas).await;
                        }
                        _ if complete => End::Complete,
                        _ => End::InputLost,
                    }
                }
                Err(error) => return Err(error),
            };
            self.finalize_before_shutdown(claim, &batch, end).await
        };
        let outcome = tokio::select! {
            outcome = processing => outcome,
            () = expiry => Ok(()),
        };
        if outcome.is_ok()
            && let Some(ended) = self.store.batch(&claim.tenant, &claim.batch_id).await?
        {
            if ended.status.is_final() {
                self.forget(claim);
            }
            let counts = ended.counts;
            tracing::info!(
                tenant = claim.tenant,
                batch = claim.batch_id,
                status = ended.status.as_str(),
                total = counts.total,
                completed = counts.completed,
                failed = counts.failed,
                "batch released"
            );
        }
        outcome
    }

    /// Returns true if the batch has failed so often that further retries are pointless.
    pub(super) fn retries_exhausted(&self, claim: &Claim) -> bool {
        let backoffs = self.backoffs.lock().unwrap_or_else(PoisonError::into_inner);
        backoffs
            .get(&(claim.tenant.clone(), claim.batch_id.clone()))
            .is_some_and(|backoff| backoff.pauses() >= MAX_CONSECUTIVE_FAILURES)
    }

    /// Returns true if every line of a batch has a result.
    async fn has_all_results(&self, claim: &Claim) -> Result<bool> {
        let batch = self.store.batch(&claim.tenant, &claim.batch_id).await?;
        Ok(batch.is_none_or(|batch| batch.counts.is_whole()))
    }

    /// Finalizes a batch, or releases the batch if the process shuts down and the grace period
    /// ends.
    ///
    /// The next start repeats an interrupted finalization.
    async fn finalize_before_shutdown(
        &self,
        claim: &Claim,
        batch: &BatchRecord,
        end: End,
    ) -> Result<()> {
        let too_late = async {
            self.closing.cancelled().await;
            self.clock.sleep(self.settings.execution.shutdown_grace.duration()).await;
        };
        tokio::select! {
            finalized = self.finalize(claim, batch, end) => finalized,
            () = too_late => self.store.release(claim, Release::AsItWas).await,
        }
    }

    /// Validates a batch and moves a valid batch to the lane of its plugins.
    async fn validate_and_start(
        &self,
        claim: &Claim,
        batch: &BatchRecord,
        stop: &Stop,
    ) -> Result<()> {
        // A cancelled or expired batch is validated too, because validation determines the lines
        // that the error file must report.
        let verdict = tokio::select! {
            biased;
            () = stop.shutting_down() => return self.store.release(claim, Release::AsItWas).await,
            verdict = self.validate(claim, batch) => verdict,
        };
        let must_end = stop.reason().is_some();
        let verdict = match verdict {
            // Required plugins or the input have not become available in time.
            Err(StoreError::NotReady(cause)) if must_end => {
                Verdict::Bad(vec![not_validated(claim, &cause)], Vec::new())
            }
            Err(error) if must_end && self.retries_exhausted(claim) => {
                Verdict::Bad(vec![not_validated(claim, &error.to_string())], Vec::new())
            }
            verdict => verdict?,
        };
        match verdict {
            Verdict::Good(found) => {
                self.store.start_execution(claim, found, self.clock.now()).await
            }
            Verdict::Bad(errors, judged_by) => {
                self.store.fail(claim, errors, judged_by, self.clock.now()).await
            }
        }
    }
}

/// Returns the error of a batch that ended before validation, and logs the cause for the operator.
fn not_validated(claim: &Claim, cause: &str) -> BatchError {
    tracing::error!(
        tenant = claim.tenant,
        batch = claim.batch_id,
        error = cause,
        "batch ended without validation"
    );
    let message = "The batch ended before it could be validated, because of a problem of the \
                   server; create the batch again."
        .into();
    BatchError { code: ErrorCode::NotValidated.into(), message, param: None, line: None }
}
