//! Exchanges of one attempt with a provider: the permit, the memory and the calls of the adapter.
//!
//! The memory reservation covers the body of the request, the response and the answer. If the
//! output of the adapter exceeds it, the output is dropped, the reservation waits for room, and the
//! call is repeated. A call is a pure function, so a second output that is larger is an error.

use batchwright_domain::clock::{Clock, Timestamp};
use batchwright_domain::ids::TenantId;
use batchwright_egress::{
    Events, HttpRequest, HttpResponse, Permit, RateLimitHints, Received, Refusals, TransportError,
    TransportErrorKind,
};
use batchwright_memory::Reservation;
use batchwright_plugin::types::{Answer, Classification, Outcome, Request, Response, Step};
use batchwright_plugin::{CallError, Plugin};
use batchwright_telemetry::Context;

use crate::formats::server_event;
use crate::request::assessment::{Assessment, CLASSIFY_BODY_BYTES, ProviderSignal};
use crate::schedule::quotas::Hold;

/// Summary of the last exchange of an attempt.
pub(crate) struct ExchangeSummary {
    /// Verdict about the provider.
    pub assessment: Assessment,
    /// Error for the operator, if there was no response.
    pub detail: Option<String>,
    /// Kind of that error.
    pub fault: Option<TransportErrorKind>,
}

/// State of one attempt at a provider.
pub(crate) struct Exchange<'a> {
    /// Plugin that adapts the provider.
    pub plugin: &'a Plugin,
    /// Permit of the provider, or `None` while the attempt waits.
    pub permit: Option<Permit>,
    /// True if the next exchange need not wait for `requests_per_minute`, because the attempt has
    /// waited for it with its permit.
    pub has_rate_permit: bool,
    /// Reservation of what the project may send.
    pub hold: Option<Hold>,
    /// Memory that the attempt has reserved.
    pub reservation: Reservation,
    /// Summary of the last exchange.
    pub last: Option<ExchangeSummary>,
    /// Time of the first send. Waits before it do not count against the request.
    pub sent_at: Option<Timestamp>,
    /// State of a job at the provider, as the adapter wrote it.
    pub job: Option<Vec<u8>>,
    /// True if the store has the job state.
    pub job_is_kept: bool,
    /// Refusals of the request so far.
    pub refusals: Refusals,
    /// Context that the provider gets; none if nothing is traced.
    pub trace: Option<Context>,
}

/// Returns true if the classification of the adapter may change the verdict.
///
/// Some providers send an error with status 200. Such a response is short.
fn may_be_error(response: &HttpResponse, assessment: &Assessment) -> bool {
    assessment.signal != ProviderSignal::Answered
        || (response.body.len() < CLASSIFY_BODY_BYTES
            && memchr::memmem::find(&response.body, b"\"error\"").is_some())
}

/// Header with the context of a request, of W3C Trace Context.
const TRACE_HEADER: &str = "traceparent";

/// Beginning of a stream.
enum First {
    /// First event that is no comment, with the comments before it.
    Event(Vec<u8>),
    /// First event that is an error, as the body of a response.
    Error(Vec<u8>),
    /// The stream has ended.
    Nothing,
}

/// Maximum size of the comments before the first event of a stream.
const MAX_COMMENT_BYTES: usize = 64 << 10;

/// Returns the beginning of a stream. Some providers send comments until they know more.
async fn first_event(
    events: &mut Events,
    reservation: &mut Reservation,
) -> Result<First, TransportError> {
    let mut comments = Vec::new();
    while let Some(event) = events.next(reservation).await? {
        if let Some(error) = server_event::error_of(&event) {
            return Ok(First::Error(error));
        }
        let is_comment = matches!(server_event::parse(&event), server_event::Event::Other);
        comments.extend(event);
        if !is_comment || comments.len() > MAX_COMMENT_BYTES {
            return Ok(First::Event(comments));
        }
    }
    Ok(First::Nothing)
}

impl<'a> Exchange<'a> {
    /// Creates the state of an attempt that has sent nothing.
    pub(crate) fn new(plugin: &'a Plugin, tenant: &TenantId, refusals: Refusals) -> Self {
        Self {
            plugin,
            permit: None,
            has_rate_permit: false,
            hold: None,
            reservation: plugin.gateway().reservation(tenant),
            last: None,
            sent_at: None,
            job: None,
            job_is_kept: false,
            refusals,
            trace: None,
        }
    }

