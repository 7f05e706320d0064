//! The API's objects. All keys are always there; what is absent is an explicit null.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::batch::{Outage, OutageKey};
use crate::clock::Timestamp;
use crate::plugin::Entry;
use crate::plugin::types::Kind;
use crate::store::{BatchError, BatchRecord, FileRecord, Metadata, ServedBy, WaitsFor};

#[derive(Serialize, ToSchema)]
pub struct ErrorBody<'a> {
    pub error: Error<'a>,
}

#[derive(Serialize, ToSchema)]
pub struct Error<'a> {
    pub message: &'a str,
    #[serde(rename = "type")]
    pub kind: &'a str,
    #[schema(required)]
    pub param: Option<&'a str>,
    #[schema(required)]
    pub code: Option<&'a str>,
}

/// What `POST /batches` takes. It is read by hand, so that each error names its parameter.
#[derive(Deserialize, ToSchema)]
#[expect(dead_code, reason = "the form of a document, not of a value")]
#[serde(deny_unknown_fields)]
pub struct CreateBatch {
    /// Id of an uploaded file.
    input_file_id: String,
    /// What its requests are for.
    endpoint: String,
    /// How long the batch may take.
    completion_window: String,
    metadata: Option<BTreeMap<String, String>>,
    output_expires_after: Option<ExpiresAfter>,
    /// Names this creation, so that it can be repeated; also accepted as the header `Idempotency-Key`.
    #[schema(min_length = 1, max_length = 255, pattern = "^[!-~]+$")]
    idempotency_key: Option<String>,
}

/// How long files are kept.
#[derive(Deserialize, ToSchema)]
#[expect(dead_code, reason = "the form of a document, not of a value")]
#[serde(deny_unknown_fields)]
pub struct ExpiresAfter {
    #[schema(pattern = "^created_at$")]
    anchor: String,
    #[schema(minimum = 3600, maximum = 2592000)]
    seconds: u64,
}

/// What `POST /files` takes.
#[derive(Deserialize, ToSchema)]
#[expect(dead_code, reason = "the form of a document, not of a value")]
#[serde(deny_unknown_fields)]
pub struct UploadForm {
    #[schema(content_media_type = "application/octet-stream", value_type = String, min_length = 1)]
    file: Vec<u8>,
    purpose: Purpose,
    #[schema(pattern = "^created_at$", nullable = false)]
    #[serde(rename = "expires_after[anchor]")]
    anchor: Option<String>,
    #[serde(rename = "expires_after[seconds]")]
    #[schema(minimum = 3600, maximum = 2592000, nullable = false)]
    seconds: Option<u64>,
}

#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    Assistants,
    Batch,
    Evals,
    #[serde(rename = "fine-tune")]
    FineTune,
    UserData,
    Vision,
}

#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    Asc,
    Desc,
}

#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum BatchStatus {
    Validating,
    Failed,
    InProgress,
    Finalizing,
    Completed,
    Expired,
    Cancelling,
    Cancelled,
}

/// A page of objects, newest first unless asked otherwise.
#[derive(Serialize, ToSchema)]
pub struct List<T> {
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
    pub fn new(data: Vec<T>, has_more: bool) -> Self {
        let id = |item: Option<&T>| item.map(|item| item.id().to_owned());
        Self { object: "list", first_id: id(data.first()), last_id: id(data.last()), data, has_more }
    }
}

pub trait Identified {
    fn id(&self) -> &str;
}

