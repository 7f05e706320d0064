//! JSON objects of webhooks.

use batchwright_domain::clock::Timestamp;
use batchwright_store::webhooks::{DeliveryRecord, DeliveryState, WebhookRecord};
use batchwright_webhooks::{Secret, Tested};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Identified;

/// Type of an event. [`crate::openapi`] adds the names.
#[derive(Deserialize, ToSchema)]
#[expect(dead_code, reason = "used for the OpenAPI schema only")]
pub(crate) struct WebhookEventType(String);

/// Body of `POST /webhook_endpoints`.
#[derive(Deserialize, ToSchema)]
#[expect(dead_code, reason = "used for the OpenAPI schema only")]
#[serde(deny_unknown_fields)]
pub(crate) struct CreateWebhookEndpoint {
    #[schema(min_length = 1, max_length = 256, pattern = "^[^\\x00-\\x1f\\x7f-\\x9f]+$")]
    name: String,
    /// URL of a public host that is reached by HTTPS.
    #[schema(max_length = 2048, format = "uri")]
    url: String,
    /// Events that are sent.
    #[schema(min_items = 1)]
    event_types: Vec<WebhookEventType>,
}

/// Body of `POST /webhook_endpoints/{id}`.
#[derive(Deserialize, ToSchema)]
#[expect(dead_code, reason = "used for the OpenAPI schema only")]
#[serde(deny_unknown_fields)]
pub(crate) struct UpdateWebhookEndpoint {
    #[schema(min_length = 1, max_length = 256, pattern = "^[^\\x00-\\x1f\\x7f-\\x9f]+$")]
    name: Option<String>,
    /// URL of a public host that is reached by HTTPS.
    #[schema(max_length = 2048, format = "uri")]
    url: Option<String>,
    /// All events that are sent from now on.
    #[schema(min_items = 1)]
    event_types: Option<Vec<WebhookEventType>>,
}

/// Body of `POST /webhook_endpoints/{id}/rotate_secret`.
#[derive(Deserialize, ToSchema)]
#[expect(dead_code, reason = "used for the OpenAPI schema only")]
#[serde(deny_unknown_fields)]
pub(crate) struct RotateWebhookSecret {
    /// True if the old secret signs, too, for 24 hours.
    keep_old_secret_active_for_24_hours: Option<bool>,
}

/// Body of `POST /webhook_endpoints/{id}/test`.
#[derive(Deserialize, ToSchema)]
#[expect(dead_code, reason = "used for the OpenAPI schema only")]
#[serde(deny_unknown_fields)]
pub(crate) struct TestWebhookEndpoint {
    event_type: WebhookEventType,
}

/// Webhook endpoint, without its secret.
#[derive(Serialize, ToSchema)]
pub(crate) struct WebhookEndpoint {
    id: String,
    #[schema(pattern = "^webhook_endpoint$")]
    object: &'static str,
    name: String,
    url: String,
    event_types: Vec<&'static str>,
    /// End of the secret.
    signing_secret_hint: String,
    created_at: i64,
    /// Time of the last change of the endpoint or its secret.
    updated_at: i64,
    /// Time of the first failed attempt since the last success.
    #[schema(required)]
    failing_since: Option<i64>,
    /// Time at which the server has disabled the endpoint. A change enables it.
    #[schema(required)]
    disabled_at: Option<i64>,
}

impl Identified for WebhookEndpoint {
    fn id(&self) -> &str {
        &self.id
    }
}

impl From<WebhookRecord> for WebhookEndpoint {
    fn from(record: WebhookRecord) -> Self {
        Self {
            id: record.id.to_string(),
            object: "webhook_endpoint",
            name: record.name,
            url: record.url,
            event_types: record.event_types.iter().map(|event| event.as_str()).collect(),
            signing_secret_hint: record.hint,
            created_at: record.created_at.as_seconds(),
            updated_at: record.updated_at.as_seconds(),
            failing_since: record.failing_since.map(Timestamp::as_seconds),
            disabled_at: record.disabled_at.map(Timestamp::as_seconds),
        }
    }
}

