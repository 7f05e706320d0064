//! Refusal of a request before it is sent.

/// Refusal: a code for programs and a sentence for the client.
#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) code: &'static str,
    pub(crate) message: String,
}

impl Refused {
    /// Refuses a malformed request.
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self { code: "invalid_request", message: message.into() }
    }

    /// Refuses a parameter that the provider does not have. Leaving it out would change the answer.
    pub(crate) fn unsupported(parameter: &str, why: &str) -> Self {
        Self {
            code: "unsupported_parameter",
            message: format!("Unsupported parameter: '{parameter}'. {why}"),
        }
    }
}
