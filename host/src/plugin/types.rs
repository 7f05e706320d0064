//! What plugins and the host say to each other, whatever version of the contract a component was built for.

use serde_json::Value;

use crate::egress::{HttpRequest, HttpResponse, TransportError};

/// Which world a component is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Validator,
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

/// A secret that a plugin asks the host to add to its exchanges.
#[derive(Clone, Debug)]
pub struct CredentialNeed {
    pub name: String,
    pub header: String,
    pub prefix: String,
    pub required: bool,
}

/// What a plugin says about itself, checked.
#[derive(Clone, Debug)]
pub struct Description {
    pub name: String,
    pub version: String,
    pub summary: String,
    /// Empty means all.
    pub endpoints: Vec<String>,
    pub credentials: Vec<CredentialNeed>,
    pub settings_schema: Value,
}

/// The batch whose lines a validator is given.
#[derive(Clone, Debug)]
pub struct BatchContext {
    pub id: String,
    pub endpoint: String,
    pub metadata: Vec<(String, String)>,
    /// Of the first request of the file.
    pub first_model: Option<String>,
}

/// One line of an input file.
#[derive(Clone, Debug)]
pub struct Line {
    pub number: u64,
    pub text: String,
}

/// One thing that is wrong with one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    pub line: u64,
    pub code: String,
    pub message: String,
    pub param: Option<String>,
}

/// What a validator found in the lines of one call.
#[derive(Debug, Default)]
pub struct Judgement {
    pub violations: Vec<Violation>,
    /// Violations beyond these.
    pub unlisted: u64,
}

/// A request as an adapter is given it.
#[derive(Clone, Debug)]
pub struct Request {
    pub id: String,
    pub custom_id: String,
    pub endpoint: String,
    pub model: String,
    pub body: String,
    /// Unix seconds.
    pub created_at: u64,
    pub attempt: u32,
}

/// Tokens, as a provider counted them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub input_tokens: u64,
    pub cached_input_tokens: u64,
    pub output_tokens: u64,
    pub reasoning_tokens: u64,
}

/// The provider answered.
#[derive(Clone, Debug)]
pub struct Response {
    pub status: u16,
    pub request_id: Option<String>,
    /// Said to be a JSON object; not yet checked.
    pub body: String,
    pub usage: Option<Usage>,
}

/// There is no answer.
#[derive(Clone, Debug)]
pub struct Failure {
    pub code: String,
    pub message: String,
}

/// How a request ends.
#[derive(Clone, Debug)]
pub enum Answer {
    Response(Response),
    Failure(Failure),
}

/// What an adapter wants done next.
#[derive(Debug)]
pub enum Step {
    Send { request: HttpRequest, state: Vec<u8> },
    Wait { milliseconds: u64, state: Vec<u8> },
    Retry { after_milliseconds: Option<u64>, otherwise: Answer },
    Done(Answer),
}

/// What an adapter knows of a response: whose affair it is, and what it says of the provider's limits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Classification {
    /// None leaves it to the host.
    pub standing: Option<Standing>,
    /// How long the provider asks to wait.
    pub delay: Option<std::time::Duration>,
    /// Requests that are left, and for how long that holds.
    pub left: Option<(u64, std::time::Duration)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It was taken: whatever the answer is, it is the request's own.
    Answered,
    /// It was refused for now; nothing has happened.
    Busy,
    /// The credential was refused.
    Unauthorized,
    /// The credential may not do this.
    Forbidden,
    /// The account has no money or quota left.
    Quota,
    /// The provider failed.
    Failed,
    /// It may pass by itself, and says nothing of the provider as a whole.
    Passing,
}

/// What came of the last step.
#[derive(Debug)]
pub enum Outcome {
    Response(HttpResponse),
    Error(TransportError),
    Elapsed,
}
