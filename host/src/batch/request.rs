//! One attempt at a request, from its line to its answer: the adapter says what to do next, and it is done.
//!
//! **Outcomes.** A request that is *refused* (no connection, 429, a credential that is not taken) has not happened: it is tried again for as
//! long as its batch may wait, and counts for nothing. One that is *answered* with an error that may pass has a number of attempts. One
//! that may have reached the provider and has *no answer* may be paid for: it has fewer. Between attempts nothing of a request is
//! in memory but where its line stands; see [`deferred`](super::deferred).
//!
//! **Memory.** What a request makes beyond its line (the body that an adapter writes, a response, the answer) is within its share of the pool
//! `exchanges`, from before it is sent until its result is committed. What turns out larger than the share is dropped, room is waited
//! for, and the guest's call is made again: a pure function answers as before.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::breaker::{Breaker, Gate as Breakers, Kind, Trouble, Verdict};
use super::deferred::Tries;
use super::exchange::{Exchange, Sent};
use super::gate::Gate;
use super::jobs::Jobs;
use super::outages::{MODEL, Outages};
use super::shortened;
use super::stop::Stop;
use super::verdict::Said;
use crate::clock::{Clock, Timestamp};
use crate::config::Settings;
use crate::egress::{Admitted, Queue, refusal_pause};
use crate::memory::Share;
use crate::plugin::types::{Answer, Failure, Outcome, Request, Response, Step};
use crate::plugin::{CallError, Plugin, Registry, Route};

/// A wait for the provider's own time that is longer than this is not spent with the line in memory.
const SHORT: Duration = Duration::from_secs(5);

/// A state of a job is kept in the store if the adapter waits for at least so long.
const DURABLE: Duration = Duration::from_secs(1);

/// How soon a model whose plugin is gone is looked for again. A change of the plugins is seen at once.
const MISSING: Duration = Duration::from_secs(30);

/// What all requests of a batch have in common.
pub struct Context {
    pub tenant: String,
    pub batch: String,
    pub endpoint: String,
    /// For lines that name no model.
    pub default_model: Option<String>,
    /// Unix seconds.
    pub created_at: u64,
    pub registry: Arc<Registry>,
    /// The jobs of its requests at providers.
    pub jobs: Jobs,
    pub outages: Arc<Outages>,
    /// Those of the plugins that served its models when it was validated.
    pub breakers: Vec<(String, Arc<Breaker>)>,
    pub clock: Clock,
    pub settings: Settings,
    pub stop: Arc<Stop>,
    /// Cancelled when what is not sent yet is to be left: the batch is stopped, or another one is to have its turn.
    pub leave: CancellationToken,
    /// Closed while results cannot be written.
    pub gate: Gate,
    /// Requests of one batch wait in one queue for their provider.
    pub queue: Queue,
}

/// A request of a batch.
#[derive(Clone, Copy)]
pub struct Line<'a> {
    pub id: &'a str,
    pub custom_id: &'a str,
    pub model: &'a str,
    pub body: &'a str,
    pub number: u64,
    /// What its breaker knows it by.
    pub mark: u64,
}

/// An answer, the plugin that gave it if one did, and the memory it takes.
pub struct Answered {
    pub answer: Answer,
    pub by: Option<Arc<Plugin>>,
    pub share: Option<Share>,
}

/// How an attempt ended.
pub enum Ended {
    Answered(Answered),
    /// It is to be tried again then.
    Back(Timestamp, Tries),
    /// The batch was stopped before anything was sent.
    Stopped,
}

/// What came of the steps that an adapter asked for.
enum Stepped {
    Done(Answer),
    Again(Option<Duration>, Answer),
    Stopped,
    /// It is not sent now.
    Later(Timestamp),
    /// The provider works on it, and is asked then.
    Polled(Timestamp),
}

