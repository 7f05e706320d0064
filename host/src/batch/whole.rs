//! What validation found in a whole file, put together from its pieces in order: rules across lines, and the errors that are listed.

use std::collections::{BTreeSet, HashMap};

use super::shortened;
use super::validate::{Judged, MODEL_NOT_FOUND, Verdict, violation};
use crate::plugin::Snapshot;
use crate::plugin::types::Violation;
use crate::store::{BatchError, ServedBy, Validated};

/// Models that are named to one who asked for another.
const MAX_NAMED_MODELS: usize = 20;

/// Text of all errors of a batch, in bytes; they are in every answer about it.
const MOST_ERROR_BYTES: usize = 256 << 10;

/// What is known of the whole file, as its pieces come in, in order.
pub struct Whole {
    pub total: u64,
    most_requests: u64,
    seen: HashMap<u128, u64>,
    /// None as long as there was no line, then the model of all lines so far, or none again.
    model: Option<Option<String>>,
    providers: BTreeSet<String>,
    errors: Vec<BatchError>,
    error_bytes: usize,
    most_errors: usize,
    unlisted: u64,
}

impl Whole {
    pub fn new(most_errors: usize, most_requests: u64) -> Self {
        Self {
            total: 0,
            most_requests,
            seen: HashMap::new(),
            model: None,
            providers: BTreeSet::new(),
            errors: Vec::new(),
            error_bytes: 0,
            most_errors,
            unlisted: 0,
        }
    }

    pub fn add(&mut self, mut piece: Judged) {
        self.providers.append(&mut piece.providers);
        self.unlisted = self.unlisted.saturating_add(piece.unlisted);
        let mut violations = piece.violations;
        for request in piece.requests {
            self.total = self.total.saturating_add(1);
            match &self.model {
                None => self.model = Some(request.model.clone()),
                Some(model) if *model != request.model => self.model = Some(None),
                Some(_) => {}
            }
            let Some(id) = request.custom_id else { continue };
            match self.seen.entry(id) {
                std::collections::hash_map::Entry::Vacant(free) => drop(free.insert(request.line)),
                std::collections::hash_map::Entry::Occupied(first) => {
                    let message = format!(
                        "The custom_id of this line is used by line {} already; each must be unique.",
                        first.get()
                    );
                    violations.push(violation(
                        request.line,
                        "duplicate_custom_id",
                        &message,
                        Some("custom_id"),
                    ));
                }
            }
        }
        // A stable sort: findings about one line stay in the order of the validators.
        violations.sort_by_key(|violation| violation.line);
        for found in violations {
            if self.errors.len() >= self.most_errors || self.error_bytes >= MOST_ERROR_BYTES {
                self.unlisted = self.unlisted.saturating_add(1);
                continue;
            }
            let Violation { line, code, message, param } = found;
            self.error_bytes = self.error_bytes.saturating_add(message.len()).saturating_add(100);
            self.errors.push(BatchError { code, message, param, line: Some(line) });
        }
    }

    /// Says once what could have been asked for instead of a model that is not served.
    pub fn explain_models(&mut self, plugins: &Snapshot, tenant: &str) {
        let Some(error) = self.errors.iter_mut().find(|error| error.code == MODEL_NOT_FOUND) else {
            return;
        };
        let models = plugins.models(tenant);
        let named: Vec<String> = models
            .iter()
            .take(MAX_NAMED_MODELS)
            .map(|(name, _)| format!("'{}'", shortened(name)))
            .collect();
        let more = models.len().saturating_sub(named.len());
        error.message.push_str(&match (named.is_empty(), more) {
            (true, _) => ". No model is served by name.".to_owned(),
            (false, 0) => format!(". Served: {}.", named.join(", ")),
            (false, more) => {
                format!(". Served: {}, and {more} more (GET /v1/models).", named.join(", "))
            }
        });
        if plugins.entries.iter().any(|entry| entry.error.is_some() && entry.is_shown_to(tenant)) {
            error.message.push_str(
                " A plugin could not be loaded, which may be why; the server's log has the cause.",
            );
        }
    }

    pub fn verdict(mut self, judged_by: Vec<ServedBy>) -> Verdict {
        let of_file = |code: &str, message: String| BatchError {
            code: code.into(),
            message,
            param: None,
            line: None,
        };
        if self.total > self.most_requests {
            let message = format!(
                "The input file has more than {} requests (max_requests_per_file); split it into several.",
                self.most_requests
            );
            self.errors.insert(0, of_file("too_many_requests", message));
        }
        if self.total == 0 {
            self.errors.push(of_file(
                "empty_file",
                "The input file is empty. A batch needs at least one request.".into(),
            ));
        }
        if self.unlisted > 0 {
            let (listed, more) = (self.errors.len(), self.unlisted);
            let at_least = if self.total > self.most_requests { "at least " } else { "" };
            let message = format!(
                "Only the first {listed} faults are listed (max_reported_errors); there are {at_least}{more} more."
            );
            self.errors.push(of_file("too_many_errors", message));
        }
        if self.errors.is_empty() {
            let (model, plugins) = (self.model.flatten(), self.providers);
            Verdict::Good(Validated { total: self.total, model, plugins, judged_by })
        } else {
            Verdict::Bad(self.errors, judged_by)
        }
    }
}
