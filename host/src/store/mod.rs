//! What lasts: metadata and results in a database, the bytes of files in an object store.
//!
//! [`Store`] is made of whole operations, each of which happens or does not, so that another database can take SQLite's place. Work on a
//! batch is claimed with a lease and a fencing number: a holder whose lease was taken over can change nothing any more.
//!
//! Architecture invariant: this room knows no JSON of the API and no plugins. The tenant is part of every key, path and query.

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

use crate::clock::Timestamp;

#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    #[error("the data folder {folder}: {message}")]
    Folder { folder: String, message: String },
    #[error("the disk is full; free some space and try again ({0})")]
    Full(String),
    #[error("the database failed: {0}")]
    Database(String),
    #[error("the object store failed: {0}")]
    Objects(String),
    #[error("the object is gone: {0}")]
    Missing(String),
    /// Somebody else holds the batch now.
    #[error("another worker has taken over this batch")]
    Fenced,
    /// A client cancelled the batch that was about to end in another way.
    #[error("the batch was cancelled meanwhile")]
    Overtaken,
    /// Found before anything is made of it.
    #[error("not every line has a result")]
    Incomplete,
    #[error("the server is shutting down")]
    Closed,
    /// The store could do it, but something else that the work needs is not there.
    #[error("the server is not ready: {0}")]
    NotReady(String),
}

pub type Result<T> = std::result::Result<T, StoreError>;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileRecord {
    pub id: String,
    pub bytes: u64,
    pub created_at: Timestamp,
    pub expires_at: Option<Timestamp>,
    pub filename: String,
    pub purpose: String,
}

/// Which way a list runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    NewestFirst,
    OldestFirst,
}

/// A page of a list.
#[derive(Debug)]
pub struct Page<T> {
    pub items: Vec<T>,
    pub has_more: bool,
}

/// A page, or that the item to begin after is not there.
#[derive(Debug)]
pub enum Paged<T> {
    Page(Page<T>),
    UnknownAfter,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    Validating,
    Failed,
    InProgress,
    Finalizing,
    Completed,
    Expired,
    Cancelling,
    Cancelled,
}

impl Status {
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

    pub fn is_final(self) -> bool {
        matches!(self, Self::Failed | Self::Completed | Self::Expired | Self::Cancelled)
    }
}

/// A fault of the input, or of one of its lines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchError {
    pub code: String,
    pub message: String,
    pub param: Option<String>,
    pub line: Option<u64>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub total: u64,
    pub completed: u64,
    pub failed: u64,
}

impl Counts {
    /// Whether every request has ended.
    pub fn is_whole(&self) -> bool {
        self.completed.saturating_add(self.failed) == self.total
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TokenUsage {
    pub input: u64,
    pub cached_input: u64,
    pub output: u64,
    pub reasoning: u64,
}

/// When a batch came into each of its states.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    pub in_progress_at: Option<Timestamp>,
    pub finalizing_at: Option<Timestamp>,
    pub completed_at: Option<Timestamp>,
    pub failed_at: Option<Timestamp>,
    pub expired_at: Option<Timestamp>,
    pub cancelling_at: Option<Timestamp>,
    pub cancelled_at: Option<Timestamp>,
}

pub type Metadata = BTreeMap<String, String>;

/// A batch as a client asks for it.
#[derive(Clone, Debug)]
pub struct NewBatch {
    pub id: String,
    pub endpoint: String,
    pub input_file_id: String,
    pub completion_window: String,
    pub metadata: Option<Metadata>,
    pub created_at: Timestamp,
    pub expires_at: Timestamp,
    /// How long the output files are kept after they are made.
    pub output_lifetime: Option<Duration>,
}

/// A key that a client sends with a creation, so that it can be repeated.
#[derive(Clone, Debug)]
pub struct Idempotency {
    pub key: String,
    /// A digest of the parameters: the same key with others is a conflict.
    pub fingerprint: [u8; 32],
}

/// What the creation of a batch came to.
#[derive(Debug)]
pub enum Created {
    New,
    /// The batch that was made before with the same key and parameters.
    Before(Box<BatchRecord>),
    /// The key was used before, with other parameters.
    Conflict,
}

#[derive(Clone, Debug)]
pub struct BatchRecord {
    pub new: NewBatch,
    pub status: Status,
    pub model: Option<String>,
    pub errors: Vec<BatchError>,
    pub output_file_id: Option<String>,
    pub error_file_id: Option<String>,
    pub times: Times,
    pub counts: Counts,
    pub usage: TokenUsage,
    /// What its requests waited for when it was given back to rest, unless something was answered since.
    pub waits_for: Option<WaitsFor>,
}

/// What a batch waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WaitsFor {
    /// One sentence for the client.
    pub cause: String,
    pub since: Timestamp,
    /// When it is tried again.
    pub next: Timestamp,
}

