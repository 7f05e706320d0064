//! Webhooks: endpoints, the outbox of events, and the deliveries.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use async_trait::async_trait;
use batchwright_domain::clock::Timestamp;
use batchwright_domain::ids::{EventId, TenantId, WebhookId};
use batchwright_domain::status::Status;
use batchwright_domain::webhook::EventType;
use rusqlite::types::Value;
use rusqlite::{Connection, Row, params};
use serde_json::json;
use uuid::Uuid;

use super::accounts::{audit, creating_tenant, project_of_tenant};
use super::keys::BatchRow;
use super::query::{Listing, execute, find, list};
use super::{SqliteStore, database_error, tenant_key, timestamp, to_i64, to_u64};
use crate::accounts::{Actor, ListQuery, Refusal};
use crate::webhooks::{
    AttemptResult, DeliveryRecord, DeliveryState, DueDelivery, NewWebhook, StoredSecret,
    WebhookChanges, WebhookCounts, WebhookRecord, Webhooks,
};
use crate::{Paged, Result, StoreError};

/// Maximum number of endpoints with due deliveries that one claim looks at.
const MAX_CANDIDATES: i64 = 4096;

/// Separator of event types in their column.
const SEPARATOR: char = ' ';

/// Columns that [`webhook_from`] reads.
const WEBHOOK: &str = "webhooks.id, webhooks.name, url, event_types, secret, secret_is_sealed, \
    old_secret, old_secret_is_sealed, old_secret_until, hint, webhooks.created_at, updated_at, \
    failing_since, disabled_at";

/// Columns that [`delivery_from`] reads.
const DELIVERY: &str = "event, event_type, subject, webhook_deliveries.created_at, state, \
    attempts, next_at, last_at, status, detail, retry_since";

fn webhook_from(row: &Row<'_>) -> rusqlite::Result<WebhookRecord> {
    webhook_at(row, 0)
}

/// Reads an endpoint whose columns begin at `first`.
fn webhook_at(row: &Row<'_>, first: usize) -> rusqlite::Result<WebhookRecord> {
    let at = |place: usize| first.saturating_add(place);
    let time = |place| row.get::<_, Option<i64>>(at(place)).map(|at| at.map(timestamp));
    let secret = |bytes, sealed| {
        let bytes: Option<Vec<u8>> = row.get(at(bytes))?;
        let is_sealed: Option<bool> = row.get(at(sealed))?;
        let is_sealed = is_sealed.unwrap_or(false);
        Ok::<_, rusqlite::Error>(bytes.map(|bytes| StoredSecret { bytes: bytes.into(), is_sealed }))
    };
    let types: String = row.get(at(3))?;
    Ok(WebhookRecord {
        id: row.get::<_, String>(at(0))?.into(),
        name: row.get(at(1))?,
        url: row.get(at(2))?,
        event_types: types.split(SEPARATOR).filter_map(EventType::parse).collect(),
        secret: secret(4, 5)?.unwrap_or(StoredSecret { bytes: Arc::new([]), is_sealed: false }),
        old_secret: secret(6, 7)?.zip(time(8)?),
        hint: row.get(at(9))?,
        created_at: timestamp(row.get(at(10))?),
        updated_at: timestamp(row.get(at(11))?),
        failing_since: time(12)?,
        disabled_at: time(13)?,
    })
}

/// Reads a delivery whose columns begin at `first`.
fn delivery_from(row: &Row<'_>, first: usize) -> rusqlite::Result<DeliveryRecord> {
    let at = |place: usize| first.saturating_add(place);
    let time = |place| row.get::<_, Option<i64>>(at(place)).map(|at| at.map(timestamp));
    let state: String = row.get(at(4))?;
    let status: Option<i64> = row.get(at(8))?;
    Ok(DeliveryRecord {
        event: row.get::<_, String>(at(0))?.into(),
        event_type: EventType::parse(&row.get::<_, String>(at(1))?)
            .unwrap_or(EventType::BatchCompleted),
        subject: row.get(at(2))?,
        created_at: timestamp(row.get(at(3))?),
        retry_since: timestamp(row.get(at(10))?),
        state: match state.as_str() {
            "pending" => DeliveryState::Pending,
            "delivered" => DeliveryState::Delivered,
            _ => DeliveryState::Failed,
        },
        attempts: to_u64(row.get(at(5))?),
        next_at: time(6)?,
        last_at: time(7)?,
        status: status.and_then(|status| u16::try_from(status).ok()),
        detail: row.get(at(9))?,
    })
}

