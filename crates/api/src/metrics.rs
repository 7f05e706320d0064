//! `/metrics`, and the metrics of HTTP requests.

use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use batchwright_telemetry::{CONTENT_TYPE, Counter, Durations, Error, Kind, Metric, Metrics};

use crate::ROUTE_PREFIXES;
use crate::auth::MetricsReader;
use crate::error::ApiError;

const REQUESTS: Metric = Metric {
    name: "batchwright_http_requests_total",
    kind: Kind::Counter,
    labels: &["method", "route", "status"],
    help: "HTTP requests of clients by route, such as `/v1/batches/{id}`, or `unknown`",
};
const DURATION: Metric = Metric {
    name: "batchwright_http_request_duration_seconds",
    kind: Kind::Histogram,
    labels: &["method", "route"],
    help: "Time from the head of a request to the head of its response",
};

/// Declarations of the metrics of HTTP requests.
pub const METRICS: &[Metric] = &[REQUESTS, DURATION];

/// Route in the metrics of a request that no route matches.
const UNKNOWN_ROUTE: &str = "unknown";

/// Metrics of a listener's requests.
#[derive(Clone)]
pub struct HttpMetrics {
    metrics: Metrics,
    requests: Counter,
    durations: Durations,
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
        Ok(Self { metrics: metrics.clone(), requests, durations })
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
    match http.metrics.text() {
        Ok(text) => ([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response(),
        Err(error) => ApiError::internal(error.to_string()).into_response(),
    }
}
