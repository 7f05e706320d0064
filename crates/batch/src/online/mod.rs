//! Online requests: one request, answered while its client waits.
//!
//! **One path.** An online request passes the same validators, limits, credentials, breakers and
//! fair queue as a line of a batch, and the same adapter translates it. What differs is time: a
//! client waits, so nothing is retried and no limit is waited for. The client learns when to try
//! again, and the official SDKs do so.
//!
//! **Paid for once.** What a provider has answered reaches the client, whatever else fails. A
//! failure that the provider may have charged for tells the SDKs not to retry. The key that makes
//! a retry of a client safe becomes the provider's: the id of the request is derived from it.
//!
//! **Usage.** The usage of a request is committed before the end of its answer is sent. A client
//! that leaves is charged for what was seen; see [`metering`].
//!
//! **A client that leaves.** Its future is dropped, and with it the exchange and the connection to
//! the provider.

mod body;
mod check;
mod count;
mod error;
mod metering;
mod scrub;
mod stream;

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use batchwright_domain::clock::{Clock, Timestamp};
use batchwright_domain::endpoint::Endpoint;
use batchwright_domain::error_code::ErrorCode;
use batchwright_domain::ids::{KeyId, TenantId};
use batchwright_domain::usage::TokenUsage;
use batchwright_egress::{NoCredential, Permit, QueueId, Refusals, TransportErrorKind};
use batchwright_memory::Reservation;
use batchwright_plugin::types::{Answer, Outcome, Request, Response, Step};
use batchwright_plugin::{CallError, Plugin, Registry};
use batchwright_store::{Store, StoreError};
use batchwright_telemetry::Context;
use batchwright_tenancy::quota::{Blocked, Standing};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::Config;
use crate::formats::result_line::tokens;
use crate::metrics::EngineMetrics;
use crate::online::count::{RequestCount, RequestFacts};
pub use crate::online::error::OnlineError;
use crate::online::metering::Metering;
pub use crate::online::stream::OnlineStream;
use crate::parts::{Parts, Shared};
use crate::request::assessment::ProviderSignal;
use crate::request::exchange::Exchange;
use crate::request::failures::{Origin, describe_trouble};
use crate::request::outcome::{failure, identity};
use crate::schedule::breaker::{Breaker, BreakerDecision, FailureKind, FailureVerdict, Probe};
use crate::schedule::breakers::Breakers;
use crate::schedule::gate::Gate;
use crate::schedule::quotas::{Quotas, TenantQuota};
use crate::spans::Spans;

/// Time after which a client may try again when nothing better is known.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);

/// Online request of a client.
#[derive(Debug)]
pub struct OnlineRequest {
    /// Tenant.
    pub tenant: TenantId,
    /// Key that the request was sent with.
    pub key: Option<KeyId>,
    /// Endpoint.
    pub endpoint: Endpoint,
    /// JSON text of the body.
    pub body: String,
    /// Key that makes a retry of the request safe.
    pub idempotency_key: Option<String>,
    /// Id of the request in the log.
    pub log_id: String,
    /// Id that the client gives to the request, for the log.
    pub client_id: Option<String>,
    /// Span of the client that the request belongs to.
    pub trace: Option<Context>,
}

/// Answer to an online request.
pub enum OnlineAnswer {
    /// Whole response of the provider.
    Whole {
        /// Status.
        status: u16,
        /// JSON object.
        body: String,
        /// Time after which the provider allows another attempt.
        retry_after: Option<Duration>,
        /// Memory of the body.
        reservation: Reservation,
    },
    /// Stream of events.
    Stream(Box<OnlineStream>),
}

/// Answer or error, with the standing of the project's limits for the model.
pub struct Answered {
    /// Limits of the model and what is left of them; none if the model is unknown.
    pub standing: Option<Standing>,
    /// Answer or error.
    pub result: Result<OnlineAnswer, OnlineError>,
}

/// Answers online requests.
pub struct Online {
    store: Arc<dyn Store>,
    registry: Arc<Registry>,
    clock: Clock,
    config: Arc<Config>,
    breakers: Arc<Breakers>,
    quotas: Arc<Quotas>,
    metrics: Arc<EngineMetrics>,
    spans: Spans,
    gate: Gate,
    closing: CancellationToken,
    /// Cancelled when the requests in flight must end.
    ended: CancellationToken,
    /// Writes of usage, and requests whose usage is not counted yet.
    tasks: TaskTracker,
}

