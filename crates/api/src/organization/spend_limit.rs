//! `/organization/projects/{project}/spend_limit`

use axum::Json;
use axum::extract::{Path, State};
use batchwright_domain::error_code::ErrorCode;
use batchwright_domain::ids::ProjectId;
use batchwright_domain::money::Money;

use super::limits::policy;
use super::{Administration, Organization, failed, project_not_found};
use crate::auth::Admin;
use crate::error::ApiError;
use crate::openapi::Errors;
use crate::params::{Params, missing_parameter};
use crate::wire::organization_money::{DeletedSpendLimit, SpendLimit};
use crate::wire::organization_requests::UpdateSpendLimit;

/// Returns the budget of a project
#[utoipa::path(get, path = "/organization/projects/{project}/spend_limit", tag = "Organization",
    params(("project" = String, Path, description = "Id of the project")),
    responses((status = 200, body = SpendLimit, description = "The budget"), Errors))]
pub(crate) async fn get(
    State(organization): Administration,
    Path(id): Path<ProjectId>,
) -> Result<Json<SpendLimit>, ApiError> {
    let (policy, _) = policy(&organization, &id).await?;
    match policy.spend_limit {
        Some(cents) => Ok(Json(spend_limit(&organization, &id, cents).await?)),
        None => Err(ApiError::not_found("The project has no spend limit.")),
    }
}

/// Replaces the budget of a project
///
/// A spent budget stops new requests of the project until the next month (UTC). Requests in flight
/// finish.
#[utoipa::path(post, path = "/organization/projects/{project}/spend_limit", tag = "Organization",
    params(("project" = String, Path, description = "Id of the project")),
    request_body = UpdateSpendLimit,
    responses((status = 200, body = SpendLimit, description = "The budget"), Errors))]
pub(crate) async fn update(
    State(organization): Administration,
    admin: Admin,
    Path(id): Path<ProjectId>,
    mut params: Params,
) -> Result<Json<SpendLimit>, ApiError> {
    for (name, only) in [("currency", "USD"), ("interval", "month")] {
        if params.string(name)? != only {
            let message = format!("Invalid '{name}'. Supported values are: '{only}'.");
            return Err(ApiError::invalid(name, ErrorCode::InvalidValue, message));
        }
    }
    let cents = params.optional_integer("threshold_amount", 0..=Money::MAX_CENTS)?;
    let cents = cents.ok_or_else(|| missing_parameter("threshold_amount"))?;
    params.reject_unknown()?;
    let by = admin.actor(organization.clock.now());
    let updated = organization.accounts.set_spend_limit(&id, Some(cents), by).await;
    updated.map_err(|error| failed(error, Some(&id), ""))?;
    organization.limits_changed().await;
    Ok(Json(spend_limit(&organization, &id, cents).await?))
}

/// Removes the budget of a project, if it has one
#[utoipa::path(delete, path = "/organization/projects/{project}/spend_limit",
    tag = "Organization",
    params(("project" = String, Path, description = "Id of the project")),
    responses((status = 200, body = DeletedSpendLimit, description = "Deleted"), Errors))]
pub(crate) async fn delete(
    State(organization): Administration,
    admin: Admin,
    Path(id): Path<ProjectId>,
) -> Result<Json<DeletedSpendLimit>, ApiError> {
    let by = admin.actor(organization.clock.now());
    let deleted = organization.accounts.set_spend_limit(&id, None, by).await;
    deleted.map_err(|error| failed(error, Some(&id), ""))?;
    organization.limits_changed().await;
    Ok(Json(DeletedSpendLimit::new()))
}

async fn spend_limit(
    organization: &Organization,
    id: &ProjectId,
    cents: u64,
) -> Result<SpendLimit, ApiError> {
    let project = organization.accounts.project(id).await?;
    let project = project.ok_or_else(|| project_not_found(id.as_str()))?;
    let meters = organization.accounts.meters(&project.slug, organization.clock.now()).await?;
    Ok(SpendLimit::new(cents, meters.spent))
}