/// How a batch is given back.
#[derive(Clone, Debug)]
pub enum Release {
    /// With its place in the order.
    AsItWas,
    /// It has had its turn: behind those that wait since before.
    Turn(Timestamp),
    /// Nothing can be done before then.
    Rest(Timestamp, Option<WaitsFor>),
}

/// A request that a provider works on, and that is asked about now and then.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// The name of the plugin whose state it is.
    pub plugin: String,
    pub state: Vec<u8>,
}

/// Errors that a batch is given with where not all are asked for.
pub const FIRST_ERRORS: usize = 5;

impl BatchRecord {
    /// Whether it has more errors than it was given with. The last of them says so.
    pub fn has_more_errors(&self) -> bool {
        self.errors.len() > FIRST_ERRORS
    }
}

/// What has to be done for a batch next. Batches of one lane compete for a place, those of different lanes do not: what waits for a
/// provider must not hold up what waits for another, or for none.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Lane {
    Validate,
    /// Its requests go to these plugins.
    Execute(BTreeSet<String>),
    /// Nothing is to be sent any more.
    Finish,
}

/// A batch that nobody works on.
#[derive(Clone, Debug)]
pub struct Waiting {
    pub lane: Lane,
    /// When it was created, or had its last turn.
    pub since: Timestamp,
    key: BatchKey,
}

impl Waiting {
    #[cfg(test)]
    pub fn of(lane: Lane, since: Timestamp) -> Self {
        Self { lane, since, key: BatchKey { tenant: 0, batch: 0 } }
    }
}

/// The right to work on a batch until the lease ends or is taken over.
#[derive(Clone, Debug)]
pub struct Claim {
    pub tenant: String,
    pub batch_id: String,
    /// Where it stood when it was claimed.
    pub lane: Lane,
    tenant_key: i64,
    batch_key: i64,
    fence: i64,
}

/// Which of the two files a line ends in, and how it counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Output file; completed.
    Completed,
    /// Error file; failed.
    Failed,
}

/// How one request ended: a line of a result file, without its line end.
#[derive(Clone, Debug)]
pub struct ResultRow {
    /// Physical line of the input file, from 1.
    pub line: u64,
    pub ending: Ending,
    pub payload: Vec<u8>,
    pub usage: TokenUsage,
}

/// What validation found out about a batch that it let through.
#[derive(Clone, Debug)]
pub struct Validated {
    pub total: u64,
    /// The model of all requests, if it is one.
    pub model: Option<String>,
    /// The plugins that its requests go to.
    pub plugins: BTreeSet<String>,
    pub judged_by: Vec<ServedBy>,
}

/// A plugin that had a part in a batch, as it was then.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ServedBy {
    pub name: String,
    pub kind: String,
    pub version: String,
    pub sha256: String,
}

/// A batch in the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchKey {
    tenant: i64,
    batch: i64,
}

