//! Secrets: added to what goes out, blanked in what comes back, shown nowhere.

use aho_corasick::{AhoCorasick, MatchKind};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use http::{HeaderMap, HeaderName, HeaderValue};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};
use url::Url;

use super::allow::is_loopback;
use super::{AllowList, Fault, TransportError};

/// What stands where a secret stood.
const BLANK: &str = "[redacted]";

/// The shortest secret that is looked for in what comes back: `none` and `EMPTY`, which local model servers take, are words of any answer.
const SHORTEST: usize = 8;

/// A secret shorter than this, or without a digit or a letter, may be a word that answers have for other reasons (`lm-studio`, `12345678`).
const SHORTEST_DISTINCT: usize = 16;

/// What is written in hexadecimal in a URL: all but letters and digits, what RFC 3986 reserves, the same with paths as they are, and what
/// JavaScript's two functions do not keep.
const IN_URLS: [&AsciiSet; 5] = [NON_ALPHANUMERIC, RESERVED, IN_PATHS, IN_COMPONENTS, IN_URIS];
const RESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');
const IN_PATHS: &AsciiSet = &RESERVED.remove(b'/');
const IN_COMPONENTS: &AsciiSet =
    &RESERVED.remove(b'!').remove(b'*').remove(b'\'').remove(b'(').remove(b')');
const IN_URIS: &AsciiSet = &IN_COMPONENTS
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

/// One header with a secret in it.
pub struct Credential {
    /// As the plugin calls it.
    pub name: String,
    pub header: HeaderName,
    pub prefix: String,
    pub secret: String,
    /// The hosts it belongs to. No other host gets it, whatever the plugin's allow-list has.
    pub hosts: AllowList,
}

/// Why credentials cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SecretsError {
    #[error("the secret for the header `{0}` has characters no header can hold")]
    Header(HeaderName),
}

/// A header as it is sent, and the hosts that get it.
struct Sent {
    name: String,
    header: HeaderName,
    value: HeaderValue,
    hosts: AllowList,
}

/// The secrets of one plugin.
#[derive(Default)]
pub struct Secrets {
    /// Headers that are for secrets alone, whether there is one or not.
    reserved: Vec<HeaderName>,
    headers: Vec<Sent>,
    /// Whether a secret may go over plain HTTP to another machine.
    plain_http: bool,
    /// Every form a secret may come back in, of those that stand for nothing else; none if there is nothing to look for.
    distinct: Option<AhoCorasick>,
    /// The same of all secrets: for headers and errors, where a server may show what it was sent.
    all: Option<AhoCorasick>,
}

impl std::fmt::Debug for Secrets {
    fn fmt(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(formatter, "{} secrets", self.headers.len())
    }
}

impl Secrets {
    /// Fails for a secret that no header can hold. What a plugin writes into a header that is `reserved` never leaves, as little as what
    /// it writes where a secret goes.
    pub fn new(
        credentials: Vec<Credential>,
        reserved: Vec<HeaderName>,
        plain_http: bool,
    ) -> Result<Self, SecretsError> {
        let mut secrets = Self { reserved, plain_http, ..Self::default() };
        let (mut distinct, mut all) = (Vec::new(), Vec::new());
        for Credential { name, header, prefix, secret, hosts } in credentials {
            let Ok(mut value) = HeaderValue::try_from(format!("{prefix}{secret}")) else {
                return Err(SecretsError::Header(header));
            };
            value.set_sensitive(true);
            secrets.headers.push(Sent { name, header, value, hosts });
            if secret.len() >= SHORTEST {
                let forms = forms_of(&secret);
                if is_distinct(&secret) {
                    distinct.extend(forms.iter().cloned());
                }
                all.extend(forms);
            }
        }
        (secrets.distinct, secrets.all) = (search(distinct), search(all));
        Ok(secrets)
    }

    /// The headers for a URL: those of the credentials that belong to its host.
    pub fn for_url(&self, url: &Url) -> Result<Vec<(HeaderName, HeaderValue)>, TransportError> {
        let belonging: Vec<_> = self.headers.iter().filter(|sent| sent.hosts.covers(url)).collect();
        if let Some(sent) = belonging.first()
            && url.scheme() == "http"
            && !self.plain_http
            && !is_loopback(url)
        {
            let (name, host) = (&sent.name, url.host_str().unwrap_or_default());
            let message = "The plugin's credential may not be sent over plain HTTP.";
            let hint = "use https, or set `allow_plain_http = true` in the plugin's file if its network is trusted";
            return Err(TransportError::new(Fault::NotAllowed, message).with_detail(format!(
                "The credential `{name}` is not sent to {host} over plain HTTP; {hint}."
            )));
        }
        Ok(belonging.into_iter().map(|sent| (sent.header.clone(), sent.value.clone())).collect())
    }

