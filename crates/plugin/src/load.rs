//! LoaderConfig of a plugin from its TOML file: read, verify, compile, link, describe, check, configure.
//!
//! Components come from third parties, so every step distrusts its input:
//! - The signature, the serial and the pinned digest are verified before any code is compiled.
//! - Compilation runs in a separate process with a timeout and a memory limit.
//! - `describe` and `configure` run in an instance with the plugin's limits.
//! - Text of the component is bounded and cleaned before it is shown to people.
//! - Only URLs that the operator wrote in the TOML file extend the list of allowed hosts. A default
//!   of the component's settings schema does not.
//!
//! A load builds the whole plugin before it returns. So a failure at any step leaves the plugin
//! that serves under this name untouched.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use crate::package::routing::Routing;
use batchwright_domain::clock::Clock;
use batchwright_domain::endpoint::Endpoint;
use batchwright_domain::ids::TenantId;
use batchwright_domain::text::printable;
use batchwright_domain::units::{Size, Span};
use batchwright_egress::{AllowList, ExchangeLimits, Gateway, Resolver, Shared, is_host_header};
use batchwright_memory::Memory;
use serde_json::Value;
use tokio::sync::{Semaphore, SemaphorePermit};
use url::Url;
use wasmtime::Engine;
use wasmtime::component::{Component, InstancePre, Linker};

use crate::compile::Compiler;
use crate::compile::cache::Cache;
use crate::contract::bindings::v0_1;
use crate::contract::types::{Description, Kind};
use crate::error::LoadError;
use crate::package::credentials::secrets;
use crate::package::files::{ComponentFile, Files};
use crate::package::manifest::{Limits, Manifest};
use crate::package::schema;
use crate::package::signature::TrustedKeys;
use crate::package::trust::Trust;
use crate::plugin::{Plugin, PluginFacts, PluginRuntime, explain};
use crate::sandbox::engine::EngineKind;
use crate::sandbox::instance::{
    self, CpuTimeExceeded, DeadlineExceeded, Instance, State, Template, in_time,
};
use crate::sandbox::instances::Instances;
use crate::sandbox::log::PluginLog;

/// Maximum length of an error message about a component, in characters.
const MAX_MESSAGE_CHARS: usize = 2000;

/// Maximum number of plugins that are read and loaded at the same time.
const MAX_CONCURRENT_LOADS: usize = 8;

/// Options for loading plugins, set by the operator.
#[derive(Clone)]
pub struct LoaderConfig {
    /// Folder of compiled components.
    pub cache: PathBuf,
    /// Time limit of one compilation.
    pub compile_timeout: Span,
    /// Memory limit of one compilation.
    pub compile_memory: Size,
    /// Keys that plugins must be signed with; None if unsigned plugins are loaded too.
    pub trusted_keys: Option<TrustedKeys>,
    /// File of the serials of signed plugins; None keeps them in memory only.
    pub serials: Option<PathBuf>,
    /// File of the order of plugins; None keeps it in memory only.
    pub order: Option<PathBuf>,
    /// Compiler program, if it is not the running program.
    pub compiler: Option<PathBuf>,
    /// Memory pools that instances and exchanges reserve from.
    pub memory: Memory,
}

/// Loader of plugins, with the engines, the compiler and the state that all plugins share.
pub struct Loader {
    plain: Runtime,
    /// Started when the first component needs it.
    concurrent: OnceLock<Runtime>,
    compiler: Compiler,
    pub(crate) trust: Trust,
    pub(crate) order_file: Option<PathBuf>,
    /// Permits to load a plugin. Each load holds its component in memory.
    permits: Semaphore,
    instances: Arc<Instances>,
    shared: Shared,
    clock: Clock,
}

/// Engine and the linker with the host's interfaces.
#[derive(Clone)]
struct Runtime {
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
    component: Arc<Component>,
    template: Template,
    engine: Engine,
    log: Arc<PluginLog>,
}

impl Runtime {
    fn start(flavour: EngineKind) -> Result<Self, String> {
        let engine = crate::sandbox::engine::start(flavour)?;
        let linker = instance::linker(&engine, flavour).map_err(|error| format!("{error:#}"))?;
        Ok(Self { engine, linker })
    }
}

