//! Dialer: resolves a host, checks each address, and connects to an address that it has checked.
//!
//! There is no second lookup between the check and the connection, so DNS rebinding gains nothing.
//! One address that is not allowed makes the whole host unreachable.

use std::collections::VecDeque;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use http::Uri;
use hyper_util::rt::TokioIo;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tower::Service;
use url::{Host, Url};

use super::allow::{AllowList, Target};
use super::{TransportError, TransportErrorKind};

/// Delay before the next address is tried in parallel (RFC 8305).
const CONNECTION_ATTEMPT_DELAY: Duration = Duration::from_millis(250);

/// Idle time before the first TCP keep-alive probe.
const KEEP_ALIVE_IDLE: Duration = Duration::from_secs(30);
/// Interval of further TCP keep-alive probes.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);

/// Maximum number of concurrent lookups of one plugin. A lookup occupies a thread of the blocking
/// pool, which also reads files, until the system's resolver returns.
const MAX_LOOKUPS_PER_PLUGIN: usize = 4;
/// Maximum number of concurrent lookups over all plugins.
const MAX_LOOKUPS: usize = 64;

/// Resolver of one plugin; its limits keep a slow name server from blocking other plugins.
#[derive(Clone)]
pub struct Resolver {
    all: Arc<Semaphore>,
    own: Arc<Semaphore>,
}

impl Default for Resolver {
    fn default() -> Self {
        Self {
            all: Arc::new(Semaphore::new(MAX_LOOKUPS)),
            own: Arc::new(Semaphore::new(MAX_LOOKUPS_PER_PLUGIN)),
        }
    }
}

impl Resolver {
    /// Returns a resolver for another plugin, with the same limit over all plugins.
    pub fn beside(&self) -> Self {
        self.beside_with(MAX_LOOKUPS_PER_PLUGIN)
    }

    /// Returns a resolver like [`Self::beside`], with a limit of its own.
    pub(crate) fn beside_with(&self, lookups: usize) -> Self {
        Self { all: self.all.clone(), own: Arc::new(Semaphore::new(lookups)) }
    }

    async fn lookup(&self, name: &str, port: u16) -> std::io::Result<Vec<IpAddr>> {
        // Both results are `Ok`, because the semaphores are never closed.
        let permits =
            (self.own.clone().acquire_owned().await, self.all.clone().acquire_owned().await);
        let name = name.to_owned();
        // A separate task holds the permits: the thread stays occupied if the caller times out.
        let lookup = tokio::spawn(async move {
            let found = tokio::net::lookup_host((name.as_str(), port))
                .await
                .map(|found| found.map(|at| at.ip()).collect());
            drop(permits);
            found
        });
        lookup.await.unwrap_or_else(|error| Err(std::io::Error::other(error)))
    }
}

/// Connector of one plugin, limited to the plugin's allow-list.
#[derive(Clone)]
pub(crate) struct Dialer {
    /// Hosts that the plugin may reach.
    pub allow: Arc<AllowList>,
    /// Resolver of the plugin.
    pub resolver: Resolver,
    /// Timeout of name resolution and connection together.
    pub connect_timeout: Duration,
}

impl Dialer {
    async fn dial(self, uri: Uri) -> Result<TokioIo<TcpStream>, TransportError> {
        let url = Url::parse(&uri.to_string()).map_err(|error| {
            TransportError::new(
                TransportErrorKind::NotAllowed,
                format!("The URL is not valid: {error}."),
            )
        })?;
        let target = self.allow.check(&url)?;
        let connecting = connect(&self.resolver, &target);
        tokio::time::timeout(self.connect_timeout, connecting).await.unwrap_or_else(|_| {
            let (host, port, limit) = (&target.host, target.port, self.connect_timeout);
            let reason = format!("took longer than {limit:?} ([limits] connect_timeout).");
            let error = TransportError::new(
                TransportErrorKind::Timeout,
                format!("Connecting to the provider {reason}"),
            );
            Err(error.with_detail(format!("Connecting to {host}:{port} {reason}")))
        })
    }
}

