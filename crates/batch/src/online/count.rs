//! Count of an online request in metrics and traces: once, however the request ends.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use batchwright_domain::endpoint::Endpoint;
use batchwright_domain::ids::TenantId;
use batchwright_domain::usage::TokenUsage;
use batchwright_plugin::Plugin;
use batchwright_telemetry::Context;
use tokio::time::Instant;

use crate::metrics::{Counted, EngineMetrics, Outcome, Source};
use crate::online::{OnlineAnswer, OnlineError};
use crate::spans::{Attempted, Ended, Spans};

/// Request that is counted when dropped: without an outcome, as one whose client has left.
pub(super) struct RequestCount {
    facts: Arc<RequestFacts>,
    began: Instant,
    outcome: Outcome,
    /// HTTP status, if the provider has answered.
    status: Option<u16>,
}

/// What a request and its tokens are counted by.
pub(super) struct RequestFacts {
    pub metrics: Arc<EngineMetrics>,
    pub spans: Spans,
    pub tenant: TenantId,
    pub plugin: Arc<Plugin>,
    pub listed: Arc<str>,
    pub endpoint: Endpoint,
    /// Id of the request.
    pub id: String,
    /// Span of the client.
    pub parent: Option<Context>,
    /// Context of the request.
    pub context: Context,
    /// Context that the provider gets.
    pub attempt: Option<Context>,
    /// True once the request was sent.
    pub is_sent: AtomicBool,
    /// Tokens, once they are known.
    pub usage: Mutex<TokenUsage>,
}

impl RequestFacts {
    fn counted(&self) -> Counted<'_> {
        Counted {
            source: Source::Online,
            tenant: &self.tenant,
            plugin: self.plugin.name(),
            model: &self.listed,
            endpoint: self.endpoint,
        }
    }

    /// Counts the tokens of the request.
    pub(super) fn tokens(&self, usage: TokenUsage) {
        self.metrics.tokens(self.counted(), usage);
        *self.usage.lock().unwrap_or_else(PoisonError::into_inner) = usage;
    }
}

impl RequestCount {
    pub(super) fn new(facts: Arc<RequestFacts>, began: Instant) -> Self {
        Self { facts, began, outcome: Outcome::Abandoned, status: None }
    }

    /// Sets the outcome, or passes the count on to a stream.
    pub(super) fn answered(mut self, result: &mut Result<OnlineAnswer, OnlineError>) {
        self.outcome = match result {
            Ok(OnlineAnswer::Stream(stream)) => {
                self.status = Some(200);
                return stream.count(self);
            }
            Ok(OnlineAnswer::Whole { status, .. }) => {
                self.status = Some(*status);
                let has_succeeded = (200..300).contains(status);
                if has_succeeded { Outcome::Succeeded } else { Outcome::Failed }
            }
            Err(OnlineError::Failed { .. }) => Outcome::Failed,
            Err(_) if self.facts.is_sent.load(Ordering::Relaxed) => Outcome::Failed,
            Err(_) => Outcome::Refused,
        };
    }

    /// Counts a stream that has ended.
    pub(super) fn ended(mut self, succeeded: bool) {
        self.outcome = if succeeded { Outcome::Succeeded } else { Outcome::Failed };
    }

    /// Records the spans of the request.
    fn record(&self, took: Duration) {
        let facts = &*self.facts;
        let began = batchwright_telemetry::trace::ago(took);
        let has_succeeded = self.outcome == Outcome::Succeeded;
        if facts.is_sent.load(Ordering::Relaxed) {
            facts.spans.attempted(&Attempted {
                contexts: facts.attempt.map(|attempt| (attempt, facts.context)),
                began,
                duration: took,
                plugin: facts.plugin.name(),
                provider: &facts.plugin.description().name,
                model: &facts.listed,
                endpoint: facts.endpoint,
                verdict: self.outcome.as_str(),
                // A stream that broke off had begun with a success.
                status: self.status.filter(|status| has_succeeded || *status >= 300),
                usage: *facts.usage.lock().unwrap_or_else(PoisonError::into_inner),
            });
        }
        let status = self.status.filter(|status| *status >= 300);
        let error = status.map_or_else(|| self.outcome.as_str().to_owned(), |it| it.to_string());
        facts.spans.ended(Ended {
            context: facts.context,
            parent: facts.parent,
            line: None,
            id: &facts.id,
            began,
            tenant: &facts.tenant,
            plugin: facts.plugin.name(),
            model: &facts.listed,
            endpoint: facts.endpoint,
            error: (!has_succeeded).then_some(error),
        });
    }
}

impl Drop for RequestCount {
    fn drop(&mut self) {
        let took = self.began.elapsed();
        let RequestFacts { metrics, plugin, endpoint, .. } = &*self.facts;
        metrics.requests(self.facts.counted(), self.outcome, 1);
        metrics.request_took(Source::Online, plugin.name(), *endpoint, took);
        self.record(took);
    }
}
