//! `/metrics`, and the metrics of HTTP requests.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use batchwright_telemetry::{
    CONTENT_TYPE, Counter, DURATION_BUCKETS, Error, Histogram, Kind, Metric, Metrics,
};

use crate::ROUTE_PREFIXES;
use crate::auth::MetricsReader;
use crate::connections::Connections;
use crate::error::ApiError;

const REQUESTS: Metric = Metric {
    name: "batchwright_http_requests_total",
    kind: Kind::Counter,
    labels: &["method", "route", "status"],
    help: "HTTP requests of clients by route, such as `/v1/batches/{id}`, or `unknown`, or \
           `overloaded` for a request beyond `max_connections`",
};
const DURATION: Metric = Metric {
    name: "batchwright_http_request_duration_seconds",
    kind: Kind::Histogram(DURATION_BUCKETS),
    labels: &["method", "route"],
    help: "Time from the head of a request to the head of its response",
};

const CONNECTIONS: Metric = Metric {
    name: "batchwright_http_connections",
    kind: Kind::Gauge,
    labels: &[],
    help: "Open connections of the main listener",
};
const CONNECTIONS_LIMIT: Metric = Metric {
    name: "batchwright_http_connections_limit",
    kind: Kind::Gauge,
    labels: &[],
    help: "Setting `max_connections`: above it idle connections are closed, and requests beyond \
           it get 503",
};
const IN_FLIGHT: Metric = Metric {
    name: "batchwright_http_requests_in_flight",
    kind: Kind::Gauge,
    labels: &[],
    help: "Requests of the main listener without a complete response",
};
const DROPPED: Metric = Metric {
    name: "batchwright_http_connections_dropped_total",
    kind: Kind::Counter,
    labels: &[],
    help: "Connections that were closed at once, because a bound on their number was reached",
};

const CERTIFICATE: Metric = Metric {
    name: "batchwright_tls_certificate_expiry_timestamp_seconds",
    kind: Kind::Gauge,
    labels: &[],
    help: "End of the validity of the certificate that is in use, in Unix seconds; of the one of \
           its chain that expires first; absent without TLS",
};

/// Declarations of the metrics of HTTP requests and connections.
pub const METRICS: &[Metric] =
    &[REQUESTS, DURATION, CONNECTIONS, CONNECTIONS_LIMIT, IN_FLIGHT, DROPPED, CERTIFICATE];

/// Route in the metrics of a request that no route matches.
const UNKNOWN_ROUTE: &str = "unknown";

/// Route in the metrics of a request that is refused before its route is known.
const OVERLOADED_ROUTE: &str = "overloaded";

/// Metrics of a listener's requests.
#[derive(Clone)]
pub struct HttpMetrics {
    metrics: Metrics,
    requests: Counter,
    durations: Histogram,
    dropped: Counter,
}

/// Route of a request, for the metrics.
struct Route {
    method: &'static str,
    path: Option<MatchedPath>,
}

impl Route {
    fn of(request: &Request) -> Self {
        // A client may send any word as a method.
        let method = match *request.method() {
            Method::GET => "GET",
            Method::HEAD => "HEAD",
            Method::POST => "POST",
            Method::DELETE => "DELETE",
            Method::OPTIONS => "OPTIONS",
            _ => "other",
        };
        Self { method, path: request.extensions().get().cloned() }
    }

    /// Returns the path of the route, which is the same below each prefix.
    fn path(&self) -> &str {
        let [prefix, other] = ROUTE_PREFIXES;
        let Some(path) = self.path.as_ref().map(MatchedPath::as_str) else { return UNKNOWN_ROUTE };
        match path.strip_prefix(other) {
            Some(_) => path.get(other.len() - prefix.len()..).unwrap_or(path),
            None => path,
        }
    }
}

impl HttpMetrics {
    /// Registers the metrics of HTTP requests.
    pub fn register(metrics: &Metrics) -> Result<Self, Error> {
        let (requests, durations) = (metrics.counter(&REQUESTS)?, metrics.histogram(&DURATION)?);
        let dropped = metrics.counter(&DROPPED)?;
        for method in ["GET", "POST"] {
            requests.prepare(&[method, OVERLOADED_ROUTE, "503"]);
        }
        Ok(Self { metrics: metrics.clone(), requests, durations, dropped })
    }

    /// Registers the connections of the main listener.
    pub(crate) fn register_connections(&self, connections: &Arc<Connections>) -> Result<(), Error> {
        let connections = connections.clone();
        let gauges = &[CONNECTIONS, CONNECTIONS_LIMIT, IN_FLIGHT];
        self.metrics.read(gauges, move |values| {
            let (open, in_flight, max) = connections.numbers();
            values.set_number(&CONNECTIONS, &[], open as u64);
            values.set_number(&CONNECTIONS_LIMIT, &[], max as u64);
            values.set_number(&IN_FLIGHT, &[], in_flight as u64);
        })
    }

    /// Registers the end of the validity of the certificate of the main listener.
    pub(crate) fn register_certificate(
        &self,
        expires_at: impl Fn() -> Option<i64> + Send + Sync + 'static,
    ) -> Result<(), Error> {
        self.metrics.read(&[CERTIFICATE], move |values| {
            if let Some(end) = expires_at() {
                values.set_number(&CERTIFICATE, &[], u64::try_from(end).unwrap_or(0));
            }
        })
    }

    /// Counts a connection that was closed at once.
    pub(crate) fn dropped(&self) {
        self.dropped.increment(&[]);
    }

    /// Counts a request that was refused before its route was known.
    pub(crate) fn overloaded(&self, request: &Request, status: StatusCode) {
        let route = Route::of(request);
        self.requests.increment(&[route.method, OVERLOADED_ROUTE, status.as_str()]);
    }
}

/// Counts a request and its response.
pub(crate) async fn count(
    State(metrics): State<HttpMetrics>,
    request: Request,
    next: Next,
) -> Response {
    let (began, route) = (Instant::now(), Route::of(&request));
    let response = next.run(request).await;
    let (method, path) = (route.method, route.path());
    metrics.requests.increment(&[method, path, response.status().as_str()]);
    metrics.durations.observe(&[method, path], began.elapsed().as_secs_f64());
    response
}

/// Returns the metrics to an administrator.
pub(crate) async fn scrape(_: MetricsReader, state: State<HttpMetrics>) -> Response {
    scrape_for_operator(state).await
}

/// Returns the metrics to anyone who reaches the admin listener.
pub(crate) async fn scrape_for_operator(State(http): State<HttpMetrics>) -> Response {
    if !http.metrics.is_enabled() {
        return ApiError::not_found(
            "Metrics are off; set metrics = true, and start the server again.".to_owned(),
        )
        .into_response();
    }
    match http.metrics.text() {
        Ok(text) => ([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response(),
        Err(error) => ApiError::internal(error.to_string()).into_response(),
    }
}
