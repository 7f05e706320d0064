//! HTTP API: routes, wire types, errors. Each handler parses its request, calls the service, and
//! builds the response; it decides nothing about a batch.
//!
//! Architecture invariant: only this module has wire types. No module below this one knows the
//! JSON, the statuses or the headers of the API.

#![deny(missing_docs)]
#![warn(unreachable_pub)]

mod admin_actions;
mod auth;
mod batch_events;
mod batches;
mod config;
mod connections;
mod content;
mod credentials;
mod data_rate;
mod decompress;
mod discard_body;
mod error;
mod files;
mod health;
mod http2_streams;
mod json_response;
mod metrics;
mod models;
mod multipart;
mod online;
mod openapi;
mod organization;
mod origin_guard;
mod pages;
mod params;
mod path;
mod plugins;
mod query_params;
mod server;
mod state;
mod tls;
mod traces;
mod webhooks;
mod wire;

use std::net::SocketAddr;
use std::sync::Arc;

pub use admin_actions::{Process, ReloadOutcome};
pub use auth::Authenticator;
use axum::extract::{DefaultBodyLimit, Request};
use axum::http::{HeaderName, HeaderValue, Method, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use batchwright_batch::{BatchConfig, Engine};
use batchwright_domain::text::truncate_for_message;
use batchwright_webhooks::WebhookService;
pub use config::ApiConfig;
use error::ApiError;
pub use metrics::{HttpMetrics, METRICS};
pub use organization::OperatorApi;
use organization::Organization;
pub use server::{serve, serve_admin};
use state::ApiState;
pub use tls::{Tls, TlsError};
use tower_http::catch_panic::CatchPanicLayer;
use utoipa::openapi::OpenApi;
use utoipa_axum::router::{OpenApiRouter, UtoipaMethodRouterExt};
use utoipa_axum::routes;
use uuid::Uuid;

use origin_guard::OriginPolicy;

/// Path prefixes of all routes. Clients of llama-stack as of 2025 use the second prefix.
const ROUTE_PREFIXES: [&str; 2] = ["/v1", "/v1/openai/v1"];

/// Maximum size of a request body other than an upload, in bytes.
const MAX_JSON_BODY_BYTES: usize = 128 << 10;

/// Response header with the id that the log has for the request.
const REQUEST_ID_HEADER: HeaderName = HeaderName::from_static("x-request-id");

type App = axum::extract::State<Arc<ApiState>>;

/// Returns the routes below a prefix, and their description without limits.
fn routes() -> (Router<Arc<ApiState>>, OpenApi) {
    let api = OpenApiRouter::new()
        .routes(routes!(files::upload).layer(DefaultBodyLimit::disable()))
        .routes(routes!(files::list))
        .routes(routes!(files::get, files::delete))
        .routes(routes!(content::download))
        .routes(routes!(batches::create, batches::list))
        .routes(routes!(batches::get))
        .routes(routes!(batches::cancel))
        .routes(routes!(batch_events::of_project))
        .routes(routes!(batch_events::of_batch))
        .routes(routes!(plugins::list))
        .routes(routes!(plugins::of_batch))
        .routes(routes!(models::list))
        .routes(routes!(credentials::list, credentials::set))
        .routes(routes!(credentials::delete))
        .routes(routes!(webhooks::create, webhooks::list))
        .routes(routes!(webhooks::get, webhooks::update, webhooks::delete))
        .routes(routes!(webhooks::rotate_secret))
        .routes(routes!(webhooks::test))
        .routes(routes!(webhooks::deliveries))
        .routes(routes!(webhooks::redeliver))
        .routes(routes!(webhooks::event_types))
        .routes(routes!(online::chat_completions).layer(DefaultBodyLimit::disable()))
        .routes(routes!(online::completions).layer(DefaultBodyLimit::disable()))
        .routes(routes!(online::embeddings).layer(DefaultBodyLimit::disable()))
        .routes(routes!(online::responses).layer(DefaultBodyLimit::disable()))
        .routes(routes!(online::moderations).layer(DefaultBodyLimit::disable()));
    let (api, mut description) = api.split_for_parts();
    // OpenAPI cannot describe a path parameter that contains slashes, and names of models may.
    let (_, model) =
        OpenApiRouter::<Arc<ApiState>>::new().routes(routes!(models::get)).split_for_parts();
    description.merge(model);
    description.merge(organization::routes().1);
    let api = api.route("/models/{*id}", get(models::get));
    (api, description)
}

/// Returns the OpenAPI document of a server with these limits.
pub fn openapi_document(limits: &BatchConfig) -> serde_json::Value {
    openapi::document(routes().1, limits)
}

/// Returns the router of the API, for a listener on `address`.
///
/// `authenticator` decides who sends a request.
pub fn router(
    (engine, webhooks): (&Engine, &Arc<WebhookService>),
    authenticator: &Arc<Authenticator>,
    (settings, address): (&ApiConfig, SocketAddr),
    metrics: &HttpMetrics,
) -> Router {
    let app = ApiState::new(engine, webhooks);
    let parts = engine.parts();
    let administration = Organization::of_server(
        parts.store.clone(),
        parts.clock.clone(),
        parts.memory.clone(),
        engine.service().clone(),
        authenticator.clone(),
    );
    let (api, description) = routes();
    let document = Json(openapi::document(description, &app.config.batch));
    let mut router = health_routes().route("/openapi.json", get(async move || document));
    let below_prefix: Router<Arc<ApiState>> = api
        .with_state(app.clone())
        .merge(organization::routes().0.with_state(administration))
        .layer(middleware::from_fn_with_state(app.clone(), decompress::decompress))
        .layer(middleware::from_fn_with_state(parts.traces.clone(), traces::record))
        .layer(middleware::from_fn_with_state(authenticator.clone(), auth::identify))
        .with_state(());
    let scrape = Router::new()
        .route("/metrics", get(metrics::scrape))
        .layer(middleware::from_fn_with_state(authenticator.clone(), auth::identify))
        .with_state(metrics.clone());
    router = router.merge(scrape);
    for prefix in ROUTE_PREFIXES {
        router = router.nest(prefix, below_prefix.clone());
    }
    let router = router
        .fallback(unknown_route)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(DefaultBodyLimit::max(MAX_JSON_BODY_BYTES))
        .layer(middleware::from_fn_with_state(
            OriginPolicy::new(settings, address),
            origin_guard::guard,
        ))
        .layer(middleware::from_fn(discard_body::drain))
        .layer(middleware::from_fn_with_state(settings.client_timeout.duration(), data_rate::pace))
        .layer(CatchPanicLayer::custom(|_| {
            ApiError::internal("the handler panicked").into_response()
        }))
        .with_state(app);
    let router = match origin_guard::cors(settings) {
        Some(cors) => router.layer(cors),
        None => router,
    };
    router
        .layer(middleware::from_fn(tag_response))
        .layer(middleware::from_fn_with_state(metrics.clone(), metrics::count))
}

fn health_routes() -> Router<Arc<ApiState>> {
    Router::new()
        .route("/health/live", get(health::live))
        .route("/health/serving", get(health::serving))
        .route("/health/ready", get(health::ready))
}

/// Returns the router of the admin listener: health, metrics, the plugins with the outages of all
/// tenants, and actions on the process.
pub fn admin_router(
    (engine, webhooks): (&Engine, &Arc<WebhookService>),
    (settings, address): (&ApiConfig, SocketAddr),
    metrics: &HttpMetrics,
    process: Arc<dyn Process>,
) -> Router {
    let scrape = Router::new()
        .route("/metrics", get(metrics::scrape_for_operator))
        .with_state(metrics.clone());
    let plugins = Router::new().route("/v1/plugins", get(plugins::list_for_operator));
    health_routes()
        .merge(plugins)
        .merge(scrape)
        .merge(admin_actions::routes(process).with_state(()))
        .fallback(unknown_route)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(middleware::from_fn_with_state(
            OriginPolicy::new(settings, address),
            origin_guard::guard,
        ))
        .layer(middleware::from_fn(tag_response))
        .layer(middleware::from_fn_with_state(metrics.clone(), metrics::count))
        .with_state(ApiState::new(engine, webhooks))
}

/// Id of a request, for the response and the log.
#[derive(Clone)]
struct RequestId(String);

/// Adds a request id to each response, and logs the request.
async fn tag_response(mut request: Request, next: Next) -> Response {
    let id = Uuid::new_v4().simple().to_string();
    request.extensions_mut().insert(RequestId(id.clone()));
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let mut response = next.run(request).await;
    let status = response.status();
    let is_json = response
        .headers()
        .get(header::CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes() == b"application/json");
    if (status.is_client_error() || status.is_server_error()) && !is_json {
        // The framework built this error, for example for a path that is not UTF-8.
        response = ApiError::from_status(status).into_response();
    }
    let status = response.status().as_u16();
    tracing::debug!(request_id = id, %method, path, status, "request handled");
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID_HEADER, value);
    }
    response
}

async fn unknown_route(method: Method, uri: Uri) -> ApiError {
    ApiError::not_found(format!("Invalid URL ({method} {})", truncate_for_message(uri.path())))
}

async fn method_not_allowed(method: Method, uri: Uri) -> ApiError {
    ApiError::method_not_allowed(format!(
        "Not allowed to {method} on {}.",
        truncate_for_message(uri.path())
    ))
}
