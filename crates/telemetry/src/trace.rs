//! Traces: contexts, spans that have ended, and the queue to the exporter.
//!
//! A span is recorded when it has ended, with its start and its parent, and never entered or left:
//! what runs meanwhile on the same thread, or under which log level, has no influence on it.
//!
//! **Contexts.** The trace of a batch or a request has an id that is derived from its own id
//! ([`Context::of`]). So each process that works on a batch, today or after a crash, adds its spans
//! to the same trace, and nothing about traces is stored.
//!
//! **Sampling.** Of the spans of requests, a part is kept that is decided by the id
//! ([`Traces::samples`]); spans of failures are always kept.
//!
//! **Bounds.** The queue has [`QUEUE_SPANS`] places. A span that finds no place is dropped and
//! counted. A collector that does not answer costs a timeout of the exporter, and nothing else.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use opentelemetry::trace::{
    Link, SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState,
};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanExporter, SpanLinks};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::Counter;

/// Maximum number of spans that wait for the exporter.
const QUEUE_SPANS: usize = 8192;

/// Maximum number of spans in one export.
const MAX_BATCH_SPANS: usize = 512;

/// Time after which waiting spans are exported, however few they are.
const EXPORT_INTERVAL: Duration = Duration::from_secs(2);

/// Maximum time of one export.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);

/// Maximum time in which the spans that wait are exported when the server ends.
const END_TIMEOUT: Duration = Duration::from_secs(3);

/// Returns the time for a span.
#[expect(
    clippy::disallowed_methods,
    reason = "spans are no durable times, and no test advances them"
)]
pub fn now() -> SystemTime {
    SystemTime::now()
}

/// Returns the time a duration ago, for spans.
pub fn ago(duration: std::time::Duration) -> SystemTime {
    now().checked_sub(duration).unwrap_or(SystemTime::UNIX_EPOCH)
}

/// Identity of a span in its trace, as W3C Trace Context passes it on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    trace: TraceId,
    span: SpanId,
    is_sampled: bool,
}

impl Context {
    /// Returns the context of the thing with an id, such as a batch: the root of its trace.
    pub fn of(id: &str) -> Self {
        let digest: [u8; 32] = Sha256::digest(id.as_bytes()).into();
        let (trace, rest) = digest.split_at(16);
        let (span, _) = rest.split_at(8);
        Self {
            trace: TraceId::from_bytes(trace.try_into().unwrap_or_default()),
            span: SpanId::from_bytes(span.try_into().unwrap_or_default()),
            is_sampled: true,
        }
    }

    /// Parses the value of a header `traceparent`; returns `None` if it is not valid.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.trim().split('-');
        let (version, trace, span, flags) =
            (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        // Later versions may have more parts.
        if version == "ff" || version.len() != 2 || (version == "00" && parts.next().is_some()) {
            return None;
        }
        let is_hex = |text: &str, length| {
            text.len() == length
                && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
        };
        if ![(version, 2), (trace, 32), (span, 16), (flags, 2)]
            .iter()
            .all(|(text, length)| is_hex(text, *length))
        {
            return None;
        }
        let (trace, span) = (TraceId::from_hex(trace).ok()?, SpanId::from_hex(span).ok()?);
        let is_sampled = u8::from_str_radix(flags, 16).ok()? & 1 == 1;
        (trace != TraceId::INVALID && span != SpanId::INVALID).then_some(Self {
            trace,
            span,
            is_sampled,
        })
    }

    /// Returns the value of the header `traceparent`.
    pub fn traceparent(&self) -> String {
        format!("00-{}-{}-{:02x}", self.trace, self.span, u8::from(self.is_sampled))
    }

    /// Returns the context of a new span in the same trace.
    #[must_use]
    pub fn child(&self) -> Self {
        Self { span: SpanId::from(fastrand::u64(1..)), ..*self }
    }

