//! JSON objects of the API. Every key is always present; an absent value is an explicit null.

mod credentials;
pub(crate) mod organization;
pub(crate) mod organization_money;
pub(crate) mod organization_requests;
mod plugins;
pub(crate) mod usage;
pub(crate) mod webhooks;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

pub(crate) use credentials::{Credential, DeletedCredential, SetCredential};
pub(crate) use plugins::{BatchPlugins, OperatorPlugin, Plugin};

use batchwright_domain::clock::Timestamp;
use batchwright_store::{BatchError, BatchProgress, BatchRecord, Counts, FileRecord, Metadata};

/// Body of an error response.
#[derive(Serialize, ToSchema)]
pub(crate) struct ErrorBody<'a> {
    pub error: Error<'a>,
}

/// Error object.
#[derive(Serialize, ToSchema)]
pub(crate) struct Error<'a> {
    pub message: &'a str,
    #[serde(rename = "type")]
    pub kind: &'a str,
    #[schema(required)]
    pub param: Option<&'a str>,
    #[schema(required)]
    pub code: Option<&'a str>,
}

/// Body of `POST /batches`.
// The type only describes the body. [`super::params`] parses the body, so that each error names its
// parameter.
#[derive(Deserialize, ToSchema)]
#[expect(dead_code, reason = "used for the OpenAPI schema only")]
#[serde(deny_unknown_fields)]
pub(crate) struct CreateBatch {
    /// Id of an uploaded file.
    input_file_id: String,
    /// Endpoint of its requests.
    endpoint: String,
    /// Time that the batch may take.
    completion_window: String,
    metadata: Option<BTreeMap<String, String>>,
    output_expires_after: Option<ExpiresAfter>,
    /// Key that makes a retry of this request safe. Also accepted as the header `Idempotency-Key`.
    #[schema(min_length = 1, max_length = 255, pattern = "^[!-~]+$")]
    idempotency_key: Option<String>,
}

/// Body of an online request. The members depend on the endpoint and on the provider.
#[derive(Deserialize, ToSchema)]
#[expect(dead_code, reason = "used for the OpenAPI schema only")]
pub(crate) struct OnlineBody {
    /// Model that answers. A moderation may name none.
    model: Option<String>,
    /// True for server-sent events, from providers that have them.
    stream: Option<bool>,
}

/// Answer of a provider.
#[derive(Serialize, ToSchema)]
pub(crate) struct OnlineResponse {
    /// Model that answered, as its provider names it.
    model: Option<String>,
}

/// Lifetime of files.
#[derive(Deserialize, ToSchema)]
#[expect(dead_code, reason = "used for the OpenAPI schema only")]
#[serde(deny_unknown_fields)]
pub(crate) struct ExpiresAfter {
    #[schema(pattern = "^created_at$")]
    anchor: String,
    #[schema(minimum = 3600, maximum = 2592000)]
    seconds: u64,
}

/// Body of `POST /files`.
#[derive(Deserialize, ToSchema)]
#[expect(dead_code, reason = "used for the OpenAPI schema only")]
pub(crate) struct UploadForm {
    #[schema(content_media_type = "application/octet-stream", value_type = String, min_length = 1)]
    file: Vec<u8>,
    purpose: Purpose,
    #[schema(pattern = "^(created_at)?$", nullable = false)]
    #[serde(rename = "expires_after[anchor]")]
    anchor: Option<String>,
    #[serde(rename = "expires_after[seconds]")]
    #[schema(minimum = 3600, maximum = 2592000, nullable = false)]
    seconds: Option<u64>,
}

/// Purpose of an uploaded file.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Purpose {
    Assistants,
    Batch,
    Evals,
    #[serde(rename = "fine-tune")]
    FineTune,
    UserData,
    Vision,
}

/// Order of a list by creation time.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Direction {
    Asc,
    Desc,
}

