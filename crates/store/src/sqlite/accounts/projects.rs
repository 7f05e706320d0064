//! Projects.

use batchwright_domain::ids::{ProjectId, TenantId};
use rusqlite::{Connection, Row, params};
use serde_json::json;

use super::super::query::{Listing, execute, find, list};
use super::super::{open_batches, timestamp};
use super::{audit, refused};
use crate::accounts::{Actor, ListQuery, NewProject, ProjectRecord, Refusal};
use crate::{Paged, Result};

/// Columns that [`from_row`] reads, from the first on.
pub(super) const COLUMNS: &str = "tenants.project_id, tenants.name, tenants.title, \
    tenants.created_at, tenants.archived_at";

/// Maximum number of projects with the same slug but for the number at its end.
const MAX_SIMILAR_SLUGS: u64 = 100_000;

pub(super) fn from_row(row: &Row<'_>) -> rusqlite::Result<ProjectRecord> {
    Ok(ProjectRecord {
        id: row.get::<_, String>(0)?.into(),
        slug: row.get::<_, String>(1)?.into(),
        name: row.get(2)?,
        created_at: timestamp(row.get(3)?),
        archived_at: row.get::<_, Option<i64>>(4)?.map(timestamp),
    })
}

pub(super) fn get(connection: &Connection, id: &ProjectId) -> Result<Option<ProjectRecord>> {
    let sql = format!("SELECT {COLUMNS} FROM tenants WHERE project_id = ?1");
    find(connection, &sql, [id.as_str()], from_row)
}

/// Returns the row key of a project.
pub(super) fn row_key(connection: &Connection, id: &ProjectId) -> Result<i64> {
    match lookup(connection, "project_id", id.as_str())? {
        Some((key, _)) => Ok(key),
        None => refused(Refusal::UnknownProject),
    }
}

/// Returns the row key of a project in which something may be created.
pub(super) fn active_row_key(connection: &Connection, id: &ProjectId) -> Result<i64> {
    active(lookup(connection, "project_id", id.as_str())?)
}

/// Returns the row key of a tenant for something that is created; fails if the project is unknown
/// or archived.
pub(in super::super) fn creating_tenant(connection: &Connection, tenant: &TenantId) -> Result<i64> {
    active(lookup(connection, "name", tenant.as_str())?)
}

/// Returns the id of the project with a row key.
pub(in super::super) fn project_of_tenant(
    connection: &Connection,
    tenant: i64,
) -> Result<Option<ProjectId>> {
    let sql = "SELECT project_id FROM tenants WHERE key = ?1";
    let found = find(connection, sql, [tenant], |row| row.get::<_, Option<String>>(0))?;
    Ok(found.flatten().map(ProjectId::from))
}

/// Returns the row key of a project, and true if the project is archived.
fn lookup(connection: &Connection, column: &str, value: &str) -> Result<Option<(i64, bool)>> {
    let sql = format!("SELECT key, archived_at IS NOT NULL FROM tenants WHERE {column} = ?1");
    find(connection, &sql, [value], |row| Ok((row.get(0)?, row.get(1)?)))
}

fn active(found: Option<(i64, bool)>) -> Result<i64> {
    match found {
        Some((key, false)) => Ok(key),
        Some((_, true)) => refused(Refusal::Archived),
        None => refused(Refusal::UnknownProject),
    }
}

pub(super) fn page(
    connection: &Connection,
    query: &ListQuery,
    archived: bool,
) -> Result<Paged<ProjectRecord>> {
    let visible = if archived { "TRUE" } else { "archived_at IS NULL" };
    let listing = Listing {
        columns: COLUMNS,
        from: "tenants",
        ever: ("TRUE".to_owned(), Vec::new()),
        visible: (visible.to_owned(), Vec::new()),
        key: "tenants.key",
        id: "project_id",
    };
    list(connection, listing, &query.part(), from_row)
}

pub(super) fn create(
    connection: &Connection,
    new: &NewProject,
    by: &Actor,
) -> Result<ProjectRecord> {
    check_name(connection, &new.name, None)?;
    let slug = free_slug(connection, &new.slug)?;
    let sql = "INSERT INTO tenants (project_id, name, title, created_at) VALUES (?1, ?2, ?3, ?4)";
    let row = params![new.id.as_str(), slug, new.name, by.at.as_millis()];
    execute(connection, sql, row)?;
    let details = json!({"name": new.name, "title": new.name, "slug": slug});
    audit::record(connection, by, "project.created", Some(&new.id), new.id.as_str(), &details)?;
    found(connection, &new.id)
}

pub(super) fn rename(
    connection: &Connection,
    id: &ProjectId,
    name: &str,
    by: &Actor,
) -> Result<ProjectRecord> {
    active_row_key(connection, id)?;
    check_name(connection, name, Some(id))?;
    let sql = "UPDATE tenants SET title = ?2 WHERE project_id = ?1";
    execute(connection, sql, params![id.as_str(), name])?;
    let details = json!({"title": name});
    audit::record(connection, by, "project.updated", Some(id), id.as_str(), &details)?;
    found(connection, id)
}

/// Archives a project and cancels its batches; does nothing if the project is archived already.
pub(super) fn archive(
    connection: &Connection,
    id: &ProjectId,
    by: &Actor,
) -> Result<ProjectRecord> {
    let key = row_key(connection, id)?;
    let sql = "UPDATE tenants SET archived_at = ?2 WHERE key = ?1 AND archived_at IS NULL";
    if execute(connection, sql, params![key, by.at.as_millis()])? > 0 {
        let cancelled = open_batches::cancel_all(connection, key, by.at)?;
        let details = json!({"cancelled_batches": cancelled});
        audit::record(connection, by, "project.archived", Some(id), id.as_str(), &details)?;
    }
    found(connection, id)
}

fn found(connection: &Connection, id: &ProjectId) -> Result<ProjectRecord> {
    get(connection, id)?.map_or_else(|| refused(Refusal::UnknownProject), Ok)
}

/// Refuses the name of another project that is not archived.
fn check_name(connection: &Connection, name: &str, own: Option<&ProjectId>) -> Result<()> {
    let sql = "SELECT project_id FROM tenants
        WHERE title = ?1 COLLATE NOCASE AND archived_at IS NULL";
    let taken: Option<String> = find(connection, sql, [name], |row| row.get(0))?;
    match taken {
        Some(taken) if own.is_none_or(|own| own.as_str() != taken) => refused(Refusal::NameTaken),
        _ => Ok(()),
    }
}

/// Returns the wanted slug, or the slug with a number if it was ever used.
fn free_slug(connection: &Connection, wanted: &TenantId) -> Result<String> {
    let is_used = |slug: &str| -> Result<bool> {
        let sql = "SELECT 1 FROM tenants WHERE name = ?1";
        Ok(find(connection, sql, [slug], |_| Ok(()))?.is_some())
    };
    if !is_used(wanted.as_str())? {
        return Ok(wanted.to_string());
    }
    // Numbers are given out in order, so the number of similar slugs is a good first guess.
    let similar = "SELECT count(*) FROM tenants WHERE name LIKE ?1";
    let pattern = format!("{wanted}-%");
    let first: i64 = find(connection, similar, [pattern], |row| row.get(0))?.unwrap_or(0);
    let first = u64::try_from(first).unwrap_or(0).saturating_add(2);
    for number in (first..=MAX_SIMILAR_SLUGS).chain(2..first.min(MAX_SIMILAR_SLUGS)) {
        let slug = format!("{wanted}-{number}");
        if !is_used(&slug)? {
            return Ok(slug);
        }
    }
    refused(Refusal::NameTaken)
}