/// Some results of a batch.
#[derive(Debug, Default)]
pub struct Results {
    pub rows: Vec<ResultRow>,
    /// The size of the next one, if it alone is larger than what was asked for; there are no rows then.
    pub too_large: Option<usize>,
}

/// How a batch ends.
#[derive(Clone, Debug)]
pub struct Finish {
    /// `Completed`, `Cancelled`, `Expired` or `Failed`.
    pub status: Status,
    /// Why it failed, if it did.
    pub errors: Vec<BatchError>,
    pub output: Option<FileRecord>,
    pub error: Option<FileRecord>,
    pub at: Timestamp,
}

/// What a request to cancel found.
#[derive(Debug)]
pub enum Cancel {
    /// The batch is being cancelled or was before.
    Accepted(Box<BatchRecord>),
    /// It had ended in another way.
    TooLate(Status),
    Unknown,
}

#[async_trait]
pub trait Store: Send + Sync {
    async fn insert_file(&self, tenant: &str, file: FileRecord) -> Result<()>;
    /// A file that is neither deleted nor expired.
    async fn file(&self, tenant: &str, id: &str, now: Timestamp) -> Result<Option<FileRecord>>;
    async fn files(&self, tenant: &str, query: FileQuery) -> Result<Paged<FileRecord>>;
    /// Whether there was such a file. Its bytes stay while a batch reads them.
    async fn delete_file(&self, tenant: &str, id: &str, now: Timestamp) -> Result<bool>;
    /// Takes note, before it is written, of an object that the record of a file will lead to.
    async fn begin_object(&self, tenant: &str, id: &str) -> Result<()>;
    /// Objects that a process had begun that is gone, as tenant and id.
    async fn abandoned_objects(&self, limit: usize) -> Result<Vec<(String, String)>>;
    /// Whether an object that was begun has no record yet, those on their way to the store included.
    async fn is_pending(&self, tenant: &str, id: &str) -> Result<bool>;
    /// Takes note that an object which no record leads to is gone.
    async fn object_removed(&self, tenant: &str, id: &str) -> Result<()>;
    /// Files deleted or expired that no running batch reads, as tenant and id.
    async fn garbage(&self, now: Timestamp, limit: usize) -> Result<Vec<(String, String)>>;
    /// Takes note that a file's bytes are gone. Its id is remembered for a while, so that a list can go on after it.
    async fn file_removed(&self, tenant: &str, id: &str) -> Result<()>;
    /// Removes what is remembered of some files that went before this; whether there may be more.
    async fn forget_files(&self, gone_before: Timestamp, limit: usize) -> Result<bool>;

    /// One creation for one idempotency key, also when two come at once.
    async fn create_batch(
        &self,
        tenant: &str,
        new: NewBatch,
        idempotency: Option<Idempotency>,
    ) -> Result<Created>;
    /// A batch, with the first few of its errors.
    async fn batch(&self, tenant: &str, id: &str) -> Result<Option<BatchRecord>>;
    /// All errors of a batch.
    async fn batch_errors(&self, tenant: &str, id: &str) -> Result<Vec<BatchError>>;
    /// Newest first. The page ends before the limit where its entries take more than so many bytes; of the errors of each entry there are
    /// the first few.
    async fn batches(
        &self,
        tenant: &str,
        after: Option<String>,
        limit: usize,
        bytes: usize,
    ) -> Result<Paged<BatchRecord>>;
    async fn request_cancel(&self, tenant: &str, id: &str, now: Timestamp) -> Result<Cancel>;

