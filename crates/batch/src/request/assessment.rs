//! Verdict of an exchange: the provider accepted the request, refused it for now, or is failing.
//!
//! The host derives a verdict from the status, the headers and the beginning of the body. A
//! classification by the adapter overrides it, because the adapter knows the errors of its
//! provider.

use batchwright_egress::{Fault, Hints, HttpResponse, Taken, TransportError};
use batchwright_plugin::types::{Classification, Outcome, Standing};

use crate::schedule::breaker::Kind;

/// Number of bytes at the beginning of a body that are searched for an error.
pub(crate) use batchwright_plugin::BEGINNING;

/// Verdict about the provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Said {
    /// The provider accepted the request. The response concerns only this request.
    Answered,
    /// The provider refused the request for now and has not executed it.
    Busy,
    /// The provider sent a transient error that concerns only this request.
    Passing,
    /// The provider is failing.
    Trouble(Kind),
    /// The request may have reached the provider, but no response arrived.
    Unanswered,
    /// The request was not sent, because the adapter asked for something that is not allowed.
    NotSent,
}

/// Verdict and rate limit hints of an exchange.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Weighed {
    /// Verdict about the provider.
    pub said: Said,
    /// Delay and remaining requests that the provider reports.
    pub hints: Hints,
}

impl Weighed {
    /// Derives the verdict from an outcome, and from the classification of the adapter if any.
    pub(crate) fn of(outcome: &Outcome, hints: Hints, classified: Option<Classification>) -> Self {
        let mut weighed = match outcome {
            Outcome::Error(error) => Self { said: of_error(error), hints },
            Outcome::Response(response) => Self { said: of_response(response, &hints), hints },
            Outcome::Elapsed => Self { said: Said::Answered, hints },
        };
        let Some(known) = classified else { return weighed };
        if let Some(standing) = known.standing {
            weighed.said = match standing {
                Standing::Answered => Said::Answered,
                Standing::Busy => Said::Busy,
                Standing::Unauthorized => Said::Trouble(Kind::Unauthorized),
                Standing::Forbidden => Said::Trouble(Kind::Forbidden),
                Standing::Quota => Said::Trouble(Kind::Quota),
                Standing::Failed => Said::Trouble(Kind::Failed),
                Standing::Passing => Said::Passing,
            };
        }
        weighed.hints.delay = known.delay.or(weighed.hints.delay);
        weighed.hints.left = known.left.or(weighed.hints.left);
        weighed
    }

    /// Converts the verdict to evidence about the concurrency limit of the provider.
    pub(crate) fn taken(&self) -> Taken {
        match self.said {
            Said::Busy => Taken::Refused(self.hints.delay),
            Said::Answered => Taken::Accepted,
            // A failing server gives no evidence of capacity.
            Said::Passing | Said::Trouble(_) | Said::Unanswered | Said::NotSent => Taken::Unknown,
        }
    }
}

fn of_error(error: &TransportError) -> Said {
    match error.fault {
        _ if error.sent => Said::Unanswered,
        Fault::NameResolution | Fault::Connection | Fault::Tls | Fault::Timeout => {
            Said::Trouble(Kind::Unreachable)
        }
        Fault::Protocol | Fault::TooLarge | Fault::NotAllowed => Said::NotSent,
    }
}

fn of_response(response: &HttpResponse, hints: &Hints) -> Said {
    match response.status {
        401 => Said::Trouble(Kind::Unauthorized),
        403 => Said::Trouble(Kind::Forbidden),
        402 => Said::Trouble(Kind::Quota),
        429 if is_quota_exhausted(&response.body) => Said::Trouble(Kind::Quota),
        429 | 529 => Said::Busy,
        503 if hints.delay.is_some() => Said::Busy,
        409 | 425 => Said::Passing,
        408 | 500..=599 => Said::Trouble(Kind::Failed),
        _ => Said::Answered,
    }
}

/// Returns true if a 429 reports an exhausted quota, in the error codes of OpenAI.
fn is_quota_exhausted(body: &[u8]) -> bool {
    let beginning = body.get(..body.len().min(BEGINNING)).unwrap_or_default();
    [&b"insufficient_quota"[..], b"billing_hard_limit_reached"]
        .iter()
        .any(|code| memchr::memmem::find(beginning, code).is_some())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn said(status: u16, delay: Option<u64>, body: &str) -> Said {
        let response = HttpResponse { status, headers: Vec::new(), body: body.into() };
        let hints = Hints { delay: delay.map(Duration::from_secs), left: None };
        Weighed::of(&Outcome::Response(response), hints, None).said
    }

    #[test]
    fn status_determines_the_verdict() {
        for (status, delay, body, expected) in [
            (200, None, "{}", Said::Answered),
            (400, None, "{}", Said::Answered),
            (404, None, "model_not_found", Said::Answered),
            (401, None, "{}", Said::Trouble(Kind::Unauthorized)),
            (403, None, "{}", Said::Trouble(Kind::Forbidden)),
            (402, None, "{}", Said::Trouble(Kind::Quota)),
            (429, None, "{}", Said::Busy),
            (429, None, r#"{"error":{"code":"insufficient_quota"}}"#, Said::Trouble(Kind::Quota)),
            (503, Some(1), "", Said::Busy),
            (503, None, "", Said::Trouble(Kind::Failed)),
            (529, None, "", Said::Busy),
            (500, None, "", Said::Trouble(Kind::Failed)),
            (409, None, "", Said::Passing),
            (425, None, "", Said::Passing),
            (408, None, "", Said::Trouble(Kind::Failed)),
        ] {
            assert_eq!(said(status, delay, body), expected, "{status} {body}");
        }
    }

    #[test]
    fn transport_error_distinguishes_sent_from_unsent_requests() {
        let error = |fault, sent| {
            let mut error = TransportError::new(fault, "x");
            error.sent = sent;
            Weighed::of(&Outcome::Error(error), Hints::default(), None).said
        };
        assert_eq!(error(Fault::Connection, false), Said::Trouble(Kind::Unreachable));
        assert_eq!(error(Fault::Connection, true), Said::Unanswered);
        assert_eq!(error(Fault::Timeout, true), Said::Unanswered);
        assert_eq!(error(Fault::NotAllowed, false), Said::NotSent);
        assert_eq!(error(Fault::Protocol, false), Said::NotSent);
    }

    #[test]
    fn adapter_classification_overrides_the_status() {
        let response = HttpResponse { status: 200, headers: Vec::new(), body: Vec::new() };
        let known = Classification {
            standing: Some(Standing::Busy),
            delay: Some(Duration::from_secs(2)),
            left: Some((0, Duration::from_secs(2))),
        };
        let weighed = Weighed::of(&Outcome::Response(response), Hints::default(), Some(known));
        assert_eq!(weighed.said, Said::Busy);
        assert_eq!(weighed.taken(), Taken::Refused(Some(Duration::from_secs(2))));
        assert_eq!(weighed.hints.left, Some((0, Duration::from_secs(2))));
    }
}
