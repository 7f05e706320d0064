//! Secrets that projects have set for plugins, sealed.

use batchwright_domain::ids::{ProjectId, TenantId};
use rusqlite::{Connection, Row, params};
use serde_json::json;

use super::super::query::{execute, find};
use super::super::{database_error, tenant_key, timestamp};
use super::{audit, creating_tenant};
use crate::accounts::{Actor, MAX_SECRETS, Refusal, SecretRecord};
use crate::{Result, StoreError};

fn from_row(row: &Row<'_>) -> rusqlite::Result<SecretRecord> {
    Ok(SecretRecord {
        plugin: row.get(0)?,
        name: row.get(1)?,
        sealed: row.get(2)?,
        created_at: timestamp(row.get(3)?),
        updated_at: timestamp(row.get(4)?),
    })
}

/// Writes an entry of the audit log about a secret, without the secret.
fn record(
    connection: &Connection,
    key: i64,
    (plugin, name): (&str, &str),
    event: &str,
    by: &Actor,
) -> Result<()> {
    let sql = "SELECT project_id FROM tenants WHERE key = ?1";
    let id = find(connection, sql, [key], |row| row.get::<_, String>(0))?;
    let id = id.map(ProjectId::from);
    let details = json!({"plugin": plugin, "name": name});
    audit::record(connection, by, event, id.as_ref(), &format!("{plugin}/{name}"), &details)
}

pub(super) fn set(
    connection: &Connection,
    tenant: &TenantId,
    (plugin, name): (&str, &str),
    sealed: &[u8],
    by: &Actor,
) -> Result<SecretRecord> {
    let key = creating_tenant(connection, tenant)?;
    let sql = "INSERT INTO project_secrets (tenant, plugin, name, sealed, created_at, updated_at)
        VALUES (?1, ?2, ?3, ?4, ?5, ?5)
        ON CONFLICT DO UPDATE SET sealed = excluded.sealed, updated_at = excluded.updated_at
        RETURNING plugin, name, sealed, created_at, updated_at";
    let values = params![key, plugin, name, sealed, by.at.as_millis()];
    let written = find(connection, sql, values, from_row)?;
    let count = "SELECT count(*) FROM project_secrets WHERE tenant = ?1";
    let count: i64 = find(connection, count, [key], |row| row.get(0))?.unwrap_or(0);
    // The refusal undoes the change.
    if usize::try_from(count).unwrap_or(usize::MAX) > MAX_SECRETS {
        return Err(StoreError::Refused(Refusal::Secrets(MAX_SECRETS)));
    }
    record(connection, key, (plugin, name), "credential.updated", by)?;
    written.ok_or_else(|| StoreError::Database("a secret was not written".into()))
}

pub(super) fn delete(
    connection: &Connection,
    tenant: &TenantId,
    (plugin, name): (&str, &str),
    by: &Actor,
) -> Result<bool> {
    let Some(key) = tenant_key(connection, tenant.as_str())? else { return Ok(false) };
    let sql = "DELETE FROM project_secrets WHERE tenant = ?1 AND plugin = ?2 AND name = ?3";
    if execute(connection, sql, params![key, plugin, name])? == 0 {
        return Ok(false);
    }
    record(connection, key, (plugin, name), "credential.deleted", by)?;
    Ok(true)
}

pub(super) fn list(
    connection: &Connection,
    tenant: &TenantId,
    plugin: Option<&str>,
) -> Result<Vec<SecretRecord>> {
    let Some(key) = tenant_key(connection, tenant.as_str())? else { return Ok(Vec::new()) };
    let sql = "SELECT plugin, name, sealed, created_at, updated_at FROM project_secrets
        WHERE tenant = ?1 AND (?2 IS NULL OR plugin = ?2) ORDER BY plugin, name";
    let mut statement = connection.prepare_cached(sql).map_err(database_error)?;
    let rows = statement.query_map(params![key, plugin], from_row).map_err(database_error)?;
    rows.collect::<rusqlite::Result<_>>().map_err(database_error)
}
