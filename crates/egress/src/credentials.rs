//! Secrets: added to requests, redacted in responses and errors, never shown.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use aho_corasick::{AhoCorasick, MatchKind};
use async_trait::async_trait;
use base64::Engine;
use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use batchwright_domain::ids::TenantId;
use http::{HeaderMap, HeaderName, HeaderValue};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};
use url::Url;

use super::allow::is_loopback;
use super::{AllowList, TransportError, TransportErrorKind};

/// Replacement for a redacted secret.
const REDACTED: &str = "[redacted]";

/// Minimum length of a secret that is redacted. Local model servers take `none` and `EMPTY` as
/// keys, and such a word may occur in any response.
const MIN_SECRET_BYTES: usize = 8;

/// Minimum length of a distinct secret. A shorter secret, or one without a digit or a letter, may
/// occur in a response by chance (`lm-studio`, `12345678`).
const MIN_DISTINCT_BYTES: usize = 16;

/// Percent-encode sets that servers use: all but letters and digits, all but the unreserved
/// characters of RFC 3986, the same with `/` kept, `encodeURIComponent` and `encodeURI`.
const URL_ENCODE_SETS: [&AsciiSet; 5] =
    [NON_ALPHANUMERIC, RFC_3986_SET, PATH_SET, URI_COMPONENT_SET, URI_SET];
const RFC_3986_SET: &AsciiSet =
    &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');
const PATH_SET: &AsciiSet = &RFC_3986_SET.remove(b'/');
const URI_COMPONENT_SET: &AsciiSet =
    &RFC_3986_SET.remove(b'!').remove(b'*').remove(b'\'').remove(b'(').remove(b')');
const URI_SET: &AsciiSet = &URI_COMPONENT_SET
    .remove(b';')
    .remove(b',')
    .remove(b'/')
    .remove(b'?')
    .remove(b':')
    .remove(b'@')
    .remove(b'&')
    .remove(b'=')
    .remove(b'+')
    .remove(b'$')
    .remove(b'#');

/// Header that carries a secret.
pub struct Credential {
    /// Name of the credential in the plugin's manifest.
    pub name: String,
    /// Header that carries the secret.
    pub header: HeaderName,
    /// Text before the secret in the header value, such as `Bearer `.
    pub prefix: String,
    /// Secret itself.
    pub secret: String,
    /// Hosts that get this credential; no other host gets it, even if the plugin may reach that
    /// host.
    pub hosts: Arc<AllowList>,
}

/// Secrets of one plugin, by tenant.
///
/// **Threat.** A tenant's request goes out with the credential of another, or an answer shows it.
/// Each exchange therefore takes the secrets of its tenant once, and uses them for the headers and
/// for the redaction.
pub struct CredentialStore {
    /// Secrets of tenants without their own; none if such tenants may not use the plugin.
    pub default: Option<Arc<Secrets>>,
    /// Own secrets of tenants.
    pub tenants: HashMap<TenantId, Arc<Secrets>>,
    /// Other sources of secrets of tenants, which come first, in their order.
    pub sources: Vec<Arc<dyn SecretsSource>>,
}

/// Maximum time to read secrets from a source, which may be on another machine.
const SOURCE_TIMEOUT: Duration = Duration::from_secs(10);

/// Source of secrets of tenants that change while the plugin is loaded.
#[async_trait]
pub trait SecretsSource: Send + Sync {
    /// Returns the secrets of a tenant; none if the source has none for it. The error is for the
    /// operator.
    async fn of(&self, tenant: &TenantId) -> Result<Option<Arc<Secrets>>, String>;
}

/// Tenant without a credential, with the text for the operator.
#[derive(Debug)]
pub struct NoCredential(pub String);

impl CredentialStore {
    /// Returns the secrets of any tenant, or none.
    pub(crate) fn any(&self) -> Arc<Secrets> {
        let found = self.default.as_ref().or_else(|| self.tenants.values().next());
        found.cloned().unwrap_or_default()
    }

