//! Operations of the store: each one transaction, on the writer or on a reader.

use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use batchwright_domain::clock::Timestamp;
use batchwright_domain::ids::{BatchId, FileId, ObjectKey, TenantId};

use super::accounts::creating_tenant;
use super::files::Addition;
use super::keys::BatchRow;
use super::{batches, connection, files, jobs, open_batches, results, start, usage, work};
use crate::accounts::{Refusal, StorageBounds};
use crate::sqlite::{LAST_BACKUP, OWNER, SqliteStore, database_error, tenant_key};
use crate::{
    BatchError, BatchKey, BatchProgress, BatchRecord, Cancel, Claim, Created, Disk, FileQuery,
    FileRecord, Finish, Idempotency, Job, NewBatch, OnlineUsage, Orders, Overview, Paged,
    PluginVersion, Release, Result, ResultRow, Results, Started, Store, StoreError, Validated,
    Waiting,
};

/// Tables that a readiness probe reads.
const TABLES: [&str; 17] = [
    "tenants",
    "files",
    "batches",
    "batch_errors",
    "results",
    "batch_plugins",
    "jobs",
    "pending_objects",
    "service_accounts",
    "api_keys",
    "audit",
    "usage",
    "model_limits",
    "batch_tokens",
    "project_secrets",
    "webhooks",
    "webhook_deliveries",
];

#[async_trait]
impl Store for SqliteStore {
    async fn insert_file(
        &self,
        tenant: &TenantId,
        file: FileRecord,
        bounds: StorageBounds,
    ) -> Result<()> {
        let tenant = tenant.clone();
        self.writer
            .write(move |connection| {
                let tenant = creating_tenant(connection, &tenant)?;
                files::insert(connection, tenant, &file)?;
                files::check_bounds(connection, tenant, bounds, Addition::default())
            })
            .await
    }

    async fn file(
        &self,
        tenant: &TenantId,
        id: &FileId,
        now: Timestamp,
    ) -> Result<Option<FileRecord>> {
        let (tenant, id) = (tenant.clone(), id.clone());
        self.readers
            .read(move |connection| files::get(connection, tenant.as_str(), id.as_str(), now))
            .await
    }

    async fn files(&self, tenant: &TenantId, query: FileQuery) -> Result<Paged<FileRecord>> {
        let tenant = tenant.clone();
        self.readers.read(move |connection| files::list(connection, tenant.as_str(), &query)).await
    }

    async fn delete_file(&self, tenant: &TenantId, id: &FileId, now: Timestamp) -> Result<bool> {
        let (tenant, id) = (tenant.clone(), id.clone());
        self.writer
            .write(move |connection| files::delete(connection, tenant.as_str(), id.as_str(), now))
            .await
    }

    async fn register_object(
        &self,
        key: &ObjectKey,
        now: Timestamp,
        until: Timestamp,
    ) -> Result<()> {
        let key = key.clone();
        self.writer
            .write(move |connection| {
                let Some(tenant) = tenant_key(connection, key.tenant.as_str())? else {
                    return Err(StoreError::Refused(Refusal::UnknownProject));
                };
                let object = (tenant, key.file.as_str(), OWNER);
                files::register_object(connection, object, now, until)
            })
            .await
    }

    async fn renew_object(&self, key: &ObjectKey, until: Timestamp) -> Result<()> {
        match self.set_object_lease(key, until).await? {
            true => Ok(()),
            false => Err(StoreError::Unregistered),
        }
    }

    async fn abandon_object(&self, key: &ObjectKey) -> Result<()> {
        self.set_object_lease(key, Timestamp::from_millis(0)).await.map(drop)
    }

    async fn take_abandoned_object(
        &self,
        now: Timestamp,
        until: Timestamp,
    ) -> Result<Option<ObjectKey>> {
        self.writer
            .write(move |connection| files::take_abandoned_object(connection, OWNER, now, until))
            .await
    }

    async fn unregister_object(&self, key: &ObjectKey) -> Result<()> {
        let key = key.clone();
        self.writer
            .write(move |connection| match tenant_key(connection, key.tenant.as_str())? {
                Some(tenant) => files::unregister_object(connection, tenant, key.file.as_str()),
                None => Ok(()),
            })
            .await
    }

    async fn postpone_removal(&self, key: &ObjectKey, until: Timestamp) -> Result<()> {
        let key = key.clone();
        self.writer
            .write(move |connection| match tenant_key(connection, key.tenant.as_str())? {
                Some(tenant) => {
                    files::postpone_removal(connection, tenant, key.file.as_str(), until)
                }
                None => Ok(()),
            })
            .await
    }

    async fn removable_files(&self, now: Timestamp, limit: usize) -> Result<Vec<ObjectKey>> {
        self.readers.read(move |connection| files::removable(connection, now, limit)).await
    }