    /// Calls `begin` of the adapter and returns the first step.
    ///
    /// If the step does not fit into the reservation, waits for room and repeats the call.
    pub(crate) async fn begin(
        &mut self,
        tenant: &TenantId,
        request: impl Fn() -> Request,
    ) -> Result<Step, CallError> {
        let step = self.plugin.begin(tenant, &request).await?;
        let Err(bytes) = self.try_reserve(&step, 0) else { return Ok(step) };
        drop(step);
        self.reservation.grow_to(bytes).await;
        let step = self.plugin.begin(tenant, &request).await?;
        self.try_reserve(&step, 0).map_err(|_| self.not_deterministic("begin"))?;
        Ok(step)
    }

    /// Grows the reservation to cover a step and `retained` bytes, without a wait.
    ///
    /// The error is the required size of the reservation.
    fn try_reserve(&mut self, step: &Step, retained: usize) -> Result<(), usize> {
        let step_bytes = match step {
            Step::Send { request, .. } => request.body.len(),
            // The result line is a copy of the body.
            Step::Done(Answer::Response(response)) => response.body.len().saturating_mul(2),
            Step::Done(Answer::Failure(_)) | Step::Wait { .. } | Step::Retry { .. } => 0,
        };
        let bytes = retained.saturating_add(step_bytes);
        if self.reservation.try_grow_to(bytes) { Ok(()) } else { Err(bytes) }
    }

    /// Performs an exchange and records the verdict about the provider.
    pub(crate) async fn send(
        &mut self,
        tenant: &TenantId,
        mut request: HttpRequest,
        clock: &Clock,
    ) -> Outcome {
        self.begin_send(clock).await;
        self.pass_trace(&mut request);
        let Some(permit) = &mut self.permit else { return Outcome::Elapsed };
        let gateway = self.plugin.gateway();
        let outcome = match gateway.send(tenant, request, permit, &mut self.reservation).await {
            Ok(response) => {
                gateway.record_response_size(response.body.len());
                Outcome::Response(response)
            }
            Err(error) => Outcome::Error(error),
        };
        self.assess(tenant, &outcome, clock).await;
        outcome
    }

    /// Performs an exchange like [`Self::send`], and returns a stream of events once its first
    /// event has arrived and is no error.
    pub(crate) async fn send_for_events(
        &mut self,
        tenant: &TenantId,
        mut request: HttpRequest,
        clock: &Clock,
    ) -> Result<(Events, Vec<u8>), Outcome> {
        self.begin_send(clock).await;
        self.pass_trace(&mut request);
        let Some(permit) = &mut self.permit else { return Err(Outcome::Elapsed) };
        let gateway = self.plugin.gateway();
        let reservation = &mut self.reservation;
        let received = gateway.send_for_events(tenant, request, permit, reservation).await;
        let outcome = match received {
            Ok(Received::Whole(response)) => Outcome::Response(response),
            Err(error) => Outcome::Error(error),
            Ok(Received::Events(mut events)) => {
                let (status, headers) = (events.status, std::mem::take(&mut events.headers));
                let response =
                    |headers, body| Outcome::Response(HttpResponse { status, headers, body });
                match first_event(&mut events, &mut self.reservation).await {
                    Ok(First::Event(event)) => {
                        permit.begin_stream();
                        let hints = RateLimitHints::of(&headers, clock.now());
                        if let Some(left) = hints.left {
                            gateway.update_remaining(permit, left);
                        }
                        let outcome = response(headers, Vec::new());
                        let assessment = Assessment::of(&outcome, hints, None);
                        self.last = Some(ExchangeSummary { assessment, detail: None, fault: None });
                        return Ok((events, event));
                    }
                    Ok(First::Error(error)) => response(headers, error),
                    Ok(First::Nothing) => response(headers, Vec::new()),
                    Err(error) => Outcome::Error(error),
                }
            }
        };
        self.assess(tenant, &outcome, clock).await;
        Err(outcome)
    }

    /// Adds the context of the attempt to a request.
    fn pass_trace(&self, request: &mut HttpRequest) {
        let Some(context) = self.trace else { return };
        request.headers.retain(|(name, _)| !name.eq_ignore_ascii_case(TRACE_HEADER));
        request.headers.push((TRACE_HEADER.to_owned(), context.traceparent()));
    }

