//! Attempt at a request: the adapter chooses the next step, and the host performs the step.
//!
//! **Problem.** A provider charges for the requests that it accepts. A retry must neither lose a
//! line nor pay for it twice without need, and a line must not be retried forever.
//!
//! **Outcomes.** Each attempt has one of three outcomes:
//!
//! - *Refused*: no connection, a 429, a rejected credential. The provider has not executed the
//!   request, so nothing was charged. The request is retried for as long as its batch may wait, and
//!   the attempt does not count. If other lines succeed meanwhile and the breaker finds the line at
//!   fault, the line fails.
//! - *Answered*: the provider has sent a response. A transient error is retried until
//!   `max_attempts` attempts have failed. Any other response is the result.
//! - *Ambiguous*: the request may have reached the provider, but no response arrived, for example
//!   after a reset connection. The request may have been charged. The attempt counts, and
//!   `max_unanswered_attempts` is a second, lower limit.
//!
//! `max_retry_time` limits the time of all counted attempts and the pauses between them.
//!
//! **Paid for twice.** Three things can charge a line twice: the retry of an ambiguous attempt, the
//! loss of a request in flight (a crash, or a stop after the grace period), and an adapter that
//! starts a job again. To keep these cases rare, no request is sent while results cannot be
//! written, and the state of a job at the provider is stored before a long wait. A failed poll of a
//! job repeats the poll and not the job. If the state of a job cannot be read, the request waits.
//!
//! **Order.** A request first waits for a permit of its provider and only then reserves memory, so
//! that a waiting request holds no memory that requests in flight need. A further exchange of the
//! same attempt keeps both while it waits for `requests_per_minute`. Between attempts, nothing
//! of a request is in memory except its position and its retry state; see
//! [`retry_queue`](crate::schedule::retry_queue).
//!
//! **Memory.** Everything that a request adds to its line (the body from the adapter, a response,
//! the answer) is covered by a reservation in the pool `exchanges`, from before the send until the
//! commit of the result. If a result of the guest exceeds it, the result is dropped, the
//! reservation waits for room, and the call is repeated. A call is a pure function, so the repeated
//! call returns the same result.

use std::sync::Arc;
use std::time::Duration;

use batchwright_domain::clock::Timestamp;
use batchwright_domain::error_code::ErrorCode;
use batchwright_egress::refusal_pause;
use batchwright_memory::Reservation;
use batchwright_plugin::types::{Answer, Failure, Request};
use batchwright_plugin::{Plugin, Route};

use crate::request::assessment::ProviderSignal;
use crate::request::context::{Context, DEFER_THRESHOLD, Line};
use crate::request::exchange::Exchange;
use crate::request::steps::StepOutcome;
use crate::schedule::breaker::{BreakerDecision, FailureKind, FailureVerdict};
use crate::schedule::retry_queue::RetryState;

/// Final answer to a request.
pub(crate) struct FinalAnswer {
    /// Response or failure.
    pub answer: Answer,
    /// Plugin that gave the answer, or `None` if the host gave it.
    pub by: Option<Arc<Plugin>>,
    /// Memory that covers the answer.
    pub reservation: Option<Reservation>,
}

/// Outcome of an attempt.
pub(crate) enum AttemptOutcome {
    /// The request has its final answer.
    Answered(FinalAnswer),
    /// The request is retried at this time.
    Retry(Timestamp, RetryState),
    /// The batch was stopped before the request was sent.
    Stopped,
}

