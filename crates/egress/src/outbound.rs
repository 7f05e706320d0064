//! Outbound requests to URLs of clients, such as webhooks.
//!
//! The URL comes from a tenant, so it may be hostile: it reaches public addresses by HTTPS, and
//! other addresses or plain HTTP only for hosts that the operator named. The address that is
//! checked is the address that is dialed, and no redirect is followed.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, header};
use http_body_util::{BodyExt, Full};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use url::Url;

use super::allow::{AllowList, InvalidAllow};
use super::clients::{client, https};
use super::dial::{Dialer, Resolver};
use super::{TransportError, TransportErrorKind};

/// Timeout of name resolution and connection together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Answer of an endpoint.
#[derive(Debug)]
pub struct OutboundAnswer {
    /// HTTP status.
    pub status: u16,
    /// First bytes of the body.
    pub beginning: Vec<u8>,
}

/// Client for URLs of tenants.
pub struct Outbound {
    dialer: Dialer,
    plain: Client<Dialer, Full<Bytes>>,
    tls: OnceLock<Client<HttpsConnector<Dialer>, Full<Bytes>>>,
}

impl Outbound {
    /// Creates a client. `hosts` are those that plain HTTP and private addresses are allowed for,
    /// each as `host` or `host:port`.
    pub fn new(hosts: &[String]) -> Result<Self, InvalidAllow> {
        let dialer = Dialer {
            allow: Arc::new(AllowList::public(hosts)?),
            resolver: Resolver::default(),
            connect_timeout: CONNECT_TIMEOUT,
        };
        Ok(Self { plain: client(dialer.clone()), tls: OnceLock::new(), dialer })
    }

    /// Checks a URL without a lookup of its name.
    pub fn check(&self, url: &Url) -> Result<(), TransportError> {
        self.dialer.allow.check_url(url)
    }

    /// Sends a request, and returns the status with the first `max` bytes of the answer.
    pub async fn post(
        &self,
        url: &Url,
        headers: HeaderMap,
        body: Bytes,
        (timeout, max): (Duration, usize),
    ) -> Result<OutboundAnswer, TransportError> {
        self.check(url)?;
        let exchange = self.exchange(url, headers, body, max);
        tokio::time::timeout(timeout, exchange).await.unwrap_or_else(|_| {
            let message = format!("The endpoint has not answered within {timeout:?}.");
            Err(TransportError::new(TransportErrorKind::Timeout, message))
        })
    }

    async fn exchange(
        &self,
        url: &Url,
        headers: HeaderMap,
        body: Bytes,
        max: usize,
    ) -> Result<OutboundAnswer, TransportError> {
        let invalid = |error: http::Error| {
            TransportError::new(
                TransportErrorKind::Protocol,
                format!("The URL is invalid: {error}."),
            )
        };
        let mut request = Request::builder().method(Method::POST).uri(url.as_str());
        if let Some(all) = request.headers_mut() {
            *all = headers;
            all.insert(header::USER_AGENT, HeaderValue::from_static("batchwright"));
            all.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        }
        let request = request.body(Full::new(body)).map_err(invalid)?;
        let sent = match url.scheme() {
            "https" => self.tls().await?.request(request).await,
            _ => self.plain.request(request).await,
        };
        let response = sent.map_err(|error| explain(&error))?;
        let (head, mut incoming) = response.into_parts();
        let mut beginning = Vec::new();
        while beginning.len() < max {
            let Some(frame) = incoming.frame().await else { break };
            // The status counts, even if the body breaks off.
            let Ok(frame) = frame else { break };
            if let Ok(data) = frame.into_data() {
                let left = max.saturating_sub(beginning.len());
                beginning.extend_from_slice(data.get(..left.min(data.len())).unwrap_or_default());
            }
        }
        Ok(OutboundAnswer { status: head.status.as_u16(), beginning })
    }

    async fn tls(&self) -> Result<Client<HttpsConnector<Dialer>, Full<Bytes>>, TransportError> {
        if let Some(found) = self.tls.get() {
            return Ok(found.clone());
        }
        let dialer = self.dialer.clone();
        // Reading the certificates of the system blocks.
        let created = tokio::task::spawn_blocking(move || {
            client(https().https_only().enable_http1().wrap_connector(dialer))
        });
        let created = created.await.map_err(|error| {
            TransportError::new(TransportErrorKind::Tls, format!("TLS cannot be set up: {error}."))
        })?;
        Ok(self.tls.get_or_init(|| created).clone())
    }
}

/// Turns an error of the library into one with two texts: the tenant learns what kind of failure it
/// is, and nothing about addresses.
fn explain(error: &hyper_util::client::legacy::Error) -> TransportError {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    let mut detail = error.to_string();
    while let Some(found) = source {
        if let Some(ours) = found.downcast_ref::<TransportError>() {
            let message = match ours.fault {
                TransportErrorKind::NameResolution => "The name of the endpoint has no address.",
                TransportErrorKind::Timeout => "The endpoint does not accept connections in time.",
                TransportErrorKind::NotAllowed => {
                    "The endpoint resolves to an address that is not allowed."
                }
                _ => "The endpoint does not accept connections.",
            };
            return TransportError::new(ours.fault, message).with_detail(ours.detail());
        }
        if found.is::<rustls::Error>() {
            let message = format!("The TLS handshake with the endpoint failed: {found}.");
            return TransportError::new(TransportErrorKind::Tls, message);
        }
        detail = found.to_string();
        source = found.source();
    }
    let message = "The connection to the endpoint broke off.";
    TransportError::new(TransportErrorKind::Connection, message).with_detail(detail)
}
