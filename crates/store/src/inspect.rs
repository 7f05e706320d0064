//! Inspection of a data folder that a server may be using: read-only, without its lock.

use std::path::Path;
use std::time::Duration;

use batchwright_domain::clock::Timestamp;
use rusqlite::{Connection, OpenFlags};

use crate::sqlite::DATABASE_FILE;
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
    let path = folder.join(DATABASE_FILE);
    let failed = |error: &dyn std::fmt::Display| unreadable(folder, error);
    let connection = open(folder)?;
    let size = |path: &Path| std::fs::metadata(path).map_or(0, |found| found.len());
    let number = |sql: &str| {
        connection.query_row(sql, [], |row| row.get::<_, Option<i64>>(0)).map_err(|it| failed(&it))
    };
    let count =
        |sql: &str| Ok::<_, StoreError>(u64::try_from(number(sql)?.unwrap_or(0)).unwrap_or(0));
    let mut open = Vec::new();
    let sql = "SELECT status, count(*) FROM batches
        WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling') GROUP BY status";
    let mut statement = connection.prepare(sql).map_err(|error| failed(&error))?;
    let mut rows = statement.query([]).map_err(|error| failed(&error))?;
    while let Some(row) = rows.next().map_err(|error| failed(&error))? {
        let number = row.get::<_, i64>(1).map_err(|error| failed(&error))?;
        let status = row.get(0).map_err(|error| failed(&error))?;
        open.push((status, u64::try_from(number).unwrap_or(0)));
    }
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
    let space = rustix::fs::statvfs(folder).map_err(|error| failed(&error))?;
    let bytes = |blocks: u64| blocks.saturating_mul(space.f_frsize);
    Ok(Inspection {
        database_bytes: size(&path),
        wal_bytes: size(&folder.join(format!("{DATABASE_FILE}-wal"))),
        disk: (bytes(space.f_bavail), bytes(space.f_blocks)),
        open,
        latest: latest.map(Timestamp::from_millis),
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
    /// Batches that ended before this time go, unless they have a result file.
    pub batches_ended_before: Timestamp,
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
pub fn garbage(folder: &Path, horizon: &Horizon) -> Result<Garbage> {
    let connection = open(folder)?;
    let pair = |sql: &str, at: Timestamp| {
        connection
            .query_row(sql, [at.as_millis()], |row| Ok((row.get::<_, i64>(0)?, row.get(1)?)))
            .map(|(rows, bytes): (i64, i64)| {
                (u64::try_from(rows).unwrap_or(0), u64::try_from(bytes).unwrap_or(0))
            })
            .map_err(|error| unreadable(folder, &error))
    };
    let files = |is_read: &str| {
        let sql = format!(
            "SELECT count(*), coalesce(sum(bytes), 0) FROM files
             WHERE (deleted_at IS NOT NULL OR expires_at <= ?1) AND NOT removed AND {is_read} (
                 SELECT 1 FROM batches WHERE batches.input_file = files.key
                 AND batches.status IN ('validating', 'in_progress', 'finalizing', 'cancelling'))"
        );
        pair(&sql, horizon.now)
    };
    // A batch goes once its result files have gone, and they go first.
    let batches = connection
        .query_row(
            "SELECT count(*) FROM batches
             WHERE coalesce(completed_at, failed_at, expired_at, cancelled_at) < ?1
             AND status IN ('completed', 'failed', 'expired', 'cancelled')
             AND NOT EXISTS (
                 SELECT 1 FROM files WHERE files.tenant = batches.tenant
                 AND files.id IN (batches.output_file_id, batches.error_file_id)
                 AND NOT files.removed AND files.deleted_at IS NULL
                 AND coalesce(files.expires_at > ?2, TRUE))",
            [horizon.batches_ended_before.as_millis(), horizon.now.as_millis()],
            |row| row.get::<_, i64>(0),
        )
        .map_err(|error| unreadable(folder, &error))?;
    let audit_entries = match horizon.audit_before {
        Some(before) => pair("SELECT count(*), 0 FROM audit WHERE at < ?1", before)?.0,
        None => 0,
    };
    Ok(Garbage {
        files: files("NOT EXISTS")?,
        files_in_use: files("EXISTS")?,
        batches: u64::try_from(batches).unwrap_or(0),
        audit_entries,
    })
}

fn unreadable(folder: &Path, error: &dyn std::fmt::Display) -> StoreError {
    StoreError::Folder {
        folder: folder.display().to_string(),
        message: format!("the database cannot be read: {error}"),
    }
}

fn open(folder: &Path) -> Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(folder.join(DATABASE_FILE), flags)
        .map_err(|error| unreadable(folder, &error))?;
    connection.busy_timeout(Duration::from_secs(10)).map_err(|error| unreadable(folder, &error))?;
    Ok(connection)
}
