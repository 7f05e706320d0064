//! Verdict of an exchange: the provider accepted the request, refused it for now, or is failing.
//!
//! The host derives a verdict from the status, the headers and the beginning of the body. A
//! classification by the adapter overrides it, because the adapter knows the errors of its
//! provider.

use batchwright_egress::{
    HttpResponse, LimitFeedback, RateLimitHints, TransportError, TransportErrorKind,
};
use batchwright_plugin::types::{Classification, Outcome, ResponseClass};

use crate::schedule::breaker::FailureKind;

/// Number of bytes at the beginning of a body that are searched for an error.
pub(crate) use batchwright_plugin::CLASSIFY_BODY_BYTES;

/// Verdict about the provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ProviderSignal {
    /// The provider accepted the request. The response concerns only this request.
    Answered,
    /// The provider refused the request for now and has not executed it.
    RateLimited,
    /// The provider sent a transient error that concerns only this request.
    TransientError,
    /// The provider is failing.
    Failure(FailureKind),
    /// The request may have reached the provider, but no response arrived.
    NoResponse,
    /// The request was not sent, because the adapter asked for something that is not allowed.
    NotSent,
}

impl ProviderSignal {
    /// Returns the name in metrics and traces.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::RateLimited => "rate_limited",
            Self::TransientError => "transient_error",
            Self::NoResponse => "no_response",
            Self::NotSent => "not_sent",
            Self::Failure(FailureKind::Unreachable) => "unreachable",
            Self::Failure(FailureKind::Unauthorized) => "unauthorized",
            Self::Failure(FailureKind::Forbidden) => "forbidden",
            Self::Failure(FailureKind::Quota) => "quota",
            Self::Failure(FailureKind::Failed | FailureKind::Plugin | FailureKind::Credential) => {
                "failed"
            }
        }
    }
}

/// Verdict and rate limit hints of an exchange.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Assessment {
    /// Verdict about the provider.
    pub signal: ProviderSignal,
    /// Delay and remaining requests that the provider reports.
    pub hints: RateLimitHints,
}

impl Assessment {
    /// Derives the verdict from an outcome, and from the classification of the adapter if any.
    pub(crate) fn of(
        outcome: &Outcome,
        hints: RateLimitHints,
        classified: Option<Classification>,
    ) -> Self {
        let mut assessment = match outcome {
            Outcome::Error(error) => Self { signal: of_error(error), hints },
            Outcome::Response(response) => Self { signal: of_response(response, &hints), hints },
            Outcome::Elapsed => Self { signal: ProviderSignal::Answered, hints },
        };
        let Some(known) = classified else { return assessment };
        if let Some(standing) = known.standing {
            assessment.signal = match standing {
                ResponseClass::Answered => ProviderSignal::Answered,
                ResponseClass::Busy => ProviderSignal::RateLimited,
                ResponseClass::Unauthorized => ProviderSignal::Failure(FailureKind::Unauthorized),
                ResponseClass::Forbidden => ProviderSignal::Failure(FailureKind::Forbidden),
                ResponseClass::Quota => ProviderSignal::Failure(FailureKind::Quota),
                ResponseClass::Failed => ProviderSignal::Failure(FailureKind::Failed),
                ResponseClass::Passing => ProviderSignal::TransientError,
            };
        }
        assessment.hints.delay = known.delay.or(assessment.hints.delay);
        assessment.hints.left = known.left.or(assessment.hints.left);
        assessment
    }

    /// Converts the verdict to evidence about the concurrency limit of the provider.
    pub(crate) fn limit_feedback(&self) -> LimitFeedback {
        match self.signal {
            ProviderSignal::RateLimited => LimitFeedback::Refused(self.hints.delay),
            ProviderSignal::Answered => LimitFeedback::Accepted,
            // A failing server gives no evidence of capacity.
            ProviderSignal::TransientError
            | ProviderSignal::Failure(_)
            | ProviderSignal::NoResponse
            | ProviderSignal::NotSent => LimitFeedback::Unknown,
        }
    }
}

fn of_error(error: &TransportError) -> ProviderSignal {
    match error.fault {
        _ if error.sent => ProviderSignal::NoResponse,
        TransportErrorKind::NameResolution
        | TransportErrorKind::Connection
        | TransportErrorKind::Tls
        | TransportErrorKind::Timeout => ProviderSignal::Failure(FailureKind::Unreachable),
        TransportErrorKind::Protocol
        | TransportErrorKind::TooLarge
        | TransportErrorKind::NotAllowed => ProviderSignal::NotSent,
    }
}