/// Maximum time for the usage of requests to be written after they were ended.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// Request that may be sent.
struct Admitted<'a> {
    request: &'a OnlineRequest,
    /// Id of the request.
    id: String,
    /// Model as the provider knows it.
    provider_model: String,
    /// What the request is counted by.
    facts: Arc<RequestFacts>,
    plugin: Arc<Plugin>,
    /// Body to send.
    body: String,
    /// True for a stream.
    is_stream: bool,
    wants_usage: bool,
    breaker: Arc<Breaker>,
    quota: Arc<TenantQuota>,
}

/// How the steps of an adapter have ended.
enum Ended {
    /// With an answer, and the pause that the adapter asks for before another attempt.
    Answer(Answer, Option<Duration>),
    /// With a stream, whose first event has arrived.
    Stream(batchwright_egress::Events, Vec<u8>),
}

impl Online {
    pub(crate) fn new(
        parts: &Parts,
        shared: &Shared,
        breakers: Arc<Breakers>,
        quotas: Arc<Quotas>,
    ) -> Self {
        Self {
            store: parts.store.clone(),
            registry: parts.registry.clone(),
            clock: parts.clock.clone(),
            config: parts.config.clone(),
            breakers,
            quotas,
            metrics: shared.metrics.clone(),
            spans: shared.spans.clone(),
            gate: shared.gate.clone(),
            closing: shared.closing.clone(),
            ended: CancellationToken::new(),
            tasks: TaskTracker::new(),
        }
    }

    /// Ends the requests in flight, and waits until their usage is counted.
    pub(crate) async fn end(&self) {
        self.ended.cancel();
        self.tasks.close();
        if tokio::time::timeout(END_TIMEOUT, self.tasks.wait()).await.is_err() {
            tracing::error!("usage of online requests was not recorded in time");
        }
    }

    /// Answers a request.
    pub async fn answer(self: &Arc<Self>, request: OnlineRequest) -> Answered {
        let started = Instant::now();
        let (standing, result) = match self.check(&request).await {
            Err(error) => (None, Err(error)),
            Ok(admitted) => {
                let (quota, model) = (admitted.quota.clone(), admitted.provider_model.clone());
                let count = RequestCount::new(admitted.facts.clone(), started);
                let mut result = self.send_in_time(admitted).await;
                count.answered(&mut result);
                (Some(quota.standing(&model)), result)
            }
        };
        tracing::debug!(
            request_id = request.log_id,
            tenant = %request.tenant,
            key = request.key.as_ref().map(tracing::field::display),
            endpoint = %request.endpoint,
            error = result.as_ref().err().map(tracing::field::display),
            duration_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
            "online request answered"
        );
        Answered { standing, result }
    }

    /// Sends a valid request, and ends it when its time is over or when the server ends.
    async fn send_in_time(
        self: &Arc<Self>,
        admitted: Admitted<'_>,
    ) -> Result<OnlineAnswer, OnlineError> {
        let timeout = self.config.online.online_timeout.duration();
        let sent = tokio::time::timeout(timeout, Box::pin(self.send(admitted)));
        let Some(sent) = self.ended.run_until_cancelled(sent).await else {
            return Err(StoreError::Closed.into());
        };
        sent.unwrap_or_else(|_| {
            Err(OnlineError::Failed {
                code: ErrorCode::ProviderTimeout.into(),
                message: format!(
                    "The request was not answered within {} (online_timeout).",
                    *self.config.online.online_timeout
                ),
                is_timeout: true,
                may_retry: false,
            })
        })
    }

