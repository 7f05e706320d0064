//! Who works on what: claims batches, the oldest first, and takes each through its life.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio_util::task::AbortOnDropHandle;

use super::Batches;
use super::lanes::{Lanes, Place};
use super::patience::Patience;
use super::stop::{Reason, Stop};
use super::validate::Verdict;
use crate::store::{BatchRecord, Claim, Finish, Lane, Result, Status, StoreError};

/// How long a claim holds without being renewed, and how often it is renewed.
const LEASE: Duration = Duration::from_secs(30);
const RENEWAL: Duration = Duration::from_secs(10);

/// How often work is looked for without a hint: a lease or a rest may have ended.
const LOOK: Duration = Duration::from_secs(5);

impl Batches {
    /// Claims and runs batches until the server closes.
    pub(super) async fn schedule(self: Arc<Self>) {
        let lanes = Lanes::new(self.settings.max_concurrent_batches.get(), self.work.clone());
        let mut patience = Patience::default();
        while !self.closing.is_cancelled() {
            let now = self.clock.now();
            let claimed = self.store.claim(now, now.after(LEASE), lanes.full()).await;
            // A batch taken up from another lane may have taken the last place meanwhile.
            let claimed = claimed.map(|claim| claim.map(|claim| (lanes.enter(claim.lane.clone()), claim)));
            match claimed {
                Ok(Some((Some(place), claim))) => {
                    let batches = self.clone();
                    self.tasks.spawn(async move { batches.run(claim, place).await });
                }
                Ok(Some((None, claim))) => {
                    self.store.release(&claim, now).await.ok();
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

    async fn run(self: &Arc<Self>, claim: Claim, place: Place) {
        let key = (claim.tenant.clone(), claim.batch_id.clone());
        let stop = Arc::new(Stop::default());
        self.running.lock().unwrap_or_else(PoisonError::into_inner).insert(key.clone(), stop.clone());
        if self.closing.is_cancelled() {
            stop.because(Reason::Shutdown);
        }
        let _renewal = AbortOnDropHandle::new(tokio::spawn(self.clone().keep(claim.clone())));
        let lived = self.live(&claim, place, &stop).await;
        self.running.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
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
        while let Err(error) = self.store.release(claim, self.clock.now()).await {
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
    async fn live(&self, claim: &Claim, mut place: Place, stop: &Arc<Stop>) -> Result<()> {
        let Some(mut batch) = self.store.batch(&claim.tenant, &claim.batch_id).await? else { return Ok(()) };
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
                let Some(lane) = self.begin(claim, &batch, stop).await? else { return Ok(()) };
                match place.move_to(lane) {
                    Some(next) => place = next,
                    // It goes on, as the oldest, when one of those that wait for the same provider is done.
                    None => return self.store.release(claim, self.clock.now()).await,
                }
                let Some(begun) = self.store.batch(&claim.tenant, &claim.batch_id).await? else { return Ok(()) };
                batch = begun;
            }
            let stopped = match batch.status {
                // Finalizing was begun before, with every result there is; if some lines have none, the batch had expired.
                Status::Finalizing => (!batch.counts.is_whole()).then_some(Reason::Expired),
                _ => self.execute(claim, &batch, place.provider(), stop).await?,
            };
            if stopped.is_none() && !self.is_whole(claim).await? {
                return Err(StoreError::Incomplete);
            }
            match stopped {
                Some(Reason::Shutdown) => self.store.release(claim, self.clock.now()).await,
                stopped => self.finalize(claim, &batch, stopped).await,
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

    /// Validates a batch, and says where it goes on. None if that was its end, or if it was told to stop.
    async fn begin(&self, claim: &Claim, batch: &BatchRecord, stop: &Stop) -> Result<Option<Lane>> {
        let verdict = tokio::select! {
            biased;
            () = stop.asked() => None,
            verdict = self.validate(claim, batch) => Some(verdict?),
        };
        let at = self.clock.now();
        match verdict {
            Some(Verdict::Good(found)) => {
                let lane = Lane::Execute(found.provider.clone());
                self.store.start_execution(claim, found, at).await?;
                Ok(Some(lane))
            }
            Some(Verdict::Bad(errors)) => self.store.fail(claim, errors, at).await.map(|()| None),
            None => {
                // Nothing was counted yet, so nothing is owed: the batch ends without files.
                let status = match stop.reason() {
                    Some(Reason::Cancelled) => Status::Cancelled,
                    Some(Reason::Expired) => Status::Expired,
                    Some(Reason::Shutdown) | None => return self.store.release(claim, at).await.map(|()| None),
                };
                self.store.finish(claim, Finish { status, output: None, error: None, at }).await.map(|()| None)
            }
        }
    }
}
