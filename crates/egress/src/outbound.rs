//! Outbound requests to URLs of clients, such as webhooks.
//!
//! The URL comes from a tenant, so it may be hostile: it reaches public addresses by HTTPS, and
//! other addresses or plain HTTP only for hosts that the operator named. The address that is
//! checked is the address that is dialed, and no redirect is followed.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use batchwright_domain::ids::TenantId;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, header};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use url::Url;

use super::allow::{AllowList, InvalidAllow};
use super::clients::{client, tls_config};
use super::dial::{Dialer, Resolver};
use super::explain::{tls_error, tls_message};
use super::{TransportError, TransportErrorKind};

/// Maximum time that the beginning of an answer is read after its status.
const BODY_TIMEOUT: Duration = Duration::from_secs(2);

/// Maximum number of concurrent lookups of a tenant.
const LOOKUPS_PER_TENANT: usize = 2;

/// Maximum number of tenants with connections.
const MAX_TENANTS: usize = 1024;

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
///
/// Each tenant has connections and a resolver of its own: names that do not resolve occupy the
/// lookups of their tenant only.
pub struct Outbound {
    allow: Arc<AllowList>,
    resolver: Resolver,
    tenants: Mutex<HashMap<TenantId, Clients>>,
    /// Configuration of TLS, which is made at its first use: reading the certificates of the system
    /// is slow.
    tls: tokio::sync::OnceCell<rustls::ClientConfig>,
}

/// Clients of one tenant.
#[derive(Clone)]
struct Clients {
    dialer: Dialer,
    plain: Client<Dialer, Full<Bytes>>,
    tls: Arc<OnceLock<Client<HttpsConnector<Dialer>, Full<Bytes>>>>,
}

impl Outbound {
    /// Creates a client. `hosts` are those that plain HTTP and private addresses are allowed for,
    /// each as `host` or `host:port`.
    pub fn new(hosts: &[String]) -> Result<Self, InvalidAllow> {
        Ok(Self {
            allow: Arc::new(AllowList::public(hosts)?),
            resolver: Resolver::default(),
            tenants: Mutex::default(),
            tls: tokio::sync::OnceCell::new(),
        })
    }

    /// Returns the clients of a tenant.
    fn clients(&self, tenant: &TenantId) -> Clients {
        let mut tenants = self.tenants.lock().unwrap_or_else(PoisonError::into_inner);
        if tenants.len() >= MAX_TENANTS && !tenants.contains_key(tenant) {
            // Connections are opened again when they are needed.
            tenants.clear();
        }
        let new = || {
            let dialer = Dialer {
                allow: self.allow.clone(),
                resolver: self.resolver.beside_with(LOOKUPS_PER_TENANT),
                connect_timeout: CONNECT_TIMEOUT,
            };
            Clients { plain: client(dialer.clone()), tls: Arc::default(), dialer }
        };
        tenants.entry(tenant.clone()).or_insert_with(new).clone()
    }

    /// Checks a URL without a lookup of its name.
    pub fn check(&self, url: &Url) -> Result<(), TransportError> {
        self.allow.check_url(url)
    }

    /// Sends a request, and returns the status with the first `max` bytes of the answer. The
    /// timeout is that of the status.
    pub async fn post(
        &self,
        tenant: &TenantId,
        url: &Url,
        headers: HeaderMap,
        body: Bytes,
        (timeout, max): (Duration, usize),
    ) -> Result<OutboundAnswer, TransportError> {
        self.check(url).map_err(|error| {
            let message = "The URL of the endpoint is not allowed.";
            TransportError::new(error.fault, message).with_detail(error.detail())
        })?;
        let clients = self.clients(tenant);
        let answered = tokio::time::timeout(timeout, self.send(&clients, url, headers, body)).await;
        let response = answered.unwrap_or_else(|_| {
            let message = format!("The endpoint has not answered within {timeout:?}.");
            Err(TransportError::new(TransportErrorKind::Timeout, message))
        })?;
        let (head, mut incoming) = response.into_parts();
        let mut beginning = Vec::new();
        let reading = async {
            while beginning.len() < max {
                // The status counts, even if the body breaks off.
                let Some(Ok(frame)) = incoming.frame().await else { break };
                if let Ok(data) = frame.into_data() {
                    let left = max.saturating_sub(beginning.len());
                    let data = data.get(..left.min(data.len())).unwrap_or_default();
                    beginning.extend_from_slice(data);
                }
            }
        };
        tokio::time::timeout(BODY_TIMEOUT, reading).await.ok();
        Ok(OutboundAnswer { status: head.status.as_u16(), beginning })
    }

    async fn send(
        &self,
        clients: &Clients,
        url: &Url,
        headers: HeaderMap,
        body: Bytes,
    ) -> Result<Response<Incoming>, TransportError> {
        let invalid = |error: http::Error| {
            let message = format!("The URL is invalid: {error}.");
            TransportError::new(TransportErrorKind::Protocol, message)
        };
        let mut request = Request::builder().method(Method::POST).uri(url.as_str());
        if let Some(all) = request.headers_mut() {
            *all = headers;
            all.insert(header::USER_AGENT, HeaderValue::from_static("batchwright"));
            all.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        }
        let request = request.body(Full::new(body)).map_err(invalid)?;
        let sent = match url.scheme() {
            "https" => self.tls(clients).await?.request(request).await,
            _ => clients.plain.request(request).await,
        };
        sent.map_err(|error| explain(&error))
    }

    async fn tls(
        &self,
        clients: &Clients,
    ) -> Result<Client<HttpsConnector<Dialer>, Full<Bytes>>, TransportError> {
        if let Some(found) = clients.tls.get() {
            return Ok(found.clone());
        }
        let failed = |error: &dyn std::fmt::Display| {
            TransportError::new(TransportErrorKind::Tls, format!("TLS cannot be set up: {error}."))
        };
        let config = self.tls.get_or_try_init(async || {
            tokio::task::spawn_blocking(tls_config).await.map_err(|error| failed(&error))
        });
        let builder = HttpsConnectorBuilder::new().with_tls_config(config.await?.clone());
        let connector = builder.https_only().enable_http1().wrap_connector(clients.dialer.clone());
        Ok(clients.tls.get_or_init(|| client(connector)).clone())
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
        if let Some(tls) = tls_error(found) {
            let cause = tls_message(tls);
            let message = format!("The TLS handshake with the endpoint failed: {cause}.");
            let detail = tls.to_string();
            return TransportError::new(TransportErrorKind::Tls, message).with_detail(detail);
        }
        detail = found.to_string();
        source = found.source();
    }
    let message = "The connection to the endpoint broke off.";
    TransportError::new(TransportErrorKind::Connection, message).with_detail(detail)
}