    /// Sends a valid request, and turns what came back into an answer.
    async fn send(self: &Arc<Self>, admitted: Admitted<'_>) -> Result<OnlineAnswer, OnlineError> {
        let Admitted { request, plugin, quota, .. } = &admitted;
        let tenant = &request.tenant;
        if let Err(NoCredential(error)) = plugin.gateway().check_credential(tenant).await {
            tracing::debug!(%tenant, plugin = plugin.name(), error, "no credential");
            let message = "The provider has no credential for this project.".into();
            return Err(OnlineError::Unavailable { message, wait: RETRY_INTERVAL });
        }
        admitted.breaker.credential_found();
        let probe = self.enter(&admitted)?;
        let hold = quota
            .reserve((&admitted.provider_model, admitted.body.len()), false)
            .map_err(|blocked| self.limited(blocked))?;
        let permit = self.permit(&admitted).await?;
        let mut exchange = Exchange::new(plugin, tenant, Refusals::default());
        exchange.trace = admitted.facts.attempt;
        exchange.permit = Some(permit);
        exchange.has_rate_permit = true;
        exchange.reservation.grow_to(plugin.gateway().expected_response_bytes()).await;
        let mut metering = Metering::new(self.clone(), &admitted, hold);
        let ended = self.run(&admitted, &mut exchange, &mut metering).await;
        let ended = ended.map_err(|error| OnlineError::of_call(&error, exchange.last.is_some()))?;
        let (answer, delay) = match ended {
            Ended::Answer(answer, delay) => (answer, delay),
            Ended::Stream(events, first) => {
                self.origin(request).record_success(&admitted.breaker, plugin);
                drop(probe);
                let Exchange { permit, reservation, .. } = exchange;
                let held = (permit, reservation, self.ended.clone());
                let stream = OnlineStream::new(events, first, held, metering, admitted.wants_usage);
                return Ok(OnlineAnswer::Stream(Box::new(stream)));
            }
        };
        let trouble = self.record(&admitted, &exchange, &answer, probe.is_some());
        let delay = delay.max(exchange.last.as_ref().and_then(|last| last.assessment.hints.delay));
        if let Some(trouble) = trouble {
            metering.release();
            return Err(trouble);
        }
        let reservation = exchange.reservation;
        match answer {
            Answer::Response(Response { status, body, usage, .. }) => {
                let usage = usage.map(tokens).unwrap_or_default();
                if (200..300).contains(&status) || usage != TokenUsage::default() {
                    metering.finish(usage).await;
                } else {
                    metering.release();
                }
                Ok(OnlineAnswer::Whole { status, body, retry_after: delay, reservation })
            }
            Answer::Failure(found) => {
                metering.release();
                let Some(last) = &exchange.last else {
                    // The adapter has refused the request, and nothing was sent.
                    let (code, message) = (found.code, found.message);
                    return Err(OnlineError::Invalid { code, message, param: None });
                };
                let may_retry = last.assessment.signal == ProviderSignal::NotSent;
                let (code, message) = (found.code, found.message);
                let is_timeout = last.fault == Some(TransportErrorKind::Timeout);
                Err(OnlineError::Failed { code, message, is_timeout, may_retry })
            }
        }
    }

    /// Decides whether a request may be sent, and returns the guard of a probe if it is one.
    fn enter(&self, admitted: &Admitted<'_>) -> Result<Option<Probe>, OnlineError> {
        let Admitted { plugin, breaker, .. } = admitted;
        if plugin.routing().paused {
            let message = "The provider is paused by the operator.".into();
            return Err(OnlineError::Unavailable { message, wait: RETRY_INTERVAL });
        }
        let now = self.clock.now();
        let (decision, probe) = breaker.enter_online(now, identity(plugin));
        let next = match decision {
            BreakerDecision::Allow | BreakerDecision::Probe => return Ok(probe),
            BreakerDecision::Wait(until) => until,
            BreakerDecision::GiveUp(_) => now,
        };
        let outage = breaker.outage();
        let message = outage.map_or_else(
            || "The provider is not available.".to_owned(),
            |outage| outage.trouble.message,
        );
        Err(OnlineError::Unavailable { message, wait: self.wait_until(next) })
    }

    /// Waits for a permit of the provider, for a bounded time.
    async fn permit(&self, admitted: &Admitted<'_>) -> Result<Permit, OnlineError> {
        let Admitted { request, plugin, quota, .. } = admitted;
        let tenant = &request.tenant;
        let priority = quota.online_priority(&admitted.provider_model, admitted.body.len());
        let queue = QueueId { tenant: tenant.clone(), batch: None };
        let timeout = self.config.online.online_queue_timeout.duration();
        let admitted = async {
            let permit = plugin.gateway().admit(queue, priority).await?;
            // Lines of batches wait for their turn here, and an online request beside one of them.
            plugin.gateway().rate_limit_ready_again().await;
            Ok::<_, Instant>(permit)
        };
        match tokio::time::timeout(timeout, admitted).await {
            Ok(Ok(permit)) => Ok(permit),
            Ok(Err(until)) => {
                Err(OnlineError::Busy(until.saturating_duration_since(Instant::now())))
            }
            Err(_) => {
                let max = priority.max_in_flight;
                let in_flight = plugin.gateway().in_flight_of(tenant);
                match max.filter(|max| in_flight >= *max) {
                    Some(max) => Err(OnlineError::InFlight(max)),
                    None => Err(OnlineError::Overloaded),
                }
            }
        }
    }

