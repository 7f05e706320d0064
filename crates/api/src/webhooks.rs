//! `/webhook_endpoints` and `/webhook_event_types`, in the shapes of the official SDKs
//! (`client.webhooks`, openai 3.57), and the deliveries of an endpoint.

use axum::Json;
use axum::extract::{Path, State};
use batchwright_domain::error_code::ErrorCode;
use batchwright_domain::ids::{EventId, WebhookId};
use batchwright_domain::text::truncate_for_message;
use batchwright_domain::webhook::EventType;
use batchwright_store::Order;
use batchwright_webhooks::{NewEndpoint, WebhookError};

use super::App;
use super::error::ApiError;
use super::openapi::Errors;
use super::pages::{list_query, page};
use super::params::{Params, missing_parameter};
use super::query_params::QueryParams;
use super::wire::List;
use crate::auth::{Client, ReadWebhooks, Tenant, WriteWebhooks};
use crate::wire::webhooks::{
    CreateWebhookEndpoint, DeletedWebhookEndpoint, RotateWebhookSecret, TestWebhookEndpoint,
    UpdateWebhookEndpoint, WebhookDelivery, WebhookEndpoint, WebhookEndpointWithSecret,
    WebhookEventTypes, WebhookTest,
};

/// Creates a webhook endpoint
///
/// The response has the secret that signs events, once.
#[utoipa::path(post, path = "/webhook_endpoints", tag = "Webhooks",
    request_body = CreateWebhookEndpoint,
    responses((status = 200, body = WebhookEndpointWithSecret, description = "The endpoint"),
        Errors))]
pub(crate) async fn create(
    State(app): App,
    tenant: Tenant<WriteWebhooks>,
    client: Client,
    mut params: Params,
) -> Result<Json<WebhookEndpointWithSecret>, ApiError> {
    let new = NewEndpoint {
        name: Some(params.string("name")?),
        url: Some(params.string("url")?),
        event_types: Some(required_events(&mut params)?),
    };
    params.reject_unknown()?;
    let by = client.actor(app.webhooks.now());
    let (record, secret) = app.webhooks.create(&tenant.0, new, by).await.map_err(failed)?;
    Ok(Json(WebhookEndpointWithSecret::new(record, secret)))
}

/// Lists the webhook endpoints, oldest first
#[utoipa::path(get, path = "/webhook_endpoints", tag = "Webhooks", params(
    ("after" = Option<String>, Query, description = "Id of the last endpoint of the previous page"),
    ("limit" = Option<u32>, Query, minimum = 1, maximum = 100,
        description = "Maximum number of endpoints in the page; 20 if absent"),
), responses((status = 200, body = List<WebhookEndpoint>, description = "Page of endpoints"),
    Errors))]
pub(crate) async fn list(
    State(app): App,
    tenant: Tenant<ReadWebhooks>,
    query: QueryParams,
) -> Result<Json<List<WebhookEndpoint>>, ApiError> {
    let part = list_query(&query, Order::OldestFirst)?;
    let found = app.webhooks.list(&tenant.0, part.clone()).await.map_err(failed)?;
    page(found, "webhook endpoint", part.after.as_deref(), WebhookEndpoint::from)
}

/// Returns a webhook endpoint
#[utoipa::path(get, path = "/webhook_endpoints/{id}", tag = "Webhooks",
    params(("id" = String, Path, description = "Id of the endpoint")),
    responses((status = 200, body = WebhookEndpoint, description = "The endpoint"), Errors))]
pub(crate) async fn get(
    State(app): App,
    tenant: Tenant<ReadWebhooks>,
    Path(id): Path<WebhookId>,
) -> Result<Json<WebhookEndpoint>, ApiError> {
    let found = app.webhooks.get(&tenant.0, &id).await;
    found.map(|record| Json(record.into())).map_err(failed)
}

/// Changes a webhook endpoint
///
/// A call with a parameter also enables an endpoint that the server has disabled.
#[utoipa::path(post, path = "/webhook_endpoints/{id}", tag = "Webhooks",
    params(("id" = String, Path, description = "Id of the endpoint")),
    request_body = UpdateWebhookEndpoint,
    responses((status = 200, body = WebhookEndpoint, description = "The endpoint"), Errors))]
pub(crate) async fn update(
    State(app): App,
    tenant: Tenant<WriteWebhooks>,
    client: Client,
    Path(id): Path<WebhookId>,
    mut params: Params,
) -> Result<Json<WebhookEndpoint>, ApiError> {
    let changes = NewEndpoint {
        name: params.optional_string("name")?,
        url: params.optional_string("url")?,
        event_types: params.optional_strings("event_types")?,
    };
    params.reject_unknown()?;
    let by = client.actor(app.webhooks.now());
    let changed = app.webhooks.update(&tenant.0, &id, changes, by).await;
    changed.map(|record| Json(record.into())).map_err(failed)
}

/// Deletes a webhook endpoint, with what was not delivered yet
#[utoipa::path(delete, path = "/webhook_endpoints/{id}", tag = "Webhooks",
    params(("id" = String, Path, description = "Id of the endpoint")),
    responses((status = 200, body = DeletedWebhookEndpoint, description = "Deleted"), Errors))]
pub(crate) async fn delete(
    State(app): App,
    tenant: Tenant<WriteWebhooks>,
    client: Client,
    Path(id): Path<WebhookId>,
) -> Result<Json<DeletedWebhookEndpoint>, ApiError> {
    let by = client.actor(app.webhooks.now());
    app.webhooks.delete(&tenant.0, &id, by).await.map_err(failed)?;
    Ok(Json(DeletedWebhookEndpoint::new(id.to_string())))
}

