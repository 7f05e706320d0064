//! OTLP: exports traces, and the metrics of OpenTelemetry's conventions for generative AI.
//!
//! Everything is sent by HTTP with protobuf bodies. The settings that a program shares with others
//! come from the variables of OpenTelemetry: `OTEL_EXPORTER_OTLP_HEADERS`, `OTEL_SERVICE_NAME`,
//! `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_METRIC_EXPORT_INTERVAL` and `OTEL_SEMCONV_STABILITY_OPT_IN`.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use opentelemetry::metrics::{Counter, Histogram, MeterProvider};
use opentelemetry::{Key, KeyValue};
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_otlp::{
    MetricExporter, Protocol, SpanExporter, WithExportConfig, WithHttpConfig,
};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::metrics::{PeriodicReader, SdkMeterProvider};
use opentelemetry_sdk::trace::SpanExporter as _;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::trace::Traces;
use crate::{Kind, Metric, Metrics};

const DROPPED: Metric = Metric {
    name: "batchwright_trace_spans_dropped_total",
    kind: Kind::Counter,
    labels: &["cause"],
    help: "Spans that were not exported: `queue_full` or `export_failed`",
};

/// Declarations of the metrics of the exporter.
pub const METRICS: &[Metric] = &[DROPPED];

/// Maximum time of one request to the collector.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Maximum time in which the last metrics are sent when the server ends.
const END_TIMEOUT: Duration = Duration::from_secs(3);

/// Maximum size of an answer of the collector, in bytes.
const MAX_ANSWER_BYTES: usize = 64 << 10;

/// Upper bounds of the buckets of durations, in seconds, as the conventions recommend.
const DURATION_BOUNDS: [f64; 14] =
    [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92];

/// Upper bounds of the buckets of tokens, as the conventions recommend.
const TOKEN_BOUNDS: [f64; 14] = [
    1.0,
    4.0,
    16.0,
    64.0,
    256.0,
    1024.0,
    4096.0,
    16_384.0,
    65_536.0,
    262_144.0,
    1_048_576.0,
    4_194_304.0,
    16_777_216.0,
    67_108_864.0,
];

/// Reason why nothing can be exported.
#[derive(Debug, thiserror::Error)]
pub enum OtlpError {
    /// Endpoint or variable that is not valid.
    #[error("{0}")]
    Invalid(String),
}

/// What an operator sets.
#[derive(Clone, Debug)]
pub struct OtlpConfig {
    /// URL of the collector, without the path of a signal, such as `http://127.0.0.1:4318`.
    pub endpoint: String,
    /// Part of the requests whose spans are kept although they succeeded, from 0 to 1.
    pub request_ratio: f64,
    /// Version of the program.
    pub version: &'static str,
}

/// Exporters of a process.
pub struct Otlp {
    /// Where spans go.
    pub traces: Traces,
    /// Where the metrics of requests to providers go.
    pub gen_ai: GenAi,
    meters: SdkMeterProvider,
    ended: CancellationToken,
    exporting: JoinHandle<()>,
}

/// Returns what the program says of itself, with the name that the variables give it, if any.
fn resource(version: &'static str) -> Resource {
    let name = Resource::builder().build().get(&Key::from_static_str("service.name"));
    let is_named = name.is_some_and(|name| !name.as_str().starts_with("unknown_service"));
    let builder = Resource::builder().with_attribute(KeyValue::new("service.version", version));
    if is_named { builder.build() } else { builder.with_service_name("batchwright").build() }
}

impl Otlp {
    /// Starts the exporters. Must be called within a runtime, which the requests run on.
    pub fn start(config: &OtlpConfig, metrics: &Metrics) -> Result<Self, OtlpError> {
        let invalid = |error: &dyn std::fmt::Display| OtlpError::Invalid(error.to_string());
        if let Ok(protocol) = std::env::var("OTEL_EXPORTER_OTLP_PROTOCOL")
            && !protocol.is_empty()
            && protocol != "http/protobuf"
        {
            let message = format!(
                "OTEL_EXPORTER_OTLP_PROTOCOL is `{protocol}`; this program speaks `http/protobuf`, \
                 mostly on port 4318"
            );
            return Err(OtlpError::Invalid(message));
        }
        let base = config.endpoint.trim_end_matches('/');
        let uri: http::Uri = base.parse().map_err(|error| invalid(&error))?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.host().is_none() {
            let message =
                format!("`{}` is not a URL such as http://127.0.0.1:4318", config.endpoint);
            return Err(OtlpError::Invalid(message));
        }
        let client = RuntimeClient::new();
        let resource = resource(config.version);
        let mut spans = SpanExporter::builder()
            .with_http()
            .with_http_client(client.clone())
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(format!("{base}/v1/traces"))
            .with_timeout(REQUEST_TIMEOUT)
            .build()
            .map_err(|error| invalid(&error))?;
        spans.set_resource(&resource);
        let exporter = MetricExporter::builder()
            .with_http()
            .with_http_client(client)
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(format!("{base}/v1/metrics"))
            .with_timeout(REQUEST_TIMEOUT)
            .build()
            .map_err(|error| invalid(&error))?;
        let meters = SdkMeterProvider::builder()
            .with_resource(resource)
            .with_reader(PeriodicReader::builder(exporter).build())
            .build();
        let dropped = metrics.counter(&DROPPED).map_err(|error| invalid(&error))?;
        let (traces, exporting) = Traces::new(config.request_ratio, dropped, spans);
        let ended = CancellationToken::new();
        let exporting = tokio::spawn(exporting.run(ended.clone()));
        Ok(Self { traces, gen_ai: GenAi::new(&meters), meters, ended, exporting })
    }

