//! `/organization/projects/{project}/limits`, which the OpenAI API does not have, and
//! `/organization/projects/{project}/model_permissions`.

use std::collections::BTreeSet;

use axum::Json;
use axum::extract::{Path, State};
use batchwright_domain::error_code::ErrorCode;
use batchwright_domain::ids::ProjectId;
use batchwright_domain::limits::{Allowed, Limit, MAX_RULE_MODELS, ModelRule};
use batchwright_store::accounts::{LimitChanges, ProjectPolicy, ProjectUse};

use super::{Administration, Organization, failed, project_not_found};
use crate::auth::Admin;
use crate::error::ApiError;
use crate::openapi::Errors;
use crate::params::{Params, missing_parameter};
use crate::wire::organization::{
    DeletedModelPermissions, ModelPermissionsObject, ProjectLimitsObject,
};
use crate::wire::organization_requests::{UpdateLimits, UpdateModelPermissions};

/// Returns the limits of a project, with the server's defaults, and what the project uses
#[utoipa::path(get, path = "/organization/projects/{project}/limits", tag = "Organization",
    params(("project" = String, Path, description = "Id of the project")),
    responses((status = 200, body = ProjectLimitsObject, description = "The limits"), Errors))]
pub(crate) async fn get(
    State(organization): Administration,
    Path(id): Path<ProjectId>,
) -> Result<Json<ProjectLimitsObject>, ApiError> {
    let (policy, used) = policy(&organization, &id).await?;
    let effective = match &organization.service {
        Some(service) => service.limits(policy.limits),
        None => policy.limits,
    };
    let own = (policy.limits, &policy.permissions);
    Ok(Json(ProjectLimitsObject::new(effective, own, used)))
}

/// Changes limits of a project
///
/// A limit that is null is the default of the server again. A limit below what is used deletes
/// nothing: it refuses what is new.
#[utoipa::path(post, path = "/organization/projects/{project}/limits", tag = "Organization",
    params(("project" = String, Path, description = "Id of the project")),
    request_body = UpdateLimits,
    responses((status = 200, body = ProjectLimitsObject, description = "The limits"), Errors))]
pub(crate) async fn update(
    State(organization): Administration,
    admin: Admin,
    Path(id): Path<ProjectId>,
    mut params: Params,
) -> Result<Json<ProjectLimitsObject>, ApiError> {
    let mut changes = LimitChanges::default();
    for limit in Limit::ALL {
        if let Some(value) = params.limit_change(limit.name(), limit.range())? {
            changes.limits.insert(limit, value);
        }
    }
    for kind in Allowed::ALL {
        if let Some(names) = params.list_change(kind.name())? {
            changes
                .allowed
                .insert(kind, names.map(|names| names_of(kind.name(), names)).transpose()?);
        }
    }
    params.reject_unknown()?;
    let by = admin.actor(organization.clock.now());
    let updated = organization.accounts.update_limits(&id, changes, by).await;
    updated.map_err(|error| failed(error, Some(&id), ""))?;
    organization.limits_changed().await;
    get(State(organization), Path(id)).await
}

/// Returns a set of names, if they are valid and not too many.
fn names_of(param: &str, names: Vec<String>) -> Result<BTreeSet<String>, ApiError> {
    let names: BTreeSet<String> = names.into_iter().collect();
    if names.len() > MAX_RULE_MODELS || names.iter().any(String::is_empty) {
        let message = format!("Invalid '{param}': expected up to {MAX_RULE_MODELS} names.");
        return Err(ApiError::invalid(param, ErrorCode::InvalidValue, message));
    }
    Ok(names)
}

/// Returns the models that a project may use
#[utoipa::path(get, path = "/organization/projects/{project}/model_permissions",
    tag = "Organization",
    params(("project" = String, Path, description = "Id of the project")),
    responses((status = 200, body = ModelPermissionsObject, description = "The rule"), Errors))]
pub(crate) async fn get_models(
    State(organization): Administration,
    Path(id): Path<ProjectId>,
) -> Result<Json<ModelPermissionsObject>, ApiError> {
    let (policy, _) = policy(&organization, &id).await?;
    Ok(Json(ModelPermissionsObject::new(&policy.permissions.models)))
}

/// Replaces the models that a project may use
///
/// A name is that of a request or that of the provider. A batch that was validated before is not
/// affected.
#[utoipa::path(post, path = "/organization/projects/{project}/model_permissions",
    tag = "Organization",
    params(("project" = String, Path, description = "Id of the project")),
    request_body = UpdateModelPermissions,
    responses((status = 200, body = ModelPermissionsObject, description = "The rule"), Errors))]
pub(crate) async fn update_models(
    State(organization): Administration,
    admin: Admin,
    Path(id): Path<ProjectId>,
    mut params: Params,
) -> Result<Json<ModelPermissionsObject>, ApiError> {
    let mode = params.string("mode")?;
    let names =
        params.optional_strings("model_ids")?.ok_or_else(|| missing_parameter("model_ids"))?;
    params.reject_unknown()?;
    let models = names_of("model_ids", names)?;
    let rule = ModelRule::from_parts(&mode, models).ok_or_else(|| {
        let message = "Invalid 'mode'. Supported values are: 'allow_list', 'deny_list'.";
        ApiError::invalid("mode", ErrorCode::InvalidValue, message)
    })?;
    let by = admin.actor(organization.clock.now());
    let updated = organization.accounts.set_models(&id, rule.clone(), by).await;
    updated.map_err(|error| failed(error, Some(&id), ""))?;
    organization.limits_changed().await;
    Ok(Json(ModelPermissionsObject::new(&rule)))
}

/// Allows every model again
#[utoipa::path(delete, path = "/organization/projects/{project}/model_permissions",
    tag = "Organization",
    params(("project" = String, Path, description = "Id of the project")),
    responses((status = 200, body = DeletedModelPermissions, description = "Deleted"), Errors))]
pub(crate) async fn delete_models(
    State(organization): Administration,
    admin: Admin,
    Path(id): Path<ProjectId>,
) -> Result<Json<DeletedModelPermissions>, ApiError> {
    let by = admin.actor(organization.clock.now());
    let updated = organization.accounts.set_models(&id, ModelRule::default(), by).await;
    updated.map_err(|error| failed(error, Some(&id), ""))?;
    organization.limits_changed().await;
    Ok(Json(DeletedModelPermissions::new()))
}

pub(super) async fn policy(
    organization: &Organization,
    id: &ProjectId,
) -> Result<(ProjectPolicy, ProjectUse), ApiError> {
    let found = organization.accounts.policy_of(id).await?;
    found.ok_or_else(|| project_not_found(id.as_str()))
}