fn joined(types: &[EventType]) -> String {
    types.iter().map(|kind| kind.as_str()).collect::<Vec<_>>().join(&SEPARATOR.to_string())
}

/// Inserts the deliveries of the event that a batch has ended, in the transaction that ends it.
pub(super) fn insert_events(connection: &Connection, batch: BatchRow, at: Timestamp) -> Result<()> {
    let sql = "SELECT status, id FROM batches WHERE tenant = ?1 AND key = ?2";
    let found = find(connection, sql, params![batch.tenant, batch.batch], |row| {
        Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?))
    })?;
    let Some((status, id)) = found else { return Ok(()) };
    let Some(event) = Status::parse(&status).ok().and_then(EventType::of_batch) else {
        return Ok(());
    };
    let sql = "SELECT key, event_types FROM webhooks WHERE tenant = ?1 AND disabled_at IS NULL";
    let mut statement = connection.prepare_cached(sql).map_err(database_error)?;
    let rows = statement
        .query_map([batch.tenant], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, String>(1)?)))
        .map_err(database_error)?;
    for row in rows {
        let (webhook, types) = row.map_err(database_error)?;
        if types.split(SEPARATOR).any(|kind| kind == event.as_str()) {
            let sql = "INSERT INTO webhook_deliveries (webhook, event, event_type, subject,
                created_at, retry_since, state, attempts, next_at)
                VALUES (?1, ?2, ?3, ?4, ?5, ?5, 'pending', 0, ?5)";
            let event_id = format!("evt_{}", Uuid::new_v4().simple());
            let row = params![webhook, event_id, event.as_str(), id, at.as_millis()];
            execute(connection, sql, row)?;
        }
    }
    Ok(())
}

fn get(connection: &Connection, tenant: i64, id: &WebhookId) -> Result<Option<WebhookRecord>> {
    let sql = format!("SELECT {WEBHOOK} FROM webhooks WHERE tenant = ?1 AND id = ?2");
    find(connection, &sql, params![tenant, id.as_str()], webhook_from)
}

fn row_key(connection: &Connection, tenant: &str, id: &WebhookId) -> Result<Option<i64>> {
    let Some(tenant) = tenant_key(connection, tenant)? else { return Ok(None) };
    let sql = "SELECT key FROM webhooks WHERE tenant = ?1 AND id = ?2";
    find(connection, sql, params![tenant, id.as_str()], |row| row.get(0))
}

fn create(
    connection: &Connection,
    tenant: &TenantId,
    new: &NewWebhook,
    max: u64,
    by: &Actor,
) -> Result<WebhookRecord> {
    let key = creating_tenant(connection, tenant)?;
    let sql = "SELECT count(*) FROM webhooks WHERE tenant = ?1";
    let count = find(connection, sql, [key], |row| row.get(0))?.map_or(0, to_u64);
    if count >= max {
        return Err(StoreError::Refused(Refusal::Webhooks(max)));
    }
    let sql = "INSERT INTO webhooks (tenant, id, name, url, event_types, secret, secret_is_sealed,
        hint, created_at, updated_at) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?9)";
    let row = params![
        key,
        new.id.as_str(),
        new.name,
        new.url,
        joined(&new.event_types),
        &*new.secret.bytes,
        new.secret.is_sealed,
        new.hint,
        by.at.as_millis(),
    ];
    execute(connection, sql, row)?;
    // A URL may hold a secret in its path.
    let details = json!({"name": new.name, "event_types": joined(&new.event_types)});
    record(connection, by, "webhook_endpoint.created", key, &new.id, &details)?;
    get(connection, key, &new.id)?.ok_or(StoreError::Closed)
}

