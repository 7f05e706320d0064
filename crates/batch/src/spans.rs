//! Spans of uploads, batches and requests.
//!
//! **One trace per batch.** Its root is recorded at the end of the batch, with links to the upload
//! of its input file. Pieces of validation, turns of execution and finalizing are children. A
//! request has a trace of its own, linked to that of its batch: 50,000 lines are not one trace. Of
//! requests that succeed, a part is kept; every request that fails, and every failed attempt, is
//! kept.
//!
//! Each span has the same names for the same things: `tenant`, `batch`, `request`, `line`,
//! `plugin`, `model`, `endpoint`. No attribute holds text of a client or of a provider.

use std::time::{Duration, SystemTime};

use batchwright_domain::clock::Timestamp;
use batchwright_domain::endpoint::Endpoint;
use batchwright_domain::ids::{BatchId, FileId, TenantId};
use batchwright_domain::usage::TokenUsage;
use batchwright_store::BatchRecord;
use batchwright_telemetry::{Context, GenAi, Inference, Role, Span, Traces};

/// Spans of one engine, and the metrics of generative AI.
#[derive(Clone)]
pub(crate) struct Spans {
    pub traces: Traces,
    pub gen_ai: GenAi,
}

/// Attempt at a request, as its spans and metrics show it.
pub(crate) struct Attempted<'a> {
    /// Contexts of the attempt and of its request; none if nothing is traced.
    pub contexts: Option<(Context, Context)>,
    pub began: SystemTime,
    /// Duration since the first exchange.
    pub duration: Duration,
    pub plugin: &'a str,
    /// Name of the adapter.
    pub provider: &'a str,
    /// Entry of the plugin file that names the model.
    pub model: &'a str,
    pub endpoint: Endpoint,
    /// Verdict on the last exchange.
    pub verdict: &'static str,
    /// HTTP status, if the provider has answered.
    pub status: Option<u16>,
    pub usage: TokenUsage,
}

/// Request that has ended.
pub(crate) struct Ended<'a> {
    pub context: Context,
    /// Span of the client, for an online request.
    pub parent: Option<Context>,
    /// Batch and line, for a request of a batch.
    pub line: Option<(&'a BatchId, u64)>,
    pub id: &'a str,
    pub began: SystemTime,
    pub tenant: &'a TenantId,
    pub plugin: &'a str,
    pub model: &'a str,
    pub endpoint: Endpoint,
    /// HTTP status or code of the failure; none if the request succeeded.
    pub error: Option<String>,
}

/// Returns the operation of an endpoint in OpenTelemetry's conventions.
fn operation(endpoint: Endpoint) -> &'static str {
    match endpoint {
        Endpoint::ChatCompletions | Endpoint::Responses => "chat",
        Endpoint::Completions => "text_completion",
        Endpoint::Embeddings => "embeddings",
        Endpoint::Moderations => "moderation",
    }
}

/// Converts a time of the clock.
fn system_time(at: Timestamp) -> SystemTime {
    let since = Duration::from_millis(u64::try_from(at.as_millis()).unwrap_or(0));
    SystemTime::UNIX_EPOCH.checked_add(since).unwrap_or(SystemTime::UNIX_EPOCH)
}

impl Spans {
    /// Returns the context of a line's request; none if nothing is traced.
    pub(crate) fn request(&self, id: &str) -> Option<Context> {
        self.traces.is_enabled().then(|| Context::of(id))
    }

    /// Returns the context of an attempt at a request; none if nothing is traced.
    pub(crate) fn attempt(&self, request: Context) -> Option<Context> {
        self.traces.is_enabled().then(|| request.child().sampled(self.traces.samples(request)))
    }

    /// Records the upload of a file.
    pub(crate) fn uploaded(&self, tenant: &TenantId, file: &FileId, bytes: u64, began: SystemTime) {
        if !self.traces.is_enabled() {
            return;
        }
        let span = Span::new("upload", Context::of(file.as_str()), began);
        let span = span.text("tenant", tenant.as_str()).text("file", file.as_str());
        self.traces.record(span.number("bytes", bytes));
    }