impl Context {
    /// Makes one attempt at a request.
    pub async fn attempt(&self, line: Line<'_>, mut tries: Tries) -> Ended {
        tries.waits = false;
        // Looked up at each attempt: the operator may have repaired the plugin meanwhile.
        let plugins = self.registry.current();
        let route = plugins.route(&self.tenant, line.model);
        let Some(Route { plugin, model }) =
            route.filter(|route| route.plugin.handles(&self.endpoint))
        else {
            return self.without_plugin(line, tries);
        };
        let known = self
            .breakers
            .iter()
            .find(|(name, _)| *name == plugin.name)
            .map(|(_, breaker)| breaker.clone());
        let breaker =
            known.unwrap_or_else(|| self.outages.of(&plugin.name, &self.tenant, &self.endpoint));
        if plugin.paused {
            let told = format!("The plugin `{}` is paused by the operator.", plugin.name);
            return self.blocked_by_plugin(
                &breaker,
                line,
                tries,
                "The provider is paused by the operator.",
                &told,
            );
        }
        let (gate, probe) = breaker.enter(self.clock.now(), identity(&plugin));
        match gate {
            Breakers::Go | Breakers::Probe => {}
            Breakers::Wait(until) => return Ended::Back(until, Tries { waits: true, ..tries }),
            Breakers::GiveUp(answer) => {
                return Ended::Answered(Answered { answer, by: Some(plugin), share: None });
            }
        }
        let mut exchange = Exchange::new(&plugin, tries.refusals);
        let request = || Request {
            id: line.id.to_owned(),
            custom_id: line.custom_id.to_owned(),
            endpoint: self.endpoint.clone(),
            model: model.clone(),
            body: line.body.to_owned(),
            created_at: self.created_at,
            attempt: tries.answered.saturating_add(1),
        };
        let may_send = || {
            // One that was paused, turned off or changed while the request waited for its place is asked for anew.
            let current = self.registry.current();
            if !Arc::ptr_eq(&plugins, &current)
                && current.identity(&plugin.name) != identity(&plugin)
            {
                return false;
            }
            let go = || matches!(breaker.check(self.clock.now(), identity(&plugin)), Breakers::Go);
            probe.is_some() || breaker.is_calm() || go()
        };
        match self.jobs.of(line.number, &plugin, tries.has_job).await {
            Ok(job) => {
                exchange.job_is_kept = job.is_some();
                exchange.job = job;
            }
            // To begin it anew would be to pay for it twice.
            Err(error) => {
                tracing::error!(
                    batch = self.batch,
                    id = line.id,
                    "the state of a job cannot be read: {error}"
                );
                return Ended::Back(self.clock.now().after(SHORT), tries);
            }
        }
        let stepped = self.step(&mut exchange, line, &request, may_send).await;
        tries.refusals = exchange.refusals;
        let sent = exchange.last.take();
        let took = exchange.sent_at.map_or(Duration::ZERO, |begun| begun.until(self.clock.now()));
        let (exchange_job, job_is_kept) = (exchange.job.take(), exchange.job_is_kept);
        let share = exchange.share;
        let answered =
            |answer, share| Ended::Answered(Answered { answer, by: Some(plugin.clone()), share });
        let stepped = match stepped {
            Ok(stepped) => stepped,
            Err(error) => return answered(failure(error.code(), error.to_string()), Some(share)),
        };
        let (again, answer) = match stepped {
            Stepped::Stopped => return Ended::Stopped,
            Stepped::Later(until) => return Ended::Back(until, tries),
            Stepped::Polled(until) => return Ended::Back(until, Tries { has_job: true, ..tries }),
            Stepped::Done(answer) => (None, answer),
            Stepped::Again(after, otherwise) => (Some(after), otherwise),
        };
        let mut said = sent.as_ref().map_or(Said::Answered, |sent| sent.weighed.said);
        match &exchange_job {
            // What failed is the question, not the job: it is asked again, and nothing is paid for twice.
            Some(state) if again.is_some() && said != Said::Answered => {
                if said == Said::Unanswered {
                    said = Said::Passing;
                }
                if !job_is_kept {
                    self.jobs.insist(line.number, &plugin, state, &self.clock, &self.leave).await;
                }
                tries.has_job = true;
            }
            // The adapter wants it begun anew.
            Some(_) if again.is_some() => {
                tries.has_job = false;
                self.jobs.forget(line.number).await;
            }
            _ => {}
        }
        let asked = again.flatten().max(sent.as_ref().and_then(|sent| sent.weighed.hints.delay));
        let trouble = |kind| self.trouble(kind, &answer, sent.as_ref());
        match (said, again) {
            (
                Said::Trouble(
                    kind @ (Kind::Unauthorized | Kind::Forbidden | Kind::Quota | Kind::Unreachable),
                ),
                _,
            ) => {
                let refused_at = tries.refused_at.replace(breaker.passes());
                let trouble = trouble(kind);
                let verdict =
                    self.failed(&breaker, line, &plugin, refused_at, trouble, probe.is_some());
                tries.in_vain = breaker.tries(line.mark);
                match verdict {
                    Verdict::Hold(until) => Ended::Back(until, tries),
                    Verdict::Wait(until) => Ended::Back(until, Tries { waits: true, ..tries }),
                    Verdict::Own => answered(answer, Some(share)),
                }
            }
            (Said::Busy, Some(_)) => {
                self.passed(&breaker, &plugin);
                tracing::debug!(
                    plugin = plugin.name,
                    batch = self.batch,
                    id = line.id,
                    ?asked,
                    "refused for now"
                );
                let pause =
                    refusal_pause(tries.refusals.number).mul_f64(0.5 + fastrand::f64() / 2.0);
                Ended::Back(self.clock.now().after(pause.max(asked.unwrap_or_default())), tries)
            }
            (Said::Trouble(_) | Said::Unanswered, Some(_)) => {
                if said == Said::Unanswered {
                    tries.unanswered = tries.unanswered.saturating_add(1);
                } else {
                    tries.answered = tries.answered.saturating_add(1);
                }
                let verdict = self.failed(
                    &breaker,
                    line,
                    &plugin,
                    None,
                    trouble(Kind::Failed),
                    probe.is_some(),
                );
                tries.in_vain = breaker.tries(line.mark);
                let waits = match verdict {
                    Verdict::Wait(until) => Some(until),
                    Verdict::Hold(_) | Verdict::Own => None,
                };
                self.again(tries, took, asked, waits).unwrap_or_else(|| answered(answer, None))
            }
            (Said::Passing | Said::Answered | Said::NotSent, Some(_)) => {
                if said != Said::NotSent {
                    self.passed(&breaker, &plugin);
                }
                tries.answered = tries.answered.saturating_add(1);
                self.again(tries, took, asked, None).unwrap_or_else(|| answered(answer, None))
            }
            (_, None) => {
                if !matches!(said, Said::NotSent | Said::Unanswered | Said::Trouble(_))
                    && sent.is_some()
                {
                    self.passed(&breaker, &plugin);
                }
                answered(answer, Some(share))
            }
        }
    }

