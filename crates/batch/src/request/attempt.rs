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

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use batchwright_domain::clock::Timestamp;
use batchwright_egress::NoCredential;
use batchwright_plugin::types::Request;
use batchwright_plugin::{Plugin, Route, Snapshot};
use batchwright_telemetry::trace;

use crate::metrics::Source;
use crate::request::conclusion::EndedSteps;
use crate::request::context::{Context, DEFER_THRESHOLD, Line};
use crate::request::exchange::Exchange;
use crate::request::outcome::{AttemptOutcome, FinalAnswer, Metered, error_of, failure, identity};
use crate::request::steps::StepOutcome;
use crate::schedule::breaker::{Breaker, BreakerDecision, FailureKind, Probe};
use crate::schedule::quotas::{Hold, QUOTA_RETRY_INTERVAL};
use crate::schedule::retry_queue::RetryState;
use crate::spans::Ended;

impl Context {
    /// Makes one attempt at a request. Returns its outcome, with the entry of the plugin file that
    /// names the model.
    pub(crate) async fn attempt(
        &self,
        line: Line<'_>,
        mut retry_state: RetryState,
    ) -> (Option<Arc<str>>, AttemptOutcome) {
        retry_state.waits = false;
        let began = *retry_state.began.get_or_insert_with(|| self.clock.now());
        // Looked up at each attempt, because the operator may have fixed the plugin meanwhile.
        let plugins = self.registry.current();
        let route = plugins.route(&self.tenant, line.model);
        let Some(route) = route.filter(|route| route.plugin.handles(self.endpoint)) else {
            return (None, self.missing_plugin(line, retry_state));
        };
        let (plugin, listed) = (route.plugin.clone(), route.listed.clone());
        let outcome = self.attempt_at(route, plugins, line, retry_state).await;
        if let AttemptOutcome::Answered(FinalAnswer { answer, .. }) = &outcome {
            let time = began.until(self.clock.now());
            self.metrics.request_took(Source::Batch, plugin.name(), self.endpoint, time);
            if let Some(context) = self.spans.request(line.id) {
                self.spans.ended(Ended {
                    context,
                    parent: None,
                    line: Some((&self.batch, line.number)),
                    id: line.id,
                    began: trace::ago(time),
                    tenant: &self.tenant,
                    plugin: plugin.name(),
                    model: &listed,
                    endpoint: self.endpoint,
                    error: error_of(answer),
                });
            }
        }
        (Some(listed), outcome)
    }

    /// Makes one attempt at a request at the plugin of a route.
    async fn attempt_at(
        &self,
        Route { plugin, model, listed }: Route,
        plugins: Arc<Snapshot>,
        line: Line<'_>,
        mut retry_state: RetryState,
    ) -> AttemptOutcome {
        let breaker = self.breaker_of(&plugin);
        if let Some(outcome) = self.without_credential(&breaker, &plugin, line, retry_state).await {
            return outcome;
        }
        let probe = match self.enter(&breaker, &plugin, line, retry_state) {
            ControlFlow::Continue(probe) => probe,
            ControlFlow::Break(outcome) => return outcome,
        };
        let contexts = self.spans.request(line.id);
        let contexts = contexts.and_then(|request| Some((self.spans.attempt(request)?, request)));
        let mut exchange = Exchange::new(&plugin, &self.tenant, retry_state.refusals);
        exchange.trace = contexts.map(|(attempt, _)| attempt);
        if !self.load_job(&mut exchange, line, retry_state.has_job).await {
            return AttemptOutcome::Retry(self.clock.now().after(DEFER_THRESHOLD), retry_state);
        }
        // Before the wait for the provider, so that a project at its limit takes nothing of it.
        match self.reserve(&exchange, line, &model).await {
            Ok(hold) => exchange.hold = Some(hold),
            Err(until) => {
                return AttemptOutcome::Retry(until, RetryState { waits: true, ..retry_state });
            }
        }
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
        let outcome = self.run_steps(&mut exchange, (line, &model), &request, may_send).await;
        retry_state.refusals = exchange.refusals;
        let outcome = match outcome {
            Ok(outcome) => outcome,
            Err(error) => {
                if let Some(sent) = &exchange.last {
                    let verdict = sent.assessment.signal.as_str();
                    self.metrics.attempted(plugin.name(), verdict, false);
                }
                return AttemptOutcome::Answered(FinalAnswer {
                    answer: failure(error.code(), error.to_string()),
                    by: Some(plugin.clone()),
                    reservation: Some(exchange.reservation),
                    metered: None,
                });
            }
        };
        let metered = exchange.hold.take().map(|hold| Metered { model: model.into(), hold });
        let again = |until, state| AttemptOutcome::Retry(until, state);
        let (retry, answer) = match outcome {
            StepOutcome::Stopped => return AttemptOutcome::Stopped,
            StepOutcome::Postponed(until) => {
                return self.settle(line, again(until, retry_state), metered);
            }
            StepOutcome::Polling(until) => {
                let polled = RetryState { has_job: true, ..retry_state };
                return self.settle(line, again(until, polled), metered);
            }
            StepOutcome::Done(answer) => (None, answer),
            StepOutcome::Retry(after, otherwise) => (Some(after), otherwise),
        };
        let duration =
            exchange.sent_at.map_or(Duration::ZERO, |sent_at| sent_at.until(self.clock.now()));
        let ended = EndedSteps {
            line,
            plugin: plugin.clone(),
            listed,
            contexts,
            breaker: &breaker,
            is_probe: probe.is_some(),
            sent: exchange.last,
            duration,
            job: exchange.job,
            job_is_kept: exchange.job_is_kept,
            reservation: exchange.reservation,
            retry,
            answer,
        };
        let outcome = self.conclude(ended, retry_state).await;
        self.settle(line, outcome, metered)
    }

