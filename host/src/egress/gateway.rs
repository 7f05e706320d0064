//! One plugin's way out.

use std::collections::HashMap;
use std::error::Error;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, Uri, header};
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Incoming};
use hyper_rustls::builderstates::WantsSchemes;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use tokio::time::timeout;
use url::Url;

use super::dial::Dialer;
use super::throttle::{Admitted, Throttle};
use super::{AllowList, Bounds, Fault, HttpRequest, HttpResponse, Secrets, TransportError};

/// How long a connection that nobody uses stays open.
const IDLE: Duration = Duration::from_secs(60);

/// Headers that are the connection's or the host's own: what a plugin writes there is dropped.
const HOST_SET: [HeaderName; 11] = [
    header::HOST,
    header::CONTENT_LENGTH,
    header::TRANSFER_ENCODING,
    header::CONNECTION,
    header::UPGRADE,
    header::TE,
    header::TRAILER,
    header::PROXY_AUTHORIZATION,
    header::EXPECT,
    header::ACCEPT_ENCODING,
    header::RANGE,
];

/// The most headers of a request.
const MOST_HEADERS: usize = 200;

/// Whether a header is the connection's or the host's own.
pub fn is_host_header(name: &HeaderName) -> bool {
    HOST_SET.contains(name)
}

/// Exchanges of one plugin: its allow-list, its secrets, its bounds, and a connection pool for each tenant.
pub struct Gateway {
    allow: Arc<AllowList>,
    secrets: Secrets,
    bounds: Bounds,
    throttle: Throttle,
    rate: Option<DefaultDirectRateLimiter>,
    clients: Mutex<HashMap<String, Arc<Clients>>>,
    /// The last URL that passed the checks: adapters mostly use one.
    last_checked: ArcSwapOption<(String, Uri)>,
}

/// The connections of one tenant. TLS is set up when it is first asked for: reading the system's certificates takes a while.
struct Clients {
    plain: Client<Dialer, Full<Bytes>>,
    tls: OnceLock<Client<HttpsConnector<Dialer>, Full<Bytes>>>,
}

impl Gateway {
    pub fn new(allow: AllowList, secrets: Secrets, bounds: Bounds) -> Self {
        Self {
            allow: Arc::new(allow),
            secrets,
            throttle: Throttle::new(bounds.concurrency),
            rate: bounds.requests_per_minute.map(|number| RateLimiter::direct(quota(number))),
            bounds,
            clients: Mutex::default(),
            last_checked: ArcSwapOption::empty(),
        }
    }