fn of_response(response: &HttpResponse, hints: &RateLimitHints) -> ProviderSignal {
    match response.status {
        401 => ProviderSignal::Failure(FailureKind::Unauthorized),
        403 => ProviderSignal::Failure(FailureKind::Forbidden),
        402 => ProviderSignal::Failure(FailureKind::Quota),
        429 if is_quota_exhausted(&response.body) => ProviderSignal::Failure(FailureKind::Quota),
        429 | 529 => ProviderSignal::RateLimited,
        503 if hints.delay.is_some() => ProviderSignal::RateLimited,
        409 | 425 => ProviderSignal::TransientError,
        408 | 500..=599 => ProviderSignal::Failure(FailureKind::Failed),
        _ => ProviderSignal::Answered,
    }
}

/// Returns true if a 429 reports an exhausted quota, in the error codes of OpenAI.
fn is_quota_exhausted(body: &[u8]) -> bool {
    let beginning = body.get(..body.len().min(CLASSIFY_BODY_BYTES)).unwrap_or_default();
    [&b"insufficient_quota"[..], b"billing_hard_limit_reached"]
        .iter()
        .any(|code| memchr::memmem::find(beginning, code).is_some())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn signal(status: u16, delay: Option<u64>, body: &str) -> ProviderSignal {
        let response = HttpResponse { status, headers: Vec::new(), body: body.into() };
        let hints = RateLimitHints { delay: delay.map(Duration::from_secs), left: None };
        Assessment::of(&Outcome::Response(response), hints, None).signal
    }

    #[test]
    fn status_determines_the_verdict() {
        for (status, delay, body, expected) in [
            (200, None, "{}", ProviderSignal::Answered),
            (400, None, "{}", ProviderSignal::Answered),
            (404, None, "model_not_found", ProviderSignal::Answered),
            (401, None, "{}", ProviderSignal::Failure(FailureKind::Unauthorized)),
            (403, None, "{}", ProviderSignal::Failure(FailureKind::Forbidden)),
            (402, None, "{}", ProviderSignal::Failure(FailureKind::Quota)),
            (429, None, "{}", ProviderSignal::RateLimited),
            (
                429,
                None,
                r#"{"error":{"code":"insufficient_quota"}}"#,
                ProviderSignal::Failure(FailureKind::Quota),
            ),
            (503, Some(1), "", ProviderSignal::RateLimited),
            (503, None, "", ProviderSignal::Failure(FailureKind::Failed)),
            (529, None, "", ProviderSignal::RateLimited),
            (500, None, "", ProviderSignal::Failure(FailureKind::Failed)),
            (409, None, "", ProviderSignal::TransientError),
            (425, None, "", ProviderSignal::TransientError),
            (408, None, "", ProviderSignal::Failure(FailureKind::Failed)),
        ] {
            assert_eq!(signal(status, delay, body), expected, "{status} {body}");
        }
    }

    #[test]
    fn transport_error_distinguishes_sent_from_unsent_requests() {
        let error = |fault, sent| {
            let mut error = TransportError::new(fault, "x");
            error.sent = sent;
            Assessment::of(&Outcome::Error(error), RateLimitHints::default(), None).signal
        };
        assert_eq!(
            error(TransportErrorKind::Connection, false),
            ProviderSignal::Failure(FailureKind::Unreachable)
        );
        assert_eq!(error(TransportErrorKind::Connection, true), ProviderSignal::NoResponse);
        assert_eq!(error(TransportErrorKind::Timeout, true), ProviderSignal::NoResponse);
        assert_eq!(error(TransportErrorKind::NotAllowed, false), ProviderSignal::NotSent);
        assert_eq!(error(TransportErrorKind::Protocol, false), ProviderSignal::NotSent);
    }

    #[test]
    fn adapter_classification_overrides_the_status() {
        let response = HttpResponse { status: 200, headers: Vec::new(), body: Vec::new() };
        let known = Classification {
            standing: Some(ResponseClass::Busy),
            delay: Some(Duration::from_secs(2)),
            left: Some((0, Duration::from_secs(2))),
        };
        let assessment =
            Assessment::of(&Outcome::Response(response), RateLimitHints::default(), Some(known));
        assert_eq!(assessment.signal, ProviderSignal::RateLimited);
        assert_eq!(
            assessment.limit_feedback(),
            LimitFeedback::Refused(Some(Duration::from_secs(2)))
        );
        assert_eq!(assessment.hints.left, Some((0, Duration::from_secs(2))));
    }
}
