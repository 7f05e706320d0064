//! Errors of online requests.

use std::time::Duration;

use batchwright_domain::error_code::ErrorCode;
use batchwright_plugin::CallError;
use batchwright_store::StoreError;
use batchwright_tenancy::quota::Exhausted;

/// Error of an online request. The texts are shown to clients.
#[derive(Debug, thiserror::Error)]
pub enum OnlineError {
    /// The request breaks a rule, or the adapter refuses it.
    #[error("{message}")]
    Invalid {
        /// Code of the rule.
        code: String,
        /// What is wrong, and how to fix it.
        message: String,
        /// Parameter at fault.
        param: Option<String>,
    },
    /// No plugin serves the model for the endpoint.
    #[error("The model '{0}' does not exist, or this project has no access to it{1}.")]
    ModelNotFound(String, String),
    /// The provider's streams cannot be passed on.
    #[error(
        "The provider of the model '{0}' has no stream that this server can pass on; send the \
         request without 'stream'."
    )]
    NoStream(String),
    /// A limit of the project is used up.
    #[error("{limit}")]
    Limited {
        /// Limit.
        limit: Exhausted,
        /// Time until there may be room again.
        wait: Duration,
    },
    /// The project has as many requests in flight as it may have.
    #[error(
        "The project has reached its limit of {0} requests in flight (max_requests_in_flight)."
    )]
    InFlight(u64),
    /// The provider asks for a pause, and nothing was sent.
    #[error("The provider is at its rate limit; try again later.")]
    Busy(Duration),
    /// Requests cannot be sent to the provider now.
    #[error("{message}")]
    Unavailable {
        /// Cause.
        message: String,
        /// Time of the next attempt.
        wait: Duration,
    },
    /// No place became free in time.
    #[error("The provider has no free place for this request; try again in a moment.")]
    Overloaded,
    /// The provider or its plugin has failed after the request was sent.
    #[error("{message}")]
    Failed {
        /// Code of the failure.
        code: String,
        /// Cause.
        message: String,
        /// True if the time has run out.
        is_timeout: bool,
        /// True if the provider has done nothing, so that a retry costs nothing.
        may_retry: bool,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl OnlineError {
    pub(super) fn invalid(
        code: ErrorCode,
        message: impl Into<String>,
        param: Option<&str>,
    ) -> Self {
        let param = param.map(str::to_owned);
        Self::Invalid { code: code.into(), message: message.into(), param }
    }

    pub(super) fn of_call(error: &CallError, was_sent: bool) -> Self {
        let (code, message) = (error.code().into(), error.to_string());
        Self::Failed { code, message, is_timeout: false, may_retry: !was_sent }
    }
}