/// Connects to the first address that accepts (RFC 8305): each attempt starts a short delay after
/// the previous attempt, so a dead route costs only that delay.
async fn connect(
    resolver: &Resolver,
    target: &Target,
) -> Result<TokioIo<TcpStream>, TransportError> {
    let addresses = interleave(resolve(resolver, target).await?);
    for address in &addresses {
        target.check_address(*address)?;
    }
    let mut waiting = addresses.into_iter();
    let mut attempts = FuturesUnordered::new();
    let mut last_error = None;
    loop {
        if let Some(address) = waiting.next() {
            let at = SocketAddr::new(address, target.port);
            attempts.push(async move { (address, TcpStream::connect(at).await) });
        }
        if attempts.is_empty() {
            break;
        }
        let next = async {
            if waiting.len() == 0 {
                std::future::pending::<()>().await;
            }
            tokio::time::sleep(CONNECTION_ATTEMPT_DELAY).await;
        };
        let found = tokio::select! {
            found = attempts.next() => found,
            () = next => None,
        };
        match found {
            Some((_, Ok(stream))) => {
                prepare(&stream);
                return Ok(TokioIo::new(stream));
            }
            Some((address, Err(error))) => last_error = Some((address, error)),
            None => {}
        }
    }
    let (host, port) = (&target.host, target.port);
    Err(match last_error {
        Some((address, error)) => TransportError::new(
            TransportErrorKind::Connection,
            format!("Connecting to the provider failed: {error}."),
        )
        .with_detail(format!("Connecting to {host}:{port} ({address}) failed: {error}.")),
        None => TransportError::new(
            TransportErrorKind::NameResolution,
            "The provider's name has no address.",
        )
        .with_detail(format!("The name {host} has no address.")),
    })
}

fn prepare(stream: &TcpStream) {
    // Requests are written in one piece, so Nagle's algorithm would only delay them.
    stream.set_nodelay(true).ok();
    // Middleboxes silently drop connections that are idle for minutes.
    let keep_alive = TcpKeepalive::new()
        .with_time(KEEP_ALIVE_IDLE)
        .with_interval(KEEP_ALIVE_INTERVAL)
        .with_retries(3);
    SockRef::from(stream).set_tcp_keepalive(&keep_alive).ok();
}

/// Interleaves IPv6 and IPv4 addresses; the family of the first address stays first.
fn interleave(addresses: Vec<IpAddr>) -> Vec<IpAddr> {
    let first_is_v6 = addresses.first().is_some_and(IpAddr::is_ipv6);
    let (mut one, mut other): (VecDeque<_>, VecDeque<_>) =
        addresses.into_iter().partition(|address| address.is_ipv6() == first_is_v6);
    let mut interleaved = Vec::new();
    while !one.is_empty() || !other.is_empty() {
        interleaved.extend(one.pop_front());
        interleaved.extend(other.pop_front());
    }
    interleaved
}

async fn resolve(resolver: &Resolver, target: &Target) -> Result<Vec<IpAddr>, TransportError> {
    let name = match &target.host {
        Host::Ipv4(address) => return Ok(vec![IpAddr::V4(*address)]),
        Host::Ipv6(address) => return Ok(vec![IpAddr::V6(*address)]),
        Host::Domain(name) => name,
    };
    resolver.lookup(name, target.port).await.map_err(|error| {
        TransportError::new(
            TransportErrorKind::NameResolution,
            "The provider's name cannot be resolved.",
        )
        .with_detail(format!("The name {name} cannot be resolved: {error}."))
    })
}

impl Service<Uri> for Dialer {
    type Response = TokioIo<TcpStream>;
    type Error = TransportError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        Box::pin(self.clone().dial(uri))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleave_alternates_address_families() {
        let addresses =
            |text: &str| text.split(' ').map(|one| one.parse().unwrap()).collect::<Vec<IpAddr>>();
        assert_eq!(interleave(addresses("::1 ::2 127.0.0.1")), addresses("::1 127.0.0.1 ::2"));
        assert_eq!(
            interleave(addresses("127.0.0.1 ::1 127.0.0.2")),
            addresses("127.0.0.1 ::1 127.0.0.2")
        );
        assert_eq!(interleave(Vec::new()), Vec::<IpAddr>::new());
    }
}
