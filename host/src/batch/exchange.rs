//! A request under way at a provider: its place, its memory, and the calls of the adapter.

use super::verdict::{BEGINNING, Said, Weighed};
use crate::clock::{Clock, Timestamp};
use crate::egress::{Admitted, Hints, HttpRequest, HttpResponse, Refusals};
use crate::memory::Share;
use crate::plugin::types::{Answer, Classification, Outcome, Request, Response, Step};
use crate::plugin::{CallError, Plugin};

/// The last exchange of an attempt, as far as it matters afterwards.
pub struct Sent {
    pub weighed: Weighed,
    /// For the operator, of one that brought no response.
    pub detail: Option<String>,
}

pub struct Exchange<'a> {
    pub plugin: &'a Plugin,
    pub place: Option<Admitted>,
    pub share: Share,
    pub last: Option<Sent>,
    /// When it was first sent: what it waits before is not its fault.
    pub sent_at: Option<Timestamp>,
    /// The state of a job that the provider works on, and whether the store has it.
    pub job: Option<Vec<u8>>,
    pub job_is_kept: bool,
    /// How the request was refused so far.
    pub refusals: Refusals,
}

/// Whether what the adapter knows may change what becomes of the request. Some providers put an error into a 200, which is short.
fn matters(response: &HttpResponse, weighed: &Weighed) -> bool {
    weighed.said != Said::Answered
        || (response.body.len() < BEGINNING
            && memchr::memmem::find(&response.body, b"\"error\"").is_some())
}

impl<'a> Exchange<'a> {
    pub fn new(plugin: &'a Plugin, refusals: Refusals) -> Self {
        Self {
            plugin,
            place: None,
            share: plugin.gateway().share(),
            last: None,
            sent_at: None,
            job: None,
            job_is_kept: false,
            refusals,
        }
    }

    /// The first step. Where what it makes has no room, that is waited for, and it is made again.
    pub async fn begin(
        &mut self,
        tenant: &str,
        request: impl Fn() -> Request,
    ) -> Result<Step, CallError> {
        let step = self.plugin.begin(tenant, &request).await?;
        let Err(bytes) = self.fits(&step, 0) else { return Ok(step) };
        drop(step);
        self.share.cover(bytes).await;
        let step = self.plugin.begin(tenant, &request).await?;
        self.fits(&step, 0).map_err(|_| self.grew("begin"))?;
        Ok(step)
    }

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

    /// Performs an exchange, and takes note of what it says of the provider.
    pub async fn send(&mut self, tenant: &str, request: HttpRequest, clock: &Clock) -> Outcome {
        let gateway = self.plugin.gateway();
        let Some(place) = &mut self.place else { return Outcome::Elapsed };
        place.begins();
        self.sent_at.get_or_insert_with(|| clock.now());
        let outcome = match gateway.send(tenant, request, &mut self.share).await {
            Ok(response) => {
                gateway.brought(response.body.len());
                Outcome::Response(response)
            }
            Err(error) => Outcome::Error(error),
        };
        let (hints, detail) = match &outcome {
            Outcome::Response(response) => (Hints::of(&response.headers, clock.now()), None),
            Outcome::Error(error) => (Hints::default(), Some(error.detail().to_owned())),
            Outcome::Elapsed => (Hints::default(), None),
        };
        let mut weighed = Weighed::of(&outcome, hints, None);
        if let Outcome::Response(response) = &outcome
            && let Ok(Some(known)) = self.classify(tenant, response, &weighed).await
        {
            weighed = Weighed::of(&outcome, hints, Some(known));
        }
        if let Some(place) = &mut self.place {
            place.ended(weighed.taken(), &mut self.refusals);
            if let Some(left) = weighed.hints.left {
                gateway.told(place, left);
            }
        }
        self.last = Some(Sent { weighed, detail });
        outcome
    }

    async fn classify(
        &self,
        tenant: &str,
        response: &HttpResponse,
        weighed: &Weighed,
    ) -> Result<Option<Classification>, CallError> {
        let matters = matters(response, weighed);
        if !self.plugin.classifies(matters) {
            return Ok(None);
        }
        Box::pin(self.plugin.classify(tenant, response)).await.map(Some)
    }

    pub async fn resume(
        &mut self,
        tenant: &str,
        state: &[u8],
        outcome: &mut Outcome,
    ) -> Result<Step, CallError> {
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

    /// Takes note of an answer.
    pub fn told_answer(&self, answer: &Answer, id: &str) {
        let Answer::Response(response) = answer else { return };
        self.plugin.gateway().brought(response.body.len());
        let Response { status, request_id, .. } = response;
        if let Some(theirs) = request_id {
            tracing::debug!(
                plugin = self.plugin.name,
                id,
                status,
                provider_request_id = theirs,
                "answered"
            );
        }
    }

    /// The same call made more the second time.
    fn grew(&self, function: &'static str) -> CallError {
        let message = "it answers the same call differently each time.".into();
        CallError::Contract { plugin: self.plugin.name.clone(), function, message }
    }
}
