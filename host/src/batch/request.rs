//! One request, from its line to its answer: the adapter says what to do next, and it is done.
//!
//! What a request makes beyond its line (the body that an adapter writes, a response, the answer) is within its share of the pool
//! `exchanges`, from before it is sent until its result is committed. What turns out larger than the share is dropped, room is waited
//! for, and the guest's call is made again: a pure function answers as before.

use std::sync::Arc;
use std::time::Duration;

use super::gate::Gate;
use super::stop::Stop;
use crate::clock::{Clock, Timestamp};
use crate::config::Settings;
use crate::egress::{Admitted, Queue};
use crate::memory::Share;
use crate::plugin::types::{Answer, Failure, Outcome, Request, Response, Step};
use crate::plugin::{CallError, Plugin, Registry, Route};

/// What all requests of a batch have in common.
pub struct Context {
    pub tenant: String,
    pub endpoint: String,
    /// Unix seconds.
    pub created_at: u64,
    pub registry: Arc<Registry>,
    pub clock: Clock,
    pub settings: Settings,
    pub stop: Arc<Stop>,
    /// Closed while results cannot be written.
    pub gate: Gate,
    /// Requests of one batch wait in one queue for their provider.
    pub queue: Queue,
}

/// An answer, the plugin that gave it if one did, and the memory it takes.
pub struct Answered {
    pub answer: Answer,
    pub by: Option<Arc<Plugin>>,
    pub share: Option<Share>,
}

/// How one attempt ended.
enum Attempt {
    Done(Answer),
    Again {
        after: Option<Duration>,
        otherwise: Answer,
    },
    /// The batch was stopped before anything was sent.
    Stopped,
}

/// A request under way at a provider: what it holds.
struct Exchange<'a> {
    plugin: &'a Plugin,
    place: Option<Admitted>,
    share: Share,
}

impl Context {
    /// Answers a request. Whatever goes wrong, there is an answer; none only if the batch was stopped while the request waited for
    /// its first exchange or for another attempt.
    pub async fn answer(&self, id: &str, custom_id: &str, model: &str, body: &str) -> Option<Answered> {
        // The time it may take begins when it is first let out: waiting for a place is not its fault.
        let mut begun = None;
        let mut attempt = 1_u32;
        loop {
            // Looked up at each attempt: the operator may have repaired the plugin meanwhile.
            let route = self.registry.current().route(&self.tenant, model);
            let mut by = None;
            let (after, otherwise) = match route.filter(|route| route.plugin.handles(&self.endpoint)) {
                // It served when the batch was validated, and may come back.
                None => (None, failure("model_not_found", format!("No plugin serves the model '{model}' any more."))),
                Some(Route { plugin, model }) => {
                    by = Some(plugin.clone());
                    let request = || Request {
                        id: id.to_owned(),
                        custom_id: custom_id.to_owned(),
                        endpoint: self.endpoint.clone(),
                        model: model.clone(),
                        body: body.to_owned(),
                        created_at: self.created_at,
                        attempt,
                    };
                    let mut exchange = Exchange { plugin: &plugin, place: None, share: plugin.gateway().share() };
                    let attempted = self.attempt(&mut exchange, id, request, &mut begun).await;
                    let share = exchange.share;
                    match attempted {
                        Ok(Attempt::Done(answer)) => return Some(Answered { answer, by, share: Some(share) }),
                        Ok(Attempt::Again { after, otherwise }) => (after, otherwise),
                        Ok(Attempt::Stopped) => return None,
                        Err(error) => {
                            let answer = failure(error.code(), error.to_string());
                            return Some(Answered { answer, by, share: Some(share) });
                        }
                    }
                }
            };
            let pause = self.backoff(attempt).max(after.unwrap_or_default());
            let end = begun.get_or_insert_with(|| self.clock.now()).after(self.settings.max_retry_time.duration());
            let next = self.clock.now().after(pause);
            if attempt as usize >= self.settings.max_attempts.get() || next > end {
                return Some(Answered { answer: otherwise, by, share: None });
            }
            tracing::debug!(id, attempt, ?pause, "the request is tried again");
            tokio::select! {
                () = self.clock.sleep_until(next) => {}
                () = self.stop.asked() => return None,
            }
            attempt = attempt.saturating_add(1);
        }
    }