    /// Of each lane the batch that waits for longest, among those that have not ended and that nobody holds; never one that this process
    /// holds itself.
    async fn waiting(&self, now: Timestamp) -> Result<Vec<Waiting>>;
    /// Claims a batch, if nobody has claimed it meanwhile.
    async fn claim(
        &self,
        waiting: &Waiting,
        now: Timestamp,
        until: Timestamp,
    ) -> Result<Option<Claim>>;
    async fn renew(&self, claim: &Claim, until: Timestamp) -> Result<()>;
    /// Gives a batch back.
    async fn release(&self, claim: &Claim, how: Release) -> Result<()>;
    /// Ends the rest of all batches.
    async fn wake(&self, now: Timestamp) -> Result<()>;
    /// Keeps the state of a request that a provider works on, in place of the one before.
    async fn keep_job(&self, claim: &Claim, line: u64, job: Job) -> Result<()>;
    async fn job(&self, claim: &Claim, line: u64) -> Result<Option<Job>>;
    /// Forgets a job, as the request begins anew.
    async fn drop_job(&self, claim: &Claim, line: u64) -> Result<()>;
    /// Whether any state of a batch's requests is kept.
    async fn has_jobs(&self, claim: &Claim) -> Result<bool>;
    /// The input file, if it was there when the batch was created: deleting it later does no harm.
    async fn input_file(&self, claim: &Claim) -> Result<Option<FileRecord>>;
    /// `Validating` to `Failed`.
    async fn fail(
        &self,
        claim: &Claim,
        errors: Vec<BatchError>,
        by: Vec<ServedBy>,
        at: Timestamp,
    ) -> Result<()>;
    /// `Validating` to `InProgress`; a batch that is being cancelled keeps its status and gets its counts. The batch is given back, to be claimed
    /// in its new lane when its turn comes.
    async fn start_execution(&self, claim: &Claim, found: Validated, at: Timestamp) -> Result<()>;
    /// Adds results, counts them, and remembers who served them, all at once. A line that has a result keeps the first.
    async fn record(
        &self,
        claim: &Claim,
        rows: Arc<Vec<ResultRow>>,
        by: Vec<ServedBy>,
    ) -> Result<()>;
    /// The plugins that served a batch, in the order of their first part in it; none if there is no such batch.
    async fn served_by(&self, tenant: &str, id: &str) -> Result<Option<Vec<ServedBy>>>;
    /// Lines that have a result, in order, beyond `after`.
    async fn recorded_lines(&self, claim: &Claim, after: u64, limit: usize) -> Result<Vec<u64>>;
    /// `InProgress` to `Finalizing`; a batch that is being cancelled keeps its status.
    async fn start_finalizing(&self, claim: &Claim, at: Timestamp) -> Result<()>;
    /// Results in order, beyond `after`, of so many bytes in all.
    async fn results(&self, claim: &Claim, after: u64, bytes: usize) -> Result<Results>;
    /// Ends the batch and gives it its files, all at once. One that was cancelled does not end as expired: [`StoreError::Overtaken`].
    async fn finish(&self, claim: &Claim, finish: Finish) -> Result<()>;
    /// Removes some results of ended batches, whose files hold them; whether there may be more.
    async fn discard_results(&self, limit: usize) -> Result<bool>;
    /// Some batches that ended before this and whose files are gone.
    async fn forgettable_batches(
        &self,
        ended_before: Timestamp,
        limit: usize,
    ) -> Result<Vec<BatchKey>>;
    async fn forget_batches(&self, batches: Vec<BatchKey>) -> Result<()>;
    /// Gives the disk back some of the space that is not used any more; whether there may be more.
    async fn compact(&self) -> Result<bool>;
    /// Puts everything into its place. Nothing can be written any more.
    async fn close(&self);
    /// Whether it can read and write; an error says why not.
    async fn probe(&self, now: Timestamp) -> Result<()>;
    /// Whether it can read.
    async fn probe_read(&self) -> Result<()>;
    /// Files that were recorded last, as tenant and id.
    async fn newest_files(&self, now: Timestamp, limit: usize) -> Result<Vec<(String, String)>>;
}

/// Which files to list.
#[derive(Clone, Debug)]
pub struct FileQuery {
    pub purpose: Option<String>,
    pub order: Order,
    pub after: Option<String>,
    pub limit: usize,
    pub now: Timestamp,
}
