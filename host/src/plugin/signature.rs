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
    format!(
        "batchwright plugin v1\nname {name}\nmanifest sha256:{manifest}\ncomponent sha256:{component_sha256}\n"
    )
}

/// The signature of a statement, as text.
pub fn sign(key: &PrivateKey, statement: &str) -> Result<String, String> {
    let signed = key.sign(NAMESPACE, HashAlg::Sha512, statement.as_bytes());
    signed
        .and_then(|signature| signature.to_pem(LineEnding::LF))
        .map_err(|error| format!("cannot sign: {error}"))
}

/// The public keys whose signatures count.
#[derive(Clone, Debug)]
pub struct TrustedKeys {
    pub(super) file: PathBuf,
    pub(super) digest: String,
    keys: Vec<Trusted>,
}

/// A key, and the plugins that its signatures count for.
#[derive(Clone, Debug)]
struct Trusted {
    key: PublicKey,
    /// Names; `*` at the end of one is any ending. None is every plugin.
    names: Vec<String>,
}

impl Trusted {
    fn is_for(&self, name: &str) -> bool {
        self.names.is_empty()
            || self.names.iter().any(|known| match known.strip_suffix('*') {
                Some(beginning) => name.starts_with(beginning),
                None => known == name,
            })
    }
}

impl TrustedKeys {
    /// Reads a file of public keys as OpenSSH writes them, one a line; `#` begins a comment. `names="a,b-*"` before a key binds it to plugins.
    pub fn read(file: &Path) -> Result<Self, String> {
        let keys = Self::read_any(file)?;
        if keys.keys.is_empty() {
            return Err(format!(
                "{}: holds no public key, so no plugin could ever be loaded",
                file.display()
            ));
        }
        Ok(keys)
    }

    /// The same, of a server that runs: the last key may have been taken out.
    pub fn read_any(file: &Path) -> Result<Self, String> {
        let text = read_text(file).map_err(|error| error.to_string())?;
        let mut keys = Vec::new();
        for (line, number) in text.lines().zip(1..) {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (names, line) = names_of(line)
                .map_err(|error| format!("{} line {number}: {error}", file.display()))?;
            let key = PublicKey::from_openssh(line).map_err(|error| {
                format!(
                    "{} line {number}: is no public key as in `ssh-ed25519 AAAA… name`: {error}",
                    file.display()
                )
            })?;
            if !matches!(
                key.algorithm(),
                Algorithm::Ed25519 | Algorithm::Ecdsa { curve: EcdsaCurve::NistP256 }
            ) {
                return Err(format!(
                    "{} line {number}: is a key of type {}; signatures are by Ed25519 or ECDSA P-256",
                    file.display(),
                    key.algorithm()
                ));
            }
            keys.push(Trusted { key, names });
        }
        Ok(Self { file: file.to_owned(), digest: sha256(text.as_bytes()), keys })
    }

    /// The key that signed the statement, if it is one of these, as `SHA256:…` and its comment.
    pub fn verify(
        &self,
        name: &str,
        statement: &str,
        signature: Option<&str>,
    ) -> Result<String, String> {
        let Some(signature) = signature else {
            return Err("there is none, and only signed plugins are loaded (setting trusted_keys); sign it with \
                        `batchwright plugin sign`"
                .into());
        };
        let signature =
            SshSig::from_pem(signature).map_err(|error| format!("is not readable: {error}"))?;
        let signers =
            || self.keys.iter().filter(|trusted| trusted.key.key_data() == signature.public_key());
        let Some(trusted) =
            signers().find(|trusted| trusted.is_for(name)).or_else(|| signers().next())
        else {
            let signer =
                PublicKey::from(signature.public_key().clone()).fingerprint(HashAlg::Sha256);
            return Err(format!("is by {signer}, a key that is not in {}", self.file.display()));
        };
        let key = &trusted.key;
        if !trusted.is_for(name) {
            let (signer, names) = (key.fingerprint(HashAlg::Sha256), trusted.names.join(", "));
            return Err(format!(
                "is by {signer}, a key that may sign only {names} (names in {})",
                self.file.display()
            ));
        }
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
        Ok(if comment.is_empty() {
            fingerprint.to_string()
        } else {
            format!("{fingerprint} {comment}")
        })
    }
}

/// The plugins that a line binds its key to, and the rest of the line.
fn names_of(line: &str) -> Result<(Vec<String>, &str), String> {
    let Some(rest) = line.strip_prefix("names=\"") else { return Ok((Vec::new(), line)) };
    let (names, key) =
        rest.split_once("\" ").ok_or("names has no end; write names=\"a,b\" and then the key")?;
    let names: Vec<String> = names
        .split(',')
        .map(|name| name.trim().to_owned())
        .filter(|name| !name.is_empty())
        .collect();
    if names.iter().any(|name| name.strip_suffix('*').unwrap_or(name).contains('*')) {
        return Err("a `*` in names stands once, at the end of a name".into());
    }
    if names.is_empty() {
        Err("names is empty; leave it out for all plugins".into())
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
    fn a_signature_holds_for_its_name_its_manifest_and_its_component_alone() {
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
        // Made by the same key for another purpose.
        let other =
            key.sign("file", HashAlg::Sha512, statement("a", "manifest", "00").as_bytes()).unwrap();
        let other = other.to_pem(LineEnding::LF).unwrap();
        assert!(trusted.verify("a", &statement("a", "manifest", "00"), Some(&other)).is_err());
    }

    #[test]
    fn keys_that_are_none_are_named_with_their_line() {
        assert!(trusted("# nothing\n").unwrap_err().contains("holds no public key"));
        assert!(trusted("\nssh-ed25519 AAAA\n").unwrap_err().contains("line 2"));
        assert!(trusted("names=\"a ssh-ed25519 AAAA\n").unwrap_err().contains("names has no end"));
        for names in ["a*b", "a**", "*,*a"] {
            assert!(
                trusted(&format!("names=\"{names}\" ssh-ed25519 AAAA\n"))
                    .unwrap_err()
                    .contains("once, at the end")
            );
        }
    }
}
