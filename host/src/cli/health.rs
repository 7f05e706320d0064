//! `batchwright health`: asks the server of these settings for its health.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use clap::{Args, ValueEnum};
use http::StatusCode;
use serde_json::Value;

use super::client::Client;
use super::terminal::outln;
use crate::config::{Addresses, Settings, SettingsArgs};
use crate::error::Error;

/// Maximum time for the server to respond.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Arguments of `batchwright health`.
#[derive(Args)]
pub struct Health {
    #[command(flatten)]
    settings: SettingsArgs<Addresses>,
    /// What to ask for: a supervisor restarts on `live`, a load balancer follows `serving`
    #[arg(long, value_enum, default_value = "serving")]
    check: Check,
}

/// Path below `/health`.
#[derive(Clone, Copy, ValueEnum)]
enum Check {
    /// The process responds
    Live,
    /// The database responds
    Serving,
    /// A new batch would be validated, executed and stored
    Ready,
}

impl Health {
    /// Runs the command; an unhealthy server is an error.
    pub async fn run(self) -> Result<(), Error> {
        let address = address(&self.settings.resolve()?)?;
        let path = match self.check {
            Check::Live => "/health/live",
            Check::Serving => "/health/serving",
            Check::Ready => "/health/ready",
        };
        let client = Client::new(&format!("http://{address}"), None)?;
        let asked = tokio::time::timeout(TIMEOUT, client.probe(path)).await;
        let (status, body) = asked.map_err(|_| {
            let seconds = TIMEOUT.as_secs();
            Error::Other(format!("no response from http://{address}{path} within {seconds} s"))
        })??;
        if status == StatusCode::OK {
            let status = body.get("status").and_then(Value::as_str);
            outln!("{}", status.unwrap_or("ok"));
            return Ok(());
        }
        let message = body.pointer("/error/message").and_then(Value::as_str);
        let message = message.map_or_else(|| format!("status {status}"), ToOwned::to_owned);
        Err(Error::Other(format!("http://{address}{path}: {message}")))
    }
}

/// Returns the address on which this machine reaches the health of the server.
fn address(settings: &Settings) -> Result<SocketAddr, Error> {
    let has_tls = settings.api.tls_certificate.is_some();
    let address = match settings.server.admin_listen {
        Some(address) => address,
        None if has_tls => {
            return Err(Error::Usage(
                "the certificate of tls_certificate names no address of this machine; set \
                 admin_listen, such as 127.0.0.1:8081, which answers without TLS"
                    .into(),
            ));
        }
        None => settings.server.listen,
    };
    if address.port() == 0 {
        return Err(Error::Usage("the server picks a free port; set one to ask it".into()));
    }
    // An unspecified address is every address of the machine.
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    Ok(SocketAddr::new(ip, address.port()))
}

#[cfg(test)]
mod tests {
    use batchwright_domain::settings::Given;

    use super::*;

    fn asked(listen: &str, admin: Option<&str>, tls: bool) -> Result<SocketAddr, Error> {
        let mut settings = Settings::resolve(Given::default(), None).unwrap();
        settings.server.listen = listen.parse().unwrap();
        settings.server.admin_listen = admin.map(|admin| admin.parse().unwrap());
        settings.api.tls_certificate = tls.then(|| "server.pem".into());
        address(&settings)
    }

    #[test]
    fn health_is_asked_on_an_address_of_this_machine() {
        let of = |text: &str| text.parse::<SocketAddr>().unwrap();
        assert_eq!(asked("0.0.0.0:80", None, false).unwrap(), of("127.0.0.1:80"));
        assert_eq!(asked("[::]:80", None, false).unwrap(), of("[::1]:80"));
        assert_eq!(asked("10.0.0.1:80", None, false).unwrap(), of("10.0.0.1:80"));
        let admin = Some("0.0.0.0:81");
        assert_eq!(asked("0.0.0.0:443", admin, true).unwrap(), of("127.0.0.1:81"));
        assert!(asked("0.0.0.0:443", None, true).is_err());
        assert!(asked("127.0.0.1:0", None, false).is_err());
    }
}
