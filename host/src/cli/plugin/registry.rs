//! What is asked of an OCI registry: a token, a manifest, a blob. Each answer is bounded in size and time.
//!
//! **Threat.** A registry, or whoever answers for it, names another host as the place to ask for a token (`realm`), and would be sent the
//! user's password; or it answers without an end. So a password goes to the registry's own host, to the token services of the two public
//! registries that are known to have one elsewhere, and to hosts that the user names. Redirects are followed for blobs alone, without
//! credentials.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
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

use crate::cli::client::innermost;
use crate::egress::{https, is_loopback};
use crate::plugin::hex;

/// How long a registry may keep silent.
const SILENCE: Duration = Duration::from_secs(30);

/// Largest answers of each kind, in bytes.
const MAX_TOKEN_BYTES: usize = 128 << 10;
const MAX_MANIFEST_BYTES: usize = 4 << 20;
const MAX_ERROR_BYTES: usize = 64 << 10;

/// Redirects of a blob that are followed.
const MAX_REDIRECTS: usize = 5;

/// Public registries whose token service has another host than they have.
const KNOWN_REALMS: [(&str, &str); 3] = [
    ("index.docker.io", "auth.docker.io"),
    ("registry-1.docker.io", "auth.docker.io"),
    ("registry.gitlab.com", "gitlab.com"),
];

const MANIFEST_TYPES: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
     application/vnd.docker.distribution.manifest.v2+json";

/// Who asks.
pub struct Login {
    pub username: String,
    pub password: String,
}

pub struct Registry {
    /// Such as `https://ghcr.io/v2/owner/name/`.
    base: Url,
    repository: String,
    http: Client<HttpsConnector<HttpConnector>, Empty<Bytes>>,
    login: Option<Login>,
    /// Hosts besides the registry's own that a password may be sent to.
    realms: Vec<String>,
    authorization: Option<String>,
}

/// What `WWW-Authenticate` asks for.
enum Challenge {
    Basic,
    Bearer { realm: Url, service: Option<String> },
}

#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    /// The same under OAuth's name; some services give both.
    access_token: Option<String>,
}

impl Registry {
    pub fn new(
        host: &str,
        repository: &str,
        plain_http: bool,
        login: Option<Login>,
        realms: Vec<String>,
    ) -> Result<Self, String> {
        let scheme = if plain_http { "http" } else { "https" };
        let base = Url::parse(&format!("{scheme}://{host}/v2/{repository}/"))
            .map_err(|error| format!("`{host}` is no host of a registry: {error}"))?;
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

    /// The manifest of a tag or digest, and its digest.
    pub async fn manifest(&mut self, reference: &str) -> Result<(Bytes, String), String> {
        let url = self.url(&format!("manifests/{reference}"))?;
        let mut response = self.get(&url, Some(MANIFEST_TYPES), true).await?;
        if response.status() == StatusCode::UNAUTHORIZED {
            self.authorization = Some(self.authorize(&response).await?);
            response = self.get(&url, Some(MANIFEST_TYPES), true).await?;
        }
        let bytes = body(accepted(response).await?, MAX_MANIFEST_BYTES, "its manifest").await?;
        let digest = format!("sha256:{}", hex(&Sha256::digest(&bytes)));
        if reference.starts_with("sha256:") && reference != digest {
            return Err(format!(
                "the registry sent a manifest with the digest {digest}, not {reference}"
            ));
        }
        Ok((bytes, digest))
    }

    /// A blob of at most so many bytes, checked against its digest.
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
                .ok_or("the registry redirects nowhere")?;
            if next.scheme() != "https" && url.scheme() == "https" {
                return Err("the registry redirects from https to plain HTTP".into());
            }
            if is_near(&next) && !is_near(&self.base) {
                return Err("the registry redirects to an address of your own network".into());
            }
            url = next;
            // Wherever it leads, also back: no credentials.
            response = self.get(&url, None, false).await?;
        }
        let bytes = body(accepted(response).await?, max_bytes, "its component").await?;
        let found = format!("sha256:{}", hex(&Sha256::digest(&bytes)));
        if found == digest {
            Ok(bytes)
        } else {
            Err(format!("the registry sent a blob with the digest {found}, not {digest}"))
        }
    }

    fn url(&self, path: &str) -> Result<Url, String> {
        self.base.join(path).map_err(|error| format!("`{path}` is no part of a URL: {error}"))
    }

    async fn get(
        &self,
        url: &Url,
        accept: Option<&str>,
        authorized: bool,
    ) -> Result<Response<Incoming>, String> {
        let authorization = self.authorization.as_deref().filter(|_| authorized);
        self.send(url, accept, authorization).await
    }

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
            .map_err(|error| format!("the request cannot be made: {error}"))?;
        let host = url.host_str().unwrap_or_default();
        match tokio::time::timeout(SILENCE, self.http.request(request)).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(format!("{host} cannot be reached: {}", innermost(&error))),
            Err(_) => Err(format!("{host} does not answer within {SILENCE:?}")),
        }
    }

    /// The header that the registry asks for.
    async fn authorize(&self, refused: &Response<Incoming>) -> Result<String, String> {
        let basic = self.login.as_ref().map(|login| {
            format!("Basic {}", STANDARD.encode(format!("{}:{}", login.username, login.password)))
        });
        let challenge = refused.headers().get_all(WWW_AUTHENTICATE).iter();
        let challenge = challenge.filter_map(|value| parse_challenge(value.to_str().ok()?)).next();
        match challenge {
            Some(Challenge::Basic) => basic.ok_or_else(|| {
                "the registry wants to know who asks; use --username and --password".into()
            }),
            Some(Challenge::Bearer { mut realm, service }) => {
                let registry = self.base.host_str().unwrap_or_default();
                if basic.is_some() && !may_have_password(&realm, &self.base, &self.realms) {
                    let host = realm.host_str().unwrap_or_default();
                    return Err(format!(
                        "the registry {registry} wants the password to be sent to {host}; if that is right, allow it with --auth-host {host}"
                    ));
                }
                if is_near(&realm) && !is_near(&self.base) {
                    return Err(format!(
                        "the registry {registry} wants a token from an address of your own network"
                    ));
                }
                let mut query = realm.query_pairs_mut();
                if let Some(service) = &service {
                    query.append_pair("service", service);
                }
                query.append_pair("scope", &format!("repository:{}:pull", self.repository));
                drop(query);
                let response = accepted(self.send(&realm, None, basic.as_deref()).await?).await?;
                let bytes = body(response, MAX_TOKEN_BYTES, "the token").await?;
                let token: Token = serde_json::from_slice(&bytes)
                    .map_err(|error| format!("the token is not readable: {error}"))?;
                let token = token
                    .token
                    .or(token.access_token)
                    .ok_or("the answer of the token service holds no token")?;
                Ok(format!("Bearer {token}"))
            }
            None => {
                Err("the registry wants to know who asks, in a way that is not supported".into())
            }
        }
    }
}

