//! Limits, models and budgets of projects.

use std::collections::{BTreeMap, BTreeSet};

use batchwright_domain::ids::{ProjectId, TenantId};
use batchwright_domain::limits::{
    Allowed, Limit, Limits, MAX_RULE_MODELS, ModelLimit, ModelLimits, ModelRule, Permissions,
};
use rusqlite::{Connection, Row, params};
use serde_json::{Value, json};

use super::super::files::Addition;
use super::super::query::{execute, find};
use super::super::{database_error, enqueued, files, open_batches, tenant_key, to_i64, to_u64};
use super::{audit, projects};
use crate::accounts::{
    Actor, LimitChanges, ModelLimitChanges, ProjectPolicy, ProjectUse, Refusal, StorageBounds,
};
use crate::{Result, StoreError};

/// Stored policy: limits, the rule for models, the lists of allowed names, and the budget.
type Stored = (Limits, Option<String>, [Option<String>; Allowed::ALL.len()], Option<u64>);

fn from_row(row: &Row<'_>) -> rusqlite::Result<Stored> {
    let number =
        |column: &str| Ok::<_, rusqlite::Error>(row.get::<_, Option<i64>>(column)?.map(to_u64));
    let mut limits = Limits::default();
    for limit in Limit::ALL {
        limits = limits.with(limit, number(limit.name())?);
    }
    let mut lists = <[Option<String>; Allowed::ALL.len()]>::default();
    for (kind, list) in Allowed::ALL.into_iter().zip(&mut lists) {
        *list = row.get(kind.name())?;
    }
    Ok((limits, row.get("models")?, lists, number("spend_limit")?))
}

/// Parses a stored list of names. A damaged list is an error: it must not allow more than it says.
fn names(text: &str) -> Result<BTreeSet<String>> {
    serde_json::from_str(text).map_err(|_| {
        StoreError::Database(format!("a list of what a project may use is damaged: {text}"))
    })
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
    let (limits, lists) = (Limit::ALL.map(Limit::name), Allowed::ALL.map(Allowed::name));
    let columns = [limits.as_slice(), &lists].concat().join(", ");
    let sql = format!("SELECT {columns}, models, spend_limit FROM tenants WHERE key = ?1");
    let found = find(connection, &sql, [key], from_row)?.unwrap_or_default();
    let (limits, text, lists, spend_limit) = found;
    let models = text.as_deref().map(models).transpose()?.unwrap_or_default();
    let mut permissions = Permissions::from(models);
    for (kind, list) in Allowed::ALL.into_iter().zip(lists) {
        permissions = permissions.with(kind, list.as_deref().map(names).transpose()?);
    }
    let model_limits = model_limits(connection, key)?;
    Ok(ProjectPolicy { limits, permissions, model_limits, spend_limit })
}

/// Returns the limits of a project for models.
fn model_limits(connection: &Connection, key: i64) -> Result<BTreeMap<String, ModelLimits>> {
    let names = ModelLimit::ALL.map(ModelLimit::name).join(", ");
    let sql = format!("SELECT model, {names} FROM model_limits WHERE tenant = ?1");
    let mut statement = connection.prepare_cached(&sql).map_err(database_error)?;
    let rows = statement
        .query_map([key], |row| {
            let mut limits = ModelLimits::default();
            for limit in ModelLimit::ALL {
                limits.set(limit, row.get::<_, Option<i64>>(limit.name())?.map(to_u64));
            }
            Ok((row.get(0)?, limits))
        })
        .map_err(database_error)?;
    rows.collect::<rusqlite::Result<_>>().map_err(database_error)
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
    for (limit, value) in &changes.limits {
        let sql = format!("UPDATE tenants SET {} = ?2 WHERE key = ?1", limit.name());
        execute(connection, &sql, params![key, value.map(to_i64)])?;
        details.insert(limit.name().to_owned(), json!(value));
    }
    for (kind, names) in &changes.allowed {
        let sql = format!("UPDATE tenants SET {} = ?2 WHERE key = ?1", kind.name());
        let list = names.as_ref().map(|names| json!(names).to_string());
        execute(connection, &sql, params![key, list])?;
        details.insert(kind.name().to_owned(), json!(names));
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

pub(super) fn update_model_limits(
    connection: &Connection,
    id: &ProjectId,
    model: &str,
    changes: &ModelLimitChanges,
    by: &Actor,
) -> Result<ModelLimits> {
    let key = projects::active_row_key(connection, id)?;
    let insert = "INSERT INTO model_limits (tenant, model) VALUES (?1, ?2) ON CONFLICT DO NOTHING";
    execute(connection, insert, params![key, model])?;
    let mut details = serde_json::Map::from_iter([("model".to_owned(), json!(model))]);
    for (limit, value) in changes {
        let name = limit.name();
        let sql = format!("UPDATE model_limits SET {name} = ?3 WHERE tenant = ?1 AND model = ?2");
        execute(connection, &sql, params![key, model, value.map(to_i64)])?;
        details.insert(name.to_owned(), json!(value));
    }
    let is_unlimited = ModelLimit::ALL.map(|limit| format!("{} IS NULL", limit.name()));
    let delete = format!(
        "DELETE FROM model_limits WHERE tenant = ?1 AND model = ?2 AND {}",
        is_unlimited.join(" AND ")
    );
    execute(connection, &delete, params![key, model])?;
    let mut all = model_limits(connection, key)?;
    // The refusal undoes the change.
    if all.len() > MAX_RULE_MODELS {
        return Err(StoreError::Refused(Refusal::ModelLimits(MAX_RULE_MODELS)));
    }
    enqueued::wake(connection, key, by.at)?;
    let details = Value::Object(details);
    let resource = format!("rl-{model}");
    audit::record(connection, by, "rate_limit.updated", Some(id), &resource, &details)?;
    Ok(all.remove(model).unwrap_or_default())
}

pub(super) fn set_spend_limit(
    connection: &Connection,
    id: &ProjectId,
    cents: Option<u64>,
    by: &Actor,
) -> Result<Option<u64>> {
    let key = projects::active_row_key(connection, id)?;
    let before = of_key(connection, key)?.spend_limit;
    if before == cents {
        return Ok(before);
    }
    let sql = "UPDATE tenants SET spend_limit = ?2 WHERE key = ?1";
    execute(connection, sql, params![key, cents.map(to_i64)])?;
    let (event, details) = match cents {
        Some(cents) => ("project.spend_limit.updated", json!({"threshold_amount": cents})),
        None => ("project.spend_limit.deleted", json!({})),
    };
    audit::record(connection, by, event, Some(id), id.as_str(), &details)?;
    Ok(before)
}
