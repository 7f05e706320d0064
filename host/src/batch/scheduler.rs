//! Who works on what: claims batches, the oldest first, and takes each through its life.

use std::panic::AssertUnwindSafe;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use tokio_util::task::AbortOnDropHandle;

use super::backoff::Backoff;
use super::execute::Executed;
use super::finalize::End;
use super::lanes::{Lanes, Next, Place};
use super::stop::{Reason, Stop};
use super::validate::Verdict;
use super::{Batches, Running};
use crate::store::{BatchError, BatchRecord, Claim, Release, Result, Status, StoreError};

/// How long a claim holds without being renewed, and how often it is renewed.
const LEASE: Duration = Duration::from_secs(30);
const RENEWAL: Duration = Duration::from_secs(10);

/// Failures in a row after which a batch that has been cancelled or has expired ends without what cannot be read.
const HOPELESS: u32 = 20;

/// How often work is looked for without a hint: a lease or a rest may have ended.
const LOOK: Duration = Duration::from_secs(5);

impl Batches {
    /// Claims and runs batches until the server closes.
    pub(super) async fn schedule(self: Arc<Self>) {
        // Before anything of the same name can be written.
        if let Err(error) = self.remove_abandoned().await {
            tracing::warn!("what a former process left half done stays for now: {error}");
        }
        let max_executing = self.settings.max_executing_batches.get();
        let lanes = Lanes::new(
            self.settings.max_concurrent_batches.get(),
            max_executing,
            self.work.clone(),
        );
        let mut backoff = Backoff::default();
        while !self.closing.is_cancelled() {
            match self.claim_next(&lanes).await {
                Ok(true) => {}
                Ok(false) => {
                    let hint = async {
                        tokio::select! {
                            () = self.work.notified() => {}
                            () = self.clock.sleep(LOOK) => {}
                            () = self.rests.next_end(&self.clock) => {}
                        }
                    };
                    self.closing.run_until_cancelled(hint).await;
                }
                Err(error) => {
                    tracing::error!("no batch can be claimed: {error}");
                    self.closing.run_until_cancelled(self.clock.sleep(backoff.pause())).await;
                    continue;
                }
            }
            backoff = Backoff::default();
        }
    }