/// Status of a batch.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum BatchStatus {
    Validating,
    Failed,
    InProgress,
    Finalizing,
    Completed,
    Expired,
    Cancelling,
    Cancelled,
}

/// Page of objects, newest first by default.
#[derive(Serialize, ToSchema)]
pub(crate) struct List<T> {
    #[schema(pattern = "^list$")]
    object: &'static str,
    data: Vec<T>,
    #[schema(required)]
    first_id: Option<String>,
    #[schema(required)]
    last_id: Option<String>,
    has_more: bool,
}

impl<T: Identified> List<T> {
    /// Creates a page. `has_more` is true if objects follow.
    pub(crate) fn new(data: Vec<T>, has_more: bool) -> Self {
        let id = |item: Option<&T>| item.map(|item| item.id().to_owned());
        Self {
            object: "list",
            first_id: id(data.first()),
            last_id: id(data.last()),
            data,
            has_more,
        }
    }
}

/// Object with an id, from which a list can continue.
pub(crate) trait Identified {
    /// Returns the id of the object.
    fn id(&self) -> &str;
}

/// File: an upload, or the results of a batch.
#[derive(Serialize, ToSchema)]
pub(crate) struct File {
    id: String,
    #[schema(pattern = "^file$")]
    object: &'static str,
    bytes: u64,
    created_at: i64,
    #[schema(required)]
    expires_at: Option<i64>,
    filename: String,
    purpose: String,
    status: &'static str,
    #[schema(required)]
    status_details: Option<String>,
}

impl From<FileRecord> for File {
    fn from(file: FileRecord) -> Self {
        Self {
            id: file.id.to_string(),
            object: "file",
            bytes: file.bytes,
            created_at: file.created_at.as_seconds(),
            expires_at: file.expires_at.map(Timestamp::as_seconds),
            filename: file.filename,
            purpose: file.purpose,
            status: "processed",
            status_details: None,
        }
    }
}

impl Identified for File {
    fn id(&self) -> &str {
        &self.id
    }
}

/// Confirmation that a file is deleted.
#[derive(Serialize, ToSchema)]
pub(crate) struct Deleted {
    pub id: String,
    #[schema(pattern = "^file$")]
    pub object: &'static str,
    /// Always true.
    pub deleted: bool,
}

/// Batch: status, times, counts, usage and result files.
#[derive(Serialize, ToSchema)]
pub(crate) struct Batch {
    id: String,
    #[schema(pattern = "^batch$")]
    object: &'static str,
    endpoint: String,
    #[schema(required)]
    model: Option<String>,
    #[schema(required)]
    errors: Option<Errors>,
    input_file_id: String,
    completion_window: String,
    #[schema(value_type = BatchStatus)]
    status: &'static str,
    #[schema(required)]
    output_file_id: Option<String>,
    #[schema(required)]
    error_file_id: Option<String>,
    created_at: i64,
    #[schema(required)]
    in_progress_at: Option<i64>,
    #[schema(required)]
    expires_at: Option<i64>,
    #[schema(required)]
    finalizing_at: Option<i64>,
    #[schema(required)]
    completed_at: Option<i64>,
    #[schema(required)]
    failed_at: Option<i64>,
    #[schema(required)]
    expired_at: Option<i64>,
    #[schema(required)]
    cancelling_at: Option<i64>,
    #[schema(required)]
    cancelled_at: Option<i64>,
    request_counts: RequestCounts,
    usage: Usage,
    #[schema(required)]
    metadata: Option<Metadata>,
}

/// State of a batch, in an event.
#[derive(Serialize)]
pub(crate) struct BatchState {
    id: String,
    object: &'static str,
    status: &'static str,
    request_counts: RequestCounts,
}

impl From<BatchProgress> for BatchState {
    fn from(progress: BatchProgress) -> Self {
        Self {
            id: progress.id.to_string(),
            object: "batch",
            status: progress.status.as_str(),
            request_counts: progress.counts.into(),
        }
    }
}

