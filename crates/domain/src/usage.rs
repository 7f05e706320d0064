//! Use of tokens.

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
