//! `/organization/projects/{project}/service_accounts`

use axum::Json;
use axum::extract::{Path, State};
use batchwright_domain::error_code::ErrorCode;
use batchwright_domain::ids::{ProjectId, ServiceAccountId};
use batchwright_store::Order;
use batchwright_store::accounts::NewServiceAccount;
use batchwright_tenancy::Scopes;

use super::keys::{DEFAULT_KEY_NAME, Issued, issue};
use super::{Administration, account_not_found, failed, new_id, optional_name, required_name};
use crate::auth::Admin;
use crate::error::ApiError;
use crate::openapi::Errors;
use crate::pages::{list_query, page};
use crate::params::Params;
use crate::query_params::QueryParams;
use crate::wire::List;
use crate::wire::organization::{
    DeletedResource, NewKeyObject, NewServiceAccountObject, ServiceAccount,
};
use crate::wire::organization_requests::{CreateServiceAccount, UpdateServiceAccount};

/// Creates a service account, with a key
///
/// The response has the complete key, once. With `create_service_account_only` there is no key.
#[utoipa::path(post, path = "/organization/projects/{project}/service_accounts",
    tag = "Organization",
    params(("project" = String, Path, description = "Id of the project")),
    request_body = CreateServiceAccount,
    responses((status = 200, body = NewServiceAccountObject, description = "The account"), Errors))]
pub(crate) async fn create(
    State(organization): Administration,
    admin: Admin,
    Path(project): Path<ProjectId>,
    mut params: Params,
) -> Result<Json<NewServiceAccountObject>, ApiError> {
    let name = required_name(&mut params)?;
    let only = params.optional_boolean("create_service_account_only")?.unwrap_or(false);
    let expires_at = organization.expiry(&mut params)?;
    params.reject_unknown()?;
    let issued = match only {
        true => None,
        false => Some(issue(DEFAULT_KEY_NAME.to_owned(), Scopes::all().names(), expires_at)?),
    };
    let key = issued.as_ref().map(|issued| issued.new.clone());
    let new = NewServiceAccount { id: new_id("svc_acct_").into(), name, is_member: !only };
    let now = organization.clock.now();
    let created = organization.accounts.create_account(&project, new, key, admin.actor(now)).await;
    let account = created.map_err(|error| failed(error, Some(&project), ""))?;
    let key = issued.map(|Issued { new, value }| NewKeyObject::new(new, value, now));
    Ok(Json(NewServiceAccountObject::new(account, key)))
}

/// Returns a service account
#[utoipa::path(get, path = "/organization/projects/{project}/service_accounts/{account}",
    tag = "Organization",
    params(("project" = String, Path, description = "Id of the project"),
        ("account" = String, Path, description = "Id of the service account")),
    responses((status = 200, body = ServiceAccount, description = "The account"), Errors))]
pub(crate) async fn get(
    State(organization): Administration,
    Path((project, id)): Path<(ProjectId, ServiceAccountId)>,
) -> Result<Json<ServiceAccount>, ApiError> {
    let found = organization.accounts.account(&project, &id).await?;
    found.map(|account| Json(account.into())).ok_or_else(|| account_not_found(id.as_str()))
}

/// Lists the service accounts of a project, oldest first
#[utoipa::path(get, path = "/organization/projects/{project}/service_accounts",
    tag = "Organization", params(
    ("project" = String, Path, description = "Id of the project"),
    ("after" = Option<String>, Query, description = "Id of the last account of the previous page"),
    ("limit" = Option<u32>, Query, minimum = 1, maximum = 100,
        description = "Maximum number of accounts in the page; 20 if absent"),
), responses((status = 200, body = List<ServiceAccount>, description = "Accounts"), Errors))]
pub(crate) async fn list(
    State(organization): Administration,
    Path(project): Path<ProjectId>,
    query: QueryParams,
) -> Result<Json<List<ServiceAccount>>, ApiError> {
    let part = list_query(&query, Order::OldestFirst)?;
    let found = organization.accounts.accounts(&project, part.clone()).await;
    let found = found.map_err(|error| failed(error, Some(&project), ""))?;
    page(found, "service account", part.after.as_deref(), ServiceAccount::from)
}

/// Changes the name of a service account
#[utoipa::path(post, path = "/organization/projects/{project}/service_accounts/{account}",
    tag = "Organization",
    params(("project" = String, Path, description = "Id of the project"),
        ("account" = String, Path, description = "Id of the service account")),
    request_body = UpdateServiceAccount,
    responses((status = 200, body = ServiceAccount, description = "The account"), Errors))]
pub(crate) async fn update(
    State(organization): Administration,
    admin: Admin,
    Path((project, id)): Path<(ProjectId, ServiceAccountId)>,
    mut params: Params,
) -> Result<Json<ServiceAccount>, ApiError> {
    let name = optional_name(&mut params)?;
    if params.optional_string("role")?.is_some_and(|role| role != "member") {
        let message = "Invalid value for 'role'. Supported values are: 'member'. What a key may \
                       do depends on its scopes.";
        return Err(ApiError::invalid("role", ErrorCode::InvalidValue, message));
    }
    params.reject_unknown()?;
    let Some(name) = name else {
        return get(State(organization), Path((project, id))).await;
    };
    let by = admin.actor(organization.clock.now());
    let renamed = organization.accounts.rename_account(&project, &id, name, by).await;
    renamed
        .map(|account| Json(account.into()))
        .map_err(|error| failed(error, Some(&project), id.as_str()))
}

/// Deletes a service account and its keys
#[utoipa::path(delete, path = "/organization/projects/{project}/service_accounts/{account}",
    tag = "Organization",
    params(("project" = String, Path, description = "Id of the project"),
        ("account" = String, Path, description = "Id of the service account")),
    responses((status = 200, body = DeletedResource, description = "Deleted"), Errors))]
pub(crate) async fn delete(
    State(organization): Administration,
    admin: Admin,
    Path((project, id)): Path<(ProjectId, ServiceAccountId)>,
) -> Result<Json<DeletedResource>, ApiError> {
    let by = admin.actor(organization.clock.now());
    let deleted = organization.accounts.delete_account(&project, &id, by).await;
    organization.clear_key_cache();
    deleted.map_err(|error| failed(error, Some(&project), id.as_str()))?;
    let object = "organization.project.service_account.deleted";
    Ok(Json(DeletedResource { id: id.to_string(), object, deleted: true }))
}
