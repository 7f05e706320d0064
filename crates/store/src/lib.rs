//! Durable state: metadata and results in a database, file contents in an object store.
//!
//! **Durability.** [`Store`] consists of whole operations: each operation happens completely or not
//! at all, and is on disk when it returns.
//! Another database can therefore replace SQLite.
//! A file has a record in the database and an object in the object store, and no transaction spans
//! both.
//! The host registers an object before it writes the bytes ([`Store::begin_object`]), and the
//! commit of the file's record removes the registration.
//! After a crash, the registrations of the dead process name every object to remove.
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

mod blobs;
mod private;
mod sqlite;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

pub use blobs::{BlobWriter, Blobs, PIECE};
pub use private::{umask, users_mode};
pub use sqlite::SqliteStore;

use batchwright_domain::clock::Timestamp;

/// Error of the database or the object store.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    /// Unusable data folder.
    #[error("the data folder {folder}: {message}")]
    Folder {
        /// Path of the folder.
        folder: String,
        /// Cause and remedy.
        message: String,
    },
    /// Full disk; message of the database or the object store.
    #[error("the disk is full; free some space and try again ({0})")]
    Full(String),
    /// Failure of the database; its message.
    #[error("the database failed: {0}")]
    Database(String),
    /// Failure of the object store; its message.
    #[error("the object store failed: {0}")]
    Objects(String),
    /// Missing object, or object that is shorter than its record says; its description.
    #[error("data is missing from the object store: {0}")]
    Missing(String),
    /// Obsolete claim: the batch was claimed again.
    #[error("another worker has claimed this batch")]
    Fenced,
    /// Cancellation by a client before the batch could end as expired.
    #[error("the batch was cancelled meanwhile")]
    Overtaken,
    /// Request without a result in a batch that is about to end; nothing was written.
    #[error("not every line has a result")]
    Incomplete,
    /// Closed store.
    #[error("the server is shutting down")]
    Closed,
    /// Unavailable dependency other than the store; the cause.
    #[error("the server is not ready: {0}")]
    NotReady(String),
}

/// Result of an operation of the store.
pub type Result<T> = std::result::Result<T, StoreError>;

/// Metadata of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileRecord {
    /// Id, unique for its tenant.
    pub id: String,
    /// Size in bytes.
    pub bytes: u64,
    /// Time of creation.
    pub created_at: Timestamp,
    /// Time from which clients no longer see the file.
    pub expires_at: Option<Timestamp>,
    /// Name that the client gave.
    pub filename: String,
    /// Purpose as the API names it.
    pub purpose: String,
}

/// Sort order of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Descending by creation.
    NewestFirst,
    /// Ascending by creation.
    OldestFirst,
}

/// Page of a list.
#[derive(Debug)]
pub struct Page<T> {
    /// Entries in list order.
    pub items: Vec<T>,
    /// True if entries follow this page.
    pub has_more: bool,
}

/// Page of a list, or the report that the `after` id is unknown.
#[derive(Debug)]
pub enum Paged<T> {
    /// Page of entries.
    Page(Page<T>),
    /// Unknown id to start after.
    UnknownAfter,
}

/// Status of a batch, as the API names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Validation of the input file, or wait for it.
    Validating,
    /// End with errors of the batch.
    Failed,
    /// Execution of requests.
    InProgress,
    /// Copy of the results into the output and error files.
    Finalizing,
    /// End with a result for every request.
    Completed,
    /// End because the completion window ended.
    Expired,
    /// Cancellation by a client; the worker has not ended the batch yet.
    Cancelling,
    /// End after a cancellation by a client.
    Cancelled,
}

impl Status {
    /// All statuses.
    pub const ALL: [Self; 8] = [
        Self::Validating,
        Self::Failed,
        Self::InProgress,
        Self::Finalizing,
        Self::Completed,
        Self::Expired,
        Self::Cancelling,
        Self::Cancelled,
    ];

