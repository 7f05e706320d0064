//! Error codes that the host itself uses. Plugins may use others for their own rules and failures.

/// Where a client finds a code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// `error.code` of a refused API call.
    Call,
    /// `errors.data[].code` of a batch that validation rejected.
    Batch,
    /// `error.code` of a line of the error file.
    Line,
}

/// Declares the codes: variant, text, places, one line of documentation.
macro_rules! error_codes {
    ($($(#[doc = $doc:literal])+ $name:ident = $text:literal in $($place:ident)+;)+) => {
        /// Error code that the host itself uses.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum ErrorCode {
            $($(#[doc = $doc])+ $name,)+
        }

        impl ErrorCode {
            /// Every code, in alphabetical order of its text.
            pub const ALL: &[Self] = &[$(Self::$name),+];

            /// Returns the code with a name.
            pub fn parse(text: &str) -> Option<Self> {
                match text {
                    $($text => Some(Self::$name),)+
                    _ => None,
                }
            }

            /// Returns the code as clients see it.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)+
                }
            }

            /// Returns what the code means, in one line.
            pub const fn meaning(self) -> &'static str {
                match self {
                    $(Self::$name => concat!($($doc),+),)+
                }
            }

            /// Returns where clients find the code.
            pub const fn places(self) -> &'static [Place] {
                match self {
                    $(Self::$name => &[$(Place::$place),+],)+
                }
            }
        }
    };
}

