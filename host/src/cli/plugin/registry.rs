//! Client of an OCI registry: tokens, manifests and blobs.
//!
//! **Threat.** A hostile registry, or an attacker in its place, can try to
//!
//! - get the user's password, by naming its own host as the token service (`realm`);
//! - reach services in the user's network, by a redirect or a realm with a private address;
//! - exhaust memory or time, by a response without an end;
//! - deliver another component than the one that the user pinned.
//!
//! **Defense.** A password is sent only to the host of the registry, to the token services of the
//! public registries in `KNOWN_REALMS`, and to hosts that the user names. A realm or a redirect to
//! a private IP address is an error, unless the URL of the registry has one itself. Redirects are
//! followed for blobs only, at most `MAX_REDIRECTS`, without credentials and never from HTTPS to
//! HTTP. Each response has a maximum size and a read timeout. A manifest that is requested by
//! digest and every blob are verified against their digests.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use batchwright_domain::text::hex;
use batchwright_egress::{https, is_loopback};
use bytes::Bytes;
use http::header::{ACCEPT, AUTHORIZATION, LOCATION, USER_AGENT, WWW_AUTHENTICATE};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use url::{Host, Url};

use crate::cli::client::root_cause;

/// Timeout for the head of a response and for each chunk of its body.
const READ_TIMEOUT: Duration = Duration::from_secs(30);

/// Maximum size of a token response, in bytes.
const MAX_TOKEN_BYTES: usize = 128 << 10;

/// Maximum size of a manifest, in bytes.
const MAX_MANIFEST_BYTES: usize = 4 << 20;

/// Maximum size of an error response, in bytes.
const MAX_ERROR_BYTES: usize = 64 << 10;

/// Maximum number of redirects for a blob.
const MAX_REDIRECTS: usize = 5;

/// Public registries with a token service on another host: registry host and service host.
const KNOWN_REALMS: [(&str, &str); 3] = [
    ("index.docker.io", "auth.docker.io"),
    ("registry-1.docker.io", "auth.docker.io"),
    ("registry.gitlab.com", "gitlab.com"),
];

/// Value of the `Accept` header for a manifest.
const MANIFEST_TYPES: &str = "application/vnd.oci.image.manifest.v1+json, \
     application/vnd.oci.image.index.v1+json, \
     application/vnd.docker.distribution.manifest.v2+json";

/// Credentials of a user of the registry.
pub struct Login {
    /// Name of the user.
    pub username: String,
    /// Password or access token of the user.
    pub password: String,
}

/// Client of one repository in a registry.
pub struct Registry {
    /// URL of the repository, such as `https://ghcr.io/v2/owner/name/`.
    base: Url,
    repository: String,
    http: Client<HttpsConnector<HttpConnector>, Empty<Bytes>>,
    login: Option<Login>,
    /// Hosts of token services that the user allows to receive the password.
    realms: Vec<String>,
    /// Value of the `Authorization` header, after the registry asked for one.
    authorization: Option<String>,
}

/// Authentication scheme in `WWW-Authenticate`.
enum Challenge {
    Basic,
    Bearer { realm: Url, service: Option<String> },
}

/// Response of a token service.
#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    /// Name of the same token in OAuth 2; some services return both.
    access_token: Option<String>,
}

impl Registry {
    /// Creates a client for `repository` at `host`; `realms` are further hosts of token services.
    pub fn new(
        host: &str,
        repository: &str,
        plain_http: bool,
        login: Option<Login>,
        realms: Vec<String>,
    ) -> Result<Self, String> {
        let scheme = if plain_http { "http" } else { "https" };
        let base = Url::parse(&format!("{scheme}://{host}/v2/{repository}/"))
            .map_err(|error| format!("`{host}` is not a registry host: {error}"))?;
        let http = Client::builder(TokioExecutor::new())
            .build(https().https_or_http().enable_http1().build());
        Ok(Self {
            base,
            repository: repository.to_owned(),
            http,
            login,
            realms,
            authorization: None,
        })
    }

