//! From a host to a connection: resolves, checks each address, and dials the very address that was checked.

use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tower::Service;
use url::{Host, Url};

use super::allow::{AllowList, Target};
use super::{Fault, TransportError};

/// Opens connections for one plugin, within its allow-list.
#[derive(Clone)]
pub struct Dialer {
    pub allow: Arc<AllowList>,
    pub connect_timeout: Duration,
}

impl Dialer {
    async fn dial(self, uri: Uri) -> Result<TokioIo<TcpStream>, TransportError> {
        let url = Url::parse(&uri.to_string())
            .map_err(|error| TransportError::new(Fault::NotAllowed, format!("The URL is not valid: {error}.")))?;
        let target = self.allow.check(&url)?;
        tokio::time::timeout(self.connect_timeout, connect(&target)).await.unwrap_or_else(|_| {
            let (host, port, limit) = (&target.host, target.port, self.connect_timeout);
            Err(TransportError::new(Fault::Timeout, format!("Connecting to {host}:{port} took longer than {limit:?}.")))
        })
    }
}

async fn connect(target: &Target) -> Result<TokioIo<TcpStream>, TransportError> {
    let mut last = None;
    for address in resolve(target).await? {
        target.check_address(address)?;
        match TcpStream::connect(SocketAddr::new(address, target.port)).await {
            Ok(stream) => {
                // Requests are written whole: waiting to fill a packet only delays them.
                stream.set_nodelay(true).ok();
                return Ok(TokioIo::new(stream));
            }
            Err(error) => last = Some((address, error)),
        }
    }
    let (host, port) = (&target.host, target.port);
    Err(match last {
        Some((address, error)) => {
            TransportError::new(Fault::Connection, format!("Connecting to {host}:{port} ({address}) failed: {error}."))
        }
        None => TransportError::new(Fault::NameResolution, format!("The name {host} has no address.")),
    })
}

async fn resolve(target: &Target) -> Result<Vec<IpAddr>, TransportError> {
    let name = match &target.host {
        Host::Ipv4(address) => return Ok(vec![IpAddr::V4(*address)]),
        Host::Ipv6(address) => return Ok(vec![IpAddr::V6(*address)]),
        Host::Domain(name) => name,
    };
    match tokio::net::lookup_host((name.as_str(), target.port)).await {
        Ok(addresses) => Ok(addresses.map(|address| address.ip()).collect()),
        Err(error) => {
            Err(TransportError::new(Fault::NameResolution, format!("The name {name} cannot be resolved: {error}.")))
        }
    }
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
