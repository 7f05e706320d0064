//! Validation of an input file: the rules of the host and all validators check chunks in parallel.
//!
//! A line is parsed and normalized once, before any rule sees it; see
//! [`envelope`](crate::formats::envelope). Rules that concern several lines are in
//! [`whole`](crate::worker::validate::file).

mod chunks;
mod file;

use std::sync::Arc;

use batchwright_domain::error_code::ErrorCode;
use batchwright_domain::ids::{BatchId, FileId, ObjectKey, TenantId};
use batchwright_domain::limits::Limit;
use batchwright_memory::{Holder, Reservation};
use batchwright_plugin::CallError;
use batchwright_plugin::types::BatchContext;
use batchwright_store::{
    BatchError, BatchRecord, Claim, PluginVersion, Result, StoreError, Validated,
};
use futures_util::{Stream, StreamExt, stream};
use tokio_util::task::AbortOnDropHandle;

use crate::formats::input::{Input, InputLine};
use crate::formats::line::RequestLine;
use crate::formats::not_json;
use crate::policy::Policy;
use crate::request::served_by::served_by;
use crate::rules::ChunkValidator;
use crate::worker::Worker;
use crate::worker::validate::chunks::Chunks;
use crate::worker::validate::file::FileValidation;

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

/// Outcome of a validation.
pub(crate) enum FileVerdict {
    /// The file is valid.
    Accepted(Validated),
    /// The file is invalid, with its errors and the validators that took part.
    Rejected(Vec<BatchError>, Vec<PluginVersion>),
}

impl Worker {
    /// Validates the input file of a batch.
    pub(super) async fn validate(&self, claim: &Claim, batch: &BatchRecord) -> Result<FileVerdict> {
        let rejected = |error| Ok(FileVerdict::Rejected(vec![error], Vec::new()));
        let (tenant, file_id) = (&claim.tenant, &batch.new.input_file_id);
        let Some(file) = self.store.input_file(claim).await? else {
            return rejected(input_file_error(format!(
                "Cannot find file {file_id}, or the organization does not have access to it."
            )));
        };
        if file.purpose != "batch" {
            return rejected(input_file_error(format!(
                "The file {file_id} has the purpose '{}'; \
                 an input file must be uploaded with the purpose 'batch'.",
                file.purpose
            )));
        }
        let holder: Holder = tenant.as_str().into();
        let _hashes = self.reserve_hashes(&holder, file.bytes).await;
        let key = ObjectKey { tenant: tenant.clone(), file: file_id.clone() };
        let max_line_bytes = self.config.batch.max_line_size.in_memory();
        let opened =
            Input::open(&self.objects, key.clone(), file.bytes, max_line_bytes, READ_CHUNK_BYTES);
        let input = match opened.await {
            Ok(input) => input,
            Err(StoreError::Missing(cause)) => return rejected(lost_input(claim, file_id, &cause)),
            Err(error) => return Err(error),
        };
        if let Some(message) = self.file_format_error(&key, file.bytes).await? {
            let code = ErrorCode::InvalidJsonLine.into();
            return rejected(BatchError { code, message, param: None, line: Some(1) });
        }
        let mut chunks =
            Chunks { input, next_large: None, memory: self.memory.validation.clone(), holder };
        let first = chunks.next().await?;
        let plugins = self.registry.current();
        // A required validator may be missing since the batch was created. The batch waits for it.
        plugins
            .check_required(&self.config.required_plugins, tenant)
            .map_err(StoreError::NotReady)?;
        let first_model = first.as_ref().and_then(|(chunk, _)| first_model(chunk));
        let policy = Policy::read(&*self.store, &self.config.tenant_defaults, tenant).await?;
        let max_requests = policy.limits.get(Limit::RequestsPerBatch);
        let permissions = Arc::new(policy.permissions);
        let limited = policy.model_limits.into_iter();
        let limited = limited.filter(|(_, limits)| limits.enqueued_tokens.is_some());
        let counted = limited.map(|(model, _)| model).collect();
        let endpoint = batch.new.endpoint;
        let context = BatchContext {
            id: batch.new.id.to_string(),
            endpoint: endpoint.as_str().to_owned(),
            metadata: batch.new.metadata.clone().unwrap_or_default().into_iter().collect(),
            first_model,
        };
        let rules = (permissions.clone(), counted);
        let validator = ChunkValidator::new(tenant, (context, endpoint), plugins.clone(), rules);
        let judged_by = validator.validators().iter().map(|plugin| served_by(plugin)).collect();
        // A chunk is read only after its memory is reserved.
        let rest = stream::try_unfold(chunks, async |mut chunks| {
            Ok(chunks.next().await?.map(|chunk| (chunk, chunks)))
        });
        let chunks = stream::iter(first.map(Ok)).chain(rest);
        let max_requests =
            max_requests.unwrap_or(u64::MAX).min(*self.config.batch.max_requests_per_file);
        let of = (tenant.clone(), batch.new.id.clone());
        match self.validate_chunks(of, chunks, Arc::new(validator), max_requests).await? {
            Ok(mut whole) => {
                whole.explain_models(&plugins, tenant, &permissions);
                Ok(whole.verdict(judged_by))
            }
            Err(error) => Ok(FileVerdict::Rejected(vec![plugin_error(&error)], judged_by)),
        }
    }

