//! Actions of the admin listener that concern the process: reload, and the log filter.

use std::sync::Arc;

use axum::extract::State;
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};

use crate::error::ApiError;

/// Process of the server, as its operator changes it.
pub trait Process: Send + Sync {
    /// Reads the settings again. An error is for the operator; nothing was changed then.
    fn reload(&self) -> Result<ReloadOutcome, String>;
    /// Returns the log filter.
    fn log_filter(&self) -> String;
    /// Changes the log filter.
    fn set_log_filter(&self, filter: &str) -> Result<(), String>;
}

/// What a reload has done.
#[derive(Clone, Debug, Serialize)]
pub struct ReloadOutcome {
    /// Settings whose new values are in use.
    pub applied: Vec<&'static str>,
    /// Settings whose new values need a restart.
    pub needs_restart: Vec<&'static str>,
}

#[derive(Serialize, Deserialize)]
struct LogFilter {
    filter: String,
}

/// Returns the routes.
pub(crate) fn routes(process: Arc<dyn Process>) -> Router {
    Router::new()
        .route("/reload", post(reload))
        .route("/log_filter", get(log_filter).post(set_log_filter))
        .with_state(process)
}

async fn reload(State(process): State<Arc<dyn Process>>) -> Result<Json<ReloadOutcome>, ApiError> {
    // Reads files.
    let reloading = tokio::task::spawn_blocking(move || process.reload()).await;
    let reloaded = reloading.unwrap_or_else(|error| Err(error.to_string()));
    reloaded.map(Json).map_err(ApiError::bad_request)
}

async fn log_filter(State(process): State<Arc<dyn Process>>) -> Json<LogFilter> {
    Json(LogFilter { filter: process.log_filter() })
}

async fn set_log_filter(
    State(process): State<Arc<dyn Process>>,
    Json(wanted): Json<LogFilter>,
) -> Result<Json<LogFilter>, ApiError> {
    process.set_log_filter(&wanted.filter).map_err(ApiError::bad_request)?;
    Ok(Json(LogFilter { filter: process.log_filter() }))
}
