//! Gateway of one plugin: checks, sends and receives its exchanges.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use batchwright_domain::ids::TenantId;
use batchwright_memory::{Holder, Pool, Reservation};
use bytes::Bytes;
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, Uri, header};
use http_body_util::Full;
use hyper::body::Incoming;
use tokio::time::{Instant, timeout};
use url::Url;

use super::admission::{AdmissionQueue, Permit, Priority, QueueId};
use super::dial::Resolver;
use super::explain::explain;
use super::in_flight::TenantsInFlight;
use super::metrics::ExchangeMetrics;
use super::receive::{Incomplete, Received};
use super::{
    AllowList, CredentialStore, ExchangeLimits, HttpRequest, HttpResponse, NoCredential, Secrets,
    TransportError, TransportErrorKind,
};
use crate::clients::Clients;

/// Headers that belong to the connection or to the host; a plugin's values are dropped.
const HOST_HEADERS: [HeaderName; 11] = [
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

/// Maximum number of headers of a request.
const MAX_REQUEST_HEADERS: usize = 200;

/// Returns true if a header belongs to the connection or to the host.
pub fn is_host_header(name: &HeaderName) -> bool {
    HOST_HEADERS.contains(name)
}

/// Minimum memory that an exchange reserves: its own state and the buffers of its connection.
const MIN_EXCHANGE_BYTES: usize = 8 << 10;

/// Maximum read buffer of a connection.
pub(crate) const READ_BUFFER_BYTES: usize = 64 << 10;

/// Minimum interval between two warnings about failed exchanges of one plugin.
const WARNING_INTERVAL: Duration = Duration::from_secs(10);

/// Resources that all gateways share.
#[derive(Clone)]
pub struct Shared {
    /// Memory pool of all exchanges.
    pub exchanges: Pool,
    /// Resolver with the limit on lookups over all plugins.
    pub resolver: Resolver,
    /// Exchanges in flight by tenant.
    pub tenants: Tenants,
    /// Metrics of exchanges.
    pub metrics: ExchangeMetrics,
}

/// Exchanges in flight by tenant, over all gateways.
#[derive(Clone, Default)]
pub struct Tenants(pub(super) Arc<TenantsInFlight>);

/// Gateway of one plugin: its allow-list, secrets and limits, and a connection pool per tenant.
pub struct Gateway {
    plugin: Holder,
    pub(super) allow: Arc<AllowList>,
    credentials: CredentialStore,
    pub(super) bounds: ExchangeLimits,
    admission: AdmissionQueue,
    /// Lock for first-come order, and the limiter of the operator's rate.
    rate: Option<(tokio::sync::Mutex<()>, DefaultDirectRateLimiter)>,
    exchanges: Pool,
    pub(super) resolver: Resolver,
    /// Recent size of a response; the estimate for the memory to reserve before an exchange.
    expected_bytes: AtomicUsize,
    pub(super) clients: Mutex<HashMap<TenantId, Arc<Clients>>>,
    /// Last URL that passed the checks; an adapter mostly uses one URL.
    last_checked: ArcSwapOption<Checked>,
    last_warned: Mutex<Option<Instant>>,
    metrics: ExchangeMetrics,
}

/// Allowed URL, with the credential headers of its host.
struct Checked {
    /// Secrets whose headers these are.
    secrets: Arc<Secrets>,
    text: String,
    uri: Uri,
    headers: Vec<(HeaderName, HeaderValue)>,
}

impl Gateway {
    /// Returns the gateway of the plugin named `plugin`.
    pub fn new(
        plugin: &str,
        allow: AllowList,
        credentials: CredentialStore,
        bounds: ExchangeLimits,
        shared: &Shared,
    ) -> Self {
        Self {
            plugin: plugin.into(),
            allow: Arc::new(allow),
            credentials,
            admission: AdmissionQueue::new(
                (bounds.concurrency, bounds.online_percent),
                bounds.share_by,
                &shared.tenants.0,
            ),
            rate: bounds
                .requests_per_minute
                .map(|number| (tokio::sync::Mutex::default(), RateLimiter::direct(quota(number)))),
            bounds,
            exchanges: shared.exchanges.clone(),
            resolver: shared.resolver.beside(),
            expected_bytes: AtomicUsize::new(0),
            clients: Mutex::default(),
            last_checked: ArcSwapOption::empty(),
            last_warned: Mutex::default(),
            metrics: shared.metrics.clone(),
        }
    }

    /// Waits for a permit for one more exchange in flight. Each queue is first come, first served;
    /// queues share fairly. The error is the end of a long pause that the provider asked for.
    pub async fn admit(&self, queue: QueueId, priority: Priority) -> Result<Permit, Instant> {
        self.admission.admit(queue, priority).await
    }

    /// Returns the exchanges of a tenant in flight, over all plugins.
    pub fn in_flight_of(&self, tenant: &TenantId) -> u64 {
        self.admission.in_flight_of(tenant)
    }

    /// Returns an empty reservation of the exchanges' memory pool.
    pub fn reservation(&self, tenant: &TenantId) -> Reservation {
        self.exchanges.reservation(&format!("{}/{tenant}", self.plugin).into())
    }

    /// Returns the bytes to reserve before an exchange. The estimate is capped, because a very
    /// large reservation would block most of the pool while the provider works.
    pub fn expected_response_bytes(&self) -> usize {
        let max = self.exchanges.size() / 8;
        self.expected_bytes
            .load(Ordering::Relaxed)
            .saturating_mul(2)
            .min(max)
            .max(MIN_EXCHANGE_BYTES)
    }

    /// Records the size of a response; the estimate rises immediately and falls slowly.
    pub fn record_response_size(&self, bytes: usize) {
        let known = self.expected_bytes.load(Ordering::Relaxed);
        let next = if bytes >= known {
            bytes
        } else {
            known.saturating_sub(known.saturating_sub(bytes).div_ceil(16))
        };
        if next != known {
            self.expected_bytes.store(next, Ordering::Relaxed);
        }
    }

    /// Waits until the operator's rate permits one more exchange; first come, first served.
    pub async fn rate_limit_ready(&self) {
        let Some((turn, rate)) = &self.rate else { return };
        let _turn = turn.lock().await;
        wait_for_rate(rate).await;
    }

    /// Waits like [`Self::rate_limit_ready`] for a further exchange of an attempt, which competes
    /// with one new attempt at most: work that is paid for must not wait behind work that is not.
    pub async fn rate_limit_ready_again(&self) {
        if let Some((_, rate)) = &self.rate {
            wait_for_rate(rate).await;
        }
    }

    /// Returns the exchanges in flight.
    pub fn in_flight(&self) -> usize {
        self.admission.in_flight()
    }

    /// Returns the estimated concurrency limit of the provider; below one, a rate.
    pub fn limit(&self) -> f64 {
        self.admission.limit()
    }

    /// Records how many requests the provider reports as remaining, and the time until the reset.
    pub fn update_remaining(&self, admitted: &Permit, (left, reset): (u64, Duration)) {
        self.admission.update_remaining(admitted, left, reset);
    }

    /// Performs an exchange, through all layers between a guest and the network. The response is
    /// reserved in `reservation`; while the pool is full, receiving waits.
    pub async fn send(
        &self,
        tenant: &TenantId,
        request: HttpRequest,
        permit: &mut Permit,
        reservation: &mut Reservation,
    ) -> Result<HttpResponse, TransportError> {
        let mut measured = self.metrics.start(&self.plugin);
        let sent = async {
            let begun = self.begin_exchange(tenant, request, permit).await?;
            measured.head_arrived();
            begun.receive(self.bounds.max_response, reservation).await
        };
        let sent = sent.await;
        match &sent {
            Ok(response) => measured.answered(response.status),
            Err(error) => {
                measured.failed(error);
                self.report(error);
            }
        }
        sent
    }

    /// Performs an exchange like [`Self::send`], and returns a successful response of server-sent
    /// events as soon as it begins.
    pub async fn send_for_events(
        &self,
        tenant: &TenantId,
        request: HttpRequest,
        permit: &mut Permit,
        reservation: &mut Reservation,
    ) -> Result<Received, TransportError> {
        let mut measured = self.metrics.start(&self.plugin);
        let sent = async {
            let begun = self.begin_exchange(tenant, request, permit).await?;
            measured.head_arrived();
            if begun.has_events() {
                return Ok(Ok(begun));
            }
            begun.receive(self.bounds.max_response, reservation).await.map(Err)
        };
        match sent.await {
            Ok(Ok(begun)) => {
                Ok(Received::Events(begun.into_events(self.bounds.max_response, measured)))
            }
            Ok(Err(response)) => {
                measured.answered(response.status);
                Ok(Received::Whole(response))
            }
            Err(error) => {
                measured.failed(&error);
                self.report(&error);
                Err(error)
            }
        }
    }

    /// Sends a request and returns its response when the head has arrived.
    async fn begin_exchange(
        &self,
        tenant: &TenantId,
        request: HttpRequest,
        permit: &mut Permit,
    ) -> Result<Incomplete, TransportError> {
        // Taken once, so that headers and redaction have the same secrets.
        let secrets = self.credentials.of(tenant).await.map_err(no_credential)?;
        permit.set_own_credential(secrets.is_own());
        let checked = self.checked(&request.url, &secrets)?;
        let sent = request.body.len();
        let request = self.prepare(&checked, request)?;
        let clients = self.clients(tenant);
        let started = Instant::now();
        let end = started.checked_add(self.bounds.exchange_timeout).unwrap_or(started);
        let response = self.exchange((&clients, &secrets), request, end).await?;
        let exchange_timeout = self.bounds.exchange_timeout;
        Incomplete::new(response, secrets, (end, exchange_timeout), sent)
    }

    /// Logs an exchange without a response: at most one warning per interval, the rest as debug.
    fn report(&self, error: &TransportError) {
        let (plugin, error) = (&*self.plugin, error.detail());
        let mut last = self.last_warned.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_some_and(|last| last.elapsed() < WARNING_INTERVAL) {
            tracing::debug!(plugin, %error, "exchange failed");
        } else {
            *last = Some(Instant::now());
            tracing::warn!(plugin, %error, "exchange failed");
        }
    }

    /// Fails with the operator's text if a tenant has no credential.
    pub async fn check_credential(&self, tenant: &TenantId) -> Result<(), NoCredential> {
        self.credentials.of(tenant).await.map(drop)
    }

    /// Checks an adapter's request without sending it; fails as [`Self::send`] would for a tenant
    /// that has a credential.
    pub fn check(&self, request: &HttpRequest) -> Result<(), TransportError> {
        let secrets = self.credentials.any();
        let copy = HttpRequest {
            method: request.method.clone(),
            url: request.url.clone(),
            headers: request.headers.clone(),
            body: Vec::new(),
        };
        self.prepare(&*self.checked(&request.url, &secrets)?, copy).map(drop)
    }

    /// Normalizes a URL, checks it against the allow-list, and adds the credentials of its host.
    fn checked(&self, text: &str, secrets: &Arc<Secrets>) -> Result<Arc<Checked>, TransportError> {
        if let Some(last) = &*self.last_checked.load()
            && last.text == text
            && Arc::ptr_eq(&last.secrets, secrets)
        {
            return Ok(last.clone());
        }
        let invalid = |error: String| {
            TransportError::new(
                TransportErrorKind::NotAllowed,
                format!("The adapter's URL is not valid: {error}."),
            )
        };
        let mut url = Url::parse(text).map_err(|error| invalid(error.to_string()))?;
        url.set_fragment(None);
        self.allow.check(&url)?;
        let headers = secrets.for_url(&url)?;
        let uri: Uri = url
            .as_str()
            .parse()
            .map_err(|error: http::uri::InvalidUri| invalid(error.to_string()))?;
        let checked = Checked { secrets: secrets.clone(), text: text.to_owned(), uri, headers };
        let checked = Arc::new(checked);
        self.last_checked.store(Some(checked.clone()));
        Ok(checked)
    }

    fn prepare(
        &self,
        checked: &Checked,
        request: HttpRequest,
    ) -> Result<Request<Full<Bytes>>, TransportError> {
        let invalid = |what: String| {
            TransportError::new(
                TransportErrorKind::Protocol,
                format!("The adapter's {what} is not valid HTTP."),
            )
        };
        let method = Method::from_bytes(request.method.as_bytes())
            .ok()
            .filter(|method| !matches!(*method, Method::CONNECT | Method::TRACE))
            .ok_or_else(|| invalid(format!("method `{}`", request.method.escape_debug())))?;
        if request.headers.len() > MAX_REQUEST_HEADERS {
            let number = request.headers.len();
            let message = format!(
                "The adapter's request has {number} headers; it may have {MAX_REQUEST_HEADERS}."
            );
            return Err(TransportError::new(TransportErrorKind::Protocol, message));
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
        // Bodies are not decompressed, so that secrets in the response can be redacted.
        headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        checked.secrets.add_to(&mut headers, &checked.headers);
        let mut prepared = Request::new(Full::new(Bytes::from(request.body)));
        *prepared.method_mut() = method;
        *prepared.uri_mut() = checked.uri.clone();
        *prepared.headers_mut() = headers;
        Ok(prepared)
    }

    /// Sends a request and waits for the head of its response.
    async fn exchange(
        &self,
        (clients, secrets): (&Arc<Clients>, &Secrets),
        request: Request<Full<Bytes>>,
        end: Instant,
    ) -> Result<Response<Incoming>, TransportError> {
        let limit =
            self.bounds.first_byte_timeout.min(end.saturating_duration_since(Instant::now()));
        let sending = if request.uri().scheme_str() == Some("https") {
            let client = self.tls_client(clients).await?;
            timeout(limit, client.request(request)).await
        } else {
            timeout(limit, clients.plain.request(request)).await
        };
        match sending {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(explain(secrets, &error)),
            Err(_) => Err(TransportError::new(
                TransportErrorKind::Timeout,
                format!(
                    "The provider sent no response within {limit:?} ([limits] first_byte_timeout)."
                ),
            )
            .after_sending()),
        }
    }
}

fn no_credential(NoCredential(detail): NoCredential) -> TransportError {
    TransportError::new(
        TransportErrorKind::NotAllowed,
        "The provider has no credential for this project.",
    )
    .with_detail(detail)
}

/// Waits until a rate permits one more exchange.
async fn wait_for_rate(rate: &DefaultDirectRateLimiter) {
    while let Err(not_until) = rate.check() {
        let now = governor::clock::Clock::now(rate.clock());
        tokio::time::sleep(not_until.wait_time_from(now)).await;
    }
}

/// Returns the quota of `per_minute` exchanges, with a burst of one second's share.
fn quota(per_minute: NonZeroU32) -> Quota {
    let burst = NonZeroU32::new(per_minute.get() / 60).unwrap_or(NonZeroU32::MIN);
    Quota::per_minute(per_minute).allow_burst(burst)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_quota_allows_a_burst_of_one_second() {
        for (per_minute, burst) in [(1, 1), (60, 1), (300, 5)] {
            let rate = RateLimiter::direct(quota(NonZeroU32::new(per_minute).unwrap()));
            let permitted = (0..per_minute.min(20)).take_while(|_| rate.check().is_ok()).count();
            // At the fastest rate here, one more permit takes 200 ms.
            assert!((burst..=burst + 1).contains(&permitted), "{permitted} of {per_minute}");
        }
    }
}
