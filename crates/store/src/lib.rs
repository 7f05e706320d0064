//! Durable state: metadata and results in a database, file contents in an object store.
//!
//! **Durability.** [`Store`] consists of whole operations: each operation happens completely or not
//! at all, and is on disk when it returns.
//! Another database can therefore replace SQLite.
//! A file has a record in the database and an object in the object store, and no transaction spans
//! both.
//! The host registers an object before it writes the bytes ([`Store::register_object`]), and the
//! commit of the file's record removes the registration.
//! A registration has a lease, which the writer renews; an object whose lease has ended is removed.
//! A record is not committed for an object whose registration is gone.
//! No object is removed because it is unknown: an operator may restore an older database beside
//! newer objects.
//! A deleted file leaves a tombstone for a while, so that a client can list the files after it.
//!
//! **Claims.** A worker claims a batch before it works on the batch.
//! A claim is a conditional update, so two concurrent claims of one batch cannot both succeed.
//! No lock of the process guards durable state.
//!
//! **Leases.** A claim has a lease, which the worker renews.
//! Another process may claim the batch after the lease has expired.
//! The process that holds the claim may not: a clock that jumps, or a disk that refuses renewals
//! for a while, must not make one process work on a batch twice.
//! A renewal returns the [`Orders`] to the worker, so that a client of any process can cancel.
//! Opening a store ends the leases of this owner alone, which the process before it held.
//!
//! **Fences.** Each claim increments the fence of its batch.
//! Every update of the batch, its results or a saved job state compares the fence in the same
//! transaction.
//! A worker whose batch was claimed again gets [`StoreError::Fenced`], and its update is rolled
//! back.
//! Correctness depends on the fence; the lease only decides when another process tries a takeover.
//!
//! **Cancellation.** A client cancels a batch without a claim, at any moment.
//! Every later status change of the worker tests for `cancelling`, so that a batch reported as
//! `cancelling` ends as `cancelled`.
//!
//! Architecture invariant: this module knows neither the JSON of the API nor plugins.
//! The tenant is part of every key, path and query.

#![deny(missing_docs)]
#![warn(unreachable_pub)]

pub mod accounts;
pub mod backup;
mod error;
mod metrics;
pub mod objects;
mod private;
mod records;
mod sqlite;
#[cfg(test)]
mod suite;
pub mod usage;
pub mod webhooks;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

pub use accounts::Accounts;
use accounts::StorageBounds;
pub use error::{Result, StoreError};
pub use metrics::{METRICS, MeasuredObjects};
pub use objects::{ObjectWriter, Objects};
pub use private::{umask, users_mode};
pub use records::{
    BatchError, BatchKey, BatchProgress, BatchRecord, Cancel, Charge, Claim, Counts, Created,
    DatedBatch, Disk, FIRST_ERRORS, FileQuery, FileRecord, Finish, Idempotency, Job, Lane,
    Metadata, NewBatch, OnlineUsage, OpenBatches, Order, Orders, Overview, Page, Paged,
    PluginVersion, Release, ResultKind, ResultRow, Results, Started, StatusTimes, TokenLimit,
    Validated, WaitCause, Waiting,
};
pub use sqlite::{SqliteStore, inspect};
pub use webhooks::Webhooks;

use batchwright_domain::clock::Timestamp;
use batchwright_domain::ids::{BatchId, FileId, ObjectKey, TenantId};

/// Maximum number of ended batches whose progress is read at once.
pub const MAX_ENDED: usize = 20_000;

