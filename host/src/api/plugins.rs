//! `/plugins`, and those of a batch. The OpenAI API has no such routes.

use axum::Json;
use axum::extract::{Path, State};

use super::batches::no_batch;
use super::error::ApiError;
use super::openapi::Errors;
use super::wire::{BatchPlugins, Collection, OperatorPlugin, Plugin};
use super::{App, Tenant};

/// List the plugins, including those that do not load
///
/// Why one does not load is the operator's to know: the log and `batchwright plugin list` say it.
#[utoipa::path(get, path = "/plugins", tag = "Plugins",
    responses((status = 200, body = Collection<Plugin>, description = "All plugins, by name"), Errors))]
pub async fn list(State(batches): App, tenant: Tenant) -> Json<Collection<Plugin>> {
    let plugins = batches.registry().current();
    let outages = batches.outages();
    let shown = plugins.entries.iter().filter(|entry| entry.is_shown_to(&tenant.0));
    Json(Collection::new(
        shown.map(|entry| Plugin::from(entry).with(&outages, &tenant.0)).collect(),
    ))
}

/// The same in the operator's words, with every tenant's trouble: on the operator's own listener.
pub async fn list_for_operator(State(batches): App) -> Json<Collection<OperatorPlugin>> {
    let plugins = batches.registry().current();
    let outages = batches.outages();
    Json(Collection::new(
        plugins.entries.iter().map(|entry| OperatorPlugin::new(entry, &outages)).collect(),
    ))
}

/// List the plugins that served a batch, each as it was then
///
/// Beside them stands what the requests of the batch wait for, if they wait: the provider does not answer, say.
#[utoipa::path(get, path = "/batches/{id}/plugins", tag = "Plugins",
    params(("id" = String, Path, description = "Id of the batch")),
    responses((status = 200, body = BatchPlugins, description = "Its plugins"), Errors))]
pub async fn of_batch(
    State(batches): App,
    tenant: Tenant,
    Path(id): Path<String>,
) -> Result<Json<BatchPlugins>, ApiError> {
    let batch = batches.get(&tenant.0, &id).await?.ok_or_else(|| no_batch(&id))?;
    let found = batches.served_by(&tenant.0, &id).await?.ok_or_else(|| no_batch(&id))?;
    Ok(Json(BatchPlugins::new(found, batches.waits(&tenant.0, &batch))))
}
