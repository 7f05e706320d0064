//! Spans of clients' requests that change something, as children of the clients' own spans.
//!
//! Requests that only read are not recorded: clients poll.

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, Method};
use axum::middleware::Next;
use axum::response::Response;
use batchwright_telemetry::{Context, Role, Span, Traces};

use crate::RequestId;

/// Header with the context of a request, of W3C Trace Context.
const TRACE_HEADER: &str = "traceparent";

/// Id of what a request has created, whose trace its span links to.
#[derive(Clone)]
pub(crate) struct CreatedId(pub String);

/// Returns the span of the client that a request belongs to, if its header is valid.
pub(crate) fn trace_of(headers: &HeaderMap) -> Option<Context> {
    let mut values = headers.get_all(TRACE_HEADER).iter();
    let value = values.next().filter(|_| values.next().is_none())?;
    Context::parse(value.to_str().ok()?)
}

/// Records the span of a request that changes something.
pub(crate) async fn record(State(traces): State<Traces>, request: Request, next: Next) -> Response {
    let is_write = *request.method() == Method::POST || *request.method() == Method::DELETE;
    if !traces.is_enabled() || !is_write {
        return next.run(request).await;
    }
    let (began, method) = (batchwright_telemetry::trace::now(), request.method().clone());
    let route = request.extensions().get::<MatchedPath>().cloned();
    let id = request.extensions().get::<RequestId>().map(|id| id.0.clone()).unwrap_or_default();
    let parent = trace_of(request.headers());
    let response = next.run(request).await;
    let route = route.as_ref().map_or("unknown", MatchedPath::as_str);
    let context = parent.map_or_else(|| Context::of(&id), |parent| parent.child());
    let created = response.extensions().get::<CreatedId>().cloned();
    // A request of a client that traces nothing is worth a span if it has made something.
    let is_kept = match parent {
        Some(parent) => parent.is_sampled(),
        None => created.is_some(),
    };
    if !is_kept && !response.status().is_server_error() {
        return response;
    }
    let span = Span::new(format!("{method} {route}"), context, began)
        .role(Role::Server)
        .text("http.request.method", method.as_str())
        .text("http.route", route)
        .text("request_id", id)
        .number("http.response.status_code", response.status().as_u16().into());
    let span = match parent {
        Some(parent) => span.remote_parent(parent),
        None => span,
    };
    let span = match created {
        Some(CreatedId(id)) => span.link(Context::of(&id)),
        None => span,
    };
    traces.record(match response.status().is_server_error() {
        true => span.failed(response.status().as_str()),
        false => span,
    });
    response
}
