//! Validation: the whole input file, in pieces, judged side by side by the host's rules and by every validator.

use std::collections::{BTreeSet, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::ops::Range;
use std::sync::Arc;

use futures_util::{StreamExt, stream};
use tokio_util::task::AbortOnDropHandle;

use super::envelope::Envelope;
use super::input::{Input, InputLine};
use super::line::{RequestLine, string, with_model};
use super::not_json;
use super::served_by::served_by;
use super::whole::Whole;
use super::{Batches, ENDPOINTS};
use crate::memory::{Holder, Pool, Share};
use crate::plugin::types::{BatchContext, Judgement, Line, Violation};
use crate::plugin::{CallError, Plugin, Snapshot};
use crate::store::{BatchError, BatchRecord, Claim, Result, ServedBy, StoreError, Validated};

/// What is judged in one piece: lines, or bytes if those are reached first.
const PIECE_LINES: usize = 1000;
const PIECE_BYTES: usize = 256 << 10;

/// A piece is held as it was read, as text, as the copy that all validators but the last are given, and as the hashes of its keys.
const COPIES: usize = 4;

/// What is read of a file at a time, in bytes.
const READ: u64 = 256 << 10;

/// What the hash of a `custom_id` takes in a table that has just grown, in bytes; and the shortest line that has one.
const HASH_BYTES: u64 = 68;
const SHORTEST_LINE: u64 = 17;

/// Memory for hashes that every validation has, in bytes.
const FREE_HASHES: u64 = 64 << 10;

/// What is looked at of a file to see whether it is another kind of file, in bytes.
const BEGINNING: u64 = 16 << 10;

/// Findings that are kept of one piece.
const MAX_PIECE_VIOLATIONS: usize = 1000;

/// What validation found.
pub enum Verdict {
    Good(Validated),
    /// What is wrong, and the validators that say so.
    Bad(Vec<BatchError>, Vec<ServedBy>),
}

/// All that judging a piece needs.
struct Judge {
    tenant: String,
    batch: BatchContext,
    validators: Vec<Arc<Plugin>>,
    plugins: Arc<Snapshot>,
    hashers: [RandomState; 2],
    /// For requests that name no model.
    default_model: Option<String>,
}

/// A piece, judged.
pub struct Judged {
    pub requests: Vec<Known>,
    pub violations: Vec<Violation>,
    /// Violations beyond these.
    pub unlisted: u64,
    /// The plugins that its requests go to.
    pub providers: BTreeSet<String>,
}

/// What rules across lines need to know of a line.
pub struct Known {
    pub line: u64,
    /// A hash of 128 bits, keyed anew for each batch, stands for the custom_id: a million of them fit into memory.
    pub custom_id: Option<u128>,
    pub model: Option<String>,
}

impl Batches {
    pub(super) async fn validate(&self, claim: &Claim, batch: &BatchRecord) -> Result<Verdict> {
        let (tenant, file_id) = (&claim.tenant, &batch.new.input_file_id);
        let Some(file) = self.store.input_file(claim).await? else {
            return Ok(Verdict::Bad(
                vec![of_input_file(format!(
                    "Cannot find file {file_id}, or the organization does not have access to it."
                ))],
                Vec::new(),
            ));
        };
        if file.purpose != "batch" {
            return Ok(Verdict::Bad(
                vec![of_input_file(format!(
                    "The file {file_id} has the purpose '{}'; an input file must be uploaded with the purpose 'batch'.",
                    file.purpose
                ))],
                Vec::new(),
            ));
        }
        let holder: Holder = tenant.as_str().into();
        let hashes = HASH_BYTES
            .saturating_mul(self.settings.max_requests_per_file.min(file.bytes / SHORTEST_LINE));
        let _hashes = match hashes > FREE_HASHES {
            true => Some(
                self.memory
                    .custom_ids
                    .take(&holder, usize::try_from(hashes).unwrap_or(usize::MAX))
                    .await,
            ),
            false => None,
        };
        let longest = self.settings.max_line_size.in_memory();
        let input = match Input::open(&self.blobs, tenant, file_id, file.bytes, longest, READ).await
        {
            Ok(input) => input,
            Err(StoreError::Missing(cause)) => {
                return Ok(Verdict::Bad(vec![lost_input(claim, file_id, &cause)], Vec::new()));
            }
            Err(error) => return Err(error),
        };
        if let Some(message) = self.other_kind(tenant, file_id, file.bytes).await? {
            let error = BatchError {
                code: "invalid_json_line".into(),
                message,
                param: None,
                line: Some(1),
            };
            return Ok(Verdict::Bad(vec![error], Vec::new()));
        }
        let mut pieces =
            Pieces { input, next: None, memory: self.memory.validation.clone(), holder };
        let first = pieces.next().await?;
        let plugins = self.registry.current();
        // A batch that was created before a rule went away waits for it to come back.
        plugins
            .check_required(&self.settings.required_plugins, tenant, &ENDPOINTS)
            .map_err(StoreError::NotReady)?;
        let validators = plugins.validators(tenant, &batch.new.endpoint);
        let judged_by = validators.iter().map(|plugin| served_by(plugin)).collect();
        let judge = Arc::new(Judge {
            tenant: tenant.clone(),
            batch: BatchContext {
                id: batch.new.id.clone(),
                endpoint: batch.new.endpoint.clone(),
                metadata: batch.new.metadata.clone().unwrap_or_default().into_iter().collect(),
                first_model: first.as_ref().and_then(|(piece, _)| first_model(piece)),
            },
            validators,
            default_model: plugins.default_model(tenant, &batch.new.endpoint).map(str::to_owned),
            plugins: plugins.clone(),
            hashers: [RandomState::new(), RandomState::new()],
        });
        let threads = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        // The next piece is not read before there is room for this one.
        let rest = stream::try_unfold(pieces, async |mut pieces| {
            Ok(pieces.next().await?.map(|piece| (piece, pieces)))
        });
        let pieces = stream::iter(first.map(Ok)).chain(rest);
        let judged = pieces
            .map(|piece: Result<(Vec<InputLine>, Share)>| {
                let judge = judge.clone();
                async move {
                    let (piece, memory) = piece?;
                    // Each on a task of its own, so that all cores take part.
                    let judging = AbortOnDropHandle::new(tokio::spawn(async move {
                        let judged = judge.judge(piece).await;
                        drop(memory);
                        judged
                    }));
                    Ok::<_, StoreError>(judging.await)
                }
            })
            .buffered(threads.saturating_mul(2));
        let mut judged = std::pin::pin!(judged);
        let mut whole =
            Whole::new(self.settings.max_reported_errors, self.settings.max_requests_per_file);
        while let Some(piece) = judged.next().await {
            match piece? {
                Ok(Ok(piece)) => whole.add(piece),
                Ok(Err(error)) => return Ok(Verdict::Bad(vec![of_plugin(&error)], judged_by)),
                Err(_) => return Err(StoreError::Closed),
            }
            if whole.total > self.settings.max_requests_per_file {
                break;
            }
        }
        whole.explain_models(&plugins, tenant);
        Ok(whole.verdict(judged_by))
    }

    /// What a file is, by its beginning, if its lines are no requests.
    async fn other_kind(&self, tenant: &str, file: &str, bytes: u64) -> Result<Option<String>> {
        let beginning = self.blobs.read_range(tenant, file, 0..bytes.min(BEGINNING)).await;
        match beginning {
            Ok(beginning) => Ok(not_json::of_file(&beginning)),
            Err(StoreError::Missing(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// The error of a batch whose input cannot be read any more, with the cause for the operator alone.
pub fn lost_input(claim: &Claim, file: &str, cause: &str) -> BatchError {
    tracing::error!(batch = claim.batch_id, file, "the bytes of an input file are gone: {cause}");
    let message = format!(
        "The content of the input file {file} is lost or damaged; upload it again and create a new batch."
    );
    BatchError {
        code: "input_file_lost".into(),
        message,
        param: Some("input_file_id".into()),
        line: None,
    }
}

/// The model that the first request names.
fn first_model(piece: &[InputLine]) -> Option<String> {
    match piece.first()? {
        InputLine::Whole { bytes, .. } => {
            RequestLine::parse(std::str::from_utf8(bytes).ok()?).model.map(String::from)
        }
        InputLine::Large { .. } | InputLine::TooLong { .. } => None,
    }
}

/// A file in pieces, each with the share of memory that it takes.
struct Pieces {
    input: Input,
    /// A large line that was found at the end of the last piece.
    next: Option<(u64, Range<u64>)>,
    memory: Pool,
    holder: Holder,
}

impl Pieces {
    /// The next lines. A large line is a piece of its own.
    async fn next(&mut self) -> Result<Option<(Vec<InputLine>, Share)>> {
        if let Some((number, range)) = self.next.take()
            && let Some(piece) = self.large(number, range).await?
        {
            return Ok(Some(piece));
        }
        let mut share = self.memory.take(&self.holder, PIECE_BYTES.saturating_mul(COPIES)).await;
        let mut piece = Vec::new();
        let mut bytes = 0_usize;
        while piece.len() < PIECE_LINES && bytes < PIECE_BYTES {
            match self.input.next().await? {
                None => break,
                Some(InputLine::Large { number, range }) if piece.is_empty() => {
                    drop(share);
                    if let Some(piece) = self.large(number, range).await? {
                        return Ok(Some(piece));
                    }
                    share =
                        self.memory.take(&self.holder, PIECE_BYTES.saturating_mul(COPIES)).await;
                }
                Some(InputLine::Large { number, range }) => {
                    self.next = Some((number, range));
                    break;
                }
                Some(line) => {
                    if let InputLine::Whole { bytes: text, .. } = &line {
                        bytes = bytes.saturating_add(text.len());
                    }
                    piece.push(line);
                }
            }
        }
        share.settle(bytes.saturating_mul(COPIES));
        Ok((!piece.is_empty()).then_some((piece, share)))
    }

    async fn large(
        &mut self,
        number: u64,
        range: Range<u64>,
    ) -> Result<Option<(Vec<InputLine>, Share)>> {
        let size = usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(usize::MAX);
        let share = self.memory.take(&self.holder, size.saturating_mul(COPIES)).await;
        let bytes = self.input.large(range.clone()).await?;
        Ok(bytes.map(|bytes| (vec![InputLine::Whole { number, at: range.start, bytes }], share)))
    }
}

impl Judge {
    async fn judge(&self, piece: Vec<InputLine>) -> std::result::Result<Judged, CallError> {
        let mut violations = Vec::new();
        let mut requests = Vec::with_capacity(piece.len());
        let mut lines = Vec::with_capacity(piece.len());
        for line in piece {
            let (number, text) = match line {
                InputLine::Whole { number, bytes, .. } => (number, String::from_utf8(bytes.into())),
                InputLine::Large { number, .. } | InputLine::TooLong { number } => {
                    requests.push(Known { line: number, custom_id: None, model: None });
                    violations.push(violation(
                        number,
                        "line_too_long",
                        "This line is longer than the server allows (max_line_size).",
                        None,
                    ));
                    continue;
                }
            };
            let settled = match text {
                Ok(text) => self.settle(number, text, &mut violations),
                Err(error) => {
                    let valid_up_to = error.utf8_error().valid_up_to();
                    let message = not_json::not_utf8(error.as_bytes(), valid_up_to);
                    violations.push(violation(number, "invalid_json_line", &message, None));
                    None
                }
            };
            match settled {
                Some((known, text)) => {
                    requests.push(known);
                    lines.push(Line { number, text });
                }
                None => requests.push(Known { line: number, custom_id: None, model: None }),
            }
        }
        let mut unlisted = 0_u64;
        let mut found = |judged: Judgement| {
            violations.extend(judged.violations);
            unlisted = unlisted.saturating_add(judged.unlisted);
        };
        if let Some((last, others)) = self.validators.split_last() {
            for validator in others {
                found(validator.validate(&self.tenant, self.batch.clone(), lines.clone()).await?);
            }
            found(last.validate(&self.tenant, self.batch.clone(), lines).await?);
        }
        let providers = self.judge_models(&requests, &mut violations);
        unlisted =
            unlisted.saturating_add(violations.len().saturating_sub(MAX_PIECE_VIOLATIONS) as u64);
        violations.sort_by_key(|violation| violation.line);
        violations.truncate(MAX_PIECE_VIOLATIONS);
        Ok(Judged { requests, violations, unlisted, providers })
    }

    /// Reads a line once and for all, and writes it as every rule is to see it. What is no JSON, or has a key twice, no validator sees.
    fn settle(
        &self,
        number: u64,
        text: String,
        violations: &mut Vec<Violation>,
    ) -> Option<(Known, String)> {
        let line = match Envelope::parse(&text) {
            Ok(line) => line,
            Err(error) => {
                let message = not_json::explain(&text, &error);
                violations.push(violation(number, "invalid_json_line", &message, None));
                return None;
            }
        };
        for path in &line.duplicates {
            let message = format!(
                "The key '{path}' is there more than once, and readers differ in which one they take; leave one."
            );
            violations.push(violation(number, "duplicate_key", &message, Some(path)));
        }
        if !line.duplicates.is_empty() {
            return None;
        }
        let [low, high] = &self.hashers;
        let hash = |id: &str| u128::from(low.hash_one(id)) | u128::from(high.hash_one(id)) << 64;
        let custom_id = line.custom_id.as_deref().map(hash);
        let default = self.default_model.as_ref().filter(|_| line.has_body && !line.has_model);
        let model = default.cloned().or_else(|| line.model.map(String::from));
        let url = line.url.filter(|url| self.is_other_form(url)).map(|url| range_of(&text, url));
        let body =
            default.and_then(|_| RequestLine::parse(&text).body.map(|body| range_of(&text, body)));
        let text = self.rewritten(text, url, body.zip(default));
        Some((Known { line: number, custom_id, model }, text))
    }

    /// Whether a `url` is the batch's endpoint without its `/v1`, as tools for Azure write it.
    fn is_other_form(&self, url: &str) -> bool {
        let short = self.batch.endpoint.strip_prefix("/v1");
        short.is_some() && string(url).as_deref() == short
    }

    /// A line with the batch's endpoint as its `url`, and with a model in its body, where it had neither.
    fn rewritten(
        &self,
        mut text: String,
        url: Option<Range<usize>>,
        body: Option<(Range<usize>, &String)>,
    ) -> String {
        // From the back, as each moves what is behind it.
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

    /// The host's own rules for a line: it can be executed, and there is a plugin for its model. Returns the plugins' names.
    fn judge_models(
        &self,
        requests: &[Known],
        violations: &mut Vec<Violation>,
    ) -> BTreeSet<String> {
        let mut providers = BTreeSet::new();
        let faulty: HashSet<u64> = violations.iter().map(|violation| violation.line).collect();
        // What a line says of another endpoint is not held against it here.
        let elsewhere: HashSet<u64> = violations
            .iter()
            .filter(|violation| violation.code == "invalid_url")
            .map(|violation| violation.line)
            .collect();
        for request in requests {
            match &request.model {
                Some(_) if elsewhere.contains(&request.line) => {}
                Some(model) => {
                    let route = self.plugins.route(&self.tenant, model);
                    if let Some(route) =
                        route.filter(|route| route.plugin.handles(&self.batch.endpoint))
                    {
                        if !providers.contains(&route.plugin.name) {
                            providers.insert(route.plugin.name.clone());
                        }
                    } else {
                        let shown: String = model.chars().take(200).collect();
                        let mut message = format!(
                            "The provided model '{shown}' is not supported by the Batch API: it does not exist or is not supported"
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
                // Whatever rules the operator has, a line that cannot be executed is not let through.
                None if !faulty.contains(&request.line) => {
                    let message =
                        "The line has no body with a model, without which it cannot be executed.";
                    violations.push(violation(
                        request.line,
                        "invalid_request",
                        message,
                        Some("body.model"),
                    ));
                }
                None => {}
            }
            if request.custom_id.is_none()
                && request.model.is_some()
                && !faulty.contains(&request.line)
            {
                let message = "The line has no custom_id that is valid text, without which its result could not be told apart.";
                violations.push(violation(
                    request.line,
                    "invalid_request",
                    message,
                    Some("custom_id"),
                ));
            }
        }
        providers
    }
}

pub const MODEL_NOT_FOUND: &str = "model_not_found";

/// Where a part of a text is in it.
fn range_of(text: &str, part: &str) -> Range<usize> {
    let start = (part.as_ptr() as usize).saturating_sub(text.as_ptr() as usize);
    start..start.saturating_add(part.len())
}

pub fn violation(line: u64, code: &str, message: &str, param: Option<&str>) -> Violation {
    Violation { line, code: code.into(), message: message.into(), param: param.map(str::to_owned) }
}

fn of_input_file(message: String) -> BatchError {
    BatchError {
        code: "invalid_request".into(),
        message,
        param: Some("input_file_id".into()),
        line: None,
    }
}

fn of_plugin(error: &CallError) -> BatchError {
    BatchError { code: error.code().into(), message: error.to_string(), param: None, line: None }
}
