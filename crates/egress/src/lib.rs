//! Egress: the only code through which a plugin reaches the network.
//!
//! **Threats.** A plugin is untrusted WebAssembly, and every URL and header that it writes is
//! input.
//!
//! - A hostile plugin sends data, or the operator's credential, to a host of its own choice.
//! - A URL leads into the operator's network (server-side request forgery): to a loopback service,
//!   to a private host, or to the metadata service of a cloud, which hands out credentials.
//! - An allowed name resolves to a public address when it is checked, and to a private address when
//!   it is dialed (DNS rebinding).
//! - A provider echoes the credential in a response, and the plugin reads it there.
//! - A provider sends an endless body, or never answers.
//!
//! **Layers.** An exchange passes them in this order, and each layer holds without the others.
//!
//! 1. `admission`, `concurrency` and the operator's rate decide when the exchange may start.
//! 2. `gateway` parses and normalizes the URL, so that unusual notations of an address (`0x7f.1`,
//!    fullwidth digits) become plain. `allow` compares scheme, host and port with the allow-list.
//! 3. `gateway` drops the headers that belong to the host or to the connection, such as `Host`.
//! 4. `credentials` removes the plugin's own values of credential headers, and adds the credentials
//!    of the host. Each credential has a list of hosts of its own, and a host that is only on the
//!    plugin's allow-list gets no credential.
//! 5. `dial` resolves the name, checks every address with `address`, and connects to an address
//!    that it has checked. There is no second lookup, so a rebinding name gains nothing.
//! 6. `receive` limits the time and the size of the response. The client follows no redirect: a
//!    plugin that follows one starts a new exchange, which passes all layers again.
//! 7. `credentials` redacts the secrets in the headers and the body of the response, in every
//!    encoding that a server is likely to use.
//!
//! **Reasons.** A guest has no sockets, so every byte passes this module, and no check depends on
//! the guest. Response bodies are never decompressed: secrets must be found in the bytes as they
//! arrive, and a small response must not become a large one. Errors have two texts: the text for
//! clients has no hosts, addresses and paths, and the text in the operator's log has them.
//!
//! Architecture invariant: this module knows neither WebAssembly nor batches; it gets a policy and
//! a request.

#![deny(missing_docs)]
#![warn(unreachable_pub)]

mod address;
mod admission;
mod allow;
mod clients;
mod concurrency;
mod credentials;
mod dial;
mod explain;
mod gateway;
mod hints;
mod in_flight;
mod metrics;
mod outbound;
mod receive;

use std::time::Duration;

pub use admission::{Permit, Priority, QueueId, Refusals, ShareBy};
pub use allow::{AllowList, InvalidAllow, is_loopback};
pub use clients::https;
pub use concurrency::LimitFeedback;
pub use credentials::{
    Credential, CredentialStore, NoCredential, SecretTexts, Secrets, SecretsSource, is_distinct,
};
pub use dial::Resolver;
pub use gateway::{Gateway, Shared, Tenants, is_host_header};
pub use hints::RateLimitHints;
pub use metrics::{ExchangeMetrics, METRICS};
pub use outbound::{Outbound, OutboundAnswer};
pub use receive::{Events, Received};

/// HTTP request that an adapter asks the host to send; unchecked input.
#[derive(Debug)]
pub struct HttpRequest {
    /// Method, such as `POST`.
    pub method: String,
    /// Absolute URL.
    pub url: String,
    /// Header names and values, in order.
    pub headers: Vec<(String, String)>,
    /// Body, empty if there is none.
    pub body: Vec<u8>,
}

/// HTTP response, within the plugin's limits and with its secrets redacted.
#[derive(Debug)]
pub struct HttpResponse {
    /// Status code.
    pub status: u16,
    /// Header names in lower case, and values.
    pub headers: Vec<(String, String)>,
    /// Whole body.
    pub body: Vec<u8>,
}

/// Reason why an exchange has no response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransportErrorKind {
    /// The host's name did not resolve.
    NameResolution,
    /// The connection failed or broke.
    Connection,
    /// The TLS handshake failed.
    Tls,
    /// A timeout of the plugin's limits passed.
    Timeout,
    /// The request or the response is not valid HTTP.
    Protocol,
    /// The response is larger than the plugin's limit.
    TooLarge,
    /// The URL or the address is not on the plugin's allow-list.
    NotAllowed,
}

/// Error of an exchange that has no response.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct TransportError {
    /// Reason, for code.
    pub fault: TransportErrorKind,
    /// Text for plugins and clients, without hosts, addresses, paths and secrets.
    pub message: String,
    /// Text for the operator if it differs: with hosts and files, without secrets.
    detail: Option<String>,
    /// True if the request may have reached the provider, which may then process and bill it.
    pub sent: bool,
}

impl TransportError {
    /// Returns an error of a request that was not sent.
    pub fn new(fault: TransportErrorKind, message: impl Into<String>) -> Self {
        Self { fault, message: message.into(), detail: None, sent: false }
    }

    fn with_detail(self, detail: impl Into<String>) -> Self {
        Self { detail: Some(detail.into()), ..self }
    }

    /// Returns the same error for a request that may have reached the provider.
    fn after_sending(self) -> Self {
        Self { sent: true, ..self }
    }

    /// Returns the operator's text.
    pub fn detail(&self) -> &str {
        self.detail.as_deref().unwrap_or(&self.message)
    }
}

/// Limits of the exchanges of one plugin.
#[derive(Clone, Debug)]
pub struct ExchangeLimits {
    /// Maximum number of exchanges in flight.
    pub concurrency: usize,
    /// Percent of the exchanges in flight that lines of batches leave free for online requests.
    pub online_percent: usize,
    /// Maximum number of exchanges started per minute; unlimited if absent.
    pub requests_per_minute: Option<std::num::NonZeroU32>,
    /// What tenants share equally.
    pub share_by: ShareBy,
    /// Timeout of name resolution and connection together.
    pub connect_timeout: Duration,
    /// Timeout from the start of the exchange to the head of the response.
    pub first_byte_timeout: Duration,
    /// Timeout from the start of the exchange to the end of the response.
    pub exchange_timeout: Duration,
    /// Maximum size of a response body, in bytes.
    pub max_response: usize,
}

/// Returns the backoff after `refusals` consecutive refusals of one request without `Retry-After`.
/// The backoff is short, because the limit already lowers the rate of all requests together.
pub fn refusal_pause(refusals: u32) -> Duration {
    const INITIAL_BACKOFF: Duration = Duration::from_millis(250);
    const MAX_BACKOFF: Duration = Duration::from_secs(8);
    let factor = 2_u32.saturating_pow(refusals.saturating_sub(1));
    INITIAL_BACKOFF.saturating_mul(factor).min(MAX_BACKOFF)
}
