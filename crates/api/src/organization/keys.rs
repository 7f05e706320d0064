//! Keys of projects and admin keys.

use axum::Json;
use axum::extract::{Path, State};
use batchwright_domain::clock::Timestamp;
use batchwright_domain::error_code::ErrorCode;
use batchwright_domain::ids::{KeyId, ProjectId, ServiceAccountId};
use batchwright_store::Order;
use batchwright_store::accounts::{KeyChanges, KeyHolder, ListQuery, NewKey};
use batchwright_tenancy::{IssuedKey, METRICS_SCOPE, Scopes};

use super::{
    Administration, failed, key_not_found, optional_name, optional_scopes, project_not_found,
    required_name,
};
use crate::auth::Admin;
use crate::error::ApiError;
use crate::openapi::Errors;
use crate::pages::{list_query, page};
use crate::params::Params;
use crate::query_params::QueryParams;
use crate::wire::List;
use crate::wire::organization::{
    AdminKey, DeletedResource, NewAdminKeyObject, NewKeyObject, ProjectKey,
};
use crate::wire::organization_requests::{CreateAdminKey, CreateKey, UpdateKey};

/// Name of a key whose creator gave none.
pub(super) const DEFAULT_KEY_NAME: &str = "Secret Key";

/// New key for the store, and its complete text for the response.
pub(super) struct Issued {
    pub new: NewKey,
    pub value: String,
}

/// Issues a key.
pub(super) fn issue(
    name: String,
    scopes: Vec<String>,
    expires_at: Option<Timestamp>,
) -> Result<Issued, ApiError> {
    let key = IssuedKey::new().map_err(|error| {
        ApiError::internal(format!("the operating system has no random bits: {error}"))
    })?;
    let digest = *key.digest.as_bytes();
    let new = NewKey { id: key.id, name, digest, redacted: key.redacted, scopes, expires_at };
    Ok(Issued { new, value: key.value })
}

/// Creates a key of a service account
///
/// The response has the complete key, once. Without `scopes` the key has all scopes.
#[utoipa::path(post, tag = "Organization",
    path = "/organization/projects/{project}/service_accounts/{account}/api_keys",
    params(("project" = String, Path, description = "Id of the project"),
        ("account" = String, Path, description = "Id of the service account")),
    request_body = CreateKey,
    responses((status = 200, body = NewKeyObject, description = "The key"), Errors))]
pub(crate) async fn create_for_account(
    State(organization): Administration,
    admin: Admin,
    Path((project, account)): Path<(ProjectId, ServiceAccountId)>,
    mut params: Params,
) -> Result<Json<NewKeyObject>, ApiError> {
    let name = optional_name(&mut params)?.unwrap_or_else(|| DEFAULT_KEY_NAME.to_owned());
    let scopes = optional_scopes(&mut params)?.unwrap_or_else(Scopes::all);
    let expires_at = organization.expiry(&mut params)?;
    params.reject_unknown()?;
    let Issued { new, value } = issue(name, scopes.names(), expires_at)?;
    let now = organization.clock.now();
    let by = admin.actor(now);
    let created = organization.accounts.create_project_key(&project, &account, new.clone(), by);
    created.await.map_err(|error| failed(error, Some(&project), account.as_str()))?;
    Ok(Json(NewKeyObject::new(new, value, now)))
}

