//! Metrics of batches, of their requests and of online requests.

use std::sync::Arc;
use std::time::Duration;

use batchwright_domain::clock::Timestamp;
use batchwright_domain::endpoint::Endpoint;
use batchwright_domain::ids::TenantId;
use batchwright_domain::status::Status;
use batchwright_domain::usage::TokenUsage;
use batchwright_store::{BatchRecord, Claim};
use batchwright_telemetry::{
    Counter, Error, Histogram, Kind, LONG_DURATION_BUCKETS, Metric, Metrics, number,
};

const REQUESTS: Metric = Metric {
    name: "batchwright_requests_total",
    kind: Kind::Counter,
    labels: &["source", "plugin", "model", "endpoint", "outcome", "tenant"],
    help: "Requests with a result, one per line or online request, whatever the attempts. \
           `source` is `batch` or `online`; `model` is the entry of the plugin file that names the \
           model; `outcome` is `succeeded`, `failed`, `expired`, `cancelled`, or, online, \
           `refused` (not sent) or `abandoned` (the client left)",
};
const DURATION: Metric = Metric {
    name: "batchwright_request_duration_seconds",
    kind: Kind::Histogram(LONG_DURATION_BUCKETS),
    labels: &["source", "plugin", "endpoint"],
    help: "Time from the first attempt at a request to its result, with all retries and waits",
};
const ATTEMPTS: Metric = Metric {
    name: "batchwright_request_attempts_total",
    kind: Kind::Counter,
    labels: &["plugin", "verdict"],
    help: "Attempts at requests of batches that a provider was asked for, by the verdict on the \
           last exchange: `answered`, `rate_limited`, `transient_error`, `unreachable`, \
           `unauthorized`, `forbidden`, `quota`, `failed`, `no_response`, `not_sent`; a poll of a \
           job that goes on is no attempt",
};
const RETRIES: Metric = Metric {
    name: "batchwright_request_retries_total",
    kind: Kind::Counter,
    labels: &["plugin", "cause"],
    help: "Attempts that lead to another attempt, by the verdict on the last exchange",
};
const TOKENS: Metric = Metric {
    name: "batchwright_tokens_total",
    kind: Kind::Counter,
    labels: &["source", "plugin", "model", "type", "tenant"],
    help: "Tokens that providers report, or, without a report, an estimate for online requests: \
           `input`, of these `cached_input`, `output`, of these \
           `reasoning`",
};
const LATE: Metric = Metric {
    name: "batchwright_requests_after_deadline_total",
    kind: Kind::Counter,
    labels: &["outcome"],
    help: "Requests of batches that the deadline has overtaken: `finished` after it, while the \
           batch ended, or `expired` without an answer",
};
const FINISHED: Metric = Metric {
    name: "batchwright_batches_finished_total",
    kind: Kind::Counter,
    labels: &["status", "tenant"],
    help: "Batches that ended in this process, by final status",
};
const BATCH_DURATION: Metric = Metric {
    name: "batchwright_batch_duration_seconds",
    kind: Kind::Histogram(LONG_DURATION_BUCKETS),
    labels: &["status"],
    help: "Time from the creation of a batch to its end, by final status",
};
const STATE_DURATION: Metric = Metric {
    name: "batchwright_batch_state_duration_seconds",
    kind: Kind::Histogram(LONG_DURATION_BUCKETS),
    labels: &["state"],
    help: "Time that a batch was in a state, observed at its end: `validating`, `in_progress`, \
           `finalizing`, `cancelling`",
};
const QUEUE: Metric = Metric {
    name: "batchwright_batch_queue_duration_seconds",
    kind: Kind::Histogram(LONG_DURATION_BUCKETS),
    labels: &["next"],
    help: "Time that a batch waited for a place: from its creation to `validation`, or from the \
           end of validation to its `execution`; a batch that was interrupted is not observed",
};

/// Declarations of the counted metrics of the engine.
pub const METRICS: &[Metric] = &[
    REQUESTS,
    DURATION,
    ATTEMPTS,
    RETRIES,
    TOKENS,
    LATE,
    FINISHED,
    BATCH_DURATION,
    STATE_DURATION,
    QUEUE,
];

/// Where a request comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// Line of a batch.
    Batch,
    /// Request of a client that waits.
    Online,
}

impl Source {
    fn as_str(self) -> &'static str {
        match self {
            Self::Batch => "batch",
            Self::Online => "online",
        }
    }
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Succeeded,
    Failed,
    Expired,
    Cancelled,
    /// Online: the host has not sent the request.
    Refused,
    /// Online: the client has left.
    Abandoned,
}

impl Outcome {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Expired => "expired",
            Self::Cancelled => "cancelled",
            Self::Refused => "refused",
            Self::Abandoned => "abandoned",
        }
    }
}

/// What a request is counted by.
#[derive(Clone, Copy)]
pub(crate) struct Counted<'a> {
    pub source: Source,
    pub tenant: &'a TenantId,
    /// Plugin; empty if none took part.
    pub plugin: &'a str,
    /// Entry of the plugin file that names the model; empty if unknown.
    pub model: &'a str,
    pub endpoint: Endpoint,
}

/// Counted metrics of the engine.
pub(crate) struct EngineMetrics {
    requests: Counter,
    duration: Histogram,
    attempts: Counter,
    retries: Counter,
    tokens: Counter,
    late: Counter,
    finished: Counter,
    batch_duration: Histogram,
    state_duration: Histogram,
    queue: Histogram,
    metrics: Metrics,
}

