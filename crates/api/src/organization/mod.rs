//! `/organization`: administration of projects, service accounts and keys, with the routes, the
//! parameters and the objects of the official SDKs (`client.admin.organization`, openai 3.57).
//!
//! An admin key is needed for all of it. The command line serves the same routes in its own process
//! for an operator who has the data folder, without a server.

mod audit_logs;
mod keys;
mod limits;
mod projects;
mod rate_limits;
mod service_accounts;
mod spend_limit;
mod usage;

use std::ops::RangeInclusive;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::Request;
use axum::http::{Method, StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::any;
use axum::{Extension, Router};
use batchwright_batch::Service;
use batchwright_domain::clock::{Clock, Timestamp};
use batchwright_domain::error_code::ErrorCode;
use batchwright_domain::ids::ProjectId;
use batchwright_domain::text::truncate_for_message;
use batchwright_memory::Memory;
use batchwright_store::accounts::Refusal;
use batchwright_store::{Accounts, StoreError};
use batchwright_tenancy::project::check_name;
use batchwright_tenancy::{Principal, Scopes};
use bytes::Bytes;
use tower::ServiceExt;
use utoipa::openapi::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use crate::auth::{Admin, Authenticator};
use crate::error::ApiError;
use crate::params::{HasMemory, Params};
use crate::{method_not_allowed, tag_response, unknown_route};

/// Valid lifetimes of a key, in seconds: up to ten years.
const KEY_LIFETIME_SECONDS: RangeInclusive<u64> = 1..=315_360_000;

/// What the handlers of the administration use.
pub(crate) struct Organization {
    pub accounts: Arc<dyn Accounts>,
    pub clock: Clock,
    memory: Memory,
    /// Batches of a running server.
    pub service: Option<Arc<Service>>,
    authenticator: Option<Arc<Authenticator>>,
}

/// State of a handler of the administration.
pub(crate) type Administration = axum::extract::State<Arc<Organization>>;

impl HasMemory for Arc<Organization> {
    fn memory(&self) -> &Memory {
        &self.memory
    }
}

impl Organization {
    /// Returns the state for a running server.
    pub(crate) fn of_server(
        accounts: Arc<dyn Accounts>,
        clock: Clock,
        memory: Memory,
        service: Arc<Service>,
        authenticator: Arc<Authenticator>,
    ) -> Arc<Self> {
        let (service, authenticator) = (Some(service), Some(authenticator));
        Arc::new(Self { accounts, clock, memory, service, authenticator })
    }

    /// Empties the cache of keys, so that a change takes effect at once.
    pub(crate) fn clear_key_cache(&self) {
        if let Some(authenticator) = &self.authenticator {
            authenticator.clear_cache();
        }
    }

    /// Lets requests that wait for a limit try again. A failure delays them, and nothing is lost.
    async fn limits_changed(&self) {
        if let Some(service) = &self.service {
            service.limits_changed().await;
        }
    }

    /// Returns the end of a key's lifetime, given the parameter `expires_in_seconds`.
    fn expiry(&self, params: &mut Params) -> Result<Option<Timestamp>, ApiError> {
        let seconds = params.optional_integer("expires_in_seconds", KEY_LIFETIME_SECONDS)?;
        let now = self.clock.now();
        Ok(seconds.map(|seconds| now.after(std::time::Duration::from_secs(seconds))))
    }
}

/// Returns the routes of the administration below a prefix, and their description.
pub(crate) fn routes() -> (Router<Arc<Organization>>, OpenApi) {
    let api = OpenApiRouter::new()
        .routes(routes!(projects::create, projects::list))
        .routes(routes!(projects::get, projects::update))
        .routes(routes!(projects::archive))
        .routes(routes!(service_accounts::create, service_accounts::list))
        .routes(routes!(service_accounts::get, service_accounts::update, service_accounts::delete))
        .routes(routes!(keys::create_for_account))
        .routes(routes!(keys::list))
        .routes(routes!(keys::get, keys::update, keys::delete))
        .routes(routes!(keys::create_admin, keys::list_admin))
        .routes(routes!(keys::get_admin, keys::delete_admin))
        .routes(routes!(limits::get, limits::update))
        .routes(routes!(limits::get_models, limits::update_models, limits::delete_models))
        .routes(routes!(rate_limits::list))
        .routes(routes!(rate_limits::update))
        .routes(routes!(spend_limit::get, spend_limit::update, spend_limit::delete))
        .routes(routes!(audit_logs::list));
    // The key of a project may read the usage of its own project.
    let reports = OpenApiRouter::new()
        .routes(routes!(usage::completions))
        .routes(routes!(usage::embeddings))
        .routes(routes!(usage::moderations))
        .routes(routes!(usage::costs));
    let api = api.layer(middleware::from_fn(require_admin)).merge(reports);
    let (api, description) = api.split_for_parts();
    let api = api
        .route("/organization", any(not_served))
        .route("/organization/{*rest}", any(not_served))
        .route("/projects/{*rest}", any(not_served));
    (api, description)
}

/// Routes of the administration, called in the process of an operator who has the data folder.
pub struct OperatorApi(Router);

impl OperatorApi {
    /// Creates the routes for a store that no server uses.
    pub fn new(accounts: Arc<dyn Accounts>, clock: Clock, memory: Memory) -> Self {
        let state =
            Arc::new(Organization { accounts, clock, memory, service: None, authenticator: None });
        let router = routes()
            .0
            .fallback(unknown_route)
            .method_not_allowed_fallback(method_not_allowed)
            .layer(Extension(Principal::Operator))
            .layer(middleware::from_fn(tag_response))
            .with_state(state);
        Self(router)
    }

    /// Calls a route, given its path below `/v1/`; returns the status and the body.
    pub async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<&serde_json::Value>,
    ) -> Result<(StatusCode, Bytes), axum::Error> {
        let body = body.map_or_else(Body::empty, |body| Body::from(body.to_string()));
        let request = Request::builder()
            .method(method)
            .uri(format!("/{path}"))
            .header(header::CONTENT_TYPE, "application/json")
            .body(body)
            .map_err(axum::Error::new)?;
        let response = match self.0.clone().oneshot(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        };
        let status = response.status();
        let body = axum::body::to_bytes(response.into_body(), usize::MAX).await?;
        Ok((status, body))
    }
}

