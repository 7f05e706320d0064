//! `batchwright plugin pull`: fetches a component from an OCI registry.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use batchwright_plugin::types::Kind;
use batchwright_plugin::{
    ComponentFile, Inspected, MAX_COMPONENT_BYTES, plugin_name, read_secret, sha256,
};
use bytes::Bytes;
use clap::Args;
use docker_credential::DockerCredential;
use oci_client::Reference;
use oci_client::manifest::{OciDescriptor, OciImageManifest, OciManifest};

use super::registry::{Login, Registry};
use super::{LoaderArgs, show};
use crate::cli::terminal::{outln, write_output};
use crate::error::Error;

/// Media types of a component layer: that of the CNCF "Wasm OCI Artifact layout", and older types.
const COMPONENT_TYPES: [&str; 3] = [
    "application/wasm",
    "application/vnd.wasm.content.layer.v1+wasm",
    "application/vnd.bytecodealliance.wasm.component.layer.v0+wasm",
];

/// Timeout of a complete pull.
const PULL_TIMEOUT: Duration = Duration::from_secs(600);

/// Arguments of `batchwright plugin pull`.
///
/// The file name of the component has its digest, so that a component in use is never overwritten.
/// A TOML file that pins the component is written beside it with `enabled = false`. An existing
/// TOML file stays as it is, and the command prints the lines to change.
#[derive(Args)]
pub struct Pull {
    /// Component to fetch: REGISTRY/REPOSITORY:TAG or REGISTRY/REPOSITORY@sha256:DIGEST
    #[arg(value_name = "REF")]
    reference: String,
    /// Plugin folder
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
    /// Name of the plugin and of its TOML file [default: the last part of the repository]
    #[arg(long)]
    name: Option<String>,
    /// User of the registry [default: the user of `docker login`]
    #[arg(long, requires = "password")]
    username: Option<String>,
    /// Source of the password or token: env:NAME or file:PATH
    #[arg(long, value_name = "SOURCE", requires = "username")]
    password: Option<String>,
    /// Host of a token service, besides the registry's own, that the password may be sent to; can
    /// be given several times
    #[arg(long, value_name = "HOST")]
    auth_host: Vec<String>,
    /// Use HTTP without TLS, for a registry in your own network
    #[arg(long)]
    plain_http: bool,
    #[command(flatten)]
    given: LoaderArgs,
}

impl Pull {
    /// Fetches and inspects the component, then writes it and its TOML file to the plugin folder.
    pub async fn run(self) -> Result<ExitCode, Error> {
        let failed =
            |message: String| Error::Other(format!("failed to pull {}: {message}", self.reference));
        let reference: Reference = self.reference.parse().map_err(|error| {
            failed(format!(
                "{error}; write REGISTRY/REPOSITORY:TAG or REGISTRY/REPOSITORY@sha256:DIGEST"
            ))
        })?;
        let name = self
            .name
            .as_deref()
            .or_else(|| reference.repository().rsplit('/').next())
            .unwrap_or_default();
        let manifest = PathBuf::from(format!("{name}.toml"));
        if plugin_name(&manifest)? != name {
            return Err(failed(format!(
                "`{}` is not a plugin name; choose a name with --name",
                name.escape_debug()
            )));
        }
        if !self.to.is_dir() {
            return Err(failed(format!(
                "there is no folder {}; create it, or name another folder with --to",
                self.to.display()
            )));
        }
        let (bytes, digest) = tokio::time::timeout(PULL_TIMEOUT, self.fetch(&reference))
            .await
            .unwrap_or_else(|_| Err(format!("the pull takes longer than {PULL_TIMEOUT:?}")))
            .map_err(failed)?;
        let exact = reference.clone_with_digest(digest);
        // The temporary name keeps an invalid component from being loaded.
        let unwritable = |error: std::io::Error| {
            failed(format!("failed to write to {}: {error}", self.to.display()))
        };
        let mut file = tempfile::Builder::new()
            .suffix(".partial")
            .tempfile_in(&self.to)
            .map_err(unwritable)?;
        std::io::Write::write_all(&mut file, &bytes).map_err(unwritable)?;
        file.as_file().sync_all().map_err(unwritable)?;
        let sha256 = sha256(&bytes);
        drop(bytes);
        let inspected = self.given.loader_of_components()?.inspect(file.path()).await?;
        if inspected.sha256 != sha256 {
            return Err(failed(format!(
                "another process changed the component in {}; run the command again",
                self.to.display()
            )));
        }
        let short = sha256.get(..16).unwrap_or_default();
        let component = format!("{name}-{short}.wasm");
        let path = self.to.join(&component);
        let exists = ComponentFile::read(&path).is_ok_and(|existing| existing.sha256 == sha256);
        if !exists {
            file.persist_noclobber(&path).map_err(|error| unwritable(error.error))?;
        }
        // A temporary file has mode 0600, but the user of the server must read the component.
        make_world_readable(&path).map_err(unwritable)?;
        let manifest = self.to.join(manifest);
        let text = manifest_text(&exact, &component, &inspected);
        let written = match std::fs::OpenOptions::new().write(true).create_new(true).open(&manifest)
        {
            Ok(mut file) => std::io::Write::write_all(&mut file, text.as_bytes())
                .map(|()| true)
                .map_err(unwritable)?,
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => false,
            Err(error) => return Err(unwritable(error)),
        };
        report(&exact, &path, &manifest, written, &component, &inspected);
        Ok(ExitCode::SUCCESS)
    }

