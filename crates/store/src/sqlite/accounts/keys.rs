//! API keys. A row stays after its key is deleted, so that its past use keeps its owner.

use batchwright_domain::clock::Timestamp;
use batchwright_domain::ids::{KeyId, ProjectId, ServiceAccountId};
use rusqlite::types::Value;
use rusqlite::{Connection, Row, params};
use serde_json::json;

use super::super::query::{Listing, execute, find, list};
use super::super::{database_error, timestamp};
use super::{audit, projects, refused, service_accounts};
use crate::accounts::{
    Actor, KeyChanges, KeyHolder, KeyOwner, KeyRecord, ListQuery, NewKey, Refusal,
    ServiceAccountRecord,
};
use crate::{Paged, Result};

/// Tables of a key and its owner.
const TABLES: &str = "api_keys LEFT JOIN tenants ON tenants.key = api_keys.tenant \
    LEFT JOIN service_accounts ON service_accounts.key = api_keys.account";

/// Separator of names of scopes in their column.
const SCOPE_SEPARATOR: char = ' ';

/// Returns the columns that [`from_row`] reads.
fn columns() -> String {
    format!(
        "{}, service_accounts.id, service_accounts.name, service_accounts.is_member, \
         service_accounts.created_at, api_keys.id, api_keys.name, digest, redacted, scopes, \
         api_keys.created_at, expires_at, last_used_at",
        projects::COLUMNS
    )
}

fn from_row(row: &Row<'_>) -> rusqlite::Result<KeyRecord> {
    let owner = match row.get::<_, Option<String>>(5)? {
        None => None,
        Some(id) => Some(KeyOwner {
            project: projects::from_row(row)?,
            account: ServiceAccountRecord {
                id: id.into(),
                name: row.get(6)?,
                is_member: row.get(7)?,
                created_at: timestamp(row.get(8)?),
            },
        }),
    };
    let scopes: String = row.get(13)?;
    Ok(KeyRecord {
        id: row.get::<_, String>(9)?.into(),
        name: row.get(10)?,
        digest: row.get(11)?,
        redacted: row.get(12)?,
        scopes: scopes.split_terminator(SCOPE_SEPARATOR).map(str::to_owned).collect(),
        created_at: timestamp(row.get(14)?),
        expires_at: row.get::<_, Option<i64>>(15)?.map(timestamp),
        last_used_at: row.get::<_, Option<i64>>(16)?.map(timestamp),
        owner,
    })
}

/// Returns true if there is a key, or was one.
pub(super) fn any(connection: &Connection) -> Result<bool> {
    Ok(find(connection, "SELECT 1 FROM api_keys LIMIT 1", [], |_| Ok(()))?.is_some())
}

pub(super) fn get(connection: &Connection, id: &KeyId) -> Result<Option<KeyRecord>> {
    let columns = columns();
    let sql = format!(
        "SELECT {columns} FROM {TABLES} WHERE api_keys.id = ?1 AND api_keys.deleted_at IS NULL"
    );
    find(connection, &sql, [id.as_str()], from_row)
}

pub(super) fn get_of(
    connection: &Connection,
    holder: &KeyHolder,
    id: &KeyId,
) -> Result<Option<KeyRecord>> {
    let is_held = |key: &KeyRecord| match (holder, &key.owner) {
        (KeyHolder::Organization, None) => true,
        (KeyHolder::Project(project), Some(owner)) => owner.project.id == *project,
        _ => false,
    };
    Ok(get(connection, id)?.filter(is_held))
}

pub(super) fn page(
    connection: &Connection,
    holder: &KeyHolder,
    query: &ListQuery,
) -> Result<Paged<KeyRecord>> {
    let (condition, values) = match holder {
        KeyHolder::Organization => ("api_keys.tenant IS NULL", Vec::new()),
        KeyHolder::Project(project) => {
            ("api_keys.tenant = ?", vec![Value::from(projects::row_key(connection, project)?)])
        }
    };
    let listing = Listing {
        columns: &columns(),
        from: TABLES,
        ever: (condition.to_owned(), values),
        visible: ("api_keys.deleted_at IS NULL".to_owned(), Vec::new()),
        key: "api_keys.key",
        id: "api_keys.id",
    };
    list(connection, listing, &query.part(), from_row)
}

pub(super) fn create_for_project(
    connection: &Connection,
    project: &ProjectId,
    account: &ServiceAccountId,
    new: &NewKey,
    by: &Actor,
) -> Result<KeyRecord> {
    let tenant = projects::active_row_key(connection, project)?;
    let account = service_accounts::row_key(connection, tenant, account)?;
    insert(connection, Some((tenant, account)), new, by.at)?;
    let details = json!({"name": new.name, "scopes": new.scopes, "expires_at": seconds(new)});
    audit::record(connection, by, "api_key.created", Some(project), new.id.as_str(), &details)?;
    found(connection, &KeyHolder::Project(project.clone()), &new.id)
}

