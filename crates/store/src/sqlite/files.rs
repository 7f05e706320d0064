//! Records of files and registrations of objects.

use std::time::Duration;

use batchwright_domain::clock::Timestamp;
use batchwright_domain::ids::{FileId, ObjectKey};
use rusqlite::{Connection, OptionalExtension, Row, params, types::Value};

use super::super::accounts::{Refusal, StorageBounds};
use super::super::{Claim, FileQuery, FileRecord, Page, Paged, Result, StoreError};
use super::keys::BatchRow;
use super::query::{self, Listing, Part};
use super::{database_error, tenant_key, timestamp, to_i64, to_u64};

/// Columns that `from_row` reads, in order.
const COLUMNS: &str = "id, bytes, created_at, expires_at, filename, purpose";

/// Condition for a file that clients can see; its parameter is the current time.
const LIVE: &str = "deleted_at IS NULL AND (expires_at IS NULL OR expires_at > ?)";

/// Time for which a registration of this owner outlives its lease.
const OWN_REGISTRATION_GRACE: Duration = Duration::from_secs(86_400);

/// Reads the name of a tenant and the id of a file.
fn object_key(row: &Row) -> rusqlite::Result<ObjectKey> {
    Ok(ObjectKey { tenant: row.get::<_, String>(0)?.into(), file: row.get::<_, String>(1)?.into() })
}

fn from_row(row: &Row) -> rusqlite::Result<FileRecord> {
    Ok(FileRecord {
        id: row.get::<_, String>(0)?.into(),
        bytes: to_u64(row.get(1)?),
        created_at: timestamp(row.get(2)?),
        expires_at: row.get::<_, Option<i64>>(3)?.map(timestamp),
        filename: row.get(4)?,
        purpose: row.get(5)?,
    })
}

/// Inserts a file and removes the registration of its object, or fails with `Unregistered` if the
/// registration is gone.
///
/// Replaces a file of the same id, because finalizing may be repeated.
pub(super) fn insert(connection: &Connection, tenant: i64, file: &FileRecord) -> Result<()> {
    let mut statement = connection
        .prepare_cached(
            "INSERT OR REPLACE INTO files
             (tenant, id, bytes, created_at, expires_at, filename, purpose)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        )
        .map_err(database_error)?;
    let unregistered = connection
        .prepare_cached(
            "DELETE FROM pending_objects WHERE tenant = ?1 AND id = ?2 AND NOT removing",
        )
        .and_then(|mut delete| delete.execute(params![tenant, file.id.as_str()]))
        .map_err(database_error)?;
    if unregistered == 0 {
        return Err(StoreError::Unregistered);
    }
    let expires_at = file.expires_at.map(Timestamp::as_millis);
    let created_at = file.created_at.as_millis();
    statement
        .execute(params![
            tenant,
            file.id.as_str(),
            to_i64(file.bytes),
            created_at,
            expires_at,
            file.filename,
            file.purpose
        ])
        .map_err(database_error)?;
    Ok(())
}

/// What a tenant is about to store in addition.
#[derive(Default)]
pub(super) struct Addition {
    pub bytes: u64,
    pub files: u64,
}

/// Refuses an addition with which the tenant would exceed the bounds. Triggers of the schema count
/// what is stored.
pub(super) fn check_bounds(
    connection: &Connection,
    tenant: i64,
    bounds: StorageBounds,
    addition: Addition,
) -> Result<()> {
    let (bytes, files) = stored(connection, tenant)?;
    let exceeds = |bound: Option<u64>, stored: u64, more: u64| {
        bound.filter(|max| stored.saturating_add(more) > *max)
    };
    if let Some(max) = exceeds(bounds.bytes, bytes, addition.bytes) {
        return Err(StoreError::Refused(Refusal::StoredBytes(max)));
    }
    match exceeds(bounds.files, files, addition.files) {
        Some(max) => Err(StoreError::Refused(Refusal::StoredFiles(max))),
        None => Ok(()),
    }
}

/// Returns the total size and the number of the stored files of a tenant.
pub(super) fn stored(connection: &Connection, tenant: i64) -> Result<(u64, u64)> {
    let sql = "SELECT stored_bytes, stored_files FROM tenants WHERE key = ?1";
    connection
        .prepare_cached(sql)
        .and_then(|mut statement| {
            statement.query_row([tenant], |row| Ok((to_u64(row.get(0)?), to_u64(row.get(1)?))))
        })
        .map_err(database_error)
}

/// Returns a file that clients can see.
pub(super) fn get(
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
        .map_err(database_error)
}

