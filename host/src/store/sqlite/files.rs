//! Files: what is known of them besides their bytes.

use rusqlite::{Connection, OptionalExtension, Row, params, params_from_iter, types::Value};

use super::super::{Claim, FileQuery, FileRecord, Order, Page, Paged, Result};
use super::{explain, loaded, stored, tenant_key, timestamp};
use crate::clock::Timestamp;

const COLUMNS: &str = "id, bytes, created_at, expires_at, filename, purpose";

/// A file that a client can see.
const LIVE: &str = "deleted_at IS NULL AND (expires_at IS NULL OR expires_at > ?)";

fn from_row(row: &Row) -> rusqlite::Result<FileRecord> {
    Ok(FileRecord {
        id: row.get(0)?,
        bytes: loaded(row.get(1)?),
        created_at: timestamp(row.get(2)?),
        expires_at: row.get::<_, Option<i64>>(3)?.map(timestamp),
        filename: row.get(4)?,
        purpose: row.get(5)?,
    })
}

/// Adds a file. One of the same id is replaced: finalizing may be repeated.
pub fn insert(connection: &Connection, tenant: i64, file: &FileRecord) -> Result<()> {
    let mut statement = connection
        .prepare_cached(
            "INSERT OR REPLACE INTO files (tenant, id, bytes, created_at, expires_at, filename, purpose)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        )
        .map_err(explain)?;
    object_recorded(connection, tenant, &file.id)?;
    let expires_at = file.expires_at.map(Timestamp::as_millis);
    let created_at = file.created_at.as_millis();
    statement
        .execute(params![
            tenant,
            file.id,
            stored(file.bytes),
            created_at,
            expires_at,
            file.filename,
            file.purpose
        ])
        .map_err(explain)?;
    Ok(())
}

pub fn get(
    connection: &Connection,
    tenant: &str,
    id: &str,
    now: Timestamp,
) -> Result<Option<FileRecord>> {
    let Some(tenant) = tenant_key(connection, tenant)? else { return Ok(None) };
    connection
        .prepare_cached(&format!(
            "SELECT {COLUMNS} FROM files WHERE tenant = ? AND id = ? AND {LIVE}"
        ))
        .and_then(|mut statement| {
            statement.query_row(params![tenant, id, now.as_millis()], from_row).optional()
        })
        .map_err(explain)
}

/// The input file of a batch, as it was when the batch was created.
pub fn input_of(connection: &Connection, claim: &Claim) -> Result<Option<FileRecord>> {
    let sql = "SELECT files.id, bytes, files.created_at, files.expires_at, filename, purpose
        FROM batches JOIN files ON files.tenant = batches.tenant AND files.key = batches.input_file
        WHERE batches.tenant = ?1 AND batches.key = ?2";
    connection
        .prepare_cached(sql)
        .and_then(|mut statement| {
            statement.query_row(params![claim.tenant_key, claim.batch_key], from_row).optional()
        })
        .map_err(explain)
}

pub fn list(connection: &Connection, tenant: &str, query: &FileQuery) -> Result<Paged<FileRecord>> {
    let Some(tenant) = tenant_key(connection, tenant)? else {
        return Ok(match query.after {
            Some(_) => Paged::UnknownAfter,
            None => Paged::Page(Page { items: Vec::new(), has_more: false }),
        });
    };
    let mut sql = format!("SELECT {COLUMNS} FROM files WHERE tenant = ? AND {LIVE}");
    let mut values = vec![Value::from(tenant), Value::from(query.now.as_millis())];
    if let Some(purpose) = &query.purpose {
        sql.push_str(" AND purpose = ?");
        values.push(Value::from(purpose.clone()));
    }
    let (compare, direction) = match query.order {
        Order::NewestFirst => ("<", "DESC"),
        Order::OldestFirst => (">", "ASC"),
    };
    if let Some(after) = &query.after {
        let found = connection
            .query_row(
                "SELECT key FROM files WHERE tenant = ?1 AND id = ?2",
                params![tenant, after],
                |row| row.get(0),
            )
            .optional()
            .map_err(explain)?;
        let Some(key) = found else { return Ok(Paged::UnknownAfter) };
        sql.push_str(&format!(" AND key {compare} ?"));
        values.push(Value::Integer(key));
    }
    sql.push_str(&format!(" ORDER BY key {direction} LIMIT ?"));
    values.push(Value::from(stored(query.limit as u64).saturating_add(1)));
    let mut statement = connection.prepare_cached(&sql).map_err(explain)?;
    let rows = statement.query_map(params_from_iter(values), from_row).map_err(explain)?;
    let mut items = rows.collect::<rusqlite::Result<Vec<_>>>().map_err(explain)?;
    let has_more = items.len() > query.limit;
    items.truncate(query.limit);
    Ok(Paged::Page(Page { items, has_more }))
}

/// The files that were recorded last and that clients can see, as tenant and id.
pub fn newest(
    connection: &Connection,
    now: Timestamp,
    limit: usize,
) -> Result<Vec<(String, String)>> {
    let sql = format!(
        "SELECT tenants.name, files.id FROM files JOIN tenants ON tenants.key = files.tenant
         WHERE {LIVE} ORDER BY files.key DESC LIMIT ?"
    );
    let mut statement = connection.prepare_cached(&sql).map_err(explain)?;
    let rows = statement
        .query_map(params![now.as_millis(), stored(limit as u64)], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })
        .map_err(explain)?;
    rows.collect::<rusqlite::Result<_>>().map_err(explain)
}

