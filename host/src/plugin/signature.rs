//! Signatures over a plugin: its name, its TOML file and its component, bound together.
//!
//! The format is OpenSSH's (PROTOCOL.sshsig), so that keys, agents and `ssh-keygen -Y` do with it what they do elsewhere. What is signed is a
//! short text, the statement, with the digests of both files.

use std::path::{Path, PathBuf};

use ssh_key::{Algorithm, EcdsaCurve, HashAlg, LineEnding, PrivateKey, PublicKey, SshSig};

use super::read::{read_text, sha256};

/// Keeps a signature made for something else from counting here.
pub const NAMESPACE: &str = "batchwright-plugin";

/// What is signed. The name is in it, so that a file cannot be put to another use by renaming it.
pub fn statement(name: &str, manifest: &str, component_sha256: &str) -> String {
    let manifest = sha256(manifest.as_bytes());
    format!("batchwright plugin v1\nname {name}\nmanifest sha256:{manifest}\ncomponent sha256:{component_sha256}\n")
}

/// The signature of a statement, as text.
pub fn sign(key: &PrivateKey, statement: &str) -> Result<String, String> {
    let signed = key.sign(NAMESPACE, HashAlg::Sha512, statement.as_bytes());
    signed.and_then(|signature| signature.to_pem(LineEnding::LF)).map_err(|error| format!("cannot sign: {error}"))
}

/// The public keys whose signatures count.
#[derive(Clone, Debug)]
pub struct TrustedKeys {
    file: PathBuf,
    keys: Vec<PublicKey>,
}

impl TrustedKeys {
    /// Reads a file of public keys as OpenSSH writes them, one a line; `#` begins a comment.
    pub fn read(file: &Path) -> Result<Self, String> {
        let text = read_text(file).map_err(|error| error.to_string())?;
        let mut keys = Vec::new();
        for (line, number) in text.lines().zip(1..) {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let key = PublicKey::from_openssh(line).map_err(|error| {
                format!("{} line {number}: is no public key as in `ssh-ed25519 AAAA… name`: {error}", file.display())
            })?;
            if !matches!(key.algorithm(), Algorithm::Ed25519 | Algorithm::Ecdsa { curve: EcdsaCurve::NistP256 }) {
                return Err(format!(
                    "{} line {number}: is a key of type {}; signatures are by Ed25519 or ECDSA P-256",
                    file.display(),
                    key.algorithm()
                ));
            }
            keys.push(key);
        }
        if keys.is_empty() {
            return Err(format!("{}: holds no public key, so no plugin could ever be loaded", file.display()));
        }
        Ok(Self { file: file.to_owned(), keys })
    }

    /// The key that signed the statement, if it is one of these, as `SHA256:…` and its comment.
    pub fn verify(&self, statement: &str, signature: Option<&str>) -> Result<String, String> {
        let Some(signature) = signature else {
            return Err("there is none, and only signed plugins are loaded (setting trusted_keys); sign it with \
                        `batchwright plugin sign`"
                .into());
        };
        let signature = SshSig::from_pem(signature).map_err(|error| format!("is not readable: {error}"))?;
        let Some(key) = self.keys.iter().find(|key| key.key_data() == signature.public_key()) else {
            let signer = PublicKey::from(signature.public_key().clone()).fingerprint(HashAlg::Sha256);
            return Err(format!("is by {signer}, a key that is not in {}", self.file.display()));
        };
        if signature.namespace() != NAMESPACE {
            return Err(format!(
                "was made for `{}` and not for `{NAMESPACE}` (-n of ssh-keygen)",
                signature.namespace()
            ));
        }
        key.verify(NAMESPACE, statement.as_bytes(), &signature).map_err(|_| {
            "does not fit: the file, its component or its name was changed after it was signed; look at what changed, \
             then sign it again"
                .to_owned()
        })?;
        let (fingerprint, comment) = (key.fingerprint(HashAlg::Sha256), key.comment());
        Ok(if comment.is_empty() { fingerprint.to_string() } else { format!("{fingerprint} {comment}") })
    }
}

#[cfg(test)]
mod tests {
    use ssh_key::private::Ed25519Keypair;

    use super::*;

    fn trusted(keys: &str) -> Result<TrustedKeys, String> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("trusted");
        std::fs::write(&file, keys).unwrap();
        TrustedKeys::read(&file)
    }

    #[test]
    fn a_signature_holds_for_its_name_its_manifest_and_its_component_alone() {
        let key = PrivateKey::from(Ed25519Keypair::from_seed(&[7; 32]));
        let trusted = trusted(&format!("# ours\n\n{}\n", key.public_key().to_openssh().unwrap())).unwrap();
        let signature = sign(&key, &statement("a", "manifest", "00")).unwrap();
        assert!(trusted.verify(&statement("a", "manifest", "00"), Some(&signature)).unwrap().starts_with("SHA256:"));
        for (name, manifest, component) in [("b", "manifest", "00"), ("a", "manifest ", "00"), ("a", "manifest", "01")]
        {
            let error = trusted.verify(&statement(name, manifest, component), Some(&signature)).unwrap_err();
            assert!(error.contains("changed after it was signed"), "{error}");
        }
        assert!(trusted.verify("", None).unwrap_err().contains("plugin sign"));
        assert!(trusted.verify("", Some("nothing")).unwrap_err().contains("not readable"));
        // Made by the same key for another purpose.
        let other = key.sign("file", HashAlg::Sha512, statement("a", "manifest", "00").as_bytes()).unwrap();
        let other = other.to_pem(LineEnding::LF).unwrap();
        assert!(trusted.verify(&statement("a", "manifest", "00"), Some(&other)).is_err());
    }

    #[test]
    fn keys_that_are_none_are_named_with_their_line() {
        assert!(trusted("# nothing\n").unwrap_err().contains("holds no public key"));
        assert!(trusted("\nssh-ed25519 AAAA\n").unwrap_err().contains("line 2"));
    }
}
