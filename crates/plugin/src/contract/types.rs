//! Domain types that plugins and the host exchange, the same for every version of the contract.

use batchwright_egress::{HttpRequest, HttpResponse, TransportError};
use serde_json::Value;

/// World of the contract that a component implements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// World `validator`: reports violations in the lines of an input file.
    Validator,
    /// World `adapter`: turns requests into HTTP exchanges with a provider.
    Adapter,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Validator => "validator",
            Self::Adapter => "adapter",
        })
    }
}

/// Secret that a plugin asks the host to add to its exchanges.
#[derive(Clone, Debug)]
pub struct CredentialRequest {
    /// Key of the secret in the `[credentials]` table of the plugin's TOML file.
    pub name: String,
    /// Name of the request header that carries the secret.
    pub header: String,
    /// Text before the secret in the header, such as `Bearer `.
    pub prefix: String,
    /// True if the plugin does not load without the secret.
    pub required: bool,
}

/// Checked result of a plugin's `describe`.
#[derive(Clone, Debug)]
pub struct Description {
    /// Name of the plugin, 1 to 64 characters.
    pub name: String,
    /// Semantic version of the plugin.
    pub version: String,
    /// One line about the plugin.
    pub summary: String,
    /// Endpoints that the plugin handles; empty means all.
    pub endpoints: Vec<String>,
    /// Secrets that the plugin asks for.
    pub credentials: Vec<CredentialRequest>,
    /// JSON Schema of the plugin's settings.
    pub settings_schema: Value,
}

/// Batch whose lines a validator receives.
#[derive(Clone, Debug)]
pub struct BatchContext {
    /// Batch id.
    pub id: String,
    /// Endpoint of the batch, such as `/v1/chat/completions`.
    pub endpoint: String,
    /// Metadata of the batch, as key and value.
    pub metadata: Vec<(String, String)>,
    /// Model of the first request of the file, if that request names a model.
    pub first_model: Option<String>,
}

/// Line of an input file.
#[derive(Clone, Debug)]
pub struct Line {
    /// Line number, from 1.
    pub number: u64,
    /// Line without its line end, valid JSON.
    pub text: String,
}

/// Violation of a rule in one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Number of the line, from 1.
    pub line: u64,
    /// Stable error code for programs.
    pub code: String,
    /// Error message for people.
    pub message: String,
    /// Request parameter that the violation is about.
    pub param: Option<String>,
}

/// Violations that a validator reported in one call.
#[derive(Debug, Default)]
pub struct ValidationReport {
    /// Violations, ordered by line.
    pub violations: Vec<Violation>,
    /// Number of further violations, which were dropped to bound memory.
    pub unlisted: u64,
}

/// Request that an adapter receives.
#[derive(Clone, Debug)]
pub struct Request {
    /// Id that the host assigned to the request; the same in every attempt.
    pub id: String,
    /// Id that the client assigned to the request; unique in its batch.
    pub custom_id: String,
    /// Endpoint of the request, such as `/v1/chat/completions`.
    pub endpoint: String,
    /// Model that the provider knows, after the operator's aliases.
    pub model: String,
    /// Request body as the client wrote it, a JSON object.
    pub body: String,
    /// Creation time of the batch, in Unix seconds.
    pub created_at: u64,
    /// Number of the attempt, from 1.
    pub attempt: u32,
}

/// Token counts that a provider reported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub input_tokens: u64,
    /// Part of `input_tokens` that the provider had cached.
    pub cached_input_tokens: u64,
    /// Tokens of the answer.
    pub output_tokens: u64,
    /// Part of `output_tokens` that the model spent on reasoning.
    pub reasoning_tokens: u64,
}

/// Response of a provider, in the form of the API.
#[derive(Clone, Debug)]
pub struct Response {
    /// HTTP status, 200 to 599.
    pub status: u16,
    /// Id that the provider assigned to the exchange.
    pub request_id: Option<String>,
    /// JSON object on one line. The body is unchecked until the step has passed `check_step`.
    pub body: String,
    /// Token counts, if the provider reported them.
    pub usage: Option<Usage>,
}

/// Error of a request without a response of the provider.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Stable error code for programs.
    pub code: String,
    /// Error message for people.
    pub message: String,
}

/// Final result of a request.
#[derive(Clone, Debug)]
pub enum Answer {
    /// Response of the provider.
    Response(Response),
    /// Request without a response of the provider.
    Failure(Failure),
}

/// Next step of a request, as the adapter asks for it.
#[derive(Debug)]
pub enum Step {
    /// Asks for an HTTP exchange and a call of `resume` with its outcome.
    Send {
        /// Exchange to perform.
        request: HttpRequest,
        /// Opaque bytes for `resume`.
        state: Vec<u8>,
    },
    /// Asks for a pause and a call of `resume` after it.
    Wait {
        /// Length of the pause.
        milliseconds: u64,
        /// Opaque bytes for `resume`.
        state: Vec<u8>,
    },
    /// Asks for another attempt, which starts with `begin`.
    Retry {
        /// Shortest delay before the next attempt; `None` leaves the delay to the host.
        after_milliseconds: Option<u64>,
        /// Result of the request if no attempt is left.
        otherwise: Answer,
    },
    /// Ends the request with this result.
    Done(Answer),
}

/// Adapter's classification of a response, with the rate limits that the provider reported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Classification {
    /// Class of the response; `None` leaves the classification to the host.
    pub standing: Option<ResponseClass>,
    /// Delay that the provider asks for.
    pub delay: Option<std::time::Duration>,
    /// Number of requests that the provider still accepts, and the time until that number resets.
    pub left: Option<(u64, std::time::Duration)>,
}

/// Class of a provider's response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResponseClass {
    /// The provider accepted the request. The response is final, even if it reports an error.
    Answered,
    /// The provider refused the request for now, without side effects.
    Busy,
    /// The provider rejected the credential.
    Unauthorized,
    /// The credential lacks a permission.
    Forbidden,
    /// The account has no money or quota left.
    Quota,
    /// The provider failed.
    Failed,
    /// The error is transient and does not reflect the health of the provider.
    Passing,
}

/// Outcome of the last step.
#[derive(Debug)]
pub enum Outcome {
    /// The exchange of [`Step::Send`] brought a response.
    Response(HttpResponse),
    /// The exchange of [`Step::Send`] brought no response.
    Error(TransportError),
    /// The pause of [`Step::Wait`] is over.
    Elapsed,
}