fn record(
    connection: &Connection,
    by: &Actor,
    event: &str,
    tenant: i64,
    id: &WebhookId,
    details: &serde_json::Value,
) -> Result<()> {
    let project = project_of_tenant(connection, tenant)?;
    audit::record(connection, by, event, project.as_ref(), id.as_str(), details)
}

fn update(
    connection: &Connection,
    tenant: &TenantId,
    id: &WebhookId,
    changes: &WebhookChanges,
    by: &Actor,
) -> Result<Option<WebhookRecord>> {
    let Some(key) = tenant_key(connection, tenant.as_str())? else { return Ok(None) };
    let Some(known) = get(connection, key, id)? else { return Ok(None) };
    if let Some((secret, hint, old_until)) = &changes.secret {
        let sql = "UPDATE webhooks SET
            old_secret = CASE WHEN ?3 IS NULL THEN NULL ELSE secret END,
            old_secret_is_sealed = secret_is_sealed, old_secret_until = ?3,
            secret = ?4, secret_is_sealed = ?5, hint = ?6, updated_at = ?7
            WHERE tenant = ?1 AND id = ?2";
        let row = params![
            key,
            id.as_str(),
            old_until.map(Timestamp::as_millis),
            &*secret.bytes,
            secret.is_sealed,
            hint,
            by.at.as_millis()
        ];
        execute(connection, sql, row)?;
        let details = json!({"keeps_old_secret": old_until.is_some()});
        record(connection, by, "webhook_endpoint.secret_rotated", key, id, &details)?;
    }
    let types = changes.event_types.as_deref().map(joined);
    let is_changed = changes.name.as_ref().is_some_and(|name| *name != known.name)
        || changes.url.as_ref().is_some_and(|url| *url != known.url)
        || types.as_ref().is_some_and(|types| *types != joined(&known.event_types));
    let is_update =
        changes.name.is_some() || changes.url.is_some() || changes.event_types.is_some();
    if is_changed || (is_update && known.disabled_at.is_some()) {
        let sql = "UPDATE webhooks SET name = coalesce(?3, name), url = coalesce(?4, url),
            event_types = coalesce(?5, event_types), updated_at = ?6,
            disabled_at = NULL, failing_since = NULL WHERE tenant = ?1 AND id = ?2";
        let row = params![key, id.as_str(), changes.name, changes.url, types, by.at.as_millis()];
        execute(connection, sql, row)?;
        let details = json!({
            "name": changes.name,
            "url_changed": changes.url.is_some(),
            "event_types": types,
        });
        record(connection, by, "webhook_endpoint.updated", key, id, &details)?;
    }
    get(connection, key, id)
}

fn delete(connection: &Connection, tenant: &TenantId, id: &WebhookId, by: &Actor) -> Result<bool> {
    let Some(webhook) = row_key(connection, tenant.as_str(), id)? else { return Ok(false) };
    execute(connection, "DELETE FROM webhook_deliveries WHERE webhook = ?1", [webhook])?;
    execute(connection, "DELETE FROM webhooks WHERE key = ?1", [webhook])?;
    if let Some(key) = tenant_key(connection, tenant.as_str())? {
        record(connection, by, "webhook_endpoint.deleted", key, id, &json!({}))?;
    }
    Ok(true)
}

fn delivery(connection: &Connection, key: i64) -> Result<Option<DeliveryRecord>> {
    let sql = format!("SELECT {DELIVERY} FROM webhook_deliveries WHERE key = ?1");
    find(connection, &sql, [key], |row| delivery_from(row, 0))
}

