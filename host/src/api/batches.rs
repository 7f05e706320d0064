//! `/batches`

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::http::HeaderMap;
use axum::response::Response;

use super::error::ApiError;
use super::lists::{room_for, sized, stream_list};
use super::openapi::Errors;
use super::params::{AnyJson, Params, QueryParams};
use super::wire::{Batch, CreateBatch, List};
use super::{App, Tenant};
use crate::batch::{self, Batches, shortened};
use crate::store::{BatchRecord, Cancel, Paged, StoreError};

/// A client may say how it calls this creation, so as to repeat it: in the header, or among the parameters.
const IDEMPOTENCY_KEY: &str = "idempotency-key";
const LONGEST_IDEMPOTENCY_KEY: usize = 255;

/// Longest id of an object, in bytes. Ours have fewer.
const LONGEST_ID: usize = 64;

/// What a batch with all its errors takes, as records, as objects and as JSON, in bytes.
const MOST_ERRORS: usize = 1 << 20;

/// Create a batch
///
/// A repetition with the same idempotency key and the same parameters answers with the batch that was made before; with other parameters it
/// is a conflict (409).
#[utoipa::path(
    post, path = "/batches", tag = "Batches",
    params(("idempotency-key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$",
        description = "Names this creation, so that it can be repeated; also accepted in the body")),
    request_body = CreateBatch,
    responses((status = 200, body = Batch, description = "The batch"), Errors),
)]
pub async fn create(
    State(batches): App,
    tenant: Tenant,
    headers: HeaderMap,
    mut params: Params,
) -> Result<Response, ApiError> {
    let request = batch::Request {
        input_file_id: params.string("input_file_id")?,
        endpoint: params.string("endpoint")?,
        completion_window: params.string("completion_window")?,
        metadata: params.metadata("metadata", batches.settings())?,
        output_lifetime: params.lifetime("output_expires_after")?,
        idempotency_key: idempotency_key(&headers, &mut params)?,
    };
    params.end()?;
    if request.input_file_id.len() > LONGEST_ID {
        let message =
            format!("Invalid 'input_file_id': expected an id of at most {LONGEST_ID} characters.");
        return Err(ApiError::invalid("input_file_id", "string_above_max_length", message));
    }
    let batch = on_its_own(batches.clone(), tenant.0.clone(), request).await?;
    whole(&batches, &tenant, batch).await
}

/// Creates a batch on a task of its own: a client that goes away does not leave it half done.
async fn on_its_own(
    batches: Arc<Batches>,
    tenant: String,
    request: batch::Request,
) -> Result<BatchRecord, batch::CreateError> {
    let creating = tokio::spawn(async move { batches.create(&tenant, request).await });
    creating.await.unwrap_or(Err(batch::CreateError::Store(StoreError::Closed)))
}

/// A batch with all of its errors, which may be many.
async fn whole(
    batches: &Batches,
    tenant: &Tenant,
    mut batch: BatchRecord,
) -> Result<Response, ApiError> {
    if !batch.has_more_errors() {
        return sized(&Batch::from(batch), None);
    }
    let share = room_for(&batches.memory().clients, &tenant.0.as_str().into(), MOST_ERRORS).await?;
    batch.errors = batches.errors(&tenant.0, &batch.new.id).await?;
    sized(&Batch::from(batch), Some(share))
}

fn idempotency_key(headers: &HeaderMap, params: &mut Params) -> Result<Option<String>, ApiError> {
    let invalid = |message: String| ApiError::invalid("idempotency_key", "invalid_value", message);
    let mut given = params.optional_string("idempotency_key")?;
    for value in headers.get_all(IDEMPOTENCY_KEY) {
        let text = &String::from_utf8_lossy(value.as_bytes());
        if given.as_ref().is_some_and(|given| given != text) {
            return Err(invalid("There are two different idempotency keys; send one.".into()));
        }
        given = Some(text.to_string());
    }
    let fits = |key: &String| {
        (1..=LONGEST_IDEMPOTENCY_KEY).contains(&key.len())
            && key.bytes().all(|byte| byte.is_ascii_graphic())
    };
    if given.as_ref().is_some_and(|key| !fits(key)) {
        return Err(invalid(format!(
            "Invalid 'idempotency_key': expected 1 to {LONGEST_IDEMPOTENCY_KEY} ASCII letters, digits and signs, without spaces."
        )));
    }
    Ok(given)
}

/// Get a batch
#[utoipa::path(get, path = "/batches/{id}", tag = "Batches", params(("id" = String, Path, description = "Id of the batch")),
    responses((status = 200, body = Batch, description = "The batch"), Errors))]
pub async fn get(
    State(batches): App,
    tenant: Tenant,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    match batches.get(&tenant.0, &id).await? {
        Some(batch) => whole(&batches, &tenant, batch).await,
        None => Err(no_batch(&id)),
    }
}

/// List batches, newest first
#[utoipa::path(get, path = "/batches", tag = "Batches", params(
    ("after" = Option<String>, Query, description = "Id of the last batch of the page before"),
    ("limit" = Option<u32>, Query, minimum = 1, maximum = 100, description = "Batches in the page; 20 if absent"),
), responses((status = 200, body = List<Batch>, description = "A page of batches"), Errors))]
pub async fn list(
    State(batches): App,
    tenant: Tenant,
    mut query: QueryParams,
) -> Result<Response, ApiError> {
    let limit = query.limit(1..=batches.settings().max_batches_per_page.get() as u64, 20)?;
    let after = query.text("after");
    let of_clients = (batches.memory().clients.clone(), tenant.0.as_str().into());
    let page = move |after: Option<String>, limit: usize, bytes: usize| {
        let (batches, tenant) = (batches.clone(), tenant.0.clone());
        async move {
            match batches.list(&tenant, after, limit, bytes).await? {
                Paged::Page(page) => {
                    Ok(Some((page.items.into_iter().map(Batch::from).collect(), page.has_more)))
                }
                Paged::UnknownAfter => Ok(None),
            }
        }
    };
    let listed = stream_list(after.clone(), limit, of_clients, page).await?;
    listed.ok_or_else(|| unknown_after("batch", &after.unwrap_or_default()))
}

/// Cancel a batch
///
/// What is finished is kept; what is in flight has a grace period; the rest ends as `batch_cancelled`. A batch that has ended in another way
/// cannot be cancelled (409).
#[utoipa::path(post, path = "/batches/{id}/cancel", tag = "Batches",
    params(("id" = String, Path, description = "Id of the batch")),
    responses((status = 200, body = Batch, description = "The batch"), Errors))]
pub async fn cancel(
    State(batches): App,
    tenant: Tenant,
    Path(id): Path<String>,
    _: AnyJson,
) -> Result<Response, ApiError> {
    match batches.cancel(&tenant.0, &id).await? {
        Cancel::Accepted(batch) => whole(&batches, &tenant, *batch).await,
        Cancel::TooLate(status) => Err(ApiError::conflict(format!(
            "Cannot cancel a batch with status '{}'.",
            status.as_str()
        ))),
        Cancel::Unknown => Err(no_batch(&id)),
    }
}

pub fn no_batch(id: &str) -> ApiError {
    ApiError::not_found(format!("No batch found with id '{}'.", shortened(id)))
}

pub fn unknown_after(what: &str, id: &str) -> ApiError {
    ApiError::invalid(
        "after",
        "invalid_value",
        format!("Invalid 'after': no {what} found with id '{}'.", shortened(id)),
    )
}