/// Returns the input file of a batch, as it was when the batch was created.
pub(super) fn input_of(connection: &Connection, claim: &Claim) -> Result<Option<FileRecord>> {
    let held = BatchRow::of(&claim.key);
    let sql = "SELECT files.id, bytes, files.created_at, files.expires_at, filename, purpose
        FROM batches JOIN files ON files.tenant = batches.tenant AND files.key = batches.input_file
        WHERE batches.tenant = ?1 AND batches.key = ?2";
    connection
        .prepare_cached(sql)
        .and_then(|mut statement| {
            statement.query_row(params![held.tenant, held.batch], from_row).optional()
        })
        .map_err(database_error)
}

/// Lists the files of a tenant that clients can see.
pub(super) fn list(
    connection: &Connection,
    tenant: &str,
    query: &FileQuery,
) -> Result<Paged<FileRecord>> {
    let Some(tenant) = tenant_key(connection, tenant)? else {
        return Ok(match query.after {
            Some(_) => Paged::UnknownAfter,
            None => Paged::Page(Page { items: Vec::new(), has_more: false }),
        });
    };
    let mut visible = (LIVE.to_owned(), vec![Value::from(query.now.as_millis())]);
    if let Some(purpose) = &query.purpose {
        visible.0.push_str(" AND purpose = ?");
        visible.1.push(Value::from(purpose.clone()));
    }
    let listing = Listing {
        columns: COLUMNS,
        from: "files",
        ever: ("tenant = ?".to_owned(), vec![Value::from(tenant)]),
        visible,
        key: "key",
        id: "id",
    };
    let after = query.after.as_ref().map(FileId::as_str);
    let part = Part { after, limit: query.limit, order: query.order };
    query::list(connection, listing, &part, from_row)
}

/// Returns the newest files that clients can see.
pub(super) fn newest(
    connection: &Connection,
    now: Timestamp,
    limit: usize,
) -> Result<Vec<ObjectKey>> {
    let sql = format!(
        "SELECT tenants.name, files.id FROM files JOIN tenants ON tenants.key = files.tenant
         WHERE {LIVE} ORDER BY files.key DESC LIMIT ?"
    );
    let mut statement = connection.prepare_cached(&sql).map_err(database_error)?;
    let rows = statement
        .query_map(params![now.as_millis(), to_i64(limit as u64)], object_key)
        .map_err(database_error)?;
    rows.collect::<rusqlite::Result<_>>().map_err(database_error)
}

/// Marks a file as deleted; returns false if there is no such file.
pub(super) fn delete(
    connection: &Connection,
    tenant: &str,
    id: &str,
    now: Timestamp,
) -> Result<bool> {
    let Some(tenant) = tenant_key(connection, tenant)? else { return Ok(false) };
    let changed = connection
        .execute(
            "UPDATE files SET deleted_at = ?3 WHERE tenant = ?1 AND id = ?2 AND deleted_at IS NULL
             AND (expires_at IS NULL OR expires_at > ?3)",
            params![tenant, id, now.as_millis()],
        )
        .map_err(database_error)?;
    Ok(changed == 1)
}

/// Condition on `files`: a running batch reads the file.
pub(super) const IN_USE: &str = "EXISTS (
    SELECT 1 FROM batches AS readers WHERE readers.input_file = files.key
    AND readers.status IN ('validating', 'in_progress', 'finalizing', 'cancelling'))";

/// Returns deleted and expired files that no running batch reads.
pub(super) fn removable(
    connection: &Connection,
    now: Timestamp,
    limit: usize,
) -> Result<Vec<ObjectKey>> {
    let sql = format!(
        "WITH gone (key) AS (
             SELECT key FROM files WHERE deleted_at IS NOT NULL
             UNION SELECT key FROM files WHERE expires_at <= ?1
         )
         SELECT tenants.name, files.id FROM gone CROSS JOIN files USING (key)
         JOIN tenants ON tenants.key = files.tenant
         WHERE NOT files.removed AND NOT {IN_USE} LIMIT ?2"
    );
    let mut statement = connection.prepare_cached(&sql).map_err(database_error)?;
    let rows = statement
        .query_map(params![now.as_millis(), to_i64(limit as u64)], object_key)
        .map_err(database_error)?;
    rows.collect::<rusqlite::Result<_>>().map_err(database_error)
}

