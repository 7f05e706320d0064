//! Store in SQLite in WAL mode: one connection writes, in groups; a few connections read.

mod results;
mod store;

mod accounts;
mod batches;
mod connection;
mod enqueued;
mod files;
pub mod inspect;
mod jobs;
mod keys;
mod open_batches;
mod query;
mod schema;
mod start;
mod usage;
mod webhooks;
mod work;
mod writer;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use batchwright_domain::clock::Timestamp;
use batchwright_domain::ids::ObjectKey;
use batchwright_telemetry::{Error as MetricsError, Metrics};
use connection::Readers;
pub(crate) use connection::open_beside_server;
use rusqlite::{Connection, OptionalExtension};
use writer::Writer;

use super::{Result, StoreError};
use crate::metrics::StoreMetrics;
use crate::private;

/// Name of the database in the data folder.
pub(crate) const DATABASE_FILE: &str = "batchwright.db";

/// File of a data folder with the time of its last backup, in seconds since 1970.
pub(crate) const LAST_BACKUP: &str = "last-backup";

/// Owner of all claims and registrations: the holder of the data folder's lock, since no other
/// process can write to the database.
pub(crate) const OWNER: &str = "holder of the folder's lock";

/// Store in a SQLite database of a data folder.
pub struct SqliteStore {
    writer: Writer,
    readers: Readers,
    folder: PathBuf,
    /// Lock that keeps other processes out of the data folder until the store is dropped.
    _lock: Arc<File>,
}

impl SqliteStore {
    /// Returns true if a folder has a database.
    pub fn exists(folder: &Path) -> bool {
        folder.join(DATABASE_FILE).exists()
    }

    /// Opens the database of a data folder; creates and migrates the database as needed.
    ///
    /// Fails if another process uses the folder.
    pub fn open(folder: &Path) -> Result<Self> {
        Self::open_measured(folder, &Metrics::disabled())
    }

    /// Opens the database like [`Self::open`], with metrics.
    pub fn open_measured(folder: &Path, metrics: &Metrics) -> Result<Self> {
        let lock = lock_folder(folder)?;
        let path = folder.join(DATABASE_FILE);
        let failed =
            |message: String| StoreError::Folder { folder: folder.display().to_string(), message };
        let mut connection = connection::open(&path).map_err(|error| {
            failed(format!(
                "the database {} cannot be opened: {error}; \
                     name another folder with --data, or restore the database",
                path.display()
            ))
        })?;
        migrate(&mut connection).map_err(failed)?;
        if let Err(error) = connection::enable_incremental_vacuum(&connection) {
            tracing::warn!(
                %error,
                path = %path.display(),
                "incremental vacuum not enabled, the database file will not shrink"
            );
        }
        work::end_leases(&connection, OWNER)?;
        let uncounted = |error: MetricsError| StoreError::Database(format!("metrics: {error}"));
        let measured = StoreMetrics::register(metrics).map_err(uncounted)?;
        let writer = Writer::start(connection, measured.clone())?;
        let readers = Readers::new(path, measured.clone());
        let state = (writer.waiting(), readers.in_use());
        let state = move || (state.0(), state.1());
        measured.register_state(metrics, state).map_err(uncounted)?;
        Ok(Self { writer, readers, folder: folder.to_owned(), _lock: Arc::new(lock) })
    }

    /// Extends or ends the registration of an object; returns false if it is gone.
    async fn set_object_lease(&self, key: &ObjectKey, until: Timestamp) -> Result<bool> {
        let key = key.clone();
        self.writer
            .write(move |connection| match tenant_key(connection, key.tenant.as_str())? {
                Some(tenant) => files::renew_object(connection, tenant, key.file.as_str(), until),
                None => Ok(false),
            })
            .await
    }
}

/// Creates the data folder if it does not exist and locks it for this process.
pub(crate) fn lock_folder(folder: &Path) -> Result<File> {
    let failed =
        |message: String| StoreError::Folder { folder: folder.display().to_string(), message };
    private::create_folder(folder).map_err(|error| {
        failed(format!("cannot be created: {error}; name another folder with --data"))
    })?;
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(folder.join("lock"))
        .map_err(|error| {
        failed(format!("cannot be written to: {error}; name another folder with --data"))
    })?;
    match file.try_lock() {
        Ok(()) => {
            private::restrict_modes(folder);
            Ok(file)
        }
        Err(std::fs::TryLockError::WouldBlock) => Err(failed(
            "is in use by another batchwright; stop it, or name another folder with --data".into(),
        )),
        Err(std::fs::TryLockError::Error(error)) => Err(failed(format!(
            "cannot be locked: {error}; name a folder on a local file system with --data"
        ))),
    }
}

/// Migrates the database to the latest schema.
fn migrate(connection: &mut Connection) -> std::result::Result<(), String> {
    use rusqlite_migration::{Error, MigrationDefinitionError};
    schema::migrations().to_latest(connection).map_err(|error| match error {
        Error::MigrationDefinition(MigrationDefinitionError::DatabaseTooFarAhead) => format!(
            "was written by a newer version of batchwright than this one ({}); \
             use that version, or name another folder with --data",
            env!("CARGO_PKG_VERSION")
        ),
        error => format!(
            "the database cannot be migrated: {error}; \
             fix the cause, or name another folder with --data"
        ),
    })
}

/// Returns the key of a tenant, or `None` if the database has no such tenant.
pub(crate) fn tenant_key(connection: &Connection, tenant: &str) -> Result<Option<i64>> {
    let mut statement = connection
        .prepare_cached("SELECT key FROM tenants WHERE name = ?1")
        .map_err(database_error)?;
    statement.query_row([tenant], |row| row.get(0)).optional().map_err(database_error)
}

fn timestamp(millis: i64) -> Timestamp {
    Timestamp::from_millis(millis)
}

/// Converts a number for SQLite, whose integers are signed; saturates.
fn to_i64(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// Converts a number from SQLite; a negative number becomes 0.
fn to_u64(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

/// Converts an error of SQLite and records a reported corruption.
#[expect(clippy::needless_pass_by_value, reason = "signature for map_err")]
pub(crate) fn database_error(error: rusqlite::Error) -> StoreError {
    connection::record_corruption(&error);
    match error.sqlite_error_code() {
        Some(rusqlite::ErrorCode::DiskFull) => StoreError::Full(error.to_string()),
        _ => StoreError::Database(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tempfile::TempDir;

    use super::SqliteStore;
    use crate::Store;
    use crate::suite::{Fixture, store_suite};

    impl Fixture for TempDir {
        fn new() -> Self {
            TempDir::new().unwrap()
        }

        fn open(&self) -> Arc<dyn Store> {
            Arc::new(SqliteStore::open(self.path()).unwrap())
        }
    }

    store_suite!(TempDir);
}
