//! One claimed batch: from its current status to its end, or to its release.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use batchwright_domain::clock::Timestamp;
use batchwright_domain::endpoint::Endpoint;
use batchwright_domain::error_code::ErrorCode;
use batchwright_domain::status::Status;
use batchwright_store::{
    BatchError, BatchRecord, Claim, Lane, PluginVersion, Release, Result, Started, StoreError,
    TokenLimit, WaitCause,
};
use batchwright_tenancy::WhenOverLimit;
use futures_util::FutureExt;
use tokio_util::task::AbortOnDropHandle;

use super::{LEASE_DURATION, Worker};
use crate::schedule::backoff::Backoff;
use crate::schedule::lanes::{Lanes, Place};
use crate::schedule::stop::{Reason, Stop};
use crate::worker::execute::ExecutionOutcome;
use crate::worker::finalize::BatchEnd;
use crate::worker::validate::FileVerdict;

/// Interval between renewals of a lease.
const RENEWAL_INTERVAL: Duration = Duration::from_secs(10);

/// Interval between attempts to start a batch that waits for a limit of its project. The end of
/// another batch leads to an attempt at once.
const ADMIT_INTERVAL: Duration = Duration::from_secs(60);

/// Consecutive failures after which a cancelled or expired batch ends without its unreadable data.
const MAX_CONSECUTIVE_FAILURES: u32 = 20;

impl Worker {
    /// Processes a claimed batch and handles its failure.
    pub(super) async fn run(self: &Arc<Self>, claim: Claim, lanes: &Arc<Lanes>, place: Place) {
        let stop = self.running.add(&claim);
        if self.closing.is_cancelled() {
            stop.because(Reason::Shutdown);
        }
        let renewal =
            AbortOnDropHandle::new(tokio::spawn(self.clone().renew(claim.clone(), stop.clone())));
        let processing = AssertUnwindSafe(self.process(&claim, &stop, lanes, place));
        let outcome = tokio::select! {
            biased;
            outcome = processing.catch_unwind() => outcome,
            // Another worker has the batch. What is in flight could not be recorded any more.
            Ok(()) = renewal => Ok(Err(StoreError::Fenced)),
        };
        // A batch that was released to another lane may have been claimed again already.
        self.running.remove(&claim, &stop);
        let outcome = outcome
            .unwrap_or_else(|_| Err(StoreError::Database("batch processing panicked".into())));
        let (tenant, batch) = (&claim.tenant, &claim.batch_id);
        match outcome {
            Err(StoreError::Fenced) => {
                tracing::warn!(%tenant, %batch, "batch claimed by another worker")
            }
            Err(error) => {
                tracing::error!(%tenant, %batch, %error, "batch failed, will be retried");
                return self.release_after_backoff(&claim).await;
            }
            Ok(()) => {}
        }
        self.backoffs.reset(&claim);
    }

    /// Releases a failed batch after a backoff.
    ///
    /// The claim is held during the backoff, so that no other worker claims the batch.
    async fn release_after_backoff(&self, claim: &Claim) {
        let pause = self.backoffs.pause(claim);
        self.closing.run_until_cancelled(self.clock.sleep(pause)).await;
        let mut backoff = Backoff::default();
        while let Err(error) = self.store.release(claim, Release::KeepPosition).await {
            if matches!(error, StoreError::Fenced | StoreError::Closed)
                || self.closing.is_cancelled()
            {
                return;
            }
            self.closing.run_until_cancelled(self.clock.sleep(backoff.pause())).await;
        }
        self.work_available.notify_one();
    }

