//! Error objects: `{"error": {"message", "type", "param", "code"}}`, for every 4xx and 5xx.

use std::borrow::Cow;
use std::time::Duration;

use axum::Json;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use batchwright_batch::{CreateError, OnlineError, UploadError};
use batchwright_domain::error_code::ErrorCode;
use batchwright_store::StoreError;
use batchwright_store::accounts::Refusal;
use batchwright_tenancy::quota::Exhausted;

use super::data_rate::BodyTooSlow;
use super::wire;

/// Response header that overrides the automatic retries of the SDKs.
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// Value of `Retry-After` for a project at its limit of open batches, in seconds.
const OPEN_BATCH_RETRY_SECONDS: u32 = 60;

/// Error of a request: status, error object and retry headers.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct ApiError {
    status: StatusCode,
    kind: &'static str,
    message: String,
    param: Option<String>,
    code: Option<Cow<'static, str>>,
    /// Value of the header `x-should-retry`.
    should_retry: Option<bool>,
    /// Value of the header `Retry-After`, in seconds.
    retry_after: Option<u32>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            kind,
            message: message.into(),
            param: None,
            code: None,
            should_retry: None,
            retry_after: None,
        }
    }

    /// Returns a 400 for an invalid parameter.
    pub(crate) fn invalid(
        param: impl Into<String>,
        code: ErrorCode,
        message: impl Into<String>,
    ) -> Self {
        Self { param: Some(param.into()), ..Self::bad_request(message) }.with_code(code)
    }

    /// Returns a 400 for a request that is invalid as a whole.
    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// Returns an error with another status 4xx.
    pub(crate) fn client_error(status: StatusCode, message: impl Into<String>) -> Self {
        Self::new(status, "invalid_request_error", message)
    }

    /// Returns a 404.
    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message)
    }

    /// Returns a 401, which the SDKs raise as an authentication error.
    pub(crate) fn unauthenticated(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "invalid_request_error", message)
            .with_code(ErrorCode::InvalidApiKey)
    }

    /// Returns a 403.
    pub(crate) fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "invalid_request_error", message)
    }

    /// Returns the 403 of a client that wants to create something in an archived project.
    pub(crate) fn project_archived() -> Self {
        Self::forbidden(
            "The project of this API key is archived: its data can be read and deleted, and \
             nothing can be created.",
        )
        .with_code(ErrorCode::ProjectArchived)
    }

    /// Returns the error of a client whose project allows no more.
    fn refused(refusal: Refusal) -> Self {
        let (code, message) = match refusal {
            Refusal::Archived => return Self::project_archived(),
            Refusal::StoredBytes(limit) => (
                ErrorCode::StorageLimitExceeded,
                format!(
                    "The files of the project would exceed its limit of {limit} bytes; delete \
                     files, or ask the administrator for more."
                ),
            ),
            Refusal::StoredFiles(limit) => (
                ErrorCode::FileLimitExceeded,
                format!(
                    "The project has reached its limit of {limit} files; delete files, or ask the \
                     administrator for more."
                ),
            ),
            Refusal::OpenBatches(limit) => {
                let message = format!(
                    "The project has reached its limit of {limit} batches that have not ended; \
                     try again when one has ended."
                );
                let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "requests", message);
                return Self { retry_after: Some(OPEN_BATCH_RETRY_SECONDS), ..error }
                    .with_code(ErrorCode::OpenBatchLimitExceeded);
            }
            Refusal::DisabledWebhook => {
                return Self::conflict(
                    "The webhook endpoint is disabled; update it, and try again.",
                );
            }
            Refusal::Webhooks(limit) => {
                return Self::bad_request(format!(
                    "The project has {limit} webhook endpoints already; delete some."
                ));
            }
            Refusal::Secrets(limit) => {
                return Self::bad_request(format!(
                    "The project has {limit} credentials already; delete some."
                ));
            }
            refusal => return Self::not_found(format!("The request was refused: {refusal}.")),
        };
        Self::bad_request(message).with_code(code)
    }

    /// Sets the error code.
    pub(crate) fn with_code(self, code: ErrorCode) -> Self {
        Self { code: Some(Cow::Borrowed(code.as_str())), ..self }
    }

    /// Sets the name of the parameter that caused the error.
    pub(crate) fn with_param(self, param: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..self }
    }

    /// Returns a 405.
    pub(crate) fn method_not_allowed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", message)
    }

    /// Returns a 429 for more concurrent calls than a project may have.
    pub(crate) fn too_many_requests(message: impl Into<String>) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, "requests", message)
    }

    /// Returns a 409. A retry cannot succeed, so the SDKs are told not to retry.
    pub(crate) fn conflict(message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::CONFLICT, "invalid_request_error", message);
        Self { should_retry: Some(false), ..error }
    }

    /// Returns a 413.
    pub(crate) fn too_large(message: impl Into<String>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", message)
    }

    /// Returns a 408 if a body could not be read because the client sent it too slowly.
    pub(crate) fn from_slow_body(error: &(dyn std::error::Error + 'static)) -> Option<Self> {
        let causes = std::iter::successors(Some(error), |cause| cause.source());
        let is_slow = causes.into_iter().any(<dyn std::error::Error>::is::<BodyTooSlow>);
        let message = "The request body arrived too slowly. The server expects data at least once \
                       per client_timeout, and 4 KiB/s on average.";
        is_slow.then(|| Self::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", message))
    }

    /// Returns a 503 for a server at its limits. The client may retry after a second.
    pub(crate) fn overloaded() -> Self {
        let message = "The server is busy; try again in a moment.";
        Self {
            retry_after: Some(1),
            ..Self::unavailable(message).with_code(ErrorCode::ServerOverloaded)
        }
    }

    /// Returns a 503.
    pub(crate) fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message)
    }

    /// Returns a 416.
    pub(crate) fn range_not_satisfiable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::RANGE_NOT_SATISFIABLE, "invalid_request_error", message)
    }

    /// Returns an error for a status that has no message.
    pub(crate) fn from_status(status: StatusCode) -> Self {
        let kind = if status.is_server_error() { "server_error" } else { "invalid_request_error" };
        Self::new(status, kind, status.canonical_reason().unwrap_or("The request was refused."))
    }

    /// Returns a 500. Only the log has the cause.
    pub(crate) fn internal(cause: impl std::fmt::Display) -> Self {
        tracing::error!(error = %cause, "request failed");
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "server_error",
            "The server had an error while processing the request; see the server's log.",
        )
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Full(cause) => {
                tracing::error!(error = %cause, "request failed, disk is full");
                let message =
                    "The server's disk is full; try again after its operator has freed disk space.";
                Self::new(StatusCode::INSUFFICIENT_STORAGE, "server_error", message)
                    .with_code(ErrorCode::StorageFull)
            }
            StoreError::Refused(refusal) => Self::refused(refusal),
            StoreError::Closed => {
                Self::unavailable("The server is shutting down; try again in a moment.")
            }
            StoreError::NotReady(cause) => {
                tracing::warn!(error = %cause, "request refused, server not ready");
                Self::unavailable("The server is not ready; try again later.")
                    .with_code(ErrorCode::ServerNotReady)
            }
            error => Self::internal(error),
        }
    }
}

