//! Rules for requests: those of the host, and all validators.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::ops::Range;
use std::sync::Arc;

use batchwright_domain::endpoint::Endpoint;
use batchwright_domain::error_code::ErrorCode;
use batchwright_domain::ids::TenantId;
use batchwright_domain::limits::Permissions;
use batchwright_plugin::types::{BatchContext, Line, ValidationReport, Violation};
use batchwright_plugin::{CallError, Plugin, Snapshot};

use crate::formats::envelope::Envelope;
use crate::formats::input::InputLine;
use crate::formats::line::{RequestLine, string, with_model};
use crate::formats::not_json;
use crate::schedule::quotas::estimated_tokens;

/// Maximum number of violations that a chunk keeps.
const MAX_CHUNK_VIOLATIONS: usize = 1000;

/// Validator of a chunk.
pub(crate) struct ChunkValidator {
    tenant: TenantId,
    batch: BatchContext,
    endpoint: Endpoint,
    validators: Vec<Arc<Plugin>>,
    plugins: Arc<Snapshot>,
    permissions: Arc<Permissions>,
    /// Models with a limit of enqueued tokens, as their providers know them.
    counted: BTreeSet<String>,
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
    /// Estimated input tokens by model, of the models that have a limit.
    pub tokens: BTreeMap<String, u64>,
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
    /// Estimated input tokens, if some model has a limit.
    pub tokens: u64,
}

impl ChunkValidator {
    /// Creates a validator of the chunks of a batch, with the plugins that serve now.
    pub(crate) fn new(
        tenant: &TenantId,
        (batch, endpoint): (BatchContext, Endpoint),
        plugins: Arc<Snapshot>,
        (permissions, counted): (Arc<Permissions>, BTreeSet<String>),
    ) -> Self {
        Self {
            tenant: tenant.clone(),
            batch,
            endpoint,
            validators: plugins.validators(tenant, endpoint, &permissions),
            default_model: plugins.default_model(tenant, endpoint, &permissions).map(str::to_owned),
            plugins,
            permissions,
            counted,
            hashers: [RandomState::new(), RandomState::new()],
        }
    }

    /// Returns the validators.
    pub(crate) fn validators(&self) -> &[Arc<Plugin>] {
        &self.validators
    }

    /// Validates a chunk with the rules of the host and with all validators.
    pub(crate) async fn validate(
        &self,
        chunk: Vec<InputLine>,
    ) -> std::result::Result<ValidatedChunk, CallError> {
        let mut violations = Vec::new();
        let mut requests = Vec::with_capacity(chunk.len());
        let mut lines = Vec::with_capacity(chunk.len());
        for line in chunk {
            let (number, text) = match line {
                InputLine::Buffered { number, bytes, .. } => {
                    (number, String::from_utf8(bytes.into()))
                }
                InputLine::Large { number, .. } | InputLine::TooLong { number } => {
                    requests.push(Known { line: number, custom_id: None, model: None, tokens: 0 });
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
                None => {
                    requests.push(Known { line: number, custom_id: None, model: None, tokens: 0 })
                }
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
        let (providers, tokens) = self.check_models(&requests, &mut violations);
        let excess = violations.len().saturating_sub(MAX_CHUNK_VIOLATIONS);
        unlisted = unlisted.saturating_add(excess as u64);
        violations.sort_by_key(|violation| violation.line);
        violations.truncate(MAX_CHUNK_VIOLATIONS);
        Ok(ValidatedChunk { requests, violations, unlisted, providers, tokens })
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
        let tokens = match self.counted.is_empty() {
            true => 0,
            false => estimated_tokens(RequestLine::parse(&text).body.map_or(0, str::len)),
        };
        let text = self.normalize(text, url, body.zip(default));
        Some((Known { line: number, custom_id, model, tokens }, text))
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
    /// Returns the names of the plugins, and the tokens of the models that have a limit.
    fn check_models(
        &self,
        requests: &[Known],
        violations: &mut Vec<Violation>,
    ) -> (BTreeSet<String>, BTreeMap<String, u64>) {
        let (mut providers, mut tokens) = (BTreeSet::new(), BTreeMap::<String, u64>::new());
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
                    // A model that the project may not use looks like an unknown one.
                    let route = self.plugins.allowed_route(&self.tenant, model, &self.permissions);
                    let is_routed = route.is_some();
                    if let Some(route) = route.filter(|route| route.plugin.handles(self.endpoint)) {
                        if !providers.contains(route.plugin.name()) {
                            providers.insert(route.plugin.name().to_owned());
                        }
                        if self.counted.contains(&route.model) {
                            let sum = tokens.entry(route.model).or_default();
                            *sum = sum.saturating_add(request.tokens);
                        }
                    } else {
                        let shown: String = model.chars().take(200).collect();
                        let mut message = format!(
                            "The provided model '{shown}' is not supported by the Batch API: \
                             it does not exist or is not supported"
                        );
                        if is_routed {
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
        (providers, tokens)
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
