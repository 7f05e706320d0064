//! Loading of a plugin from its TOML file: read, verify, compile, link, describe, check, configure.
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

mod checks;
pub(crate) mod inspect;

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};

use batchwright_domain::clock::Clock;
use batchwright_domain::ids::TenantId;
use batchwright_domain::text::printable;
use batchwright_domain::units::{Size, Span};
use batchwright_egress::{AllowList, ExchangeMetrics, Gateway, Resolver, Shared, Tenants};
use batchwright_memory::Memory;
use batchwright_telemetry::{Error as MetricsError, Metrics};
use serde_json::Value;
use tokio::sync::{Semaphore, SemaphorePermit};
use url::Url;

use crate::compile::Compiler;
use crate::compile::cache::Cache;
use crate::error::LoadError;
use crate::load::checks::{bounds, check_kind, default_models, urls_in};
use crate::load::inspect::Runtime;
use crate::package::credentials::{ProjectSecrets, Sources, secrets};
use crate::package::files::{ComponentFolders, Files};
use crate::package::routing::Routing;
use crate::package::schema;
use crate::package::signature::TrustedKeys;
use crate::package::trust::Trust;
use crate::plugin::{Plugin, PluginFacts, PluginRuntime};
use crate::sandbox::engine::EngineKind;
use crate::sandbox::instances::Instances;
use crate::sandbox::metrics::SandboxMetrics;

/// Maximum length of an error message about a component, in characters.
pub(crate) const MAX_MESSAGE_CHARS: usize = 2000;

/// Maximum number of plugins that are read and loaded at the same time.
const MAX_CONCURRENT_LOADS: usize = 8;

/// Options for loading plugins, set by the operator.
#[derive(Clone)]
pub struct LoaderConfig {
    /// Folder of compiled components.
    pub cache: PathBuf,
    /// Folders of components that are not beside their TOML file.
    pub components: ComponentFolders,
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
    /// Folder with secrets of projects.
    pub secrets_folder: Option<PathBuf>,
    /// Secrets that projects have set.
    pub project_secrets: Option<Arc<dyn ProjectSecrets>>,
    /// Compiler program, if it is not the running program.
    pub compiler: Option<PathBuf>,
    /// Memory pools that instances and exchanges reserve from.
    pub memory: Memory,
    /// Metrics that plugins and their exchanges are counted in.
    pub metrics: Metrics,
}

/// Loader of plugins, with the engines, the compiler and the state that all plugins share.
pub struct Loader {
    plain: Runtime,
    /// Started when the first component needs it.
    concurrent: OnceLock<Runtime>,
    compiler: Compiler,
    pub(crate) components: ComponentFolders,
    pub(crate) trust: Trust,
    pub(crate) order_file: Option<PathBuf>,
    secrets_folder: Option<PathBuf>,
    project_secrets: Option<Arc<dyn ProjectSecrets>>,
    /// Permits to load a plugin. Each load holds its component in memory.
    permits: Semaphore,
    instances: Arc<Instances>,
    shared: Shared,
    clock: Clock,
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
            components,
            compile_timeout,
            compile_memory,
            trusted_keys,
            serials,
            order,
            secrets_folder,
            project_secrets,
            compiler,
            memory,
            metrics,
        } = loading;
        let uncounted = |error: MetricsError| failed(format!("metrics: {error}"));
        let instances = SandboxMetrics::register(&metrics).map_err(uncounted)?;
        let instances = Instances::start(memory.instances, instances);
        let counted = Arc::downgrade(&instances);
        let live = move || {
            counted.upgrade().map_or(0, |instances| instances.metrics.live.load(Ordering::Relaxed))
        };
        SandboxMetrics::register_instances(&metrics, live).map_err(uncounted)?;
        let compiler =
            Compiler::new(Cache::open(&cache), compiler, compile_timeout, compile_memory);
        let (concurrent, permits) = (OnceLock::new(), Semaphore::new(MAX_CONCURRENT_LOADS));
        Ok(Self {
            plain: Runtime::start(EngineKind::Plain).map_err(failed)?,
            concurrent,
            compiler,
            components,
            trust: Trust::open(trusted_keys, serials).map_err(failed)?,
            order_file: order,
            secrets_folder,
            project_secrets,
            permits,
            instances,
            shared: Shared {
                exchanges: memory.exchanges,
                resolver: Resolver::default(),
                tenants: Tenants::default(),
                metrics: ExchangeMetrics::register(&metrics).map_err(uncounted)?,
            },
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
        self.load_files(self.read_off_thread(file, Files::read).await?).await
    }

    /// Loads a plugin for tests without exchanges: a missing secret is replaced by a placeholder.
    pub async fn load_to_test(&self, file: &Path) -> Result<Plugin, LoadError> {
        self.load_with(self.read_off_thread(file, Files::read).await?, Some("not-a-secret")).await
    }

    /// Reads a plugin's files on a blocking thread.
    async fn read_off_thread(
        &self,
        file: &Path,
        read: fn(&Path, &ComponentFolders) -> Result<Files, LoadError>,
    ) -> Result<Files, LoadError> {
        let (path, folders) = (file.to_owned(), self.components.clone());
        let files = tokio::task::spawn_blocking(move || read(&path, &folders)).await;
        files.map_err(|error| LoadError::Manifest {
            file: file.to_owned(),
            message: error.to_string(),
        })?
    }

    /// Checks that a file may disable its plugin: if signatures are required, the file must be
    /// signed.
    pub async fn check_disabled(&self, file: &Path) -> Result<(), LoadError> {
        if !self.trust.is_required() {
            return Ok(());
        }
        let files = self.read_off_thread(file, Files::read_any).await?;
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
        let default_models = default_models(&manifest, &key)?;
        // Collected before the defaults are added: only URLs of the operator allow a host.
        let urls: Vec<Url> = manifest.settings.values().flat_map(urls_in).collect();
        schema::add_defaults(&mut manifest.settings, &inspected.description.settings_schema);
        let settings = Value::Object(std::mem::take(&mut manifest.settings));
        schema::check(&settings, &inspected.description.settings_schema).map_err(
            |(place, message)| {
                key(&format!("settings{place}"), printable(&message, MAX_MESSAGE_CHARS))
            },
        )?;
        let sources = Sources {
            folder: self.secrets_folder.as_deref(),
            projects: self.project_secrets.as_ref(),
        };
        let from = (file.as_path(), name.as_str(), sources);
        let secrets = secrets(&manifest, &inspected.description, from, &urls, placeholder, &key)?;
        let credentials = manifest.credentials.iter();
        let from_projects = credentials.filter(|(_, given)| given.0.from_projects);
        let from_projects = from_projects.map(|(name, _)| name.clone()).collect();
        let allow = AllowList::new(file.display().to_string(), &urls, &manifest.allow)
            .map_err(|error| key("allow", error.to_string()))?;
        allow.check_addresses(&urls).map_err(|error| key("settings", error))?;
        let gateway = Gateway::new(&name, allow, secrets, bounds(&manifest.limits), &self.shared);
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
                from_projects,
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
