//! Use of tokens.

use crate::endpoint::Endpoint;

/// Maximum number of tokens of one request that count. A guest can report any number.
const MAX_TOKENS: u64 = 1_000_000_000;

/// Token counts of a request, or of all requests of a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TokenUsage {
    /// Input tokens, cached ones included.
    pub input: u64,
    /// Input tokens that the provider read from its cache.
    pub cached_input: u64,
    /// Output tokens, reasoning tokens included.
    pub output: u64,
    /// Output tokens that the model spent on reasoning.
    pub reasoning: u64,
}

impl TokenUsage {
    /// Returns the sum of two counts.
    pub fn plus(self, other: Self) -> Self {
        Self {
            input: self.input.saturating_add(other.input),
            cached_input: self.cached_input.saturating_add(other.cached_input),
            output: self.output.saturating_add(other.output),
            reasoning: self.reasoning.saturating_add(other.reasoning),
        }
    }

    /// Returns the input and output tokens.
    pub fn total(self) -> u64 {
        self.input.saturating_add(self.output)
    }

    /// Returns the counts of one request for accounting, each with a plausible maximum, so that no
    /// sum overflows.
    pub fn plausible(self) -> Self {
        let input = self.input.min(MAX_TOKENS);
        let output = self.output.min(MAX_TOKENS);
        Self {
            input,
            cached_input: self.cached_input.min(input),
            output,
            reasoning: self.reasoning.min(output),
        }
    }
}

/// Kind of requests, as reports of usage separate them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum UsageKind {
    /// Chat completions, completions and responses.
    Completions,
    /// Embeddings.
    Embeddings,
    /// Moderations.
    Moderations,
}

impl UsageKind {
    /// Returns the kind of the requests of an endpoint.
    pub fn of(endpoint: Endpoint) -> Self {
        match endpoint {
            Endpoint::ChatCompletions | Endpoint::Completions | Endpoint::Responses => {
                Self::Completions
            }
            Endpoint::Embeddings => Self::Embeddings,
            Endpoint::Moderations => Self::Moderations,
        }
    }

    /// Returns the name in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Completions => "completions",
            Self::Embeddings => "embeddings",
            Self::Moderations => "moderations",
        }
    }
}
