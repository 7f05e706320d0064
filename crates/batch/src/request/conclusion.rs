//! Conclusion of an attempt: what its answer means for the breaker, the job and the next attempt.

use std::sync::Arc;
use std::time::Duration;

use batchwright_domain::clock::Timestamp;
use batchwright_egress::refusal_pause;
use batchwright_memory::Reservation;
use batchwright_plugin::Plugin;
use batchwright_plugin::types::Answer;
use batchwright_telemetry::{Context as TraceContext, trace};

use crate::formats::result_line::tokens;
use crate::request::assessment::ProviderSignal;
use crate::request::context::{Context, Line};
use crate::request::exchange::ExchangeSummary;
use crate::request::failures::describe_trouble;
use crate::request::outcome::{AttemptOutcome, FinalAnswer, milliseconds};
use crate::schedule::breaker::{Breaker, FailureKind, FailureVerdict};
use crate::schedule::retry_queue::RetryState;
use crate::spans::Attempted;

/// Steps of an attempt that have ended with an answer, or with the adapter's request to retry.
pub(super) struct EndedSteps<'a> {
    /// Request of the attempt.
    pub line: Line<'a>,
    /// Plugin of the attempt.
    pub plugin: Arc<Plugin>,
    /// Entry of the plugin file that names the model.
    pub listed: Arc<str>,
    /// Contexts of the attempt and of its request, if they are traced.
    pub contexts: Option<(TraceContext, TraceContext)>,
    /// Breaker of the plugin.
    pub breaker: &'a Breaker,
    /// True if the attempt was the half-open probe of the breaker.
    pub is_probe: bool,
    /// Summary of the last exchange, or `None` if nothing was sent.
    pub sent: Option<ExchangeSummary>,
    /// Time since the first send.
    pub duration: Duration,
    /// State of a job at the provider.
    pub job: Option<Vec<u8>>,
    /// True if the store has the job state.
    pub job_is_kept: bool,
    /// Memory that covers the answer.
    pub reservation: Reservation,
    /// Pause before the retry that the adapter asks for, or `None` if it asks for no retry.
    pub retry: Option<Option<Duration>>,
    /// Answer, which is used if there is no retry.
    pub answer: Answer,
}

impl EndedSteps<'_> {
    /// Returns the longer one of the pauses that the adapter and the provider ask for.
    fn delay(&self) -> Option<Duration> {
        self.retry.flatten().max(self.sent.as_ref().and_then(|sent| sent.assessment.hints.delay))
    }

    /// Ends the request with the answer.
    fn into_answer(self) -> AttemptOutcome {
        AttemptOutcome::Answered(FinalAnswer {
            answer: self.answer,
            by: Some(self.plugin),
            reservation: Some(self.reservation),
            metered: None,
        })
    }
}

impl Context {
    /// Draws the conclusions from the steps of an attempt.
    pub(super) async fn conclude(
        &self,
        ended: EndedSteps<'_>,
        mut retry_state: RetryState,
    ) -> AttemptOutcome {
        let signal = self.conclude_job(&ended, &mut retry_state).await;
        let sent = ended.sent.as_ref().map(|sent| sent.assessment.signal);
        if let Some(signal) = sent {
            self.record_attempt(&ended, signal);
        }
        let plugin = ended.plugin.clone();
        let outcome = self.conclude_as(signal, ended, retry_state);
        if let Some(signal) = sent {
            let is_retried = matches!(outcome, AttemptOutcome::Retry(..));
            self.metrics.attempted(plugin.name(), signal.as_str(), is_retried);
        }
        outcome
    }

    /// Records the span of an attempt, and its tokens.
    fn record_attempt(&self, ended: &EndedSteps<'_>, signal: ProviderSignal) {
        let (status, usage) = match &ended.answer {
            Answer::Response(response) => (Some(response.status), response.usage.map(tokens)),
            Answer::Failure(_) => (None, None),
        };
        self.spans.attempted(&Attempted {
            contexts: ended.contexts,
            began: trace::ago(ended.duration),
            duration: ended.duration,
            plugin: ended.plugin.name(),
            provider: &ended.plugin.description().name,
            model: &ended.listed,
            endpoint: self.endpoint,
            verdict: signal.as_str(),
            status,
            usage: usage.unwrap_or_default(),
        });
    }

