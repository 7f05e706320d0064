//! Service accounts.

use batchwright_domain::ids::{ProjectId, ServiceAccountId};
use rusqlite::{Connection, Row, params};
use serde_json::json;

use super::super::query::{Listing, execute, find, list};
use super::super::timestamp;
use super::{audit, keys, projects, refused};
use crate::accounts::{Actor, ListQuery, NewServiceAccount, Refusal, ServiceAccountRecord};
use crate::{Paged, Result};

/// Columns that [`from_row`] reads.
const COLUMNS: &str = "service_accounts.id, service_accounts.name, service_accounts.is_member, \
    service_accounts.created_at";

fn from_row(row: &Row<'_>) -> rusqlite::Result<ServiceAccountRecord> {
    Ok(ServiceAccountRecord {
        id: row.get::<_, String>(0)?.into(),
        name: row.get(1)?,
        is_member: row.get(2)?,
        created_at: timestamp(row.get(3)?),
    })
}

pub(super) fn get(
    connection: &Connection,
    project: &ProjectId,
    id: &ServiceAccountId,
) -> Result<Option<ServiceAccountRecord>> {
    let sql = format!(
        "SELECT {COLUMNS} FROM service_accounts
         JOIN tenants ON tenants.key = service_accounts.tenant
         WHERE tenants.project_id = ?1 AND service_accounts.id = ?2 AND deleted_at IS NULL"
    );
    find(connection, &sql, [project.as_str(), id.as_str()], from_row)
}

pub(super) fn row_key(connection: &Connection, tenant: i64, id: &ServiceAccountId) -> Result<i64> {
    let sql = "SELECT key FROM service_accounts
        WHERE tenant = ?1 AND id = ?2 AND deleted_at IS NULL";
    match find(connection, sql, params![tenant, id.as_str()], |row| row.get(0))? {
        Some(key) => Ok(key),
        None => refused(Refusal::UnknownAccount),
    }
}

pub(super) fn page(
    connection: &Connection,
    project: &ProjectId,
    query: &ListQuery,
) -> Result<Paged<ServiceAccountRecord>> {
    let tenant = projects::row_key(connection, project)?;
    let listing = Listing {
        columns: COLUMNS,
        from: "service_accounts",
        ever: ("tenant = ?".to_owned(), vec![tenant.into()]),
        visible: ("deleted_at IS NULL".to_owned(), Vec::new()),
        key: "service_accounts.key",
        id: "service_accounts.id",
    };
    list(connection, listing, &query.part(), from_row)
}

pub(super) fn create(
    connection: &Connection,
    project: &ProjectId,
    new: &NewServiceAccount,
    by: &Actor,
) -> Result<ServiceAccountRecord> {
    let tenant = projects::active_row_key(connection, project)?;
    let sql = "INSERT INTO service_accounts (tenant, id, name, is_member, created_at)
        VALUES (?1, ?2, ?3, ?4, ?5)";
    let row = params![tenant, new.id.as_str(), new.name, new.is_member, by.at.as_millis()];
    execute(connection, sql, row)?;
    let details = json!({"name": new.name, "role": if new.is_member { "member" } else { "none" }});
    let event = "service_account.created";
    audit::record(connection, by, event, Some(project), new.id.as_str(), &details)?;
    found(connection, project, &new.id)
}

pub(super) fn rename(
    connection: &Connection,
    project: &ProjectId,
    id: &ServiceAccountId,
    name: &str,
    by: &Actor,
) -> Result<ServiceAccountRecord> {
    let tenant = projects::active_row_key(connection, project)?;
    let key = row_key(connection, tenant, id)?;
    let sql = "UPDATE service_accounts SET name = ?2 WHERE key = ?1";
    execute(connection, sql, params![key, name])?;
    let event = "service_account.updated";
    audit::record(connection, by, event, Some(project), id.as_str(), &json!({"name": name}))?;
    found(connection, project, id)
}

pub(super) fn delete(
    connection: &Connection,
    project: &ProjectId,
    id: &ServiceAccountId,
    by: &Actor,
) -> Result<()> {
    let tenant = projects::row_key(connection, project)?;
    let key = row_key(connection, tenant, id)?;
    let now = by.at.as_millis();
    let sql = "UPDATE service_accounts SET deleted_at = ?2 WHERE key = ?1";
    execute(connection, sql, params![key, now])?;
    keys::delete_of_account(connection, project, key, by)?;
    let event = "service_account.deleted";
    audit::record(connection, by, event, Some(project), id.as_str(), &json!({}))
}

fn found(
    connection: &Connection,
    project: &ProjectId,
    id: &ServiceAccountId,
) -> Result<ServiceAccountRecord> {
    get(connection, project, id)?.map_or_else(|| refused(Refusal::UnknownAccount), Ok)
}
