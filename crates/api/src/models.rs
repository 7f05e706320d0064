//! `/models`

use axum::Json;
use axum::extract::{Path, State};
use batchwright_domain::error_code::ErrorCode;
use batchwright_plugin::Plugin;

use super::App;
use super::error::ApiError;
use super::openapi::Errors;
use super::wire::{List, Model};
use crate::auth::{ReadModels, Tenant};

/// Lists the models that a request can name
#[utoipa::path(get, path = "/models", tag = "Models",
    responses((status = 200, body = List<Model>, description = "All models"), Errors))]
pub(crate) async fn list(
    State(app): App,
    tenant: Tenant<ReadModels>,
) -> Result<Json<List<Model>>, ApiError> {
    let plugins = app.registry.current();
    let permissions = app.service.permissions(&tenant.0).await?;
    let models = plugins.allowed_models(&tenant.0, &permissions).into_iter();
    Ok(Json(List::new(models.map(|(name, plugin)| model(name, plugin)).collect(), false)))
}

/// Returns a model
#[utoipa::path(get, path = "/models/{id}", tag = "Models",
    params(("id" = String, Path, description = "Name of the model")),
    responses((status = 200, body = Model, description = "The model"), Errors))]
pub(crate) async fn get(
    State(app): App,
    tenant: Tenant<ReadModels>,
    Path(id): Path<String>,
) -> Result<Json<Model>, ApiError> {
    let permissions = app.service.permissions(&tenant.0).await?;
    match app.registry.current().allowed_route(&tenant.0, &id, &permissions) {
        Some(route) => Ok(Json(model(&id, &route.plugin))),
        None => Err(ApiError::not_found(format!("The model '{id}' does not exist."))
            .with_param("model")
            .with_code(ErrorCode::ModelNotFound)),
    }
}

fn model(name: &str, plugin: &Plugin) -> Model {
    Model {
        id: name.to_owned(),
        object: "model",
        created: plugin.loaded_at(),
        owned_by: plugin.name().to_owned(),
    }
}