    /// Returns the name in the API and in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Validating => "validating",
            Self::Failed => "failed",
            Self::InProgress => "in_progress",
            Self::Finalizing => "finalizing",
            Self::Completed => "completed",
            Self::Expired => "expired",
            Self::Cancelling => "cancelling",
            Self::Cancelled => "cancelled",
        }
    }

    /// Returns true if the batch has ended.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Failed | Self::Completed | Self::Expired | Self::Cancelled)
    }
}

/// Error of an input file or of one of its lines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchError {
    /// Machine-readable code.
    pub code: String,
    /// Message for the client.
    pub message: String,
    /// Parameter that has the error.
    pub param: Option<String>,
    /// Line of the input file, from 1.
    pub line: Option<u64>,
}

/// Request counts of a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// All requests; 0 before validation ends.
    pub total: u64,
    /// Requests with a result in the output file.
    pub completed: u64,
    /// Requests with a result in the error file.
    pub failed: u64,
}

impl Counts {
    /// Returns true if every request has a result.
    pub fn is_whole(&self) -> bool {
        self.completed.saturating_add(self.failed) == self.total
    }
}

/// Token counts of a request, or of all requests of a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TokenUsage {
    /// Input tokens, cached ones included.
    pub input: u64,
    /// Input tokens that the provider read from its cache.
    pub cached_input: u64,
    /// Output tokens, reasoning tokens included.
    pub output: u64,
    /// Output tokens that the model spent on reasoning.
    pub reasoning: u64,
}

/// Times at which a batch entered its statuses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    /// Time of [`Status::InProgress`].
    pub in_progress_at: Option<Timestamp>,
    /// Time of [`Status::Finalizing`].
    pub finalizing_at: Option<Timestamp>,
    /// Time of [`Status::Completed`].
    pub completed_at: Option<Timestamp>,
    /// Time of [`Status::Failed`].
    pub failed_at: Option<Timestamp>,
    /// Time of [`Status::Expired`].
    pub expired_at: Option<Timestamp>,
    /// Time of [`Status::Cancelling`].
    pub cancelling_at: Option<Timestamp>,
    /// Time of [`Status::Cancelled`].
    pub cancelled_at: Option<Timestamp>,
}

/// Key-value pairs that the client gave.
pub type Metadata = BTreeMap<String, String>;

/// Batch as a client requests it.
#[derive(Clone, Debug)]
pub struct NewBatch {
    /// Id, unique for its tenant.
    pub id: String,
    /// Path of the API endpoint that every request names.
    pub endpoint: String,
    /// Id of the input file.
    pub input_file_id: String,
    /// Completion window as the client wrote it.
    pub completion_window: String,
    /// Metadata of the client.
    pub metadata: Option<Metadata>,
    /// Time of creation.
    pub created_at: Timestamp,
    /// End of the completion window.
    pub expires_at: Timestamp,
    /// Lifetime of the result files, from their creation.
    pub output_lifetime: Option<Duration>,
}

/// Idempotency key of a creation, which lets a client retry the creation.
#[derive(Clone, Debug)]
pub struct Idempotency {
    /// Key that the client sent.
    pub key: String,
    /// Digest of the parameters; the same key with another digest is a conflict.
    pub fingerprint: [u8; 32],
}

/// Outcome of the creation of a batch.
#[derive(Debug)]
pub enum Created {
    /// Inserted batch.
    New,
    /// Batch of an earlier creation with the same key and parameters.
    Before(Box<BatchRecord>),
    /// Conflict with an earlier creation: same key, other parameters.
    Conflict,
}

/// Batch as it is stored.
#[derive(Clone, Debug)]
pub struct BatchRecord {
    /// Batch as the client requested it.
    pub new: NewBatch,
    /// Current status.
    pub status: Status,
    /// Model of all requests, if they share one.
    pub model: Option<String>,
    /// First [`FIRST_ERRORS`] errors, and a notice if there are more.
    pub errors: Vec<BatchError>,
    /// Id of the file with the completed requests.
    pub output_file_id: Option<String>,
    /// Id of the file with the failed requests.
    pub error_file_id: Option<String>,
    /// Times of the status changes.
    pub times: Times,
    /// Request counts.
    pub counts: Counts,
    /// Token counts of all results.
    pub usage: TokenUsage,
    /// Cause of the latest backoff; `None` after any later result.
    pub waits_for: Option<WaitsFor>,
}