error_codes! {
    /// The call needs an admin key.
    AdminKeyRequired = "admin_key_required" in Call;
    /// The batch was cancelled before this request was executed.
    BatchCancelled = "batch_cancelled" in Line;
    /// The batch's completion window ended before this request had a result; the message names what
    /// it waited for.
    BatchExpired = "batch_expired" in Line;
    /// The project has spent its budget of this month, or requests in flight may spend the rest.
    BillingHardLimitReached = "billing_hard_limit_reached" in Call;
    /// No plugin of the project takes this credential from projects.
    CredentialNotAccepted = "credential_not_accepted" in Call;
    /// The `custom_id` of the line is already used by another line.
    DuplicateCustomId = "duplicate_custom_id" in Batch;
    /// A key occurs twice in an object that rules read.
    DuplicateKey = "duplicate_key" in Call Batch;
    /// The file has no content, or no line with a request.
    EmptyFile = "empty_file" in Call Batch;
    /// The project has as many files as it may; delete some.
    FileLimitExceeded = "file_limit_exceeded" in Call;
    /// The upload is larger than the setting `max_file_size`.
    FileTooLarge = "file_too_large" in Call;
    /// The `Host` of the request is not a name of this server; see the setting `allowed_hosts`.
    HostNotAllowed = "host_not_allowed" in Call;
    /// The idempotency key was used with other parameters.
    IdempotencyConflict = "idempotency_conflict" in Call;
    /// The input file could not be read after it was validated.
    InputFileLost = "input_file_lost" in Batch;
    /// The server failed while it processed the request; its log has the cause.
    InternalError = "internal_error" in Line;
    /// The API key is missing, wrong, revoked or expired.
    InvalidApiKey = "invalid_api_key" in Call;
    /// The line is not valid JSON, or the file is in another format.
    InvalidJsonLine = "invalid_json_line" in Batch;
    /// The `method` of the line is not `POST`.
    InvalidMethod = "invalid_method" in Batch;
    /// The line, its parameter or its input file cannot be used; the message says why.
    InvalidRequest = "invalid_request" in Call Batch Line;
    /// The parameter has another JSON type than expected.
    InvalidType = "invalid_type" in Call;
    /// The `url` of the line is not the endpoint of the batch.
    InvalidUrl = "invalid_url" in Batch;
    /// The parameter has the right type and a value that is not supported.
    InvalidValue = "invalid_value" in Call;
    /// The last admin key cannot be deleted, because nobody could administer the server.
    LastAdminKey = "last_admin_key" in Call;
    /// The line is longer than the setting `max_line_size`.
    LineTooLong = "line_too_long" in Batch;
    /// A parameter or a key of the line is missing.
    MissingRequiredParameter = "missing_required_parameter" in Call Batch;
    /// The API key has no scope for the call; the message names the scope.
    MissingScope = "missing_scope" in Call;
    /// No plugin serves the model for this endpoint.
    ModelNotFound = "model_not_found" in Call Batch Line;
    /// The OpenAI API has this resource and this server does not.
    NotServed = "not_served" in Call;
    /// The batch could not be validated because of a problem of the server; create it again.
    NotValidated = "not_validated" in Batch;
    /// The object has more properties than allowed.
    ObjectAboveMaxProperties = "object_above_max_properties" in Call;
    /// The project has as many batches that have not ended as it may; try again later.
    OpenBatchLimitExceeded = "open_batch_limit_exceeded" in Call;
    /// The request comes from a web page whose origin is not allowed; see the setting
    /// `cors_origins`.
    OriginNotAllowed = "origin_not_allowed" in Call;
    /// A result of the plugin is larger than its limit `max_output`.
    PluginAnswerTooLarge = "plugin_answer_too_large" in Call Batch Line;
    /// The plugin returned a result that its contract does not allow.
    PluginContractViolation = "plugin_contract_violation" in Call Batch Line;
    /// The plugin failed; the server's log has the cause.
    PluginFailed = "plugin_failed" in Call Batch Line;
    /// The plugin exceeded a limit of its memory, tables, handles or stack.
    PluginOutOfMemory = "plugin_out_of_memory" in Call Batch Line;
    /// The plugin exceeded its `call_timeout`.
    PluginTimeout = "plugin_timeout" in Call Batch Line;
    /// The project is archived: nothing can be created in it.
    ProjectArchived = "project_archived" in Call;
    /// The call needs the key of a project and not an admin key.
    ProjectKeyRequired = "project_key_required" in Call;
    /// Another project has this name.
    ProjectNameTaken = "project_name_taken" in Call;
    /// The provider answered with an error status and a body that is not an error object, or an
    /// exchange with it broke off.
    ProviderError = "provider_error" in Call Line;
    /// The provider did not answer an online request in time. It may have charged for the request.
    ProviderTimeout = "provider_timeout" in Call;
    /// The provider of the model is not available, or does not accept the operator's credential.
    /// Try again later.
    ProviderUnavailable = "provider_unavailable" in Call;
    /// The provider of the model asks for a pause. Try again later.
    RateLimitExceeded = "rate_limit_exceeded" in Call;
    /// The project has as many requests in flight as it may; try again in a moment.
    RequestsInFlightLimitExceeded = "requests_in_flight_limit_exceeded" in Call;
    /// The project has reached its requests per day for the model; try again later.
    RequestsPerDayLimitExceeded = "requests_per_day_limit_exceeded" in Call;
    /// The project has reached its requests per minute for the model; try again later.
    RequestsPerMinuteLimitExceeded = "requests_per_minute_limit_exceeded" in Call;
    /// The server is not ready: a required plugin or the storage is missing. Try again later.
    ServerNotReady = "server_not_ready" in Call;
    /// The server has no connection or memory left for this call. Try again in a moment.
    ServerOverloaded = "server_overloaded" in Call;
    /// The disk of the server is full. Try again after its operator has freed space.
    StorageFull = "storage_full" in Call;
    /// The files of the project would exceed their total size; delete some.
    StorageLimitExceeded = "storage_limit_exceeded" in Call;
    /// The body requests a stream, which batches do not support, or which the provider of an online
    /// request does not have.
    StreamingUnsupported = "streaming_unsupported" in Call Batch;
    /// The string is longer than allowed.
    StringAboveMaxLength = "string_above_max_length" in Call;
    /// The batch would exceed the enqueued tokens of its project for the model; try again when
    /// other batches have ended.
    TokenLimitExceeded = "token_limit_exceeded" in Batch;
    /// The project has reached its tokens per minute for the model; try again later.
    TokensPerMinuteLimitExceeded = "tokens_per_minute_limit_exceeded" in Call;
    /// There are more errors than the setting `max_reported_errors`; the last entry counts the
    /// rest.
    TooManyErrors = "too_many_errors" in Batch;
    /// The file has more requests than the setting `max_requests_per_file`.
    TooManyRequests = "too_many_requests" in Batch;
    /// The parameter does not exist.
    UnknownParameter = "unknown_parameter" in Call;
    /// The body has a content encoding that the server does not decode.
    UnsupportedContentEncoding = "unsupported_content_encoding" in Call;
    /// The body has another content type than the method needs.
    UnsupportedContentType = "unsupported_content_type" in Call;
    /// The webhook endpoint could not be reached by a test; the message says why.
    WebhookEndpointUnreachable = "webhook_endpoint_unreachable" in Call;
}

impl std::fmt::Display for ErrorCode {
    fn fmt(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
        formatter.write_str(self.as_str())
    }
}

impl From<ErrorCode> for String {
    fn from(code: ErrorCode) -> Self {
        code.as_str().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_sorted_unique_and_found_somewhere() {
        let texts: Vec<_> = ErrorCode::ALL.iter().map(|code| code.as_str()).collect();
        assert!(texts.is_sorted_by(|one, next| one < next), "{texts:?}");
        assert!(ErrorCode::ALL.iter().all(|code| !code.places().is_empty()));
    }
}
