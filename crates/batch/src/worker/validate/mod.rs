//! Validation of an input file: the rules of the host and all validators check chunks in parallel.
//!
//! A line is parsed and normalized once, before any rule sees it; see
//! [`envelope`](crate::formats::envelope). Rules that concern several lines are in [`whole`](crate::worker::validate::file).

mod file;

use std::collections::{BTreeSet, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::ops::Range;
use std::sync::Arc;

use batchwright_domain::endpoint::Endpoint;
use batchwright_domain::error_code::ErrorCode;
use batchwright_domain::ids::{FileId, ObjectKey, TenantId};
use batchwright_memory::{Holder, Pool, Reservation};
use batchwright_plugin::types::{BatchContext, Line, ValidationReport, Violation};
use batchwright_plugin::{CallError, Plugin, Snapshot};
use batchwright_store::{
    BatchError, BatchRecord, Claim, PluginVersion, Result, StoreError, Validated,
};
use futures_util::{StreamExt, stream};
use tokio_util::task::AbortOnDropHandle;

use crate::formats::envelope::Envelope;
use crate::formats::input::{Input, InputLine};
use crate::formats::line::{RequestLine, string, with_model};
use crate::formats::not_json;
use crate::request::served_by::served_by;
use crate::worker::Worker;
use crate::worker::validate::file::FileValidation;

/// Maximum number of lines in a chunk.
const MAX_CHUNK_LINES: usize = 1000;

/// Size at which a chunk is complete, in bytes.
const CHUNK_BYTES: usize = 256 << 10;

/// Memory of a chunk as a multiple of its size: the bytes as read, the text, the copy for all
/// validators except the last, and the hashes of the keys.
const COPIES_PER_CHUNK: usize = 4;

/// Number of bytes that are read from the file at a time.
const READ_CHUNK_BYTES: u64 = 256 << 10;

/// Memory of the hash of one `custom_id` in a table that has just grown, in bytes.
const HASH_BYTES: u64 = 68;

/// Minimum size of a line that has a `custom_id`, in bytes.
const MIN_LINE_BYTES: u64 = 17;

/// Memory for hashes that needs no reservation, in bytes.
const UNRESERVED_HASH_BYTES: u64 = 64 << 10;

/// Number of bytes at the beginning of a file that are used to detect its format.
const FORMAT_SAMPLE_BYTES: u64 = 16 << 10;

/// Maximum number of violations that a chunk keeps.
const MAX_CHUNK_VIOLATIONS: usize = 1000;

/// Outcome of a validation.
pub(crate) enum FileVerdict {
    /// The file is valid.
    Accepted(Validated),
    /// The file is invalid, with its errors and the validators that took part.
    Rejected(Vec<BatchError>, Vec<PluginVersion>),
}

/// Validator of a chunk.
struct ChunkValidator {
    tenant: TenantId,
    batch: BatchContext,
    endpoint: Endpoint,
    validators: Vec<Arc<Plugin>>,
    plugins: Arc<Snapshot>,
    hashers: [RandomState; 2],
    /// Model for requests that name no model.
    default_model: Option<String>,
}

/// Validated chunk.
pub(crate) struct ValidatedChunk {
    /// Lines of the chunk, in order.
    pub requests: Vec<Known>,
    /// Errors of the lines, in line order.
    pub violations: Vec<Violation>,
    /// Number of violations that are not in the list.
    pub unlisted: u64,
    /// Names of the plugins that the requests go to.
    pub providers: BTreeSet<String>,
}

/// Facts about a line for the rules that concern several lines.
pub(crate) struct Known {
    /// Line number, from 1.
    pub line: u64,
    /// 128-bit hash of the `custom_id`, so that a million of them fit into memory. The hash keys
    /// are new for each validation.
    pub custom_id: Option<u128>,
    /// Model of the request, or `None` if the line has no valid model.
    pub model: Option<String>,
}

impl Worker {
    /// Validates the input file of a batch.
    pub(super) async fn validate(&self, claim: &Claim, batch: &BatchRecord) -> Result<FileVerdict> {
        let (tenant, file_id) = (&claim.tenant, &batch.new.input_file_id);
        let Some(file) = self.store.input_file(claim).await? else {
            return Ok(FileVerdict::Rejected(
                vec![input_file_error(format!(
                    "Cannot find file {file_id}, or the organization does not have access to it."
                ))],
                Vec::new(),
            ));
        };
        if file.purpose != "batch" {
            return Ok(FileVerdict::Rejected(
                vec![input_file_error(format!(
                    "The file {file_id} has the purpose '{}'; \
                     an input file must be uploaded with the purpose 'batch'.",
                    file.purpose
                ))],
                Vec::new(),
            ));
        }
        let holder: Holder = tenant.as_str().into();
        let hashes = HASH_BYTES.saturating_mul(
            (*self.config.batch.max_requests_per_file).min(file.bytes / MIN_LINE_BYTES),
        );
        let _hashes = match hashes > UNRESERVED_HASH_BYTES {
            true => Some(
                self.memory
                    .custom_ids
                    .reserve(&holder, usize::try_from(hashes).unwrap_or(usize::MAX))
                    .await,
            ),
            false => None,
        };
        let key = ObjectKey { tenant: tenant.clone(), file: file_id.clone() };
        let max_line_bytes = self.config.batch.max_line_size.in_memory();
        let opened =
            Input::open(&self.objects, key.clone(), file.bytes, max_line_bytes, READ_CHUNK_BYTES);
        let input = match opened.await {
            Ok(input) => input,
            Err(StoreError::Missing(cause)) => {
                return Ok(FileVerdict::Rejected(
                    vec![lost_input(claim, file_id, &cause)],
                    Vec::new(),
                ));
            }
            Err(error) => return Err(error),
        };
        if let Some(message) = self.file_format_error(&key, file.bytes).await? {
            let error = BatchError {
                code: ErrorCode::InvalidJsonLine.into(),
                message,
                param: None,
                line: Some(1),
            };
            return Ok(FileVerdict::Rejected(vec![error], Vec::new()));
        }
        let mut chunks =
            Chunks { input, next_large: None, memory: self.memory.validation.clone(), holder };
        let first = chunks.next().await?;
        let plugins = self.registry.current();
        // A required validator may be missing since the batch was created. The batch waits for it.
        plugins
            .check_required(&self.config.required_plugins, tenant)
            .map_err(StoreError::NotReady)?;
        let validators = plugins.validators(tenant, batch.new.endpoint);
        let judged_by = validators.iter().map(|plugin| served_by(plugin)).collect();
        let validator = Arc::new(ChunkValidator {
            tenant: tenant.clone(),
            batch: BatchContext {
                id: batch.new.id.to_string(),
                endpoint: batch.new.endpoint.as_str().to_owned(),
                metadata: batch.new.metadata.clone().unwrap_or_default().into_iter().collect(),
                first_model: first.as_ref().and_then(|(chunk, _)| first_model(chunk)),
            },
            endpoint: batch.new.endpoint,
            validators,
            default_model: plugins.default_model(tenant, batch.new.endpoint).map(str::to_owned),
            plugins: plugins.clone(),
            hashers: [RandomState::new(), RandomState::new()],
        });
        let threads = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        // A chunk is read only after its memory is reserved.
        let rest = stream::try_unfold(chunks, async |mut chunks| {
            Ok(chunks.next().await?.map(|chunk| (chunk, chunks)))
        });
        let chunks = stream::iter(first.map(Ok)).chain(rest);
        let validated = chunks
            .map(|chunk: Result<(Vec<InputLine>, Reservation)>| {
                let validator = validator.clone();
                async move {
                    let (chunk, memory) = chunk?;
                    // Each chunk has its own task, so that all cores are used.
                    let validating = AbortOnDropHandle::new(tokio::spawn(async move {
                        let validated = validator.validate(chunk).await;
                        drop(memory);
                        validated
                    }));
                    Ok::<_, StoreError>(validating.await)
                }
            })
            .buffered(threads.saturating_mul(2));
        let mut validated = std::pin::pin!(validated);
        let mut whole = FileValidation::new(
            self.config.batch.max_reported_errors.get(),
            *self.config.batch.max_requests_per_file,
        );
        while let Some(chunk) = validated.next().await {
            match chunk? {
                Ok(Ok(chunk)) => whole.add(chunk),
                Ok(Err(error)) => {
                    return Ok(FileVerdict::Rejected(vec![plugin_error(&error)], judged_by));
                }
                Err(_) => return Err(StoreError::Closed),
            }
            if whole.total > *self.config.batch.max_requests_per_file {
                break;
            }
        }
        whole.explain_models(&plugins, tenant);
        Ok(whole.verdict(judged_by))
    }

    /// Returns an error message if the beginning of a file shows that it is not JSON Lines.
    async fn file_format_error(&self, key: &ObjectKey, bytes: u64) -> Result<Option<String>> {
        let beginning = self.objects.read_range(key, 0..bytes.min(FORMAT_SAMPLE_BYTES)).await;
        match beginning {
            Ok(beginning) => Ok(not_json::of_file(&beginning)),
            Err(StoreError::Missing(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Creates the error of a batch whose input file is lost, and logs the cause for the operator.
pub(crate) fn lost_input(claim: &Claim, file: &FileId, cause: &str) -> BatchError {
    tracing::error!(
        tenant = %claim.tenant,
        batch = %claim.batch_id,
        %file,
        error = cause,
        "input file lost"
    );
    let message = format!(
        "The content of the input file {file} is lost or damaged; \
         upload it again and create a new batch."
    );
    BatchError {
        code: ErrorCode::InputFileLost.into(),
        message,
        param: Some("input_file_id".into()),
        line: None,
    }
}

/// Returns the model that the first request names.
fn first_model(chunk: &[InputLine]) -> Option<String> {
    match chunk.first()? {
        InputLine::FileValidation { bytes, .. } => {
            RequestLine::parse(std::str::from_utf8(bytes).ok()?).model.map(String::from)
        }
        InputLine::Large { .. } | InputLine::TooLong { .. } => None,
    }
}

/// Reader of the chunks of a file, each with the memory that it has reserved.
struct Chunks {
    input: Input,
    /// Large line after the last chunk, which is the next chunk.
    next_large: Option<(u64, Range<u64>)>,
    memory: Pool,
    holder: Holder,
}

impl Chunks {
    /// Returns the next chunk, or `None` at the end of the file. A large line is a chunk of its
    /// own.
    async fn next(&mut self) -> Result<Option<(Vec<InputLine>, Reservation)>> {
        if let Some((number, range)) = self.next_large.take()
            && let Some(chunk) = self.read_large(number, range).await?
        {
            return Ok(Some(chunk));
        }
        let reserved = CHUNK_BYTES.saturating_mul(COPIES_PER_CHUNK);
        let mut reservation = self.memory.reserve(&self.holder, reserved).await;
        let mut chunk = Vec::new();
        let mut bytes = 0_usize;
        while chunk.len() < MAX_CHUNK_LINES && bytes < CHUNK_BYTES {
            match self.input.next().await? {
                None => break,
                Some(InputLine::Large { number, range }) if chunk.is_empty() => {
                    drop(reservation);
                    if let Some(chunk) = self.read_large(number, range).await? {
                        return Ok(Some(chunk));
                    }
                    reservation = self.memory.reserve(&self.holder, reserved).await;
                }
                Some(InputLine::Large { number, range }) => {
                    self.next_large = Some((number, range));
                    break;
                }
                Some(line) => {
                    if let InputLine::FileValidation { bytes: text, .. } = &line {
                        bytes = bytes.saturating_add(text.len());
                    }
                    chunk.push(line);
                }
            }
        }
        reservation.shrink_to(bytes.saturating_mul(COPIES_PER_CHUNK));
        Ok((!chunk.is_empty()).then_some((chunk, reservation)))
    }

    /// Reads a large line as a chunk, or returns `None` if the line is blank.
    async fn read_large(
        &mut self,
        number: u64,
        range: Range<u64>,
    ) -> Result<Option<(Vec<InputLine>, Reservation)>> {
        let size = usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(usize::MAX);
        let reservation =
            self.memory.reserve(&self.holder, size.saturating_mul(COPIES_PER_CHUNK)).await;
        let bytes = self.input.large(range.clone()).await?;
        Ok(bytes.map(|bytes| {
            (vec![InputLine::FileValidation { number, at: range.start, bytes }], reservation)
        }))
    }
}

impl ChunkValidator {
    /// Validates a chunk with the rules of the host and with all validators.
    async fn validate(
        &self,
        chunk: Vec<InputLine>,
    ) -> std::result::Result<ValidatedChunk, CallError> {
        let mut violations = Vec::new();
        let mut requests = Vec::with_capacity(chunk.len());
        let mut lines = Vec::with_capacity(chunk.len());
        for line in chunk {
            let (number, text) = match line {
                InputLine::FileValidation { number, bytes, .. } => {
                    (number, String::from_utf8(bytes.into()))
                }
                InputLine::Large { number, .. } | InputLine::TooLong { number } => {
                    requests.push(Known { line: number, custom_id: None, model: None });
                    violations.push(violation(
                        number,
                        ErrorCode::LineTooLong,
                        "This line is longer than the server allows (max_line_size); \
                         shorten the request.",
                        None,
                    ));
                    continue;
                }
            };
            let parsed = match text {
                Ok(text) => self.parse(number, text, &mut violations),
                Err(error) => {
                    let valid_up_to = error.utf8_error().valid_up_to();
                    let message = not_json::not_utf8(error.as_bytes(), valid_up_to);
                    violations.push(violation(number, ErrorCode::InvalidJsonLine, &message, None));
                    None
                }
            };
            match parsed {
                Some((known, text)) => {
                    requests.push(known);
                    lines.push(Line { number, text });
                }
                None => requests.push(Known { line: number, custom_id: None, model: None }),
            }
        }
        let mut unlisted = 0_u64;
        let mut add = |judgement: ValidationReport| {
            violations.extend(judgement.violations);
            unlisted = unlisted.saturating_add(judgement.unlisted);
        };
        if let Some((last, others)) = self.validators.split_last() {
            for validator in others {
                add(validator.validate(&self.tenant, self.batch.clone(), lines.clone()).await?);
            }
            add(last.validate(&self.tenant, self.batch.clone(), lines).await?);
        }
        let providers = self.check_models(&requests, &mut violations);
        let excess = violations.len().saturating_sub(MAX_CHUNK_VIOLATIONS);
        unlisted = unlisted.saturating_add(excess as u64);
        violations.sort_by_key(|violation| violation.line);
        violations.truncate(MAX_CHUNK_VIOLATIONS);
        Ok(ValidatedChunk { requests, violations, unlisted, providers })
    }

    /// Parses a line and normalizes its text for the rules.
    ///
    /// Returns `None` if the line is not JSON or has duplicate keys. No validator gets such a line.
    fn parse(
        &self,
        number: u64,
        text: String,
        violations: &mut Vec<Violation>,
    ) -> Option<(Known, String)> {
        let line = match Envelope::parse(&text) {
            Ok(line) => line,
            Err(error) => {
                let message = not_json::explain(&text, &error);
                violations.push(violation(number, ErrorCode::InvalidJsonLine, &message, None));
                return None;
            }
        };
        for path in &line.duplicates {
            let message = format!(
                "The key '{path}' occurs more than once, and JSON parsers differ in which value \
                 they use; keep one of them."
            );
            violations.push(violation(number, ErrorCode::DuplicateKey, &message, Some(path)));
        }
        if !line.duplicates.is_empty() {
            return None;
        }
        let [low, high] = &self.hashers;
        let hash = |id: &str| u128::from(low.hash_one(id)) | u128::from(high.hash_one(id)) << 64;
        let custom_id = line.custom_id.as_deref().map(hash);
        let default = self.default_model.as_ref().filter(|_| line.has_body && !line.has_model);
        let model = default.cloned().or_else(|| line.model.map(String::from));
        let url = line.url.filter(|url| self.is_azure_url(url)).map(|url| range_of(&text, url));
        let body =
            default.and_then(|_| RequestLine::parse(&text).body.map(|body| range_of(&text, body)));
        let text = self.normalize(text, url, body.zip(default));
        Some((Known { line: number, custom_id, model }, text))
    }

    /// Returns true if a `url` is the endpoint of the batch without `/v1`, as Azure tools write it.
    fn is_azure_url(&self, url: &str) -> bool {
        string(url).as_deref() == Some(self.endpoint.short())
    }

    /// Replaces the `url` by the endpoint of the batch and adds a default model to the body.
    ///
    /// `url` and `body` are `None` if they need no change.
    fn normalize(
        &self,
        mut text: String,
        url: Option<Range<usize>>,
        body: Option<(Range<usize>, &String)>,
    ) -> String {
        // Changes are applied from the end, because each change moves the text after it.
        let mut changes = Vec::new();
        if let Some(range) = url {
            changes.push((range, format!("\"{}\"", self.batch.endpoint)));
        }
        if let Some((range, model)) = body {
            let body = with_model(text.get(range.clone()).unwrap_or_default(), model);
            changes.push((range, body));
        }
        changes.sort_by_key(|(range, _)| std::cmp::Reverse(range.start));
        for (range, new) in changes {
            text.replace_range(range, &new);
        }
        text
    }

    /// Checks that each line can be executed and that a plugin serves its model.
    ///
    /// Returns the names of the plugins.
    fn check_models(
        &self,
        requests: &[Known],
        violations: &mut Vec<Violation>,
    ) -> BTreeSet<String> {
        let mut providers = BTreeSet::new();
        let invalid: HashSet<u64> = violations.iter().map(|violation| violation.line).collect();
        // A line for another endpoint has an error already. Its model is not checked for this one.
        let other_endpoint: HashSet<u64> = violations
            .iter()
            .filter(|violation| violation.code == ErrorCode::InvalidUrl.as_str())
            .map(|violation| violation.line)
            .collect();
        for request in requests {
            match &request.model {
                Some(_) if other_endpoint.contains(&request.line) => {}
                Some(model) => {
                    let route = self.plugins.route(&self.tenant, model);
                    if let Some(route) = route.filter(|route| route.plugin.handles(self.endpoint)) {
                        if !providers.contains(route.plugin.name()) {
                            providers.insert(route.plugin.name().to_owned());
                        }
                    } else {
                        let shown: String = model.chars().take(200).collect();
                        let mut message = format!(
                            "The provided model '{shown}' is not supported by the Batch API: \
                             it does not exist or is not supported"
                        );
                        if self.plugins.route(&self.tenant, model).is_some() {
                            message.push_str(&format!(" for {}", self.batch.endpoint));
                        }
                        violations.push(violation(
                            request.line,
                            MODEL_NOT_FOUND,
                            &message,
                            Some("body.model"),
                        ));
                    }
                }
                // The validators of the operator may accept a line that cannot be executed.
                None if !invalid.contains(&request.line) => {
                    let message = "The line has no body with a model; \
                                   add an object \"body\" with a string \"model\".";
                    violations.push(violation(
                        request.line,
                        ErrorCode::InvalidRequest,
                        message,
                        Some("body.model"),
                    ));
                }
                None => {}
            }
            if request.custom_id.is_none()
                && request.model.is_some()
                && !invalid.contains(&request.line)
            {
                let message = "The line has no custom_id that is valid text; \
                               add a string \"custom_id\" that identifies its result.";
                violations.push(violation(
                    request.line,
                    ErrorCode::InvalidRequest,
                    message,
                    Some("custom_id"),
                ));
            }
        }
        providers
    }
}

/// Error code of a model that no plugin serves.
pub(crate) const MODEL_NOT_FOUND: ErrorCode = ErrorCode::ModelNotFound;

/// Returns the byte range of a part in its text.
fn range_of(text: &str, part: &str) -> Range<usize> {
    let start = (part.as_ptr() as usize).saturating_sub(text.as_ptr() as usize);
    start..start.saturating_add(part.len())
}

/// Creates the error of a line.
pub(crate) fn violation(
    line: u64,
    code: ErrorCode,
    message: &str,
    param: Option<&str>,
) -> Violation {
    Violation { line, code: code.into(), message: message.into(), param: param.map(str::to_owned) }
}

/// Creates an error about the input file.
fn input_file_error(message: String) -> BatchError {
    BatchError {
        code: ErrorCode::InvalidRequest.into(),
        message,
        param: Some("input_file_id".into()),
        line: None,
    }
}

/// Creates the error of a failed call of a validator.
fn plugin_error(error: &CallError) -> BatchError {
    BatchError { code: error.code().into(), message: error.to_string(), param: None, line: None }
}