    /// Waits for `requests_per_minute` if the attempt has not done so, and starts the time.
    async fn begin_send(&mut self, clock: &Clock) {
        if !std::mem::take(&mut self.has_rate_permit) {
            let asked_at = clock.now();
            self.plugin.gateway().rate_limit_ready_again().await;
            // The wait does not count against the request.
            let waited = asked_at.until(clock.now());
            self.sent_at = self.sent_at.map(|sent_at| sent_at.after(waited));
        }
        if let Some(permit) = &mut self.permit {
            permit.start();
            self.sent_at.get_or_insert_with(|| clock.now());
        }
    }

    /// Records what an outcome says about the provider.
    async fn assess(&mut self, tenant: &TenantId, outcome: &Outcome, clock: &Clock) {
        let hints = match outcome {
            Outcome::Response(response) => RateLimitHints::of(&response.headers, clock.now()),
            Outcome::Error(_) | Outcome::Elapsed => RateLimitHints::default(),
        };
        let (detail, fault) = match outcome {
            Outcome::Error(error) => Some((error.detail().to_owned(), error.fault)).unzip(),
            Outcome::Response(_) | Outcome::Elapsed => (None, None),
        };
        let mut assessment = Assessment::of(outcome, hints, None);
        if let Outcome::Response(response) = outcome
            && let Ok(Some(known)) = self.classify(tenant, response, &assessment).await
        {
            assessment = Assessment::of(outcome, hints, Some(known));
        }
        if let Some(permit) = &mut self.permit {
            permit.finish(assessment.limit_feedback(), &mut self.refusals);
            if let Some(left) = assessment.hints.left {
                self.plugin.gateway().update_remaining(permit, left);
            }
        }
        self.last = Some(ExchangeSummary { assessment, detail, fault });
    }

    /// Calls `classify` of the adapter, or returns `None` without a call.
    ///
    /// Ordinary responses are only sampled, for the limits that the provider reports.
    async fn classify(
        &self,
        tenant: &TenantId,
        response: &HttpResponse,
        assessment: &Assessment,
    ) -> Result<Option<Classification>, CallError> {
        let may_be_error = may_be_error(response, assessment);
        if !self.plugin.classifies(may_be_error) {
            return Ok(None);
        }
        Box::pin(self.plugin.classify(tenant, response)).await.map(Some)
    }

    /// Calls `resume` of the adapter with an outcome and returns the next step.
    ///
    /// If the step does not fit into the reservation, waits for room and repeats the call.
    pub(crate) async fn resume(
        &mut self,
        tenant: &TenantId,
        state: &[u8],
        outcome: &mut Outcome,
    ) -> Result<Step, CallError> {
        let retained = match &*outcome {
            Outcome::Response(response) => response.body.len(),
            Outcome::Error(_) | Outcome::Elapsed => 0,
        };
        let step = self.plugin.resume(tenant, state, outcome).await?;
        let Err(bytes) = self.try_reserve(&step, retained) else { return Ok(step) };
        drop(step);
        self.reservation.grow_to(bytes).await;
        let step = self.plugin.resume(tenant, state, outcome).await?;
        self.try_reserve(&step, retained).map_err(|_| self.not_deterministic("resume"))?;
        Ok(step)
    }

    /// Records the size of an answer and logs the request id of the provider.
    pub(crate) fn record_answer(&self, answer: &Answer, id: &str) {
        let Answer::Response(response) = answer else { return };
        self.plugin.gateway().record_response_size(response.body.len());
        let Response { status, request_id, .. } = response;
        if let Some(provider_request_id) = request_id {
            tracing::debug!(
                request = id,
                plugin = self.plugin.name(),
                status,
                provider_request_id,
                "request answered"
            );
        }
    }

    /// Creates the error of an attempt with too many steps.
    pub(crate) fn too_many_steps(&self) -> CallError {
        let message = format!(
            "an attempt takes more than {} steps; the limit is [limits] max_steps.",
            self.plugin.limits().max_steps
        );
        self.plugin.contract_violation("resume", message)
    }

    /// Creates the error of a repeated call that returned a larger step.
    fn not_deterministic(&self, function: &'static str) -> CallError {
        let message = "it returns different results for the same call.".into();
        self.plugin.contract_violation(function, message)
    }
}