    /// Returns the context with the decision whether its span is exported.
    #[must_use]
    pub fn sampled(self, is_sampled: bool) -> Self {
        Self { is_sampled, ..self }
    }

    /// Returns true if the span is exported.
    pub fn is_sampled(&self) -> bool {
        self.is_sampled
    }

    fn span_context(&self, is_remote: bool) -> SpanContext {
        let flags = if self.is_sampled { TraceFlags::SAMPLED } else { TraceFlags::default() };
        SpanContext::new(self.trace, self.span, flags, is_remote, TraceState::default())
    }
}

/// Role of a span toward another service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// Work within the server.
    #[default]
    Internal,
    /// Request of a client.
    Server,
    /// Request to a provider.
    Client,
}

/// Span that has ended.
pub struct Span {
    data: SpanData,
}

impl Span {
    /// Creates a span that began at a time and ends now.
    pub fn new(name: impl Into<Cow<'static, str>>, context: Context, began: SystemTime) -> Self {
        let data = SpanData {
            span_context: context.span_context(false),
            parent_span_id: SpanId::INVALID,
            parent_span_is_remote: false,
            span_kind: SpanKind::Internal,
            name: name.into(),
            start_time: began,
            end_time: now().max(began),
            attributes: Vec::new(),
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            status: Status::Unset,
            instrumentation_scope: InstrumentationScope::builder("batchwright").build(),
        };
        Self { data }
    }

    /// Sets the role.
    #[must_use]
    pub fn role(mut self, role: Role) -> Self {
        self.data.span_kind = match role {
            Role::Internal => SpanKind::Internal,
            Role::Server => SpanKind::Server,
            Role::Client => SpanKind::Client,
        };
        self
    }

    /// Sets the parent, a span of this server.
    #[must_use]
    pub fn parent(mut self, parent: Context) -> Self {
        self.data.parent_span_id = parent.span;
        self
    }

    /// Sets the parent, a span of a client.
    #[must_use]
    pub fn remote_parent(mut self, parent: Context) -> Self {
        self.data.parent_span_is_remote = true;
        self.parent(parent)
    }

    /// Adds a link to the span of another trace.
    #[must_use]
    pub fn link(mut self, to: Context) -> Self {
        self.data.links.links.push(Link::new(to.span_context(false), Vec::new(), 0));
        self
    }

    /// Adds a text attribute.
    #[must_use]
    pub fn text(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.data.attributes.push(KeyValue::new(name, value.into()));
        self
    }

    /// Adds a number attribute.
    #[must_use]
    pub fn number(mut self, name: &'static str, value: u64) -> Self {
        let value = i64::try_from(value).unwrap_or(i64::MAX);
        self.data.attributes.push(KeyValue::new(name, value));
        self
    }

    /// Marks the span as failed, for a cause that is a code and not a text of people.
    #[must_use]
    pub fn failed(mut self, cause: impl Into<String>) -> Self {
        self.data.status = Status::error("");
        self.text("error.type", cause)
    }
}

/// Where spans go; without an exporter, nowhere.
#[derive(Clone, Default)]
pub struct Traces(Option<Arc<Queue>>);

struct Queue {
    spans: mpsc::Sender<SpanData>,
    /// Part of the requests whose spans are kept, from 0 to 1.
    ratio: f64,
    dropped: Counter,
}

impl Traces {
    /// Creates a queue, and what exports its spans until it ends.
    pub(crate) fn new(
        ratio: f64,
        dropped: Counter,
        exporter: impl SpanExporter + 'static,
    ) -> (Self, Exporting<impl SpanExporter + 'static>) {
        let (spans, waiting) = mpsc::channel(QUEUE_SPANS);
        let queue = Queue { spans, ratio, dropped: dropped.clone() };
        (Self(Some(Arc::new(queue))), Exporting { waiting, exporter, dropped, is_failing: false })
    }

