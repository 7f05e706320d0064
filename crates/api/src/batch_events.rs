//! `/batches/events` and `/batches/{id}/events`: progress of batches as server-sent events.
//!
//! A comment every [`KEEP_ALIVE`] keeps proxies from closing an idle stream, and a header asks them
//! not to buffer. A stream ends with the final state of its batch, and when the server drains, so
//! that it never holds a shutdown.

use std::convert::Infallible;
use std::time::Duration;

use axum::extract::{Path, State};
use axum::http::{HeaderName, HeaderValue};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use batchwright_batch::{ListenError, ProgressListener};
use batchwright_domain::ids::BatchId;

use super::App;
use super::batches::batch_not_found;
use super::error::ApiError;
use super::openapi::Errors;
use crate::auth::{ReadBatches, Tenant};
use crate::wire::BatchState;

/// Interval of comments on a stream without events.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Header by which nginx and others learn not to buffer a response.
const NO_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");

/// Streams the progress of a batch
///
/// Server-sent events with the name `batch`: the current state, then each change, at most one a
/// second. The stream ends after the final state, or after 15 minutes.
#[utoipa::path(get, path = "/batches/{id}/events", tag = "Batches",
    params(("id" = String, Path, description = "Id of the batch")),
    responses((status = 200, description = "Events",
        content((String = "text/event-stream"))), Errors))]
pub(crate) async fn of_batch(
    State(app): App,
    tenant: Tenant<ReadBatches>,
    Path(id): Path<BatchId>,
) -> Result<Response, ApiError> {
    let found = app.progress.follow(&tenant.0, &id).await.map_err(refused)?;
    found.map(events).ok_or_else(|| batch_not_found(id.as_str()))
}

/// Streams the progress of all batches of the project
///
/// Server-sent events with the name `batch`: the batches that have not ended, then their changes.
/// The stream ends after 15 minutes.
#[utoipa::path(get, path = "/batches/events", tag = "Batches",
    responses((status = 200, description = "Events",
        content((String = "text/event-stream"))), Errors))]
pub(crate) async fn of_project(
    State(app): App,
    tenant: Tenant<ReadBatches>,
) -> Result<Response, ApiError> {
    Ok(events(app.progress.follow_all(&tenant.0).await.map_err(refused)?))
}

fn refused(error: ListenError) -> ApiError {
    match error {
        ListenError::TooMany => ApiError::too_many_requests(error.to_string()),
        ListenError::Store(error) => error.into(),
    }
}

/// Returns a stream that is read as fast as its client reads it.
fn events(listener: ProgressListener) -> Response {
    let stream = futures_util::stream::unfold(listener, async |mut listener| {
        let progress = listener.next().await?;
        let event = Event::default().event("batch").json_data(BatchState::from(progress));
        // A state is always valid JSON.
        Some((Ok::<_, Infallible>(event.unwrap_or_default()), listener))
    });
    let keep_alive = KeepAlive::new().interval(KEEP_ALIVE);
    let mut response = Sse::new(stream).keep_alive(keep_alive).into_response();
    response.headers_mut().insert(NO_BUFFERING, HeaderValue::from_static("no"));
    response
}
