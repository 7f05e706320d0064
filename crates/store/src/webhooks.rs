//! Webhooks: endpoints of projects, and the outbox of events that go to them.
//!
//! **Outbox.** The transaction that ends a batch inserts a delivery for each endpoint of the
//! project that asks for the event. So no event is lost between the end of a batch and a queue, and
//! none is sent for an end that was rolled back.
//!
//! **Deliveries.** A delivery is due at a time, is claimed for an attempt until a lease ends, and
//! is attempted again until it succeeds or its time is over. A process that dies during an attempt
//! leaves a lease that ends: the event is sent again, with the same id. The outcome of an attempt
//! counts only while its lease is that of the delivery. Deliveries that have ended stay for a while
//! as the log of the endpoint.

use std::sync::Arc;

use async_trait::async_trait;
use batchwright_domain::clock::Timestamp;
use batchwright_domain::ids::{EventId, TenantId, WebhookId};
use batchwright_domain::webhook::EventType;

use crate::accounts::{Actor, ListQuery};
use crate::{Paged, Result};

/// Secret that signs events, as the store keeps it.
#[derive(Clone, PartialEq, Eq)]
pub struct StoredSecret {
    /// Bytes of the secret, sealed or not.
    pub bytes: Arc<[u8]>,
    /// True if the bytes are sealed with the key of the server.
    pub is_sealed: bool,
}

impl std::fmt::Debug for StoredSecret {
    fn fmt(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
        formatter.write_str("StoredSecret(…)")
    }
}

/// Endpoint to create.
#[derive(Clone, Debug)]
pub struct NewWebhook {
    /// Id, unique for its tenant.
    pub id: WebhookId,
    /// Name that the client gives.
    pub name: String,
    /// URL that events are sent to.
    pub url: String,
    /// Events that are sent.
    pub event_types: Vec<EventType>,
    /// Secret that signs events.
    pub secret: StoredSecret,
    /// Beginning and end of the secret, for people.
    pub hint: String,
}

/// Endpoint of a project.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WebhookRecord {
    /// Id, unique for its tenant.
    pub id: WebhookId,
    /// Name that the client gave.
    pub name: String,
    /// URL that events are sent to.
    pub url: String,
    /// Events that are sent.
    pub event_types: Vec<EventType>,
    /// Secret that signs events.
    pub secret: StoredSecret,
    /// Secret before the last rotation, and until when it signs, too.
    pub old_secret: Option<(StoredSecret, Timestamp)>,
    /// Beginning and end of the secret, for people.
    pub hint: String,
    /// Time of creation.
    pub created_at: Timestamp,
    /// Time of the last change of the endpoint or its secret.
    pub updated_at: Timestamp,
    /// Time of the first failed attempt since the last success.
    pub failing_since: Option<Timestamp>,
    /// Time at which the server has disabled the endpoint.
    pub disabled_at: Option<Timestamp>,
}

/// Changes of an endpoint; what is absent stays.
#[derive(Clone, Debug, Default)]
pub struct WebhookChanges {
    /// New name.
    pub name: Option<String>,
    /// New URL.
    pub url: Option<String>,
    /// New events.
    pub event_types: Option<Vec<EventType>>,
    /// New secret with its hint; the old one signs until this time, or not at all.
    pub secret: Option<(StoredSecret, String, Option<Timestamp>)>,
}

/// State of a delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeliveryState {
    /// Attempted again later.
    Pending,
    /// The endpoint has answered with a success.
    Delivered,
    /// The time is over, or the endpoint was disabled.
    Failed,
}

/// Delivery of an event to an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeliveryRecord {
    /// Id of the event, the same in every attempt.
    pub event: EventId,
    /// Type of the event.
    pub event_type: EventType,
    /// Id of the batch that the event is about.
    pub subject: String,
    /// Time of the event.
    pub created_at: Timestamp,
    /// Time from which attempts are made: that of the event, or of the last call for another
    /// delivery.
    pub retry_since: Timestamp,
    /// State.
    pub state: DeliveryState,
    /// Number of attempts.
    pub attempts: u64,
    /// Time of the next attempt.
    pub next_at: Option<Timestamp>,
    /// Time of the last attempt.
    pub last_at: Option<Timestamp>,
    /// HTTP status of the last attempt; none without an answer.
    pub status: Option<u16>,
    /// Why the last attempt has failed, or the first bytes of the answer.
    pub detail: Option<String>,
}