    /// Fetches the manifest of a tag or digest; returns the manifest and its digest.
    pub async fn manifest(&mut self, reference: &str) -> Result<(Bytes, String), String> {
        let url = self.url(&format!("manifests/{reference}"))?;
        let mut response = self.get(&url, Some(MANIFEST_TYPES), true).await?;
        if response.status() == StatusCode::UNAUTHORIZED {
            self.authorization = Some(self.authorize(&response).await?);
            response = self.get(&url, Some(MANIFEST_TYPES), true).await?;
        }
        let bytes = body(check_status(response).await?, MAX_MANIFEST_BYTES, "its manifest").await?;
        let digest = format!("sha256:{}", hex(&Sha256::digest(&bytes)));
        if reference.starts_with("sha256:") && reference != digest {
            return Err(format!(
                "the registry sent a manifest with the digest {digest}, not {reference}"
            ));
        }
        Ok((bytes, digest))
    }

    /// Fetches a blob of at most `max_bytes` and verifies its digest.
    pub async fn blob(&self, digest: &str, max_bytes: usize) -> Result<Bytes, String> {
        let mut url = self.url(&format!("blobs/{digest}"))?;
        let mut response = self.get(&url, None, true).await?;
        for _ in 0..MAX_REDIRECTS {
            if !response.status().is_redirection() {
                break;
            }
            let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            let next = location
                .and_then(|location| url.join(location).ok())
                .ok_or("the registry redirects to an invalid URL")?;
            if next.scheme() != "https" && url.scheme() == "https" {
                return Err("the registry redirects from https to plain HTTP".into());
            }
            if is_private_address(&next) && !is_private_address(&self.base) {
                return Err("the registry redirects to a private address".into());
            }
            url = next;
            // A redirect gets no credentials, even if it leads back to the registry.
            response = self.get(&url, None, false).await?;
        }
        let bytes = body(check_status(response).await?, max_bytes, "its component").await?;
        let found = format!("sha256:{}", hex(&Sha256::digest(&bytes)));
        if found == digest {
            Ok(bytes)
        } else {
            Err(format!("the registry sent a blob with the digest {found}, not {digest}"))
        }
    }

    /// Returns the URL of a path below the repository.
    fn url(&self, path: &str) -> Result<Url, String> {
        self.base.join(path).map_err(|error| format!("`{path}` is not a valid URL path: {error}"))
    }

    /// Sends a GET request, with the credentials of the registry if `with_credentials` is set.
    async fn get(
        &self,
        url: &Url,
        accept: Option<&str>,
        with_credentials: bool,
    ) -> Result<Response<Incoming>, String> {
        let authorization = self.authorization.as_deref().filter(|_| with_credentials);
        self.send(url, accept, authorization).await
    }

