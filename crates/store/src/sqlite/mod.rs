//! Store in SQLite in WAL mode: one connection writes, in groups; a few connections read.

mod batches;
mod connection;
mod files;
mod jobs;
mod keys;
mod schema;
mod work;

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use batchwright_domain::clock::Timestamp;
use rusqlite::{Connection, OptionalExtension};

use super::{
    BatchError, BatchKey, BatchRecord, Cancel, Claim, Created, FileQuery, FileRecord, Finish,
    Idempotency, Job, NewBatch, Paged, Release, Result, ResultRow, Results, ServedBy, Store,
    StoreError, Validated, Waiting,
};
use crate::private;
use connection::{Readers, Writer};
use keys::BatchRow;

/// Store in a SQLite database of a data folder.
pub struct SqliteStore {
    writer: Writer,
    readers: Readers,
    /// Id of this process as owner of claims and registered objects.
    owner: String,
    /// Lock that keeps other processes out of the data folder until the store is dropped.
    _lock: Arc<File>,
}

impl SqliteStore {
    /// Opens the database of a data folder; creates and migrates the database as needed.
    ///
    /// Fails if another process uses the folder.
    pub fn open(folder: &Path) -> Result<Self> {
        let lock = lock_folder(folder)?;
        let path = folder.join("batchwright.db");
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
        // The folder's lock proves that no other process is alive, so every lease is obsolete.
        connection
            .execute(
                "UPDATE batches SET lease_until = 0, owner = NULL
                 WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling')",
                [],
            )
            .map_err(database_error)?;
        let owner = uuid::Uuid::new_v4().to_string();
        Ok(Self {
            writer: Writer::start(connection)?,
            readers: Readers::new(path),
            owner,
            _lock: Arc::new(lock),
        })
    }
}

