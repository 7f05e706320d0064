//! One plugin's way out.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, Uri, header};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_rustls::builderstates::WantsSchemes;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use tokio::time::{Instant, timeout};
use url::Url;

use super::dial::{Dialer, Resolver};
use super::explain::explain;
use super::throttle::{Admitted, Queue, Throttle};
use super::{AllowList, Bounds, Fault, HttpRequest, HttpResponse, Secrets, TransportError};
use batchwright_memory::{Holder, Pool, Share};

/// How long a connection that nobody uses stays open.
const IDLE: Duration = Duration::from_secs(60);

/// How often a connection over HTTP/2 is asked whether it is alive, and how long that may take.
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(20);

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

/// The least that an exchange is counted for: the buffers of its connection, and what it is made of.
const SMALLEST_EXCHANGE: usize = 8 << 10;

/// What an exchange's share grows by at a time.
const STEP: usize = 64 << 10;

/// How much a connection reads ahead of who takes it, in bytes.
const READ_AHEAD: usize = 64 << 10;

/// How often trouble with a provider is written to the log at the level of a warning.
const WARNING: Duration = Duration::from_secs(10);

/// What a gateway shares with those of other plugins.
#[derive(Clone)]
pub struct Shared {
    /// Memory of exchanges.
    pub exchanges: Pool,
    pub resolver: Resolver,
}

/// Exchanges of one plugin: its allow-list, its secrets, its bounds, and a connection pool for each tenant.
pub struct Gateway {
    plugin: Holder,
    allow: Arc<AllowList>,
    secrets: Secrets,
    bounds: Bounds,
    throttle: Throttle,
    /// With whose turn it is to wait for it.
    rate: Option<(tokio::sync::Mutex<()>, DefaultDirectRateLimiter)>,
    exchanges: Pool,
    resolver: Resolver,
    /// The size of what an exchange brings, as it was lately: so much is taken before one begins.
    expected: AtomicUsize,
    clients: Mutex<HashMap<String, Arc<Clients>>>,
    /// The last URL that passed the checks: adapters mostly use one.
    last_checked: ArcSwapOption<Checked>,
    last_warned: Mutex<Option<Instant>>,
}

/// A URL that may be followed, and the credentials that go with it.
struct Checked {
    text: String,
    uri: Uri,
    headers: Vec<(HeaderName, HeaderValue)>,
}

/// The connections of one tenant. TLS is set up when it is first asked for: reading the system's certificates takes a while.
struct Clients {
    plain: Client<Dialer, Full<Bytes>>,
    tls: OnceLock<Client<HttpsConnector<Dialer>, Full<Bytes>>>,
}

/// When an exchange has to be over. It moves by as long as the exchange waited for memory, which is not the provider's fault.
struct Deadline(Instant);

impl Deadline {
    async fn cover(&mut self, share: &mut Share, bytes: usize) {
        if share.try_cover(bytes) {
            return;
        }
        let begun = Instant::now();
        share.cover(bytes).await;
        self.0 = self.0.checked_add(begun.elapsed()).unwrap_or(self.0);
    }
}

impl Gateway {
    pub fn new(
        plugin: &str,
        allow: AllowList,
        secrets: Secrets,
        bounds: Bounds,
        shared: &Shared,
    ) -> Self {
        Self {
            plugin: plugin.into(),
            allow: Arc::new(allow),
            secrets,
            throttle: Throttle::new(bounds.concurrency),
            rate: bounds
                .requests_per_minute
                .map(|number| (tokio::sync::Mutex::default(), RateLimiter::direct(quota(number)))),
            bounds,
            exchanges: shared.exchanges.clone(),
            resolver: shared.resolver.beside(),
            expected: AtomicUsize::new(0),
            clients: Mutex::default(),
            last_checked: ArcSwapOption::empty(),
            last_warned: Mutex::default(),
        }
    }

