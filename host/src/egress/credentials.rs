//! Secrets: added to what goes out, blanked in what comes back, shown nowhere.

use http::{HeaderMap, HeaderName, HeaderValue};

/// What stands where a secret stood.
const BLANK: &str = "[redacted]";

/// The shortest secret that is looked for in what comes back: `none` and `EMPTY`, which local model servers take, are words of any answer.
const SHORTEST: usize = 8;

/// One header with a secret in it.
pub struct Credential {
    pub header: HeaderName,
    pub prefix: String,
    pub secret: String,
}

/// The secrets of one plugin.
#[derive(Default)]
pub struct Secrets {
    headers: Vec<(HeaderName, HeaderValue)>,
    searched: Vec<String>,
}

impl std::fmt::Debug for Secrets {
    fn fmt(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(formatter, "{} secrets", self.headers.len())
    }
}

impl Secrets {
    /// Fails for a secret that no header can hold, with its header's name.
    pub fn new(credentials: Vec<Credential>) -> Result<Self, HeaderName> {
        let mut secrets = Self::default();
        for Credential { header, prefix, secret } in credentials {
            let Ok(mut value) = HeaderValue::try_from(format!("{prefix}{secret}")) else { return Err(header) };
            value.set_sensitive(true);
            secrets.headers.push((header, value));
            if secret.len() >= SHORTEST {
                secrets.searched.push(secret);
            }
        }
        Ok(secrets)
    }

    /// Sets the headers, in place of whatever stands there.
    pub fn add_to(&self, headers: &mut HeaderMap) {
        for (name, value) in &self.headers {
            headers.insert(name.clone(), value.clone());
        }
    }

    /// Blanks every secret in a text.
    pub fn blank(&self, text: &mut String) {
        for secret in &self.searched {
            if text.contains(secret.as_str()) {
                *text = text.replace(secret.as_str(), BLANK);
            }
        }
    }

    /// Blanks every secret in a body.
    pub fn blank_bytes(&self, body: &mut Vec<u8>) {
        for secret in &self.searched {
            let finder = memchr::memmem::Finder::new(secret.as_bytes());
            if finder.find(body).is_none() {
                continue;
            }
            let mut blanked = Vec::with_capacity(body.len());
            let mut copied = 0;
            for at in finder.find_iter(body) {
                blanked.extend_from_slice(body.get(copied..at).unwrap_or_default());
                blanked.extend_from_slice(BLANK.as_bytes());
                copied = at.saturating_add(secret.len());
            }
            blanked.extend_from_slice(body.get(copied..).unwrap_or_default());
            *body = blanked;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secrets() -> Secrets {
        let credential = |header: &str, secret: &str| Credential {
            header: header.parse().unwrap(),
            prefix: "Bearer ".into(),
            secret: secret.into(),
        };
        Secrets::new(vec![credential("authorization", "sk-verysecret"), credential("x-key", "none")]).unwrap()
    }

    #[test]
    fn a_plugins_own_header_gives_way_and_the_secret_is_blanked_on_its_way_back() {
        let mut headers = HeaderMap::new();
        headers.append("authorization", HeaderValue::from_static("Bearer forged"));
        secrets().add_to(&mut headers);
        assert_eq!(headers.get_all("authorization").iter().collect::<Vec<_>>(), ["Bearer sk-verysecret"]);
        let mut body = b"none: sk-verysecret, sk-verysecret".to_vec();
        secrets().blank_bytes(&mut body);
        assert_eq!(body, b"none: [redacted], [redacted]");
        let mut text = String::from("Bearer sk-verysecret");
        secrets().blank(&mut text);
        assert_eq!(text, "Bearer [redacted]");
        assert_eq!(format!("{:?}", secrets()), "2 secrets");
    }

    #[test]
    fn a_secret_that_no_header_can_hold_is_refused() {
        let credential =
            Credential { header: http::header::AUTHORIZATION, prefix: String::new(), secret: "a\nb".into() };
        assert_eq!(Secrets::new(vec![credential]).unwrap_err(), http::header::AUTHORIZATION);
    }
}
