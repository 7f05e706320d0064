//! Secrets and signatures, as Standard Webhooks defines them.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// Beginning of the text of a secret.
pub const SECRET_PREFIX: &str = "whsec_";

/// Number of random bytes of a secret.
const SECRET_BYTES: usize = 32;

/// Creates the text of a random secret.
pub fn new_secret() -> Result<String, getrandom::Error> {
    let mut bytes = [0_u8; SECRET_BYTES];
    getrandom::fill(&mut bytes)?;
    Ok(format!("{SECRET_PREFIX}{}", STANDARD.encode(bytes)))
}

/// Returns what people may see of a secret: enough to tell two of them apart.
pub fn hint(secret: &str) -> String {
    let end: String = secret.chars().rev().take(4).collect();
    format!("{SECRET_PREFIX}…{}", end.chars().rev().collect::<String>())
}

/// Returns the value of `webhook-signature`: one entry for each secret.
pub fn signature<'a>(
    secrets: impl IntoIterator<Item = &'a str>,
    (id, timestamp): (&str, i64),
    body: &[u8],
) -> String {
    let entries = secrets.into_iter().filter_map(|secret| {
        let key = STANDARD.decode(secret.strip_prefix(SECRET_PREFIX).unwrap_or(secret)).ok()?;
        let mut mac = Hmac::<Sha256>::new_from_slice(&key).ok()?;
        mac.update(format!("{id}.{timestamp}.").as_bytes());
        mac.update(body);
        Some(format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes())))
    });
    entries.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signature_is_that_of_the_specification() {
        // The example of the reference implementations of Standard Webhooks.
        let secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
        let (id, timestamp) = ("msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330);
        let body = br#"{"test": 2432232314}"#;
        let expected = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=";
        assert_eq!(signature([secret], (id, timestamp), body), expected);
        let other = new_secret().unwrap();
        let both = signature([other.as_str(), secret], (id, timestamp), body);
        assert_eq!(both.split(' ').nth(1), Some(expected));
    }

    #[test]
    fn secrets_differ_and_their_hints_show_little() {
        let (one, other) = (new_secret().unwrap(), new_secret().unwrap());
        assert!(one != other && one.starts_with(SECRET_PREFIX) && one.len() > 40);
        let shown = hint(&one);
        assert!(shown.chars().count() == SECRET_PREFIX.len() + 5 && one.ends_with(&shown[9..]));
    }
}