/// Whether a password for a registry may be sent to a token service.
fn may_have_password(realm: &Url, registry: &Url, allowed: &[String]) -> bool {
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

/// An address that is not on the internet.
fn is_near(url: &Url) -> bool {
    is_loopback(url)
        || match url.host() {
            Some(Host::Ipv4(address)) => address.is_private() || address.is_link_local(),
            Some(Host::Ipv6(address)) => {
                address.is_unique_local() || address.is_unicast_link_local()
            }
            _ => false,
        }
}

/// `Basic …`, or `Bearer realm="…",service="…"` (RFC 9110, 11.6.1).
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

/// A response that is what was asked for; or why it is not.
async fn accepted(response: Response<Incoming>) -> Result<Response<Incoming>, String> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let said = body(response, MAX_ERROR_BYTES, "its error").await.unwrap_or_default();
    let said = serde_json::from_slice::<serde_json::Value>(&said).unwrap_or_default();
    let said =
        said.pointer("/errors/0/message").and_then(serde_json::Value::as_str).unwrap_or_default();
    let said: String = said.chars().filter(|letter| !letter.is_control()).take(200).collect();
    Err(match status {
        StatusCode::NOT_FOUND => {
            "the registry knows no such thing; check the repository, and the tag or digest".into()
        }
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            format!(
                "the registry does not let this user have it ({status} {said}); use --username and --password"
            )
        }
        status => format!("the registry answered {status} {said}").trim_end().to_owned(),
    })
}

async fn body(response: Response<Incoming>, max_bytes: usize, what: &str) -> Result<Bytes, String> {
    let mut body = response.into_body();
    let mut bytes = Vec::new();
    loop {
        let frame = tokio::time::timeout(SILENCE, body.frame()).await;
        let frame = frame.map_err(|_| format!("{what} does not come within {SILENCE:?}"))?;
        let Some(frame) = frame else { return Ok(bytes.into()) };
        let frame = frame.map_err(|error| format!("{what} broke off: {error}"))?;
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
    fn a_password_goes_to_the_registry_and_to_hosts_that_are_known_or_named() {
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
                may_have_password(&realm_url, &registry_url, &allowed),
                expected,
                "{realm} for {registry}"
            );
        }
    }

    #[test]
    fn challenges_are_read_as_registries_write_them() {
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
