//! What the outcome of an exchange says of the provider: whether it took the request, refused it for now, or is in trouble.

use super::breaker::Kind;
use crate::egress::{Fault, Hints, HttpResponse, Taken, TransportError};
use crate::plugin::types::{Classification, Outcome, Standing};

/// How much of a body is looked at, in bytes.
pub use crate::plugin::BEGINNING;

/// What an outcome says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Said {
    /// It was taken: whatever the answer is, it is the request's own.
    Answered,
    /// It was refused for now; nothing has happened.
    Busy,
    /// There is an answer that may pass by itself, and says nothing of the provider as a whole.
    Passing,
    /// The provider is in trouble.
    Trouble(Kind),
    /// It may have reached the provider, and there is no answer.
    Unanswered,
    /// It was not sent, and will not be: the adapter asked for what is not allowed.
    NotSent,
}

/// An outcome, weighed.
#[derive(Clone, Copy, Debug)]
pub struct Weighed {
    pub said: Said,
    pub hints: Hints,
}

impl Weighed {
    pub fn of(outcome: &Outcome, hints: Hints, classified: Option<Classification>) -> Self {
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

    /// What it says of the provider's limits.
    pub fn taken(&self) -> Taken {
        match self.said {
            Said::Busy => Taken::Refused(self.hints.delay),
            Said::Answered => Taken::Accepted,
            // A server that fails under load is not one that takes more.
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
        429 if is_quota(&response.body) => Said::Trouble(Kind::Quota),
        429 | 529 => Said::Busy,
        503 if hints.delay.is_some() => Said::Busy,
        409 | 425 => Said::Passing,
        408 | 500..=599 => Said::Trouble(Kind::Failed),
        _ => Said::Answered,
    }
}

/// Whether a refusal is for want of money: the words of OpenAI and of those that follow it.
fn is_quota(body: &[u8]) -> bool {
    let beginning = body.get(..body.len().min(BEGINNING)).unwrap_or_default();
    [&b"insufficient_quota"[..], b"billing_hard_limit_reached"]
        .iter()
        .any(|word| memchr::memmem::find(beginning, word).is_some())
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
    fn a_status_says_whose_fault_it_is() {
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
    fn an_exchange_without_an_answer_was_sent_or_not() {
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
    fn what_the_adapter_knows_goes_first() {
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