    /// Waits until the plugin may have one more exchange under way. Those of one queue wait for each other, queues take turns. An error is the
    /// time until which the provider asks to wait, if that is long.
    pub async fn admit(&self, queue: Queue) -> Result<Admitted, Instant> {
        self.throttle.admit(queue).await
    }

    /// A share of the memory of exchanges, without any bytes yet.
    pub fn share(&self) -> Share {
        self.exchanges.share(&self.plugin)
    }

    /// Bytes that an exchange will take, as far as can be told before it begins. Of very large ones only a part is taken before: most of
    /// the pool would be held while a provider thinks.
    pub fn expected(&self) -> usize {
        let most = self.exchanges.size() / 8;
        self.expected.load(Ordering::Relaxed).saturating_mul(2).min(most).max(SMALLEST_EXCHANGE)
    }

    /// Takes note of how much an exchange brought: what is expected rises at once and falls slowly.
    pub fn brought(&self, bytes: usize) {
        let known = self.expected.load(Ordering::Relaxed);
        let next = if bytes >= known {
            bytes
        } else {
            known.saturating_sub(known.saturating_sub(bytes).div_ceil(16))
        };
        if next != known {
            self.expected.store(next, Ordering::Relaxed);
        }
    }

    /// Waits until one more exchange may begin by the operator's rate. Who came first goes first.
    pub async fn until_rate_permits(&self) {
        let Some((turn, rate)) = &self.rate else { return };
        let _turn = turn.lock().await;
        while let Err(not_until) = rate.check() {
            tokio::time::sleep(not_until.wait_time_from(governor::clock::Clock::now(rate.clock())))
                .await;
        }
    }

    /// How many exchanges at a time are thought right.
    pub fn limit(&self) -> f64 {
        self.throttle.limit()
    }

    /// Takes note of how many requests the provider says are left, and for how long.
    pub fn told(&self, admitted: &Admitted, (left, reset): (u64, Duration)) {
        self.throttle.told(admitted, left, reset);
    }

    /// Performs an exchange, with everything that stands between a guest and the network. What comes back is within `share`, which waits
    /// for room as it grows.
    pub async fn send(
        &self,
        tenant: &str,
        request: HttpRequest,
        share: &mut Share,
    ) -> Result<HttpResponse, TransportError> {
        let sent = self.send_now(tenant, request, share).await;
        if let Err(error) = &sent {
            self.report(error);
        }
        sent
    }

    async fn send_now(
        &self,
        tenant: &str,
        request: HttpRequest,
        share: &mut Share,
    ) -> Result<HttpResponse, TransportError> {
        let checked = self.checked(&request.url)?;
        let sent = request.body.len();
        let request = self.prepare(&checked, request)?;
        let clients = self.clients(tenant);
        let begun = Instant::now();
        let end = begun.checked_add(self.bounds.exchange_timeout).unwrap_or(begun);
        self.exchange(&clients, request, Deadline(end), share, sent).await
    }

    /// Tells the operator of an exchange that brought no response: one in a while, the rest at the level of details.
    fn report(&self, error: &TransportError) {
        let (plugin, detail) = (&*self.plugin, error.detail());
        let mut last = self.last_warned.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_some_and(|last| last.elapsed() < WARNING) {
            tracing::debug!(plugin, "exchange failed: {detail}");
        } else {
            *last = Some(Instant::now());
            tracing::warn!(plugin, "exchange failed: {detail}");
        }
    }

    /// Whether an adapter's request would be sent, were it asked for.
    pub fn check(&self, request: &HttpRequest) -> Result<(), TransportError> {
        let copy = HttpRequest {
            method: request.method.clone(),
            url: request.url.clone(),
            headers: request.headers.clone(),
            body: Vec::new(),
        };
        self.prepare(&*self.checked(&request.url)?, copy).map(drop)
    }