/// Claimed delivery.
#[derive(Clone, Debug)]
pub struct DueDelivery {
    /// Key of the delivery in the store.
    pub key: i64,
    /// End of the lease, by which the claim is known.
    pub lease: Timestamp,
    /// Tenant.
    pub tenant: TenantId,
    /// Endpoint.
    pub webhook: WebhookRecord,
    /// Delivery.
    pub delivery: DeliveryRecord,
}

/// Outcome of an attempt.
#[derive(Clone, Debug)]
pub struct AttemptResult {
    /// End of the lease of the claim. A delivery that was claimed or called for again since stays
    /// as it is.
    pub lease: Timestamp,
    /// Last change of the endpoint when the attempt began. An endpoint that was changed since is
    /// neither disabled nor failing because of it.
    pub webhook_updated_at: Timestamp,
    /// Time of the attempt.
    pub at: Timestamp,
    /// HTTP status; none without an answer.
    pub status: Option<u16>,
    /// Why the attempt has failed, or the first bytes of the answer.
    pub detail: Option<String>,
    /// True if the endpoint has answered with a success.
    pub is_delivered: bool,
    /// Time of the next attempt; none ends the delivery.
    pub next_at: Option<Timestamp>,
    /// True if the endpoint is disabled because of this failure.
    pub disables: bool,
}

/// Counts of deliveries, for operators.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WebhookCounts {
    /// Deliveries that are attempted again.
    pub pending: u64,
    /// Creation time of the oldest of them.
    pub oldest: Option<Timestamp>,
    /// Endpoints that the server has disabled.
    pub disabled: u64,
}

/// Store of webhooks.
#[async_trait]
pub trait Webhooks: Send + Sync {
    /// Creates an endpoint; refused if the tenant has `max` of them, or is archived.
    async fn create_webhook(
        &self,
        tenant: &TenantId,
        new: NewWebhook,
        max: u64,
        by: Actor,
    ) -> Result<WebhookRecord>;
    /// Returns an endpoint.
    async fn webhook(&self, tenant: &TenantId, id: &WebhookId) -> Result<Option<WebhookRecord>>;
    /// Lists endpoints.
    async fn webhooks(&self, tenant: &TenantId, part: ListQuery) -> Result<Paged<WebhookRecord>>;
    /// Changes an endpoint and enables it; returns none if there is no such endpoint.
    async fn update_webhook(
        &self,
        tenant: &TenantId,
        id: &WebhookId,
        changes: WebhookChanges,
        by: Actor,
    ) -> Result<Option<WebhookRecord>>;
    /// Deletes an endpoint with its deliveries; returns false if there is no such endpoint.
    async fn delete_webhook(&self, tenant: &TenantId, id: &WebhookId, by: Actor) -> Result<bool>;
    /// Lists the deliveries of an endpoint, newest first; none if there is no such endpoint.
    async fn deliveries(
        &self,
        tenant: &TenantId,
        id: &WebhookId,
        part: ListQuery,
    ) -> Result<Option<Paged<DeliveryRecord>>>;
    /// Makes a delivery due again, whatever its state; returns none if there is no such delivery.
    /// Refused for a disabled endpoint, which gets nothing.
    async fn redeliver(
        &self,
        tenant: &TenantId,
        id: &WebhookId,
        event: &EventId,
        now: Timestamp,
    ) -> Result<Option<DeliveryRecord>>;
    /// Claims up to `limit` due deliveries until `until`, at most one for each endpoint and
    /// `of_tenant` for each tenant, counting those of the endpoints in `busy`.
    async fn claim_deliveries(
        &self,
        busy: Vec<(TenantId, WebhookId)>,
        (limit, of_tenant): (usize, usize),
        now: Timestamp,
        until: Timestamp,
    ) -> Result<Vec<DueDelivery>>;
    /// Records an attempt at a claimed delivery.
    async fn record_attempt(&self, key: i64, result: AttemptResult) -> Result<()>;
    /// Returns the time at which the next delivery is due.
    async fn next_delivery(&self) -> Result<Option<Timestamp>>;
    /// Returns counts of deliveries.
    async fn webhook_counts(&self) -> Result<WebhookCounts>;
    /// Removes up to `limit` deliveries that ended before `ended_before`; returns true if more may
    /// remain.
    async fn purge_deliveries(&self, ended_before: Timestamp, limit: usize) -> Result<bool>;
}
