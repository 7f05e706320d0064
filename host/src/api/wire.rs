//! The API's objects. All keys are always there; what is absent is an explicit null.

use serde::Serialize;

use crate::clock::Timestamp;
use crate::store::{BatchError, BatchRecord, FileRecord, Metadata};

#[derive(Serialize)]
pub struct ErrorBody<'a> {
    pub error: Error<'a>,
}

#[derive(Serialize)]
pub struct Error<'a> {
    pub message: &'a str,
    #[serde(rename = "type")]
    pub kind: &'a str,
    pub param: Option<&'a str>,
    pub code: Option<&'a str>,
}

/// A page of objects, newest first unless asked otherwise.
#[derive(Serialize)]
pub struct List<T> {
    object: &'static str,
    data: Vec<T>,
    first_id: Option<String>,
    last_id: Option<String>,
    has_more: bool,
}

impl<T: Identified> List<T> {
    pub fn new(data: Vec<T>, has_more: bool) -> Self {
        let id = |item: Option<&T>| item.map(|item| item.id().to_owned());
        Self { object: "list", first_id: id(data.first()), last_id: id(data.last()), data, has_more }
    }
}

pub trait Identified {
    fn id(&self) -> &str;
}

#[derive(Serialize)]
pub struct File {
    id: String,
    object: &'static str,
    bytes: u64,
    created_at: i64,
    expires_at: Option<i64>,
    filename: String,
    purpose: String,
    status: &'static str,
    status_details: Option<String>,
}

impl From<FileRecord> for File {
    fn from(file: FileRecord) -> Self {
        Self {
            id: file.id,
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

#[derive(Serialize)]
pub struct Deleted {
    pub id: String,
    pub object: &'static str,
    pub deleted: bool,
}

#[derive(Serialize)]
pub struct Batch {
    id: String,
    object: &'static str,
    endpoint: String,
    model: Option<String>,
    errors: Option<Errors>,
    input_file_id: String,
    completion_window: String,
    status: &'static str,
    output_file_id: Option<String>,
    error_file_id: Option<String>,
    created_at: i64,
    in_progress_at: Option<i64>,
    expires_at: i64,
    finalizing_at: Option<i64>,
    completed_at: Option<i64>,
    failed_at: Option<i64>,
    expired_at: Option<i64>,
    cancelling_at: Option<i64>,
    cancelled_at: Option<i64>,
    request_counts: RequestCounts,
    usage: Usage,
    metadata: Option<Metadata>,
}

#[derive(Serialize)]
struct Errors {
    object: &'static str,
    data: Vec<LineError>,
}

#[derive(Serialize)]
struct LineError {
    code: String,
    message: String,
    param: Option<String>,
    line: Option<u64>,
}

#[derive(Serialize)]
struct RequestCounts {
    total: u64,
    completed: u64,
    failed: u64,
}

#[derive(Serialize)]
struct Usage {
    input_tokens: u64,
    input_tokens_details: InputTokens,
    output_tokens: u64,
    output_tokens_details: OutputTokens,
    total_tokens: u64,
}

#[derive(Serialize)]
struct InputTokens {
    cached_tokens: u64,
}

#[derive(Serialize)]
struct OutputTokens {
    reasoning_tokens: u64,
}

impl From<BatchRecord> for Batch {
    fn from(batch: BatchRecord) -> Self {
        let seconds = |time: Option<Timestamp>| time.map(Timestamp::as_seconds);
        let (times, usage) = (batch.times, batch.usage);
        let line_error = |BatchError { code, message, param, line }| LineError { code, message, param, line };
        let errors: Vec<_> = batch.errors.into_iter().map(line_error).collect();
        Self {
            id: batch.new.id,
            object: "batch",
            endpoint: batch.new.endpoint,
            model: batch.model,
            errors: (!errors.is_empty()).then_some(Errors { object: "list", data: errors }),
            input_file_id: batch.new.input_file_id,
            completion_window: batch.new.completion_window,
            status: batch.status.as_str(),
            output_file_id: batch.output_file_id,
            error_file_id: batch.error_file_id,
            created_at: batch.new.created_at.as_seconds(),
            in_progress_at: seconds(times.in_progress_at),
            expires_at: batch.new.expires_at.as_seconds(),
            finalizing_at: seconds(times.finalizing_at),
            completed_at: seconds(times.completed_at),
            failed_at: seconds(times.failed_at),
            expired_at: seconds(times.expired_at),
            cancelling_at: seconds(times.cancelling_at),
            cancelled_at: seconds(times.cancelled_at),
            request_counts: RequestCounts {
                total: batch.counts.total,
                completed: batch.counts.completed,
                failed: batch.counts.failed,
            },
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

#[derive(Serialize)]
pub struct Model {
    pub id: String,
    pub object: &'static str,
    pub created: i64,
    pub owned_by: String,
}

impl Identified for Model {
    fn id(&self) -> &str {
        &self.id
    }
}