    /// Runs the steps of the adapter.
    async fn run(
        &self,
        admitted: &Admitted<'_>,
        exchange: &mut Exchange<'_>,
        metering: &mut Metering,
    ) -> Result<Ended, CallError> {
        let Admitted { request, plugin, id, .. } = admitted;
        let tenant = &request.tenant;
        let created_at = u64::try_from(self.clock.now().as_seconds()).unwrap_or(0);
        let first = || Request {
            id: id.clone(),
            custom_id: id.clone(),
            endpoint: request.endpoint.as_str().to_owned(),
            model: admitted.provider_model.clone(),
            body: admitted.body.clone(),
            created_at,
            attempt: 1,
        };
        let mut step = exchange.begin(tenant, first).await?;
        let mut may_stream = admitted.is_stream;
        for _ in 0..plugin.limits().max_steps.get() {
            step = match step {
                Step::Done(answer) => {
                    exchange.record_answer(&answer, id);
                    return Ok(Ended::Answer(answer, None));
                }
                Step::Retry { after_milliseconds, otherwise } => {
                    let delay = after_milliseconds.map(Duration::from_millis);
                    return Ok(Ended::Answer(otherwise, delay));
                }
                Step::Send { request: sent, state } => {
                    metering.begin();
                    // Only the first exchange has the body that asks for a stream.
                    let mut outcome = if std::mem::take(&mut may_stream) {
                        match exchange.send_for_events(tenant, sent, &self.clock).await {
                            Ok((events, first)) => return Ok(Ended::Stream(events, first)),
                            Err(outcome) => outcome,
                        }
                    } else {
                        exchange.send(tenant, sent, &self.clock).await
                    };
                    exchange.resume(tenant, &state, &mut outcome).await?
                }
                Step::Wait { milliseconds, state } => {
                    exchange.permit = None;
                    exchange.reservation.shrink_to(state.len());
                    self.clock.sleep(Duration::from_millis(milliseconds)).await;
                    match self.permit(admitted).await {
                        Ok(permit) => exchange.permit = Some(permit),
                        Err(error) => {
                            let answer = failure(ErrorCode::ProviderError, error.to_string());
                            return Ok(Ended::Answer(answer, None));
                        }
                    }
                    exchange.has_rate_permit = true;
                    exchange.reservation.grow_to(plugin.gateway().expected_response_bytes()).await;
                    exchange.resume(tenant, &state, &mut Outcome::Elapsed).await?
                }
            };
        }
        Err(exchange.too_many_steps())
    }

    /// Records what an exchange says about the provider. Returns the error for the client if the
    /// answer of the provider concerns the operator alone.
    fn record(
        &self,
        admitted: &Admitted<'_>,
        exchange: &Exchange<'_>,
        answer: &Answer,
        is_probe: bool,
    ) -> Option<OnlineError> {
        let Admitted { request, plugin, breaker, id, .. } = admitted;
        let (last, origin) = (exchange.last.as_ref()?, self.origin(request));
        let kind = match last.assessment.signal {
            ProviderSignal::Answered
            | ProviderSignal::RateLimited
            | ProviderSignal::TransientError => {
                origin.record_success(breaker, plugin);
                return None;
            }
            // The content of a single request may be the cause.
            ProviderSignal::Failure(FailureKind::Forbidden) | ProviderSignal::NotSent => {
                return None;
            }
            ProviderSignal::Failure(kind) => kind,
            ProviderSignal::NoResponse => FailureKind::Failed,
        };
        let trouble = describe_trouble(kind, answer, Some(last));
        let message = trouble.message.clone();
        let mut mark = DefaultHasher::new();
        id.hash(&mut mark);
        let line = (id.as_str(), mark.finish());
        let verdict = origin.record_failure(breaker, line, plugin, None, trouble, is_probe);
        let until = match verdict {
            FailureVerdict::Hold(until) | FailureVerdict::Wait(until) => until,
            FailureVerdict::LineAtFault => self.clock.now(),
        };
        match kind {
            FailureKind::Unauthorized | FailureKind::Quota | FailureKind::Unreachable => {
                Some(OnlineError::Unavailable { message, wait: self.wait_until(until) })
            }
            _ => None,
        }
    }

    fn origin<'a>(&'a self, request: &'a OnlineRequest) -> Origin<'a> {
        Origin {
            tenant: &request.tenant,
            batch: None,
            endpoint: request.endpoint,
            clock: &self.clock,
            breakers: &self.breakers,
        }
    }

    fn limited(&self, Blocked { limit, until }: Blocked) -> OnlineError {
        OnlineError::Limited { limit, wait: self.wait_until(until) }
    }

    fn wait_until(&self, until: Timestamp) -> Duration {
        self.clock.now().until(until)
    }
}