    /// Waits until the plugin's rate and concurrency permit an exchange.
    pub async fn admit(&self) -> Admitted<'_> {
        let admitted = self.throttle.admit().await;
        // In this order: who waits for a place must not save up what the rate permits.
        self.until_rate_permits().await;
        admitted
    }

    /// Performs an exchange, with everything that stands between a guest and the network.
    pub async fn send(
        &self,
        admitted: Admitted<'_>,
        tenant: &str,
        request: HttpRequest,
    ) -> Result<HttpResponse, TransportError> {
        let uri = self.checked(&request.url)?;
        let request = self.prepare(uri, request)?;
        let clients = self.clients(tenant);
        let exchange = self.exchange(&clients, request);
        let response = timeout(self.bounds.exchange_timeout, exchange).await.unwrap_or_else(|_| {
            let limit = self.bounds.exchange_timeout;
            Err(TransportError::new(
                Fault::Timeout,
                format!("The exchange took longer than {limit:?} ([limits] exchange_timeout)."),
            ))
        })?;
        admitted.answered(response.status);
        Ok(response)
    }

    /// Whether an adapter's request would be sent, were it asked for.
    pub fn check(&self, request: &HttpRequest) -> Result<(), TransportError> {
        let copy = HttpRequest {
            method: request.method.clone(),
            url: request.url.clone(),
            headers: request.headers.clone(),
            body: Vec::new(),
        };
        self.prepare(self.checked(&request.url)?, copy).map(drop)
    }

    /// Normalises a URL and holds it against the allow-list.
    fn checked(&self, text: &str) -> Result<Uri, TransportError> {
        if let Some(last) = &*self.last_checked.load()
            && last.0 == text
        {
            return Ok(last.1.clone());
        }
        let invalid =
            |error: String| TransportError::new(Fault::NotAllowed, format!("The adapter's URL is not valid: {error}."));
        let mut url = Url::parse(text).map_err(|error| invalid(error.to_string()))?;
        url.set_fragment(None);
        self.allow.check(&url)?;
        let uri: Uri = url.as_str().parse().map_err(|error: http::uri::InvalidUri| invalid(error.to_string()))?;
        self.last_checked.store(Some(Arc::new((text.to_owned(), uri.clone()))));
        Ok(uri)
    }

    fn prepare(&self, uri: Uri, request: HttpRequest) -> Result<Request<Full<Bytes>>, TransportError> {
        let invalid =
            |what: String| TransportError::new(Fault::Protocol, format!("The adapter's {what} is not valid HTTP."));
        let method = Method::from_bytes(request.method.as_bytes())
            .ok()
            .filter(|method| !matches!(*method, Method::CONNECT | Method::TRACE))
            .ok_or_else(|| invalid(format!("method `{}`", request.method.escape_debug())))?;
        if request.headers.len() > MOST_HEADERS {
            let number = request.headers.len();
            let message = format!("The adapter's request has {number} headers; it may have {MOST_HEADERS}.");
            return Err(TransportError::new(Fault::Protocol, message));
        }
        let mut headers = HeaderMap::with_capacity(request.headers.len().saturating_add(2));
        for (name, value) in request.headers {
            let Ok(parsed) = HeaderName::from_bytes(name.as_bytes()) else {
                return Err(invalid(format!("header name `{}`", name.escape_debug())));
            };
            let Ok(value) = HeaderValue::try_from(value) else {
                return Err(invalid(format!("value of the header `{parsed}`")));
            };
            if !is_host_header(&parsed) {
                headers.append(parsed, value);
            }
        }
        headers
            .entry(header::USER_AGENT)
            .or_insert(HeaderValue::from_static(concat!("batchwright/", env!("CARGO_PKG_VERSION"))));
        // Bodies are not decoded here, and a secret must be found in what comes back.
        headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        self.secrets.add_to(&mut headers);
        let mut prepared = Request::new(Full::new(Bytes::from(request.body)));
        *prepared.method_mut() = method;
        *prepared.uri_mut() = uri;
        *prepared.headers_mut() = headers;
        Ok(prepared)
    }

    async fn until_rate_permits(&self) {
        let Some(rate) = &self.rate else { return };
        while let Err(not_until) = rate.check() {
            tokio::time::sleep(not_until.wait_time_from(governor::clock::Clock::now(rate.clock()))).await;
        }
    }

    fn clients(&self, tenant: &str) -> Arc<Clients> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = clients.get(tenant) {
            return found.clone();
        }
        let dialer = Dialer { allow: self.allow.clone(), connect_timeout: self.bounds.connect_timeout };
        let plain = client(dialer);
        let made = Arc::new(Clients { plain, tls: OnceLock::new() });
        clients.insert(tenant.to_owned(), made.clone());
        made
    }

    async fn exchange(
        &self,
        clients: &Arc<Clients>,
        request: Request<Full<Bytes>>,
    ) -> Result<HttpResponse, TransportError> {
        let limit = self.bounds.first_byte_timeout;
        let sent = if request.uri().scheme_str() == Some("https") {
            let client = self.tls_client(clients).await?;
            timeout(limit, client.request(request)).await
        } else {
            timeout(limit, clients.plain.request(request)).await
        };
        match sent {
            Ok(Ok(response)) => self.receive(response).await,
            Ok(Err(error)) => Err(self.explain(&error)),
            Err(_) => Err(TransportError::new(
                Fault::Timeout,
                format!("The provider sent no response within {limit:?} ([limits] first_byte_timeout)."),
            )),
        }
    }

    async fn tls_client(
        &self,
        clients: &Arc<Clients>,
    ) -> Result<Client<HttpsConnector<Dialer>, Full<Bytes>>, TransportError> {
        if let Some(client) = clients.tls.get() {
            return Ok(client.clone());
        }
        let dialer = Dialer { allow: self.allow.clone(), connect_timeout: self.bounds.connect_timeout };
        let made = tokio::task::spawn_blocking(move || {
            client(https().https_only().enable_all_versions().wrap_connector(dialer))
        });
        let made =
            made.await.map_err(|error| TransportError::new(Fault::Tls, format!("TLS cannot be set up: {error}.")))?;
        Ok(clients.tls.get_or_init(|| made).clone())
    }

    async fn receive(&self, response: Response<Incoming>) -> Result<HttpResponse, TransportError> {
        let (head, mut body) = response.into_parts();
        let headers = head
            .headers
            .iter()
            .map(|(name, value)| {
                let mut value = String::from_utf8_lossy(value.as_bytes()).into_owned();
                self.secrets.blank(&mut value);
                let mut name = name.as_str().to_owned();
                self.secrets.blank(&mut name);
                (name, value)
            })
            .collect();
        if let Some(coding) = head.headers.get(header::CONTENT_ENCODING).filter(|coding| *coding != "identity") {
            let coding = String::from_utf8_lossy(coding.as_bytes());
            return Err(TransportError::new(
                Fault::Protocol,
                format!("The provider encoded its answer as `{}`, though it was asked not to.", coding.escape_debug()),
            ));
        }
        let max = self.bounds.max_response;
        let expected = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
        let mut bytes = Vec::with_capacity(expected.min(max).min(1 << 20));
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| self.explain(&error))?;
            let Ok(data) = frame.into_data() else { continue };
            if bytes.len().saturating_add(data.len()) > max {
                return Err(TransportError::new(
                    Fault::TooLarge,
                    format!("The response is larger than {max} bytes ([limits] max_response)."),
                ));
            }
            bytes.extend_from_slice(&data);
        }
        self.secrets.blank_bytes(&mut bytes);
        Ok(HttpResponse { status: head.status.as_u16(), headers, body: bytes })
    }

    /// What went wrong, told by the innermost error that says so.
    fn explain(&self, error: &(dyn Error + 'static)) -> TransportError {
        let mut fault = Fault::Protocol;
        let mut message = String::new();
        let mut next = Some(error);
        while let Some(cause) = next {
            next = cause.source();
            if let Some(known) = cause.downcast_ref::<TransportError>() {
                return TransportError::new(known.fault, known.message.clone());
            }
            if cause.is::<std::io::Error>() {
                fault = Fault::Connection;
            }
            if let Some(hidden) = cause.downcast_ref::<std::io::Error>().and_then(|error| error.get_ref())
                && hidden.is::<rustls::Error>()
            {
                fault = Fault::Tls;
            }
            if cause.downcast_ref::<hyper::Error>().is_some_and(|error| error.is_incomplete_message()) {
                fault = Fault::Connection;
            }
            message = cause.to_string();
        }
        let mut message = format!("The exchange with the provider failed: {message}.");
        self.secrets.blank(&mut message);
        TransportError::new(fault, message)
    }
}

