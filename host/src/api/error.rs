//! Error objects: `{"error": {"message", "type", "param", "code"}}`, for every 4xx and 5xx.

use axum::Json;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::pace::TooSlow;
use super::wire;
use crate::batch::{CreateError, UploadError};
use crate::store::StoreError;

/// The SDKs retry some statuses by themselves unless they are told not to.
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    status: StatusCode,
    kind: &'static str,
    message: String,
    param: Option<String>,
    code: Option<&'static str>,
    should_retry: Option<bool>,
    /// Seconds.
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

    /// 400: a parameter is not as it should be.
    pub fn invalid(
        param: impl Into<String>,
        code: &'static str,
        message: impl Into<String>,
    ) -> Self {
        Self { param: Some(param.into()), code: Some(code), ..Self::bad_request(message) }
    }

    /// 400: the request as a whole is not as it should be.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// Another status of the kind 4xx.
    pub fn refused(status: StatusCode, message: impl Into<String>) -> Self {
        Self::new(status, "invalid_request_error", message)
    }

    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message)
    }

    pub fn with_code(self, code: &'static str) -> Self {
        Self { code: Some(code), ..self }
    }

    pub fn with_param(self, param: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..self }
    }

    pub fn method_not_allowed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", message)
    }

    /// 409, which trying again does not change.
    pub fn conflict(message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::CONFLICT, "invalid_request_error", message);
        Self { should_retry: Some(false), ..error }
    }

    pub fn too_large(message: impl Into<String>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", message)
    }

    /// 408, if that is why a body could not be read.
    pub fn of_late_body(error: &(dyn std::error::Error + 'static)) -> Option<Self> {
        let causes = std::iter::successors(Some(error), |cause| cause.source());
        let late = causes.into_iter().any(<dyn std::error::Error>::is::<TooSlow>);
        let message = "The rest of the request body came more slowly than the server waits for: a piece within client_timeout, and 4 KiB/s on average.";
        late.then(|| Self::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", message))
    }

    /// 503: the client is to come back in a moment.
    pub fn overloaded() -> Self {
        let message = "The server is busy; try again in a moment.";
        Self { retry_after: Some(1), ..Self::unavailable(message).with_code("server_overloaded") }
    }

    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message)
    }

    pub fn range_not_satisfiable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::RANGE_NOT_SATISFIABLE, "invalid_request_error", message)
    }

    /// For a status that comes without words.
    pub fn of_status(status: StatusCode) -> Self {
        let kind = if status.is_server_error() { "server_error" } else { "invalid_request_error" };
        Self::new(status, kind, status.canonical_reason().unwrap_or("The request was refused."))
    }

    /// 500, with the cause in the log alone.
    pub fn internal(cause: impl std::fmt::Display) -> Self {
        tracing::error!("a request failed: {cause}");
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "server_error",
            "The server had an error while processing the request; its log says more.",
        )
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Full(cause) => {
                tracing::error!("a request failed for want of disk space: {cause}");
                let message =
                    "The server's disk is full; try again when its operator has made room.";
                Self {
                    code: Some("storage_full"),
                    ..Self::new(StatusCode::INSUFFICIENT_STORAGE, "server_error", message)
                }
            }
            StoreError::Closed => {
                Self::unavailable("The server is shutting down; try again in a moment.")
            }
            StoreError::NotReady(cause) => {
                tracing::warn!("a request was refused: {cause}");
                Self::unavailable("The server is not ready; try again in a while.")
                    .with_code("server_not_ready")
            }
            error => Self::internal(error),
        }
    }
}

impl From<CreateError> for ApiError {
    fn from(error: CreateError) -> Self {
        let message = error.to_string();
        match error {
            CreateError::Endpoint(_) => Self::invalid("endpoint", "invalid_value", message),
            CreateError::CompletionWindow { .. } => {
                Self::invalid("completion_window", "invalid_value", message)
            }
            CreateError::Conflict(_) => Self::conflict(message)
                .with_param("idempotency_key")
                .with_code("idempotency_conflict"),
            CreateError::NotReady => Self {
                retry_after: Some(30),
                ..Self::unavailable(message).with_code("server_not_ready")
            },
            CreateError::Store(error) => error.into(),
        }
    }
}

impl From<UploadError> for ApiError {
    fn from(error: UploadError) -> Self {
        let message = error.to_string();
        match error {
            UploadError::Empty => Self::invalid("file", "empty_file", message),
            UploadError::TooLarge(_) => {
                Self::too_large(message).with_param("file").with_code("file_too_large")
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
                code: self.code,
            },
        };
        let mut response = (self.status, Json(body)).into_response();
        if let Some(retry) = self.should_retry {
            let value = HeaderValue::from_static(if retry { "true" } else { "false" });
            response.headers_mut().insert(SHOULD_RETRY, value);
        }
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}