/// Cause for which a batch waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WaitsFor {
    /// Sentence for the client.
    pub cause: String,
    /// Time since which the batch waits.
    pub since: Timestamp,
    /// Time of the next attempt.
    pub next: Timestamp,
}

/// Position in its lane to which a claimed batch is released.
#[derive(Clone, Debug)]
pub enum Release {
    /// Position before the claim.
    AsItWas,
    /// Behind the batches that have waited since an earlier time.
    Turn(Timestamp),
    /// Backoff until this time, for this cause.
    Rest(Timestamp, Option<WaitsFor>),
}

/// Request in progress at a provider that the host polls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// Name of the plugin that wrote the state.
    pub plugin: String,
    /// State of the plugin, opaque to the host.
    pub state: Vec<u8>,
}

/// Maximum number of errors in a [`BatchRecord`], without the notice that there are more.
pub const FIRST_ERRORS: usize = 5;

impl BatchRecord {
    /// Returns true if the batch has more errors than the record.
    pub fn has_more_errors(&self) -> bool {
        self.errors.len() > FIRST_ERRORS
    }
}

/// Queue of the batches that need the same work next.
///
/// Batches compete within a lane and not between lanes: a batch that waits for one provider must
/// not delay a batch that waits for another provider, or for none.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Lane {
    /// Validation of the input file.
    Validate,
    /// Execution of requests that go to these plugins.
    Execute(BTreeSet<String>),
    /// Finalizing; no request is sent any more.
    Finish,
}

/// Batch that nobody has claimed.
#[derive(Clone, Debug)]
pub struct Waiting {
    /// Lane in which the batch waits.
    pub lane: Lane,
    /// Time of creation or of the last turn.
    pub since: Timestamp,
    /// Key of the batch.
    pub key: BatchKey,
}

/// Right to work on a batch until the batch is released or claimed again.
#[derive(Clone, Debug)]
pub struct Claim {
    /// Tenant of the batch.
    pub tenant: String,
    /// Id of the batch.
    pub batch_id: String,
    /// Lane of the batch at the time of the claim.
    pub lane: Lane,
    /// Key of the batch.
    pub key: BatchKey,
    /// Number of the claim among those of the batch.
    pub fence: i64,
}

/// Outcome of a request, which selects its result file and its count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Output file; counts as completed.
    Completed,
    /// Error file; counts as failed.
    Failed,
}

/// Result of one request.
#[derive(Clone, Debug)]
pub struct ResultRow {
    /// Physical line of the input file, from 1.
    pub line: u64,
    /// Outcome of the request.
    pub ending: Ending,
    /// Line of the result file, without its line end.
    pub payload: Vec<u8>,
    /// Token counts; zero in results that are read back.
    pub usage: TokenUsage,
}

/// Facts about a batch that passed validation.
#[derive(Clone, Debug)]
pub struct Validated {
    /// Number of requests.
    pub total: u64,
    /// Model of all requests, if they share one.
    pub model: Option<String>,
    /// Names of the plugins that the requests go to.
    pub plugins: BTreeSet<String>,
    /// Validator plugins that accepted the requests.
    pub judged_by: Vec<ServedBy>,
}

/// Exact version of a plugin that a batch used.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ServedBy {
    /// Name of the plugin.
    pub name: String,
    /// Kind of the plugin, such as adapter or validator.
    pub kind: String,
    /// Version that the plugin reports.
    pub version: String,
    /// Digest of the component, in hexadecimal.
    pub sha256: String,
}

/// Key of a batch in its store, which alone can read it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BatchKey(Arc<[u8]>);

impl BatchKey {
    /// Creates a key in the encoding of a store.
    pub fn new(encoded: &[u8]) -> Self {
        Self(encoded.into())
    }

