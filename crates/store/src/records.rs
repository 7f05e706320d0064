//! Records that the store keeps, and the arguments and outcomes of its operations.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use batchwright_domain::clock::Timestamp;
use batchwright_domain::endpoint::Endpoint;
use batchwright_domain::ids::{BatchId, FileId, KeyId, TenantId};
use batchwright_domain::money::Price;
use batchwright_domain::status::Status;
use batchwright_domain::text::truncate_for_message;
use batchwright_domain::usage::TokenUsage;
use batchwright_domain::window::Urgency;

/// Metadata of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileRecord {
    /// Id, unique for its tenant.
    pub id: FileId,
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

/// Times at which a batch entered its statuses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StatusTimes {
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
    pub id: BatchId,
    /// API endpoint that every request names.
    pub endpoint: Endpoint,
    /// Id of the input file.
    pub input_file_id: FileId,
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
    /// Key that creates the batch; none without keys, and in batches that are read back.
    pub api_key: Option<KeyId>,
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
    Existing(Box<BatchRecord>),
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
    pub output_file_id: Option<FileId>,
    /// Id of the file with the failed requests.
    pub error_file_id: Option<FileId>,
    /// Times of the status changes.
    pub times: StatusTimes,
    /// Request counts.
    pub counts: Counts,
    /// Token counts of all results.
    pub usage: TokenUsage,
    /// Cause of the latest backoff; `None` after any later result.
    pub waits_for: Option<WaitCause>,
}

/// Open batches of a status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenBatches {
    /// Status.
    pub status: Status,
    /// Number of batches.
    pub number: u64,
    /// Number of them that no worker holds and that could be worked on.
    pub waiting: u64,
    /// Creation time of the oldest.
    pub oldest: Timestamp,
    /// Time since which one of the waiting ones has waited for its turn.
    pub waiting_since: Option<Timestamp>,
}

/// Progress of an executing batch with a deadline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatedBatch {
    /// Key.
    pub key: BatchKey,
    /// Start of the execution.
    pub started_at: Timestamp,
    /// End of the completion window.
    pub expires_at: Timestamp,
    /// Request counts.
    pub counts: Counts,
}

/// Progress of a batch, as its listeners see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchProgress {
    /// Tenant.
    pub tenant: TenantId,
    /// Id of the batch.
    pub id: BatchId,
    /// Current status.
    pub status: Status,
    /// Request counts.
    pub counts: Counts,
}

/// Batches that have not ended, as operators see them.
#[derive(Clone, Debug, Default)]
pub struct Overview {
    /// Numbers by status; a status without batches is absent.
    pub open: Vec<OpenBatches>,
    /// Executing batches by deadline, the earliest first.
    pub dated: Vec<DatedBatch>,
}

/// Space on disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Size of the database.
    pub database: u64,
    /// Space of the file system that the server can use.
    pub free: u64,
    /// Size of the file system.
    pub size: u64,
    /// Time of the last backup of the data folder.
    pub last_backup: Option<Timestamp>,
}

/// Cause for which a batch waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WaitCause {
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
    KeepPosition,
    /// Behind the batches that have waited since an earlier time.
    Requeue(Timestamp),
    /// Backoff until this time, for this cause.
    Backoff(Timestamp, Option<WaitCause>),
}

/// Orders to the worker of a batch, which the worker gets when it renews its lease.
///
/// An order reaches a worker in any process: the process that serves the client need not know which
/// one holds the batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Orders {
    /// A client has cancelled the batch.
    pub cancel: bool,
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
    /// Wait of a valid batch for the limits of its project.
    Admit,
    /// Finalizing; no request is sent any more.
    Finish,
}

/// Batch that nobody has claimed.
#[derive(Clone, Debug)]
pub struct Waiting {
    /// Tenant of the batch.
    pub tenant: TenantId,
    /// Weight of the tenant.
    pub weight: u32,
    /// Urgency, given the completion window.
    pub urgency: Urgency,
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
    pub tenant: TenantId,
    /// Id of the batch.
    pub batch_id: BatchId,
    /// Lane of the batch at the time of the claim.
    pub lane: Lane,
    /// Key of the batch.
    pub key: BatchKey,
    /// Number of the claim among those of the batch.
    pub fence: i64,
}

/// Kind of a result, which selects its file and its count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResultKind {
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
    /// File and count of the result.
    pub kind: ResultKind,
    /// Line of the result file, without its line end.
    pub payload: Vec<u8>,
    /// Token counts; zero in results that are read back.
    pub usage: TokenUsage,
    /// What the request counts as in the usage of its project; none for a request that no model
    /// answered, and in results that are read back.
    pub charge: Option<Charge>,
}

/// Request in the usage of a project.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Charge {
    /// Name of the model as its provider knows it.
    pub model: Arc<str>,
    /// Price at the time of the result; none if the model has no price.
    pub price: Option<Price>,
}

/// Usage of a request that belongs to no batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OnlineUsage {
    /// Endpoint of the request.
    pub endpoint: Endpoint,
    /// Key that the request was sent with; none on a server without keys.
    pub key: Option<KeyId>,
    /// Model and its price.
    pub charge: Charge,
    /// Tokens.
    pub tokens: TokenUsage,
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
    /// Estimated input tokens by model, as providers know the models.
    pub tokens: BTreeMap<String, u64>,
    /// Validator plugins that accepted the requests.
    pub judged_by: Vec<PluginVersion>,
}

/// Outcome of the start of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Started {
    /// The batch executes, or finishes if it was cancelled.
    Begun,
    /// The batch waits until other batches of its tenant have ended.
    Queued,
    /// The batch exceeds a limit and has not changed.
    OverLimit(TokenLimit),
}

/// Limit of enqueued tokens that a batch exceeds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenLimit {
    /// Name of the model as its provider knows it.
    pub model: String,
    /// Maximum number of enqueued input tokens.
    pub limit: u64,
    /// Tokens of other batches.
    pub enqueued: u64,
    /// Estimated tokens of the batch.
    pub estimated: u64,
}

impl fmt::Display for TokenLimit {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { model, limit, enqueued, estimated } = self;
        write!(
            formatter,
            "Enqueued token limit reached for {}. Limit: {limit} enqueued tokens. This batch has \
             about {estimated}, and other batches have {enqueued}.",
            truncate_for_message(model)
        )
    }
}

/// Exact version of a plugin that a batch used.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PluginVersion {
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

/// Filter, order and range of a list of files.
#[derive(Clone, Debug)]
pub struct FileQuery {
    /// Purpose of the files; `None` for all.
    pub purpose: Option<String>,
    /// Sort order.
    pub order: Order,
    /// Id of the file after which the page starts.
    pub after: Option<FileId>,
    /// Maximum number of entries.
    pub limit: usize,
    /// Current time, which decides which files have expired.
    pub now: Timestamp,
}