impl Context {
    /// Makes one attempt at a request.
    pub(crate) async fn attempt(
        &self,
        line: Line<'_>,
        mut retry_state: RetryState,
    ) -> AttemptOutcome {
        retry_state.waits = false;
        // Looked up at each attempt, because the operator may have fixed the plugin meanwhile.
        let plugins = self.registry.current();
        let route = plugins.route(&self.tenant, line.model);
        let Some(Route { plugin, model }) =
            route.filter(|route| route.plugin.handles(self.endpoint))
        else {
            return self.missing_plugin(line, retry_state);
        };
        let known = self
            .breakers
            .iter()
            .find(|(name, _)| *name == plugin.name())
            .map(|(_, breaker)| breaker.clone());
        let breaker = known.unwrap_or_else(|| {
            self.breaker_registry.of(plugin.name(), &self.tenant, self.endpoint)
        });
        if plugin.routing().paused {
            let detail = format!("The plugin `{}` is paused by the operator.", plugin.name());
            return self.blocked_by_plugin(
                &breaker,
                line,
                retry_state,
                "The provider is paused by the operator.",
                &detail,
            );
        }
        let (gate, probe) = breaker.enter(self.clock.now(), identity(&plugin));
        match gate {
            BreakerDecision::Allow | BreakerDecision::Probe => {}
            BreakerDecision::Wait(until) => {
                return AttemptOutcome::Retry(until, RetryState { waits: true, ..retry_state });
            }
            BreakerDecision::GiveUp(answer) => {
                return AttemptOutcome::Answered(FinalAnswer {
                    answer,
                    by: Some(plugin),
                    reservation: None,
                });
            }
        }
        let mut exchange = Exchange::new(&plugin, retry_state.refusals);
        let request = || Request {
            id: line.id.to_owned(),
            custom_id: line.custom_id.to_owned(),
            endpoint: self.endpoint.as_str().to_owned(),
            model: model.clone(),
            body: line.body.to_owned(),
            created_at: self.created_at,
            attempt: retry_state.answered.saturating_add(1),
        };
        let may_send = || {
            // A plugin may have been paused, disabled or changed while the request waited for its
            // permit. The request is then routed again.
            let current = self.registry.current();
            if !Arc::ptr_eq(&plugins, &current)
                && current.identity(plugin.name()) != identity(&plugin)
            {
                return false;
            }
            let is_allowed = || {
                matches!(breaker.check(self.clock.now(), identity(&plugin)), BreakerDecision::Allow)
            };
            probe.is_some() || breaker.is_healthy() || is_allowed()
        };
        match self.jobs.of(line.number, &plugin, retry_state.has_job).await {
            Ok(job) => {
                exchange.job_is_kept = job.is_some();
                exchange.job = job;
            }
            // A new job would be paid for twice.
            Err(error) => {
                tracing::error!(
                    tenant = %self.tenant,
                    batch = %self.batch,
                    request = line.id,
                    line = line.number,
                    plugin = plugin.name(),
                    %error,
                    "job state read failed"
                );
                return AttemptOutcome::Retry(self.clock.now().after(DEFER_THRESHOLD), retry_state);
            }
        }
        let outcome = self.run_steps(&mut exchange, line, &request, may_send).await;
        retry_state.refusals = exchange.refusals;
        let sent = exchange.last.take();
        let duration =
            exchange.sent_at.map_or(Duration::ZERO, |sent_at| sent_at.until(self.clock.now()));
        let (exchange_job, job_is_kept) = (exchange.job.take(), exchange.job_is_kept);
        let reservation = exchange.reservation;
        let answered = |answer, reservation| {
            AttemptOutcome::Answered(FinalAnswer { answer, by: Some(plugin.clone()), reservation })
        };
        let outcome = match outcome {
            Ok(outcome) => outcome,
            Err(error) => {
                return answered(failure(error.code(), error.to_string()), Some(reservation));
            }
        };
        let (retry, answer) = match outcome {
            StepOutcome::Stopped => return AttemptOutcome::Stopped,
            StepOutcome::Postponed(until) => return AttemptOutcome::Retry(until, retry_state),
            StepOutcome::Polling(until) => {
                return AttemptOutcome::Retry(until, RetryState { has_job: true, ..retry_state });
            }
            StepOutcome::Done(answer) => (None, answer),
            StepOutcome::Retry(after, otherwise) => (Some(after), otherwise),
        };
        let mut signal =
            sent.as_ref().map_or(ProviderSignal::Answered, |sent| sent.assessment.signal);
        match &exchange_job {
            // The poll has failed and not the job. A repeated poll costs nothing, while a line that
            // the breaker holds back without its job would submit and pay for a second one.
            Some(state)
                if matches!(signal, ProviderSignal::Failure(_))
                    || retry.is_some() && signal != ProviderSignal::Answered =>
            {
                if signal == ProviderSignal::NoResponse {
                    signal = ProviderSignal::TransientError;
                }
                if !job_is_kept {
                    self.jobs.insist(line.number, &plugin, state, &self.clock, &self.leave).await;
                }
                retry_state.has_job = true;
            }
            // The adapter asks for a new job.
            Some(_) if retry.is_some() => {
                retry_state.has_job = false;
                self.jobs.forget(line.number).await;
            }
            _ => {}
        }
        let delay = retry.flatten().max(sent.as_ref().and_then(|sent| sent.assessment.hints.delay));
        let trouble = |kind| self.describe_trouble(kind, &answer, sent.as_ref());
        match (signal, retry) {
            (
                ProviderSignal::Failure(
                    kind @ (FailureKind::Unauthorized
                    | FailureKind::Forbidden
                    | FailureKind::Quota
                    | FailureKind::Unreachable),
                ),
                _,
            ) => {
                let refused_at = retry_state.refused_at.replace(breaker.successes());
                let trouble = trouble(kind);
                let verdict = self.record_failure(
                    &breaker,
                    line,
                    &plugin,
                    refused_at,
                    trouble,
                    probe.is_some(),
                );
                retry_state.outage_failures = breaker.failed_attempts(line.mark);
                match verdict {
                    FailureVerdict::Hold(until) => AttemptOutcome::Retry(until, retry_state),
                    FailureVerdict::Wait(until) => {
                        AttemptOutcome::Retry(until, RetryState { waits: true, ..retry_state })
                    }
                    FailureVerdict::LineAtFault => answered(answer, Some(reservation)),
                }
            }
            (ProviderSignal::RateLimited, Some(_)) => {
                self.record_success(&breaker, &plugin);
                tracing::debug!(
                    tenant = %self.tenant,
                    batch = %self.batch,
                    request = line.id,
                    plugin = plugin.name(),
                    delay_ms = delay.map(milliseconds),
                    "request refused by the provider"
                );
                let pause =
                    refusal_pause(retry_state.refusals.number).mul_f64(0.5 + fastrand::f64() / 2.0);
                AttemptOutcome::Retry(
                    self.clock.now().after(pause.max(delay.unwrap_or_default())),
                    retry_state,
                )
            }
            (ProviderSignal::Failure(_) | ProviderSignal::NoResponse, Some(_)) => {
                if signal == ProviderSignal::NoResponse {
                    retry_state.unanswered = retry_state.unanswered.saturating_add(1);
                } else {
                    retry_state.answered = retry_state.answered.saturating_add(1);
                }
                let verdict = self.record_failure(
                    &breaker,
                    line,
                    &plugin,
                    None,
                    trouble(FailureKind::Failed),
                    probe.is_some(),
                );
                retry_state.outage_failures = breaker.failed_attempts(line.mark);
                let waits = match verdict {
                    FailureVerdict::Wait(until) => Some(until),
                    FailureVerdict::Hold(_) | FailureVerdict::LineAtFault => None,
                };
                self.retry(retry_state, duration, delay, waits)
                    .unwrap_or_else(|| answered(answer, None))
            }
            (
                ProviderSignal::TransientError | ProviderSignal::Answered | ProviderSignal::NotSent,
                Some(_),
            ) => {
                if signal != ProviderSignal::NotSent {
                    self.record_success(&breaker, &plugin);
                }
                retry_state.answered = retry_state.answered.saturating_add(1);
                self.retry(retry_state, duration, delay, None)
                    .unwrap_or_else(|| answered(answer, None))
            }
            (_, None) => {
                if !matches!(
                    signal,
                    ProviderSignal::NotSent
                        | ProviderSignal::NoResponse
                        | ProviderSignal::Failure(_)
                ) && sent.is_some()
                {
                    self.record_success(&breaker, &plugin);
                }
                answered(answer, Some(reservation))
            }
        }
    }