    async fn mark_file_removed(&self, key: &ObjectKey) -> Result<()> {
        let key = key.clone();
        self.writer
            .write(move |connection| {
                files::mark_removed(connection, key.tenant.as_str(), key.file.as_str())
            })
            .await
    }

    async fn purge_tombstones(&self, gone_before: Timestamp, limit: usize) -> Result<bool> {
        self.writer.write(move |connection| files::purge(connection, gone_before, limit)).await
    }

    async fn create_batch(
        &self,
        tenant: &TenantId,
        new: NewBatch,
        idempotency: Option<Idempotency>,
        max_open: Option<u64>,
    ) -> Result<Created> {
        let tenant = tenant.clone();
        self.writer
            .write(move |connection| {
                batches::create(
                    connection,
                    creating_tenant(connection, &tenant)?,
                    &new,
                    idempotency.as_ref(),
                    max_open,
                )
            })
            .await
    }

    async fn batch(&self, tenant: &TenantId, id: &BatchId) -> Result<Option<BatchRecord>> {
        let (tenant, id) = (tenant.clone(), id.clone());
        self.readers
            .read(move |connection| batches::get(connection, tenant.as_str(), id.as_str()))
            .await
    }

    async fn batch_errors(&self, tenant: &TenantId, id: &BatchId) -> Result<Vec<BatchError>> {
        let (tenant, id) = (tenant.clone(), id.clone());
        self.readers
            .read(move |connection| batches::all_errors(connection, tenant.as_str(), id.as_str()))
            .await
    }

    async fn batches(
        &self,
        tenant: &TenantId,
        after: Option<BatchId>,
        limit: usize,
        bytes: usize,
    ) -> Result<Paged<BatchRecord>> {
        let tenant = tenant.clone();
        self.readers
            .read(move |connection| {
                batches::list(
                    connection,
                    tenant.as_str(),
                    after.as_ref().map(BatchId::as_str),
                    limit,
                    bytes,
                )
            })
            .await
    }

    async fn request_cancel(
        &self,
        tenant: &TenantId,
        id: &BatchId,
        now: Timestamp,
    ) -> Result<Cancel> {
        let (tenant, id) = (tenant.clone(), id.clone());
        self.writer
            .write(move |connection| {
                open_batches::request_cancel(connection, tenant.as_str(), id.as_str(), now)
            })
            .await
    }

    async fn waiting(&self, now: Timestamp) -> Result<Vec<Waiting>> {
        self.readers.read(move |connection| work::waiting(connection, OWNER, now)).await
    }

    async fn claim(
        &self,
        waiting: &Waiting,
        now: Timestamp,
        until: Timestamp,
    ) -> Result<Option<Claim>> {
        let row = BatchRow::of(&waiting.key);
        self.writer.write(move |connection| work::claim(connection, OWNER, row, now, until)).await
    }

    async fn renew(&self, claim: &Claim, until: Timestamp) -> Result<Orders> {
        let claim = claim.clone();
        self.writer.write(move |connection| work::renew(connection, &claim, until)).await
    }

    async fn release(&self, claim: &Claim, how: Release) -> Result<()> {
        let claim = claim.clone();
        self.writer.write(move |connection| work::release(connection, &claim, &how)).await
    }

    async fn end_backoff(&self, now: Timestamp) -> Result<()> {
        self.writer.write(move |connection| work::end_backoff(connection, now)).await
    }

    async fn save_job(&self, claim: &Claim, line: u64, job: Job) -> Result<()> {
        let claim = claim.clone();
        self.writer.write(move |connection| jobs::save(connection, &claim, line, &job)).await
    }

    async fn job(&self, claim: &Claim, line: u64) -> Result<Option<Job>> {
        let claim = claim.clone();
        self.readers.read(move |connection| jobs::get(connection, &claim, line)).await
    }

    async fn delete_job(&self, claim: &Claim, line: u64) -> Result<()> {
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
        by: Vec<PluginVersion>,
        at: Timestamp,
    ) -> Result<()> {
        let claim = claim.clone();
        self.writer.write(move |connection| work::fail(connection, &claim, &errors, &by, at)).await
    }

    async fn start_execution(
        &self,
        claim: &Claim,
        found: Validated,
        at: Timestamp,
        may_wait: bool,
    ) -> Result<Started> {
        let claim = claim.clone();
        self.writer
            .write(move |connection| start::start(connection, &claim, &found, at, may_wait))
            .await
    }

    async fn admit(&self, claim: &Claim, at: Timestamp, retry_at: Timestamp) -> Result<Started> {
        let claim = claim.clone();
        self.writer.write(move |connection| start::admit(connection, &claim, at, retry_at)).await
    }

