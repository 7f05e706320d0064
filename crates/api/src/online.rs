//! `/chat/completions`, `/completions`, `/embeddings`, `/responses` and `/moderations`: online
//! requests.
//!
//! A body reserves memory as it arrives. A stream is read from the provider as fast as its client
//! reads it, so a slow client holds one event in memory.

use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use batchwright_batch::{Answered, OnlineAnswer, OnlineRequest, OnlineStream};
use batchwright_domain::endpoint::Endpoint;
use batchwright_domain::text::truncate_for_message;
use batchwright_memory::{Pool, Reservation};
use batchwright_tenancy::quota::{Remaining, Standing};
use bytes::Bytes;
use http_body_util::BodyExt;
use tokio::time::timeout;

use super::App;
use super::RequestId;
use super::batches::idempotency_key;
use super::error::{ApiError, whole_seconds};
use super::json_response::{UNRESERVED_BYTES, with_reservation};
use super::openapi::Errors;
use super::params::{BYTE_ORDER_MARK, check_json, unreadable_body};
use super::traces::trace_of;
use super::wire::{OnlineBody, OnlineResponse};
use crate::auth::{RequestModels, Tenant, holder};
use crate::state::ApiState;

/// Request headers with an id that the client gives to a request.
const CLIENT_REQUEST_IDS: [&str; 2] = ["x-client-request-id", "x-request-id"];

/// Number of copies of a body in memory: as it arrived, as a line, and as it is sent.
const COPIES_OF_BODY: usize = 4;

/// Granularity in which the reservation of a body grows.
const RESERVATION_STEP_BYTES: usize = 16 << 10;

/// Maximum time that a body waits for memory.
const MEMORY_TIMEOUT: Duration = Duration::from_secs(30);

macro_rules! online_routes {
    ($($(#[doc = $doc:literal])+ $name:ident: $path:literal, $endpoint:ident;)+) => {$(
        $(#[doc = $doc])+
        ///
        /// The request passes the same validators, limits and adapter as a line of a batch. Other
        /// members of the body, and of the response, are those of the model's provider.
        #[utoipa::path(post, path = $path, tag = "Online requests",
            request_body = OnlineBody,
            responses(
                (status = 200, description = "Answer of the provider",
                    content((OnlineResponse = "application/json"), (String = "text/event-stream"))),
                Errors,
            ))]
        pub(crate) async fn $name(
            State(app): App,
            tenant: Tenant<RequestModels>,
            request: Request,
        ) -> Response {
            let answer = answer(&app, tenant, Endpoint::$endpoint, request).await;
            answer.unwrap_or_else(IntoResponse::into_response)
        }
    )+};
}

online_routes! {
    /// Answers a chat
    chat_completions: "/chat/completions", ChatCompletions;
    /// Completes a prompt
    completions: "/completions", Completions;
    /// Embeds texts
    embeddings: "/embeddings", Embeddings;
    /// Answers an input
    responses: "/responses", Responses;
    /// Classifies texts
    moderations: "/moderations", Moderations;
}

async fn answer(
    app: &ApiState,
    tenant: Tenant<RequestModels>,
    endpoint: Endpoint,
    request: Request,
) -> Result<Response, ApiError> {
    check_json(request.headers())?;
    let idempotency_key = idempotency_key(request.headers(), None)?;
    let log_id = request.extensions().get::<RequestId>().map(|id| id.0.clone());
    let client_id = CLIENT_REQUEST_IDS.iter().find_map(|name| request.headers().get(*name));
    let client_id = client_id.and_then(|id| id.to_str().ok()).map(truncate_for_message);
    let trace = trace_of(request.headers());
    let (body, reservation) = read_body(app, request).await?;
    let (tenant, key) = (tenant.0, tenant.1);
    let log_id = log_id.unwrap_or_default();
    let request =
        OnlineRequest { tenant, key, endpoint, body, idempotency_key, log_id, client_id, trace };
    let Answered { standing, result } = app.online.answer(request).await;
    drop(reservation);
    let mut response = match result {
        Ok(OnlineAnswer::Whole { status, body, retry_after, reservation }) => {
            whole(status, body, retry_after, reservation)
        }
        Ok(OnlineAnswer::Stream(stream)) => events(stream),
        Err(error) => ApiError::from(error).into_response(),
    };
    if let Some(standing) = standing {
        add_limits(response.headers_mut(), standing);
    }
    Ok(response)
}

/// Reads a body of at most `max_line_size`, with a reservation for what is made of it.
async fn read_body(app: &ApiState, request: Request) -> Result<(String, Reservation), ApiError> {
    let pool: &Pool = &app.memory.clients;
    let mut reservation = pool.reservation(&holder(request.extensions()));
    let max = app.config.batch.max_line_size;
    let (mut body, mut bytes) = (request.into_body(), Vec::new());
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(unreadable_body)?.into_data() else { continue };
        let length = bytes.len().saturating_add(data.len());
        if length > max.in_memory() {
            return Err(ApiError::too_large(format!(
                "The request body is larger than {} (max_line_size).",
                *max
            )));
        }
        let needed = length.saturating_mul(COPIES_OF_BODY);
        if length > UNRESERVED_BYTES && needed > reservation.bytes() {
            let needed = needed.next_multiple_of(RESERVATION_STEP_BYTES);
            let grown = timeout(MEMORY_TIMEOUT, reservation.grow_to(needed)).await;
            grown.map_err(|_| ApiError::overloaded())?;
        }
        bytes.extend_from_slice(&data);
    }
    if bytes.starts_with(BYTE_ORDER_MARK) {
        bytes.drain(..BYTE_ORDER_MARK.len());
    }
    let text = String::from_utf8(bytes)
        .map_err(|_| ApiError::bad_request("The request body is not valid UTF-8."))?;
    Ok((text, reservation))
}

/// Returns a whole response of a provider.
fn whole(
    status: u16,
    body: String,
    retry_after: Option<Duration>,
    mut reservation: Reservation,
) -> Response {
    reservation.shrink_to(body.len());
    let body = Body::from(with_reservation(body.into(), Some(reservation)));
    // The contract of plugins allows no other status.
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_GATEWAY);
    let mut response = (status, body).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if let Some(delay) = retry_after {
        headers.insert(header::RETRY_AFTER, HeaderValue::from(whole_seconds(delay)));
    }
    response
}

/// Returns a stream of events. Each is read when the client has read the one before it.
fn events(stream: Box<OnlineStream>) -> Response {
    let events = futures_util::stream::unfold(stream, async |mut stream| {
        let event = stream.next().await?;
        Some((Ok::<_, std::convert::Infallible>(Bytes::from(event)), stream))
    });
    let mut response = Body::from_stream(events).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

/// Adds the limits per minute of the model, under the names that the SDKs read.
fn add_limits(headers: &mut HeaderMap, Standing { requests, tokens }: Standing) {
    for (kind, remaining) in [("requests", requests), ("tokens", tokens)] {
        let Some(Remaining { limit, left, reset }) = remaining else { continue };
        let reset = format!("{}s", reset.as_secs());
        for (name, value) in
            [("limit", limit.to_string()), ("remaining", left.to_string()), ("reset", reset)]
        {
            let name = HeaderName::try_from(format!("x-ratelimit-{name}-{kind}"));
            if let (Ok(name), Ok(value)) = (name, HeaderValue::try_from(value)) {
                headers.insert(name, value);
            }
        }
    }
}
