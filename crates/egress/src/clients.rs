//! HTTP clients of a gateway, one for each tenant, so that tenants share no connection.

use std::sync::{Arc, OnceLock, PoisonError};
use std::time::Duration;

use batchwright_domain::ids::TenantId;
use bytes::Bytes;
use http_body_util::Full;
use hyper_rustls::builderstates::WantsSchemes;
use hyper_rustls::{ConfigBuilderExt, HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use rustls::ClientConfig;

use super::dial::Dialer;
use super::{TransportError, TransportErrorKind};
use crate::gateway::{Gateway, READ_BUFFER_BYTES};

/// Time after which an unused connection is closed.
const IDLE_CONNECTION_TIMEOUT: Duration = Duration::from_secs(60);

/// Interval of HTTP/2 pings.
const PING_INTERVAL: Duration = Duration::from_secs(30);

/// Timeout of an HTTP/2 ping.
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// Connection pools of one tenant. The TLS pool is created at its first use, because reading the
/// system's certificates is slow.
pub(crate) struct Clients {
    pub(super) plain: Client<Dialer, Full<Bytes>>,
    tls: OnceLock<Client<HttpsConnector<Dialer>, Full<Bytes>>>,
}

/// Returns a TLS configuration with the system's root certificates, so that an operator's own
/// authority is trusted. Without system roots, as in some containers, it uses Mozilla's roots.
pub(super) fn tls_config() -> ClientConfig {
    match ClientConfig::builder().with_native_roots() {
        Ok(builder) => builder.with_no_client_auth(),
        Err(_) => ClientConfig::builder().with_webpki_roots().with_no_client_auth(),
    }
}

/// Returns a TLS connector with the same root certificates as requests to providers have.
pub fn https() -> HttpsConnectorBuilder<WantsSchemes> {
    HttpsConnectorBuilder::new().with_tls_config(tls_config())
}

pub(super) fn client<C>(connector: C) -> Client<C, Full<Bytes>>
where
    C: hyper_util::client::legacy::connect::Connect + Clone,
{
    let mut builder = Client::builder(TokioExecutor::new());
    builder.pool_idle_timeout(IDLE_CONNECTION_TIMEOUT).pool_timer(TokioTimer::new());
    builder.http1_max_buf_size(READ_BUFFER_BYTES);
    // A load balancer may drop a long exchange silently; a ping detects that.
    builder
        .http2_keep_alive_interval(PING_INTERVAL)
        .http2_keep_alive_timeout(PING_TIMEOUT)
        .http2_keep_alive_while_idle(true);
    let window = u32::try_from(READ_BUFFER_BYTES).unwrap_or(u32::MAX);
    builder.http2_initial_stream_window_size(window.saturating_mul(4));
    builder.http2_initial_connection_window_size(window.saturating_mul(16));
    builder.build(connector)
}

impl Gateway {
    pub(super) fn clients(&self, tenant: &TenantId) -> Arc<Clients> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = clients.get(tenant) {
            return found.clone();
        }
        let dialer = self.dialer();
        let plain = client(dialer);
        let created = Arc::new(Clients { plain, tls: OnceLock::new() });
        clients.insert(tenant.clone(), created.clone());
        created
    }

    fn dialer(&self) -> Dialer {
        Dialer {
            allow: self.allow.clone(),
            resolver: self.resolver.clone(),
            connect_timeout: self.bounds.connect_timeout,
        }
    }

    pub(super) async fn tls_client(
        &self,
        clients: &Arc<Clients>,
    ) -> Result<Client<HttpsConnector<Dialer>, Full<Bytes>>, TransportError> {
        if let Some(client) = clients.tls.get() {
            return Ok(client.clone());
        }
        let dialer = self.dialer();
        let created = tokio::task::spawn_blocking(move || {
            client(https().https_only().enable_all_versions().wrap_connector(dialer))
        });
        let created = created.await.map_err(|error| {
            TransportError::new(TransportErrorKind::Tls, format!("TLS cannot be set up: {error}."))
        })?;
        Ok(clients.tls.get_or_init(|| created).clone())
    }
}
