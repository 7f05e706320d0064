//! Signatures of plugins, and the public keys that verify the signatures.
//!
//! A signature covers the statement: a short text with the plugin's name and the digests of the
//! TOML file and the component. So a signature is valid only for these three together.
//!
//! The format is that of OpenSSH (PROTOCOL.sshsig), so existing keys, agents and `ssh-keygen -Y`
//! work with it.

use std::path::{Path, PathBuf};

use ssh_key::{Algorithm, EcdsaCurve, HashAlg, LineEnding, PrivateKey, PublicKey, SshSig};

use crate::package::read::{read_text, sha256};

/// Namespace of plugin signatures. A signature that the same key made for another purpose is
/// refused.
pub const NAMESPACE: &str = "batchwright-plugin";

/// Returns the text that is signed. The text contains the plugin's name, so a renamed file needs a
/// new signature.
pub fn statement(name: &str, manifest: &str, component_sha256: &str) -> String {
    let manifest = sha256(manifest.as_bytes());
    format!(
        "batchwright plugin v1\n\
         name {name}\n\
         manifest sha256:{manifest}\n\
         component sha256:{component_sha256}\n"
    )
}

/// Signs a statement and returns the signature as PEM text.
pub fn sign(key: &PrivateKey, statement: &str) -> Result<String, String> {
    let signed = key.sign(NAMESPACE, HashAlg::Sha512, statement.as_bytes());
    signed
        .and_then(|signature| signature.to_pem(LineEnding::LF))
        .map_err(|error| format!("cannot sign: {error}"))
}

/// Public keys that may sign plugins, as read from their file.
#[derive(Clone, Debug)]
pub struct TrustedKeys {
    pub(crate) file: PathBuf,
    pub(crate) digest: String,
    keys: Vec<TrustedKey>,
}

/// Public key and the plugins that the key may sign.
#[derive(Clone, Debug)]
struct TrustedKey {
    key: PublicKey,
    /// Plugin names; a `*` at the end matches any ending. Empty means all plugins.
    names: Vec<String>,
}

impl TrustedKey {
    fn may_sign(&self, name: &str) -> bool {
        self.names.is_empty()
            || self.names.iter().any(|known| match known.strip_suffix('*') {
                Some(prefix) => name.starts_with(prefix),
                None => known == name,
            })
    }
}

impl TrustedKeys {
    /// Reads a file of OpenSSH public keys, one per line. An empty list of keys is an error.
    ///
    /// `#` begins a comment. `names="a,b-*"` before a key limits the key to these plugins.
    pub fn read(file: &Path) -> Result<Self, String> {
        let keys = Self::read_or_empty(file)?;
        if keys.keys.is_empty() {
            return Err(format!(
                "{}: holds no public key, so no plugin can be loaded; add a key",
                file.display()
            ));
        }
        Ok(keys)
    }

    /// Reads a file of public keys like [`Self::read`], but allows an empty list of keys.
    ///
    /// A running server uses it, because an operator may remove the last key.
    pub fn read_or_empty(file: &Path) -> Result<Self, String> {
        let text = read_text(file).map_err(|error| error.to_string())?;
        let mut keys = Vec::new();
        for (line, number) in text.lines().zip(1..) {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (names, line) = split_names(line)
                .map_err(|error| format!("{} line {number}: {error}", file.display()))?;
            let key = PublicKey::from_openssh(line).map_err(|error| {
                format!(
                    "{} line {number}: is not a public key such as `ssh-ed25519 AAAA… name`: \
                     {error}",
                    file.display()
                )
            })?;
            if !matches!(
                key.algorithm(),
                Algorithm::Ed25519 | Algorithm::Ecdsa { curve: EcdsaCurve::NistP256 }
            ) {
                return Err(format!(
                    "{} line {number}: has a key of type {}; use an Ed25519 or ECDSA P-256 key",
                    file.display(),
                    key.algorithm()
                ));
            }
            keys.push(TrustedKey { key, names });
        }
        Ok(Self { file: file.to_owned(), digest: sha256(text.as_bytes()), keys })
    }