    /// Sends a GET request with these headers and waits for the head of the response.
    async fn send(
        &self,
        url: &Url,
        accept: Option<&str>,
        authorization: Option<&str>,
    ) -> Result<Response<Incoming>, String> {
        let agent = concat!("batchwright/", env!("CARGO_PKG_VERSION"));
        let mut request = Request::get(url.as_str()).header(USER_AGENT, agent);
        for (name, value) in [(ACCEPT, accept), (AUTHORIZATION, authorization)] {
            if let Some(value) = value {
                request = request.header(name, value);
            }
        }
        let request = request
            .body(Empty::new())
            .map_err(|error| format!("failed to build the request: {error}"))?;
        let host = url.host_str().unwrap_or_default();
        match tokio::time::timeout(READ_TIMEOUT, self.http.request(request)).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(format!("{host} cannot be reached: {}", root_cause(&error))),
            Err(_) => Err(format!("{host} did not respond within {READ_TIMEOUT:?}")),
        }
    }

    /// Returns the `Authorization` header for the challenge in a 401 response.
    async fn authorize(&self, response: &Response<Incoming>) -> Result<String, String> {
        let basic = self.login.as_ref().map(|login| {
            format!("Basic {}", STANDARD.encode(format!("{}:{}", login.username, login.password)))
        });
        let challenge = response.headers().get_all(WWW_AUTHENTICATE).iter();
        let challenge = challenge.filter_map(|value| parse_challenge(value.to_str().ok()?)).next();
        match challenge {
            Some(Challenge::Basic) => basic.ok_or_else(|| {
                "the registry requires authentication; use --username and --password".into()
            }),
            Some(Challenge::Bearer { mut realm, service }) => {
                let registry = self.base.host_str().unwrap_or_default();
                if basic.is_some() && !may_receive_password(&realm, &self.base, &self.realms) {
                    let host = realm.host_str().unwrap_or_default();
                    return Err(format!(
                        "the registry {registry} asks for the password to be sent to {host}; \
                         if {host} is its token service, allow it with --auth-host {host}"
                    ));
                }
                if is_private_address(&realm) && !is_private_address(&self.base) {
                    return Err(format!(
                        "the registry {registry} names a token service with a private address"
                    ));
                }
                let mut query = realm.query_pairs_mut();
                if let Some(service) = &service {
                    query.append_pair("service", service);
                }
                query.append_pair("scope", &format!("repository:{}:pull", self.repository));
                drop(query);
                let response =
                    check_status(self.send(&realm, None, basic.as_deref()).await?).await?;
                let bytes = body(response, MAX_TOKEN_BYTES, "the token").await?;
                let token: Token = serde_json::from_slice(&bytes)
                    .map_err(|error| format!("the token response is not valid: {error}"))?;
                let token = token
                    .token
                    .or(token.access_token)
                    .ok_or("the response of the token service has no token")?;
                Ok(format!("Bearer {token}"))
            }
            None => {
                Err("the registry requires an authentication scheme that is not supported".into())
            }
        }
    }
}

/// Returns true if the password for a registry may be sent to a token service.
fn may_receive_password(realm: &Url, registry: &Url, allowed: &[String]) -> bool {
    let (Some(to), Some(from)) = (realm.host_str(), registry.host_str()) else { return false };
    if !realm.username().is_empty() || realm.password().is_some() {
        return false;
    }
    if to == from && realm.port_or_known_default() == registry.port_or_known_default() {
        return realm.scheme() == registry.scheme() || realm.scheme() == "https";
    }
    let is_named = allowed.iter().any(|host| host == to);
    (realm.scheme() == "https" || is_named && registry.scheme() == "http")
        && (is_named || KNOWN_REALMS.contains(&(from, to)))
}

/// Returns true if the host is loopback, or an IP address that is private or link-local.
fn is_private_address(url: &Url) -> bool {
    is_loopback(url)
        || match url.host() {
            Some(Host::Ipv4(address)) => address.is_private() || address.is_link_local(),
            Some(Host::Ipv6(address)) => {
                address.is_unique_local() || address.is_unicast_link_local()
            }
            _ => false,
        }
}

/// Parses `Basic …` or `Bearer realm="…",service="…"` (RFC 9110, section 11.6.1).
fn parse_challenge(text: &str) -> Option<Challenge> {
    let (scheme, parameters) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
    if scheme.eq_ignore_ascii_case("basic") {
        return Some(Challenge::Basic);
    }
    if !scheme.eq_ignore_ascii_case("bearer") {
        return None;
    }
    let parameter = |wanted: &str| {
        parameters.split(',').find_map(|pair| {
            let (name, value) = pair.trim().split_once('=')?;
            name.eq_ignore_ascii_case(wanted).then(|| value.trim_matches('"').to_owned())
        })
    };
    let realm = Url::parse(&parameter("realm")?).ok()?;
    matches!(realm.scheme(), "http" | "https")
        .then(|| Challenge::Bearer { realm, service: parameter("service") })
}