    /// Draws the conclusions from what the provider has signaled.
    fn conclude_as(
        &self,
        signal: ProviderSignal,
        ended: EndedSteps<'_>,
        mut retry_state: RetryState,
    ) -> AttemptOutcome {
        match (signal, ended.retry) {
            (
                ProviderSignal::Failure(
                    kind @ (FailureKind::Unauthorized
                    | FailureKind::Forbidden
                    | FailureKind::Quota
                    | FailureKind::Unreachable),
                ),
                _,
            ) => self.conclude_refusal(ended, kind, retry_state),
            (ProviderSignal::RateLimited, Some(_)) => self.conclude_rate_limit(&ended, retry_state),
            (ProviderSignal::Failure(_) | ProviderSignal::NoResponse, Some(_)) => {
                self.conclude_failure(ended, signal, retry_state)
            }
            (
                ProviderSignal::TransientError | ProviderSignal::Answered | ProviderSignal::NotSent,
                Some(_),
            ) => {
                if signal != ProviderSignal::NotSent {
                    self.origin().record_success(ended.breaker, &ended.plugin);
                }
                retry_state.answered = retry_state.answered.saturating_add(1);
                self.retry_or_answer(ended, retry_state, None)
            }
            (
                ProviderSignal::NotSent | ProviderSignal::NoResponse | ProviderSignal::Failure(_),
                None,
            ) => ended.into_answer(),
            (
                ProviderSignal::Answered
                | ProviderSignal::RateLimited
                | ProviderSignal::TransientError,
                None,
            ) => {
                if ended.sent.is_some() {
                    self.origin().record_success(ended.breaker, &ended.plugin);
                }
                ended.into_answer()
            }
        }
    }

    /// Keeps or forgets the job of the request, and returns what the provider has signaled.
    async fn conclude_job(
        &self,
        ended: &EndedSteps<'_>,
        retry_state: &mut RetryState,
    ) -> ProviderSignal {
        let sent = ended.sent.as_ref();
        let signal = sent.map_or(ProviderSignal::Answered, |sent| sent.assessment.signal);
        let is_retried = ended.retry.is_some();
        let Some(state) = &ended.job else { return signal };
        if matches!(signal, ProviderSignal::Failure(_))
            || is_retried && signal != ProviderSignal::Answered
        {
            // The poll has failed and not the job. A repeated poll costs nothing, while a line that
            // the breaker holds back without its job would submit and pay for a second one.
            if !ended.job_is_kept {
                let (number, plugin) = (ended.line.number, &ended.plugin);
                self.jobs.insist(number, plugin, state, &self.clock, &self.leave).await;
            }
            retry_state.has_job = true;
            if signal == ProviderSignal::NoResponse {
                return ProviderSignal::TransientError;
            }
        } else if is_retried {
            // The adapter asks for a new job.
            retry_state.has_job = false;
            self.jobs.forget(ended.line.number).await;
        }
        signal
    }

    /// Concludes an attempt that the provider has refused, by the fault of either side.
    fn conclude_refusal(
        &self,
        ended: EndedSteps<'_>,
        kind: FailureKind,
        mut retry_state: RetryState,
    ) -> AttemptOutcome {
        let refused_at = retry_state.refused_at.replace(ended.breaker.successes());
        match self.record_ended(&ended, kind, refused_at, &mut retry_state) {
            FailureVerdict::Hold(until) => AttemptOutcome::Retry(until, retry_state),
            FailureVerdict::Wait(until) => {
                AttemptOutcome::Retry(until, RetryState { waits: true, ..retry_state })
            }
            FailureVerdict::LineAtFault => ended.into_answer(),
        }
    }