/// Database of files, batches and results.
///
/// Each method is one transaction. Methods that take a [`Claim`] and change the batch fail with
/// [`StoreError::Fenced`] if the batch was claimed again.
#[async_trait]
pub trait Store: Accounts + Webhooks {
    /// Inserts the record of a file and removes the registration of its object.
    ///
    /// Refused in an archived project, and if the project would exceed the bounds.
    async fn insert_file(
        &self,
        tenant: &TenantId,
        file: FileRecord,
        bounds: StorageBounds,
    ) -> Result<()>;
    /// Returns a file that is neither deleted nor expired.
    async fn file(
        &self,
        tenant: &TenantId,
        id: &FileId,
        now: Timestamp,
    ) -> Result<Option<FileRecord>>;
    /// Lists the files that are neither deleted nor expired.
    async fn files(&self, tenant: &TenantId, query: FileQuery) -> Result<Paged<FileRecord>>;
    /// Marks a file as deleted; returns false if there is no such file.
    ///
    /// The object stays while a batch reads it.
    async fn delete_file(&self, tenant: &TenantId, id: &FileId, now: Timestamp) -> Result<bool>;
    /// Registers an object before its bytes are written, until `until` or until the registration is
    /// renewed or removed.
    ///
    /// A repeated registration replaces the one before. Fails with [`StoreError::Unregistered`]
    /// while the object is being removed.
    async fn register_object(
        &self,
        key: &ObjectKey,
        now: Timestamp,
        until: Timestamp,
    ) -> Result<()>;
    /// Extends a registration to `until`; fails with [`StoreError::Unregistered`] if it is gone.
    async fn renew_object(&self, key: &ObjectKey, until: Timestamp) -> Result<()>;
    /// Ends a registration, so that the object is removed. An object that has a record stays.
    async fn abandon_object(&self, key: &ObjectKey) -> Result<()>;
    /// Returns an object whose registration has ended, and reserves its removal until `until`.
    ///
    /// The registrations of this owner end only when they are abandoned, when the store is opened,
    /// or a day after their lease: a clock that jumps must not remove an object that is being
    /// written.
    async fn take_abandoned_object(
        &self,
        now: Timestamp,
        until: Timestamp,
    ) -> Result<Option<ObjectKey>>;
    /// Gives up the removal of an object until `until`: meanwhile it may be registered and written.
    async fn postpone_removal(&self, key: &ObjectKey, until: Timestamp) -> Result<()>;
    /// Removes the registration of an object whose removal was reserved and that was deleted.
    async fn unregister_object(&self, key: &ObjectKey) -> Result<()>;
    /// Returns deleted and expired files that no running batch reads.
    async fn removable_files(&self, now: Timestamp, limit: usize) -> Result<Vec<ObjectKey>>;
    /// Turns the record of a file into a tombstone after its object was deleted.
    ///
    /// A list can still start after the id of a tombstone.
    async fn mark_file_removed(&self, key: &ObjectKey) -> Result<()>;
    /// Removes up to `limit` tombstones of files deleted or expired before `gone_before`; returns
    /// true if more may remain.
    async fn purge_tombstones(&self, gone_before: Timestamp, limit: usize) -> Result<bool>;

    /// Inserts a batch, at most one for each idempotency key, even under concurrent requests.
    ///
    /// Refused in an archived project, and if the project has `max_open` batches that have not
    /// ended.
    async fn create_batch(
        &self,
        tenant: &TenantId,
        new: NewBatch,
        idempotency: Option<Idempotency>,
        max_open: Option<u64>,
    ) -> Result<Created>;
    /// Returns a batch with its first errors.
    async fn batch(&self, tenant: &TenantId, id: &BatchId) -> Result<Option<BatchRecord>>;
    /// Returns all errors of a batch.
    async fn batch_errors(&self, tenant: &TenantId, id: &BatchId) -> Result<Vec<BatchError>>;
    /// Lists batches, newest first, each with its first errors.
    ///
    /// The page ends at `limit` entries, or when its entries reach about `bytes` bytes.
    async fn batches(
        &self,
        tenant: &TenantId,
        after: Option<BatchId>,
        limit: usize,
        bytes: usize,
    ) -> Result<Paged<BatchRecord>>;
    /// Sets a batch that has not ended to `Cancelling`.
    async fn request_cancel(
        &self,
        tenant: &TenantId,
        id: &BatchId,
        now: Timestamp,
    ) -> Result<Cancel>;