/// Returns the response if its status is a success, otherwise an error message.
async fn check_status(response: Response<Incoming>) -> Result<Response<Incoming>, String> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let message = body(response, MAX_ERROR_BYTES, "its error").await.unwrap_or_default();
    let message = serde_json::from_slice::<serde_json::Value>(&message).unwrap_or_default();
    let message = message
        .pointer("/errors/0/message")
        .and_then(serde_json::Value::as_str)
        .unwrap_or_default();
    let message: String =
        message.chars().filter(|character| !character.is_control()).take(200).collect();
    Err(match status {
        StatusCode::NOT_FOUND => {
            "the registry has no such repository, tag or digest; check the reference".into()
        }
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            format!(
                "the registry denied access ({status} {message}); use --username and --password"
            )
        }
        status => format!("the registry returned {status} {message}").trim_end().to_owned(),
    })
}

/// Reads a body of at most `max_bytes`; `what` names the body in errors.
async fn body(response: Response<Incoming>, max_bytes: usize, what: &str) -> Result<Bytes, String> {
    let mut body = response.into_body();
    let mut bytes = Vec::new();
    loop {
        let frame = tokio::time::timeout(READ_TIMEOUT, body.frame()).await;
        let frame =
            frame.map_err(|_| format!("{what} was not received within {READ_TIMEOUT:?}"))?;
        let Some(frame) = frame else { return Ok(bytes.into()) };
        let frame = frame.map_err(|error| format!("{what} was interrupted: {error}"))?;
        let data = frame.into_data().unwrap_or_default();
        if bytes.len().saturating_add(data.len()) > max_bytes {
            return Err(format!("{what} is larger than {max_bytes} bytes"));
        }
        bytes.extend_from_slice(&data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn password_is_sent_to_the_registry_and_known_or_named_hosts_only() {
        for (realm, registry, allowed, expected) in [
            ("https://ghcr.io/token", "https://ghcr.io/v2/", "", true),
            ("https://ghcr.io:8443/token", "https://ghcr.io/v2/", "", false),
            ("http://ghcr.io:443/token", "https://ghcr.io/v2/", "", false),
            ("https://auth.docker.io/token", "https://index.docker.io/v2/", "", true),
            ("https://auth.docker.io/token", "https://ghcr.io/v2/", "", false),
            ("https://gitlab.com/jwt/auth", "https://registry.gitlab.com/v2/", "", true),
            ("https://evil.example/token", "https://ghcr.io/v2/", "", false),
            ("https://auth.example/token", "https://r.example/v2/", "auth.example", true),
            ("http://auth.example/token", "https://r.example/v2/", "auth.example", false),
            ("http://127.0.0.1:5000/token", "http://127.0.0.1:5000/v2/", "", true),
            ("http://127.0.0.1:6000/token", "http://127.0.0.1:5000/v2/", "", false),
            ("https://user:x@ghcr.io/token", "https://ghcr.io/v2/", "", false),
        ] {
            let (realm_url, registry_url) =
                (Url::parse(realm).unwrap(), Url::parse(registry).unwrap());
            let allowed: Vec<String> =
                Some(allowed.to_owned()).filter(|host| !host.is_empty()).into_iter().collect();
            assert_eq!(
                may_receive_password(&realm_url, &registry_url, &allowed),
                expected,
                "{realm} for {registry}"
            );
        }
    }

    #[test]
    fn challenge_parser_accepts_basic_and_bearer() {
        let bearer = r#"Bearer realm="https://a.example/token",service="r.example",scope="x""#;
        let Some(Challenge::Bearer { realm, service }) = parse_challenge(bearer) else {
            unreachable!()
        };
        assert_eq!(
            (realm.as_str(), service.as_deref()),
            ("https://a.example/token", Some("r.example"))
        );
        assert!(matches!(parse_challenge("basic realm=\"x\""), Some(Challenge::Basic)));
        for odd in ["", "Bearer", "Bearer realm=\"file:///etc/passwd\"", "Negotiate"] {
            assert!(parse_challenge(odd).is_none(), "{odd}");
        }
    }
}