    /// Returns the secrets of a tenant.
    pub async fn of(&self, tenant: &TenantId) -> Result<Arc<Secrets>, NoCredential> {
        for source in &self.sources {
            let found = tokio::time::timeout(SOURCE_TIMEOUT, source.of(tenant)).await;
            // A credential that cannot be read is not replaced by another one.
            let found = found
                .map_err(|_| NoCredential("the source of secrets does not answer".to_owned()))?;
            if let Some(secrets) = found.map_err(NoCredential)? {
                return Ok(secrets);
            }
        }
        let found = self.tenants.get(tenant).or(self.default.as_ref());
        found.cloned().ok_or_else(|| {
            NoCredential("the project has no credential, and there is no default".to_owned())
        })
    }
}

/// Error of credentials that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SecretsError {
    /// A secret contains characters that are not allowed in an HTTP header.
    #[error(
        "the secret for the header `{0}` contains characters that are not allowed in an HTTP \
         header, such as a line break"
    )]
    Header(HeaderName),
}

/// Credential header as it is sent, and the hosts that get the header.
struct CredentialHeader {
    name: String,
    header: HeaderName,
    value: HeaderValue,
    hosts: Arc<AllowList>,
}

/// Secrets of one plugin.
#[derive(Default)]
pub struct Secrets {
    /// Headers that only credentials may set, even if the credential is not configured.
    reserved: Vec<HeaderName>,
    headers: Vec<CredentialHeader>,
    /// True if plain HTTP may carry a secret to another machine.
    plain_http: bool,
    /// True if a secret belongs to one tenant alone.
    is_own: bool,
    /// Matcher for all encodings of the distinct secrets; absent if there are none.
    distinct: Option<AhoCorasick>,
    /// Distinct secrets themselves, for text that arrives in pieces.
    texts: Arc<SecretTexts>,
    /// Matcher for all encodings of all secrets, for headers and error bodies, where a server may
    /// echo the request.
    all: Option<AhoCorasick>,
}

impl std::fmt::Debug for Secrets {
    fn fmt(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(formatter, "{} secrets", self.headers.len())
    }
}

impl Secrets {
    /// Returns the secrets of a plugin; fails on a secret that is not a valid header value. A value
    /// that the plugin writes into a `reserved` header, or into a credential's header, is dropped.
    pub fn new(
        credentials: Vec<Credential>,
        reserved: Vec<HeaderName>,
        plain_http: bool,
    ) -> Result<Self, SecretsError> {
        let mut secrets = Self { reserved, plain_http, ..Self::default() };
        let (mut distinct, mut all, mut texts) = (Vec::new(), Vec::new(), Vec::new());
        for Credential { name, header, prefix, secret, hosts } in credentials {
            let Ok(mut value) = HeaderValue::try_from(format!("{prefix}{secret}")) else {
                return Err(SecretsError::Header(header));
            };
            value.set_sensitive(true);
            secrets.headers.push(CredentialHeader { name, header, value, hosts });
            if secret.len() >= MIN_SECRET_BYTES {
                let forms = forms_of(&secret);
                if is_distinct(&secret) {
                    distinct.extend(forms.iter().cloned());
                    texts.push(secret);
                }
                all.extend(forms);
            }
        }
        (secrets.distinct, secrets.all) = (matcher(distinct), matcher(all));
        secrets.texts = Arc::new(SecretTexts::new(texts));
        Ok(secrets)
    }