/// Refuses a request to the administration that no administrator sends.
async fn require_admin(_: Admin, request: Request, next: Next) -> Response {
    next.run(request).await
}

async fn not_served(method: Method, uri: Uri) -> ApiError {
    ApiError::not_found(format!(
        "This server does not serve {method} {}.",
        truncate_for_message(uri.path())
    ))
    .with_code(ErrorCode::NotServed)
}

/// Returns a new id of the API with a prefix.
fn new_id(prefix: &str) -> String {
    format!("{prefix}{}", Uuid::new_v4().simple())
}

/// Removes a name from the parameters and checks it.
fn optional_name(params: &mut Params) -> Result<Option<String>, ApiError> {
    let Some(name) = params.optional_string("name")? else { return Ok(None) };
    match check_name(&name) {
        Ok(name) => Ok(Some(name.to_owned())),
        Err(fault) => Err(ApiError::invalid(
            "name",
            ErrorCode::InvalidValue,
            format!("Invalid 'name': {fault}; expected 1 to 128 characters on one line."),
        )),
    }
}

fn required_name(params: &mut Params) -> Result<String, ApiError> {
    optional_name(params)?.ok_or_else(|| crate::params::missing_parameter("name"))
}

/// Removes the parameter `scopes` and checks the names.
fn optional_scopes(params: &mut Params) -> Result<Option<Scopes>, ApiError> {
    let Some(names) = params.optional_strings("scopes")? else { return Ok(None) };
    Scopes::parse(names.iter().map(String::as_str)).map(Some).map_err(|unknown| {
        let known = Scopes::all().names().join("', '");
        let message = match unknown {
            "" => format!("Invalid 'scopes': it is empty. Supported values are: '{known}'."),
            unknown => format!(
                "Invalid value: '{}'. Supported values are: '{known}'. The parameter is 'scopes'.",
                truncate_for_message(unknown)
            ),
        };
        ApiError::invalid("scopes", ErrorCode::InvalidValue, message)
    })
}

/// Returns the error of an operation on a project, or on a resource of a project.
fn failed(error: StoreError, project: Option<&ProjectId>, resource: &str) -> ApiError {
    let (shown, project) = (truncate_for_message, project.map_or("", ProjectId::as_str));
    match error {
        StoreError::Refused(Refusal::UnknownProject) => project_not_found(project),
        StoreError::Refused(Refusal::UnknownAccount) => account_not_found(resource),
        StoreError::Refused(Refusal::UnknownKey) => key_not_found(resource),
        StoreError::Refused(Refusal::ExpiredKey) => ApiError::bad_request(format!(
            "The API key '{}' has expired and cannot be changed; create another key.",
            shown(resource)
        )),
        StoreError::Refused(Refusal::Archived) => ApiError::forbidden(format!(
            "The project '{}' is archived and cannot be changed.",
            shown(project)
        ))
        .with_code(ErrorCode::ProjectArchived),
        StoreError::Refused(Refusal::NameTaken) => ApiError::invalid(
            "name",
            ErrorCode::ProjectNameTaken,
            "Another project has this name; choose another name, or archive the other project.",
        ),
        StoreError::Refused(Refusal::ModelLimits(max)) => ApiError::bad_request(format!(
            "The project has limits for {max} models already; remove some first."
        )),
        StoreError::Refused(Refusal::LastAdminKey) => ApiError::bad_request(
            "This is the last admin key; create another one before you delete it.",
        )
        .with_code(ErrorCode::LastAdminKey),
        error => error.into(),
    }
}

fn project_not_found(id: &str) -> ApiError {
    ApiError::not_found(format!("No project found with id '{}'.", truncate_for_message(id)))
}

fn account_not_found(id: &str) -> ApiError {
    let id = truncate_for_message(id);
    ApiError::not_found(format!("No service account found with id '{id}'."))
}

fn key_not_found(id: &str) -> ApiError {
    ApiError::not_found(format!("No API key found with id '{}'.", truncate_for_message(id)))
}
