//! `/batches`

use axum::Json;
use axum::extract::{Path, State};
use axum::http::HeaderMap;

use super::error::ApiError;
use super::params::{Params, QueryParams};
use super::wire::{Batch, List};
use super::{App, Tenant};
use crate::batch;
use crate::store::{Cancel, Paged};

/// A client may say how it calls this creation, so as to repeat it: in the header, or among the parameters.
const IDEMPOTENCY_KEY: &str = "idempotency-key";
const LONGEST_IDEMPOTENCY_KEY: usize = 255;

pub async fn create(
    State(batches): App,
    tenant: Tenant,
    headers: HeaderMap,
    mut params: Params,
) -> Result<Json<Batch>, ApiError> {
    let request = batch::Request {
        input_file_id: params.string("input_file_id")?,
        endpoint: params.string("endpoint")?,
        completion_window: params.string("completion_window")?,
        metadata: params.metadata("metadata")?,
        output_lifetime: params.lifetime("output_expires_after")?,
        idempotency_key: idempotency_key(&headers, &mut params)?,
    };
    params.end()?;
    let batch = batches.create(&tenant.0, request).await?;
    Ok(Json(batch.into()))
}

fn idempotency_key(headers: &HeaderMap, params: &mut Params) -> Result<Option<String>, ApiError> {
    let invalid = |message: String| ApiError::invalid("idempotency_key", "invalid_value", message);
    let mut given = params.optional_string("idempotency_key")?;
    for value in headers.get_all(IDEMPOTENCY_KEY) {
        let text = std::str::from_utf8(value.as_bytes())
            .map_err(|_| invalid("The header Idempotency-Key is not UTF-8.".into()))?;
        if given.as_ref().is_some_and(|given| given != text) {
            return Err(invalid("There are two different idempotency keys; send one.".into()));
        }
        given = Some(text.to_owned());
    }
    let length = given.as_ref().map(|key| key.chars().count());
    if length.is_some_and(|length| !(1..=LONGEST_IDEMPOTENCY_KEY).contains(&length)) {
        let length = length.unwrap_or_default();
        return Err(invalid(format!(
            "Invalid 'idempotency_key': expected a string of 1 to {LONGEST_IDEMPOTENCY_KEY} characters, but got one of {length}."
        )));
    }
    Ok(given)
}

pub async fn get(State(batches): App, tenant: Tenant, Path(id): Path<String>) -> Result<Json<Batch>, ApiError> {
    match batches.get(&tenant.0, &id).await? {
        Some(batch) => Ok(Json(batch.into())),
        None => Err(no_batch(&id)),
    }
}

pub async fn list(State(batches): App, tenant: Tenant, mut query: QueryParams) -> Result<Json<List<Batch>>, ApiError> {
    let limit = query.limit(1..=100, 20)?;
    let after = query.text("after");
    match batches.list(&tenant.0, after.clone(), limit).await? {
        Paged::Page(page) => Ok(Json(List::new(page.items.into_iter().map(Batch::from).collect(), page.has_more))),
        Paged::UnknownAfter => Err(unknown_after("batch", &after.unwrap_or_default())),
    }
}

pub async fn cancel(State(batches): App, tenant: Tenant, Path(id): Path<String>) -> Result<Json<Batch>, ApiError> {
    match batches.cancel(&tenant.0, &id).await? {
        Cancel::Accepted(batch) => Ok(Json((*batch).into())),
        Cancel::TooLate(status) => {
            Err(ApiError::conflict(format!("Cannot cancel a batch with status '{}'.", status.as_str())))
        }
        Cancel::Unknown => Err(no_batch(&id)),
    }
}

fn no_batch(id: &str) -> ApiError {
    ApiError::not_found(format!("No batch found with id '{id}'."))
}

pub fn unknown_after(what: &str, id: &str) -> ApiError {
    ApiError::invalid("after", "invalid_value", format!("Invalid 'after': no {what} found with id '{id}'."))
}