    /// Records a part of the work on a batch.
    pub(crate) fn part(
        &self,
        name: &'static str,
        (tenant, batch): (&TenantId, &BatchId),
        began: SystemTime,
        add: impl FnOnce(Span) -> Span,
    ) {
        if !self.traces.is_enabled() {
            return;
        }
        let root = Context::of(batch.as_str());
        let span = Span::new(name, root.child(), began).parent(root);
        let span = span.text("tenant", tenant.as_str()).text("batch", batch.as_str());
        self.traces.record(add(span));
    }

    /// Records the end of a batch.
    pub(crate) fn batch_ended(&self, tenant: &TenantId, batch: &BatchRecord) {
        if !self.traces.is_enabled() {
            return;
        }
        let new = &batch.new;
        let root = Context::of(new.id.as_str());
        let span = Span::new("batch", root, system_time(new.created_at));
        let span = span
            .link(Context::of(new.input_file_id.as_str()))
            .text("tenant", tenant.as_str())
            .text("batch", new.id.as_str())
            .text("endpoint", new.endpoint.as_str())
            .text("status", batch.status.as_str())
            .number("requests.total", batch.counts.total)
            .number("requests.completed", batch.counts.completed)
            .number("requests.failed", batch.counts.failed);
        let ended_well = batch.status == batchwright_domain::status::Status::Completed;
        self.traces.record(if ended_well { span } else { span.failed(batch.status.as_str()) });
    }

    /// Records an attempt, and counts it in the metrics of generative AI.
    pub(crate) fn attempted(&self, attempted: &Attempted<'_>) {
        let Attempted { plugin, provider, model, endpoint, verdict, status, usage, .. } =
            *attempted;
        let has_succeeded = status.is_some_and(|status| (200..300).contains(&status));
        let code = status.filter(|_| !has_succeeded).map(|status| status.to_string());
        let error = (!has_succeeded).then(|| code.as_deref().unwrap_or(verdict));
        let operation = operation(endpoint);
        let usage = usage.plausible();
        self.gen_ai.record(Inference {
            operation,
            provider,
            model,
            error,
            duration: attempted.duration,
            tokens: [usage.input, usage.cached_input, usage.output, usage.reasoning],
        });
        let Some((context, request)) = attempted.contexts else { return };
        if !self.traces.is_enabled() || !(context.is_sampled() || error.is_some()) {
            return;
        }
        let span = Span::new(format!("{operation} {model}"), context, attempted.began)
            .parent(request)
            .role(Role::Client)
            .text("plugin", plugin)
            .text("verdict", verdict)
            .text("gen_ai.operation.name", operation)
            .text("gen_ai.provider.name", provider)
            .text("gen_ai.request.model", model);
        let span = match status {
            Some(status) => span.number("http.response.status_code", status.into()),
            None => span,
        };
        let span = span
            .number("gen_ai.usage.input_tokens", usage.input)
            .number("gen_ai.usage.output_tokens", usage.output);
        self.traces.record(match error {
            Some(error) => span.failed(error),
            None => span,
        });
    }

    /// Records the end of a request.
    pub(crate) fn ended(&self, ended: Ended<'_>) {
        if !self.traces.is_enabled() {
            return;
        }
        let is_kept = match ended.parent {
            Some(parent) => parent.is_sampled(),
            None => self.traces.samples(ended.context),
        };
        if !is_kept && ended.error.is_none() {
            return;
        }
        let span = Span::new("request", ended.context, ended.began)
            .text("tenant", ended.tenant.as_str())
            .text("request", ended.id)
            .text("plugin", ended.plugin)
            .text("model", ended.model)
            .text("endpoint", ended.endpoint.as_str());
        let span = match ended.line {
            Some((batch, line)) => span
                .link(Context::of(batch.as_str()))
                .text("batch", batch.as_str())
                .number("line", line),
            None => span.role(Role::Server),
        };
        let span = match ended.parent {
            Some(parent) => span.remote_parent(parent),
            None => span,
        };
        self.traces.record(match ended.error {
            Some(error) => span.failed(error),
            None => span,
        });
    }
}