    /// Returns the credential headers for the host of a URL; fails if plain HTTP may not carry the
    /// credential.
    pub fn for_url(&self, url: &Url) -> Result<Vec<(HeaderName, HeaderValue)>, TransportError> {
        let matching: Vec<_> =
            self.headers.iter().filter(|credential| credential.hosts.covers(url)).collect();
        if let Some(credential) = matching.first()
            && url.scheme() == "http"
            && !self.plain_http
            && !is_loopback(url)
        {
            let (name, host) = (&credential.name, url.host_str().unwrap_or_default());
            let message = "The plugin's credential may not be sent over plain HTTP.";
            let hint = "use https, or set `allow_plain_http = true` in the plugin's file if its \
                        network is trusted";
            return Err(TransportError::new(TransportErrorKind::NotAllowed, message).with_detail(
                format!("The credential `{name}` is not sent to {host} over plain HTTP; {hint}."),
            ));
        }
        Ok(matching
            .into_iter()
            .map(|credential| (credential.header.clone(), credential.value.clone()))
            .collect())
    }

    /// Replaces credential headers by `own`, the headers of [`Self::for_url`]. A credential header
    /// is never sent with a value of the plugin.
    pub fn add_to(&self, headers: &mut HeaderMap, own: &[(HeaderName, HeaderValue)]) {
        for name in
            self.reserved.iter().chain(self.headers.iter().map(|credential| &credential.header))
        {
            headers.remove(name);
        }
        for (name, value) in own {
            headers.insert(name.clone(), value.clone());
        }
    }

    /// Returns the secrets as those of one tenant alone.
    #[must_use]
    pub fn own(self) -> Self {
        Self { is_own: true, ..self }
    }

    /// Returns true if a secret belongs to one tenant alone.
    pub(crate) fn is_own(&self) -> bool {
        self.is_own
    }

    /// Returns the distinct secrets, for text that arrives in pieces.
    pub(crate) fn texts(&self) -> &Arc<SecretTexts> {
        &self.texts
    }

    /// Redacts every secret in a header or in an error text.
    pub fn redact(&self, text: &mut String) {
        if let Some(search) = self.all.as_ref().filter(|search| search.is_match(text.as_str())) {
            *text = search.replace_all(text, &vec![REDACTED; search.patterns_len()]);
        }
    }

    /// Redacts secrets in a body: all secrets if `is_error`, otherwise only the distinct secrets.
    pub fn redact_body(&self, body: &mut Vec<u8>, is_error: bool) {
        let search = if is_error { &self.all } else { &self.distinct };
        if let Some(search) = search.as_ref().filter(|search| search.is_match(body.as_slice())) {
            *body = search.replace_all_bytes(body, &vec![REDACTED; search.patterns_len()]);
        }
    }
}

/// Secrets to find in text that arrives in pieces.
#[derive(Default)]
pub struct SecretTexts(Vec<String>);

impl SecretTexts {
    /// Returns the secrets to find.
    pub fn new(secrets: Vec<String>) -> Self {
        Self(secrets)
    }

    /// Returns true if there is nothing to find.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the length of the longest secret, in bytes.
    pub fn max_bytes(&self) -> usize {
        self.0.iter().map(String::len).max().unwrap_or(0)
    }

    /// Returns the range of the first secret in a text that ends after `from`.
    pub fn find(&self, text: &str, from: usize) -> Option<Range<usize>> {
        let ranges = self.0.iter().filter_map(|secret| {
            let mut found = memchr::memmem::find_iter(text.as_bytes(), secret.as_bytes());
            let ends_after = |at: &usize| at.saturating_add(secret.len()) > from;
            let at = found.find(ends_after)?;
            Some(at..at.saturating_add(secret.len()))
        });
        ranges.min_by_key(|range| range.start)
    }

    /// Returns the length of the longest end of a text that is the beginning of a secret, in bytes.
    pub fn beginning_at_end(&self, text: &str) -> usize {
        let of_secret = |secret: &String| {
            let longest = secret.len().saturating_sub(1).min(text.len());
            let is_end = |length: &usize| {
                secret.get(..*length).is_some_and(|beginning| text.ends_with(beginning))
            };
            (1..=longest).rev().find(is_end).unwrap_or(0)
        };
        self.0.iter().map(of_secret).max().unwrap_or(0)
    }
}

