//! `/plugins` and `/batches/{id}/plugins`. The OpenAI API has no such routes.

use axum::Json;
use axum::extract::{Path, State};
use batchwright_domain::ids::BatchId;

use super::App;
use super::batches::batch_not_found;
use super::error::ApiError;
use super::openapi::Errors;
use super::wire::{BatchPlugins, Collection, OperatorPlugin, Plugin};
use crate::auth::{ReadBatches, ReadModels, Tenant};

/// Lists the plugins, including those that do not load
///
/// The cause of a load failure is only visible to the operator, in the log and in
/// `batchwright plugin list`.
#[utoipa::path(get, path = "/plugins", tag = "Plugins",
    responses(
        (status = 200, body = Collection<Plugin>, description = "All plugins, ordered by name"),
        Errors,
    ))]
pub(crate) async fn list(
    State(app): App,
    tenant: Tenant<ReadModels>,
) -> Result<Json<Collection<Plugin>>, ApiError> {
    let plugins = app.registry.current();
    let permissions = app.service.permissions(&tenant.0).await?;
    let outages = app.service.outages();
    let visible = plugins.entries.iter().filter(|entry| entry.is_shown_to(&tenant.0));
    let shown = |entry| {
        Plugin::from(entry).with_outage(&outages, &tenant.0).with_permissions(&permissions, entry)
    };
    Ok(Json(Collection::new(visible.map(shown).collect())))
}

/// Lists the plugins for the operator, with full error messages and the outages of all tenants.
/// Served by the admin listener only.
pub(crate) async fn list_for_operator(State(app): App) -> Json<Collection<OperatorPlugin>> {
    let plugins = app.registry.current();
    let outages = app.service.outages();
    Json(Collection::new(
        plugins.entries.iter().map(|entry| OperatorPlugin::new(entry, &outages)).collect(),
    ))
}

/// Lists the plugins that served a batch, each in the version that served it
///
/// If the requests of the batch wait, the response also has the reason, for example an unavailable
/// provider.
#[utoipa::path(get, path = "/batches/{id}/plugins", tag = "Plugins",
    params(("id" = String, Path, description = "Id of the batch")),
    responses((status = 200, body = BatchPlugins, description = "Plugins of the batch"), Errors))]
pub(crate) async fn of_batch(
    State(app): App,
    tenant: Tenant<ReadBatches>,
    Path(id): Path<BatchId>,
) -> Result<Json<BatchPlugins>, ApiError> {
    let found = app.service.plugins(&tenant.0, &id).await?;
    found.map(|found| Json(found.into())).ok_or_else(|| batch_not_found(id.as_str()))
}
