//! Settings of the HTTP side.

use std::path::PathBuf;

use batchwright_domain::settings;
use batchwright_domain::settings::{Positive, Value};
use batchwright_domain::units::{Count, Span};

settings! {
    /// Settings of how clients are served.
    pub struct ApiConfig in "server" {
        /// Maximum number of requests in flight; a request over the limit gets status 503
        max_connections: Count = "1024", "N";
        /// Timeout for the head of a request; a new connection without a head is closed then
        request_head_timeout: Positive<Span> = "1m", "TIME";
        /// Timeout for a client to send the next chunk of a request body, or to receive the next
        /// chunk of a response
        client_timeout: Positive<Span> = "1m", "TIME";
        /// Idle timeout of a connection between two requests; it must be longer than that of the
        /// load balancer in front
        idle_timeout: Positive<Span> = "90s", "TIME";
        /// Maximum number of connections per client address; 0 is no limit, because clients
        /// behind a proxy share an address
        max_connections_per_address: usize = "0", "N";
        /// PEM file with the certificate chain for TLS; it is read again when it changes
        tls_certificate: Option<PathBuf> = "" (shown "none, HTTP without TLS"), "FILE";
        /// PEM file with the private key of `tls_certificate`
        tls_key: Option<PathBuf> = "" (shown "none"), "FILE";
        /// Host names of this server that clients may use in URLs, separated by commas;
        /// `*.example.com` allows every subdomain; IP addresses and localhost are always allowed
        allowed_hosts: HostNames = "" (shown "any; on a loopback address: none"), "LIST";
        /// Origins of web pages that may use the API, separated by commas, such as
        /// https://tool.example.com; `*` allows any origin
        cors_origins: Origins = "" (shown "none"), "LIST";
    }
}

/// Host names, each a name or `*.` and a domain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostNames(pub Vec<String>);

impl Value for HostNames {
    fn parse(text: &str) -> Result<Self, String> {
        let names = Vec::<String>::parse(text)?;
        for host in &names {
            let name = host.strip_prefix("*.").unwrap_or(host);
            if name.is_empty() || name.contains(['/', ':', ' ', '*']) {
                return Err(format!(
                    "`{host}` is not a host name; write it as batch.example.com or *.example.com"
                ));
            }
        }
        Ok(Self(names))
    }
}

/// Origins of web pages, each `scheme://host[:port]` or `*`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origins(pub Vec<String>);

impl Value for Origins {
    fn parse(text: &str) -> Result<Self, String> {
        let origins = Vec::<String>::parse(text)?;
        for origin in &origins {
            let is_origin = |url: &url::Url| {
                url.origin().is_tuple() && url.origin().ascii_serialization() == *origin
            };
            if origin != "*" && !url::Url::parse(origin).is_ok_and(|url| is_origin(&url)) {
                return Err(format!(
                    "`{origin}` is not an origin; write it as https://tool.example.com"
                ));
            }
        }
        Ok(Self(origins))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_names_and_origins_are_refused_if_written_as_urls() {
        assert!(HostNames::parse("batch.example.com,*.example.com").is_ok());
        assert!(HostNames::parse("https://batch.example.com").is_err());
        assert!(Origins::parse("https://tool.example.com,*").is_ok());
        assert!(Origins::parse("https://tool.example.com/").is_err());
        assert!(Origins::parse("tool.example.com").is_err());
    }
}
