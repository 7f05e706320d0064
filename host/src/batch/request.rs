//! One request, from its line to its answer: the adapter says what to do next, and it is done.

use std::sync::Arc;
use std::time::Duration;

use super::memory::{HolderShare, SharedPool};
use super::stop::Stop;
use crate::clock::{Clock, Timestamp};
use crate::config::Settings;
use crate::egress::Admitted;
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
    /// Memory for bodies that are larger than their lines.
    pub bodies: SharedPool,
}

/// What a body may have more than its line and is not counted.
const SMALL: usize = 64 << 10;

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

impl Context {
    /// Answers a request. Whatever goes wrong, there is an answer; none only if the batch was stopped while the request waited for
    /// another attempt.
    ///
    /// With it comes the plugin that gave it, if one did.
    pub async fn answer(
        &self,
        id: &str,
        custom_id: &str,
        model: &str,
        body: &str,
    ) -> Option<(Answer, Option<Arc<Plugin>>)> {
        // The time it may take begins when it is first let out: waiting for a place is not its fault.
        let mut begun = None;
        let mut attempt = 1_u32;
        loop {
            // Looked up at each attempt: the operator may have mended the plugin meanwhile.
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
                    match self.attempt(&plugin, id, request, &mut begun).await {
                        Ok(Attempt::Done(answer)) => return Some((answer, by)),
                        Ok(Attempt::Again { after, otherwise }) => (after, otherwise),
                        Ok(Attempt::Stopped) => return None,
                        Err(error) => return Some((failure(error.code(), error.to_string()), by)),
                    }
                }
            };
            let pause = self.backoff(attempt).max(after.unwrap_or_default());
            let end = begun.get_or_insert_with(|| self.clock.now()).after(self.settings.max_retry_time.duration());
            let next = self.clock.now().after(pause);
            if attempt as usize >= self.settings.max_attempts.get() || next > end {
                return Some((otherwise, by));
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
        plugin: &Plugin,
        id: &str,
        request: impl Fn() -> Request,
        begun: &mut Option<Timestamp>,
    ) -> Result<Attempt, CallError> {
        let (mut step, mut share) = self.begin(plugin, request).await?;
        let mut in_flight = false;
        for _ in 0..plugin.limits.max_steps.get() {
            step = match step {
                Step::Done(answer) => {
                    if let Answer::Response(Response { status, request_id: Some(theirs), .. }) = &answer {
                        tracing::debug!(plugin = plugin.name, id, status, provider_request_id = theirs, "answered");
                    }
                    return Ok(Attempt::Done(answer));
                }
                Step::Retry { after_milliseconds, otherwise } => {
                    return Ok(Attempt::Again { after: after_milliseconds.map(Duration::from_millis), otherwise });
                }
                Step::Send { request, state } => {
                    let Some(admitted) = self.admit(plugin, in_flight).await else { return Ok(Attempt::Stopped) };
                    in_flight = true;
                    begun.get_or_insert_with(|| self.clock.now());
                    let outcome = match plugin.gateway().send(admitted, &self.tenant, request).await {
                        Ok(response) => Outcome::Response(response),
                        Err(error) => Outcome::Error(error),
                    };
                    share.take();
                    plugin.resume(&self.tenant, &state, outcome).await?
                }
                Step::Wait { milliseconds, state } => {
                    self.clock.sleep(Duration::from_millis(milliseconds)).await;
                    plugin.resume(&self.tenant, &state, Outcome::Elapsed).await?
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

    /// The first step. Many requests may wait to be let out, and a line of ten bytes may have become a body of ten million: one for which
    /// there is no room is not kept while it waits, but made again when there is, which a pure function makes as it was.
    async fn begin(
        &self,
        plugin: &Plugin,
        request: impl Fn() -> Request,
    ) -> Result<(Step, Option<HolderShare>), CallError> {
        let first = request();
        let counted = first.body.len().saturating_add(SMALL);
        let step = plugin.begin(&self.tenant, first).await?;
        let more = match &step {
            Step::Send { request, .. } => request.body.len().saturating_sub(counted),
            _ => 0,
        };
        if more == 0 {
            return Ok((step, None));
        }
        let holder = plugin.name.as_str().into();
        if let Some(share) = self.bodies.try_take(&holder, more) {
            return Ok((step, Some(share)));
        }
        drop(step);
        let share = self.bodies.take(&holder, more).await;
        Ok((plugin.begin(&self.tenant, request()).await?, Some(share)))
    }

    /// Waits to be let out to the provider; none if the batch is stopped before this request has sent anything. One that has is in flight,
    /// and goes on for as long as it is let.
    async fn admit<'a>(&self, plugin: &'a Plugin, in_flight: bool) -> Option<Admitted<'a>> {
        if in_flight {
            return Some(plugin.gateway().admit().await);
        }
        if self.stop.reason().is_some() {
            return None;
        }
        // Whoever is let in at once need not listen for a stop.
        tokio::select! {
            biased;
            admitted = plugin.gateway().admit() => Some(admitted),
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

fn failure(code: &str, message: String) -> Answer {
    Answer::Failure(Failure { code: code.to_owned(), message })
}
