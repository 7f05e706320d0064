//! Protection from foreign web pages.
//!
//! **Threat.** A browser on this machine, or inside the network, sends requests on behalf of pages
//! of other sites. Without keys, the server would treat each as a request of the user.
//!
//! - Cross-site requests: a page submits a form, or calls `fetch` with a content type that needs no
//!   preflight request. The browser sends these without asking the server. The page cannot read the
//!   response, but the write has happened.
//! - DNS rebinding: a site points its own host name at a loopback address. For the browser, the
//!   server then has the same origin as the page, so the page can also read responses.
//!
//! **Layers.**
//!
//! 1. Content types. A request body has to be JSON, or a multipart form on upload
//!    ([`super::params`], [`super::multipart`]). A browser sends a preflight request before it
//!    sends JSON to another origin, and only the pages in `cors_origins` pass that.
//! 2. Origin. Every route refuses a write from another origin, by `Sec-Fetch-Site` and `Origin`,
//!    unless `cors_origins` has the origin. Uploads and writes without a body need this layer,
//!    because a browser sends them without a preflight request. A request with neither header
//!    passes: it is not from a browser.
//! 3. Host. On a loopback address, and if `allowed_hosts` is set, `Host` has to be an IP address,
//!    `localhost`, or an allowed name. In a rebinding attack, `Host` is the name of the attacking
//!    site. An IP address cannot be rebound.
//!
//! `/health` is exempt: probes send any `Host`, and health is not confidential.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use batchwright_domain::error_code::ErrorCode;
use batchwright_domain::text::truncate_for_message;
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use super::config::ApiConfig;
use super::error::ApiError;

/// Request header in which a browser states the relation between the page and the server (W3C Fetch
/// Metadata).
const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// Response headers that a page may read.
const EXPOSED_HEADERS: [HeaderName; 6] = [
    super::REQUEST_ID_HEADER,
    HeaderName::from_static("x-should-retry"),
    header::RETRY_AFTER,
    header::CONTENT_DISPOSITION,
    header::CONTENT_RANGE,
    header::ACCEPT_RANGES,
];

/// Hosts and origins that a listener accepts.
pub(crate) struct OriginPolicy {
    /// True if `Host` is checked.
    checks_hosts: bool,
    hosts: Vec<String>,
    origins: Vec<String>,
}

impl OriginPolicy {
    /// Creates the policy of a listener on `address`.
    pub(crate) fn new(settings: &ApiConfig, address: SocketAddr) -> Arc<Self> {
        let lowercase = |names: &[String]| {
            names.iter().map(|name| name.to_ascii_lowercase()).collect::<Vec<_>>()
        };
        let hosts = lowercase(&settings.allowed_hosts.0);
        Arc::new(Self {
            checks_hosts: address.ip().is_loopback() || !hosts.is_empty(),
            hosts,
            origins: lowercase(&settings.cors_origins.0),
        })
    }

    fn allows_host(&self, host: &str) -> bool {
        let name = without_port(host).to_ascii_lowercase();
        let name = name.trim_end_matches('.');
        let address = name.trim_start_matches('[').trim_end_matches(']');
        address.parse::<IpAddr>().is_ok()
            || name == "localhost"
            || name.ends_with(".localhost")
            || self.hosts.iter().any(|allowed| match allowed.strip_prefix("*.") {
                Some(parent) => name
                    .strip_suffix(parent)
                    .is_some_and(|child| child.len() > 1 && child.ends_with('.')),
                None => name == allowed,
            })
    }

    fn allows_origin(&self, origin: &str) -> bool {
        let origin = origin.to_ascii_lowercase();
        self.origins.iter().any(|allowed| allowed == "*" || *allowed == origin)
    }
}

/// Returns the layer that answers preflight requests and lets pages of `cors_origins` read
/// responses. None if `cors_origins` is empty.
pub(crate) fn cors(settings: &ApiConfig) -> Option<CorsLayer> {
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
        .expose_headers(EXPOSED_HEADERS)
        .max_age(std::time::Duration::from_secs(600));
    (!origins.is_empty()).then_some(layer)
}