impl From<CreateError> for ApiError {
    fn from(error: CreateError) -> Self {
        let message = error.to_string();
        match error {
            CreateError::Endpoint(_) => Self::invalid("endpoint", ErrorCode::InvalidValue, message),
            CreateError::CompletionWindow { .. } | CreateError::WindowNotAllowed { .. } => {
                Self::invalid("completion_window", ErrorCode::InvalidValue, message)
            }
            CreateError::Conflict(_) => Self::conflict(message)
                .with_param("idempotency_key")
                .with_code(ErrorCode::IdempotencyConflict),
            CreateError::NotReady => Self {
                retry_after: Some(30),
                ..Self::unavailable(message).with_code(ErrorCode::ServerNotReady)
            },
            CreateError::Store(error) => error.into(),
        }
    }
}

/// Returns a time in seconds, rounded up, as `Retry-After` has it.
pub(crate) fn whole_seconds(time: Duration) -> u64 {
    time.as_secs().saturating_add(u64::from(time.subsec_nanos() > 0))
}

/// Wait beyond which the SDKs are told not to retry on their own.
const MAX_RETRY_WAIT: Duration = Duration::from_secs(60);

impl ApiError {
    /// Sets the time after which the client may try again; tells the SDKs not to wait for long.
    fn after(self, wait: Duration) -> Self {
        let retry_after = Some(u32::try_from(whole_seconds(wait).max(1)).unwrap_or(u32::MAX));
        let should_retry = if wait > MAX_RETRY_WAIT { Some(false) } else { self.should_retry };
        Self { retry_after, should_retry, ..self }
    }