    /// Normalizes a URL, holds it against the allow-list and finds its credentials.
    fn checked(&self, text: &str) -> Result<Arc<Checked>, TransportError> {
        if let Some(last) = &*self.last_checked.load()
            && last.text == text
        {
            return Ok(last.clone());
        }
        let invalid = |error: String| {
            TransportError::new(
                Fault::NotAllowed,
                format!("The adapter's URL is not valid: {error}."),
            )
        };
        let mut url = Url::parse(text).map_err(|error| invalid(error.to_string()))?;
        url.set_fragment(None);
        self.allow.check(&url)?;
        let headers = self.secrets.for_url(&url)?;
        let uri: Uri = url
            .as_str()
            .parse()
            .map_err(|error: http::uri::InvalidUri| invalid(error.to_string()))?;
        let checked = Arc::new(Checked { text: text.to_owned(), uri, headers });
        self.last_checked.store(Some(checked.clone()));
        Ok(checked)
    }

    fn prepare(
        &self,
        checked: &Checked,
        request: HttpRequest,
    ) -> Result<Request<Full<Bytes>>, TransportError> {
        let invalid = |what: String| {
            TransportError::new(Fault::Protocol, format!("The adapter's {what} is not valid HTTP."))
        };
        let method = Method::from_bytes(request.method.as_bytes())
            .ok()
            .filter(|method| !matches!(*method, Method::CONNECT | Method::TRACE))
            .ok_or_else(|| invalid(format!("method `{}`", request.method.escape_debug())))?;
        if request.headers.len() > MOST_HEADERS {
            let number = request.headers.len();
            let message =
                format!("The adapter's request has {number} headers; it may have {MOST_HEADERS}.");
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
        headers.entry(header::USER_AGENT).or_insert(HeaderValue::from_static(concat!(
            "batchwright/",
            env!("CARGO_PKG_VERSION")
        )));
        // Bodies are not decoded here, and a secret must be found in what comes back.
        headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        self.secrets.add_to(&mut headers, &checked.headers);
        let mut prepared = Request::new(Full::new(Bytes::from(request.body)));
        *prepared.method_mut() = method;
        *prepared.uri_mut() = checked.uri.clone();
        *prepared.headers_mut() = headers;
        Ok(prepared)
    }

    fn clients(&self, tenant: &str) -> Arc<Clients> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = clients.get(tenant) {
            return found.clone();
        }
        let dialer = self.dialer();
        let plain = client(dialer);
        let made = Arc::new(Clients { plain, tls: OnceLock::new() });
        clients.insert(tenant.to_owned(), made.clone());
        made
    }

    fn dialer(&self) -> Dialer {
        Dialer {
            allow: self.allow.clone(),
            resolver: self.resolver.clone(),
            connect_timeout: self.bounds.connect_timeout,
        }
    }

    /// `sent` is the size of the request's body, which is counted until the response begins.
    async fn exchange(
        &self,
        clients: &Arc<Clients>,
        request: Request<Full<Bytes>>,
        end: Deadline,
        share: &mut Share,
        sent: usize,
    ) -> Result<HttpResponse, TransportError> {
        let limit =
            self.bounds.first_byte_timeout.min(end.0.saturating_duration_since(Instant::now()));
        let sending = if request.uri().scheme_str() == Some("https") {
            let client = self.tls_client(clients).await?;
            timeout(limit, client.request(request)).await
        } else {
            timeout(limit, clients.plain.request(request)).await
        };
        match sending {
            Ok(Ok(response)) => self.receive(response, end, share, sent).await,
            Ok(Err(error)) => Err(explain(&self.secrets, &error)),
            Err(_) => Err(TransportError::new(
                Fault::Timeout,
                format!(
                    "The provider sent no response within {limit:?} ([limits] first_byte_timeout)."
                ),
            )
            .after_sending()),
        }
    }