/// Middleware that refuses requests of foreign web pages.
pub(crate) async fn guard(
    State(policy): State<Arc<OriginPolicy>>,
    request: Request,
    next: Next,
) -> Response {
    let checked = match request.uri().path().starts_with("/health/") {
        true => Ok(()),
        false => check(&policy, request.method(), host(&request), request.headers()),
    };
    match checked {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

/// Returns the host of a request, with the port if there is one: from the URL (HTTP/2 and proxies),
/// or from the header.
fn host(request: &Request) -> Option<&str> {
    let from_header = || request.headers().get(header::HOST)?.to_str().ok();
    request.uri().authority().map(axum::http::uri::Authority::as_str).or_else(from_header)
}

fn check(
    policy: &OriginPolicy,
    method: &Method,
    host: Option<&str>,
    headers: &HeaderMap,
) -> Result<(), ApiError> {
    if headers.get_all(header::HOST).iter().nth(1).is_some() {
        return Err(ApiError::bad_request("The request has more than one Host header."));
    }
    if let Some(host) = host
        && policy.checks_hosts
        && !policy.allows_host(host)
    {
        let host = truncate_for_message(without_port(host));
        let message = format!(
            "This server does not serve the host '{host}'. \
             The server's operator can allow the host with the setting allowed_hosts."
        );
        return Err(ApiError::client_error(StatusCode::MISDIRECTED_REQUEST, message)
            .with_code(ErrorCode::HostNotAllowed));
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
        (_, Some(origin)) if policy.allows_origin(origin) => true,
        (Some(_), Some(_)) => false,
        // The scheme is not compared, because a proxy may terminate TLS.
        (None, Some(origin)) => origin
            .split_once("://")
            .zip(host)
            .is_some_and(|((_, page_host), host)| page_host.eq_ignore_ascii_case(host)),
    };
    if is_same {
        return Ok(());
    }
    let origin = origin.map_or_else(
        || "another site".into(),
        |origin| format!("'{}'", truncate_for_message(&origin)),
    );
    let message = format!(
        "Web pages of {origin} may not write to this server. \
         The server's operator can allow an origin with the setting cors_origins."
    );
    Err(ApiError::client_error(StatusCode::FORBIDDEN, message)
        .with_code(ErrorCode::OriginNotAllowed))
}

/// Returns a host without its port. An IPv6 address keeps its brackets.
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
    use batchwright_domain::settings::{Given, Section};

    use super::*;

    fn policy(address: &str, hosts: &[&str], origins: &[&str]) -> Arc<OriginPolicy> {
        let mut given = Given::default();
        given.add("allowed_hosts", hosts.join(","), "");
        given.add("cors_origins", origins.join(","), "");
        let settings = ApiConfig::read(&mut given).unwrap();
        OriginPolicy::new(&settings, address.parse().unwrap())
    }

    fn status(
        policy: &OriginPolicy,
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
        check(policy, &method, host, &headers)
            .map_or_else(|error| error.into_response().status().as_u16(), |()| 200)
    }

    #[test]
    fn host_is_checked_on_loopback_and_if_allowed_hosts_is_set() {
        let local = policy("127.0.0.1:8080", &[], &[]);
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
        let open = policy("0.0.0.0:8080", &[], &[]);
        assert_eq!(status(&open, Method::GET, "anything.example", &[]), 200);
        let named = policy("0.0.0.0:8080", &["Batch.example", "*.inner.example"], &[]);
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
    fn writes_from_other_origins_are_refused() {
        let local = policy("127.0.0.1:8080", &[], &["https://tool.example"]);
        let host = "127.0.0.1:8080";
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
                assert_eq!(status(&local, method, host, &headers), expected, "{headers:?}");
            }
            assert_eq!(status(&local, Method::GET, host, &headers), 200, "{headers:?}");
        }
    }
}
