//! Request in flight: attempts until the request has a result or is deferred.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use batchwright_domain::clock::Timestamp;
use batchwright_domain::error_code::ErrorCode;
use batchwright_domain::ids::BatchId;
use batchwright_domain::usage::TokenUsage;
use batchwright_plugin::types::{Answer, Failure};
use batchwright_store::{Charge, ResultKind, ResultRow};
use bytes::Bytes;
use futures_util::FutureExt;

use crate::formats::line::{RequestLine, with_model};
use crate::formats::result_line::{request_id, row};
use crate::request::context::{Context, Line};
use crate::request::outcome::{AttemptOutcome, FinalAnswer};
use crate::schedule::retry_queue::{Entry, RetryQueue};
use crate::worker::execute::ROW_OVERHEAD_BYTES;
use crate::worker::record::Recorded;

/// Request in flight.
pub(crate) struct Task {
    pub(super) context: Arc<Context>,
    pub(super) deferred: Arc<RetryQueue>,
    pub(super) batch: BatchId,
    pub(super) entry: Entry,
    pub(super) bytes: Bytes,
}

impl Task {
    /// Runs a request to its result.
    ///
    /// Returns `None` if the request was deferred, or if the batch was stopped before it was sent.
    pub(super) async fn run(mut self) -> Option<Recorded> {
        loop {
            // Boxed, because the future is large and its wrappers would move it.
            let attempt = AssertUnwindSafe(Box::pin(self.attempt())).catch_unwind();
            let (at, retry_state) = match attempt.await {
                Err(_) => {
                    let row = panic_row(&self.batch, self.entry.number, &self.bytes);
                    return Some(Recorded::of_host(row));
                }
                Ok(TaskOutcome::Recorded(recorded)) => return Some(recorded),
                Ok(TaskOutcome::Stopped) => return None,
                Ok(TaskOutcome::Retry(at, retry_state)) => (at, retry_state),
            };
            self.entry.at = at;
            self.entry.retry_state = retry_state;
            // If there is no room for more deferred lines, the request waits in this task.
            match self.deferred.add(self.entry) {
                Ok(()) => return None,
                Err(entry) => self.entry = entry,
            }
            tokio::select! {
                () = self.context.clock.sleep_until(at) => {}
                () = self.context.leave.cancelled() => return None,
            }
        }
    }

    /// Makes one attempt at the request.
    async fn attempt(&self) -> TaskOutcome {
        let (batch, number) = (&self.batch, self.entry.number);
        let line = std::str::from_utf8(&self.bytes).map(RequestLine::parse).unwrap_or_default();
        let custom_id = line.custom_id.as_deref().unwrap_or_default();
        // A moderation line may name no model. It gets the model that it was validated with.
        let default = self.context.default_model.as_deref().filter(|_| line.model.is_none());
        let with_default =
            line.body.zip(default).map(|(body, model)| (with_model(body, model), model));
        let (body, model) = match &with_default {
            Some((body, model)) => (Some(body.as_str()), Some(*model)),
            None => (line.body, line.model.as_deref()),
        };
        let (Some(body), Some(model)) = (body, model) else {
            // Validation rejects such lines, so the file must have changed since then.
            let message = "The input file has changed since it was validated; \
                           upload it again and create a new batch."
                .into();
            let failure =
                Answer::Failure(Failure { code: ErrorCode::InvalidRequest.into(), message });
            let row = row(batch, number, custom_id, &failure);
            return TaskOutcome::Recorded(Recorded::of_host(row));
        };
        let id = request_id(batch, number);
        let line = Line { id: &id, custom_id, model, body, number, mark: mark(batch, number) };
        let (listed, outcome) = self.context.attempt(line, self.entry.retry_state).await;
        match outcome {
            AttemptOutcome::Stopped => TaskOutcome::Stopped,
            AttemptOutcome::Retry(at, retry_state) => TaskOutcome::Retry(at, retry_state),
            AttemptOutcome::Answered(FinalAnswer { answer, by, mut reservation, metered }) => {
                let mut row = row(batch, number, custom_id, &answer);
                drop(answer);
                if let Some(reservation) = &mut reservation {
                    reservation.shrink_to(row.payload.len().saturating_add(ROW_OVERHEAD_BYTES));
                }
                // A refused request names a model that may not exist.
                let is_charged =
                    row.kind == ResultKind::Completed || row.usage != TokenUsage::default();
                let (model, hold) = metered.map(|metered| (metered.model, metered.hold)).unzip();
                if let Some((model, hold)) = model.zip(hold.as_ref()).filter(|_| is_charged) {
                    let price = hold.price(&model);
                    row.charge = Some(Charge { model, price });
                }
                TaskOutcome::Recorded(Recorded { row, by, reservation, hold, listed })
            }
        }
    }
}

/// Outcome of one attempt at a request.
enum TaskOutcome {
    /// The request has a result.
    Recorded(Recorded),
    /// The request is retried at this time.
    Retry(Timestamp, crate::schedule::retry_queue::RetryState),
    /// The batch was stopped before the request was sent.
    Stopped,
}

/// Returns the hash by which breakers identify a line.
pub(crate) fn mark(batch: &BatchId, number: u64) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    (batch.as_str(), number).hash(&mut hasher);
    hasher.finish()
}

/// Returns the result of a request whose task panicked.
///
/// A panic is a bug of the server. The line gets an error, and the batch continues.
fn panic_row(batch: &BatchId, number: u64, bytes: &Bytes) -> ResultRow {
    let line = std::str::from_utf8(bytes).map(RequestLine::parse).unwrap_or_default();
    let message = "The server failed while it processed this request; see the server log.".into();
    let failure = Failure { code: ErrorCode::InternalError.into(), message };
    row(batch, number, line.custom_id.as_deref().unwrap_or_default(), &Answer::Failure(failure))
}
