//! Steps of an adapter: waits for a permit, sends, polls, until there is an answer.

use std::time::Duration;

use batchwright_domain::clock::Timestamp;
use batchwright_egress::Permit;
use batchwright_plugin::types::{Answer, Outcome, Request, Step};
use batchwright_plugin::{CallError, Plugin};

use tokio::time::Instant;

use crate::request::context::{Context, DEFER_THRESHOLD, Line};
use crate::request::exchange::Exchange;

/// Minimum wait for which the state of a job is written to the store.
const STORE_JOB_THRESHOLD: Duration = Duration::from_secs(1);

/// Outcome of the steps of an adapter.
pub(crate) enum StepOutcome {
    /// The adapter returned an answer.
    Done(Answer),
    /// The adapter asks for a retry after this pause. The answer is used if no retry is left.
    Retry(Option<Duration>, Answer),
    /// The batch was stopped before the request was sent.
    Stopped,
    /// The request was not sent and is tried again at this time.
    Postponed(Timestamp),
    /// The provider works on a job, which is polled at this time.
    Polling(Timestamp),
}

/// Outcome of the wait for a permit.
enum Admission {
    /// The request may be sent with this permit.
    Permit(Permit),
    /// The batch was stopped.
    Stopped,
    /// The request is tried again at this time.
    Postponed(Timestamp),
}

impl Context {
    /// Runs the steps of the adapter until an answer, a retry or a long wait.
    pub(super) async fn run_steps(
        &self,
        exchange: &mut Exchange<'_>,
        (line, model): (Line<'_>, &str),
        request: &impl Fn() -> Request,
        may_send: impl Fn() -> bool,
    ) -> Result<StepOutcome, CallError> {
        let plugin = exchange.plugin;
        // The permit comes before the memory: a request that waits for a permit must not hold
        // memory that requests in flight need.
        match self.admit(plugin, (line, model)).await {
            Admission::Permit(permit) => {
                exchange.permit = Some(permit);
                exchange.has_rate_permit = true;
            }
            Admission::Stopped => return Ok(StepOutcome::Stopped),
            Admission::Postponed(until) => return Ok(StepOutcome::Postponed(until)),
        }
        // The plugin or its breaker may have changed during the wait.
        if !may_send() {
            return Ok(StepOutcome::Postponed(self.clock.now()));
        }
        tokio::select! {
            biased;
            () = exchange.reservation.grow_to(plugin.gateway().expected_response_bytes()) => {}
            () = self.stop.asked() => return Ok(StepOutcome::Stopped),
        }
        let mut step = match exchange.job.take() {
            // The job was started before, so the adapter polls it.
            Some(state) => {
                let step = exchange.resume(&self.tenant, &state, &mut Outcome::Elapsed).await?;
                exchange.job = Some(state);
                step
            }
            None => exchange.begin(&self.tenant, request).await?,
        };
        for _ in 0..plugin.limits().max_steps.get() {
            step = match step {
                Step::Done(answer) => {
                    exchange.record_answer(&answer, line.id);
                    return Ok(StepOutcome::Done(answer));
                }
                Step::Retry { after_milliseconds, otherwise } => {
                    return Ok(StepOutcome::Retry(
                        after_milliseconds.map(Duration::from_millis),
                        otherwise,
                    ));
                }
                Step::Send { request, state } => {
                    let mut outcome = exchange.send(&self.tenant, request, &self.clock).await;
                    exchange.resume(&self.tenant, &state, &mut outcome).await?
                }
                Step::Wait { milliseconds, state } => {
                    let pause = Duration::from_millis(milliseconds);
                    exchange.job_is_kept &= exchange.job.as_ref() == Some(&state);
                    if pause >= STORE_JOB_THRESHOLD && !exchange.job_is_kept {
                        exchange.job_is_kept = self.jobs.keep(line.number, plugin, &state).await;
                    }
                    if pause >= DEFER_THRESHOLD && exchange.job_is_kept {
                        return Ok(StepOutcome::Polling(self.clock.now().after(pause)));
                    }
                    // The wait ends early only if the batch is stopped and its grace period ends.
                    exchange.permit = None;
                    exchange.reservation.shrink_to(state.len());
                    self.clock.sleep(pause).await;
                    while exchange.permit.is_none() {
                        match self.permit(plugin, (line, model)).await {
                            Ok(permit) => exchange.permit = Some(permit),
                            Err(until) => tokio::time::sleep_until(until).await,
                        }
                    }
                    exchange.reservation.grow_to(plugin.gateway().expected_response_bytes()).await;
                    let step = exchange.resume(&self.tenant, &state, &mut Outcome::Elapsed).await?;
                    exchange.job = Some(state);
                    step
                }
            };
        }
        Err(exchange.too_many_steps())
    }

    /// Waits for a permit of the provider, for its request rate, and for the gate.
    async fn admit(&self, plugin: &Plugin, (line, model): (Line<'_>, &str)) -> Admission {
        if self.stop.reason().is_some() {
            return Admission::Stopped;
        }
        let admitted = async {
            loop {
                let admitted = match self.permit(plugin, (line, model)).await {
                    Ok(admitted) => admitted,
                    Err(until) => {
                        let left = until.saturating_duration_since(tokio::time::Instant::now());
                        return Admission::Postponed(self.clock.now().after(left));
                    }
                };
                plugin.gateway().rate_limit_ready().await;
                if self.gate.is_open() {
                    return Admission::Permit(admitted);
                }
                // No request is sent while its result could not be written.
                drop(admitted);
                self.gate.open().await;
            }
        };
        // Biased, because a request that is admitted at once need not register for a stop.
        tokio::select! {
            biased;
            admission = admitted => admission,
            () = self.leave.cancelled() => match self.stop.reason() {
                Some(_) => Admission::Stopped,
                None => Admission::Postponed(self.clock.now()),
            },
        }
    }

    /// Waits for a permit of the provider. The error is the end of a long pause.
    ///
    /// After a change of limits the request waits again, with the new weight and the new limit.
    async fn permit(
        &self,
        plugin: &Plugin,
        (line, model): (Line<'_>, &str),
    ) -> Result<Permit, Instant> {
        let mut known = self.quota.known_limits().await;
        loop {
            let priority = self.quota.priority(&self.share, model, line.body.len());
            tokio::select! {
                biased;
                admitted = plugin.gateway().admit(self.queue.clone(), priority) => return admitted,
                () = self.quota.changed(&mut known) => {}
            }
        }
    }
}
