//! `/organization/projects/{project}/rate_limits`

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::{Path, State};
use batchwright_domain::error_code::ErrorCode;
use batchwright_domain::ids::ProjectId;
use batchwright_domain::limits::{MAX_LIMIT, ModelLimit, ModelLimits};
use batchwright_domain::text::truncate_for_message;
use batchwright_store::accounts::ModelLimitChanges;

use super::limits::policy;
use super::{Administration, Organization, failed};
use crate::auth::Admin;
use crate::batches::unknown_after;
use crate::error::ApiError;
use crate::openapi::Errors;
use crate::params::Params;
use crate::query_params::QueryParams;
use crate::wire::List;
use crate::wire::organization_money::RateLimit;
use crate::wire::organization_requests::UpdateRateLimit;

/// Prefix of the id of a rate limit; the name of its model follows.
const ID_PREFIX: &str = "rl-";

/// Maximum length of the name of a model, in bytes.
const MAX_MODEL_BYTES: usize = 256;

/// Lists the limits of a project for models: those that the server lists, and those with a limit
#[utoipa::path(get, path = "/organization/projects/{project}/rate_limits", tag = "Organization",
    params(
        ("project" = String, Path, description = "Id of the project"),
        ("after" = Option<String>, Query, description = "Id of the entry before the page"),
        ("before" = Option<String>, Query, description = "Id of the entry after the page"),
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 1000,
            description = "Maximum number of entries in the page; 100 if absent"),
    ),
    responses((status = 200, body = List<RateLimit>, description = "Page of limits"), Errors))]
pub(crate) async fn list(
    State(organization): Administration,
    Path(id): Path<ProjectId>,
    query: QueryParams,
) -> Result<Json<List<RateLimit>>, ApiError> {
    let limit = query.limit(1..=1000, 100)?;
    let (policy, _) = policy(&organization, &id).await?;
    let mut models = policy.model_limits;
    if let Some(service) = &organization.service
        && let Some(project) = organization.accounts.project(&id).await?
    {
        for model in service.models_at_providers(&project.slug) {
            models.entry(model).or_default();
        }
    }
    let (after, before) = (query.text("after"), query.text("before"));
    let mut entries: Vec<_> = models.iter().map(|(model, limits)| entry(model, limits)).collect();
    let position = |wanted: &str| {
        let found = entries.iter().position(|entry| entry.id == wanted);
        found.ok_or_else(|| unknown_after("rate limit", wanted))
    };
    let first = after.as_deref().map(position).transpose()?.map_or(0, |at| at.saturating_add(1));
    let end = before.as_deref().map(position).transpose()?.unwrap_or(entries.len());
    // A page before an entry ends at that entry.
    let first = if before.is_some() { first.max(end.saturating_sub(limit)) } else { first };
    entries.truncate(end);
    let mut page = entries.split_off(first.min(entries.len()));
    let has_more = page.len() > limit;
    page.truncate(limit);
    Ok(Json(List::new(page, has_more)))
}

/// Changes the limits of a project for a model
///
/// The id is `rl-` and the name of the model as its provider knows it. A limit that is null is
/// removed.
#[utoipa::path(post, path = "/organization/projects/{project}/rate_limits/{rate_limit}",
    tag = "Organization",
    params(
        ("project" = String, Path, description = "Id of the project"),
        ("rate_limit" = String, Path, description = "Id of the limits"),
    ),
    request_body = UpdateRateLimit,
    responses((status = 200, body = RateLimit, description = "The limits"), Errors))]
pub(crate) async fn update(
    State(organization): Administration,
    admin: Admin,
    Path((id, rate_limit)): Path<(ProjectId, String)>,
    mut params: Params,
) -> Result<Json<RateLimit>, ApiError> {
    let model = rate_limit.strip_prefix(ID_PREFIX);
    let Some(model) = model.filter(|model| (1..=MAX_MODEL_BYTES).contains(&model.len())) else {
        return Err(ApiError::not_found(format!(
            "No rate limit found with id '{}'; expected '{ID_PREFIX}' and the name of a model.",
            truncate_for_message(&rate_limit)
        )));
    };
    let mut changes = ModelLimitChanges::new();
    for limit in ModelLimit::ALL {
        if let Some(value) = params.limit_change(limit.name(), 0..=MAX_LIMIT)? {
            changes.insert(limit, value);
        }
    }
    params.reject_unknown()?;
    refuse_alias(&organization, &id, model).await?;
    let by = admin.actor(organization.clock.now());
    let updated = organization.accounts.update_model_limits(&id, model, changes, by).await;
    let limits = updated.map_err(|error| failed(error, Some(&id), ""))?;
    organization.limits_changed().await;
    Ok(Json(entry(model, &limits)))
}

/// Refuses a name that a plugin replaces by another one, which would have no effect.
async fn refuse_alias(
    organization: &Organization,
    id: &ProjectId,
    model: &str,
) -> Result<(), ApiError> {
    let Some(service) = &organization.service else { return Ok(()) };
    let Some(project) = organization.accounts.project(id).await? else { return Ok(()) };
    match service.model_at_provider(&project.slug, model) {
        Some(real) if real != model => {
            let message = format!(
                "The model '{}' is an alias of '{real}'; set the limits of '{ID_PREFIX}{real}'.",
                truncate_for_message(model)
            );
            Err(ApiError::invalid("rate_limit_id", ErrorCode::InvalidValue, message))
        }
        _ => Ok(()),
    }
}

fn entry(model: &str, limits: &ModelLimits) -> RateLimit {
    let values: BTreeMap<_, _> =
        ModelLimit::ALL.into_iter().map(|limit| (limit, limits.get(limit))).collect();
    RateLimit::new(format!("{ID_PREFIX}{model}"), model.to_owned(), &values)
}