    /// Returns the error of a client whose project has used up a limit.
    fn limited(limit: &Exhausted, wait: Duration) -> Self {
        let (kind, code) = match limit {
            Exhausted::RequestsPerMinute(..) => {
                ("requests", ErrorCode::RequestsPerMinuteLimitExceeded)
            }
            Exhausted::RequestsPerDay(..) => ("requests", ErrorCode::RequestsPerDayLimitExceeded),
            Exhausted::TokensPerMinute(..) => ("tokens", ErrorCode::TokensPerMinuteLimitExceeded),
            Exhausted::Budget(_) => ("insufficient_quota", ErrorCode::BillingHardLimitReached),
        };
        Self::new(StatusCode::TOO_MANY_REQUESTS, kind, limit.to_string())
            .with_code(code)
            .after(wait)
    }
}

impl From<OnlineError> for ApiError {
    fn from(error: OnlineError) -> Self {
        let message = error.to_string();
        match error {
            OnlineError::Invalid { code, param, .. } => {
                Self { param, code: Some(Cow::Owned(code)), ..Self::bad_request(message) }
            }
            OnlineError::ModelNotFound(..) => {
                Self::not_found(message).with_param("model").with_code(ErrorCode::ModelNotFound)
            }
            OnlineError::NoStream(_) => {
                Self::invalid("stream", ErrorCode::StreamingUnsupported, message)
            }
            OnlineError::Limited { limit, wait } => Self::limited(&limit, wait),
            OnlineError::InFlight(_) => {
                Self::new(StatusCode::TOO_MANY_REQUESTS, "requests", message)
                    .with_code(ErrorCode::RequestsInFlightLimitExceeded)
                    .after(Duration::ZERO)
            }
            OnlineError::Busy(wait) => {
                Self::new(StatusCode::TOO_MANY_REQUESTS, "requests", message)
                    .with_code(ErrorCode::RateLimitExceeded)
                    .after(wait)
            }
            OnlineError::Unavailable { wait, .. } => {
                Self::unavailable(message).with_code(ErrorCode::ProviderUnavailable).after(wait)
            }
            OnlineError::Overloaded => Self::unavailable(message)
                .with_code(ErrorCode::ServerOverloaded)
                .after(Duration::ZERO),
            OnlineError::Failed { code, is_timeout, may_retry, .. } => {
                let status = match is_timeout {
                    true => StatusCode::GATEWAY_TIMEOUT,
                    false => StatusCode::BAD_GATEWAY,
                };
                // The provider may have charged for the request.
                let should_retry = (!may_retry).then_some(false);
                let error = Self::new(status, "server_error", message);
                Self { code: Some(Cow::Owned(code)), should_retry, ..error }
            }
            OnlineError::Store(error) => error.into(),
        }
    }
}

impl From<UploadError> for ApiError {
    fn from(error: UploadError) -> Self {
        let message = error.to_string();
        match error {
            UploadError::Empty => Self::invalid("file", ErrorCode::EmptyFile, message),
            UploadError::TooLarge(_) => {
                Self::too_large(message).with_param("file").with_code(ErrorCode::FileTooLarge)
            }
            UploadError::NoRoom => {
                Self::bad_request(message).with_code(ErrorCode::StorageLimitExceeded)
            }
            UploadError::Store(error) => error.into(),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = wire::ErrorBody {
            error: wire::Error {
                message: &self.message,
                kind: self.kind,
                param: self.param.as_deref(),
                code: self.code.as_deref(),
            },
        };
        let mut response = (self.status, Json(body)).into_response();
        if let Some(retry) = self.should_retry {
            let value = HeaderValue::from_static(if retry { "true" } else { "false" });
            response.headers_mut().insert(SHOULD_RETRY, value);
        }
        if self.status == StatusCode::UNAUTHORIZED {
            let value = HeaderValue::from_static("Bearer");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, value);
        }
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}