    /// Returns the encoded key.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// Page of the results of a batch.
#[derive(Debug, Default)]
pub struct Results {
    /// Results in line order.
    pub rows: Vec<ResultRow>,
    /// Bytes of the next result, if that result alone exceeds the limit; `rows` is empty then.
    pub too_large: Option<usize>,
}

/// End of a batch.
#[derive(Clone, Debug)]
pub struct Finish {
    /// `Completed`, `Cancelled`, `Expired` or `Failed`.
    pub status: Status,
    /// Errors of a failed batch.
    pub errors: Vec<BatchError>,
    /// File of the completed requests.
    pub output: Option<FileRecord>,
    /// File of the failed requests.
    pub error: Option<FileRecord>,
    /// Time of the end.
    pub at: Timestamp,
}

/// Outcome of a request to cancel.
#[derive(Debug)]
pub enum Cancel {
    /// Batch in `Cancelling` or `Cancelled`, from this request or an earlier one.
    Accepted(Box<BatchRecord>),
    /// Final status of a batch that had already ended.
    TooLate(Status),
    /// Unknown batch.
    Unknown,
}

/// Database of files, batches and results.
///
/// Each method is one transaction. Methods that take a [`Claim`] and change the batch fail with
/// [`StoreError::Fenced`] if the batch was claimed again.
#[async_trait]
pub trait Store: Send + Sync {
    /// Inserts the record of a file and removes the registration of its object.
    async fn insert_file(&self, tenant: &str, file: FileRecord) -> Result<()>;
    /// Returns a file that is neither deleted nor expired.
    async fn file(&self, tenant: &str, id: &str, now: Timestamp) -> Result<Option<FileRecord>>;
    /// Lists the files that are neither deleted nor expired.
    async fn files(&self, tenant: &str, query: FileQuery) -> Result<Paged<FileRecord>>;
    /// Marks a file as deleted; returns false if there is no such file.
    ///
    /// The object stays while a batch reads it.
    async fn delete_file(&self, tenant: &str, id: &str, now: Timestamp) -> Result<bool>;
    /// Registers an object before its bytes are written, so that a crash leaves no unknown object.
    async fn begin_object(&self, tenant: &str, id: &str) -> Result<()>;
    /// Returns objects that an earlier process registered, as tenant and id.
    async fn abandoned_objects(&self, limit: usize) -> Result<Vec<(String, String)>>;
    /// Returns true if an object is registered and has no record yet.
    ///
    /// Records whose insertion is already queued count as inserted.
    async fn is_pending(&self, tenant: &str, id: &str) -> Result<bool>;
    /// Removes the registration of an object that was deleted.
    async fn object_removed(&self, tenant: &str, id: &str) -> Result<()>;
    /// Returns deleted and expired files that no running batch reads, as tenant and id.
    async fn garbage(&self, now: Timestamp, limit: usize) -> Result<Vec<(String, String)>>;
    /// Turns the record of a file into a tombstone after its object was deleted.
    ///
    /// A list can still start after the id of a tombstone.
    async fn file_removed(&self, tenant: &str, id: &str) -> Result<()>;
    /// Removes up to `limit` tombstones of files deleted or expired before `gone_before`; returns
    /// true if more may remain.
    async fn forget_files(&self, gone_before: Timestamp, limit: usize) -> Result<bool>;

    /// Inserts a batch, at most one for each idempotency key, even under concurrent requests.
    async fn create_batch(
        &self,
        tenant: &str,
        new: NewBatch,
        idempotency: Option<Idempotency>,
    ) -> Result<Created>;
    /// Returns a batch with its first errors.
    async fn batch(&self, tenant: &str, id: &str) -> Result<Option<BatchRecord>>;
    /// Returns all errors of a batch.
    async fn batch_errors(&self, tenant: &str, id: &str) -> Result<Vec<BatchError>>;
    /// Lists batches, newest first, each with its first errors.
    ///
    /// The page ends at `limit` entries, or when its entries reach about `bytes` bytes.
    async fn batches(
        &self,
        tenant: &str,
        after: Option<String>,
        limit: usize,
        bytes: usize,
    ) -> Result<Paged<BatchRecord>>;
    /// Sets a batch that has not ended to `Cancelling`.
    async fn request_cancel(&self, tenant: &str, id: &str, now: Timestamp) -> Result<Cancel>;