fn redeliver(
    connection: &Connection,
    tenant: &str,
    id: &WebhookId,
    event: &EventId,
    now: Timestamp,
) -> Result<Option<DeliveryRecord>> {
    let Some(webhook) = row_key(connection, tenant, id)? else { return Ok(None) };
    let sql = "SELECT 1 FROM webhooks WHERE key = ?1 AND disabled_at IS NOT NULL";
    if find(connection, sql, [webhook], |_| Ok(()))?.is_some() {
        return Err(StoreError::Refused(Refusal::DisabledWebhook));
    }
    let sql = "UPDATE webhook_deliveries SET state = 'pending', next_at = ?3, retry_since = ?3,
        attempts = 0 WHERE webhook = ?1 AND event = ?2 RETURNING key";
    let row = params![webhook, event.as_str(), now.as_millis()];
    let Some(key) = find(connection, sql, row, |row| row.get(0))? else { return Ok(None) };
    delivery(connection, key)
}

/// Chooses due deliveries: the first of each endpoint, those that have waited longest first.
fn due(
    connection: &Connection,
    busy: &[(TenantId, WebhookId)],
    (limit, of_tenant): (usize, usize),
    now: Timestamp,
    until: Timestamp,
) -> Result<Vec<DueDelivery>> {
    // A deleted endpoint has no deliveries, and a disabled one gets none.
    let sql = format!(
        "SELECT tenants.name, {WEBHOOK}, webhook_deliveries.key, {DELIVERY}
         FROM webhook_deliveries
         JOIN webhooks ON webhooks.key = webhook_deliveries.webhook
         JOIN tenants ON tenants.key = webhooks.tenant
         WHERE webhook_deliveries.key IN (
             SELECT (
                 SELECT due.key FROM webhook_deliveries AS due
                 WHERE due.webhook = webhooks.key AND due.next_at <= ?1
                 ORDER BY due.next_at, due.key LIMIT 1
             ) FROM webhooks WHERE disabled_at IS NULL AND EXISTS (
                 SELECT 1 FROM webhook_deliveries AS due
                 WHERE due.webhook = webhooks.key AND due.next_at <= ?1
             )
         )
         ORDER BY next_at, webhook_deliveries.key LIMIT ?2"
    );
    let mut statement = connection.prepare_cached(&sql).map_err(database_error)?;
    let rows = statement
        .query_map(params![now.as_millis(), MAX_CANDIDATES], |row| {
            Ok(DueDelivery {
                tenant: row.get::<_, String>(0)?.into(),
                webhook: webhook_at(row, 1)?,
                key: row.get(15)?,
                lease: until,
                delivery: delivery_from(row, 16)?,
            })
        })
        .map_err(database_error)?;
    let mut candidates = rows.collect::<rusqlite::Result<Vec<_>>>().map_err(database_error)?;
    // One attempt at a time for an endpoint.
    let is_busy: HashSet<_> = busy.iter().map(|(_, id)| id).collect();
    candidates.retain(|due| !is_busy.contains(&due.webhook.id));
    // Tenants take turns: the first delivery of each goes before the second one of any.
    let mut of_tenant_so_far: HashMap<TenantId, usize> = HashMap::new();
    let mut place = |tenant: &TenantId| {
        let number = of_tenant_so_far.entry(tenant.clone()).or_default();
        *number = number.saturating_add(1);
        *number
    };
    for (tenant, _) in busy {
        place(tenant);
    }
    let mut placed: Vec<_> = candidates.into_iter().map(|due| (place(&due.tenant), due)).collect();
    placed.retain(|(place, _)| *place <= of_tenant);
    placed.sort_by_key(|(place, _)| *place);
    Ok(placed.into_iter().map(|(_, due)| due).take(limit).collect())
}

/// Claims a delivery; returns false if it is not due any more.
fn claim(connection: &Connection, due: &DueDelivery) -> Result<bool> {
    let sql = "UPDATE webhook_deliveries SET next_at = ?2 WHERE key = ?1 AND next_at = ?3";
    let next_at = due.delivery.next_at.map(Timestamp::as_millis);
    Ok(execute(connection, sql, params![due.key, due.lease.as_millis(), next_at])? == 1)
}

