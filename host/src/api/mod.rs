//! The HTTP API: routes, wire types, errors. Each handler reads its request, calls one function of `batch`, and answers.
//!
//! Architecture invariant: wire types live here alone; nothing below knows JSON of the API, statuses or headers.

mod batches;
mod connections;
mod content;
mod decompress;
mod drain;
mod error;
mod files;
mod health;
mod lists;
mod models;
mod multipart;
mod openapi;
mod pace;
mod params;
mod path;
mod plugins;
mod server;
mod streams;
mod web;
mod wire;

use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{HeaderName, HeaderValue, Method, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use tower_http::catch_panic::CatchPanicLayer;
use utoipa_axum::router::{OpenApiRouter, UtoipaMethodRouterExt};
use utoipa_axum::routes;
use uuid::Uuid;

use crate::batch::{Batches, shortened};
use crate::config::Settings;
use error::ApiError;
pub use server::{serve, serve_admin};
use web::Trusted;

/// Every route is here under both: clients of the llama-stack of 2025 use the second.
const PREFIXES: [&str; 2] = ["/v1", "/v1/openai/v1"];

/// Largest body of a request that is no upload, in bytes.
const MOST_JSON: usize = 128 << 10;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

type App = axum::extract::State<Arc<Batches>>;

/// Whose request it is. There is one tenant until keys tell them apart.
struct Tenant(String);

impl Tenant {
    fn of(_: &Request) -> Self {
        Self("default".into())
    }
}

impl<S: Sync> FromRequestParts<S> for Tenant {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(_: &mut Parts, _: &S) -> Result<Self, Self::Rejection> {
        Ok(Self("default".into()))
    }
}

/// All routes, for a listener on this address.
pub fn router(batches: Arc<Batches>, settings: &Settings, address: SocketAddr) -> Router {
    let api = OpenApiRouter::new()
        .routes(routes!(files::upload).layer(DefaultBodyLimit::disable()))
        .routes(routes!(files::list))
        .routes(routes!(files::get, files::delete))
        .routes(routes!(content::download))
        .routes(routes!(batches::create, batches::list))
        .routes(routes!(batches::get))
        .routes(routes!(batches::cancel))
        .routes(routes!(plugins::list))
        .routes(routes!(plugins::of_batch))
        .routes(routes!(models::list));
    let (api, mut described) = api.split_for_parts();
    // The name of a model may hold slashes, which the description of a path cannot say.
    let (_, model) =
        OpenApiRouter::<Arc<Batches>>::new().routes(routes!(models::get)).split_for_parts();
    described.merge(model);
    let api = api.route("/models/{*id}", get(models::get));
    let document = Json(openapi::document(described, settings));
    let mut router = health_routes().route("/openapi.json", get(async move || document));
    for prefix in PREFIXES {
        router = router.nest(prefix, api.clone());
    }
    let router = router
        .fallback(unknown_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(MOST_JSON))
        .layer(middleware::from_fn_with_state(batches.clone(), decompress::decompress))
        .layer(middleware::from_fn_with_state(Trusted::new(settings, address), web::guard))
        .layer(middleware::from_fn(drain::drain))
        .layer(middleware::from_fn_with_state(settings.client_timeout.duration(), pace::pace))
        .layer(CatchPanicLayer::custom(|_| {
            ApiError::internal("the handler panicked").into_response()
        }))
        .with_state(batches);
    let router = match web::cors(settings) {
        Some(cors) => router.layer(cors),
        None => router,
    };
    router.layer(middleware::from_fn(tag))
}

fn health_routes() -> Router<Arc<Batches>> {
    Router::new()
        .route("/health/live", get(health::live))
        .route("/health/serving", get(health::serving))
        .route("/health/ready", get(health::ready))
}

/// For the operator's own listener: health, and the plugins with every tenant's trouble.
pub fn admin_router(batches: Arc<Batches>, settings: &Settings, address: SocketAddr) -> Router {
    let plugins = Router::new().route("/v1/plugins", get(plugins::list_for_operator));
    health_routes()
        .merge(plugins)
        .fallback(unknown_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(middleware::from_fn_with_state(Trusted::new(settings, address), web::guard))
        .layer(middleware::from_fn(tag))
        .with_state(batches)
}

/// Gives each answer an id, and the log a line.
async fn tag(request: Request, next: Next) -> Response {
    let id = Uuid::new_v4().simple().to_string();
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let mut response = next.run(request).await;
    let status = response.status();
    let is_json = response
        .headers()
        .get(header::CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes() == b"application/json");
    if (status.is_client_error() || status.is_server_error()) && !is_json {
        // A refusal of the framework's own, for a path that is not UTF-8 say.
        response = ApiError::of_status(status).into_response();
    }
    tracing::debug!(request_id = id, %method, path, status = response.status().as_u16(), "answered");
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}

async fn unknown_route(method: Method, uri: Uri) -> ApiError {
    ApiError::not_found(format!("Invalid URL ({method} {})", shortened(uri.path())))
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    ApiError::method_not_allowed(format!("Not allowed to {method} on {}.", shortened(uri.path())))
}