    /// Gives the next batch its turn; whether there was one.
    async fn claim_next(self: &Arc<Self>, lanes: &Arc<Lanes>) -> Result<bool> {
        let now = self.clock.now();
        let waiting = self.store.waiting(now).await?;
        let place = match lanes.next(&waiting) {
            Next::Nothing => return Ok(false),
            Next::Returned => return Ok(true),
            Next::Claim(place) => place,
        };
        let Some(waiting) = waiting.get(place) else { return Ok(false) };
        if let Some(claim) = self.store.claim(waiting, now, now.after(LEASE)).await? {
            // Places are taken here alone, so there is one still.
            let place = lanes.take(&claim.lane);
            let (batches, lanes) = (self.clone(), lanes.clone());
            self.tasks.spawn(async move { batches.run(claim, &lanes, place).await });
        }
        Ok(true)
    }

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
        let lived = AssertUnwindSafe(self.live(&claim, &stop, lanes, place)).catch_unwind().await;
        // A batch that is given back to go on in another lane may have been taken up anew already.
        {
            let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
            if running.get(&key).is_some_and(|current| Arc::ptr_eq(&current.stop, &stop)) {
                running.remove(&key);
            }
        }
        let lived =
            lived.unwrap_or_else(|_| Err(StoreError::Database("the work on it panicked".into())));
        let batch = claim.batch_id.as_str();
        match lived {
            Err(StoreError::Fenced) => {
                tracing::warn!(batch, "another worker has taken over the batch")
            }
            Err(error) => {
                tracing::error!(batch, "the batch rests and goes on later: {error}");
                return self.rest(&claim, key).await;
            }
            Ok(()) => {}
        }
        self.resting.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
    }

    /// Ends all rests whenever an outage ends or plugins change.
    pub(super) async fn wake(self: Arc<Self>) {
        let (mut plugins, mut outages) = (self.registry.changes(), self.outages.changes());
        loop {
            tokio::select! {
                _ = plugins.changed() => {
                    self.outages.plugins_changed(&self.registry.current());
                    self.outages.tell();
                }
                _ = outages.changed() => {
                    if let Err(error) = self.store.wake(self.clock.now()).await {
                        tracing::warn!("batches rest on until their time: {error}");
                    }
                    self.work.notify_one();
                }
                () = self.closing.cancelled() => return,
            }
        }
    }

    /// Gives a batch back that could not go on, after a while. As long as it is not given back nobody takes it up.
    async fn rest(&self, claim: &Claim, key: (String, String)) {
        let pause = self
            .resting
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
        self.work.notify_one();
    }

    /// Renews a claim for as long as it is worked on.
    async fn renew(self: Arc<Self>, claim: Claim) {
        loop {
            self.clock.sleep(RENEWAL).await;
            if let Err(error) = self.store.renew(&claim, self.clock.now().after(LEASE)).await {
                tracing::warn!(batch = claim.batch_id, "the claim was not renewed: {error}");
            }
        }
    }

    /// Takes a batch from wherever it is to its end, or to where it was told to stop.
    async fn live(
        &self,
        claim: &Claim,
        stop: &Arc<Stop>,
        lanes: &Arc<Lanes>,
        place: Place,
    ) -> Result<()> {
        // One that executes gives its place back between its turns, and counts as worked on until its files are written; others hold theirs.
        let _worked_on = lanes.work_on(&claim.lane);
        let mut place = Some(place);
        let Some(batch) = self.store.batch(&claim.tenant, &claim.batch_id).await? else {
            return Ok(());
        };
        tracing::info!(
            batch = claim.batch_id,
            tenant = claim.tenant,
            status = batch.status.as_str(),
            "batch taken up"
        );
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
            let stopped = match (batch.status, stop.reason()) {
                // Finalizing was begun before, with every result there is; if some lines have none, the batch had expired.
                (Status::Finalizing, _) => Ok(Executed::Stopped(Reason::Expired)),
                (_, Some(reason)) => Ok(Executed::Stopped(reason)),
                (_, None) => self.execute(claim, &batch, stop, lanes, &mut place).await,
            };
            let whole = self.is_whole(claim).await?;
            let end = match stopped {
                Ok(Executed::Stopped(Reason::Shutdown)) => {
                    return self.store.release(claim, Release::AsItWas).await;
                }
                Ok(Executed::Stopped(Reason::Cancelled)) => End::Stopped(Reason::Cancelled),
                // In time after all.
                Ok(_) if whole => End::Whole,
                Ok(Executed::Stopped(reason)) => End::Stopped(reason),
                Ok(Executed::TurnOver) => {
                    return self.store.release(claim, Release::Turn(self.clock.now())).await;
                }
                Ok(Executed::Rests(until)) => return self.let_rest(claim, &batch, until).await,
                Ok(Executed::All) => return Err(StoreError::Incomplete),
                Err(StoreError::Missing(cause)) => {
                    tracing::error!(
                        batch = claim.batch_id,
                        "the batch ends, as its input cannot be read: {cause}"
                    );
                    match stop.reason() {
                        Some(Reason::Shutdown) => {
                            return self.store.release(claim, Release::AsItWas).await;
                        }
                        _ if whole => End::Whole,
                        _ => End::InputLost,
                    }
                }
                Err(error) => return Err(error),
            };
            self.finalize_in_time(claim, &batch, end).await
        };
        let lived = tokio::select! {
            lived = living => lived,
            () = expiry => Ok(()),
        };
        if lived.is_ok()
            && let Some(ended) = self.store.batch(&claim.tenant, &claim.batch_id).await?
        {
            if ended.status.is_final() {
                self.forget(claim);
            }
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

    /// Whether work on a batch has failed so often that trying again will not help.
    pub(super) fn is_hopeless(&self, claim: &Claim) -> bool {
        let resting = self.resting.lock().unwrap_or_else(PoisonError::into_inner);
        resting
            .get(&(claim.tenant.clone(), claim.batch_id.clone()))
            .is_some_and(|rest| rest.pauses() >= HOPELESS)
    }

    /// Whether every line of a batch has its result.
    async fn is_whole(&self, claim: &Claim) -> Result<bool> {
        let batch = self.store.batch(&claim.tenant, &claim.batch_id).await?;
        Ok(batch.is_none_or(|batch| batch.counts.is_whole()))
    }

    /// Finalizes a batch, unless the process ends and it takes too long: it can be repeated.
    async fn finalize_in_time(&self, claim: &Claim, batch: &BatchRecord, end: End) -> Result<()> {
        let too_late = async {
            self.closing.cancelled().await;
            self.clock.sleep(self.settings.shutdown_grace.duration()).await;
        };
        tokio::select! {
            finalized = self.finalize(claim, batch, end) => finalized,
            () = too_late => self.store.release(claim, Release::AsItWas).await,
        }
    }

    /// Validates a batch. If it is good it goes on when its turn comes, in the lane of its provider.
    async fn begin(&self, claim: &Claim, batch: &BatchRecord, stop: &Stop) -> Result<()> {
        // A batch that is cancelled or has expired is validated all the same: only then is it known which lines to tell of.
        let verdict = tokio::select! {
            biased;
            () = stop.shutting_down() => return self.store.release(claim, Release::AsItWas).await,
            verdict = self.validate(claim, batch) => verdict,
        };
        let may_end = stop.reason().is_some();
        let verdict = match verdict {
            // It has waited for its rules, or for its input, for as long as it may.
            Err(StoreError::NotReady(cause)) if may_end => {
                Verdict::Bad(vec![not_validated(claim, &cause)], Vec::new())
            }
            Err(error) if may_end && self.is_hopeless(claim) => {
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

/// The error of a batch that ended before it could be validated, with the cause for the operator alone.
fn not_validated(claim: &Claim, cause: &str) -> BatchError {
    tracing::error!(
        batch = claim.batch_id,
        "the batch ends without having been validated: {cause}"
    );
    let message =
        "The batch ended before it could be validated, for a reason that is not its own; create it again.".into();
    BatchError { code: "not_validated".into(), message, param: None, line: None }
}
