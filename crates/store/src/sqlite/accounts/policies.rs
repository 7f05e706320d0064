//! Limits and models of projects.

use batchwright_domain::ids::{ProjectId, TenantId};
use batchwright_domain::limits::{Limits, ModelRule};
use rusqlite::{Connection, Row, params};
use serde_json::{Value, json};

use super::super::files::Addition;
use super::super::query::{execute, find};
use super::super::{files, open_batches, tenant_key, to_i64, to_u64};
use super::{audit, projects};
use crate::accounts::{Actor, LimitChanges, ProjectPolicy, ProjectUse, Refusal, StorageBounds};
use crate::{Result, StoreError};

/// Columns that [`from_row`] reads.
const COLUMNS: &str =
    "max_stored_bytes, max_stored_files, max_open_batches, max_requests_per_batch, models";

fn from_row(row: &Row<'_>) -> rusqlite::Result<(Limits, Option<String>)> {
    let number = |index| Ok::<_, rusqlite::Error>(row.get::<_, Option<i64>>(index)?.map(to_u64));
    let limits = Limits {
        max_stored_bytes: number(0)?,
        max_stored_files: number(1)?,
        max_open_batches: number(2)?,
        max_requests_per_batch: number(3)?,
    };
    Ok((limits, row.get(4)?))
}

/// Parses a stored rule. A damaged rule is an error: it must not allow more than it says.
fn models(text: &str) -> Result<ModelRule> {
    let damaged = || StoreError::Database(format!("the models of a project are damaged: {text}"));
    let value: Value = serde_json::from_str(text).map_err(|_| damaged())?;
    let mode = value.get("mode").and_then(Value::as_str).ok_or_else(damaged)?;
    let names = value.get("model_ids").and_then(Value::as_array).ok_or_else(damaged)?;
    let names = names.iter().map(|name| name.as_str().map(str::to_owned));
    ModelRule::from_parts(mode, names.collect::<Option<_>>().ok_or_else(damaged)?)
        .ok_or_else(damaged)
}

pub(super) fn of_tenant(connection: &Connection, tenant: &TenantId) -> Result<ProjectPolicy> {
    match tenant_key(connection, tenant.as_str())? {
        Some(key) => of_key(connection, key),
        None => Ok(ProjectPolicy::default()),
    }
}

fn of_key(connection: &Connection, key: i64) -> Result<ProjectPolicy> {
    let sql = format!("SELECT {COLUMNS} FROM tenants WHERE key = ?1");
    let found = find(connection, &sql, [key], from_row)?;
    let (limits, text) = found.unwrap_or_default();
    let models = text.as_deref().map(models).transpose()?.unwrap_or_default();
    Ok(ProjectPolicy { limits, models })
}

/// Returns the bytes that a tenant can still store, or none without a bound.
pub(super) fn storage_room(
    connection: &Connection,
    tenant: &TenantId,
    bounds: StorageBounds,
) -> Result<Option<u64>> {
    let Some(key) = tenant_key(connection, tenant.as_str())? else { return Ok(None) };
    files::check_bounds(connection, key, bounds, Addition { bytes: 1, files: 1 })?;
    let (stored, _) = files::stored(connection, key)?;
    Ok(bounds.bytes.map(|bytes| bytes.saturating_sub(stored)))
}

pub(super) fn of_project(
    connection: &Connection,
    id: &ProjectId,
) -> Result<Option<(ProjectPolicy, ProjectUse)>> {
    let key = match projects::row_key(connection, id) {
        Err(StoreError::Refused(Refusal::UnknownProject)) => return Ok(None),
        found => found?,
    };
    let (stored_bytes, stored_files) = files::stored(connection, key)?;
    let open_batches = open_batches::count(connection, key)?;
    let used = ProjectUse { stored_bytes, stored_files, open_batches };
    Ok(Some((of_key(connection, key)?, used)))
}

pub(super) fn update_limits(
    connection: &Connection,
    id: &ProjectId,
    changes: &LimitChanges,
    by: &Actor,
) -> Result<()> {
    let key = projects::active_row_key(connection, id)?;
    let mut details = serde_json::Map::new();
    for (column, change) in [
        ("max_stored_bytes", changes.max_stored_bytes),
        ("max_stored_files", changes.max_stored_files),
        ("max_open_batches", changes.max_open_batches),
        ("max_requests_per_batch", changes.max_requests_per_batch),
    ] {
        if let Some(value) = change {
            let sql = format!("UPDATE tenants SET {column} = ?2 WHERE key = ?1");
            execute(connection, &sql, params![key, value.map(to_i64)])?;
            details.insert(column.to_owned(), json!(value));
        }
    }
    if details.is_empty() {
        return Ok(());
    }
    let details = Value::Object(details);
    audit::record(connection, by, "project.limits.updated", Some(id), id.as_str(), &details)
}

pub(super) fn set_models(
    connection: &Connection,
    id: &ProjectId,
    models: &ModelRule,
    by: &Actor,
) -> Result<()> {
    let key = projects::active_row_key(connection, id)?;
    let (mode, names) = models.parts();
    let details = json!({"mode": mode, "model_ids": names});
    let sql = "UPDATE tenants SET models = ?2 WHERE key = ?1";
    execute(connection, sql, params![key, details.to_string()])?;
    let event = "project.model_permissions.updated";
    audit::record(connection, by, event, Some(id), id.as_str(), &details)
}