/// Lists the keys of a project, oldest first
#[utoipa::path(get, path = "/organization/projects/{project}/api_keys", tag = "Organization",
    params(
    ("project" = String, Path, description = "Id of the project"),
    ("after" = Option<String>, Query, description = "Id of the last key of the previous page"),
    ("limit" = Option<u32>, Query, minimum = 1, maximum = 100,
        description = "Maximum number of keys in the page; 20 if absent"),
    ("owner_project_access" = Option<String>, Query, pattern = "^(active|inactive|any)?$",
        description = "`inactive` lists the keys of an archived project, `active` those of others"),
), responses((status = 200, body = List<ProjectKey>, description = "Page of keys"), Errors))]
pub(crate) async fn list(
    State(organization): Administration,
    Path(project): Path<ProjectId>,
    query: QueryParams,
) -> Result<Json<List<ProjectKey>>, ApiError> {
    // The access of a key's owner follows from the project: all of its keys, or none.
    let access = query.text("owner_project_access");
    let part = list_query(&query, Order::OldestFirst)?;
    let wants = match access.as_deref() {
        None | Some("any") => None,
        Some("active") => Some(true),
        Some("inactive") => Some(false),
        Some(_) => {
            return Err(ApiError::invalid(
                "owner_project_access",
                ErrorCode::InvalidValue,
                "Invalid 'owner_project_access'. Supported values are: 'active', 'inactive', \
                 'any'.",
            ));
        }
    };
    let found = organization.accounts.project(&project).await?;
    let is_active = match found {
        Some(found) => found.archived_at.is_none(),
        None => return Err(project_not_found(project.as_str())),
    };
    if wants.is_some_and(|wanted| wanted != is_active) {
        return Ok(Json(List::new(Vec::new(), false)));
    }
    let holder = KeyHolder::Project(project.clone());
    let found = organization.accounts.keys(&holder, part.clone()).await;
    let found = found.map_err(|error| failed(error, Some(&project), ""))?;
    page(found, "API key", part.after.as_deref(), ProjectKey::from)
}

/// Returns a key of a project, without its secret
#[utoipa::path(get, path = "/organization/projects/{project}/api_keys/{key}", tag = "Organization",
    params(("project" = String, Path, description = "Id of the project"),
        ("key" = String, Path, description = "Id of the key")),
    responses((status = 200, body = ProjectKey, description = "The key"), Errors))]
pub(crate) async fn get(
    State(organization): Administration,
    Path((project, id)): Path<(ProjectId, KeyId)>,
) -> Result<Json<ProjectKey>, ApiError> {
    let found = organization.accounts.key_of(&KeyHolder::Project(project), &id).await?;
    found.map(|key| Json(key.into())).ok_or_else(|| key_not_found(id.as_str()))
}

/// Changes the scopes or the lifetime of a key
///
/// `expires_in_seconds` counts from now.
#[utoipa::path(post, path = "/organization/projects/{project}/api_keys/{key}",
    tag = "Organization",
    params(("project" = String, Path, description = "Id of the project"),
        ("key" = String, Path, description = "Id of the key")),
    request_body = UpdateKey,
    responses((status = 200, body = ProjectKey, description = "The key"), Errors))]
pub(crate) async fn update(
    State(organization): Administration,
    admin: Admin,
    Path((project, id)): Path<(ProjectId, KeyId)>,
    mut params: Params,
) -> Result<Json<ProjectKey>, ApiError> {
    let scopes = optional_scopes(&mut params)?.map(|scopes| scopes.names());
    let expires_at = organization.expiry(&mut params)?;
    params.reject_unknown()?;
    if scopes.is_none() && expires_at.is_none() {
        return get(State(organization), Path((project, id))).await;
    }
    let changes = KeyChanges { expires_at, scopes };
    let by = admin.actor(organization.clock.now());
    let holder = KeyHolder::Project(project.clone());
    let updated = organization.accounts.update_key(&holder, &id, changes, by).await;
    organization.clear_key_cache();
    updated.map(|key| Json(key.into())).map_err(|error| failed(error, Some(&project), id.as_str()))
}

/// Deletes a key of a project, which is refused from then on
#[utoipa::path(delete, path = "/organization/projects/{project}/api_keys/{key}",
    tag = "Organization",
    params(("project" = String, Path, description = "Id of the project"),
        ("key" = String, Path, description = "Id of the key")),
    responses((status = 200, body = DeletedResource, description = "Deleted"), Errors))]
pub(crate) async fn delete(
    State(organization): Administration,
    admin: Admin,
    Path((project, id)): Path<(ProjectId, KeyId)>,
) -> Result<Json<DeletedResource>, ApiError> {
    let by = admin.actor(organization.clock.now());
    let holder = KeyHolder::Project(project.clone());
    let deleted = organization.accounts.delete_key(&holder, &id, by).await;
    organization.clear_key_cache();
    deleted.map_err(|error| failed(error, Some(&project), id.as_str()))?;
    let object = "organization.project.api_key.deleted";
    Ok(Json(DeletedResource { id: id.to_string(), object, deleted: true }))
}

