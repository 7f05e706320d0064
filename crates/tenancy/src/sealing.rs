//! Sealing of secrets that projects set, with XChaCha20-Poly1305.
//!
//! **Threat.** Somebody reads the database or a backup of it, or moves the sealed secret of one
//! project to another one. A sealed secret therefore opens only with the key of the operator, which
//! is not in the database, and only for the project, the plugin and the credential that it was
//! sealed for.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use chacha20poly1305::aead::{Aead, Payload};
use chacha20poly1305::{KeyInit, XChaCha20Poly1305, XNonce};

/// Length of the key, in bytes.
const KEY_BYTES: usize = 32;

/// Length of the nonce at the beginning of a sealed secret, in bytes. It is long enough to be
/// random.
const NONCE_BYTES: usize = 24;

/// Key that seals secrets.
#[derive(Clone)]
pub struct SealingKey(XChaCha20Poly1305);

/// Error of a sealed secret. It names no secret.
#[derive(Debug, thiserror::Error)]
pub enum SealingError {
    /// Key of the wrong form.
    #[error(
        "expected {KEY_BYTES} bytes in base64, such as the output of `openssl rand -base64 32`"
    )]
    Key,
    /// Secret that was sealed with another key, or that is damaged.
    #[error("the secret was sealed with another credential_key, or is damaged")]
    Opened,
    /// Operating system without random bits.
    #[error("the secret was not sealed: {0}")]
    Sealed(String),
}

impl SealingKey {
    /// Returns the key of a text in base64.
    pub fn parse(text: &str) -> Result<Self, SealingError> {
        let bytes = STANDARD.decode(text.trim()).map_err(|_| SealingError::Key)?;
        if bytes.len() != KEY_BYTES {
            return Err(SealingError::Key);
        }
        XChaCha20Poly1305::new_from_slice(&bytes).map(Self).map_err(|_| SealingError::Key)
    }

    /// Seals a secret for a purpose, each part of which is a name.
    pub fn seal(&self, secret: &str, purpose: &[&str]) -> Result<Vec<u8>, SealingError> {
        let mut nonce = [0; NONCE_BYTES];
        let failed = |error: &dyn std::fmt::Display| SealingError::Sealed(error.to_string());
        getrandom::fill(&mut nonce).map_err(|error| failed(&error))?;
        let aad = purpose_text(purpose);
        let payload = Payload { msg: secret.as_bytes(), aad: aad.as_bytes() };
        let sealed = self.0.encrypt(XNonce::from_slice(&nonce), payload);
        let sealed = sealed.map_err(|error| failed(&error))?;
        Ok([nonce.as_slice(), &sealed].concat())
    }

    /// Opens a secret that was sealed for a purpose.
    pub fn open(&self, sealed: &[u8], purpose: &[&str]) -> Result<String, SealingError> {
        let (nonce, sealed) = sealed.split_at_checked(NONCE_BYTES).ok_or(SealingError::Opened)?;
        let aad = purpose_text(purpose);
        let payload = Payload { msg: sealed, aad: aad.as_bytes() };
        let opened = self.0.decrypt(XNonce::from_slice(nonce), payload);
        String::from_utf8(opened.map_err(|_| SealingError::Opened)?)
            .map_err(|_| SealingError::Opened)
    }
}

/// Returns a text that differs between purposes: names have no NUL.
fn purpose_text(purpose: &[&str]) -> String {
    purpose.join("\0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secret_opens_with_its_key_and_for_its_purpose_alone() {
        let key = |byte: u8| SealingKey::parse(&STANDARD.encode([byte; KEY_BYTES])).unwrap();
        let sealed = key(1).seal("sk-secret", &["acme", "p", "api_key"]).unwrap();
        assert!(!sealed.windows(9).any(|part| part == b"sk-secret"));
        assert_eq!(key(1).open(&sealed, &["acme", "p", "api_key"]).unwrap(), "sk-secret");
        assert!(key(2).open(&sealed, &["acme", "p", "api_key"]).is_err());
        for other in [["globex", "p", "api_key"], ["acme", "q", "api_key"], ["acme", "p", "key"]] {
            assert!(key(1).open(&sealed, &other).is_err(), "{other:?}");
        }
        for damaged in [&sealed[1..], &sealed[..10], &[]] {
            assert!(key(1).open(damaged, &["acme", "p", "api_key"]).is_err());
        }
        assert_ne!(sealed, key(1).seal("sk-secret", &["acme", "p", "api_key"]).unwrap());
    }

    #[test]
    fn key_of_another_length_is_refused() {
        for text in ["", "c2hvcnQ=", "not base64!", &STANDARD.encode([0; 33])] {
            assert!(SealingKey::parse(text).is_err(), "{text}");
        }
        assert!(SealingKey::parse(&format!("{}\n", STANDARD.encode([0; 32]))).is_ok());
    }
}
