//! `/batches`

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::http::HeaderMap;
use axum::response::Response;
use batchwright_domain::error_code::ErrorCode;
use batchwright_domain::ids::{BatchId, TenantId};
use batchwright_domain::text::truncate_for_message;
use batchwright_store::{BatchRecord, Cancel, Paged, StoreError};

use super::App;
use super::error::ApiError;
use super::json_response::{object_response, reserve, stream_list};
use super::openapi::Errors;
use super::params::{AnyJson, Params};
use super::query_params::QueryParams;
use super::wire::{Batch, CreateBatch, List};
use crate::auth::{CancelBatches, CreateBatches, ReadBatches, Tenant};
use crate::state::ApiState;
use crate::traces::CreatedId;

/// Request header with the idempotency key; a parameter of the body has the same meaning.
const IDEMPOTENCY_KEY_HEADER: &str = "idempotency-key";

/// Maximum length of an idempotency key, in bytes.
const MAX_IDEMPOTENCY_KEY_BYTES: usize = 255;

/// Maximum length of an object id in a request, in bytes. Ids that the server creates are shorter.
const MAX_ID_BYTES: usize = 64;

/// Memory of a batch with all its errors, in bytes: as records, as wire objects and as JSON.
const BATCH_ERRORS_BYTES: usize = 1 << 20;

/// Creates a batch
///
/// A retry with the same idempotency key and the same parameters returns the existing batch. The
/// same key with other parameters is a conflict (409).
#[utoipa::path(
    post, path = "/batches", tag = "Batches",
    params(("idempotency-key" = Option<String>, Header,
        min_length = 1, max_length = 255, pattern = "^[!-~]+$",
        description = "Key that makes a retry of this request safe; also accepted in the body")),
    request_body = CreateBatch,
    responses((status = 200, body = Batch, description = "The batch"), Errors),
)]
pub(crate) async fn create(
    State(app): App,
    tenant: Tenant<CreateBatches>,
    headers: HeaderMap,
    mut params: Params,
) -> Result<Response, ApiError> {
    let request = batchwright_batch::NewBatchRequest {
        input_file_id: params.string("input_file_id")?.into(),
        endpoint: params.string("endpoint")?,
        completion_window: params.string("completion_window")?,
        metadata: params.metadata("metadata", &app.config.batch)?,
        output_lifetime: params.lifetime("output_expires_after")?,
        idempotency_key: idempotency_key(&headers, params.optional_string("idempotency_key")?)?,
        api_key: tenant.1.clone(),
    };
    params.reject_unknown()?;
    if request.input_file_id.as_str().len() > MAX_ID_BYTES {
        let message = format!(
            "Invalid 'input_file_id': expected an id of at most {MAX_ID_BYTES} characters."
        );
        return Err(ApiError::invalid("input_file_id", ErrorCode::StringAboveMaxLength, message));
    }
    let batch = create_detached(app.clone(), tenant.0.clone(), request).await?;
    let created = CreatedId(batch.new.id.to_string());
    let mut response = batch_response(&app, &tenant.0, batch).await?;
    response.extensions_mut().insert(created);
    Ok(response)
}

/// Creates a batch on a separate task, so that a client that disconnects does not interrupt it.
async fn create_detached(
    app: Arc<ApiState>,
    tenant: TenantId,
    request: batchwright_batch::NewBatchRequest,
) -> Result<BatchRecord, batchwright_batch::CreateError> {
    let task = tokio::spawn(async move { app.service.create(&tenant, request).await });
    task.await.unwrap_or(Err(batchwright_batch::CreateError::Store(StoreError::Closed)))
}

/// Returns a batch with all of its errors. If there are many, their memory is reserved first.
async fn batch_response(
    app: &ApiState,
    tenant: &TenantId,
    mut batch: BatchRecord,
) -> Result<Response, ApiError> {
    if !batch.has_more_errors() {
        return object_response(&Batch::from(batch), None);
    }
    let pool = &app.memory.clients;
    let reservation = reserve(pool, &tenant.as_str().into(), BATCH_ERRORS_BYTES).await?;
    batch.errors = app.service.errors(tenant, &batch.new.id).await?;
    object_response(&Batch::from(batch), Some(reservation))
}

