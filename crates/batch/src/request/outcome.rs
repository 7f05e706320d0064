//! Outcome of an attempt, and small values that its parts share.

use std::sync::Arc;
use std::time::Duration;

use batchwright_domain::clock::Timestamp;
use batchwright_domain::error_code::ErrorCode;
use batchwright_memory::Reservation;
use batchwright_plugin::Plugin;
use batchwright_plugin::types::{Answer, Failure};

use crate::schedule::quotas::Hold;
use crate::schedule::retry_queue::RetryState;

/// Final answer to a request.
pub(crate) struct FinalAnswer {
    /// Response or failure.
    pub answer: Answer,
    /// Plugin that gave the answer, or `None` if the host gave it.
    pub by: Option<Arc<Plugin>>,
    /// Memory that covers the answer.
    pub reservation: Option<Reservation>,
    /// Model that answered, with the quota; none if the request was not sent.
    pub metered: Option<Metered>,
}

/// Model of a request, and what the request has reserved of the quota of its project.
pub(crate) struct Metered {
    /// Name of the model as its provider knows it.
    pub model: Arc<str>,
    /// Reservation.
    pub hold: Hold,
}

/// Outcome of an attempt.
pub(crate) enum AttemptOutcome {
    /// The request has its final answer.
    Answered(FinalAnswer),
    /// The request is retried at this time.
    Retry(Timestamp, RetryState),
    /// The batch was stopped before the request was sent.
    Stopped,
}

/// Returns a number that differs between a plugin and an earlier plugin of the same name.
pub(crate) fn identity(plugin: &Plugin) -> usize {
    std::ptr::from_ref(plugin) as usize
}

/// Returns the HTTP status or the code of an answer that is a failure, for the traces.
pub(crate) fn error_of(answer: &Answer) -> Option<String> {
    match answer {
        Answer::Response(response) if (200..300).contains(&response.status) => None,
        Answer::Response(response) => Some(response.status.to_string()),
        // A guest may write anything into the code of a failure.
        Answer::Failure(failure) => Some(match ErrorCode::parse(&failure.code) {
            Some(code) => code.as_str().to_owned(),
            None => "plugin_failure".to_owned(),
        }),
    }
}

/// Converts a duration to milliseconds, for the log.
pub(crate) fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Creates an answer without a response of the provider.
pub(crate) fn failure(code: ErrorCode, message: String) -> Answer {
    Answer::Failure(Failure { code: code.into(), message })
}