    /// Returns the next attempt of a request, or `None` if no attempt is left.
    ///
    /// The backoff is at least the `delay` of the provider, and lasts at least until `waits`.
    fn retry(
        &self,
        mut retry_state: RetryState,
        duration: Duration,
        delay: Option<Duration>,
        waits: Option<Timestamp>,
    ) -> Option<AttemptOutcome> {
        let attempts = retry_state.answered.saturating_add(retry_state.unanswered);
        let pause = self.backoff(attempts).max(delay.unwrap_or_default());
        retry_state.spent = retry_state.spent.saturating_add(duration).saturating_add(pause);
        let is_exhausted = attempts as usize >= self.config.execution.max_attempts.get()
            || retry_state.unanswered as usize
                >= self.config.execution.max_unanswered_attempts.get()
            || retry_state.spent > self.config.execution.max_retry_time.duration();
        let at = self.clock.now().after(pause);
        tracing::debug!(
            tenant = %self.tenant,
            batch = %self.batch,
            attempts,
            delay_ms = milliseconds(pause),
            is_exhausted,
            "attempt failed"
        );
        (!is_exhausted)
            .then(|| AttemptOutcome::Retry(waits.map_or(at, |until| until.max(at)), retry_state))
    }

    /// Returns an exponential backoff with jitter.
    ///
    /// The jitter removes up to half of the pause, so that requests that failed together are not
    /// retried together.
    fn backoff(&self, attempt: u32) -> Duration {
        let doubled = 2_u32.saturating_pow(attempt.saturating_sub(1));
        let max = self.config.execution.max_retry_backoff.duration();
        let pause = self.config.execution.retry_backoff.duration().saturating_mul(doubled).min(max);
        pause.mul_f64(0.5 + fastrand::f64() / 2.0)
    }
}

/// Returns a number that differs between a plugin and an earlier plugin of the same name.
pub(crate) fn identity(plugin: &Plugin) -> usize {
    std::ptr::from_ref(plugin) as usize
}

/// Converts a duration to milliseconds, for the log.
pub(crate) fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Creates an answer without a response of the provider.
pub(crate) fn failure(code: ErrorCode, message: String) -> Answer {
    Answer::Failure(Failure { code: code.into(), message })
}
