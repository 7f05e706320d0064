//! From a host to a connection: resolves, checks each address, and dials the very address that was checked.

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
use super::{Fault, TransportError};

/// When the next address is tried beside those that do not answer.
const NEXT_ADDRESS: Duration = Duration::from_millis(250);

/// How long nothing is said before a connection is asked whether it is alive, and how often then.
const KEEP_ALIVE: Duration = Duration::from_secs(30);
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);

/// Names being resolved at a time, for one plugin and over all plugins. Each takes a thread of those that files are read on, and keeps it
/// for as long as the system's resolver likes.
const LOOKUPS_PER_PLUGIN: usize = 4;
const LOOKUPS: usize = 64;

/// Resolves names for one plugin; a slow name server keeps no thread from others.
#[derive(Clone)]
pub struct Resolver {
    all: Arc<Semaphore>,
    own: Arc<Semaphore>,
}

impl Default for Resolver {
    fn default() -> Self {
        Self {
            all: Arc::new(Semaphore::new(LOOKUPS)),
            own: Arc::new(Semaphore::new(LOOKUPS_PER_PLUGIN)),
        }
    }
}

impl Resolver {
    /// A resolver for another plugin, beside this one.
    pub fn beside(&self) -> Self {
        Self { all: self.all.clone(), own: Arc::new(Semaphore::new(LOOKUPS_PER_PLUGIN)) }
    }

    async fn lookup(&self, name: &str, port: u16) -> std::io::Result<Vec<IpAddr>> {
        // They never close, so there is always a permit.
        let permits =
            (self.own.clone().acquire_owned().await, self.all.clone().acquire_owned().await);
        let name = name.to_owned();
        // On a task of its own: a caller that gives up does not give back the thread.
        let looking = tokio::spawn(async move {
            let found = tokio::net::lookup_host((name.as_str(), port))
                .await
                .map(|found| found.map(|at| at.ip()).collect());
            drop(permits);
            found
        });
        looking.await.unwrap_or_else(|error| Err(std::io::Error::other(error)))
    }
}

/// Opens connections for one plugin, within its allow-list.
#[derive(Clone)]
pub struct Dialer {
    pub allow: Arc<AllowList>,
    pub resolver: Resolver,
    pub connect_timeout: Duration,
}

impl Dialer {
    async fn dial(self, uri: Uri) -> Result<TokioIo<TcpStream>, TransportError> {
        let url = Url::parse(&uri.to_string()).map_err(|error| {
            TransportError::new(Fault::NotAllowed, format!("The URL is not valid: {error}."))
        })?;
        let target = self.allow.check(&url)?;
        let connecting = connect(&self.resolver, &target);
        tokio::time::timeout(self.connect_timeout, connecting).await.unwrap_or_else(|_| {
            let (host, port, limit) = (&target.host, target.port, self.connect_timeout);
            let took = format!("took longer than {limit:?} ([limits] connect_timeout).");
            let error =
                TransportError::new(Fault::Timeout, format!("Connecting to the provider {took}"));
            Err(error.with_detail(format!("Connecting to {host}:{port} {took}")))
        })
    }
}

/// Tries the addresses one after the other, each a moment after the one before, and takes the first that answers (RFC 8305): a dead route costs
/// that moment and no more.
async fn connect(
    resolver: &Resolver,
    target: &Target,
) -> Result<TokioIo<TcpStream>, TransportError> {
    let addresses = in_turns(resolve(resolver, target).await?);
    for address in &addresses {
        target.check_address(*address)?;
    }
    let mut waiting = addresses.into_iter();
    let mut trying = FuturesUnordered::new();
    let mut last = None;
    loop {
        if let Some(address) = waiting.next() {
            let at = SocketAddr::new(address, target.port);
            trying.push(async move { (address, TcpStream::connect(at).await) });
        }
        if trying.is_empty() {
            break;
        }
        let next = async {
            if waiting.len() == 0 {
                std::future::pending::<()>().await;
            }
            tokio::time::sleep(NEXT_ADDRESS).await;
        };
        let found = tokio::select! {
            found = trying.next() => found,
            () = next => None,
        };
        match found {
            Some((_, Ok(stream))) => {
                prepare(&stream);
                return Ok(TokioIo::new(stream));
            }
            Some((address, Err(error))) => last = Some((address, error)),
            None => {}
        }
    }
    let (host, port) = (&target.host, target.port);
    Err(match last {
        Some((address, error)) => TransportError::new(
            Fault::Connection,
            format!("Connecting to the provider failed: {error}."),
        )
        .with_detail(format!("Connecting to {host}:{port} ({address}) failed: {error}.")),
        None => TransportError::new(Fault::NameResolution, "The provider's name has no address.")
            .with_detail(format!("The name {host} has no address.")),
    })
}

fn prepare(stream: &TcpStream) {
    // Requests are written whole: waiting to fill a packet only delays them.
    stream.set_nodelay(true).ok();
    // What lies between drops connections on which nothing is said for minutes, and tells nobody.
    let keep_alive = TcpKeepalive::new()
        .with_time(KEEP_ALIVE)
        .with_interval(KEEP_ALIVE_INTERVAL)
        .with_retries(3);
    SockRef::from(stream).set_tcp_keepalive(&keep_alive).ok();
}

/// IPv6 and IPv4 addresses by turns, those of the first one's kind first.
fn in_turns(addresses: Vec<IpAddr>) -> Vec<IpAddr> {
    let first_is_v6 = addresses.first().is_some_and(IpAddr::is_ipv6);
    let (mut one, mut other): (VecDeque<_>, VecDeque<_>) =
        addresses.into_iter().partition(|address| address.is_ipv6() == first_is_v6);
    let mut turns = Vec::new();
    while !one.is_empty() || !other.is_empty() {
        turns.extend(one.pop_front());
        turns.extend(other.pop_front());
    }
    turns
}

async fn resolve(resolver: &Resolver, target: &Target) -> Result<Vec<IpAddr>, TransportError> {
    let name = match &target.host {
        Host::Ipv4(address) => return Ok(vec![IpAddr::V4(*address)]),
        Host::Ipv6(address) => return Ok(vec![IpAddr::V6(*address)]),
        Host::Domain(name) => name,
    };
    resolver.lookup(name, target.port).await.map_err(|error| {
        TransportError::new(Fault::NameResolution, "The provider's name cannot be resolved.")
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
    fn addresses_of_both_kinds_take_turns() {
        let addresses =
            |text: &str| text.split(' ').map(|one| one.parse().unwrap()).collect::<Vec<IpAddr>>();
        assert_eq!(in_turns(addresses("::1 ::2 127.0.0.1")), addresses("::1 127.0.0.1 ::2"));
        assert_eq!(
            in_turns(addresses("127.0.0.1 ::1 127.0.0.2")),
            addresses("127.0.0.1 ::1 127.0.0.2")
        );
        assert_eq!(in_turns(Vec::new()), Vec::<IpAddr>::new());
    }
}