/// Replaces the secret of a webhook endpoint
///
/// The response has the new secret, once.
#[utoipa::path(post, path = "/webhook_endpoints/{id}/rotate_secret", tag = "Webhooks",
    params(("id" = String, Path, description = "Id of the endpoint")),
    request_body = RotateWebhookSecret,
    responses((status = 200, body = WebhookEndpointWithSecret, description = "The endpoint"),
        Errors))]
pub(crate) async fn rotate_secret(
    State(app): App,
    tenant: Tenant<WriteWebhooks>,
    client: Client,
    Path(id): Path<WebhookId>,
    mut params: Params,
) -> Result<Json<WebhookEndpointWithSecret>, ApiError> {
    let keeps = params.optional_boolean("keep_old_secret_active_for_24_hours")?.unwrap_or(false);
    params.reject_unknown()?;
    let by = client.actor(app.webhooks.now());
    let rotated = app.webhooks.rotate_secret(&tenant.0, &id, keeps, by).await;
    let (record, secret) = rotated.map_err(failed)?;
    Ok(Json(WebhookEndpointWithSecret::new(record, secret)))
}

/// Sends a sample event to a webhook endpoint
///
/// The event is signed like any other. Its batch is `batch_sample`, which does not exist.
#[utoipa::path(post, path = "/webhook_endpoints/{id}/test", tag = "Webhooks",
    params(("id" = String, Path, description = "Id of the endpoint")),
    request_body = TestWebhookEndpoint,
    responses((status = 200, body = WebhookTest, description = "What the endpoint has answered"),
        Errors))]
pub(crate) async fn test(
    State(app): App,
    tenant: Tenant<WriteWebhooks>,
    Path(id): Path<WebhookId>,
    mut params: Params,
) -> Result<Json<WebhookTest>, ApiError> {
    let event = params.string("event_type")?;
    params.reject_unknown()?;
    let tested = app.webhooks.test(&tenant.0, &id, &event).await.map_err(failed)?;
    Ok(Json(WebhookTest::new(id.to_string(), tested)))
}

/// Lists the types of events that webhooks can have
#[utoipa::path(get, path = "/webhook_event_types", tag = "Webhooks",
    responses((status = 200, body = WebhookEventTypes, description = "All types"), Errors))]
pub(crate) async fn event_types(_: Tenant<ReadWebhooks>) -> Json<WebhookEventTypes> {
    let data = EventType::ALL.iter().map(|event| event.as_str()).collect();
    Json(WebhookEventTypes { object: "list", data })
}

/// Lists the deliveries of a webhook endpoint, newest first
#[utoipa::path(get, path = "/webhook_endpoints/{id}/deliveries", tag = "Webhooks", params(
    ("id" = String, Path, description = "Id of the endpoint"),
    ("after" = Option<String>, Query, description = "Id of the last event of the previous page"),
    ("limit" = Option<u32>, Query, minimum = 1, maximum = 100,
        description = "Maximum number of deliveries in the page; 20 if absent"),
), responses((status = 200, body = List<WebhookDelivery>, description = "Page of deliveries"),
    Errors))]
pub(crate) async fn deliveries(
    State(app): App,
    tenant: Tenant<ReadWebhooks>,
    Path(id): Path<WebhookId>,
    query: QueryParams,
) -> Result<Json<List<WebhookDelivery>>, ApiError> {
    let part = list_query(&query, Order::NewestFirst)?;
    let found = app.webhooks.deliveries(&tenant.0, &id, part.clone()).await.map_err(failed)?;
    page(found, "event", part.after.as_deref(), WebhookDelivery::from)
}

/// Delivers an event again, under the same id
#[utoipa::path(post, path = "/webhook_endpoints/{id}/deliveries/{event}/redeliver",
    tag = "Webhooks",
    params(("id" = String, Path, description = "Id of the endpoint"),
        ("event" = String, Path, description = "Id of the event")),
    responses((status = 200, body = WebhookDelivery, description = "The delivery"), Errors))]
pub(crate) async fn redeliver(
    State(app): App,
    tenant: Tenant<WriteWebhooks>,
    Path((id, event)): Path<(WebhookId, EventId)>,
) -> Result<Json<WebhookDelivery>, ApiError> {
    let again = app.webhooks.redeliver(&tenant.0, &id, &event).await;
    again.map(|record| Json(record.into())).map_err(failed)
}

/// Reads the events of a new endpoint.
fn required_events(params: &mut Params) -> Result<Vec<String>, ApiError> {
    params.optional_strings("event_types")?.ok_or_else(|| missing_parameter("event_types"))
}

fn failed(error: WebhookError) -> ApiError {
    match error {
        WebhookError::UnknownEndpoint(id) => ApiError::not_found(format!(
            "No webhook endpoint found with id '{}'.",
            truncate_for_message(&id)
        )),
        WebhookError::UnknownEvent(id) => ApiError::not_found(format!(
            "No delivery of the event '{}' to this webhook endpoint found.",
            truncate_for_message(&id)
        )),
        WebhookError::Invalid { param, message } => ApiError::invalid(
            param,
            ErrorCode::InvalidValue,
            format!("Invalid '{param}': {message}"),
        ),
        WebhookError::Unreachable(message) => {
            ApiError::bad_request(message).with_code(ErrorCode::WebhookEndpointUnreachable)
        }
        WebhookError::TestRunning => ApiError::too_many_requests(error.to_string()),
        WebhookError::Secret(error) => ApiError::internal(error),
        WebhookError::Store(error) => error.into(),
    }
}