    /// Validates chunks in parallel and merges their results in order.
    async fn validate_chunks(
        &self,
        of: (TenantId, BatchId),
        chunks: impl Stream<Item = Result<(Vec<InputLine>, Reservation)>>,
        validator: Arc<ChunkValidator>,
        max_requests: u64,
    ) -> Result<std::result::Result<FileValidation, CallError>> {
        let threads = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        let validated = chunks
            .map(|chunk| {
                let (validator, spans, of) = (validator.clone(), self.spans.clone(), of.clone());
                async move {
                    let (chunk, memory) = chunk?;
                    // Each chunk has its own task, so that all cores are used.
                    let validating = AbortOnDropHandle::new(tokio::spawn(async move {
                        let (began, lines) =
                            (batchwright_telemetry::trace::now(), chunk.len() as u64);
                        let validated = validator.validate(chunk).await;
                        drop(memory);
                        let code = validated.as_ref().err().map(CallError::code);
                        spans.part("validate", (&of.0, &of.1), began, |span| {
                            let span = span.number("lines", lines);
                            match code {
                                Some(code) => span.failed(code.as_str()),
                                None => span,
                            }
                        });
                        validated
                    }));
                    Ok::<_, StoreError>(validating.await)
                }
            })
            .buffered(threads.saturating_mul(2));
        let mut validated = std::pin::pin!(validated);
        let mut whole =
            FileValidation::new(self.config.batch.max_reported_errors.get(), max_requests);
        while let Some(chunk) = validated.next().await {
            match chunk? {
                Ok(Ok(chunk)) => whole.add(chunk),
                Ok(Err(error)) => return Ok(Err(error)),
                Err(_) => return Err(StoreError::Closed),
            }
            if whole.total > max_requests {
                break;
            }
        }
        Ok(Ok(whole))
    }

    /// Reserves memory for the hashes of the `custom_id`s of a file, unless they are few.
    async fn reserve_hashes(&self, holder: &Holder, file_bytes: u64) -> Option<Reservation> {
        let lines = (*self.config.batch.max_requests_per_file).min(file_bytes / MIN_LINE_BYTES);
        let bytes = HASH_BYTES.saturating_mul(lines);
        if bytes <= UNRESERVED_HASH_BYTES {
            return None;
        }
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        Some(self.memory.custom_ids.reserve(holder, bytes).await)
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
        InputLine::Buffered { bytes, .. } => {
            RequestLine::parse(std::str::from_utf8(bytes).ok()?).model.map(String::from)
        }
        InputLine::Large { .. } | InputLine::TooLong { .. } => None,
    }
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
