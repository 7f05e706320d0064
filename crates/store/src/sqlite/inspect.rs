//! Inspection of a data folder that a server may be using: read-only, without its lock.

use std::path::Path;
use std::time::Duration;

use batchwright_domain::clock::Timestamp;
use batchwright_domain::limits::lifetime_seconds;
use rusqlite::Connection;

use super::batches::{OUTLIVED, RESULT_FILE};
use super::connection::open_beside_server;
use super::files::IN_USE;
use super::store::file_system;
use super::{DATABASE_FILE, schema, timestamp, to_i64, to_u64};
use crate::{Result, StoreError};

/// Facts about a data folder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inspection {
    /// Size of the database and its write-ahead log, in bytes.
    pub database_bytes: u64,
    /// Size of the write-ahead log, in bytes.
    pub wal_bytes: u64,
    /// Space of the file system that can be used, and its size, in bytes.
    pub disk: (u64, u64),
    /// Batches that have not ended, by status.
    pub open: Vec<(String, u64)>,
    /// Latest time that the database knows.
    pub latest: Option<Timestamp>,
    /// Webhook endpoints that the server has disabled, and deliveries that are attempted again.
    pub webhooks: (u64, u64),
    /// What is wrong with the database; none if nothing was found.
    pub damage: Option<String>,
}

/// Inspects a data folder; `deep` reads the whole database.
pub fn inspect(folder: &Path, deep: bool) -> Result<Inspection> {
    let failed = |error| unreadable(folder, &error);
    let connection = open(folder)?;
    let number = |sql: &str| {
        connection.query_row(sql, [], |row| row.get::<_, Option<i64>>(0)).map_err(failed)
    };
    let count = |sql: &str| number(sql).map(|found| found.map_or(0, to_u64));
    let mut statement = connection
        .prepare(
            "SELECT status, count(*) FROM batches
             WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling')
             GROUP BY status",
        )
        .map_err(failed)?;
    let open = statement
        .query_map([], |row| Ok((row.get(0)?, to_u64(row.get(1)?))))
        .and_then(Iterator::collect)
        .map_err(failed)?;
    let latest = number(
        "SELECT max(at) FROM (SELECT max(created_at) AS at FROM batches
         UNION ALL SELECT max(created_at) FROM files UNION ALL SELECT max(at) FROM audit)",
    )?;
    let damage = match deep {
        true => connection
            .query_row("PRAGMA quick_check(1)", [], |row| row.get::<_, String>(0))
            .map_or_else(
                |error| Some(error.to_string()),
                |found| Some(found).filter(|it| it != "ok"),
            ),
        false => None,
    };
    let size = |name: &str| std::fs::metadata(folder.join(name)).map_or(0, |found| found.len());
    Ok(Inspection {
        database_bytes: size(DATABASE_FILE),
        wal_bytes: size(&format!("{DATABASE_FILE}-wal")),
        disk: file_system(folder).map_err(|error| fault(folder, &error.to_string()))?,
        open,
        latest: latest.map(timestamp),
        webhooks: (
            count("SELECT count(*) FROM webhooks WHERE disabled_at IS NOT NULL")?,
            count("SELECT count(*) FROM webhook_deliveries WHERE next_at IS NOT NULL")?,
        ),
        damage,
    })
}

/// Times that decide what a cleanup removes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Horizon {
    /// Time of the cleanup: files that expire until then go.
    pub now: Timestamp,
    /// Time that batches without a result file are kept after their end, unless their project has
    /// a lifetime of its own.
    pub batch_lifetime: Duration,
    /// Entries of the audit log before this time go; none keeps them.
    pub audit_before: Option<Timestamp>,
}

/// What a cleanup would remove.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Garbage {
    /// Files whose content would go, and its size in bytes.
    pub files: (u64, u64),
    /// Deleted or expired files that stay because a batch still reads them, and their bytes.
    pub files_in_use: (u64, u64),
    /// Batches.
    pub batches: u64,
    /// Entries of the audit log.
    pub audit_entries: u64,
}

/// Counts what a cleanup would remove, with the conditions of the cleanup itself.
///
/// The results that a batch has in the database go when it ends, and result files before batches.
pub fn garbage(folder: &Path, horizon: &Horizon) -> Result<Garbage> {
    let connection = open(folder)?;
    let pair = |sql: &str, params: &[i64]| {
        connection
            .query_row(sql, rusqlite::params_from_iter(params), |row| {
                Ok((to_u64(row.get(0)?), to_u64(row.get(1)?)))
            })
            .map_err(|error| unreadable(folder, &error))
    };
    let now = horizon.now.as_millis();
    let files = |is_in_use: &str| {
        let sql = format!(
            "SELECT count(*), coalesce(sum(bytes), 0) FROM files
             WHERE (deleted_at IS NOT NULL OR expires_at <= ?1) AND NOT removed AND {is_in_use}"
        );
        pair(&sql, &[now])
    };
    let sql = format!(
        "SELECT count(*), 0 FROM batches WHERE {OUTLIVED} AND NOT EXISTS (
             SELECT 1 FROM files WHERE {RESULT_FILE} AND (
                 {IN_USE} OR deleted_at IS NULL AND coalesce(files.expires_at > ?1, TRUE)))"
    );
    let lifetime = to_i64(lifetime_seconds(horizon.batch_lifetime));
    let (batches, _) = pair(&sql, &[now, lifetime])?;
    let audit_entries = match horizon.audit_before {
        Some(before) => {
            pair("SELECT count(*), 0 FROM audit WHERE at < ?1", &[before.as_millis()])?.0
        }
        None => 0,
    };
    let files_in_use = files(IN_USE)?;
    Ok(Garbage { files: files(&format!("NOT {IN_USE}"))?, files_in_use, batches, audit_entries })
}

fn fault(folder: &Path, message: &str) -> StoreError {
    StoreError::Folder { folder: folder.display().to_string(), message: message.to_owned() }
}

fn unreadable(folder: &Path, error: &rusqlite::Error) -> StoreError {
    use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
    let advice = match error.sqlite_error_code() {
        Some(DatabaseCorrupt | NotADatabase) => "; restore a backup (batchwright restore)",
        _ => "",
    };
    fault(folder, &format!("the database cannot be read: {error}{advice}"))
}

/// Opens the database of a folder, which must have the schema of this version.
fn open(folder: &Path) -> Result<Connection> {
    let connection = open_beside_server(&folder.join(DATABASE_FILE))
        .map_err(|error| unreadable(folder, &error))?;
    match schema::migrations().pending_migrations(&connection) {
        Ok(0) => Ok(connection),
        Ok(1..) => Err(fault(
            folder,
            "the database is of an older version; the server migrates it at its next start",
        )),
        Ok(_) => Err(fault(
            folder,
            &format!(
                "the database is of a newer version of batchwright than this one ({})",
                env!("CARGO_PKG_VERSION")
            ),
        )),
        Err(error) => Err(fault(folder, &format!("the database cannot be read: {error}"))),
    }
}
