//! Inspection of a component: its kind, its contract and its description.

use std::path::Path;
use std::sync::Arc;

use batchwright_domain::text::printable;
use batchwright_egress::is_host_header;
use wasmtime::Engine;
use wasmtime::component::{Component, Linker};

use crate::contract::types::{Description, Kind};
use crate::contract::world;
use crate::error::LoadError;
use crate::load::{Loader, MAX_MESSAGE_CHARS};
use crate::package::files::ComponentFile;
use crate::package::limits::Limits;
use crate::package::schema;
use crate::plugin::explain::explain;
use crate::sandbox::engine::EngineKind;
use crate::sandbox::instance::{
    self, CpuTimeExceeded, DeadlineExceeded, Instance, State, Template, in_time,
};
use crate::sandbox::log::PluginLog;

/// Engine and the linker with the host's interfaces.
#[derive(Clone)]
pub(crate) struct Runtime {
    engine: Engine,
    linker: Linker<State>,
}

/// Properties of a component that do not depend on settings.
pub struct Inspected {
    /// Kind of plugin that the component implements.
    pub kind: Kind,
    /// Version of the plugin contract.
    pub version: &'static str,
    /// Checked result of `describe`.
    pub description: Description,
    /// Names of the imported interfaces.
    pub imports: Vec<String>,
    /// SHA-256 digest of the component in hexadecimal.
    pub sha256: String,
    /// Size of the component in bytes.
    pub size: usize,
    pub(super) component: Arc<Component>,
    pub(super) template: Template,
    pub(super) engine: Engine,
    pub(super) log: Arc<PluginLog>,
}

impl Runtime {
    pub(super) fn start(engine_kind: EngineKind) -> Result<Self, String> {
        let engine = crate::sandbox::engine::start(engine_kind)?;
        let linker =
            instance::linker(&engine, engine_kind).map_err(|error| format!("{error:#}"))?;
        Ok(Self { engine, linker })
    }
}

/// Determines the kind of a component from its exports, and links its imports.
fn template(
    engine: &Engine,
    linker: &Linker<State>,
    component: &Component,
) -> Result<(Kind, Template), String> {
    let exports: Vec<String> =
        component.component_type().exports(engine).map(|(name, _)| name.to_owned()).collect();
    let kind = world::kind_of(&exports)?;
    let linked = linker.instantiate_pre(component).map_err(|error| {
        format!(
            "imports an interface that the host does not provide: {error:#}; plugins may import \
             WASI 0.2 and 0.3 (as an empty world) and batchwright:plugin/logging"
        )
    })?;
    let template = Template::new(linked, kind, &exports).map_err(|error| {
        format!(
            "an export does not match the contract: {error:#}. Rebuild it with the contract of \
             this version."
        )
    })?;
    Ok((kind, template))
}

/// Checks that the bytes begin like a component. Errors name the common mistakes.
fn check_header(bytes: &[u8]) -> Result<(), String> {
    match (bytes.get(..4), bytes.get(4..8)) {
        (Some(b"\0asm"), Some([0x0d, 0, 1, 0])) => Ok(()),
        (Some(b"\0asm"), Some([1, 0, 0, 0])) => {
            Err("is a core WebAssembly module, not a component; wrap it with `wasm-tools \
                 component new`"
                .into())
        }
        (Some(b"\0asm"), _) => {
            Err("is WebAssembly of an unknown version; build it as a component".into())
        }
        (Some(b"\x7fELF"), _) => {
            Err("is compiled code; the host accepts only portable components and compiles them \
                 itself"
                .into())
        }
        _ => Err("is no WebAssembly component (give a .wasm file); it may be damaged or cut short"
            .into()),
    }
}

