//! `/plugins`, and those of a batch. The OpenAI API has no such routes.

use axum::Json;
use axum::extract::{Path, State};

use super::batches::no_batch;
use super::error::ApiError;
use super::openapi::Errors;
use super::wire::{BatchPlugin, Collection, Plugin};
use super::{App, Tenant};

/// List the plugins, including those that do not load
///
/// Why one does not load is the operator's to know: the log and `batchwright plugin list` say it.
#[utoipa::path(get, path = "/plugins", tag = "Plugins",
    responses((status = 200, body = Collection<Plugin>, description = "All plugins, by name"), Errors))]
pub async fn list(State(batches): App, tenant: Tenant) -> Json<Collection<Plugin>> {
    let plugins = batches.registry().current();
    let shown = plugins.entries.iter().filter(|entry| entry.is_shown_to(&tenant.0));
    Json(Collection::new(shown.map(Plugin::from).collect()))
}

/// List the plugins that served a batch, each as it was then
#[utoipa::path(get, path = "/batches/{id}/plugins", tag = "Plugins",
    params(("id" = String, Path, description = "Id of the batch")),
    responses((status = 200, body = Collection<BatchPlugin>, description = "Its plugins"), Errors))]
pub async fn of_batch(
    State(batches): App,
    tenant: Tenant,
    Path(id): Path<String>,
) -> Result<Json<Collection<BatchPlugin>>, ApiError> {
    let found = batches.served_by(&tenant.0, &id).await?.ok_or_else(|| no_batch(&id))?;
    Ok(Json(Collection::new(found.into_iter().map(BatchPlugin::from).collect())))
}