    /// Concludes an attempt that the provider has refused for now because of its limits.
    fn conclude_rate_limit(
        &self,
        ended: &EndedSteps<'_>,
        retry_state: RetryState,
    ) -> AttemptOutcome {
        self.origin().record_success(ended.breaker, &ended.plugin);
        let delay = ended.delay();
        tracing::debug!(
            tenant = %self.tenant,
            batch = %self.batch,
            request = ended.line.id,
            plugin = ended.plugin.name(),
            delay_ms = delay.map(milliseconds),
            "request refused by the provider"
        );
        let pause = with_jitter(refusal_pause(retry_state.refusals.number));
        let at = self.clock.now().after(pause.max(delay.unwrap_or_default()));
        AttemptOutcome::Retry(at, retry_state)
    }

    /// Concludes an attempt that the provider has failed or not answered.
    fn conclude_failure(
        &self,
        ended: EndedSteps<'_>,
        signal: ProviderSignal,
        mut retry_state: RetryState,
    ) -> AttemptOutcome {
        if signal == ProviderSignal::NoResponse {
            retry_state.unanswered = retry_state.unanswered.saturating_add(1);
        } else {
            retry_state.answered = retry_state.answered.saturating_add(1);
        }
        let verdict = self.record_ended(&ended, FailureKind::Failed, None, &mut retry_state);
        let waits = match verdict {
            FailureVerdict::Wait(until) => Some(until),
            FailureVerdict::Hold(_) | FailureVerdict::LineAtFault => None,
        };
        self.retry_or_answer(ended, retry_state, waits)
    }

    /// Records a failure of the provider and the failed attempts of the line.
    fn record_ended(
        &self,
        ended: &EndedSteps<'_>,
        kind: FailureKind,
        refused_at: Option<u64>,
        retry_state: &mut RetryState,
    ) -> FailureVerdict {
        let EndedSteps { line, plugin, breaker, is_probe, .. } = ended;
        let trouble = describe_trouble(kind, &ended.answer, ended.sent.as_ref());
        let (origin, line) = (self.origin(), (line.id, line.mark));
        let verdict = origin.record_failure(breaker, line, plugin, refused_at, trouble, *is_probe);
        retry_state.outage_failures = breaker.failed_attempts(line.1);
        verdict
    }

    /// Returns the next attempt of a request, or its answer if no attempt is left.
    ///
    /// The backoff is at least the delay that was asked for, and lasts at least until `waits`.
    fn retry_or_answer(
        &self,
        ended: EndedSteps<'_>,
        mut retry_state: RetryState,
        waits: Option<Timestamp>,
    ) -> AttemptOutcome {
        let attempts = retry_state.answered.saturating_add(retry_state.unanswered);
        let pause = self.backoff(attempts).max(ended.delay().unwrap_or_default());
        retry_state.spent = retry_state.spent.saturating_add(ended.duration).saturating_add(pause);
        let limits = &self.config.execution;
        let is_exhausted = attempts as usize >= limits.max_attempts.get()
            || retry_state.unanswered as usize >= limits.max_unanswered_attempts.get()
            || retry_state.spent > limits.max_retry_time.duration();
        tracing::debug!(
            tenant = %self.tenant,
            batch = %self.batch,
            attempts,
            delay_ms = milliseconds(pause),
            is_exhausted,
            "attempt failed"
        );
        if is_exhausted {
            return ended.into_answer();
        }
        let at = self.clock.now().after(pause);
        AttemptOutcome::Retry(waits.map_or(at, |until| until.max(at)), retry_state)
    }

    /// Returns an exponential backoff with jitter.
    fn backoff(&self, attempt: u32) -> Duration {
        let doubled = 2_u32.saturating_pow(attempt.saturating_sub(1));
        let max = self.config.execution.max_retry_backoff.duration();
        let pause = self.config.execution.retry_backoff.duration().saturating_mul(doubled);
        with_jitter(pause.min(max))
    }
}

/// Removes up to half of a pause at random, so that requests that failed together are not retried
/// together.
fn with_jitter(pause: Duration) -> Duration {
    pause.mul_f64(0.5 + fastrand::f64() / 2.0)
}