impl EngineMetrics {
    /// Registers the metrics.
    pub(crate) fn register(metrics: &Metrics) -> Result<Arc<Self>, Error> {
        let late = metrics.counter(&LATE)?;
        late.prepare(&["finished"]);
        late.prepare(&["expired"]);
        Ok(Arc::new(Self {
            requests: metrics.counter(&REQUESTS)?,
            duration: metrics.histogram(&DURATION)?,
            attempts: metrics.counter(&ATTEMPTS)?,
            retries: metrics.counter(&RETRIES)?,
            tokens: metrics.counter(&TOKENS)?,
            late,
            finished: metrics.counter(&FINISHED)?,
            batch_duration: metrics.histogram(&BATCH_DURATION)?,
            state_duration: metrics.histogram(&STATE_DURATION)?,
            queue: metrics.histogram(&QUEUE)?,
            metrics: metrics.clone(),
        }))
    }

    /// Counts requests that have ended in the same way.
    pub(crate) fn requests(&self, of: Counted<'_>, outcome: Outcome, count: u64) {
        let tenant = self.metrics.tenant_label(of.tenant.as_str());
        let (source, endpoint) = (of.source.as_str(), of.endpoint.as_str());
        let labels = [source, of.plugin, of.model, endpoint, outcome.as_str(), tenant];
        self.requests.add(&labels, number(count));
    }

    /// Counts the tokens of a request.
    pub(crate) fn tokens(&self, of: Counted<'_>, usage: TokenUsage) {
        let tenant = self.metrics.tenant_label(of.tenant.as_str());
        let usage = usage.plausible();
        for (kind, tokens) in [
            ("input", usage.input),
            ("cached_input", usage.cached_input),
            ("output", usage.output),
            ("reasoning", usage.reasoning),
        ] {
            if tokens > 0 {
                let labels = [of.source.as_str(), of.plugin, of.model, kind, tenant];
                self.tokens.add(&labels, number(tokens));
            }
        }
    }

    /// Records the time of a whole request.
    pub(crate) fn request_took(
        &self,
        source: Source,
        plugin: &str,
        endpoint: Endpoint,
        time: Duration,
    ) {
        let labels = [source.as_str(), plugin, endpoint.as_str()];
        self.duration.observe(&labels, time.as_secs_f64());
    }

    /// Counts an attempt for which a provider was asked.
    pub(crate) fn attempted(&self, plugin: &str, verdict: &'static str, is_retried: bool) {
        self.attempts.increment(&[plugin, verdict]);
        if is_retried {
            self.retries.increment(&[plugin, verdict]);
        }
    }

    /// Counts requests that the deadline of their batch has overtaken.
    pub(crate) fn overtaken(&self, has_result: bool, count: u64) {
        let outcome = if has_result { "finished" } else { "expired" };
        self.late.add(&[outcome], number(count));
    }

    /// Records the time that a claimed batch waited for a place.
    pub(crate) fn claimed(&self, claim: &Claim, batch: &BatchRecord, now: Timestamp) {
        // Each claim has the next fence. A later one belongs to a batch that ran before.
        let (next, since) = match (claim.fence, batch.times.in_progress_at) {
            (1, None) => ("validation", batch.new.created_at),
            (2, Some(validated_at)) => ("execution", validated_at),
            _ => return,
        };
        self.queue.observe(&[next], since.until(now).as_secs_f64());
    }

    /// Records the end of a batch.
    pub(crate) fn batch_ended(&self, tenant: &TenantId, batch: &BatchRecord) {
        let times = &batch.times;
        let ended = [times.completed_at, times.failed_at, times.expired_at, times.cancelled_at];
        let Some(ended) = ended.into_iter().flatten().next() else { return };
        let status = batch.status.as_str();
        self.finished.increment(&[status, self.metrics.tenant_label(tenant.as_str())]);
        let created = batch.new.created_at;
        self.batch_duration.observe(&[status], created.until(ended).as_secs_f64());
        let states = [
            ("validating", Some(created)),
            ("in_progress", times.in_progress_at),
            ("finalizing", times.finalizing_at),
            ("cancelling", times.cancelling_at),
        ];
        let mut entered: Vec<_> =
            states.into_iter().filter_map(|(state, at)| Some((at?, state))).collect();
        entered.sort_by_key(|(at, _)| *at);
        let ends = entered.iter().skip(1).map(|(at, _)| *at).chain([ended]);
        for ((since, state), until) in entered.iter().zip(ends) {
            self.state_duration.observe(&[state], since.until(until).as_secs_f64());
        }
        self.unanswered(tenant, batch);
    }

    /// Counts the requests of a batch that ended without a result.
    fn unanswered(&self, tenant: &TenantId, batch: &BatchRecord) {
        let counts = batch.counts;
        let done = counts.completed.saturating_add(counts.failed);
        let left = counts.total.saturating_sub(done);
        let outcome = match batch.status {
            Status::Expired => Outcome::Expired,
            Status::Cancelled => Outcome::Cancelled,
            _ => Outcome::Failed,
        };
        if left > 0 {
            let endpoint = batch.new.endpoint;
            let of = Counted { source: Source::Batch, tenant, plugin: "", model: "", endpoint };
            self.requests(of, outcome, left);
            if outcome == Outcome::Expired {
                self.overtaken(false, left);
            }
        }
    }
}