    /// Returns the outcome of an attempt without a credential of the project; none if there is one.
    async fn without_credential(
        &self,
        breaker: &Arc<Breaker>,
        plugin: &Arc<Plugin>,
        line: Line<'_>,
        retry_state: RetryState,
    ) -> Option<AttemptOutcome> {
        let Err(NoCredential(detail)) = plugin.gateway().check_credential(&self.tenant).await
        else {
            breaker.credential_found();
            return None;
        };
        let message = "The provider has no credential for this project.";
        let detail = format!(
            "The plugin `{}` has no credential for the project `{}`: {detail}.",
            plugin.name(),
            self.tenant
        );
        let trouble = (FailureKind::Credential, message, detail.as_str());
        Some(self.blocked_by_plugin(breaker, line, retry_state, trouble, identity(plugin)))
    }

    /// Reserves what a request may use of the quota of its project, or returns the time of the next
    /// attempt.
    ///
    /// A job that the provider has begun is paid for, and continues.
    async fn reserve(
        &self,
        exchange: &Exchange<'_>,
        line: Line<'_>,
        model: &str,
    ) -> Result<Hold, Timestamp> {
        if let Err(error) = self.quota.refresh().await {
            tracing::error!(tenant = %self.tenant, %error, "limits not read");
            return Err(self.clock.now().after(QUOTA_RETRY_INTERVAL));
        }
        let size = (model, line.body.len());
        if exchange.job.is_some() {
            return Ok(self.quota.resume_job(&self.batch, line.number, size));
        }
        self.quota
            .reserve((model, line.body.len()), true)
            .map_err(|blocked| self.quota.set_blocked(&self.batch, blocked))
    }

    /// Keeps the reservation of a request that is polled again, and gives that of another retry
    /// back.
    fn settle(
        &self,
        line: Line<'_>,
        outcome: AttemptOutcome,
        metered: Option<Metered>,
    ) -> AttemptOutcome {
        match outcome {
            AttemptOutcome::Answered(answer) => {
                AttemptOutcome::Answered(FinalAnswer { metered, ..answer })
            }
            AttemptOutcome::Retry(at, state) => {
                if let Some(metered) = metered.filter(|_| state.has_job) {
                    self.quota.keep_job(&self.batch, line.number, metered.hold);
                }
                AttemptOutcome::Retry(at, state)
            }
            AttemptOutcome::Stopped => AttemptOutcome::Stopped,
        }
    }

    /// Returns the breaker of a plugin.
    fn breaker_of(&self, plugin: &Plugin) -> Arc<Breaker> {
        let known = self.breakers.iter().find(|(name, _)| *name == plugin.name());
        known.map_or_else(
            || self.breaker_registry.of(plugin.name(), &self.tenant, self.endpoint),
            |(_, breaker)| breaker.clone(),
        )
    }

    /// Decides whether the attempt may go on, and returns the guard of a half-open probe if it is
    /// one; breaks with the outcome of the attempt otherwise.
    fn enter(
        &self,
        breaker: &Arc<Breaker>,
        plugin: &Arc<Plugin>,
        line: Line<'_>,
        retry_state: RetryState,
    ) -> ControlFlow<AttemptOutcome, Option<Probe>> {
        if plugin.routing().paused {
            let message = "The provider is paused by the operator.";
            let detail = format!("The plugin `{}` is paused by the operator.", plugin.name());
            let trouble = (FailureKind::Plugin, message, detail.as_str());
            let outcome = self.blocked_by_plugin(breaker, line, retry_state, trouble, 0);
            return ControlFlow::Break(outcome);
        }
        let (decision, probe) = breaker.enter(self.clock.now(), identity(plugin));
        ControlFlow::Break(match decision {
            BreakerDecision::Allow | BreakerDecision::Probe => return ControlFlow::Continue(probe),
            BreakerDecision::Wait(until) => {
                AttemptOutcome::Retry(until, RetryState { waits: true, ..retry_state })
            }
            BreakerDecision::GiveUp(answer) => AttemptOutcome::Answered(FinalAnswer {
                answer,
                by: Some(plugin.clone()),
                reservation: None,
                metered: None,
            }),
        })
    }

    /// Loads the state of a job of the request, and returns false if it cannot be read: a new job
    /// would be paid for twice.
    async fn load_job(&self, exchange: &mut Exchange<'_>, line: Line<'_>, known: bool) -> bool {
        match self.jobs.of(line.number, exchange.plugin, known).await {
            Ok(job) => {
                exchange.job_is_kept = job.is_some();
                exchange.job = job;
                true
            }
            Err(error) => {
                tracing::error!(
                    tenant = %self.tenant,
                    batch = %self.batch,
                    request = line.id,
                    line = line.number,
                    plugin = exchange.plugin.name(),
                    %error,
                    "job state read failed"
                );
                false
            }
        }
    }
}