/// Returns the idempotency key from the headers, or the one that is given in the body. Fails if
/// there are different ones.
pub(crate) fn idempotency_key(
    headers: &HeaderMap,
    mut given: Option<String>,
) -> Result<Option<String>, ApiError> {
    let invalid =
        |message: String| ApiError::invalid("idempotency_key", ErrorCode::InvalidValue, message);
    for value in headers.get_all(IDEMPOTENCY_KEY_HEADER) {
        let text = &String::from_utf8_lossy(value.as_bytes());
        if given.as_ref().is_some_and(|given| given != text) {
            return Err(invalid("There are two different idempotency keys; send one.".into()));
        }
        given = Some(text.to_string());
    }
    let fits = |key: &String| {
        (1..=MAX_IDEMPOTENCY_KEY_BYTES).contains(&key.len())
            && key.bytes().all(|byte| byte.is_ascii_graphic())
    };
    if given.as_ref().is_some_and(|key| !fits(key)) {
        return Err(invalid(format!(
            "Invalid 'idempotency_key': expected 1 to {MAX_IDEMPOTENCY_KEY_BYTES} \
             printable ASCII characters without spaces."
        )));
    }
    Ok(given)
}

/// Returns a batch
#[utoipa::path(get, path = "/batches/{id}", tag = "Batches",
    params(("id" = String, Path, description = "Id of the batch")),
    responses((status = 200, body = Batch, description = "The batch"), Errors))]
pub(crate) async fn get(
    State(app): App,
    tenant: Tenant<ReadBatches>,
    Path(id): Path<BatchId>,
) -> Result<Response, ApiError> {
    match app.service.get(&tenant.0, &id).await? {
        Some(batch) => batch_response(&app, &tenant.0, batch).await,
        None => Err(batch_not_found(id.as_str())),
    }
}

/// Lists batches, newest first
#[utoipa::path(get, path = "/batches", tag = "Batches", params(
    ("after" = Option<String>, Query, description = "Id of the last batch of the previous page"),
    ("limit" = Option<u32>, Query, minimum = 1, maximum = 100,
        description = "Maximum number of batches in the page; 20 if absent"),
), responses((status = 200, body = List<Batch>, description = "Page of batches"), Errors))]
pub(crate) async fn list(
    State(app): App,
    tenant: Tenant<ReadBatches>,
    query: QueryParams,
) -> Result<Response, ApiError> {
    let limit = query.limit(1..=app.config.batch.max_batches_per_page.get() as u64, 20)?;
    let after = query.text("after");
    let clients = (app.memory.clients.clone(), tenant.0.as_str().into());
    let page = move |after: Option<String>, limit: usize, bytes: usize| {
        let (app, tenant) = (app.clone(), tenant.0.clone());
        async move {
            match app.service.list(&tenant, after.map(BatchId::from), limit, bytes).await? {
                Paged::Page(page) => {
                    Ok(Some((page.items.into_iter().map(Batch::from).collect(), page.has_more)))
                }
                Paged::UnknownAfter => Ok(None),
            }
        }
    };
    let listed = stream_list(after.clone(), limit, clients, page).await?;
    listed.ok_or_else(|| unknown_after("batch", &after.unwrap_or_default()))
}

/// Cancels a batch
///
/// Results so far are kept. Requests in flight have a grace period. All other requests end with the
/// error `batch_cancelled`. A batch that has already ended in another way cannot be cancelled
/// (409).
#[utoipa::path(post, path = "/batches/{id}/cancel", tag = "Batches",
    params(("id" = String, Path, description = "Id of the batch")),
    responses((status = 200, body = Batch, description = "The batch"), Errors))]
pub(crate) async fn cancel(
    State(app): App,
    tenant: Tenant<CancelBatches>,
    Path(id): Path<BatchId>,
    _: AnyJson,
) -> Result<Response, ApiError> {
    match app.service.cancel(&tenant.0, &id).await? {
        Cancel::Accepted(batch) => batch_response(&app, &tenant.0, *batch).await,
        Cancel::TooLate(status) => Err(ApiError::conflict(format!(
            "Cannot cancel a batch with status '{}'.",
            status.as_str()
        ))),
        Cancel::Unknown => Err(batch_not_found(id.as_str())),
    }
}

/// Returns the 404 of an unknown batch.
pub(crate) fn batch_not_found(id: &str) -> ApiError {
    ApiError::not_found(format!("No batch found with id '{}'.", truncate_for_message(id)))
}

/// Returns the 400 of a list whose `after` is unknown. `kind` is the kind of its entries.
pub(crate) fn unknown_after(kind: &str, id: &str) -> ApiError {
    ApiError::invalid(
        "after",
        ErrorCode::InvalidValue,
        format!("Invalid 'after': no {kind} found with id '{}'.", truncate_for_message(id)),
    )
}