/// Registers an object before its bytes are written.
pub(super) fn register_object(
    connection: &Connection,
    (tenant, id, owner): (i64, &str, &str),
    now: Timestamp,
    until: Timestamp,
) -> Result<()> {
    let registered = connection
        .prepare_cached(
            "INSERT INTO pending_objects (tenant, id, owner, lease_until) VALUES (?1, ?2, ?3, ?5)
             ON CONFLICT (tenant, id) DO UPDATE
             SET owner = ?3, lease_until = ?5, removing = 0
             WHERE NOT removing
             OR lease_until <= CASE pending_objects.owner WHEN ?3 THEN ?6 ELSE ?4 END",
        )
        .and_then(|mut statement| {
            let own_before = now.before(OWN_REGISTRATION_GRACE).as_millis();
            let (now, until) = (now.as_millis(), until.as_millis());
            statement.execute(params![tenant, id, owner, now, until, own_before])
        })
        .map_err(database_error)?;
    if registered == 0 { Err(StoreError::Unregistered) } else { Ok(()) }
}

/// Extends a registration, or ends it with `until` 0; returns false if it is gone.
pub(super) fn renew_object(
    connection: &Connection,
    tenant: i64,
    id: &str,
    until: Timestamp,
) -> Result<bool> {
    let renewed = connection
        .prepare_cached(
            "UPDATE pending_objects SET lease_until = ?3
             WHERE tenant = ?1 AND id = ?2 AND NOT removing",
        )
        .and_then(|mut statement| statement.execute(params![tenant, id, until.as_millis()]))
        .map_err(database_error)?;
    Ok(renewed == 1)
}

/// Removes the registration of an object that was deleted.
pub(super) fn unregister_object(connection: &Connection, tenant: i64, id: &str) -> Result<()> {
    connection
        .prepare_cached("DELETE FROM pending_objects WHERE tenant = ?1 AND id = ?2 AND removing")
        .and_then(|mut statement| statement.execute(params![tenant, id]))
        .map_err(database_error)?;
    Ok(())
}

/// Gives up the removal of an object until a time: meanwhile it may be written.
pub(super) fn postpone_removal(
    connection: &Connection,
    tenant: i64,
    id: &str,
    until: Timestamp,
) -> Result<()> {
    connection
        .prepare_cached(
            "UPDATE pending_objects SET removing = 0, owner = '', lease_until = ?3
             WHERE tenant = ?1 AND id = ?2 AND removing",
        )
        .and_then(|mut statement| statement.execute(params![tenant, id, until.as_millis()]))
        .map_err(database_error)?;
    Ok(())
}

/// Returns an object whose registration has ended, and reserves its removal.
pub(super) fn take_abandoned_object(
    connection: &Connection,
    owner: &str,
    now: Timestamp,
    until: Timestamp,
) -> Result<Option<ObjectKey>> {
    let own_before = now.before(OWN_REGISTRATION_GRACE).as_millis().max(0);
    let mut statement = connection
        .prepare_cached(
            "UPDATE pending_objects SET removing = 1, owner = ?1, lease_until = ?3
             WHERE (tenant, id) IN (
                 SELECT tenant, id FROM pending_objects
                 WHERE lease_until <=
                     CASE WHEN owner = ?1 AND NOT removing THEN ?4 ELSE ?2 END
                 LIMIT 1
             )
             RETURNING (SELECT name FROM tenants WHERE tenants.key = tenant), id",
        )
        .map_err(database_error)?;
    statement
        .query_row(params![owner, now.as_millis(), until.as_millis(), own_before], object_key)
        .optional()
        .map_err(database_error)
}

/// Turns a file into a tombstone after its object was deleted.
pub(super) fn mark_removed(connection: &Connection, tenant: &str, id: &str) -> Result<()> {
    let Some(tenant) = tenant_key(connection, tenant)? else { return Ok(()) };
    let sql = "UPDATE files SET removed = 1 WHERE tenant = ?1 AND id = ?2";
    connection.execute(sql, params![tenant, id]).map_err(database_error)?;
    Ok(())
}

/// Deletes up to `limit` tombstones of files deleted or expired before `gone_before`; returns true
/// if more may remain.
pub(super) fn purge(connection: &Connection, gone_before: Timestamp, limit: usize) -> Result<bool> {
    let removed = connection
        .execute(
            "DELETE FROM files WHERE key IN (
                 SELECT key FROM files WHERE removed = 1
                 AND min(coalesce(deleted_at, expires_at), coalesce(expires_at, deleted_at)) < ?1
                 LIMIT ?2
             )",
            params![gone_before.as_millis(), to_i64(limit as u64)],
        )
        .map_err(database_error)?;
    Ok(removed == limit)
}