    /// Sends what waits, for a bounded time, and ends the exporters.
    pub async fn end(self) {
        self.ended.cancel();
        let meters = self.meters;
        // Blocks until its own thread has sent the last metrics.
        let metrics =
            tokio::task::spawn_blocking(move || meters.shutdown_with_timeout(END_TIMEOUT));
        let exporting = tokio::time::timeout(END_TIMEOUT, self.exporting);
        let (exported, sent) = tokio::join!(exporting, tokio::time::timeout(END_TIMEOUT, metrics));
        if exported.is_err() || sent.is_err() {
            tracing::warn!("last spans or metrics not sent to the collector in time");
        }
    }
}

/// HTTP client whose requests run on the runtime of the server, whatever thread waits for them.
#[derive(Clone, Debug)]
struct RuntimeClient {
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    runtime: Handle,
}

impl RuntimeClient {
    fn new() -> Self {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = match HttpsConnectorBuilder::new().with_provider_and_native_roots(provider) {
            Ok(builder) => builder,
            // Without roots of the system, as in some containers.
            Err(_) => HttpsConnectorBuilder::new().with_webpki_roots(),
        };
        let connector = builder.https_or_http().enable_http1().build();
        let client = Client::builder(TokioExecutor::new()).build(connector);
        Self { client, runtime: Handle::current() }
    }
}

#[async_trait]
impl HttpClient for RuntimeClient {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let client = self.client.clone();
        let sending = self.runtime.spawn(async move {
            let sent = async {
                let response = client.request(request.map(Full::new)).await?;
                let (head, body) = response.into_parts();
                let body = Limited::new(body, MAX_ANSWER_BYTES).collect().await?.to_bytes();
                Ok::<_, HttpError>(Response::from_parts(head, body))
            };
            tokio::time::timeout(REQUEST_TIMEOUT, sent).await?
        });
        sending.await?
    }
}

/// Request to a provider, for the metrics of generative AI.
#[derive(Clone, Copy, Debug)]
pub struct Inference<'a> {
    /// Operation: `chat`, `text_completion`, `embeddings`, or `moderation`.
    pub operation: &'static str,
    /// Name of the adapter, used as the name of the provider.
    pub provider: &'a str,
    /// Entry of the plugin file that names the model.
    pub model: &'a str,
    /// Code of the failure; none if the provider answered with success.
    pub error: Option<&'a str>,
    /// Duration of the operation.
    pub duration: Duration,
    /// Tokens: input, cached input, output, reasoning.
    pub tokens: [u64; 4],
}

/// Metrics of OpenTelemetry's conventions for clients of generative AI.
#[derive(Clone, Default)]
pub struct GenAi(Option<Arc<Instruments>>);

struct Instruments {
    /// The duration under its name and under its former name.
    durations: [Histogram<f64>; 2],
    /// Input, cached input, output and reasoning tokens.
    usage: [Counter<u64>; 4],
    /// Former metric of tokens, if asked for.
    former_usage: Option<Histogram<u64>>,
}

impl GenAi {
    fn new(meters: &SdkMeterProvider) -> Self {
        let meter = meters.meter("batchwright");
        let duration = |name: &'static str| {
            meter
                .f64_histogram(name)
                .with_unit("s")
                .with_description("Duration of operations of generative AI")
                .with_boundaries(DURATION_BOUNDS.to_vec())
                .build()
        };
        let usage = |name: &'static str| {
            let counter = meter.u64_counter(format!("gen_ai.client.inference.usage.{name}"));
            counter
                .with_unit("{token}")
                .with_description("Tokens that the provider reports")
                .build()
        };
        // The variable lists versions of conventions beside the current one.
        let opted_in = std::env::var("OTEL_SEMCONV_STABILITY_OPT_IN").unwrap_or_default();
        let wants_former = opted_in.split(',').any(|word| word.trim() == "gen_ai/dup");
        Self(Some(Arc::new(Instruments {
            durations: [
                duration("gen_ai.client.inference.duration"),
                duration("gen_ai.client.operation.duration"),
            ],
            usage: [
                usage("input_tokens"),
                usage("cache_read.input_tokens"),
                usage("output_tokens"),
                usage("reasoning.output_tokens"),
            ],
            former_usage: wants_former.then(|| {
                meter
                    .u64_histogram("gen_ai.client.token.usage")
                    .with_unit("{token}")
                    .with_description("Number of input and output tokens used")
                    .with_boundaries(TOKEN_BOUNDS.to_vec())
                    .build()
            }),
        })))
    }

    /// Records a request to a provider.
    pub fn record(&self, inference: Inference<'_>) {
        let Some(instruments) = &self.0 else { return };
        let Inference { operation, provider, model, error, duration, tokens } = inference;
        let text = |value: &str| Cow::<'static, str>::from(value.to_owned());
        let mut attributes = vec![
            KeyValue::new("gen_ai.operation.name", operation),
            KeyValue::new("gen_ai.provider.name", text(provider)),
            KeyValue::new("gen_ai.request.model", text(model)),
        ];
        for (counter, tokens) in instruments.usage.iter().zip(tokens) {
            if tokens > 0 {
                counter.add(tokens, &attributes);
            }
        }
        if let Some(former) = &instruments.former_usage {
            let [input, _, output, _] = tokens;
            for (kind, tokens) in [("input", input), ("output", output)] {
                attributes.push(KeyValue::new("gen_ai.token.type", kind));
                if tokens > 0 {
                    former.record(tokens, &attributes);
                }
                attributes.pop();
            }
        }
        attributes.extend(error.map(|error| KeyValue::new("error.type", text(error))));
        for histogram in &instruments.durations {
            histogram.record(duration.as_secs_f64(), &attributes);
        }
    }
}