    /// Verifies a signature and returns its key, as `SHA256:…` and the comment.
    ///
    /// Fails if there is no signature, if the key is not trusted for this plugin, or if the
    /// signature does not match the statement.
    pub fn verify(
        &self,
        name: &str,
        statement: &str,
        signature: Option<&str>,
    ) -> Result<String, String> {
        let Some(signature) = signature else {
            return Err(
                "there is none, and only signed plugins are loaded (setting trusted_keys); \
                        sign it with `batchwright plugin sign`"
                    .into(),
            );
        };
        let signature =
            SshSig::from_pem(signature).map_err(|error| format!("is not readable: {error}"))?;
        let signers =
            || self.keys.iter().filter(|trusted| trusted.key.key_data() == signature.public_key());
        let Some(trusted) =
            signers().find(|trusted| trusted.may_sign(name)).or_else(|| signers().next())
        else {
            let signer =
                PublicKey::from(signature.public_key().clone()).fingerprint(HashAlg::Sha256);
            return Err(format!(
                "is by {signer}, a key that is not in {}; sign the plugin with a trusted key",
                self.file.display()
            ));
        };
        let key = &trusted.key;
        if !trusted.may_sign(name) {
            let (signer, names) = (key.fingerprint(HashAlg::Sha256), trusted.names.join(", "));
            return Err(format!(
                "is by {signer}, a key that may sign only {names} (names in {})",
                self.file.display()
            ));
        }
        if signature.namespace() != NAMESPACE {
            return Err(format!(
                "has the namespace `{}`; sign it again with the namespace `{NAMESPACE}` (option -n \
                 of ssh-keygen)",
                signature.namespace()
            ));
        }
        key.verify(NAMESPACE, statement.as_bytes(), &signature).map_err(|_| {
            "does not match: the file, its component or its name was changed after it was signed; \
             review the change, then sign it again"
                .to_owned()
        })?;
        let (fingerprint, comment) = (key.fingerprint(HashAlg::Sha256), key.comment());
        Ok(if comment.is_empty() {
            fingerprint.to_string()
        } else {
            format!("{fingerprint} {comment}")
        })
    }
}

/// Splits a line into the plugin names that limit its key, and the key.
fn split_names(line: &str) -> Result<(Vec<String>, &str), String> {
    let Some(rest) = line.strip_prefix("names=\"") else { return Ok((Vec::new(), line)) };
    let (names, key) = rest
        .split_once("\" ")
        .ok_or("names has no closing quote; write names=\"a,b\" before the key")?;
    let names: Vec<String> = names
        .split(',')
        .map(|name| name.trim().to_owned())
        .filter(|name| !name.is_empty())
        .collect();
    if names.iter().any(|name| name.strip_suffix('*').unwrap_or(name).contains('*')) {
        return Err("a `*` may occur in a name only once, at the end".into());
    }
    if names.is_empty() {
        Err("names is empty; remove it to allow all plugins".into())
    } else {
        Ok((names, key.trim()))
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
    fn signature_is_valid_only_for_its_name_manifest_and_component() {
        let key = PrivateKey::from(Ed25519Keypair::from_seed(&[7; 32]));
        let trusted =
            trusted(&format!("# ours\n\n{}\n", key.public_key().to_openssh().unwrap())).unwrap();
        let signature = sign(&key, &statement("a", "manifest", "00")).unwrap();
        assert!(
            trusted
                .verify("a", &statement("a", "manifest", "00"), Some(&signature))
                .unwrap()
                .starts_with("SHA256:")
        );
        for (name, manifest, component) in
            [("b", "manifest", "00"), ("a", "manifest ", "00"), ("a", "manifest", "01")]
        {
            let error = trusted
                .verify(name, &statement(name, manifest, component), Some(&signature))
                .unwrap_err();
            assert!(error.contains("changed after it was signed"), "{error}");
        }
        assert!(trusted.verify("", "", None).unwrap_err().contains("plugin sign"));
        assert!(trusted.verify("", "", Some("nothing")).unwrap_err().contains("not readable"));
        let bound = format!("names=\"b,a-*\" {}", key.public_key().to_openssh().unwrap());
        let bound = super::tests::trusted(&bound).unwrap();
        assert!(
            bound
                .verify("a", &statement("a", "manifest", "00"), Some(&signature))
                .unwrap_err()
                .contains("only b, a-*")
        );
        for name in ["b", "a-x"] {
            let signature = sign(&key, &statement(name, "", "")).unwrap();
            assert!(
                bound.verify(name, &statement(name, "", ""), Some(&signature)).is_ok(),
                "{name}"
            );
        }
        // A signature by the same key in another namespace.
        let other =
            key.sign("file", HashAlg::Sha512, statement("a", "manifest", "00").as_bytes()).unwrap();
        let other = other.to_pem(LineEnding::LF).unwrap();
        assert!(trusted.verify("a", &statement("a", "manifest", "00"), Some(&other)).is_err());
    }

    #[test]
    fn trusted_keys_errors_name_the_line() {
        assert!(trusted("# nothing\n").unwrap_err().contains("holds no public key"));
        assert!(trusted("\nssh-ed25519 AAAA\n").unwrap_err().contains("line 2"));
        assert!(trusted("names=\"a ssh-ed25519 AAAA\n").unwrap_err().contains("no closing quote"));
        for names in ["a*b", "a**", "*,*a"] {
            assert!(
                trusted(&format!("names=\"{names}\" ssh-ed25519 AAAA\n"))
                    .unwrap_err()
                    .contains("only once, at the end")
            );
        }
    }
}
