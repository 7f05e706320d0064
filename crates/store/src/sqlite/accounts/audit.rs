//! Audit log.

use batchwright_domain::clock::Timestamp;
use batchwright_domain::ids::ProjectId;
use rusqlite::types::Value;
use rusqlite::{Connection, Row, params};
use serde_json::Value as Json;
use uuid::Uuid;

use super::super::query::{Listing, Part, execute, list};
use super::super::timestamp;
use crate::accounts::{Actor, AuditEntry, AuditQuery};
use crate::{Order, Paged, Result};

/// Writes an entry about a change, in the transaction of the change.
pub(in super::super) fn record(
    connection: &Connection,
    by: &Actor,
    event: &str,
    project: Option<&ProjectId>,
    resource: &str,
    details: &Json,
) -> Result<()> {
    let sql = "INSERT INTO audit (id, at, event, actor, address, project, resource, details)
        VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)";
    let row = params![
        format!("audit_log-{}", Uuid::new_v4().simple()),
        by.at.as_millis(),
        event,
        by.key.as_ref().map(|key| key.as_str()),
        by.address,
        project.map(ProjectId::as_str),
        resource,
        details.to_string(),
    ];
    execute(connection, sql, row).map(drop)
}

fn from_row(row: &Row<'_>) -> rusqlite::Result<AuditEntry> {
    let project = row.get::<_, Option<String>>(5)?;
    let name = row.get::<_, Option<String>>(6)?.unwrap_or_default();
    Ok(AuditEntry {
        id: row.get(0)?,
        at: timestamp(row.get(1)?),
        event: row.get(2)?,
        key: row.get::<_, Option<String>>(3)?.map(Into::into),
        address: row.get(4)?,
        project: project.map(|id| (id.into(), name)),
        resource: row.get(7)?,
        details: row.get(8)?,
    })
}

/// Removes entries from before a time; returns true if more may remain.
pub(super) fn purge(connection: &Connection, before: Timestamp, limit: usize) -> Result<bool> {
    // Keys are in the order of time, so that the first ones tell whether there is more.
    let sql = "DELETE FROM audit WHERE key IN (
        SELECT key FROM (SELECT key, at FROM audit ORDER BY key LIMIT ?2) WHERE at < ?1)";
    let limit_rows = i64::try_from(limit).unwrap_or(i64::MAX);
    Ok(execute(connection, sql, params![before.as_millis(), limit_rows])? >= limit)
}

pub(super) fn page(connection: &Connection, query: &AuditQuery) -> Result<Paged<AuditEntry>> {
    let (mut condition, mut values) = ("TRUE".to_owned(), Vec::new());
    for (column, wanted) in [
        ("audit.event", &query.events),
        ("audit.project", &query.projects),
        ("audit.actor", &query.actors),
        ("audit.resource", &query.resources),
    ] {
        if !wanted.is_empty() {
            let marks = vec!["?"; wanted.len()].join(", ");
            condition.push_str(&format!(" AND {column} IN ({marks})"));
            values.extend(wanted.iter().cloned().map(Value::from));
        }
    }
    for (compare, time) in [(">=", query.from), ("<", query.before)] {
        if let Some(time) = time {
            condition.push_str(&format!(" AND audit.at {compare} ?"));
            values.push(Value::from(Timestamp::as_millis(time)));
        }
    }
    let listing = Listing {
        columns: "audit.id, audit.at, event, actor, address, audit.project, tenants.title, \
                  resource, details",
        from: "audit LEFT JOIN tenants ON tenants.project_id = audit.project",
        ever: (condition, values),
        visible: ("TRUE".to_owned(), Vec::new()),
        key: "audit.key",
        id: "audit.id",
    };
    let (after, limit) = (query.after.as_deref(), query.limit);
    list(connection, listing, &Part { after, limit, order: Order::NewestFirst }, from_row)
}