/// Reads the scopes of an admin key; an empty list means that it may do everything.
fn admin_scopes(params: &mut Params) -> Result<Vec<String>, ApiError> {
    let Some(names) = params.optional_strings("scopes")? else { return Ok(Vec::new()) };
    if names.is_empty() || names.iter().any(|name| name != METRICS_SCOPE) {
        let message = format!(
            "Invalid 'scopes'. An admin key has the scope '{METRICS_SCOPE}', or no 'scopes'."
        );
        return Err(ApiError::invalid("scopes", ErrorCode::InvalidValue, message));
    }
    Ok(vec![METRICS_SCOPE.to_owned()])
}

/// Creates an admin key
///
/// The response has the complete key, once. A key with the scope `metrics.read` may read the
/// metrics of the server, and nothing else.
#[utoipa::path(post, path = "/organization/admin_api_keys", tag = "Organization",
    request_body = CreateAdminKey,
    responses((status = 200, body = NewAdminKeyObject, description = "The key"), Errors))]
pub(crate) async fn create_admin(
    State(organization): Administration,
    admin: Admin,
    mut params: Params,
) -> Result<Json<NewAdminKeyObject>, ApiError> {
    let name = required_name(&mut params)?;
    let scopes = admin_scopes(&mut params)?;
    let expires_at = organization.expiry(&mut params)?;
    params.reject_unknown()?;
    let Issued { new, value } = issue(name, scopes, expires_at)?;
    let by = admin.actor(organization.clock.now());
    let key = organization.accounts.create_admin_key(new, by).await?;
    Ok(Json(NewAdminKeyObject::new(key, value)))
}

/// Lists the admin keys
#[utoipa::path(get, path = "/organization/admin_api_keys", tag = "Organization", params(
    ("after" = Option<String>, Query, description = "Id of the last key of the previous page"),
    ("limit" = Option<u32>, Query, minimum = 1, maximum = 100,
        description = "Maximum number of keys in the page; 20 if absent"),
    ("order" = inline(Option<crate::wire::Direction>), Query,
        description = "Order by creation time; oldest first if absent"),
), responses((status = 200, body = List<AdminKey>, description = "Page of keys"), Errors))]
pub(crate) async fn list_admin(
    State(organization): Administration,
    query: QueryParams,
) -> Result<Json<List<AdminKey>>, ApiError> {
    let part = list_query(&query, Order::OldestFirst)?;
    let part = ListQuery { order: query.order(Order::OldestFirst)?, ..part };
    let found = organization.accounts.keys(&KeyHolder::Organization, part.clone()).await?;
    page(found, "API key", part.after.as_deref(), AdminKey::from)
}

/// Returns an admin key, without its secret
#[utoipa::path(get, path = "/organization/admin_api_keys/{key}", tag = "Organization",
    params(("key" = String, Path, description = "Id of the key")),
    responses((status = 200, body = AdminKey, description = "The key"), Errors))]
pub(crate) async fn get_admin(
    State(organization): Administration,
    Path(id): Path<KeyId>,
) -> Result<Json<AdminKey>, ApiError> {
    let found = organization.accounts.key_of(&KeyHolder::Organization, &id).await?;
    found.map(|key| Json(key.into())).ok_or_else(|| key_not_found(id.as_str()))
}

/// Deletes an admin key, which is refused from then on
///
/// The last admin key cannot be deleted.
#[utoipa::path(delete, path = "/organization/admin_api_keys/{key}", tag = "Organization",
    params(("key" = String, Path, description = "Id of the key")),
    responses((status = 200, body = DeletedResource, description = "Deleted"), Errors))]
pub(crate) async fn delete_admin(
    State(organization): Administration,
    admin: Admin,
    Path(id): Path<KeyId>,
) -> Result<Json<DeletedResource>, ApiError> {
    let by = admin.actor(organization.clock.now());
    let deleted = organization.accounts.delete_key(&KeyHolder::Organization, &id, by).await;
    organization.clear_key_cache();
    deleted.map_err(|error| failed(error, None, id.as_str()))?;
    let object = "organization.admin_api_key.deleted";
    Ok(Json(DeletedResource { id: id.to_string(), object, deleted: true }))
}
