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
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use tokio::time::{Instant, timeout};
use url::Url;

use super::admission::{AdmissionQueue, Permit, Priority, QueueId};
use super::dial::Resolver;
use super::explain::explain;
use super::in_flight::TenantsInFlight;
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

/// Granularity in which an exchange's memory reservation grows.
const RESERVATION_STEP_BYTES: usize = 64 << 10;

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
}

/// Allowed URL, with the credential headers of its host.
struct Checked {
    /// Secrets whose headers these are.
    secrets: Arc<Secrets>,
    text: String,
    uri: Uri,
    headers: Vec<(HeaderName, HeaderValue)>,
}

/// Deadline of an exchange. The time that the exchange waits for memory is not the fault of the
/// provider, so that time extends the deadline.
struct Deadline(Instant);

impl Deadline {
    /// Grows `reservation` to `bytes`, and extends the deadline by the time that this takes.
    async fn reserve(&mut self, reservation: &mut Reservation, bytes: usize) {
        if reservation.try_grow_to(bytes) {
            return;
        }
        let started = Instant::now();
        reservation.grow_to(bytes).await;
        self.0 = self.0.checked_add(started.elapsed()).unwrap_or(self.0);
    }
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
            admission: AdmissionQueue::new(bounds.concurrency, bounds.share_by, &shared.tenants.0),
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
        }
    }

    /// Waits for a permit for one more exchange in flight. Each queue is first come, first served;
    /// queues share fairly. The error is the end of a long pause that the provider asked for.
    pub async fn admit(&self, queue: QueueId, priority: Priority) -> Result<Permit, Instant> {
        self.admission.admit(queue, priority).await
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
        reservation: &mut Reservation,
    ) -> Result<HttpResponse, TransportError> {
        let sent = self.send_now(tenant, request, reservation).await;
        if let Err(error) = &sent {
            self.report(error);
        }
        sent
    }

    async fn send_now(
        &self,
        tenant: &TenantId,
        request: HttpRequest,
        reservation: &mut Reservation,
    ) -> Result<HttpResponse, TransportError> {
        // Taken once, so that headers and redaction have the same secrets.
        let secrets = self.credentials.of(tenant).await.map_err(no_credential)?;
        let checked = self.checked(&request.url, &secrets)?;
        let sent = request.body.len();
        let request = self.prepare(&checked, request)?;
        let clients = self.clients(tenant);
        let started = Instant::now();
        let end = started.checked_add(self.bounds.exchange_timeout).unwrap_or(started);
        self.exchange((&clients, &secrets), request, Deadline(end), reservation, sent).await
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

    /// Sends a request and receives its response. `sent` is the size of the request body, which
    /// counts toward `reservation` until the response is complete.
    async fn exchange(
        &self,
        (clients, secrets): (&Arc<Clients>, &Secrets),
        request: Request<Full<Bytes>>,
        end: Deadline,
        reservation: &mut Reservation,
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
            Ok(Ok(response)) => self.receive(response, secrets, end, (reservation, sent)).await,
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

    async fn receive(
        &self,
        response: Response<Incoming>,
        secrets: &Secrets,
        mut end: Deadline,
        (reservation, sent): (&mut Reservation, usize),
    ) -> Result<HttpResponse, TransportError> {
        let (head, mut body) = response.into_parts();
        let headers = head
            .headers
            .iter()
            .map(|(name, value)| {
                let mut value = String::from_utf8_lossy(value.as_bytes()).into_owned();
                secrets.redact(&mut value);
                let mut name = name.as_str().to_owned();
                secrets.redact(&mut name);
                (name, value)
            })
            .collect();
        if let Some(coding) =
            head.headers.get(header::CONTENT_ENCODING).filter(|coding| is_encoded(coding))
        {
            let coding = String::from_utf8_lossy(coding.as_bytes());
            return Err(TransportError::new(
                TransportErrorKind::Protocol,
                format!(
                    "The provider sent a response with Content-Encoding `{}`, although the \
                     request asked for `identity`.",
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
                    TransportErrorKind::Timeout,
                    format!("The exchange took longer than {limit:?} ([limits] exchange_timeout)."),
                )
                .after_sending()
            })?;
            let Some(frame) = frame else { break };
            let frame = frame.map_err(|error| explain(secrets, &error))?;
            let Ok(data) = frame.into_data() else { continue };
            let size = bytes.len().saturating_add(data.len());
            if size > max {
                return Err(TransportError::new(
                    TransportErrorKind::TooLarge,
                    format!("The response is larger than {max} bytes ([limits] max_response)."),
                )
                .after_sending());
            }
            if size > bytes.capacity() {
                // A growth of a quarter copies seldom, and reserves little memory in excess.
                let capacity = size.saturating_add((size / 4).max(1024)).min(max);
                if sent.saturating_add(capacity) > reservation.bytes() {
                    end.reserve(
                        reservation,
                        sent.saturating_add(capacity).next_multiple_of(RESERVATION_STEP_BYTES),
                    )
                    .await;
                }
                bytes.reserve_exact(capacity.saturating_sub(bytes.len()));
            }
            bytes.extend_from_slice(&data);
        }
        // Redaction and the guest each make a copy of the body.
        end.reserve(reservation, bytes.len().saturating_mul(2)).await;
        secrets.redact_body(&mut bytes, !head.status.is_success());
        Ok(HttpResponse { status: head.status.as_u16(), headers, body: bytes })
    }
}

fn no_credential(NoCredential(detail): NoCredential) -> TransportError {
    TransportError::new(
        TransportErrorKind::NotAllowed,
        "The provider has no credential for this project.",
    )
    .with_detail(detail)
}

/// Returns true if a `Content-Encoding` is a real one; some providers send `none` or a charset.
fn is_encoded(coding: &HeaderValue) -> bool {
    let coding = coding.as_bytes().trim_ascii();
    !["", "identity", "none", "utf-8", "utf8"]
        .iter()
        .any(|known| coding.eq_ignore_ascii_case(known.as_bytes()))
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