    async fn insert_results(
        &self,
        claim: &Claim,
        rows: Arc<Vec<ResultRow>>,
        by: Vec<PluginVersion>,
        at: Timestamp,
    ) -> Result<()> {
        let claim = claim.clone();
        self.writer
            .write(move |connection| results::insert_results(connection, &claim, &rows, &by, at))
            .await
    }

    async fn record_online_usage(
        &self,
        tenant: &TenantId,
        usage: Vec<OnlineUsage>,
        at: Timestamp,
    ) -> Result<()> {
        let tenant = tenant.clone();
        self.writer
            .write(move |connection| usage::record_online(connection, &tenant, &usage, at))
            .await
    }

    async fn plugin_versions(
        &self,
        tenant: &TenantId,
        id: &BatchId,
    ) -> Result<Option<Vec<PluginVersion>>> {
        let (tenant, id) = (tenant.clone(), id.clone());
        self.readers
            .read(move |connection| {
                batches::plugin_versions(connection, tenant.as_str(), id.as_str())
            })
            .await
    }

    async fn recorded_lines(&self, claim: &Claim, after: u64, limit: usize) -> Result<Vec<u64>> {
        let claim = claim.clone();
        self.readers
            .read(move |connection| results::recorded_lines(connection, &claim, after, limit))
            .await
    }

    async fn start_finalizing(&self, claim: &Claim, at: Timestamp) -> Result<()> {
        let claim = claim.clone();
        self.writer.write(move |connection| work::start_finalizing(connection, &claim, at)).await
    }

    async fn results(&self, claim: &Claim, after: u64, bytes: usize) -> Result<Results> {
        let claim = claim.clone();
        self.readers
            .read(move |connection| results::results(connection, &claim, after, bytes))
            .await
    }

    async fn finish(&self, claim: &Claim, finish: Finish) -> Result<()> {
        let claim = claim.clone();
        self.writer.write(move |connection| work::finish(connection, &claim, &finish)).await
    }

    async fn discard_results(&self, limit: usize) -> Result<bool> {
        self.writer.write(move |connection| results::discard_results(connection, limit)).await
    }

    async fn removable_batches(
        &self,
        now: Timestamp,
        lifetime: Duration,
        limit: usize,
    ) -> Result<Vec<BatchKey>> {
        self.readers
            .read(move |connection| batches::removable(connection, now, lifetime, limit))
            .await
    }

    async fn delete_batches(&self, batches: Vec<BatchKey>) -> Result<()> {
        self.writer.write(move |connection| batches::delete(connection, &batches)).await
    }

    async fn overview(&self, now: Timestamp, limit: usize) -> Result<Overview> {
        self.readers.read(move |connection| open_batches::overview(connection, now, limit)).await
    }

    async fn batch_progress(
        &self,
        tenants: Vec<TenantId>,
        ended_since: Option<Timestamp>,
        limit: usize,
    ) -> Result<Vec<BatchProgress>> {
        self.readers
            .read(move |connection| {
                open_batches::progress(connection, &tenants, ended_since, limit)
            })
            .await
    }

    async fn disk(&self) -> Result<Disk> {
        let folder = self.folder.clone();
        self.readers.read(move |connection| disk(connection, &folder)).await
    }

    async fn compact(&self) -> Result<bool> {
        self.writer.compact().await
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
                for table in TABLES {
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

    async fn newest_files(&self, now: Timestamp, limit: usize) -> Result<Vec<ObjectKey>> {
        self.readers.read(move |connection| files::newest(connection, now, limit)).await
    }
}

/// Returns the size of the database and the space of its file system.
fn disk(connection: &rusqlite::Connection, folder: &std::path::Path) -> Result<Disk> {
    let pragma = |name: &str| {
        let value = connection.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
        value.map(super::to_u64).map_err(database_error)
    };
    let database = pragma("page_count")?.saturating_mul(pragma("page_size")?);
    let (free, size) =
        file_system(folder).map_err(|error| StoreError::Database(format!("statvfs: {error}")))?;
    Ok(Disk { database, free, size, last_backup: last_backup(folder) })
}

/// Returns the time that the last backup of a data folder has left in it.
fn last_backup(folder: &std::path::Path) -> Option<Timestamp> {
    let mut text = String::new();
    let file = std::fs::File::open(folder.join(LAST_BACKUP)).ok()?;
    // A number has at most 20 digits.
    file.take(20).read_to_string(&mut text).ok()?;
    let seconds: i64 = text.trim().parse().ok()?;
    Some(Timestamp::from_millis(seconds.saturating_mul(1000)))
}

/// Returns the space of a file system that the server can use, and its size, in bytes.
pub(super) fn file_system(folder: &std::path::Path) -> std::io::Result<(u64, u64)> {
    let found = rustix::fs::statvfs(folder)?;
    let bytes = |blocks: u64| blocks.saturating_mul(found.f_frsize);
    Ok((bytes(found.f_bavail), bytes(found.f_blocks)))
}
