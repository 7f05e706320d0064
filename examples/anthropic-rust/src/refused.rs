//! Why a request is not sent.

/// A code for programs, and a sentence for whoever wrote the request.
#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) code: &'static str,
    pub(crate) message: String,
}

impl Refused {
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self { code: "invalid_request", message: message.into() }
    }

    /// What this provider cannot do: to leave it out would change the answer.
    pub(crate) fn unsupported(parameter: &str, why: &str) -> Self {
        Self {
            code: "unsupported_parameter",
            message: format!("Unsupported parameter: '{parameter}'. {why}"),
        }
    }
}
