//! `/plugins` and `/batches/{id}/plugins`. The OpenAI API has no such routes.

use axum::Json;
use axum::extract::{Path, State};

use super::batches::batch_not_found;
use super::error::ApiError;
use super::openapi::Errors;
use super::wire::{BatchPlugins, Collection, OperatorPlugin, Plugin};
use super::{App, Tenant};

/// Lists the plugins, including those that do not load
///
/// The cause of a load failure is only visible to the operator, in the log and in
/// `batchwright plugin list`.
#[utoipa::path(get, path = "/plugins", tag = "Plugins",
    responses(
        (status = 200, body = Collection<Plugin>, description = "All plugins, ordered by name"),
        Errors,
    ))]
pub(crate) async fn list(State(batches): App, tenant: Tenant) -> Json<Collection<Plugin>> {
    let plugins = batches.registry().current();
    let outages = batches.outages();
    let visible = plugins.entries.iter().filter(|entry| entry.is_shown_to(&tenant.0));
    Json(Collection::new(
        visible.map(|entry| Plugin::from(entry).with_outage(&outages, &tenant.0)).collect(),
    ))
}

/// Lists the plugins for the operator, with full error messages and the outages of all tenants.
/// Served by the admin listener only.
pub(crate) async fn list_for_operator(State(batches): App) -> Json<Collection<OperatorPlugin>> {
    let plugins = batches.registry().current();
    let outages = batches.outages();
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
    State(batches): App,
    tenant: Tenant,
    Path(id): Path<String>,
) -> Result<Json<BatchPlugins>, ApiError> {
    let batch = batches.get(&tenant.0, &id).await?.ok_or_else(|| batch_not_found(&id))?;
    let found = batches.served_by(&tenant.0, &id).await?.ok_or_else(|| batch_not_found(&id))?;
    Ok(Json(BatchPlugins::new(found, batches.waits(&tenant.0, &batch))))
}