pub fn delete(connection: &Connection, tenant: &str, id: &str, now: Timestamp) -> Result<bool> {
    let Some(tenant) = tenant_key(connection, tenant)? else { return Ok(false) };
    let changed = connection
        .execute(
            "UPDATE files SET deleted_at = ?3 WHERE tenant = ?1 AND id = ?2 AND deleted_at IS NULL
             AND (expires_at IS NULL OR expires_at > ?3)",
            params![tenant, id, now.as_millis()],
        )
        .map_err(explain)?;
    Ok(changed == 1)
}

pub fn garbage(
    connection: &Connection,
    now: Timestamp,
    limit: usize,
) -> Result<Vec<(String, String)>> {
    let mut statement = connection
        .prepare_cached(
            "WITH gone (key) AS (
                 SELECT key FROM files WHERE deleted_at IS NOT NULL UNION SELECT key FROM files WHERE expires_at <= ?1
             )
             SELECT tenants.name, files.id FROM gone CROSS JOIN files USING (key) JOIN tenants ON tenants.key = files.tenant
             WHERE NOT files.removed AND NOT EXISTS (
                 SELECT 1 FROM batches WHERE batches.input_file = files.key
                 AND batches.status IN ('validating', 'in_progress', 'finalizing', 'cancelling')
             ) LIMIT ?2",
        )
        .map_err(explain)?;
    let rows = statement
        .query_map(params![now.as_millis(), stored(limit as u64)], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })
        .map_err(explain)?;
    rows.collect::<rusqlite::Result<_>>().map_err(explain)
}

pub fn begin_object(connection: &Connection, tenant: i64, id: &str, owner: &str) -> Result<()> {
    connection
        .prepare_cached(
            "INSERT OR REPLACE INTO pending_objects (tenant, id, owner) VALUES (?1, ?2, ?3)",
        )
        .and_then(|mut statement| statement.execute(params![tenant, id, owner]))
        .map_err(explain)?;
    Ok(())
}

/// From now on a record leads to the object, or it is gone.
pub fn object_recorded(connection: &Connection, tenant: i64, id: &str) -> Result<()> {
    connection
        .prepare_cached("DELETE FROM pending_objects WHERE tenant = ?1 AND id = ?2")
        .and_then(|mut statement| statement.execute(params![tenant, id]))
        .map_err(explain)?;
    Ok(())
}

pub fn is_pending(connection: &Connection, tenant: i64, id: &str) -> Result<bool> {
    connection
        .prepare_cached("SELECT 1 FROM pending_objects WHERE tenant = ?1 AND id = ?2")
        .and_then(|mut statement| statement.exists(params![tenant, id]))
        .map_err(explain)
}

pub fn abandoned_objects(
    connection: &Connection,
    owner: &str,
    limit: usize,
) -> Result<Vec<(String, String)>> {
    let mut statement = connection
        .prepare_cached(
            "SELECT tenants.name, id FROM pending_objects JOIN tenants ON tenants.key = tenant WHERE owner <> ?1 LIMIT ?2",
        )
        .map_err(explain)?;
    let rows = statement
        .query_map(params![owner, stored(limit as u64)], |row| Ok((row.get(0)?, row.get(1)?)))
        .map_err(explain)?;
    rows.collect::<rusqlite::Result<_>>().map_err(explain)
}

pub fn removed(connection: &Connection, tenant: &str, id: &str) -> Result<()> {
    let Some(tenant) = tenant_key(connection, tenant)? else { return Ok(()) };
    let sql = "UPDATE files SET removed = 1 WHERE tenant = ?1 AND id = ?2";
    connection.execute(sql, params![tenant, id]).map_err(explain)?;
    Ok(())
}

/// Removes the rows of some files that went before this; whether there may be more.
pub fn forget(connection: &Connection, gone_before: Timestamp, limit: usize) -> Result<bool> {
    let removed = connection
        .execute(
            "DELETE FROM files WHERE key IN (
                 SELECT key FROM files WHERE removed = 1 AND min(coalesce(deleted_at, expires_at), coalesce(expires_at, deleted_at)) < ?1
                 LIMIT ?2
             )",
            params![gone_before.as_millis(), stored(limit as u64)],
        )
        .map_err(explain)?;
    Ok(removed == limit)
}