/// Returns true if a secret is too long and varied to occur in a response by chance.
pub fn is_distinct(secret: &str) -> bool {
    secret.len() >= MIN_DISTINCT_BYTES
        && secret.contains(|letter: char| letter.is_ascii_digit())
        && secret.contains(char::is_alphabetic)
}

fn matcher(forms: Vec<String>) -> Option<AhoCorasick> {
    let mut builder = AhoCorasick::builder();
    // Header names arrive in lower case, and hexadecimal digits may do so.
    builder.match_kind(MatchKind::LeftmostLongest).ascii_case_insensitive(true);
    (!forms.is_empty()).then(|| builder.build(forms).ok()).flatten()
}

/// Returns the secret, and its encodings in JSON, URLs and base64, which an echoing server may
/// write.
fn forms_of(secret: &str) -> Vec<String> {
    let json = serde_json::Value::from(secret).to_string();
    let mut forms = vec![
        secret.to_owned(),
        json.trim_matches('"').to_owned(),
        json.trim_matches('"').replace('/', "\\/"),
        url::form_urlencoded::byte_serialize(secret.as_bytes()).collect(),
    ];
    forms.extend(
        URL_ENCODE_SETS.iter().map(|set| percent_encode(secret.as_bytes(), set).to_string()),
    );
    // In base64 the secret may be part of a longer text: digits that depend on its neighbors are
    // left out.
    for (before, skipped) in [(0, 0), (1, 2), (2, 3)] {
        let bytes = [vec![0; before].as_slice(), secret.as_bytes()].concat();
        for encoding in [STANDARD_NO_PAD, URL_SAFE_NO_PAD] {
            let digits = encoding.encode(&bytes);
            forms.extend(digits.get(skipped..bytes.len().saturating_mul(8) / 6).map(str::to_owned));
        }
    }
    forms.sort();
    forms.dedup();
    forms
}

#[cfg(test)]
mod tests {
    use super::*;

    fn credential(header: &str, prefix: &str, secret: &str, hosts: &[&str]) -> Credential {
        let urls: Vec<Url> = hosts.iter().map(|url| Url::parse(url).unwrap()).collect();
        Credential {
            name: "api_key".into(),
            header: header.parse().unwrap(),
            prefix: prefix.into(),
            secret: secret.into(),
            hosts: Arc::new(AllowList::new(String::new(), &urls, &[]).unwrap()),
        }
    }

    fn secrets() -> Secrets {
        let hosts = ["https://api.example.com", "http://models.internal", "http://127.0.0.1:8000"];
        let credentials = vec![
            credential("authorization", "Bearer ", "sk-verysecret", &hosts),
            credential("x-key", "Bearer ", "none", &["https://other.example.com"]),
        ];
        Secrets::new(credentials, vec!["x-other-key".parse().unwrap()], false).unwrap()
    }

    #[test]
    fn credentials_are_sent_only_to_their_hosts_and_not_over_plain_http() {
        let secrets = secrets();
        let names = |url: &str| {
            let headers = secrets.for_url(&Url::parse(url).unwrap())?;
            Ok::<_, TransportError>(
                headers.into_iter().map(|(name, _)| name.to_string()).collect::<Vec<_>>(),
            )
        };
        assert_eq!(names("https://api.example.com/v1").unwrap(), ["authorization"]);
        assert_eq!(names("https://other.example.com/v1").unwrap(), ["x-key"]);
        assert_eq!(names("https://evil.example.com/v1").unwrap(), [""; 0]);
        assert_eq!(names("http://api.example.com:443/").unwrap(), [""; 0]);
        assert_eq!(names("http://127.0.0.1:8000/v1").unwrap(), ["authorization"]);
        let refused = names("http://models.internal/v1").unwrap_err();
        assert!(
            !refused.message.contains("models.internal")
                && refused.detail().contains("models.internal")
        );
        assert!(refused.detail().contains("allow_plain_http = true"), "{}", refused.detail());
    }