/// Checks the result of `describe`, and bounds and cleans its text.
fn check_description(
    mut description: Description,
    settings: &str,
    kind: Kind,
) -> Result<Description, String> {
    let Description { name, version, summary, endpoints, credentials, .. } = &mut description;
    *name = printable(name, 65);
    if name.is_empty() || name.chars().count() > 64 {
        return Err("the name must have 1 to 64 characters".into());
    }
    *version = printable(version, 100);
    semver::Version::parse(version)
        .map_err(|error| format!("the version `{version}` is not a semantic version: {error}"))?;
    *summary = printable(summary, 200);
    if endpoints.len() > 100 || credentials.len() > 100 {
        return Err("it names more than 100 endpoints or credentials".into());
    }
    for endpoint in endpoints {
        *endpoint = printable(endpoint, 200);
    }
    if kind == Kind::Validator && !credentials.is_empty() {
        return Err("a validator makes no exchanges and has no credentials".into());
    }
    for need in credentials {
        let fits =
            |letter: char| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == '_';
        if need.name.is_empty() || need.name.len() > 64 || !need.name.chars().all(fits) {
            return Err(format!(
                "`{}` is not a valid credential name; use at most 64 lower-case letters, digits \
                 and `_`",
                need.name
            ));
        }
        let header = http::HeaderName::try_from(need.header.as_str());
        let Some(header) = header.ok().filter(|header| !is_host_header(header)) else {
            return Err(format!(
                "the credential `{}` cannot go into the header `{}`",
                need.name, need.header
            ));
        };
        need.header = header.as_str().to_owned();
        need.prefix = printable(&need.prefix, 100);
    }
    description.settings_schema = schema::parse(settings)?;
    Ok(description)
}

impl Loader {
    /// Compiles a component and returns its checked description, without settings.
    pub async fn inspect(&self, component: &Path) -> Result<Inspected, LoadError> {
        let name = component
            .file_stem()
            .map_or_else(String::new, |stem| stem.to_string_lossy().into_owned());
        self.inspect_with(ComponentFile::read(component)?, &name, &Limits::default()).await
    }

    pub(super) async fn inspect_with(
        &self,
        file: ComponentFile,
        name: &str,
        limits: &Limits,
    ) -> Result<Inspected, LoadError> {
        let ComponentFile { path, bytes, sha256 } = file;
        // The messages may contain text of the component.
        let failed = |message: String| LoadError::Component {
            component: path.clone(),
            message: printable(&message, MAX_MESSAGE_CHARS),
        };
        check_header(&bytes).map_err(failed)?;
        let size = bytes.len();
        let engine_kind = EngineKind::of(&bytes);
        let Runtime { engine, linker } = self.runtime(engine_kind).map_err(failed)?;
        let began = std::time::Instant::now();
        let compiled = self.compiler.component(&engine, engine_kind, &sha256, &bytes).await;
        self.instances.metrics.compiled(compiled.is_ok(), began.elapsed());
        let component = compiled.map_err(failed)?;
        drop(bytes);
        let imports: Vec<String> =
            component.component_type().imports(&engine).map(|(name, _)| name.to_owned()).collect();
        let (kind, template) = template(&engine, &linker, &component).map_err(failed)?;
        let log = Arc::new(PluginLog::new(name));
        let holder = format!("{name}/").into();
        let (created, refused) =
            Instance::new(&template, &engine, limits, &log, (&self.instances, &holder)).await;
        let (refused, said) = refused;
        let error = |function, error: &wasmtime::Error, refused| {
            explain(name, limits, function, error, refused, &said).detail()
        };
        let mut instance = created.map_err(|found| {
            let message = error("instantiate", &found, refused);
            // Any other failure means that the types of the exports differ from the contract.
            let is_runtime_failure = refused.is_some()
                || found.is::<wasmtime::Trap>()
                || found.is::<CpuTimeExceeded>()
                || found.is::<DeadlineExceeded>()
                // The instance pool is exhausted, which is no fault of the component.
                || found.is::<wasmtime::PoolConcurrencyLimitError>();
            failed(if is_runtime_failure {
                message
            } else {
                format!(
                    "an export does not match the contract: {found:#}. Rebuild it with the \
                     contract of this version."
                )
            })
        })?;
        instance.allow(limits, 1);
        let waited = instance.waited.clone();
        let described =
            in_time(limits, 1, &waited, instance.exports.describe(&mut instance.store)).await;
        let (description, schema) =
            described.map_err(|found| failed(error("describe", &found, instance.refused())))?;
        let description = check_description(description, &schema, kind)
            .map_err(|message| failed(format!("`describe`: {message}")))?;
        Ok(Inspected {
            kind,
            version: world::VERSION,
            description,
            imports,
            sha256,
            size,
            component,
            template,
            engine,
            log,
        })
    }

    /// Returns the runtime of a flavor, which is started on first use.
    fn runtime(&self, engine_kind: EngineKind) -> Result<Runtime, String> {
        if engine_kind == EngineKind::Plain {
            return Ok(self.plain.clone());
        }
        if let Some(runtime) = self.concurrent.get() {
            return Ok(runtime.clone());
        }
        let runtime = Runtime::start(engine_kind)?;
        Ok(self.concurrent.get_or_init(|| runtime).clone())
    }
}
