//! `batchwright plugin sign` and `verify`

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use ssh_key::PrivateKey;

use crate::cli::Error;
use crate::cli::terminal::{put, write_output};
use crate::clock::Clock;
use crate::plugin::signature::{TrustedKeys, sign, statement};
use crate::plugin::{Files, plugin_name, read_secret, signature_file};

/// Make a key with `ssh-keygen -t ed25519 -f KEY`; its public half, KEY.pub, is what servers trust.
#[derive(Args)]
pub struct Sign {
    /// The plugin's TOML file; the signature lands beside it, in FILE.sig
    file: PathBuf,
    /// A private key as OpenSSH writes it (Ed25519 or ECDSA P-256)
    #[arg(long, value_name = "FILE", required_unless_present = "statement")]
    key: Option<PathBuf>,
    /// Where the key's passphrase is, if it has one: env:NAME or file:PATH
    #[arg(long, value_name = "SOURCE")]
    passphrase: Option<String>,
    /// Leave the file's serial as it is; a server refuses a signed file whose serial is lower than the one it loaded before
    #[arg(long)]
    keep_serial: bool,
    /// Print what is to be signed and sign nothing: for a key that lies elsewhere, with
    /// `ssh-keygen -Y sign -n batchwright-plugin`
    #[arg(long, conflicts_with_all = ["key", "passphrase"])]
    statement: bool,
}

/// Status 0 only if every file has a signature of one of the keys that fits.
#[derive(Args)]
pub struct Verify {
    /// TOML files of plugins
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// Public keys as OpenSSH writes them, one a line
    #[arg(long, env = "BATCHWRIGHT_TRUSTED_KEYS", value_name = "FILE", hide_env_values = true)]
    trusted_keys: PathBuf,
}

/// The files of a plugin, its name, and what is signed for them.
fn read(file: &Path) -> Result<(Files, String, String), Error> {
    if file.extension().is_none_or(|extension| extension != "toml") {
        let message = format!(
            "{} is no TOML file; a signature is of a plugin's TOML file and the component it names",
            file.display()
        );
        return Err(Error::Other(message));
    }
    let files = Files::read_any(file)?;
    let name = plugin_name(file)?;
    let statement = statement(&name, &files.text, &files.component.sha256);
    Ok((files, name, statement))
}

impl Sign {
    pub fn run(self) -> Result<ExitCode, Error> {
        let (files, _, mut statement) = read(&self.file)?;
        // Before anything is written: without a key the old signature stays good.
        let key = if self.statement { None } else { Some(self.read_key()?) };
        // What is printed to be signed elsewhere is of the file as it is, which is asked for more than once.
        let keeps = self.keep_serial || self.statement && files.manifest.serial > 0;
        if !keeps {
            let failed = |error| {
                Error::Other(format!(
                    "failed to write a serial into {}: {error}",
                    self.file.display()
                ))
            };
            set_serial(&files).map_err(failed)?;
            (_, _, statement) = read(&self.file)?;
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
        put!(
            "{statement}signed by {} in {}",
            key.fingerprint(ssh_key::HashAlg::Sha256),
            to.display()
        );
        Ok(ExitCode::SUCCESS)
    }

    fn read_key(&self) -> Result<PrivateKey, Error> {
        let Some(path) = &self.key else {
            return Err(Error::Other("say which key with --key".into()));
        };
        let unusable = |error: String| Error::Other(format!("the key {}: {error}", path.display()));
        let text =
            std::fs::read(path).map_err(|error| unusable(format!("cannot be read: {error}")))?;
        let key = PrivateKey::from_openssh(&text).map_err(|error| {
            unusable(format!("is no private key as OpenSSH writes it: {error}; give the private half; `ssh-keygen -t ed25519` makes a pair"))
        })?;
        match (key.is_encrypted(), &self.passphrase) {
            (false, _) => Ok(key),
            (true, None) => {
                Err(unusable("has a passphrase; say where it is with --passphrase".into()))
            }
            (true, Some(source)) => {
                let passphrase = read_secret(source)
                    .map_err(|error| Error::Other(format!("--passphrase: {error}")))?;
                key.decrypt(passphrase)
                    .map_err(|_| unusable("the passphrase does not open it".into()))
            }
        }
    }
}

/// Writes the time as the file's serial, which grows with each signature.
fn set_serial(files: &Files) -> std::io::Result<()> {
    let mut document: toml_edit::DocumentMut = files.text.parse().map_err(std::io::Error::other)?;
    let last = document.get("serial").and_then(toml_edit::Item::as_integer).unwrap_or(0);
    let serial = Clock::system().now().as_seconds().max(last.saturating_add(1));
    document.insert("serial", toml_edit::value(serial));
    write(&files.file, document.to_string().as_bytes())
}

/// Puts a new file in the place of what is there, a link to somewhere else included.
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
    pub fn run(self) -> Result<ExitCode, Error> {
        let keys = TrustedKeys::read(&self.trusted_keys).map_err(Error::Other)?;
        let mut all_well = true;
        for file in &self.files {
            let verified = read(file).map_err(|error| error.to_string()).and_then(
                |(files, name, statement)| {
                    keys.verify(&name, &statement, files.signature.as_deref())
                        .map_err(|message| format!("{}: signature: {message}", file.display()))
                },
            );
            match verified {
                Ok(signer) => put!("ok      {} signed by {signer}", file.display()),
                Err(problem) => {
                    all_well = false;
                    put!("failed  {problem}");
                }
            }
        }
        Ok(if all_well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}