#[derive(Serialize, ToSchema)]
pub struct File {
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

#[derive(Serialize, ToSchema)]
pub struct Deleted {
    pub id: String,
    #[schema(pattern = "^file$")]
    pub object: &'static str,
    /// Always true.
    pub deleted: bool,
}

#[derive(Serialize, ToSchema)]
pub struct Batch {
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
    expires_at: i64,
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

#[derive(Serialize, ToSchema)]
pub struct Model {
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

/// All of a kind, without pages: there are few.
#[derive(Serialize, ToSchema)]
pub struct Collection<T> {
    #[schema(pattern = "^list$")]
    object: &'static str,
    data: Vec<T>,
}

impl<T> Collection<T> {
    pub fn new(data: Vec<T>) -> Self {
        Self { object: "list", data }
    }
}

/// The plugins of a batch, and what its requests wait for.
#[derive(Serialize, ToSchema)]
pub struct BatchPlugins {
    #[schema(pattern = "^list$")]
    object: &'static str,
    data: Vec<BatchPlugin>,
    /// What the requests of the batch wait for; null while they are sent.
    #[schema(required)]
    waiting: Option<Waiting>,
}

impl BatchPlugins {
    pub fn new(served_by: Vec<ServedBy>, waits_for: Option<WaitsFor>) -> Self {
        Self {
            object: "list",
            data: served_by.into_iter().map(BatchPlugin::from).collect(),
            waiting: waits_for.map(|waits| Waiting {
                message: waits.cause,
                since: waits.since.as_seconds(),
                next_attempt_at: waits.next.as_seconds(),
            }),
        }
    }
}

/// What requests wait for.
#[derive(Serialize, ToSchema)]
pub struct Waiting {
    /// One sentence.
    message: String,
    /// Unix seconds.
    since: i64,
    /// When the provider is tried again; Unix seconds.
    next_attempt_at: i64,
}

impl From<&Outage> for Waiting {
    fn from(outage: &Outage) -> Self {
        Self {
            message: outage.trouble.message.clone(),
            since: outage.since.as_seconds(),
            next_attempt_at: outage.next_probe.as_seconds(),
        }
    }
}

/// A plugin as the operator sees it.
#[derive(Serialize)]
pub struct OperatorPlugin {
    #[serde(flatten)]
    plugin: Plugin,
    /// Exchanges at a time that the provider is thought to take, and those that the operator allows.
    concurrency: Option<f64>,
    outages: Vec<OperatorOutage>,
}

/// A provider in trouble, in the operator's words.
#[derive(Serialize)]
pub struct OperatorOutage {
    pub plugin: String,
    tenant: String,
    endpoint: String,
    message: String,
    since: i64,
    next_attempt_at: i64,
    waiting_requests: u64,
}

impl From<&(OutageKey, Outage)> for OperatorOutage {
    fn from((key, outage): &(OutageKey, Outage)) -> Self {
        Self {
            plugin: key.plugin.clone(),
            tenant: key.tenant.clone(),
            endpoint: key.endpoint.clone(),
            message: outage.trouble.detail.clone(),
            since: outage.since.as_seconds(),
            next_attempt_at: outage.next_probe.as_seconds(),
            waiting_requests: outage.waiting,
        }
    }
}

impl OperatorPlugin {
    pub fn new(entry: &Entry, outages: &[(OutageKey, Outage)]) -> Self {
        let own = outages.iter().filter(|(key, _)| key.plugin == entry.name);
        let mut plugin = Plugin::from(entry);
        plugin.error.clone_from(&entry.error);
        let adapter = entry.serving.as_deref().filter(|plugin| plugin.kind == Kind::Adapter);
        Self {
            plugin,
            concurrency: adapter.map(|plugin| plugin.gateway().limit()),
            outages: own.map(OperatorOutage::from).collect(),
        }
    }
}

#[derive(Serialize, ToSchema)]
pub struct Plugin {
    #[schema(pattern = "^plugin$")]
    object: &'static str,
    /// The name of its TOML file.
    name: String,
    #[schema(value_type = PluginState)]
    state: &'static str,
    /// That the file as it is does not load, if so.
    #[schema(required)]
    error: Option<String>,
    /// `validator` or `adapter`; null if nothing is loaded.
    #[schema(required)]
    kind: Option<String>,
    #[schema(required)]
    version: Option<String>,
    #[schema(required)]
    sha256: Option<String>,
    /// What the component says of itself.
    #[schema(required)]
    summary: Option<String>,
    /// Models it serves, as clients name them, globs included.
    models: Vec<String>,
    /// Endpoints it is for; empty means all.
    endpoints: Vec<String>,
    /// Unix seconds.
    #[schema(required)]
    loaded_at: Option<i64>,
    /// Fingerprint and name of the key that signed it, where signatures are asked for
    signed_by: Option<String>,
    /// What requests wait for that go to its provider; null while they are sent.
    #[schema(required)]
    waiting: Option<Waiting>,
}

impl Plugin {
    /// With what is the matter for a tenant.
    pub fn with(self, outages: &[(OutageKey, Outage)], tenant: &str) -> Self {
        let found = outages.iter().find(|(key, _)| key.plugin == self.name && key.tenant == tenant);
        Self { waiting: found.map(|(_, outage)| Waiting::from(outage)), ..self }
    }
}

/// `outdated`: the file does not load as it is, and what it was before serves on. `paused`: nothing is sent for now, and requests wait.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PluginState {
    Loaded,
    Paused,
    Outdated,
    Failed,
    Disabled,
}

impl From<&Entry> for Plugin {
    fn from(entry: &Entry) -> Self {
        let plugin = entry.serving.as_deref();
        Self {
            object: "plugin",
            name: entry.name.clone(),
            state: entry.state().as_str(),
            error: entry
                .error
                .is_some()
                .then(|| "The plugin's file does not load; the server's log says why.".to_owned()),
            kind: plugin.map(|plugin| plugin.kind.to_string()),
            version: plugin.map(|plugin| plugin.description.version.clone()),
            sha256: plugin.map(|plugin| plugin.sha256.clone()),
            summary: plugin.map(|plugin| plugin.description.summary.clone()),
            models: plugin
                .map(|plugin| plugin.models.iter().chain(plugin.aliases.keys()).cloned().collect())
                .unwrap_or_default(),
            endpoints: plugin
                .map(
                    |plugin| {
                        if plugin.endpoints.is_empty() { &plugin.description.endpoints } else { &plugin.endpoints }
                    },
                )
                .cloned()
                .unwrap_or_default(),
            loaded_at: plugin.map(|plugin| plugin.loaded_at),
            signed_by: plugin.and_then(|plugin| plugin.signed_by.clone()),
            waiting: None,
        }
    }
}

/// A plugin that had a part in a batch, as it was then.
#[derive(Serialize, ToSchema)]
pub struct BatchPlugin {
    #[schema(pattern = "^batch.plugin$")]
    object: &'static str,
    name: String,
    kind: String,
    version: String,
    sha256: String,
}

impl From<ServedBy> for BatchPlugin {
    fn from(by: ServedBy) -> Self {
        Self { object: "batch.plugin", name: by.name, kind: by.kind, version: by.version, sha256: by.sha256 }
    }
}