    /// When a request is tried again; none if it has had its attempts.
    fn again(
        &self,
        mut tries: Tries,
        took: Duration,
        asked: Option<Duration>,
        waits: Option<Timestamp>,
    ) -> Option<Ended> {
        let attempts = tries.answered.saturating_add(tries.unanswered);
        let pause = self.backoff(attempts).max(asked.unwrap_or_default());
        tries.spent = tries.spent.saturating_add(took).saturating_add(pause);
        let over = attempts as usize >= self.settings.max_attempts.get()
            || tries.unanswered as usize >= self.settings.max_unanswered_attempts.get()
            || tries.spent > self.settings.max_retry_time.duration();
        let at = self.clock.now().after(pause);
        tracing::debug!(batch = self.batch, attempts, ?pause, over, "an attempt came to nothing");
        (!over).then(|| Ended::Back(waits.map_or(at, |until| until.max(at)), tries))
    }

    /// Takes the steps that the adapter asks for.
    async fn step(
        &self,
        exchange: &mut Exchange<'_>,
        line: Line<'_>,
        request: &impl Fn() -> Request,
        may_send: impl Fn() -> bool,
    ) -> Result<Stepped, CallError> {
        let plugin = exchange.plugin;
        // A place first, and what it makes after: who waits for a place holds no memory that others under way need.
        match self.admit(plugin).await {
            Admission::Admitted(place) => exchange.place = Some(place),
            Admission::Stopped => return Ok(Stepped::Stopped),
            Admission::Later(until) => return Ok(Stepped::Later(until)),
        }
        // Something may have come up while it waited.
        if !may_send() {
            return Ok(Stepped::Later(self.clock.now()));
        }
        tokio::select! {
            biased;
            () = exchange.share.cover(plugin.gateway().expected()) => {}
            () = self.stop.asked() => return Ok(Stepped::Stopped),
        }
        let mut step = match exchange.job.take() {
            // It was begun before: the provider is asked how far it is.
            Some(state) => {
                let step = exchange.resume(&self.tenant, &state, &mut Outcome::Elapsed).await?;
                exchange.job = Some(state);
                step
            }
            None => exchange.begin(&self.tenant, request).await?,
        };
        for _ in 0..plugin.limits.max_steps.get() {
            step = match step {
                Step::Done(answer) => {
                    exchange.told_answer(&answer, line.id);
                    return Ok(Stepped::Done(answer));
                }
                Step::Retry { after_milliseconds, otherwise } => {
                    return Ok(Stepped::Again(
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
                    if pause >= DURABLE && !exchange.job_is_kept {
                        exchange.job_is_kept = self.jobs.keep(line.number, plugin, &state).await;
                    }
                    if pause >= SHORT && exchange.job_is_kept {
                        return Ok(Stepped::Polled(self.clock.now().after(pause)));
                    }
                    // A request that is in flight goes on for as long as its batch is let.
                    exchange.place = None;
                    exchange.share.settle(state.len());
                    self.clock.sleep(pause).await;
                    while exchange.place.is_none() {
                        match plugin.gateway().admit(self.queue).await {
                            Ok(place) => exchange.place = Some(place),
                            Err(until) => tokio::time::sleep_until(until).await,
                        }
                    }
                    exchange.share.cover(plugin.gateway().expected()).await;
                    let step = exchange.resume(&self.tenant, &state, &mut Outcome::Elapsed).await?;
                    exchange.job = Some(state);
                    step
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

    /// Waits to be let out to the provider.
    async fn admit(&self, plugin: &Plugin) -> Admission {
        if self.stop.reason().is_some() {
            return Admission::Stopped;
        }
        let admitted = async {
            loop {
                let admitted = match plugin.gateway().admit(self.queue).await {
                    Ok(admitted) => admitted,
                    Err(until) => {
                        let left = until.saturating_duration_since(tokio::time::Instant::now());
                        return Admission::Later(self.clock.now().after(left));
                    }
                };
                plugin.gateway().until_rate_permits().await;
                if self.gate.is_open() {
                    return Admission::Admitted(admitted);
                }
                // What cannot be written is not asked for.
                drop(admitted);
                self.gate.open().await;
            }
        };
        // Who is let in at once need not listen for a stop.
        tokio::select! {
            biased;
            admission = admitted => admission,
            () = self.leave.cancelled() => match self.stop.reason() {
                Some(_) => Admission::Stopped,
                None => Admission::Later(self.clock.now()),
            },
        }
    }

    /// Takes note of an answer of the provider.
    fn passed(&self, breaker: &Breaker, plugin: &Plugin) {
        if let Some(ended) = breaker.passed() {
            let lasted = ended.since.until(self.clock.now());
            tracing::warn!(
                plugin = plugin.name,
                batch = self.batch,
                tenant = self.tenant,
                "the provider answers again, after {:.1} s: {}",
                lasted.as_secs_f64(),
                ended.trouble.detail
            );
            self.outages.tell();
        }
    }

    /// Takes note of a request that was not answered for a reason that may be the provider's.
    fn failed(
        &self,
        breaker: &Breaker,
        line: Line<'_>,
        plugin: &Plugin,
        refused_at: Option<u64>,
        trouble: Trouble,
        probe: bool,
    ) -> Verdict {
        let detail = trouble.detail.clone();
        let (verdict, opened) = breaker.failed(
            self.clock.now(),
            line.mark,
            identity(plugin),
            refused_at,
            trouble,
            probe,
        );
        if opened {
            tracing::warn!(
                plugin = plugin.name,
                batch = self.batch,
                tenant = self.tenant,
                endpoint = self.endpoint,
                "requests wait for the provider: {detail}"
            );
        } else {
            tracing::debug!(
                plugin = plugin.name,
                batch = self.batch,
                id = line.id,
                ?verdict,
                "not answered: {detail}"
            );
        }
        verdict
    }

    /// What is the matter, in words.
    fn trouble(&self, kind: Kind, answer: &Answer, sent: Option<&Sent>) -> Trouble {
        let status = match answer {
            Answer::Response(response) => Some(response.status),
            Answer::Failure(_) => None,
        };
        let with_status = |what: &str| match status {
            Some(status) => format!("{what} (status {status})."),
            None => format!("{what}."),
        };
        let message = match (kind, answer) {
            (Kind::Unauthorized, _) => {
                with_status("The provider does not accept the operator's credential")
            }
            (Kind::Forbidden, _) => {
                with_status("The provider forbids this to the operator's credential")
            }
            (Kind::Quota, _) => {
                with_status("The provider says that the account's quota is used up")
            }
            (_, Answer::Failure(failure)) => failure.message.clone(),
            (_, Answer::Response(_)) => with_status("The provider answers with an error"),
        };
        let detail = sent.and_then(|sent| sent.detail.clone()).unwrap_or_else(|| message.clone());
        Trouble { kind, message, detail, answer: without_long_body(answer) }
    }

    /// There is no plugin for the model any more: it served when the batch was validated, and may come back.
    fn without_plugin(&self, line: Line<'_>, tries: Tries) -> Ended {
        let model = shortened(line.model);
        let told = format!("No plugin serves the model '{model}' any more.");
        let plugins = self.registry.current();
        let gone =
            self.breakers.iter().map(|(name, _)| name).find(|name| plugins.identity(name) == 0);
        let name = gone.cloned().unwrap_or_else(|| format!("{MODEL}{model}"));
        let breaker = self.outages.of(&name, &self.tenant, &self.endpoint);
        let ended = self.blocked_by_plugin(&breaker, line, tries, &told, &told);
        // It may be another batch's affair; this one is among those that wait.
        if !breaker.holds(&self.batch) {
            breaker.rests(&self.batch, 1);
        }
        ended
    }

    fn blocked_by_plugin(
        &self,
        breaker: &Breaker,
        line: Line<'_>,
        tries: Tries,
        message: &str,
        detail: &str,
    ) -> Ended {
        let now = self.clock.now();
        if let Breakers::GiveUp(answer) = breaker.check(now, 0) {
            return Ended::Answered(Answered { answer, by: None, share: None });
        }
        let trouble = Trouble {
            kind: Kind::Plugin,
            message: message.to_owned(),
            detail: detail.to_owned(),
            answer: failure("model_not_found", message.to_owned()),
        };
        let (_, opened) = breaker.failed(now, line.mark, 0, None, trouble, true);
        if opened {
            tracing::warn!(batch = self.batch, tenant = self.tenant, "requests wait: {detail}");
        }
        Ended::Back(now.after(MISSING), Tries { waits: true, ..tries })
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

enum Admission {
    Admitted(Admitted),
    Stopped,
    Later(Timestamp),
}

/// What tells a plugin from the one that was loaded before under its name.
fn identity(plugin: &Plugin) -> usize {
    std::ptr::from_ref(plugin) as usize
}

fn failure(code: &str, message: String) -> Answer {
    Answer::Failure(Failure { code: code.to_owned(), message })
}

/// An answer that is kept for those that wait: a long body is not.
fn without_long_body(answer: &Answer) -> Answer {
    const LONGEST: usize = 4 << 10;
    match answer {
        Answer::Response(Response { status, body, .. }) if body.len() > LONGEST => {
            failure("provider_error", format!("The provider answered with status {status}."))
        }
        answer => answer.clone(),
    }
}
