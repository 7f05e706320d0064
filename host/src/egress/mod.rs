//! The only way out: every exchange of every plugin, in this order. Normalise the URL, hold it against the allow-list, add credentials,
//! wait for rate and concurrency permits, resolve, check the address, dial that very address, send, bound what comes back.
//!
//! Architecture invariant: this room knows no WebAssembly and no batches; it is given a policy and a request.

mod address;
mod allow;
mod credentials;
mod dial;
mod explain;
mod gateway;
mod hints;
mod limit;
mod throttle;

use std::time::Duration;

pub use allow::{AllowList, is_loopback};
pub use credentials::{Credential, Secrets, is_distinct};
pub use dial::Resolver;
pub use gateway::{Gateway, Shared, https, is_host_header};
pub use hints::Hints;
pub use limit::Taken;
pub use throttle::{Admitted, Queue, Refusals};

/// An exchange as an adapter asks for it: input like any other, not yet checked.
#[derive(Debug)]
pub struct HttpRequest {
    pub method: String,
    pub url: String,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

/// What came back, within the plugin's limits and without its secrets.
#[derive(Debug)]
pub struct HttpResponse {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

/// Why an exchange brought no response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    NameResolution,
    Connection,
    Tls,
    Timeout,
    Protocol,
    TooLarge,
    NotAllowed,
}

/// An exchange that brought no response.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct TransportError {
    pub fault: Fault,
    /// For plugins and clients: without hosts, addresses, paths and secrets.
    pub message: String,
    /// For the operator, where there is more to say: with hosts and files, without secrets.
    detail: Option<String>,
    /// Whether the request may have reached the provider, so that it may be worked on and paid for.
    pub sent: bool,
}

impl TransportError {
    pub fn new(fault: Fault, message: impl Into<String>) -> Self {
        Self { fault, message: message.into(), detail: None, sent: false }
    }

    fn with_detail(self, detail: impl Into<String>) -> Self {
        Self { detail: Some(detail.into()), ..self }
    }

    /// The same, of a request that may have reached the provider.
    fn after_sending(self) -> Self {
        Self { sent: true, ..self }
    }

    /// The operator's text.
    pub fn detail(&self) -> &str {
        self.detail.as_deref().unwrap_or(&self.message)
    }
}

/// What bounds the exchanges of one plugin.
#[derive(Clone, Debug)]
pub struct Bounds {
    /// Exchanges in flight at a time.
    pub concurrency: usize,
    /// Exchanges begun in a minute; none is no bound.
    pub requests_per_minute: Option<std::num::NonZeroU32>,
    pub connect_timeout: Duration,
    /// From sending to the head of the response.
    pub first_byte_timeout: Duration,
    /// From sending to the end of the response.
    pub exchange_timeout: Duration,
    /// Largest body of a response, in bytes.
    pub max_response: usize,
}

/// A pause after so many refusals of one request in a row, without the provider asking for one. How often requests are sent as a whole is the
/// limit's affair, so it need not be long.
pub fn refusal_pause(refusals: u32) -> Duration {
    const FIRST: Duration = Duration::from_millis(250);
    const LONGEST: Duration = Duration::from_secs(8);
    FIRST.saturating_mul(2_u32.saturating_pow(refusals.saturating_sub(1))).min(LONGEST)
}
