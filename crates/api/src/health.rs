//! `/health`: probes of load balancers and supervisors.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use batchwright_plugin::EntryState;
use serde_json::{Value, json};

use super::App;

/// Liveness: returns 200 while the process runs.
///
/// The probe depends on nothing else, because a supervisor restarts a process that fails it.
pub(crate) async fn live() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

/// Availability, for load balancers: returns 200 if the store responds, so that files and batches
/// can be read, downloaded and deleted, and the server is not shutting down.
pub(crate) async fn serving(State(app): App) -> Response {
    match app.health.not_serving().await {
        None => Json(json!({"status": "ok"})).into_response(),
        Some(reason) => unavailable(&[reason.to_owned()], json!({})),
    }
}

/// Readiness: returns 200 if a batch that is created now would be validated, executed and stored.
pub(crate) async fn ready(State(app): App) -> Response {
    let readiness = app.health.readiness().await;
    let plugins = app.registry.current();
    let failed = plugins.entries.iter().filter(|entry| entry.state() == EntryState::Failed).count();
    let loaded = plugins.entries.iter().filter(|entry| entry.serving.is_some()).count();
    // A plugin whose provider is unavailable does not make the server unready: new batches are
    // accepted, and their requests wait.
    let mut waiting: Vec<String> =
        app.service.outages().into_iter().map(|(key, _)| key.plugin).collect();
    waiting.dedup();
    let plugins = json!({"loaded": loaded, "failed": failed, "waiting": waiting.len()});
    if readiness.reasons.is_empty() {
        let status = if waiting.is_empty() { "ok" } else { "degraded" };
        Json(json!({"status": status, "plugins": plugins})).into_response()
    } else {
        unavailable(&readiness.reasons, plugins)
    }
}

/// Returns 503 with an error object, and with the reasons as a list for the operator.
fn unavailable(reasons: &[String], plugins: Value) -> Response {
    let error = json!({
        "message": reasons.join(" "),
        "type": "server_error",
        "param": null,
        "code": "server_not_ready",
    });
    let body =
        json!({"error": error, "status": "unavailable", "reasons": reasons, "plugins": plugins});
    (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
}