    /// Sets the headers of [`Self::for_url`], in place of whatever stands there. No header that is for a secret leaves with another value.
    pub fn add_to(&self, headers: &mut HeaderMap, own: &[(HeaderName, HeaderValue)]) {
        for name in self.reserved.iter().chain(self.headers.iter().map(|sent| &sent.header)) {
            headers.remove(name);
        }
        for (name, value) in own {
            headers.insert(name.clone(), value.clone());
        }
    }

    /// Blanks every secret in a header, or in a text about an error.
    pub fn blank(&self, text: &mut String) {
        if let Some(search) = self.all.as_ref().filter(|search| search.is_match(text.as_str())) {
            *text = search.replace_all(text, &vec![BLANK; search.patterns_len()]);
        }
    }

    /// Blanks every secret in a body: in an answer those that could stand for nothing else, in an error all.
    pub fn blank_body(&self, body: &mut Vec<u8>, is_error: bool) {
        let search = if is_error { &self.all } else { &self.distinct };
        if let Some(search) = search.as_ref().filter(|search| search.is_match(body.as_slice())) {
            *body = search.replace_all_bytes(body, &vec![BLANK; search.patterns_len()]);
        }
    }
}

/// Whether a secret cannot be taken for a word or a number of an answer.
pub fn is_distinct(secret: &str) -> bool {
    secret.len() >= SHORTEST_DISTINCT
        && secret.contains(|letter: char| letter.is_ascii_digit())
        && secret.contains(char::is_alphabetic)
}

fn search(forms: Vec<String>) -> Option<AhoCorasick> {
    let mut search = AhoCorasick::builder();
    // The names of headers come in lower case, and so may hexadecimal digits.
    search.match_kind(MatchKind::LeftmostLongest).ascii_case_insensitive(true);
    (!forms.is_empty()).then(|| search.build(forms).ok()).flatten()
}

/// A secret as it is, and as a server that shows what it was sent may write it: in JSON, in a URL, in base64.
fn forms_of(secret: &str) -> Vec<String> {
    let json = serde_json::Value::from(secret).to_string();
    let mut forms = vec![
        secret.to_owned(),
        json.trim_matches('"').to_owned(),
        json.trim_matches('"').replace('/', "\\/"),
        url::form_urlencoded::byte_serialize(secret.as_bytes()).collect(),
    ];
    forms.extend(IN_URLS.iter().map(|set| percent_encode(secret.as_bytes(), set).to_string()));
    // Something may stand before and after it in what was encoded: the digits that depend on that are left out.
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
            hosts: AllowList::new(String::new(), &urls, &[]).unwrap(),
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
    fn a_credential_goes_to_its_hosts_alone_and_not_over_plain_http() {
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
    fn a_plugins_own_header_gives_way_and_the_secret_is_blanked_on_its_way_back() {
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
        secrets().blank_body(&mut body, true);
        assert_eq!(body, b"none: [redacted], [redacted]");
        let mut text = String::from("Bearer sk-verysecret");
        secrets().blank(&mut text);
        assert_eq!(text, "Bearer [redacted]");
        assert_eq!(format!("{:?}", secrets()), "2 secrets");
    }

    #[test]
    fn a_secret_is_found_however_it_is_written() {
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
            secrets.blank(&mut text);
            assert!(
                text.contains(BLANK) && !text.contains("very") && !text.contains("VERY"),
                "{shown}: {text}"
            );
        }
        for before in ["", "a", "ab", "user:"] {
            for after in ["", "b", "bc"] {
                for encoding in [STANDARD_NO_PAD, URL_SAFE_NO_PAD] {
                    let mut body = encoding.encode(format!("{before}{secret}{after}")).into_bytes();
                    secrets.blank_body(&mut body, false);
                    let text = String::from_utf8(body).unwrap();
                    // No more of it is left than the digits it shares with its neighbours.
                    assert!(
                        text.contains(BLANK) && text.len() < BLANK.len() + 18,
                        "{before} {after}: {text}"
                    );
                }
            }
        }
    }

    #[test]
    fn words_are_redacted_in_errors_and_headers_alone() {
        let blanked = |secret: &str, is_error: bool| {
            let secrets =
                Secrets::new(vec![credential("x-key", "", secret, &[])], Vec::new(), false)
                    .unwrap();
            let mut body = format!("I know {}.", secret.to_uppercase()).into_bytes();
            secrets.blank_body(&mut body, is_error);
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
                (blanked(secret, false), blanked(secret, true)),
                (in_answers, in_errors),
                "{secret}"
            );
        }
    }

    #[test]
    fn a_secret_that_no_header_can_hold_is_refused() {
        let credential = credential("authorization", "", "a\nb", &[]);
        let refused = Secrets::new(vec![credential], Vec::new(), false).unwrap_err();
        assert!(refused.to_string().contains("`authorization`"), "{refused}");
    }
}
