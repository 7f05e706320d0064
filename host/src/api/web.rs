//! Protection from web pages.
//!
//! **Threat.** A browser on this machine, or inside the network, sends what a page of another site tells it to: a form or a `fetch` with a
//! content type that needs no preflight. Without keys every such request would be the user's own. And a site whose name is rebound to a
//! loopback address (DNS rebinding) is the same origin for the browser, so it could read answers, too.
//!
//! **Layers.** A body has to be JSON, or a multipart form on upload ([`super::params`], [`super::multipart`]): browsers ask before they send
//! JSON elsewhere. Writes with a foreign origin are refused on every route. On a loopback address, and where `allowed_hosts` is set, `Host`
//! has to be an IP address, localhost, or a name that the operator allowed. Health is exempt: probes send any `Host`.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use super::error::ApiError;
use crate::batch::shortened;
use crate::config::Settings;

/// What a browser says of the relation between a page and the server that it sends to (W3C Fetch Metadata).
const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// Answer headers that a page may read.
const EXPOSED: [HeaderName; 6] = [
    super::REQUEST_ID,
    HeaderName::from_static("x-should-retry"),
    header::RETRY_AFTER,
    header::CONTENT_DISPOSITION,
    header::CONTENT_RANGE,
    header::ACCEPT_RANGES,
];

/// Origins and hosts that are trusted.
pub struct Trusted {
    /// `Host` is checked.
    checks_hosts: bool,
    hosts: Vec<String>,
    origins: Vec<String>,
}

impl Trusted {
    /// The settings for a listener on this address.
    pub fn new(settings: &Settings, address: SocketAddr) -> Arc<Self> {
        let lowered = |names: &[String]| {
            names.iter().map(|name| name.to_ascii_lowercase()).collect::<Vec<_>>()
        };
        let hosts = lowered(&settings.allowed_hosts.0);
        Arc::new(Self {
            checks_hosts: address.ip().is_loopback() || !hosts.is_empty(),
            hosts,
            origins: lowered(&settings.cors_origins.0),
        })
    }

    fn trusts_host(&self, host: &str) -> bool {
        let name = without_port(host).to_ascii_lowercase();
        let name = name.trim_end_matches('.');
        let address = name.trim_start_matches('[').trim_end_matches(']');
        address.parse::<IpAddr>().is_ok()
            || name == "localhost"
            || name.ends_with(".localhost")
            || self.hosts.iter().any(|allowed| match allowed.strip_prefix("*.") {
                Some(parent) => name
                    .strip_suffix(parent)
                    .is_some_and(|below| below.len() > 1 && below.ends_with('.')),
                None => name == allowed,
            })
    }

    fn trusts_origin(&self, origin: &str) -> bool {
        let origin = origin.to_ascii_lowercase();
        self.origins.iter().any(|allowed| allowed == "*" || *allowed == origin)
    }
}

/// Answers preflight requests, and says which pages may read answers; none if the settings name no origin.
pub fn cors(settings: &Settings) -> Option<CorsLayer> {
    let origins = &settings.cors_origins.0;
    let allowed = match origins.iter().any(|origin| origin == "*") {
        true => AllowOrigin::any(),
        false => AllowOrigin::list(
            origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok()),
        ),
    };
    let layer = CorsLayer::new()
        .allow_origin(allowed)
        .allow_methods([Method::GET, Method::HEAD, Method::POST, Method::DELETE])
        .allow_headers(AllowHeaders::mirror_request())
        .allow_private_network(true)
        .expose_headers(EXPOSED)
        .max_age(std::time::Duration::from_secs(600));
    (!origins.is_empty()).then_some(layer)
}

