//! `batchwright plugin sign` and `verify`: sign and verify a TOML file with its component.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use batchwright_plugin::signature::{TrustedKeys, sign, statement};
use batchwright_plugin::{ComponentFolders, Files, plugin_name, read_secret, signature_file};
use clap::Args;
use ssh_key::PrivateKey;

use crate::cli::terminal::{outln, write_output};
use crate::clock::Clock;
use crate::error::Error;

/// Arguments of `batchwright plugin sign`.
///
/// `ssh-keygen -t ed25519 -f KEY` creates a key; servers trust its public half, `KEY.pub`.
#[derive(Args)]
pub struct Sign {
    /// TOML file of the plugin; the signature is written to FILE.sig
    file: PathBuf,
    /// Private key in OpenSSH format (Ed25519 or ECDSA P-256)
    #[arg(long, value_name = "FILE", required_unless_present = "statement")]
    key: Option<PathBuf>,
    /// Source of the key's passphrase: env:NAME or file:PATH
    #[arg(long, value_name = "SOURCE")]
    passphrase: Option<String>,
    /// Keep the serial of the file; a server rejects a signed file with a lower serial than that of
    /// the file it loaded before
    #[arg(long)]
    keep_serial: bool,
    /// Print the statement to sign instead of signing it, for a key that is elsewhere; sign the
    /// statement with `ssh-keygen -Y sign -n batchwright-plugin`
    #[arg(long, conflicts_with_all = ["key", "passphrase"])]
    statement: bool,
    #[command(flatten)]
    components: Components,
}

/// Where components are.
#[derive(Args)]
struct Components {
    /// Folders where a component is looked up that is not beside its plugin file, separated by
    /// commas
    #[arg(long, env = "BATCHWRIGHT_COMPONENTS", value_delimiter = ',', value_name = "LIST")]
    components: Vec<PathBuf>,
}

impl Components {
    fn folders(&self) -> ComponentFolders {
        ComponentFolders::new(self.components.iter().cloned())
    }
}

/// Arguments of `batchwright plugin verify`.
#[derive(Args)]
pub struct Verify {
    /// TOML files of plugins
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// File of public keys in OpenSSH format, one per line
    #[arg(long, env = "BATCHWRIGHT_TRUSTED_KEYS", value_name = "FILE", hide_env_values = true)]
    trusted_keys: PathBuf,
    #[command(flatten)]
    components: Components,
}

/// Reads the files of a plugin; returns them with the plugin's name and the statement to sign.
fn read(file: &Path, components: &Components) -> Result<(Files, String, String), Error> {
    if file.extension().is_none_or(|extension| extension != "toml") {
        let message = format!(
            "{} is not a TOML file; \
             give the TOML file of a plugin, which is signed together with its component",
            file.display()
        );
        return Err(Error::Other(message));
    }
    let files = Files::read_any(file, &components.folders())?;
    let name = plugin_name(file)?;
    let statement = statement(&name, &files.text, &files.component.sha256);
    Ok((files, name, statement))
}

impl Sign {
    /// Writes a new serial, signs the statement and writes the signature file.
    pub fn run(self) -> Result<ExitCode, Error> {
        let (files, _, mut statement) = read(&self.file, &self.components)?;
        // The key is opened before anything is written: on failure the old signature stays valid.
        let key = if self.statement { None } else { Some(self.read_key()?) };
        // A printed statement must be the same each time, so it keeps an existing serial.
        let keep_serial = self.keep_serial || self.statement && files.manifest.serial > 0;
        if !keep_serial {
            let failed = |error| {
                Error::Other(format!(
                    "failed to write a serial into {}: {error}",
                    self.file.display()
                ))
            };
            set_serial(&files).map_err(failed)?;
            (_, _, statement) = read(&self.file, &self.components)?;
        }
        let Some(key) = key else {
            write_output(format_args!("{statement}"));
            return Ok(ExitCode::SUCCESS);
        };
        let signature =
            sign(&key, &statement).map_err(|error| Error::Other(format!("the key: {error}")))?;
        let to = signature_file(&self.file);
        let failed = |error| Error::Other(format!("failed to write {}: {error}", to.display()));
        write(&to, signature.as_bytes()).map_err(failed)?;
        outln!(
            "{statement}signed by {} in {}",
            key.fingerprint(ssh_key::HashAlg::Sha256),
            to.display()
        );
        Ok(ExitCode::SUCCESS)
    }

    /// Reads the private key and decrypts it with the passphrase, if it has one.
    fn read_key(&self) -> Result<PrivateKey, Error> {
        let Some(path) = &self.key else {
            return Err(Error::Other("no key given; name it with --key".into()));
        };
        let unusable = |error: String| Error::Other(format!("the key {}: {error}", path.display()));
        let text =
            std::fs::read(path).map_err(|error| unusable(format!("cannot be read: {error}")))?;
        let key = PrivateKey::from_openssh(&text).map_err(|error| {
            unusable(format!(
                "is not a private key in OpenSSH format: {error}; \
                 give the private half; `ssh-keygen -t ed25519` creates a pair"
            ))
        })?;
        match (key.is_encrypted(), &self.passphrase) {
            (false, _) => Ok(key),
            (true, None) => {
                Err(unusable("has a passphrase; give its source with --passphrase".into()))
            }
            (true, Some(source)) => {
                let passphrase = read_secret(source)
                    .map_err(|error| Error::Other(format!("--passphrase: {error}")))?;
                key.decrypt(passphrase).map_err(|_| unusable("the passphrase is wrong".into()))
            }
        }
    }
}

/// Writes a serial into the TOML file: the Unix time, or the last serial plus 1 if that is greater.
fn set_serial(files: &Files) -> std::io::Result<()> {
    let mut document: toml_edit::DocumentMut = files.text.parse().map_err(std::io::Error::other)?;
    let last = document.get("serial").and_then(toml_edit::Item::as_integer).unwrap_or(0);
    let serial = Clock::system().now().as_seconds().max(last.saturating_add(1));
    document.insert("serial", toml_edit::value(serial));
    write(&files.file, document.to_string().as_bytes())
}

/// Writes a file atomically with mode 0644; a link at the path is replaced, not followed.
fn write(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let folder =
        path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(bytes)?;
    file.as_file().set_permissions(std::fs::Permissions::from_mode(0o644))?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}

impl Verify {
    /// Verifies each file and prints the result; success requires that every signature is valid.
    pub fn run(self) -> Result<ExitCode, Error> {
        let keys = TrustedKeys::read(&self.trusted_keys).map_err(Error::Other)?;
        let mut all_valid = true;
        for file in &self.files {
            let verified = read(file, &self.components)
                .map_err(|error| error.to_string())
                .and_then(|(files, name, statement)| {
                    keys.verify(&name, &statement, files.signature.as_deref())
                        .map_err(|message| format!("{}: signature: {message}", file.display()))
                });
            match verified {
                Ok(signer) => outln!("ok      {} signed by {signer}", file.display()),
                Err(error) => {
                    all_valid = false;
                    outln!("failed  {error}");
                }
            }
        }
        Ok(if all_valid { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}
