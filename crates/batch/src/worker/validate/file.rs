//! Validation of a whole file: merges the results of its chunks in order.
//!
//! This module applies the rules that concern several lines, such as unique `custom_id`s, and
//! limits the list of errors.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use batchwright_domain::error_code::ErrorCode;
use batchwright_domain::ids::TenantId;
use batchwright_domain::limits::Permissions;
use batchwright_domain::text::truncate_for_message;
use batchwright_plugin::Snapshot;
use batchwright_plugin::types::Violation;
use batchwright_store::{BatchError, PluginVersion, Validated};

use crate::rules::{MODEL_NOT_FOUND, ValidatedChunk, violation};
use crate::worker::validate::FileVerdict;

/// Maximum number of available models that an error lists.
const MAX_LISTED_MODELS: usize = 20;

/// Maximum size of all errors of a batch, in bytes. API responses about the batch contain them.
const MAX_ERROR_BYTES: usize = 256 << 10;

/// Size of an error in addition to its message, in bytes.
const ERROR_OVERHEAD_BYTES: usize = 100;

/// Result of the chunks that have been added so far.
pub(crate) struct FileValidation {
    /// Number of requests.
    pub total: u64,
    max_requests: u64,
    /// Line number of the first use of each `custom_id`, by the hash of the `custom_id`.
    first_lines: HashMap<u128, u64>,
    /// `None` before the first line, then the model that all lines have, or `Some(None)` if the
    /// lines differ.
    model: Option<Option<String>>,
    providers: BTreeSet<String>,
    /// Estimated input tokens by model, of the models that have a limit.
    tokens: BTreeMap<String, u64>,
    errors: Vec<BatchError>,
    error_bytes: usize,
    max_errors: usize,
    /// Number of errors that are not listed.
    unlisted: u64,
}

impl FileValidation {
    /// Creates an empty result with limits on the listed errors and on the requests.
    pub(crate) fn new(max_errors: usize, max_requests: u64) -> Self {
        Self {
            total: 0,
            max_requests,
            first_lines: HashMap::new(),
            model: None,
            providers: BTreeSet::new(),
            tokens: BTreeMap::new(),
            errors: Vec::new(),
            error_bytes: 0,
            max_errors,
            unlisted: 0,
        }
    }

    /// Adds the result of the next chunk.
    pub(crate) fn add(&mut self, mut chunk: ValidatedChunk) {
        self.providers.append(&mut chunk.providers);
        for (model, tokens) in chunk.tokens {
            let sum = self.tokens.entry(model).or_default();
            *sum = sum.saturating_add(tokens);
        }
        self.unlisted = self.unlisted.saturating_add(chunk.unlisted);
        let mut violations = chunk.violations;
        for request in chunk.requests {
            self.total = self.total.saturating_add(1);
            match &self.model {
                None => self.model = Some(request.model.clone()),
                Some(model) if *model != request.model => self.model = Some(None),
                Some(_) => {}
            }
            let Some(id) = request.custom_id else { continue };
            match self.first_lines.entry(id) {
                std::collections::hash_map::Entry::Vacant(free) => drop(free.insert(request.line)),
                std::collections::hash_map::Entry::Occupied(first) => {
                    let message = format!(
                        "The custom_id of this line is already used by line {}; \
                         each custom_id must be unique.",
                        first.get()
                    );
                    violations.push(violation(
                        request.line,
                        ErrorCode::DuplicateCustomId,
                        &message,
                        Some("custom_id"),
                    ));
                }
            }
        }
        // The sort is stable, so that the errors of a line stay in the order of the validators.
        violations.sort_by_key(|violation| violation.line);
        for violation in violations {
            if self.errors.len() >= self.max_errors || self.error_bytes >= MAX_ERROR_BYTES {
                self.unlisted = self.unlisted.saturating_add(1);
                continue;
            }
            let Violation { line, code, message, param } = violation;
            let bytes = message.len().saturating_add(ERROR_OVERHEAD_BYTES);
            self.error_bytes = self.error_bytes.saturating_add(bytes);
            self.errors.push(BatchError { code, message, param, line: Some(line) });
        }
    }

    /// Adds the available models to the first error about an unknown model.
    pub(crate) fn explain_models(
        &mut self,
        plugins: &Snapshot,
        tenant: &TenantId,
        permissions: &Permissions,
    ) {
        let Some(error) =
            self.errors.iter_mut().find(|error| error.code == MODEL_NOT_FOUND.as_str())
        else {
            return;
        };
        let models = plugins.allowed_models(tenant, permissions);
        let listed: Vec<String> = models
            .iter()
            .take(MAX_LISTED_MODELS)
            .map(|(name, _)| format!("'{}'", truncate_for_message(name)))
            .collect();
        let more = models.len().saturating_sub(listed.len());
        let listed = listed.join(", ");
        error.message.push_str(&match (listed.is_empty(), more) {
            (true, _) => ". The server lists no models.".to_owned(),
            (false, 0) => format!(". Available models: {listed}."),
            (false, more) => {
                format!(". Available models: {listed}, and {more} more (GET /v1/models).")
            }
        });
        if plugins.entries.iter().any(|entry| entry.error.is_some() && entry.is_shown_to(tenant)) {
            error.message.push_str(
                " A plugin could not be loaded, which may be the cause; see the server log.",
            );
        }
    }

    /// Finishes the validation. `judged_by` lists the validators that took part.
    pub(crate) fn verdict(mut self, judged_by: Vec<PluginVersion>) -> FileVerdict {
        let of_file = |code: ErrorCode, message: String| BatchError {
            code: code.into(),
            message,
            param: None,
            line: None,
        };
        if self.total > self.max_requests {
            let message = format!(
                "The input file has more than {} requests (max_requests_per_batch of the \
                 project, or max_requests_per_file of the server); split it into several files.",
                self.max_requests
            );
            self.errors.insert(0, of_file(ErrorCode::TooManyRequests, message));
        }
        if self.total == 0 {
            self.errors.push(of_file(
                ErrorCode::EmptyFile,
                "The input file is empty. A batch needs at least one request.".into(),
            ));
        }
        if self.unlisted > 0 {
            let (listed, more) = (self.errors.len(), self.unlisted);
            let at_least = if self.total > self.max_requests { "at least " } else { "" };
            let message = format!(
                "Only the first {listed} errors are listed (max_reported_errors); \
                 there are {at_least}{more} more."
            );
            self.errors.push(of_file(ErrorCode::TooManyErrors, message));
        }
        if self.errors.is_empty() {
            FileVerdict::Accepted(Validated {
                total: self.total,
                model: self.model.flatten(),
                plugins: self.providers,
                tokens: self.tokens,
                judged_by,
            })
        } else {
            FileVerdict::Rejected(self.errors, judged_by)
        }
    }
}