#[derive(Serialize, ToSchema)]
struct Errors {
    #[schema(pattern = "^list$")]
    object: &'static str,
    data: Vec<LineError>,
}

#[derive(Serialize, ToSchema)]
struct LineError {
    code: String,
    message: String,
    #[schema(required)]
    param: Option<String>,
    #[schema(required)]
    line: Option<u64>,
}

#[derive(Serialize, ToSchema)]
struct RequestCounts {
    total: u64,
    completed: u64,
    failed: u64,
}

impl From<Counts> for RequestCounts {
    fn from(counts: Counts) -> Self {
        let Counts { total, completed, failed } = counts;
        Self { total, completed, failed }
    }
}

#[derive(Serialize, ToSchema)]
struct Usage {
    input_tokens: u64,
    input_tokens_details: InputTokens,
    output_tokens: u64,
    output_tokens_details: OutputTokens,
    total_tokens: u64,
}

#[derive(Serialize, ToSchema)]
struct InputTokens {
    cached_tokens: u64,
}

#[derive(Serialize, ToSchema)]
struct OutputTokens {
    reasoning_tokens: u64,
}

impl From<BatchRecord> for Batch {
    fn from(batch: BatchRecord) -> Self {
        let seconds = |time: Option<Timestamp>| time.map(Timestamp::as_seconds);
        let (times, usage) = (batch.times, batch.usage);
        let line_error =
            |BatchError { code, message, param, line }| LineError { code, message, param, line };
        let errors: Vec<_> = batch.errors.into_iter().map(line_error).collect();
        Self {
            id: batch.new.id.to_string(),
            object: "batch",
            endpoint: batch.new.endpoint.to_string(),
            model: batch.model,
            errors: (!errors.is_empty()).then_some(Errors { object: "list", data: errors }),
            input_file_id: batch.new.input_file_id.to_string(),
            completion_window: batch.new.completion_window,
            status: batch.status.as_str(),
            output_file_id: batch.output_file_id.map(|id| id.to_string()),
            error_file_id: batch.error_file_id.map(|id| id.to_string()),
            created_at: batch.new.created_at.as_seconds(),
            in_progress_at: seconds(times.in_progress_at),
            expires_at: Some(batch.new.expires_at)
                .filter(|end| *end != Timestamp::NEVER)
                .map(Timestamp::as_seconds),
            finalizing_at: seconds(times.finalizing_at),
            completed_at: seconds(times.completed_at),
            failed_at: seconds(times.failed_at),
            expired_at: seconds(times.expired_at),
            cancelling_at: seconds(times.cancelling_at),
            cancelled_at: seconds(times.cancelled_at),
            request_counts: batch.counts.into(),
            usage: Usage {
                input_tokens: usage.input,
                input_tokens_details: InputTokens { cached_tokens: usage.cached_input },
                output_tokens: usage.output,
                output_tokens_details: OutputTokens { reasoning_tokens: usage.reasoning },
                total_tokens: usage.input.saturating_add(usage.output),
            },
            metadata: batch.new.metadata,
        }
    }
}

impl Identified for Batch {
    fn id(&self) -> &str {
        &self.id
    }
}

/// Model that a request can name.
#[derive(Serialize, ToSchema)]
pub(crate) struct Model {
    pub id: String,
    #[schema(pattern = "^model$")]
    pub object: &'static str,
    pub created: i64,
    pub owned_by: String,
}

impl Identified for Model {
    fn id(&self) -> &str {
        &self.id
    }
}

/// List of all objects of a kind, without pages.
#[derive(Serialize, ToSchema)]
pub(crate) struct Collection<T> {
    #[schema(pattern = "^list$")]
    object: &'static str,
    data: Vec<T>,
}

impl<T> Collection<T> {
    /// Creates a list of all objects.
    pub(crate) fn new(data: Vec<T>) -> Self {
        Self { object: "list", data }
    }
}