    /// Returns the oldest waiting batch of each tenant in each lane, the batches whose window ends
    /// soonest, and the batch that expired first.
    ///
    /// A batch waits if it has not ended and no lease on it is valid. A batch that this process has
    /// claimed never waits, even if the lease has expired.
    async fn waiting(&self, now: Timestamp) -> Result<Vec<Waiting>>;
    /// Claims a batch until `until`, or returns `None` if it was claimed meanwhile.
    async fn claim(
        &self,
        waiting: &Waiting,
        now: Timestamp,
        until: Timestamp,
    ) -> Result<Option<Claim>>;
    /// Extends the lease to `until` and returns the orders to the worker.
    async fn renew(&self, claim: &Claim, until: Timestamp) -> Result<Orders>;
    /// Releases a claimed batch.
    async fn release(&self, claim: &Claim, how: Release) -> Result<()>;
    /// Ends the backoff of all batches.
    async fn end_backoff(&self, now: Timestamp) -> Result<()>;
    /// Saves the state of a request in progress at a provider; replaces an earlier state.
    async fn save_job(&self, claim: &Claim, line: u64, job: Job) -> Result<()>;
    /// Returns the saved state of a request.
    async fn job(&self, claim: &Claim, line: u64) -> Result<Option<Job>>;
    /// Deletes the saved state of a request that starts again.
    async fn delete_job(&self, claim: &Claim, line: u64) -> Result<()>;
    /// Returns true if the batch has any saved state.
    async fn has_jobs(&self, claim: &Claim) -> Result<bool>;
    /// Returns the input file, if it existed when the batch was created.
    ///
    /// A later deletion of the file changes nothing.
    async fn input_file(&self, claim: &Claim) -> Result<Option<FileRecord>>;
    /// Changes `Validating` to `Failed`, or `Cancelling` to `Cancelled`.
    async fn fail(
        &self,
        claim: &Claim,
        errors: Vec<BatchError>,
        by: Vec<PluginVersion>,
        at: Timestamp,
    ) -> Result<()>;
    /// Changes `Validating` to `InProgress` and stores the results of validation.
    ///
    /// A batch in `Cancelling` keeps its status. The batch is released, to be claimed in its new
    /// lane. A batch that would exceed the enqueued tokens of its project waits if `may_wait`, and
    /// if it could ever start; otherwise nothing changes.
    async fn start_execution(
        &self,
        claim: &Claim,
        found: Validated,
        at: Timestamp,
        may_wait: bool,
    ) -> Result<Started>;
    /// Starts a batch that waits in [`Lane::Admit`] if the limits of its project allow it now, or
    /// if its window has ended; otherwise releases it until `retry_at`. A batch that alone exceeds
    /// a limit could never start and does not change.
    async fn admit(&self, claim: &Claim, at: Timestamp, retry_at: Timestamp) -> Result<Started>;
    /// Inserts results, their counts, their usage and the plugins that served them, in one
    /// transaction.
    ///
    /// A line that has a result already keeps it.
    async fn insert_results(
        &self,
        claim: &Claim,
        rows: Arc<Vec<ResultRow>>,
        by: Vec<PluginVersion>,
        at: Timestamp,
    ) -> Result<()>;
    /// Counts the usage of requests that belong to no batch, all or none of them.
    async fn record_online_usage(
        &self,
        tenant: &TenantId,
        usage: Vec<OnlineUsage>,
        at: Timestamp,
    ) -> Result<()>;
    /// Returns the plugins that a batch used, in order of first use, or `None` if there is no such
    /// batch.
    async fn plugin_versions(
        &self,
        tenant: &TenantId,
        id: &BatchId,
    ) -> Result<Option<Vec<PluginVersion>>>;
    /// Returns up to `limit` lines after `after` that have a result, in order.
    async fn recorded_lines(&self, claim: &Claim, after: u64, limit: usize) -> Result<Vec<u64>>;
    /// Changes `InProgress` to `Finalizing`; a batch in `Cancelling` keeps its status.
    async fn start_finalizing(&self, claim: &Claim, at: Timestamp) -> Result<()>;
    /// Returns the results of the lines after `after`, in order, of up to `bytes` bytes in total.
    async fn results(&self, claim: &Claim, after: u64, bytes: usize) -> Result<Results>;
    /// Ends the batch and inserts its result files, in one transaction.
    ///
    /// Fails with [`StoreError::CancelledFirst`] if a batch in `Cancelling` is to end as expired.
    async fn finish(&self, claim: &Claim, finish: Finish) -> Result<()>;
    /// Removes up to `limit` results of ended batches, whose files contain them; returns true if
    /// more may remain.
    async fn discard_results(&self, limit: usize) -> Result<bool>;
    /// Returns up to `limit` batches that ended longer ago than the lifetime of their project, or
    /// without one than `lifetime`, and whose files are removed.
    async fn removable_batches(
        &self,
        now: Timestamp,
        lifetime: Duration,
        limit: usize,
    ) -> Result<Vec<BatchKey>>;
    /// Deletes batches.
    async fn delete_batches(&self, batches: Vec<BatchKey>) -> Result<()>;
    /// Returns the numbers of open batches, and up to `limit` executing batches with a deadline,
    /// those with the earliest deadline first.
    async fn overview(&self, now: Timestamp, limit: usize) -> Result<Overview>;
    /// Returns the progress of batches of tenants: of each the oldest that have not ended, up to
    /// `limit`, and of all the last that have ended since a time, up to [`MAX_ENDED`].
    async fn batch_progress(
        &self,
        tenants: Vec<TenantId>,
        ended_since: Option<Timestamp>,
        limit: usize,
    ) -> Result<Vec<BatchProgress>>;
    /// Returns the size of the database and the space of its file system.
    async fn disk(&self) -> Result<Disk>;
    /// Returns some free pages to the file system; returns true if more may remain.
    async fn compact(&self) -> Result<bool>;
    /// Ends all reads and writes, then copies the write-ahead log into the database.
    ///
    /// Later calls fail with [`StoreError::Closed`].
    async fn close(&self);
    /// Tests that the database can be written and read.
    async fn probe(&self, now: Timestamp) -> Result<()>;
    /// Tests that the database can be read.
    async fn probe_read(&self) -> Result<()>;
    /// Returns the newest files that clients can see, as keys of their objects.
    async fn newest_files(&self, now: Timestamp, limit: usize) -> Result<Vec<ObjectKey>>;
}