    #[test]
    fn credential_headers_replace_plugin_headers_and_secrets_are_redacted() {
        let mut headers = HeaderMap::new();
        headers.append("authorization", HeaderValue::from_static("Bearer forged"));
        headers.append("x-other-key", HeaderValue::from_static("forged"));
        headers.append("x-key", HeaderValue::from_static("forged"));
        let own = secrets().for_url(&Url::parse("https://api.example.com/v1").unwrap()).unwrap();
        secrets().add_to(&mut headers, &own);
        assert!(!headers.contains_key("x-key"));
        assert!(!headers.contains_key("x-other-key"));
        assert_eq!(
            headers.get_all("authorization").iter().collect::<Vec<_>>(),
            ["Bearer sk-verysecret"]
        );
        let mut body = b"none: sk-verysecret, sk-verysecret".to_vec();
        secrets().redact_body(&mut body, true);
        assert_eq!(body, b"none: [redacted], [redacted]");
        let mut text = String::from("Bearer sk-verysecret");
        secrets().redact(&mut text);
        assert_eq!(text, "Bearer [redacted]");
        assert_eq!(format!("{:?}", secrets()), "2 secrets");
    }

    #[test]
    fn secrets_are_redacted_in_every_encoding() {
        let secret = "s/k+very=\"secret\"~0";
        let secrets =
            Secrets::new(vec![credential("x-key", "", secret, &[])], Vec::new(), false).unwrap();
        let json = serde_json::to_string(secret).unwrap();
        for shown in [
            secret.to_owned(),
            secret.to_uppercase(),
            json.clone(),
            json.replace('/', "\\/"),
            url::form_urlencoded::Serializer::new(String::new())
                .append_pair("key", secret)
                .finish(),
            percent_encode(secret.as_bytes(), NON_ALPHANUMERIC).to_string().to_lowercase(),
            "s/k%2Bvery%3D%22secret%22~0".into(),
            "s%2Fk%2Bvery%3D%22secret%22~0".into(),
            "s/k+very=%22secret%22~0".into(),
        ] {
            let mut text = shown.clone();
            secrets.redact(&mut text);
            assert!(
                text.contains(REDACTED) && !text.contains("very") && !text.contains("VERY"),
                "{shown}: {text}"
            );
        }
        for before in ["", "a", "ab", "user:"] {
            for after in ["", "b", "bc"] {
                for encoding in [STANDARD_NO_PAD, URL_SAFE_NO_PAD] {
                    let mut body = encoding.encode(format!("{before}{secret}{after}")).into_bytes();
                    secrets.redact_body(&mut body, false);
                    let text = String::from_utf8(body).unwrap();
                    // Only digits that the secret shares with its neighbors remain.
                    assert!(
                        text.contains(REDACTED) && text.len() < REDACTED.len() + 18,
                        "{before} {after}: {text}"
                    );
                }
            }
        }
    }

    #[test]
    fn indistinct_secrets_are_redacted_only_in_errors_and_headers() {
        let is_redacted = |secret: &str, is_error: bool| {
            let secrets =
                Secrets::new(vec![credential("x-key", "", secret, &[])], Vec::new(), false)
                    .unwrap();
            let mut body = format!("I know {}.", secret.to_uppercase()).into_bytes();
            secrets.redact_body(&mut body, is_error);
            body.ends_with(b"[redacted].")
        };
        for (secret, in_answers, in_errors) in [
            ("EMPTY", false, false),
            ("lm-studio", false, true),
            ("correct-horse-battery-staple", false, true),
            ("1234567890123456", false, true),
            ("sk-0123456789abcdef", true, true),
        ] {
            assert_eq!(
                (is_redacted(secret, false), is_redacted(secret, true)),
                (in_answers, in_errors),
                "{secret}"
            );
        }
    }

    #[test]
    fn secrets_reject_invalid_header_values() {
        let credential = credential("authorization", "", "a\nb", &[]);
        let refused = Secrets::new(vec![credential], Vec::new(), false).unwrap_err();
        assert!(refused.to_string().contains("`authorization`"), "{refused}");
    }
}