    /// Renews the lease of a claim and carries out its orders; returns when the claim is lost.
    async fn renew(self: Arc<Self>, claim: Claim, stop: Arc<Stop>) {
        loop {
            self.clock.sleep(RENEWAL_INTERVAL).await;
            let until = self.clock.now().after(LEASE_DURATION);
            match self.store.renew(&claim, until).await {
                Ok(orders) if orders.cancel => stop.because(Reason::Cancelled),
                Ok(_) => {}
                Err(StoreError::Fenced) => return,
                Err(error) => tracing::warn!(
                    tenant = %claim.tenant,
                    batch = %claim.batch_id,
                    %error,
                    "lease renewal failed"
                ),
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
            tenant = %claim.tenant,
            batch = %claim.batch_id,
            status = batch.status.as_str(),
            "batch claimed"
        );
        self.metrics.claimed(claim, &batch, self.clock.now());
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
            if claim.lane == Lane::Admit {
                let now = self.clock.now();
                let started = self.store.admit(claim, now, now.after(ADMIT_INTERVAL)).await?;
                return self.started(claim, started, Vec::new()).await;
            }
            if batch.times.in_progress_at.is_none() {
                return self.validate_and_start(claim, &batch, stop).await;
            }
            let stopped = match (batch.status, stop.reason()) {
                // Finalizing started before and all results are recorded. If some lines have no
                // result, the batch had expired.
                (Status::Finalizing, _) => Ok(ExecutionOutcome::Stopped(Reason::Expired)),
                (_, Some(reason)) => Ok(ExecutionOutcome::Stopped(reason)),
                (_, None) => self.execute(claim, &batch, stop, lanes, &mut place).await,
            };
            let complete = self.has_all_results(claim).await?;
            let end = match stopped {
                Ok(ExecutionOutcome::Stopped(Reason::Shutdown)) => {
                    return self.store.release(claim, Release::KeepPosition).await;
                }
                Ok(ExecutionOutcome::Stopped(Reason::Cancelled)) => {
                    BatchEnd::Stopped(Reason::Cancelled)
                }
                // A batch with all results is complete, even if its window has ended.
                Ok(_) if complete => BatchEnd::Complete,
                Ok(ExecutionOutcome::Stopped(reason)) => BatchEnd::Stopped(reason),
                Ok(ExecutionOutcome::TurnOver) => {
                    return self.store.release(claim, Release::Requeue(self.clock.now())).await;
                }
                Ok(ExecutionOutcome::Parked(until)) => {
                    return self.park(claim, &batch, until).await;
                }
                Ok(ExecutionOutcome::All) => return Err(StoreError::Incomplete),
                Err(StoreError::Missing(cause)) => {
                    tracing::error!(
                        tenant = %claim.tenant,
                        batch = %claim.batch_id,
                        error = cause,
                        "input file unreadable, batch ends"
                    );
                    match stop.reason() {
                        Some(Reason::Shutdown) => {
                            return self.store.release(claim, Release::KeepPosition).await;
                        }
                        _ if complete => BatchEnd::Complete,
                        _ => BatchEnd::InputLost,
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
                self.parked.forget(claim);
                self.quotas.forget(&claim.tenant, &claim.batch_id);
                self.metrics.batch_ended(&claim.tenant, &ended);
                self.spans.batch_ended(&claim.tenant, &ended);
            }
            let counts = ended.counts;
            tracing::info!(
                tenant = %claim.tenant,
                batch = %claim.batch_id,
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
        self.backoffs.pauses(claim) >= MAX_CONSECUTIVE_FAILURES
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
        end: BatchEnd,
    ) -> Result<()> {
        let began = batchwright_telemetry::trace::now();
        let too_late = async {
            self.closing.cancelled().await;
            self.clock.sleep(self.config.execution.shutdown_grace.duration()).await;
        };
        tokio::select! {
            finalized = self.finalize(claim, batch, end) => {
                let has_failed = finalized.is_err();
                self.spans.part("finalize", (&claim.tenant, &claim.batch_id), began, |span| {
                    if has_failed { span.failed("store") } else { span }
                });
                finalized
            }
            () = too_late => self.store.release(claim, Release::KeepPosition).await,
        }
    }

    /// Parks a batch until a time.
    async fn park(&self, claim: &Claim, batch: &BatchRecord, until: Timestamp) -> Result<()> {
        let endpoint = batch.new.endpoint;
        let mut changes = self.quotas.changes();
        changes.mark_unchanged();
        self.quotas.of(&claim.tenant).refresh().await?;
        let waits_for = self.wait_cause(claim, batch, until);
        self.count_waiting(claim, endpoint).await?;
        self.store.release(claim, Release::Backoff(until, waits_for)).await?;
        if changes.has_changed().unwrap_or(false) {
            // A limit was changed meanwhile, and the batch may have missed the wake-up.
            self.store.end_backoff(self.clock.now()).await?;
        }
        self.parked.wake_at(until);
        self.work_available.notify_one();
        Ok(())
    }

    /// Returns why the requests of a batch wait until `next`.
    pub(super) fn wait_cause(
        &self,
        claim: &Claim,
        batch: &BatchRecord,
        next: Timestamp,
    ) -> Option<WaitCause> {
        let now = self.clock.now();
        self.quotas
            .wait_cause(&claim.tenant, &self.registry, batch, now)
            .or_else(|| self.breakers.wait_cause(claim, batch.new.endpoint, now, next))
    }

    /// Reports the number of unfinished requests of a batch to its breakers as waiting.
    pub(super) async fn count_waiting(&self, claim: &Claim, endpoint: Endpoint) -> Result<()> {
        let left = self.store.batch(&claim.tenant, &claim.batch_id).await?.map_or(0, |batch| {
            let counts = batch.counts;
            counts.total.saturating_sub(counts.completed).saturating_sub(counts.failed)
        });
        for breaker in self.breakers.of_batch(claim, endpoint) {
            breaker.add_waiting(&claim.batch_id, left);
        }
        Ok(())
    }

    /// Fails a batch that may not start.
    async fn started(
        &self,
        claim: &Claim,
        started: Started,
        judged_by: Vec<PluginVersion>,
    ) -> Result<()> {
        match started {
            Started::Begun | Started::Queued => Ok(()),
            Started::OverLimit(limit) => {
                let errors = vec![over_limit(&limit)];
                self.store.fail(claim, errors, judged_by, self.clock.now()).await
            }
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
            () = stop.shutting_down() => {
                return self.store.release(claim, Release::KeepPosition).await;
            }
            verdict = self.validate(claim, batch) => verdict,
        };
        let must_end = stop.reason().is_some();
        let verdict = match verdict {
            // Required plugins or the input have not become available in time.
            Err(StoreError::NotReady(cause)) if must_end => {
                FileVerdict::Rejected(vec![not_validated(claim, &cause)], Vec::new())
            }
            Err(error) if must_end && self.retries_exhausted(claim) => {
                FileVerdict::Rejected(vec![not_validated(claim, &error.to_string())], Vec::new())
            }
            verdict => verdict?,
        };
        match verdict {
            FileVerdict::Accepted(found) => {
                let may_wait = self.config.tenant_defaults.when_over_limit == WhenOverLimit::Wait;
                let (judged_by, now) = (found.judged_by.clone(), self.clock.now());
                let started = self.store.start_execution(claim, found, now, may_wait).await?;
                self.started(claim, started, judged_by).await
            }
            FileVerdict::Rejected(errors, judged_by) => {
                self.store.fail(claim, errors, judged_by, self.clock.now()).await
            }
        }
    }
}

/// Returns the error of a batch that exceeds the enqueued tokens of its project.
fn over_limit(exceeded: &TokenLimit) -> BatchError {
    let advice = match exceeded.estimated > exceeded.limit {
        true => "The batch alone exceeds the limit (batch_1_day_max_input_tokens); split it.",
        false => "Please try again once some batches in progress have completed.",
    };
    let code = ErrorCode::TokenLimitExceeded.into();
    BatchError { code, message: format!("{exceeded} {advice}"), param: None, line: None }
}

/// Returns the error of a batch that ended before validation, and logs the cause for the operator.
fn not_validated(claim: &Claim, cause: &str) -> BatchError {
    tracing::error!(
        tenant = %claim.tenant,
        batch = %claim.batch_id,
        error = cause,
        "batch ended without validation"
    );
    let message = "The batch ended before it could be validated, because of a problem of the \
                   server; create the batch again."
        .into();
    BatchError { code: ErrorCode::NotValidated.into(), message, param: None, line: None }
}