/// Creates the data folder if it does not exist and locks it for this process.
fn lock_folder(folder: &Path) -> Result<File> {
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
fn tenant_key(connection: &Connection, tenant: &str) -> Result<Option<i64>> {
    let mut statement = connection
        .prepare_cached("SELECT key FROM tenants WHERE name = ?1")
        .map_err(database_error)?;
    statement.query_row([tenant], |row| row.get(0)).optional().map_err(database_error)
}

/// Returns the key of a tenant; inserts the tenant if the database has no such tenant.
fn insert_tenant(connection: &Connection, tenant: &str) -> Result<i64> {
    if let Some(key) = tenant_key(connection, tenant)? {
        return Ok(key);
    }
    connection
        .execute("INSERT INTO tenants (name) VALUES (?1)", [tenant])
        .map_err(database_error)?;
    Ok(connection.last_insert_rowid())
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
fn database_error(error: rusqlite::Error) -> StoreError {
    connection::record_corruption(&error);
    match error.sqlite_error_code() {
        Some(rusqlite::ErrorCode::DiskFull) => StoreError::Full(error.to_string()),
        _ => StoreError::Database(error.to_string()),
    }
}

#[async_trait]
impl Store for SqliteStore {
    async fn insert_file(&self, tenant: &str, file: FileRecord) -> Result<()> {
        let tenant = tenant.to_owned();
        self.writer
            .write(move |connection| {
                files::insert(connection, insert_tenant(connection, &tenant)?, &file)
            })
            .await
    }

    async fn file(&self, tenant: &str, id: &str, now: Timestamp) -> Result<Option<FileRecord>> {
        let (tenant, id) = (tenant.to_owned(), id.to_owned());
        self.readers.read(move |connection| files::get(connection, &tenant, &id, now)).await
    }

    async fn files(&self, tenant: &str, query: FileQuery) -> Result<Paged<FileRecord>> {
        let tenant = tenant.to_owned();
        self.readers.read(move |connection| files::list(connection, &tenant, &query)).await
    }

    async fn delete_file(&self, tenant: &str, id: &str, now: Timestamp) -> Result<bool> {
        let (tenant, id) = (tenant.to_owned(), id.to_owned());
        self.writer.write(move |connection| files::delete(connection, &tenant, &id, now)).await
    }

    async fn begin_object(&self, tenant: &str, id: &str) -> Result<()> {
        let (tenant, id, owner) = (tenant.to_owned(), id.to_owned(), self.owner.clone());
        self.writer
            .write(move |connection| {
                files::register_object(connection, insert_tenant(connection, &tenant)?, &id, &owner)
            })
            .await
    }

    async fn abandoned_objects(&self, limit: usize) -> Result<Vec<(String, String)>> {
        let owner = self.owner.clone();
        self.readers
            .read(move |connection| files::abandoned_objects(connection, &owner, limit))
            .await
    }

    async fn object_removed(&self, tenant: &str, id: &str) -> Result<()> {
        let (tenant, id) = (tenant.to_owned(), id.to_owned());
        self.writer
            .write(move |connection| match tenant_key(connection, &tenant)? {
                Some(tenant) => files::unregister_object(connection, tenant, &id),
                None => Ok(()),
            })
            .await
    }

    async fn is_pending(&self, tenant: &str, id: &str) -> Result<bool> {
        let (tenant, id) = (tenant.to_owned(), id.to_owned());
        // The writer runs writes in order, so this query sees a record that was queued before.
        self.writer
            .write(move |connection| match tenant_key(connection, &tenant)? {
                Some(tenant) => files::is_pending(connection, tenant, &id),
                None => Ok(false),
            })
            .await
    }

    async fn garbage(&self, now: Timestamp, limit: usize) -> Result<Vec<(String, String)>> {
        self.readers.read(move |connection| files::garbage(connection, now, limit)).await
    }

    async fn file_removed(&self, tenant: &str, id: &str) -> Result<()> {
        let (tenant, id) = (tenant.to_owned(), id.to_owned());
        self.writer.write(move |connection| files::mark_removed(connection, &tenant, &id)).await
    }

    async fn forget_files(&self, gone_before: Timestamp, limit: usize) -> Result<bool> {
        self.writer.write(move |connection| files::purge(connection, gone_before, limit)).await
    }

    async fn create_batch(
        &self,
        tenant: &str,
        new: NewBatch,
        idempotency: Option<Idempotency>,
    ) -> Result<Created> {
        let tenant = tenant.to_owned();
        self.writer
            .write(move |connection| {
                batches::create(
                    connection,
                    insert_tenant(connection, &tenant)?,
                    &new,
                    idempotency.as_ref(),
                )
            })
            .await
    }

    async fn batch(&self, tenant: &str, id: &str) -> Result<Option<BatchRecord>> {
        let (tenant, id) = (tenant.to_owned(), id.to_owned());
        self.readers.read(move |connection| batches::get(connection, &tenant, &id)).await
    }

    async fn batch_errors(&self, tenant: &str, id: &str) -> Result<Vec<BatchError>> {
        let (tenant, id) = (tenant.to_owned(), id.to_owned());
        self.readers.read(move |connection| batches::all_errors(connection, &tenant, &id)).await
    }

    async fn batches(
        &self,
        tenant: &str,
        after: Option<String>,
        limit: usize,
        bytes: usize,
    ) -> Result<Paged<BatchRecord>> {
        let tenant = tenant.to_owned();
        self.readers
            .read(move |connection| {
                batches::list(connection, &tenant, after.as_deref(), limit, bytes)
            })
            .await
    }

    async fn request_cancel(&self, tenant: &str, id: &str, now: Timestamp) -> Result<Cancel> {
        let (tenant, id) = (tenant.to_owned(), id.to_owned());
        self.writer
            .write(move |connection| batches::request_cancel(connection, &tenant, &id, now))
            .await
    }

    async fn waiting(&self, now: Timestamp) -> Result<Vec<Waiting>> {
        let owner = self.owner.clone();
        self.readers.read(move |connection| work::waiting(connection, &owner, now)).await
    }

    async fn claim(
        &self,
        waiting: &Waiting,
        now: Timestamp,
        until: Timestamp,
    ) -> Result<Option<Claim>> {
        let (owner, row) = (self.owner.clone(), BatchRow::of(&waiting.key));
        self.writer.write(move |connection| work::claim(connection, &owner, row, now, until)).await
    }

    async fn renew(&self, claim: &Claim, until: Timestamp) -> Result<()> {
        let claim = claim.clone();
        self.writer.write(move |connection| work::renew(connection, &claim, until)).await
    }

    async fn release(&self, claim: &Claim, how: Release) -> Result<()> {
        let claim = claim.clone();
        self.writer.write(move |connection| work::release(connection, &claim, &how)).await
    }

    async fn wake(&self, now: Timestamp) -> Result<()> {
        self.writer.write(move |connection| work::wake(connection, now)).await
    }

    async fn keep_job(&self, claim: &Claim, line: u64, job: Job) -> Result<()> {
        let claim = claim.clone();
        self.writer.write(move |connection| jobs::save(connection, &claim, line, &job)).await
    }

    async fn job(&self, claim: &Claim, line: u64) -> Result<Option<Job>> {
        let claim = claim.clone();
        self.readers.read(move |connection| jobs::get(connection, &claim, line)).await
    }

    async fn drop_job(&self, claim: &Claim, line: u64) -> Result<()> {
        let claim = claim.clone();
        self.writer.write(move |connection| jobs::delete(connection, &claim, line)).await
    }

    async fn has_jobs(&self, claim: &Claim) -> Result<bool> {
        let claim = claim.clone();
        self.readers.read(move |connection| jobs::exist(connection, &claim)).await
    }

    async fn input_file(&self, claim: &Claim) -> Result<Option<FileRecord>> {
        let claim = claim.clone();
        self.readers.read(move |connection| files::input_of(connection, &claim)).await
    }

    async fn fail(
        &self,
        claim: &Claim,
        errors: Vec<BatchError>,
        by: Vec<ServedBy>,
        at: Timestamp,
    ) -> Result<()> {
        let claim = claim.clone();
        self.writer.write(move |connection| work::fail(connection, &claim, &errors, &by, at)).await
    }

    async fn start_execution(&self, claim: &Claim, found: Validated, at: Timestamp) -> Result<()> {
        let claim = claim.clone();
        self.writer
            .write(move |connection| work::start_execution(connection, &claim, &found, at))
            .await
    }

    async fn record(
        &self,
        claim: &Claim,
        rows: Arc<Vec<ResultRow>>,
        by: Vec<ServedBy>,
    ) -> Result<()> {
        let claim = claim.clone();
        self.writer.write(move |connection| work::record(connection, &claim, &rows, &by)).await
    }

    async fn served_by(&self, tenant: &str, id: &str) -> Result<Option<Vec<ServedBy>>> {
        let (tenant, id) = (tenant.to_owned(), id.to_owned());
        self.readers.read(move |connection| batches::served_by(connection, &tenant, &id)).await
    }

    async fn recorded_lines(&self, claim: &Claim, after: u64, limit: usize) -> Result<Vec<u64>> {
        let claim = claim.clone();
        self.readers
            .read(move |connection| work::recorded_lines(connection, &claim, after, limit))
            .await
    }

    async fn start_finalizing(&self, claim: &Claim, at: Timestamp) -> Result<()> {
        let claim = claim.clone();
        self.writer.write(move |connection| work::start_finalizing(connection, &claim, at)).await
    }

    async fn results(&self, claim: &Claim, after: u64, bytes: usize) -> Result<Results> {
        let claim = claim.clone();
        self.readers.read(move |connection| work::results(connection, &claim, after, bytes)).await
    }

    async fn finish(&self, claim: &Claim, finish: Finish) -> Result<()> {
        let claim = claim.clone();
        self.writer.write(move |connection| work::finish(connection, &claim, &finish)).await
    }

    async fn discard_results(&self, limit: usize) -> Result<bool> {
        self.writer.write(move |connection| work::discard_results(connection, limit)).await
    }

    async fn forgettable_batches(
        &self,
        ended_before: Timestamp,
        limit: usize,
    ) -> Result<Vec<BatchKey>> {
        self.readers
            .read(move |connection| batches::forgettable(connection, ended_before, limit))
            .await
    }

    async fn forget_batches(&self, batches: Vec<BatchKey>) -> Result<()> {
        self.writer.write(move |connection| batches::delete(connection, &batches)).await
    }

    async fn compact(&self) -> Result<bool> {
        self.writer.write(connection::compact).await
    }

    async fn close(&self) {
        self.readers.close().await;
        self.writer.close().await;
    }

    async fn probe(&self, now: Timestamp) -> Result<()> {
        let write = self.writer.write(move |connection| {
            let sql = "INSERT OR REPLACE INTO probe (key, at) VALUES (1, ?1)";
            connection.execute(sql, [now.as_millis()]).map(drop).map_err(database_error)
        });
        write.await?;
        self.probe_read().await
    }

    async fn probe_read(&self) -> Result<()> {
        self.readers
            .read(|connection| {
                if let Some(corruption) = connection::corruption() {
                    return Err(StoreError::Database(corruption));
                }
                for table in
                    ["tenants", "files", "batches", "batch_errors", "results", "batch_plugins"]
                {
                    let mut statement = connection
                        .prepare_cached(&format!("SELECT * FROM {table} LIMIT 1"))
                        .map_err(database_error)?;
                    statement
                        .query([])
                        .and_then(|mut rows| rows.next().map(drop))
                        .map_err(database_error)?;
                }
                Ok(())
            })
            .await
    }

    async fn newest_files(&self, now: Timestamp, limit: usize) -> Result<Vec<(String, String)>> {
        self.readers.read(move |connection| files::newest(connection, now, limit)).await
    }
}