    /// Returns true if spans are exported.
    pub fn is_enabled(&self) -> bool {
        self.0.is_some()
    }

    /// Returns true if the spans of the request with this context are kept even if it succeeds.
    pub fn samples(&self, request: Context) -> bool {
        let Some(queue) = &self.0 else { return false };
        let bytes = request.trace.to_bytes();
        let [first, second, third, fourth, ..] = bytes;
        let place = f64::from(u32::from_be_bytes([first, second, third, fourth]));
        place < queue.ratio * (f64::from(u32::MAX) + 1.0)
    }

    /// Records a span.
    pub fn record(&self, span: Span) {
        let Some(queue) = &self.0 else { return };
        if queue.spans.try_send(span.data).is_err() {
            queue.dropped.increment(&["queue_full"]);
        }
    }
}

/// Exporter of the spans of a queue.
pub(crate) struct Exporting<E> {
    waiting: mpsc::Receiver<SpanData>,
    exporter: E,
    dropped: Counter,
    /// True if the last export has failed.
    is_failing: bool,
}

impl<E: SpanExporter> Exporting<E> {
    /// Exports spans until `ended`, and then those that wait, for a bounded time.
    pub(crate) async fn run(mut self, ended: CancellationToken) {
        loop {
            let mut spans = Vec::new();
            let received = self.waiting.recv_many(&mut spans, MAX_BATCH_SPANS);
            let is_open = match ended.run_until_cancelled(received).await {
                Some(number) => number > 0,
                None => break,
            };
            if !is_open {
                return;
            }
            let full = async {
                while spans.len() < MAX_BATCH_SPANS {
                    let left = MAX_BATCH_SPANS.saturating_sub(spans.len());
                    if self.waiting.recv_many(&mut spans, left).await == 0 {
                        return;
                    }
                }
            };
            let full = tokio::time::timeout(EXPORT_INTERVAL, full);
            ended.run_until_cancelled(full).await;
            self.export(spans).await;
        }
        let rest = async {
            loop {
                let mut spans = Vec::new();
                while spans.len() < MAX_BATCH_SPANS
                    && let Ok(span) = self.waiting.try_recv()
                {
                    spans.push(span);
                }
                if spans.is_empty() {
                    return;
                }
                self.export(spans).await;
            }
        };
        tokio::time::timeout(END_TIMEOUT, rest).await.ok();
    }

    async fn export(&mut self, spans: Vec<SpanData>) {
        let number = spans.len();
        let exported = tokio::time::timeout(EXPORT_TIMEOUT, self.exporter.export(spans)).await;
        let error = match exported {
            Ok(Ok(())) => {
                self.is_failing = false;
                return;
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {EXPORT_TIMEOUT:?}"),
        };
        self.dropped.add(&["export_failed"], crate::number(number as u64));
        // A collector that is away for hours must not fill the log.
        if std::mem::replace(&mut self.is_failing, true) {
            tracing::debug!(spans = number, error, "spans not exported");
        } else {
            tracing::warn!(spans = number, error, "spans not exported, further failures at debug");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn context_is_parsed_as_the_recommendation_says() {
        let text = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let context = Context::parse(text).unwrap();
        assert_eq!(context.traceparent(), text);
        assert!(context.is_sampled());
        let later = "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00-more";
        assert!(!Context::parse(later).unwrap().is_sampled());
        for text in [
            "",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-+bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        ] {
            assert_eq!(Context::parse(text), None, "{text}");
        }
    }

    #[test]
    fn context_of_an_id_is_always_the_same_and_its_children_share_the_trace() {
        let (context, child) = (Context::of("batch_1"), Context::of("batch_1").child());
        assert_eq!(context, Context::of("batch_1"));
        assert_ne!(context.trace, Context::of("batch_2").trace);
        assert!(context.trace == child.trace && context.span != child.span);
        assert_eq!(Context::parse(&child.traceparent()), Some(child));
    }
}