fn record_attempt(connection: &Connection, key: i64, result: &AttemptResult) -> Result<()> {
    let state = match (result.is_delivered, result.next_at) {
        (true, _) => "delivered",
        (false, Some(_)) => "pending",
        (false, None) => "failed",
    };
    let next_at = result.next_at.filter(|_| !result.is_delivered).map(Timestamp::as_millis);
    let sql = "UPDATE webhook_deliveries SET state = ?2, attempts = attempts + 1, next_at = ?3,
        last_at = ?4, status = ?5, detail = ?6 WHERE key = ?1 AND next_at = ?7
        RETURNING webhook";
    let row = params![
        key,
        state,
        next_at,
        result.at.as_millis(),
        result.status.map(i64::from),
        result.detail,
        result.lease.as_millis()
    ];
    // The endpoint may have been deleted meanwhile, or the delivery called for again.
    let Some(webhook): Option<i64> = find(connection, sql, row, |row| row.get(0))? else {
        return Ok(());
    };
    let sql = "UPDATE webhooks SET
        failing_since = CASE WHEN ?2 THEN NULL ELSE coalesce(failing_since, ?3) END
        WHERE key = ?1 AND updated_at = ?4";
    let updated_at = result.webhook_updated_at.as_millis();
    let row = params![webhook, result.is_delivered, result.at.as_millis(), updated_at];
    let is_unchanged = execute(connection, sql, row)? > 0;
    if result.disables && is_unchanged {
        let sql = "UPDATE webhooks SET disabled_at = ?2 WHERE key = ?1 AND disabled_at IS NULL";
        execute(connection, sql, params![webhook, result.at.as_millis()])?;
        // They can be delivered again when the endpoint works.
        let sql = "UPDATE webhook_deliveries SET state = 'failed', next_at = NULL
            WHERE webhook = ?1 AND next_at IS NOT NULL";
        execute(connection, sql, [webhook])?;
    }
    Ok(())
}

fn counts(connection: &Connection) -> Result<WebhookCounts> {
    let sql = "SELECT count(*), min(webhook_deliveries.created_at),
        (SELECT count(*) FROM webhooks WHERE disabled_at IS NOT NULL)
        FROM webhook_deliveries JOIN webhooks ON webhooks.key = webhook
        WHERE next_at IS NOT NULL AND disabled_at IS NULL";
    let found = find(connection, sql, [], |row| {
        Ok(WebhookCounts {
            pending: to_u64(row.get(0)?),
            oldest: row.get::<_, Option<i64>>(1)?.map(timestamp),
            disabled: to_u64(row.get(2)?),
        })
    })?;
    Ok(found.unwrap_or_default())
}

#[async_trait]
impl Webhooks for SqliteStore {
    async fn create_webhook(
        &self,
        tenant: &TenantId,
        new: NewWebhook,
        max: u64,
        by: Actor,
    ) -> Result<WebhookRecord> {
        let tenant = tenant.clone();
        self.writer.write(move |connection| create(connection, &tenant, &new, max, &by)).await
    }

    async fn webhook(&self, tenant: &TenantId, id: &WebhookId) -> Result<Option<WebhookRecord>> {
        let (tenant, id) = (tenant.clone(), id.clone());
        self.readers
            .read(move |connection| match tenant_key(connection, tenant.as_str())? {
                Some(key) => get(connection, key, &id),
                None => Ok(None),
            })
            .await
    }

    async fn webhooks(&self, tenant: &TenantId, part: ListQuery) -> Result<Paged<WebhookRecord>> {
        let tenant = tenant.clone();
        self.readers
            .read(move |connection| {
                let key = tenant_key(connection, tenant.as_str())?.unwrap_or(-1);
                let listing = Listing {
                    columns: WEBHOOK,
                    from: "webhooks",
                    ever: ("tenant = ?".to_owned(), vec![Value::Integer(key)]),
                    visible: ("1".to_owned(), Vec::new()),
                    key: "key",
                    id: "id",
                };
                list(connection, listing, &part.part(), webhook_from)
            })
            .await
    }

