//! Count of an online request in the metrics: once, however the request ends.

use std::sync::Arc;

use batchwright_domain::endpoint::Endpoint;
use batchwright_domain::ids::TenantId;
use batchwright_domain::usage::TokenUsage;
use batchwright_plugin::Plugin;
use tokio::time::Instant;

use crate::metrics::{Counted, EngineMetrics, Outcome, Source};
use crate::online::{Admitted, OnlineAnswer, OnlineError};

/// Request that is counted when dropped: without an outcome, as one whose client has left.
pub(super) struct RequestCount {
    labels: RequestLabels,
    began: Instant,
    outcome: Outcome,
}

/// What a request and its tokens are counted by.
#[derive(Clone)]
pub(super) struct RequestLabels {
    metrics: Arc<EngineMetrics>,
    tenant: TenantId,
    plugin: Arc<Plugin>,
    listed: Arc<str>,
    endpoint: Endpoint,
}

impl RequestLabels {
    pub(super) fn of(metrics: &Arc<EngineMetrics>, admitted: &Admitted<'_>) -> Self {
        Self {
            metrics: metrics.clone(),
            tenant: admitted.request.tenant.clone(),
            plugin: admitted.plugin.clone(),
            listed: admitted.listed.clone(),
            endpoint: admitted.request.endpoint,
        }
    }

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
    }
}

impl RequestCount {
    pub(super) fn new(labels: RequestLabels, began: Instant) -> Self {
        Self { labels, began, outcome: Outcome::Abandoned }
    }

    /// Sets the outcome, or passes the count on to a stream.
    pub(super) fn answered(mut self, result: &mut Result<OnlineAnswer, OnlineError>) {
        self.outcome = match result {
            Ok(OnlineAnswer::Stream(stream)) => return stream.count(self),
            Ok(OnlineAnswer::Whole { status: 200..=299, .. }) => Outcome::Succeeded,
            Ok(OnlineAnswer::Whole { .. }) | Err(OnlineError::Failed { .. }) => Outcome::Failed,
            Err(_) => Outcome::Refused,
        };
    }

    /// Counts a stream that has ended.
    pub(super) fn ended(mut self, succeeded: bool) {
        self.outcome = if succeeded { Outcome::Succeeded } else { Outcome::Failed };
    }
}

impl Drop for RequestCount {
    fn drop(&mut self) {
        let RequestLabels { metrics, plugin, endpoint, .. } = &self.labels;
        metrics.requests(self.labels.counted(), self.outcome, 1);
        metrics.request_took(Source::Online, plugin.name(), *endpoint, self.began.elapsed());
    }
}