    /// Fetches the manifest and the component; returns the component and the manifest's digest.
    async fn fetch(&self, reference: &Reference) -> Result<(Bytes, String), String> {
        let (host, repository) = (reference.resolve_registry(), reference.repository());
        let mut registry = Registry::new(
            host,
            repository,
            self.plain_http,
            self.login(reference)?,
            self.auth_host.clone(),
        )?;
        let wanted = reference.digest().or_else(|| reference.tag()).unwrap_or("latest");
        let (manifest, digest) = registry.manifest(wanted).await?;
        let manifest: OciManifest = serde_json::from_slice(&manifest)
            .map_err(|error| format!("its manifest is not valid: {error}"))?;
        let OciManifest::Image(manifest) = manifest else {
            return Err("it is an index of several images; name one of them by its digest".into());
        };
        // The layer is always fetched from this registry; its `urls` are ignored.
        let layer = component_layer(&manifest)?;
        if u64::try_from(layer.size).map_or(true, |size| size > MAX_COMPONENT_BYTES) {
            return Err(format!("its component is larger than {MAX_COMPONENT_BYTES} bytes"));
        }
        let max_bytes = usize::try_from(MAX_COMPONENT_BYTES).unwrap_or(usize::MAX);
        Ok((registry.blob(&layer.digest, max_bytes).await?, digest))
    }

    /// Returns the credentials of the arguments, else those of `docker login`, else none.
    fn login(&self, reference: &Reference) -> Result<Option<Login>, String> {
        if let (Some(username), Some(password)) = (&self.username, &self.password) {
            let password = read_secret(password).map_err(|error| format!("--password: {error}"))?;
            return Ok(Some(Login { username: username.clone(), password }));
        }
        match docker_credential::get_credential(reference.resolve_registry()) {
            Ok(DockerCredential::UsernamePassword(username, password)) => {
                Ok(Some(Login { username, password }))
            }
            Ok(DockerCredential::IdentityToken(_)) => {
                Err("`docker login` stored an identity token, \
                 which is not supported; use --username and --password"
                    .into())
            }
            // Without credentials the request is anonymous, and a private registry refuses it.
            Err(_) => Ok(None),
        }
    }
}

/// Returns the layer that is a component; fails unless there is exactly one.
fn component_layer(manifest: &OciImageManifest) -> Result<&OciDescriptor, String> {
    let is_component =
        |layer: &&OciDescriptor| COMPONENT_TYPES.contains(&layer.media_type.as_str());
    let mut found = manifest.layers.iter().filter(is_component);
    match (found.next(), found.next()) {
        (Some(layer), None) => Ok(layer),
        (Some(_), Some(_)) => {
            Err("it has several layers of WebAssembly, but a plugin has one".into())
        }
        (None, _) => {
            let types: Vec<&str> =
                manifest.layers.iter().map(|layer| layer.media_type.as_str()).collect();
            let types = if types.is_empty() { "none".to_owned() } else { types.join(", ") };
            Err(format!("no layer of it is a component (application/wasm); its layers are {types}"))
        }
    }
}

/// Returns the text of a new TOML file, which is disabled until the operator reviews it.
fn manifest_text(exact: &Reference, component: &str, inspected: &Inspected) -> String {
    let description = &inspected.description;
    let one_line = |text: &str| text.replace(|character: char| character.is_control(), " ");
    let mut text = format!(
        "# {} {}: {}\n\
         # From {exact}\n\
         component = \"{component}\"\n\
         sha256 = \"{}\"\n\
         enabled = false  # review the rest, then delete this line\n",
        one_line(&description.name),
        description.version,
        one_line(&description.summary),
        inspected.sha256,
    );
    if inspected.kind == Kind::Adapter {
        text.push_str("models = []  # models to serve\n");
    }
    let properties =
        description.settings_schema.get("properties").and_then(|found| found.as_object());
    for (place, (name, schema)) in properties.into_iter().flatten().enumerate() {
        if place == 0 {
            text.push_str("\n[settings]\n");
        }
        let about = schema.get("description").and_then(|about| about.as_str()).unwrap_or_default();
        text.push_str(&format!("# {} = …  # {}\n", one_line(name), one_line(about)));
    }
    for (place, need) in description.credentials.iter().enumerate() {
        if place == 0 {
            text.push_str("\n[credentials]\n");
        }
        let required = if need.required { "required" } else { "optional" };
        text.push_str(&format!(
            "# {} = \"env:NAME\"  # {required}, sent as `{}`\n",
            one_line(&need.name),
            need.header
        ));
    }
    text
}

/// Sets the mode of a file to 0644.
fn make_world_readable(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644))
}

/// Prints the component and the next step for its TOML file.
fn report(
    exact: &Reference,
    path: &Path,
    manifest: &Path,
    written: bool,
    component: &str,
    inspected: &Inspected,
) {
    outln!("pulled {exact}");
    write_output(format_args!("{}", show::describe(path, inspected)));
    let manifest = manifest.display();
    if written {
        outln!(
            "\n{manifest} pins the component and is disabled: review it, \
             then delete `enabled = false`."
        );
    } else {
        outln!("\n{manifest} stays as it is. To use this component, set in the file:\n");
        outln!("component = \"{component}\"\nsha256 = \"{}\"", inspected.sha256);
    }
}