impl Loader {
    /// Starts the engine and opens the cache and the state files.
    pub fn new(loading: LoaderConfig, clock: Clock) -> Result<Self, LoadError> {
        let failed = |message: String| LoadError::Component {
            component: PathBuf::from("wasmtime"),
            message,
        };
        let LoaderConfig {
            cache,
            compile_timeout,
            compile_memory,
            trusted_keys,
            serials,
            order,
            compiler,
            memory,
        } = loading;
        let compiler =
            Compiler::new(Cache::open(&cache), compiler, compile_timeout, compile_memory);
        let (concurrent, permits) = (OnceLock::new(), Semaphore::new(MAX_CONCURRENT_LOADS));
        Ok(Self {
            plain: Runtime::start(EngineKind::Plain).map_err(failed)?,
            concurrent,
            compiler,
            trust: Trust::open(trusted_keys, serials).map_err(failed)?,
            order_file: order,
            permits,
            instances: Instances::start(memory.instances),
            shared: Shared { exchanges: memory.exchanges, resolver: Resolver::default() },
            clock,
        })
    }

    /// Waits for a permit to read and load one plugin.
    pub async fn permit(&self) -> Option<SemaphorePermit<'_>> {
        // The semaphore is never closed, so the result is never None.
        self.permits.acquire().await.ok()
    }

    /// Loads the plugin of a TOML file.
    pub async fn load(&self, file: &Path) -> Result<Plugin, LoadError> {
        self.load_files(read_off_thread(file, Files::read).await?).await
    }

    /// Loads a plugin for tests without exchanges: a missing secret is replaced by a placeholder.
    pub async fn load_to_test(&self, file: &Path) -> Result<Plugin, LoadError> {
        self.load_with(read_off_thread(file, Files::read).await?, Some("not-a-secret")).await
    }

    /// Checks that a file may disable its plugin: if signatures are required, the file must be
    /// signed.
    pub async fn check_disabled(&self, file: &Path) -> Result<(), LoadError> {
        if !self.trust.is_required() {
            return Ok(());
        }
        let files = read_off_thread(file, Files::read_any).await?;
        let name = plugin_name(file)?;
        let signed = self.trust.verify(&name, &files)?;
        self.trust.record_loaded(&name, signed.as_ref());
        Ok(())
    }

    /// Loads a plugin from files that were read before.
    pub async fn load_files(&self, files: Files) -> Result<Plugin, LoadError> {
        self.load_with(files, None).await
    }

    async fn load_with(
        &self,
        files: Files,
        placeholder: Option<&str>,
    ) -> Result<Plugin, LoadError> {
        let name = plugin_name(&files.file)?;
        let signed = self.trust.verify(&name, &files)?;
        let Files { file, mut manifest, component, .. } = files;
        let key = |key: &str, message: String| LoadError::Key {
            file: file.clone(),
            key: key.into(),
            message,
        };
        if let Some(pinned) = &manifest.sha256
            && !pinned.eq_ignore_ascii_case(&component.sha256)
        {
            return Err(key(
                "sha256",
                format!(
                    "the component has {}, not {pinned}; check where it comes from before you \
                     change the pin",
                    component.sha256
                ),
            ));
        }
        let inspected = self.inspect_with(component, &name, &manifest.limits).await?;
        check_kind(&manifest, &inspected, &key)?;
        // Collected before the defaults are added: only URLs of the operator allow a host.
        let urls: Vec<Url> = manifest.settings.values().flat_map(urls_in).collect();
        schema::add_defaults(&mut manifest.settings, &inspected.description.settings_schema);
        let settings = Value::Object(std::mem::take(&mut manifest.settings));
        schema::check(&settings, &inspected.description.settings_schema).map_err(
            |(place, message)| {
                key(&format!("settings{place}"), printable(&message, MAX_MESSAGE_CHARS))
            },
        )?;
        let secrets = secrets(&manifest, &inspected.description, &file, &urls, placeholder, &key)?;
        let allow = AllowList::new(file.display().to_string(), &urls, &manifest.allow)
            .map_err(|error| key("allow", error.to_string()))?;
        allow.check_addresses(&urls).map_err(|error| key("settings", error))?;
        let gateway = Gateway::new(&name, allow, secrets, bounds(&manifest.limits), &self.shared);
        let default_models = default_models(&manifest, &key)?;
        let facts = PluginFacts {
            name,
            kind: inspected.kind,
            description: inspected.description,
            sha256: inspected.sha256,
            signed,
            limits: manifest.limits,
            routing: Routing {
                order: manifest.order.unwrap_or(100),
                endpoints: manifest.endpoints,
                tenants: manifest.tenants.into_iter().map(TenantId::from).collect(),
                models: manifest.models,
                aliases: manifest.aliases,
                default_models,
                paused: manifest.paused,
            },
            loaded_at: self.clock.now().as_seconds(),
            settings: settings.to_string(),
        };
        let runtime = PluginRuntime {
            _component: inspected.component,
            template: inspected.template,
            engine: inspected.engine,
            log: inspected.log,
            gateway,
            instances: self.instances.clone(),
        };
        let plugin = Plugin::new(facts, runtime);
        // Proves that `configure` accepts the settings. The instance belongs to no tenant.
        let configured = plugin.instantiate(&plugin.holder(None)).await;
        configured
            .map_err(|error| key("settings", printable(&error.detail(), MAX_MESSAGE_CHARS)))?;
        self.trust.record_loaded(plugin.name(), plugin.signature());
        Ok(plugin)
    }

    /// Compiles a component and returns its checked description, without settings.
    pub async fn inspect(&self, component: &Path) -> Result<Inspected, LoadError> {
        let name = component
            .file_stem()
            .map_or_else(String::new, |stem| stem.to_string_lossy().into_owned());
        self.inspect_with(ComponentFile::read(component)?, &name, &Limits::default()).await
    }

    async fn inspect_with(
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
        let flavour = EngineKind::of(&bytes);
        let Runtime { engine, linker } = self.runtime(flavour).map_err(failed)?;
        let component =
            self.compiler.component(&engine, flavour, &sha256, &bytes).await.map_err(failed)?;
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
            version: "0.1.0",
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
    fn runtime(&self, flavour: EngineKind) -> Result<Runtime, String> {
        if flavour == EngineKind::Plain {
            return Ok(self.plain.clone());
        }
        if let Some(runtime) = self.concurrent.get() {
            return Ok(runtime.clone());
        }
        let runtime = Runtime::start(flavour)?;
        Ok(self.concurrent.get_or_init(|| runtime).clone())
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
    let has = |interface: &str| exports.iter().any(|name| same_interface(name, interface));
    let kind = match (has(v0_1::VALIDATION), has(v0_1::INFERENCE)) {
        (true, false) => Kind::Validator,
        (false, true) => Kind::Adapter,
        (true, true) => {
            return Err(
                "exports both `validation` and `inference`; a plugin is one or the other".into()
            );
        }
        (false, false) => {
            return Err(format!(
                "exports {}, where a plugin exports {} or {}; build it for the world `validator` \
                 or `adapter` of batchwright:plugin@0.1.0",
                list(&exports),
                v0_1::VALIDATION,
                v0_1::INFERENCE,
            ));
        }
    };
    if !has(v0_1::PLUGIN) {
        return Err(format!("exports {}, but not {}", list(&exports), v0_1::PLUGIN));
    }
    let linked = linker.instantiate_pre(component).map_err(|error| {
        format!(
            "imports an interface that the host does not provide: {error:#}; plugins may import \
             WASI 0.2 and 0.3 (as an empty world) and batchwright:plugin/logging"
        )
    })?;
    let template = match kind {
        Kind::Validator => v0_1::validator::ValidatorPre::new(linked).map(Template::Validator),
        Kind::Adapter => adapter(linked, has(v0_1::CLASSIFICATION)),
    };
    let template = template.map_err(|error| {
        format!(
            "an export does not match the contract: {error:#}. Rebuild it with the contract of \
             this version."
        )
    })?;
    Ok((kind, template))
}

fn adapter(linked: InstancePre<State>, classifies: bool) -> wasmtime::Result<Template> {
    let adapter = v0_1::adapter::AdapterIndices::new(&linked)?;
    let classifier =
        classifies.then(|| v0_1::classifier::ClassifierIndices::new(&linked)).transpose()?;
    Ok(Template::Adapter { linked, adapter, classifier })
}

/// Reads a plugin's files on a blocking thread.
async fn read_off_thread(
    file: &Path,
    read: fn(&Path) -> Result<Files, LoadError>,
) -> Result<Files, LoadError> {
    let path = file.to_owned();
    let files = tokio::task::spawn_blocking(move || read(&path)).await;
    files.map_err(|error| LoadError::Manifest {
        file: file.to_owned(),
        message: error.to_string(),
    })?
}

fn list(names: &[String]) -> String {
    if names.is_empty() { "nothing".into() } else { names.join(", ") }
}

/// Returns true if an interface has the known name and the same major and minor version.
fn same_interface(name: &str, known: &str) -> bool {
    let (Some((name, version)), Some((known, known_version))) =
        (name.split_once('@'), known.split_once('@'))
    else {
        return false;
    };
    let minor_line = |version: &str| {
        semver::Version::parse(version).ok().map(|version| (version.major, version.minor))
    };
    name == known
        && minor_line(version).is_some()
        && minor_line(version) == minor_line(known_version)
}

/// Returns the plugin's name: the name of its TOML file without the extension.
pub fn plugin_name(file: &Path) -> Result<String, LoadError> {
    let stem = file.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    let fits = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '-' | '_' | '.');
    if stem.is_empty() || stem.len() > 64 || !stem.chars().all(fits) {
        let message = "the file name is the plugin's name: rename the file to at most 64 letters, \
                       digits, `-`, `_` and `.`"
            .into();
        return Err(LoadError::Manifest { file: file.to_owned(), message });
    }
    Ok(stem.to_owned())
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

/// Parses `default_models`, which only endpoints whose requests may name no model can have.
fn default_models(
    manifest: &Manifest,
    key: &impl Fn(&str, String) -> LoadError,
) -> Result<BTreeMap<Endpoint, String>, LoadError> {
    let parse = |(path, model): (&String, &String)| {
        let endpoint = Endpoint::parse(path).filter(|endpoint| endpoint.has_optional_model());
        let endpoint = endpoint.ok_or_else(|| {
            let message = format!(
                "`{path}` needs a model in every request; only {} does not",
                Endpoint::Moderations
            );
            key("default_models", message)
        })?;
        Ok((endpoint, model.clone()))
    };
    manifest.default_models.iter().map(parse).collect()
}

/// Checks that the keys of the TOML file apply to the component's kind.
fn check_kind(
    manifest: &Manifest,
    inspected: &Inspected,
    key: &impl Fn(&str, String) -> LoadError,
) -> Result<(), LoadError> {
    let unused_key = match inspected.kind {
        Kind::Validator => [
            ("models", manifest.models.is_empty()),
            ("aliases", manifest.aliases.is_empty()),
            ("default_models", manifest.default_models.is_empty()),
            ("allow", manifest.allow.is_empty()),
            ("paused", !manifest.paused),
        ]
        .into_iter()
        .find(|(_, absent)| !absent),
        Kind::Adapter => {
            [("order", manifest.order.is_none()), ("endpoints", manifest.endpoints.is_empty())]
                .into_iter()
                .find(|(_, absent)| !absent)
        }
    };
    if let Some((name, _)) = unused_key {
        return Err(key(
            name,
            format!(
                "the component is a plugin of kind {}, which does not use this key; remove the key",
                inspected.kind
            ),
        ));
    }
    if inspected.kind == Kind::Adapter && manifest.models.is_empty() && manifest.aliases.is_empty()
    {
        return Err(key(
            "models",
            "names no model, so no request would ever reach this adapter; add `models = [\"…\"]`"
                .into(),
        ));
    }
    Ok(())
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

/// Returns every HTTP URL in a setting, at any depth.
fn urls_in(value: &Value) -> Vec<Url> {
    match value {
        Value::String(text) => Url::parse(text)
            .ok()
            .filter(|url| matches!(url.scheme(), "http" | "https"))
            .into_iter()
            .collect(),
        Value::Array(values) => values.iter().flat_map(urls_in).collect(),
        Value::Object(values) => values.values().flat_map(urls_in).collect(),
        _ => Vec::new(),
    }
}

fn bounds(limits: &Limits) -> ExchangeLimits {
    ExchangeLimits {
        concurrency: limits.max_in_flight.get(),
        requests_per_minute: limits.requests_per_minute,
        connect_timeout: limits.connect_timeout.duration(),
        first_byte_timeout: limits.first_byte_timeout.duration(),
        exchange_timeout: limits.exchange_timeout.duration(),
        max_response: limits.max_response_body.in_memory(),
    }
}