    async fn attempt(
        &self,
        exchange: &mut Exchange<'_>,
        id: &str,
        request: impl Fn() -> Request,
        begun: &mut Option<Timestamp>,
    ) -> Result<Attempt, CallError> {
        let plugin = exchange.plugin;
        // A place first, and what it makes after: who waits for a place holds no memory that others under way need.
        let Some(place) = self.admit(plugin).await else { return Ok(Attempt::Stopped) };
        exchange.place = Some(place);
        tokio::select! {
            biased;
            () = exchange.share.cover(plugin.gateway().expected()) => {}
            () = self.stop.asked() => return Ok(Attempt::Stopped),
        }
        let mut step = plugin.begin(&self.tenant, request()).await?;
        if let Err(bytes) = exchange.fits(&step, 0) {
            drop(step);
            exchange.share.cover(bytes).await;
            step = plugin.begin(&self.tenant, request()).await?;
            exchange.fits(&step, 0).map_err(|_| exchange.grew("begin"))?;
        }
        for _ in 0..plugin.limits.max_steps.get() {
            step = match step {
                Step::Done(answer) => {
                    if let Answer::Response(response) = &answer {
                        plugin.gateway().brought(response.body.len());
                        let Response { status, request_id, .. } = response;
                        if let Some(theirs) = request_id {
                            tracing::debug!(plugin = plugin.name, id, status, provider_request_id = theirs, "answered");
                        }
                    }
                    return Ok(Attempt::Done(answer));
                }
                Step::Retry { after_milliseconds, otherwise } => {
                    return Ok(Attempt::Again { after: after_milliseconds.map(Duration::from_millis), otherwise });
                }
                Step::Send { request, state } => {
                    begun.get_or_insert_with(|| self.clock.now());
                    let mut outcome = exchange.send(&self.tenant, request).await;
                    exchange.resume(&self.tenant, &state, &mut outcome).await?
                }
                Step::Wait { milliseconds, state } => {
                    // A request that is in flight goes on for as long as its batch is let.
                    exchange.place = None;
                    exchange.share.settle(0);
                    self.clock.sleep(Duration::from_millis(milliseconds)).await;
                    exchange.place = Some(plugin.gateway().admit(self.queue).await);
                    exchange.share.cover(plugin.gateway().expected()).await;
                    exchange.resume(&self.tenant, &state, &mut Outcome::Elapsed).await?
                }
            };
        }
        Err(CallError::Contract {
            plugin: plugin.name.clone(),
            function: "resume",
            message: format!(
                "an attempt takes more than {} steps; the limit is [limits] max_steps.",
                plugin.limits.max_steps
            ),
        })
    }

    /// Waits to be let out to the provider; none if the batch is stopped before.
    async fn admit(&self, plugin: &Plugin) -> Option<Admitted> {
        if self.stop.reason().is_some() {
            return None;
        }
        let admitted = async {
            loop {
                let admitted = plugin.gateway().admit(self.queue).await;
                if self.gate.is_open() {
                    return admitted;
                }
                // What cannot be written is not asked for.
                drop(admitted);
                self.gate.open().await;
            }
        };
        // Who is let in at once need not listen for a stop.
        tokio::select! {
            biased;
            admitted = admitted => Some(admitted),
            () = self.stop.asked() => None,
        }
    }

    /// A pause of our own, doubled with each attempt; up to half of it is left out by chance, so that requests that failed together do
    /// not come back together.
    fn backoff(&self, attempt: u32) -> Duration {
        let doubled = 2_u32.saturating_pow(attempt.saturating_sub(1));
        let longest = self.settings.max_retry_backoff.duration();
        let pause = self.settings.retry_backoff.duration().saturating_mul(doubled).min(longest);
        pause.mul_f64(0.5 + fastrand::f64() / 2.0)
    }
}

impl Exchange<'_> {
    /// Whether what a guest made fits into the share, beside so many bytes that stay; if not, how large the share has to be.
    fn fits(&mut self, step: &Step, beside: usize) -> Result<(), usize> {
        let made = match step {
            Step::Send { request, .. } => request.body.len(),
            // The line of the result is a copy of the body.
            Step::Done(Answer::Response(response)) => response.body.len().saturating_mul(2),
            Step::Done(Answer::Failure(_)) | Step::Wait { .. } | Step::Retry { .. } => 0,
        };
        let bytes = beside.saturating_add(made);
        if self.share.try_cover(bytes) { Ok(()) } else { Err(bytes) }
    }

    async fn send(&mut self, tenant: &str, request: crate::egress::HttpRequest) -> Outcome {
        let gateway = self.plugin.gateway();
        let Some(place) = &self.place else { return Outcome::Elapsed };
        match gateway.send(place, tenant, request, &mut self.share).await {
            Ok(response) => {
                gateway.brought(response.body.len());
                Outcome::Response(response)
            }
            Err(error) => Outcome::Error(error),
        }
    }

    async fn resume(&mut self, tenant: &str, state: &[u8], outcome: &mut Outcome) -> Result<Step, CallError> {
        let beside = match &*outcome {
            Outcome::Response(response) => response.body.len(),
            Outcome::Error(_) | Outcome::Elapsed => 0,
        };
        let step = self.plugin.resume(tenant, state, outcome).await?;
        let Err(bytes) = self.fits(&step, beside) else { return Ok(step) };
        drop(step);
        self.share.cover(bytes).await;
        let step = self.plugin.resume(tenant, state, outcome).await?;
        self.fits(&step, beside).map_err(|_| self.grew("resume"))?;
        Ok(step)
    }

    /// The same call made more the second time.
    fn grew(&self, function: &'static str) -> CallError {
        let message = "it answers the same call differently each time.".into();
        CallError::Contract { plugin: self.plugin.name.clone(), function, message }
    }
}

fn failure(code: &str, message: String) -> Answer {
    Answer::Failure(Failure { code: code.to_owned(), message })
}