/// Webhook endpoint with its secret, which no later response has.
#[derive(Serialize, ToSchema)]
pub(crate) struct WebhookEndpointWithSecret {
    #[serde(flatten)]
    endpoint: WebhookEndpoint,
    #[schema(pattern = "^whsec_")]
    signing_secret: String,
}

impl WebhookEndpointWithSecret {
    /// Returns an endpoint with a new secret.
    pub(crate) fn new(record: WebhookRecord, secret: Secret) -> Self {
        Self { endpoint: record.into(), signing_secret: secret.0 }
    }
}

/// Confirmation that a webhook endpoint is deleted.
#[derive(Serialize, ToSchema)]
pub(crate) struct DeletedWebhookEndpoint {
    id: String,
    #[schema(pattern = "^webhook_endpoint.deleted$")]
    object: &'static str,
    /// Always true.
    deleted: bool,
}

impl DeletedWebhookEndpoint {
    pub(crate) fn new(id: String) -> Self {
        Self { id, object: "webhook_endpoint.deleted", deleted: true }
    }
}

/// Answer of an endpoint to a sample event.
#[derive(Serialize, ToSchema)]
pub(crate) struct WebhookTest {
    #[schema(pattern = "^webhook_endpoint.test$")]
    object: &'static str,
    webhook_endpoint_id: String,
    event_type: &'static str,
    /// HTTP status of the answer.
    status_code: u16,
    /// Always true: the endpoint has answered.
    success: bool,
}

impl WebhookTest {
    pub(crate) fn new(id: String, tested: Tested) -> Self {
        Self {
            object: "webhook_endpoint.test",
            webhook_endpoint_id: id,
            event_type: tested.event.as_str(),
            status_code: tested.status,
            success: true,
        }
    }
}

/// Types of events.
#[derive(Serialize, ToSchema)]
pub(crate) struct WebhookEventTypes {
    #[schema(pattern = "^list$")]
    pub object: &'static str,
    pub data: Vec<&'static str>,
}

/// Delivery of an event to an endpoint.
#[derive(Serialize, ToSchema)]
pub(crate) struct WebhookDelivery {
    /// Id of the event, the same in every attempt.
    id: String,
    #[schema(pattern = "^webhook_endpoint.delivery$")]
    object: &'static str,
    event_type: &'static str,
    /// Id of the batch.
    data_id: String,
    created_at: i64,
    /// `pending`, `delivered` or `failed`.
    #[schema(pattern = "^(pending|delivered|failed)$")]
    status: &'static str,
    /// Number of attempts.
    attempts: u64,
    /// Time of the last attempt.
    #[schema(required)]
    last_attempt_at: Option<i64>,
    /// Time of the next attempt.
    #[schema(required)]
    next_attempt_at: Option<i64>,
    /// HTTP status of the last answer.
    #[schema(required)]
    status_code: Option<u16>,
    /// First bytes of the last answer, or why there was none.
    #[schema(required)]
    detail: Option<String>,
}

impl Identified for WebhookDelivery {
    fn id(&self) -> &str {
        &self.id
    }
}

impl From<DeliveryRecord> for WebhookDelivery {
    fn from(record: DeliveryRecord) -> Self {
        Self {
            id: record.event.to_string(),
            object: "webhook_endpoint.delivery",
            event_type: record.event_type.as_str(),
            data_id: record.subject,
            created_at: record.created_at.as_seconds(),
            status: match record.state {
                DeliveryState::Pending => "pending",
                DeliveryState::Delivered => "delivered",
                DeliveryState::Failed => "failed",
            },
            attempts: record.attempts,
            last_attempt_at: record.last_at.map(Timestamp::as_seconds),
            next_attempt_at: record.next_at.map(Timestamp::as_seconds),
            status_code: record.status,
            detail: record.detail,
        }
    }
}