/// TLS with the system's certificates, so that an operator's own authority counts; a container may have none, and gets those of Mozilla.
pub fn https() -> HttpsConnectorBuilder<WantsSchemes> {
    match HttpsConnectorBuilder::new().with_native_roots() {
        Ok(builder) => builder,
        Err(_) => HttpsConnectorBuilder::new().with_webpki_roots(),
    }
}

/// So many a minute, of which a second's share may come at once.
fn quota(a_minute: NonZeroU32) -> Quota {
    let burst = NonZeroU32::new(a_minute.get() / 60).unwrap_or(NonZeroU32::MIN);
    Quota::per_minute(a_minute).allow_burst(burst)
}

fn client<C>(connector: C) -> Client<C, Full<Bytes>>
where
    C: hyper_util::client::legacy::connect::Connect + Clone,
{
    Client::builder(TokioExecutor::new()).pool_idle_timeout(IDLE).pool_timer(TokioTimer::new()).build(connector)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_lets_a_seconds_share_through_at_once_and_no_more() {
        for (a_minute, at_once) in [(1, 1), (60, 1), (300, 5)] {
            let rate = RateLimiter::direct(quota(NonZeroU32::new(a_minute).unwrap()));
            let let_through = (0..a_minute.min(20)).take_while(|_| rate.check().is_ok()).count();
            // Filling up by one takes a fifth of a second at the quickest rate here.
            assert!((at_once..=at_once + 1).contains(&let_through), "{let_through} of {a_minute}");
        }
    }
}