    /// Returns the oldest waiting batch of each lane, and the batch that expired first.
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
    /// Extends the lease to `until`.
    async fn renew(&self, claim: &Claim, until: Timestamp) -> Result<()>;
    /// Releases a claimed batch.
    async fn release(&self, claim: &Claim, how: Release) -> Result<()>;
    /// Ends the backoff of all batches.
    async fn wake(&self, now: Timestamp) -> Result<()>;
    /// Saves the state of a request in progress at a provider; replaces an earlier state.
    async fn keep_job(&self, claim: &Claim, line: u64, job: Job) -> Result<()>;
    /// Returns the saved state of a request.
    async fn job(&self, claim: &Claim, line: u64) -> Result<Option<Job>>;
    /// Deletes the saved state of a request that starts again.
    async fn drop_job(&self, claim: &Claim, line: u64) -> Result<()>;
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
        by: Vec<ServedBy>,
        at: Timestamp,
    ) -> Result<()>;
    /// Changes `Validating` to `InProgress` and stores the results of validation.
    ///
    /// A batch in `Cancelling` keeps its status. The batch is released, to be claimed in its new
    /// lane.
    async fn start_execution(&self, claim: &Claim, found: Validated, at: Timestamp) -> Result<()>;
    /// Inserts results, their counts and the plugins that served them, in one transaction.
    ///
    /// A line that has a result already keeps it.
    async fn record(
        &self,
        claim: &Claim,
        rows: Arc<Vec<ResultRow>>,
        by: Vec<ServedBy>,
    ) -> Result<()>;
    /// Returns the plugins that a batch used, in order of first use, or `None` if there is no such
    /// batch.
    async fn served_by(&self, tenant: &str, id: &str) -> Result<Option<Vec<ServedBy>>>;
    /// Returns up to `limit` lines after `after` that have a result, in order.
    async fn recorded_lines(&self, claim: &Claim, after: u64, limit: usize) -> Result<Vec<u64>>;
    /// Changes `InProgress` to `Finalizing`; a batch in `Cancelling` keeps its status.
    async fn start_finalizing(&self, claim: &Claim, at: Timestamp) -> Result<()>;
    /// Returns the results of the lines after `after`, in order, of up to `bytes` bytes in total.
    async fn results(&self, claim: &Claim, after: u64, bytes: usize) -> Result<Results>;
    /// Ends the batch and inserts its result files, in one transaction.
    ///
    /// Fails with [`StoreError::Overtaken`] if a batch in `Cancelling` is to end as expired.
    async fn finish(&self, claim: &Claim, finish: Finish) -> Result<()>;
    /// Removes up to `limit` results of ended batches, whose files contain them; returns true if
    /// more may remain.
    async fn discard_results(&self, limit: usize) -> Result<bool>;
    /// Returns up to `limit` batches that ended before `ended_before` and whose files are removed.
    async fn forgettable_batches(
        &self,
        ended_before: Timestamp,
        limit: usize,
    ) -> Result<Vec<BatchKey>>;
    /// Deletes batches.
    async fn forget_batches(&self, batches: Vec<BatchKey>) -> Result<()>;
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
    /// Returns the newest files that clients can see, as tenant and id.
    async fn newest_files(&self, now: Timestamp, limit: usize) -> Result<Vec<(String, String)>>;
}

/// Filter, order and range of a list of files.
#[derive(Clone, Debug)]
pub struct FileQuery {
    /// Purpose of the files; `None` for all.
    pub purpose: Option<String>,
    /// Sort order.
    pub order: Order,
    /// Id of the file after which the page starts.
    pub after: Option<String>,
    /// Maximum number of entries.
    pub limit: usize,
    /// Current time, which decides which files have expired.
    pub now: Timestamp,
}