    async fn update_webhook(
        &self,
        tenant: &TenantId,
        id: &WebhookId,
        changes: WebhookChanges,
        by: Actor,
    ) -> Result<Option<WebhookRecord>> {
        let (tenant, id) = (tenant.clone(), id.clone());
        self.writer.write(move |connection| update(connection, &tenant, &id, &changes, &by)).await
    }

    async fn delete_webhook(&self, tenant: &TenantId, id: &WebhookId, by: Actor) -> Result<bool> {
        let (tenant, id) = (tenant.clone(), id.clone());
        self.writer.write(move |connection| delete(connection, &tenant, &id, &by)).await
    }

    async fn deliveries(
        &self,
        tenant: &TenantId,
        id: &WebhookId,
        part: ListQuery,
    ) -> Result<Option<Paged<DeliveryRecord>>> {
        let (tenant, id) = (tenant.clone(), id.clone());
        self.readers
            .read(move |connection| {
                let Some(key) = row_key(connection, tenant.as_str(), &id)? else {
                    return Ok(None);
                };
                let listing = Listing {
                    columns: DELIVERY,
                    from: "webhook_deliveries",
                    ever: ("webhook = ?".to_owned(), vec![Value::Integer(key)]),
                    visible: ("1".to_owned(), Vec::new()),
                    key: "key",
                    id: "event",
                };
                list(connection, listing, &part.part(), |row| delivery_from(row, 0)).map(Some)
            })
            .await
    }

    async fn redeliver(
        &self,
        tenant: &TenantId,
        id: &WebhookId,
        event: &EventId,
        now: Timestamp,
    ) -> Result<Option<DeliveryRecord>> {
        let (tenant, id, event) = (tenant.clone(), id.clone(), event.clone());
        self.writer
            .write(move |connection| redeliver(connection, tenant.as_str(), &id, &event, now))
            .await
    }

    async fn claim_deliveries(
        &self,
        busy: Vec<(TenantId, WebhookId)>,
        limits: (usize, usize),
        now: Timestamp,
        until: Timestamp,
    ) -> Result<Vec<DueDelivery>> {
        // Chosen among readers: one busy endpoint with due events would keep the writer at it.
        let chosen =
            self.readers.read(move |connection| due(connection, &busy, limits, now, until)).await?;
        if chosen.is_empty() {
            return Ok(chosen);
        }
        self.writer
            .write(move |connection| {
                let mut claimed = Vec::with_capacity(chosen.len());
                for due in chosen.clone() {
                    if claim(connection, &due)? {
                        claimed.push(due);
                    }
                }
                Ok(claimed)
            })
            .await
    }

    async fn record_attempt(&self, key: i64, result: AttemptResult) -> Result<()> {
        self.writer.write(move |connection| record_attempt(connection, key, &result)).await
    }

    async fn next_delivery(&self) -> Result<Option<Timestamp>> {
        let sql = "SELECT min(next_at) FROM webhook_deliveries
            JOIN webhooks ON webhooks.key = webhook_deliveries.webhook
            WHERE next_at IS NOT NULL AND disabled_at IS NULL";
        let read = |row: &Row<'_>| row.get::<_, Option<i64>>(0);
        let found = self.readers.read(move |connection| find(connection, sql, [], read)).await?;
        Ok(found.flatten().map(timestamp))
    }

    async fn webhook_counts(&self) -> Result<WebhookCounts> {
        self.readers.read(counts).await
    }

    async fn purge_deliveries(&self, ended_before: Timestamp, limit: usize) -> Result<bool> {
        self.writer
            .write(move |connection| {
                let sql = "DELETE FROM webhook_deliveries WHERE key IN (
                    SELECT key FROM webhook_deliveries
                    WHERE next_at IS NULL AND created_at < ?1
                    AND coalesce(last_at, created_at) < ?1 LIMIT ?2)";
                let row = params![ended_before.as_millis(), to_i64(limit as u64)];
                Ok(execute(connection, sql, row)? >= limit)
            })
            .await
    }
}