    async fn tls_client(
        &self,
        clients: &Arc<Clients>,
    ) -> Result<Client<HttpsConnector<Dialer>, Full<Bytes>>, TransportError> {
        if let Some(client) = clients.tls.get() {
            return Ok(client.clone());
        }
        let dialer = self.dialer();
        let made = tokio::task::spawn_blocking(move || {
            client(https().https_only().enable_all_versions().wrap_connector(dialer))
        });
        let made = made.await.map_err(|error| {
            TransportError::new(Fault::Tls, format!("TLS cannot be set up: {error}."))
        })?;
        Ok(clients.tls.get_or_init(|| made).clone())
    }

    async fn receive(
        &self,
        response: Response<Incoming>,
        mut end: Deadline,
        share: &mut Share,
        sent: usize,
    ) -> Result<HttpResponse, TransportError> {
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
        if let Some(coding) =
            head.headers.get(header::CONTENT_ENCODING).filter(|coding| is_coded(coding))
        {
            let coding = String::from_utf8_lossy(coding.as_bytes());
            return Err(TransportError::new(
                Fault::Protocol,
                format!(
                    "The provider encoded its answer as `{}`, though it was asked not to.",
                    coding.escape_debug()
                ),
            )
            .after_sending());
        }
        let max = self.bounds.max_response;
        let mut bytes = Vec::new();
        loop {
            let frame = tokio::time::timeout_at(end.0, body.frame()).await.map_err(|_| {
                let limit = self.bounds.exchange_timeout;
                TransportError::new(
                    Fault::Timeout,
                    format!("The exchange took longer than {limit:?} ([limits] exchange_timeout)."),
                )
                .after_sending()
            })?;
            let Some(frame) = frame else { break };
            let frame = frame.map_err(|error| explain(&self.secrets, &error))?;
            let Ok(data) = frame.into_data() else { continue };
            let size = bytes.len().saturating_add(data.len());
            if size > max {
                return Err(TransportError::new(
                    Fault::TooLarge,
                    format!("The response is larger than {max} bytes ([limits] max_response)."),
                )
                .after_sending());
            }
            if size > bytes.capacity() {
                // By a quarter each time, so that growing costs little, and little is held that is not used.
                let capacity = size.saturating_add((size / 4).max(1024)).min(max);
                if sent.saturating_add(capacity) > share.bytes() {
                    end.cover(share, sent.saturating_add(capacity).next_multiple_of(STEP)).await;
                }
                bytes.reserve_exact(capacity.saturating_sub(bytes.len()));
            }
            bytes.extend_from_slice(&data);
        }
        // What blanks secrets, and the guest that reads the body, make a copy.
        end.cover(share, bytes.len().saturating_mul(2)).await;
        self.secrets.blank_body(&mut bytes, !head.status.is_success());
        Ok(HttpResponse { status: head.status.as_u16(), headers, body: bytes })
    }
}

/// Whether a body is in a coding. Some providers write what is none there, or the character set.
fn is_coded(coding: &HeaderValue) -> bool {
    let coding = coding.as_bytes().trim_ascii();
    !["", "identity", "none", "utf-8", "utf8"]
        .iter()
        .any(|known| coding.eq_ignore_ascii_case(known.as_bytes()))
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
    let mut builder = Client::builder(TokioExecutor::new());
    builder.pool_idle_timeout(IDLE).pool_timer(TokioTimer::new());
    builder.http1_max_buf_size(READ_AHEAD);
    // A load balancer that drops a long exchange says nothing of it.
    builder
        .http2_keep_alive_interval(PING_INTERVAL)
        .http2_keep_alive_timeout(PING_TIMEOUT)
        .http2_keep_alive_while_idle(true);
    let window = u32::try_from(READ_AHEAD).unwrap_or(u32::MAX);
    builder.http2_initial_stream_window_size(window.saturating_mul(4));
    builder.http2_initial_connection_window_size(window.saturating_mul(16));
    builder.build(connector)
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
