//! Text of API keys: `bw_<id>_<secret>`.
//!
//! The prefix lets secret scanners find a key in a repository: `bw_[0-9a-f]{16}_[0-9a-f]{64}`.

use std::fmt;

use batchwright_domain::ids::KeyId;
use batchwright_domain::text::hex;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

/// First characters of every key.
const KEY_PREFIX: &str = "bw_";

/// Length of the id in a key, in hexadecimal digits: 64 bits, which the store keeps unique.
const ID_DIGITS: usize = 16;

/// Length of the secret in a key, in hexadecimal digits: 256 bits.
const SECRET_DIGITS: usize = 64;

/// Number of characters at the end of a key that its redacted form shows.
const SHOWN_SUFFIX_CHARS: usize = 4;

/// SHA-256 of the complete text of a key.
#[derive(Clone, Copy)]
pub struct KeyDigest([u8; 32]);

impl KeyDigest {
    /// Returns the digest that the store has.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Returns the digest for the store.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    fn of(text: &str) -> Self {
        Self(Sha256::digest(text.as_bytes()).into())
    }

    /// Returns true if both digests are equal, in constant time.
    pub fn matches(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl fmt::Debug for KeyDigest {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("KeyDigest(…)")
    }
}

/// New key. It has no `Debug`, so that no log contains it.
pub struct IssuedKey {
    /// Id of the key, which finds its record.
    pub id: KeyId,
    /// Complete text of the key, for the response to its creation alone.
    pub value: String,
    /// Digest for the store.
    pub digest: KeyDigest,
    /// Text that shows which key it is.
    pub redacted: String,
}

impl IssuedKey {
    /// Issues a key with random bits of the operating system; fails if it has none.
    pub fn new() -> Result<Self, getrandom::Error> {
        let (mut id, mut secret) = ([0; ID_DIGITS / 2], [0; SECRET_DIGITS / 2]);
        getrandom::fill(&mut id)?;
        getrandom::fill(&mut secret)?;
        Ok(Self::of(&hex(&id), &hex(&secret)))
    }

    /// Takes a key that the operator made; none if no key has this form.
    pub fn parse(text: &str) -> Option<Self> {
        parts(text).map(|(id, secret)| Self::of(id, secret))
    }

    fn of(id: &str, secret: &str) -> Self {
        let value = format!("{KEY_PREFIX}{id}_{secret}");
        let suffix =
            secret.get(secret.len().saturating_sub(SHOWN_SUFFIX_CHARS)..).unwrap_or_default();
        Self {
            digest: KeyDigest::of(&value),
            redacted: format!("{KEY_PREFIX}{id}_...{suffix}"),
            id: key_id(id),
            value,
        }
    }
}

/// Key that a client sent, in the right form.
pub struct PresentedKey {
    /// Id that finds the record of the key.
    pub id: KeyId,
    /// Digest of what the client sent.
    pub digest: KeyDigest,
}

impl PresentedKey {
    /// Parses what a client sent; none if no key has this form.
    pub fn parse(text: &str) -> Option<Self> {
        parts(text).map(|(id, _)| Self { id: key_id(id), digest: KeyDigest::of(text) })
    }
}

/// Returns the id and the secret of a key; none if no key has this form.
fn parts(text: &str) -> Option<(&str, &str)> {
    let (id, secret) = text.strip_prefix(KEY_PREFIX)?.split_once('_')?;
    let is_hex = |text: &str, digits: usize| {
        text.len() == digits && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    };
    (is_hex(id, ID_DIGITS) && is_hex(secret, SECRET_DIGITS)).then_some((id, secret))
}

/// Returns the start and the end of a text that a client sent as a key, for an error message.
pub fn redact(text: &str) -> String {
    let length = text.chars().count();
    if length < 16 {
        return "*".repeat(length);
    }
    let start: String = text.chars().take(7).collect();
    let end: String = text.chars().skip(length.saturating_sub(SHOWN_SUFFIX_CHARS)).collect();
    format!("{start}...{end}")
}

fn key_id(digits: &str) -> KeyId {
    format!("key_{digits}").into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn issued_key_is_parsed_and_shown_without_its_secret() {
        let (key, other) = (IssuedKey::new().unwrap(), IssuedKey::new().unwrap());
        let presented = PresentedKey::parse(&key.value).unwrap();
        assert_eq!(presented.id, key.id);
        assert!(presented.digest.matches(&key.digest));
        assert!(!presented.digest.matches(&other.digest));
        let secret = key.value.rsplit('_').next().unwrap();
        assert_eq!(secret.len(), SECRET_DIGITS);
        assert!(!key.redacted.contains(&secret[..8]));
        assert!(key.redacted.ends_with(&secret[60..]));
        assert!(!redact(&key.value).contains(&secret[..8]));
    }

    #[test]
    fn malformed_key_is_not_parsed() {
        let key = IssuedKey::new().unwrap().value;
        for text in [
            String::new(),
            "bw_".into(),
            key.to_uppercase(),
            format!("{key} "),
            format!("{key}0"),
            key[..key.len() - 1].to_owned(),
            key.replacen('_', "", 1),
            key.replacen("bw_", "sk-", 1),
        ] {
            assert!(PresentedKey::parse(&text).is_none(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn changed_character_makes_another_key(at in 0..84_usize, by in "[0-9a-f_]") {
            let key = IssuedKey::new().unwrap();
            let at = at % key.value.len();
            let mut changed = key.value.clone();
            changed.replace_range(at..=at, &by);
            prop_assume!(changed != key.value);
            let parsed = PresentedKey::parse(&changed);
            prop_assert!(parsed.is_none_or(|parsed| !parsed.digest.matches(&key.digest)));
        }

        #[test]
        fn any_text_is_parsed_and_redacted_without_a_panic(text in "\\PC{0,100}") {
            prop_assert!(PresentedKey::parse(&text).is_none());
            prop_assert!(redact(&text).len() <= text.len() + 3);
        }
    }
}
