//! `/health`: for load balancers and supervisors.

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use super::App;
use super::error::ApiError;
use crate::plugin::EntryState;

/// The process runs.
pub async fn live() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

/// The server can do its work: the database answers, and the plugins are loaded.
pub async fn ready(State(batches): App) -> Result<Json<Value>, ApiError> {
    batches.get("default", "none").await?;
    let plugins = batches.registry().current();
    let failed: Vec<&str> = plugins
        .entries
        .iter()
        .filter(|entry| entry.state() == EntryState::Failed)
        .map(|entry| entry.name.as_str())
        .collect();
    let loaded = plugins.entries.iter().filter(|entry| entry.serving.is_some()).count();
    Ok(Json(json!({"status": "ok", "plugins": {"loaded": loaded, "failed": failed}})))
}
