//! API endpoints that a batch can target.

use std::fmt;

/// API endpoint that a batch can target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Endpoint {
    /// Chat completions.
    ChatCompletions,
    /// Legacy completions of a prompt.
    Completions,
    /// Embeddings of texts.
    Embeddings,
    /// Responses.
    Responses,
    /// Moderations. A moderation request may name no model.
    Moderations,
}

/// Prefix of the path of every endpoint, which clients for Azure omit.
const PREFIX: &str = "/v1";

impl Endpoint {
    /// All endpoints, in the order in which messages list them.
    pub const ALL: [Self; 5] = [
        Self::ChatCompletions,
        Self::Completions,
        Self::Embeddings,
        Self::Responses,
        Self::Moderations,
    ];

    /// Returns the path, such as `/v1/embeddings`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ChatCompletions => "/v1/chat/completions",
            Self::Completions => "/v1/completions",
            Self::Embeddings => "/v1/embeddings",
            Self::Responses => "/v1/responses",
            Self::Moderations => "/v1/moderations",
        }
    }

    /// Returns the path without the prefix `/v1`, as clients for Azure write it.
    pub fn short(self) -> &'static str {
        self.as_str().strip_prefix(PREFIX).unwrap_or_default()
    }

    /// Parses a path with or without the prefix `/v1`.
    pub fn parse(path: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|known| known.as_str() == path || known.short() == path)
    }

    /// Returns true if a request may name no model.
    pub fn has_optional_model(self) -> bool {
        self == Self::Moderations
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.pad(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_parse_with_and_without_the_prefix_and_no_others() {
        for endpoint in Endpoint::ALL {
            assert_eq!(Endpoint::parse(endpoint.as_str()), Some(endpoint));
            assert_eq!(Endpoint::parse(endpoint.short()), Some(endpoint));
        }
        for other in ["", "/v1", "embeddings", "/v1/v1/embeddings", "/v1/images", "/v1/Embeddings"]
        {
            assert_eq!(Endpoint::parse(other), None, "{other}");
        }
    }
}