/// Refuses what a page of another site may have sent.
pub async fn guard(State(trusted): State<Arc<Trusted>>, request: Request, next: Next) -> Response {
    let checked = match request.uri().path().starts_with("/health/") {
        true => Ok(()),
        false => check(&trusted, request.method(), host(&request), request.headers()),
    };
    match checked {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

/// The host that a request is for, with its port if it names one: of the URL (HTTP/2, and proxies), or of the header.
fn host(request: &Request) -> Option<&str> {
    let of_header = || request.headers().get(header::HOST)?.to_str().ok();
    request.uri().authority().map(axum::http::uri::Authority::as_str).or_else(of_header)
}

fn check(
    trusted: &Trusted,
    method: &Method,
    host: Option<&str>,
    headers: &HeaderMap,
) -> Result<(), ApiError> {
    if headers.get_all(header::HOST).iter().nth(1).is_some() {
        return Err(ApiError::bad_request("The request has more than one Host header."));
    }
    if let Some(host) = host
        && trusted.checks_hosts
        && !trusted.trusts_host(host)
    {
        let host = shortened(without_port(host));
        let message = format!(
            "This server does not answer for the host '{host}'. Its operator can allow the name with the setting allowed_hosts."
        );
        return Err(ApiError::refused(StatusCode::MISDIRECTED_REQUEST, message)
            .with_code("host_not_allowed"));
    }
    if matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS) {
        return Ok(());
    }
    let origin =
        headers.get(header::ORIGIN).map(|origin| String::from_utf8_lossy(origin.as_bytes()));
    let site = headers.get(SEC_FETCH_SITE).map(HeaderValue::as_bytes);
    let is_same = match (site, &origin) {
        (Some(b"same-origin" | b"none"), _) | (None, None) => true,
        (Some(_), None) => false,
        (_, Some(origin)) if trusted.trusts_origin(origin) => true,
        (Some(_), Some(_)) => false,
        // The scheme is not compared: a proxy may have taken the TLS off.
        (None, Some(origin)) => origin
            .split_once("://")
            .zip(host)
            .is_some_and(|((_, of_page), host)| of_page.eq_ignore_ascii_case(host)),
    };
    if is_same {
        return Ok(());
    }
    let origin =
        origin.map_or_else(|| "another site".into(), |origin| format!("'{}'", shortened(&origin)));
    let message = format!(
        "Web pages of {origin} may not write here. The server's operator can allow an origin with the setting cors_origins."
    );
    Err(ApiError::refused(StatusCode::FORBIDDEN, message).with_code("origin_not_allowed"))
}

/// A host without its port; an IPv6 address keeps its brackets.
fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port))
            if !port.contains(']') && port.bytes().all(|digit| digit.is_ascii_digit()) =>
        {
            name
        }
        _ => host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trusted(address: &str, hosts: &[&str], origins: &[&str]) -> Arc<Trusted> {
        let names = |names: &[&str]| {
            crate::config::Names(names.iter().map(|&name| name.to_owned()).collect())
        };
        let settings = Settings {
            allowed_hosts: names(hosts),
            cors_origins: names(origins),
            ..Settings::resolve(Default::default(), None).unwrap()
        };
        Trusted::new(&settings, address.parse().unwrap())
    }

    fn status(
        trusted: &Trusted,
        method: Method,
        host: &str,
        headers: &[(&'static str, &str)],
    ) -> u16 {
        let headers: HeaderMap = headers
            .iter()
            .map(|(name, value)| {
                (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())
            })
            .collect();
        let host = Some(host).filter(|host| !host.is_empty());
        check(trusted, &method, host, &headers)
            .map_or_else(|error| error.into_response().status().as_u16(), |()| 200)
    }

    #[test]
    fn host_is_checked_on_loopback_and_where_names_are_allowed() {
        let local = trusted("127.0.0.1:8080", &[], &[]);
        for (host, expected) in [
            ("localhost:8080", 200),
            ("LOCALHOST", 200),
            ("a.localhost", 200),
            ("127.0.0.1:8080", 200),
            ("10.1.2.3", 200),
            ("[::1]:8080", 200),
            ("[fe80::1]", 200),
            ("", 200),
            ("evil.example", 421),
            ("evil.example:8080", 421),
            ("localhost.evil.example", 421),
            ("127.0.0.1.evil.example", 421),
        ] {
            assert_eq!(status(&local, Method::GET, host, &[]), expected, "{host}");
        }
        let open = trusted("0.0.0.0:8080", &[], &[]);
        assert_eq!(status(&open, Method::GET, "anything.example", &[]), 200);
        let named = trusted("0.0.0.0:8080", &["Batch.example", "*.inner.example"], &[]);
        for (host, expected) in [
            ("batch.EXAMPLE:443", 200),
            ("batch.example.", 200),
            ("a.inner.example", 200),
            (".inner.example", 421),
            ("inner.example", 421),
            ("other.example", 421),
            ("10.1.2.3:8080", 200),
        ] {
            assert_eq!(status(&named, Method::GET, host, &[]), expected, "{host}");
        }
    }

    #[test]
    fn writes_of_other_origins_are_refused() {
        let local = trusted("127.0.0.1:8080", &[], &["https://tool.example"]);
        let here = "127.0.0.1:8080";
        for (headers, expected) in [
            (vec![], 200),
            (vec![("origin", "http://127.0.0.1:8080")], 200),
            (vec![("origin", "https://127.0.0.1:8080"), ("sec-fetch-site", "same-origin")], 200),
            (vec![("origin", "http://localhost:8080")], 403),
            (vec![("origin", "http://127.0.0.1:3000")], 403),
            (vec![("origin", "null")], 403),
            (vec![("origin", "")], 403),
            (vec![("sec-fetch-site", "cross-site")], 403),
            (vec![("sec-fetch-site", "same-site"), ("origin", "http://127.0.0.1:3000")], 403),
            (vec![("sec-fetch-site", "none")], 200),
            (vec![("sec-fetch-site", "cross-site"), ("origin", "https://TOOL.example")], 200),
            (vec![("origin", "https://tool.example")], 200),
            (vec![("origin", "https://tool.example.evil")], 403),
        ] {
            for method in [Method::POST, Method::DELETE, Method::PUT] {
                assert_eq!(status(&local, method, here, &headers), expected, "{headers:?}");
            }
            assert_eq!(status(&local, Method::GET, here, &headers), 200, "{headers:?}");
        }
    }
}