pub(super) fn create_for_admin(
    connection: &Connection,
    new: &NewKey,
    by: &Actor,
) -> Result<KeyRecord> {
    insert(connection, None, new, by.at)?;
    let details = json!({"name": new.name, "expires_at": seconds(new)});
    let event = "tenant.admin_api_key.created";
    audit::record(connection, by, event, None, new.id.as_str(), &details)?;
    found(connection, &KeyHolder::Organization, &new.id)
}

fn insert(
    connection: &Connection,
    owner: Option<(i64, i64)>,
    new: &NewKey,
    now: Timestamp,
) -> Result<()> {
    let sql = "INSERT INTO api_keys
        (tenant, account, id, name, digest, redacted, scopes, created_at, expires_at)
        VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)";
    let row = params![
        owner.map(|owner| owner.0),
        owner.map(|owner| owner.1),
        new.id.as_str(),
        new.name,
        new.digest,
        new.redacted,
        new.scopes.join(&SCOPE_SEPARATOR.to_string()),
        now.as_millis(),
        new.expires_at.map(Timestamp::as_millis),
    ];
    execute(connection, sql, row).map(drop)
}

pub(super) fn update(
    connection: &Connection,
    holder: &KeyHolder,
    id: &KeyId,
    changes: &KeyChanges,
    by: &Actor,
) -> Result<KeyRecord> {
    let key = found(connection, holder, id)?;
    if key.expires_at.is_some_and(|end| end <= by.at) {
        return refused(Refusal::ExpiredKey);
    }
    let scopes = changes.scopes.as_ref().map(|scopes| scopes.join(&SCOPE_SEPARATOR.to_string()));
    let sql = "UPDATE api_keys SET expires_at = coalesce(?2, expires_at),
        scopes = coalesce(?3, scopes) WHERE id = ?1";
    let row = params![id.as_str(), changes.expires_at.map(Timestamp::as_millis), scopes];
    execute(connection, sql, row)?;
    let details = json!({
        "scopes": changes.scopes,
        "expires_at": changes.expires_at.map(Timestamp::as_seconds),
    });
    audit::record(connection, by, "api_key.updated", project_of(holder), id.as_str(), &details)?;
    found(connection, holder, id)
}

pub(super) fn delete(
    connection: &Connection,
    holder: &KeyHolder,
    id: &KeyId,
    by: &Actor,
) -> Result<()> {
    let key = found(connection, holder, id)?;
    let now = by.at.as_millis();
    let is_admin = *holder == KeyHolder::Organization && key.scopes.is_empty();
    if is_admin && key.expires_at.is_none_or(|end| end > by.at) {
        let sql = "SELECT 1 FROM api_keys WHERE tenant IS NULL AND deleted_at IS NULL
            AND id <> ?1 AND scopes = '' AND (expires_at IS NULL OR expires_at > ?2)";
        if find(connection, sql, params![id.as_str(), now], |_| Ok(()))?.is_none() {
            return refused(Refusal::LastAdminKey);
        }
    }
    let sql = "UPDATE api_keys SET deleted_at = ?2 WHERE id = ?1";
    execute(connection, sql, params![id.as_str(), now])?;
    let event = match holder {
        KeyHolder::Project(_) => "api_key.deleted",
        KeyHolder::Organization => "tenant.admin_api_key.deleted",
    };
    audit::record(connection, by, event, project_of(holder), id.as_str(), &json!({}))
}

/// Deletes the keys of a service account, each with its entry of the audit log.
pub(super) fn delete_of_account(
    connection: &Connection,
    project: &ProjectId,
    account: i64,
    by: &Actor,
) -> Result<()> {
    let sql = "UPDATE api_keys SET deleted_at = ?2 WHERE account = ?1 AND deleted_at IS NULL
        RETURNING id";
    let mut statement = connection.prepare_cached(sql).map_err(database_error)?;
    let deleted = statement
        .query_map(params![account, by.at.as_millis()], |row| row.get::<_, String>(0))
        .and_then(Iterator::collect::<rusqlite::Result<Vec<_>>>)
        .map_err(database_error)?;
    for id in deleted {
        audit::record(connection, by, "api_key.deleted", Some(project), &id, &json!({}))?;
    }
    Ok(())
}

/// Records the last use of keys; an earlier use than the recorded one changes nothing.
pub(super) fn record_uses(connection: &Connection, uses: &[(KeyId, Timestamp)]) -> Result<()> {
    let sql = "UPDATE api_keys SET last_used_at = ?2
        WHERE id = ?1 AND (last_used_at IS NULL OR last_used_at < ?2)";
    for (id, at) in uses {
        execute(connection, sql, params![id.as_str(), at.as_millis()])?;
    }
    Ok(())
}

fn found(connection: &Connection, holder: &KeyHolder, id: &KeyId) -> Result<KeyRecord> {
    get_of(connection, holder, id)?.map_or_else(|| refused(Refusal::UnknownKey), Ok)
}

fn project_of(holder: &KeyHolder) -> Option<&ProjectId> {
    match holder {
        KeyHolder::Project(project) => Some(project),
        KeyHolder::Organization => None,
    }
}

fn seconds(new: &NewKey) -> Option<i64> {
    new.expires_at.map(Timestamp::as_seconds)
}
