//! `/organization/projects`

use axum::Json;
use axum::extract::{Path, State};
use batchwright_domain::ids::ProjectId;
use batchwright_store::Order;
use batchwright_store::accounts::{NewProject, ProjectRecord};
use batchwright_tenancy::project::slug;

use super::{Administration, failed, new_id, optional_name, project_not_found, required_name};
use crate::auth::Admin;
use crate::error::ApiError;
use crate::openapi::Errors;
use crate::pages::{list_query, page};
use crate::params::{AnyJson, Params};
use crate::query_params::QueryParams;
use crate::wire::List;
use crate::wire::organization::Project;
use crate::wire::organization_requests::{CreateProject, UpdateProject};

/// Creates a project
///
/// A project is a tenant: its files and batches are invisible to the keys of other projects. Its
/// `slug` is made from its name, never changes and is never used again.
#[utoipa::path(post, path = "/organization/projects", tag = "Organization",
    request_body = CreateProject,
    responses((status = 200, body = Project, description = "The project"), Errors))]
pub(crate) async fn create(
    State(organization): Administration,
    admin: Admin,
    mut params: Params,
) -> Result<Json<Project>, ApiError> {
    let name = required_name(&mut params)?;
    params.reject_unknown()?;
    let new = NewProject { id: new_id("proj_").into(), slug: slug(&name), name };
    let by = admin.actor(organization.clock.now());
    let created = organization.accounts.create_project(new, by).await;
    created.map(|project| Json(project.into())).map_err(|error| failed(error, None, ""))
}

/// Returns a project
#[utoipa::path(get, path = "/organization/projects/{project}", tag = "Organization",
    params(("project" = String, Path, description = "Id of the project")),
    responses((status = 200, body = Project, description = "The project"), Errors))]
pub(crate) async fn get(
    State(organization): Administration,
    Path(id): Path<ProjectId>,
) -> Result<Json<Project>, ApiError> {
    match organization.accounts.project(&id).await? {
        Some(project) => Ok(Json(project.into())),
        None => Err(project_not_found(id.as_str())),
    }
}

/// Lists the projects, oldest first
#[utoipa::path(get, path = "/organization/projects", tag = "Organization", params(
    ("after" = Option<String>, Query, description = "Id of the last project of the previous page"),
    ("limit" = Option<u32>, Query, minimum = 1, maximum = 100,
        description = "Maximum number of projects in the page; 20 if absent"),
    ("include_archived" = Option<bool>, Query, description = "Lists archived projects as well"),
), responses((status = 200, body = List<Project>, description = "Page of projects"), Errors))]
pub(crate) async fn list(
    State(organization): Administration,
    query: QueryParams,
) -> Result<Json<List<Project>>, ApiError> {
    let archived = query.boolean("include_archived")?.unwrap_or(false);
    let part = list_query(&query, Order::OldestFirst)?;
    let found = organization.accounts.projects(part.clone(), archived).await?;
    page(found, "project", part.after.as_deref(), Project::from)
}

/// Changes the name of a project
#[utoipa::path(post, path = "/organization/projects/{project}", tag = "Organization",
    params(("project" = String, Path, description = "Id of the project")),
    request_body = UpdateProject,
    responses((status = 200, body = Project, description = "The project"), Errors))]
pub(crate) async fn update(
    State(organization): Administration,
    admin: Admin,
    Path(id): Path<ProjectId>,
    mut params: Params,
) -> Result<Json<Project>, ApiError> {
    let name = optional_name(&mut params)?;
    params.reject_unknown()?;
    let Some(name) = name else { return get(State(organization), Path(id)).await };
    let by = admin.actor(organization.clock.now());
    let renamed = organization.accounts.rename_project(&id, name, by).await;
    renamed.map(|project| Json(project.into())).map_err(|error| failed(error, Some(&id), ""))
}

/// Archives a project
///
/// Its keys can still read and delete its data, and create nothing. Its batches are cancelled. An
/// archived project cannot become active again.
#[utoipa::path(post, path = "/organization/projects/{project}/archive", tag = "Organization",
    params(("project" = String, Path, description = "Id of the project")),
    responses((status = 200, body = Project, description = "The project"), Errors))]
pub(crate) async fn archive(
    State(organization): Administration,
    admin: Admin,
    Path(id): Path<ProjectId>,
    _: AnyJson,
) -> Result<Json<Project>, ApiError> {
    let by = admin.actor(organization.clock.now());
    let archived = match &organization.service {
        Some(service) => service.archive_project(&id, by).await,
        None => organization.accounts.archive_project(&id, by).await,
    };
    organization.clear_key_cache();
    archived
        .map(|project: ProjectRecord| Json(project.into()))
        .map_err(|error| failed(error, Some(&id), ""))
}
