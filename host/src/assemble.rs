//! Composition root: builds the batch engine and all that it uses from the settings.
//!
//! `serve`, `run` and the lifecycle tests assemble the same parts in the same way. No other module
//! creates a store, a plugin registry or a memory budget for batches.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use batchwright_api::{HttpMetrics, Tls};
use batchwright_batch::{Engine, Parts, ProjectCredentials};
use batchwright_memory::Memory;
use batchwright_plugin::signature::TrustedKeys;
use batchwright_plugin::{
    ComponentFolders, Loader, LoaderConfig, ProjectSecrets, Registry, check_directory, read_secret,
};
use batchwright_store::accounts::{Actor, NewKey};
use batchwright_store::objects::LocalObjects;
use batchwright_store::{MeasuredObjects, SqliteStore};
use batchwright_telemetry::{Error as MetricsError, Metrics, Otlp, OtlpConfig};
use batchwright_tenancy::{IssuedKey, SealingKey};
use batchwright_webhooks::{Deliverer, WebhookService};

use crate::clock::Clock;
use crate::config::{ConfigError, Settings};
use crate::error::Error;

/// Parts that differ between the commands.
pub struct Options {
    /// Time, which tests turn forward.
    pub clock: Clock,
    /// File that remembers serials of signed plugins; none remembers nothing.
    pub serials: Option<PathBuf>,
    /// File that remembers the order in which plugins were added; none remembers nothing.
    pub order: Option<PathBuf>,
    /// Program that compiles plugins; none is the running program.
    pub compiler: Option<PathBuf>,
}

impl Options {
    /// Options of a server, whose data folder remembers everything.
    pub fn of_server(settings: &Settings) -> Self {
        Self {
            clock: Clock::system(),
            serials: Some(settings.storage.data.join("serials")),
            order: Some(settings.storage.data.join("plugin-order")),
            compiler: None,
        }
    }
}

/// Builds the memory budget.
fn memory(settings: &Settings) -> Memory {
    Memory::new(
        settings.memory.memory_budget.size().in_memory(),
        settings.memory.instance_memory.in_memory(),
    )
}

/// Builds a plugin loader.
pub fn loader(settings: &Settings, options: Options) -> Result<Loader, Error> {
    loader_with(settings, options, (&memory(settings), &Metrics::disabled()), None)
}

fn loader_with(
    settings: &Settings,
    options: Options,
    (memory, metrics): (&Memory, &Metrics),
    project_secrets: Option<Arc<dyn ProjectSecrets>>,
) -> Result<Loader, Error> {
    let loading = LoaderConfig {
        cache: settings.cache(),
        components: ComponentFolders::new(settings.plugins.components.iter().map(PathBuf::from)),
        compile_timeout: *settings.plugins.compile_timeout,
        compile_memory: *settings.plugins.compile_memory,
        trusted_keys: trusted_keys(settings)?,
        serials: options.serials,
        order: options.order,
        secrets_folder: settings.plugins.secrets.clone(),
        project_secrets,
        compiler: options.compiler,
        memory: memory.clone(),
        metrics: metrics.clone(),
    };
    Ok(Loader::new(loading, options.clock)?)
}

/// Returns the key that seals secrets of projects, if there is one.
fn sealing_key(settings: &Settings) -> Result<Option<SealingKey>, Error> {
    let Some(source) = &settings.plugins.credential_key else { return Ok(None) };
    let invalid = |message: String| ConfigError::Value { setting: "credential_key", message };
    let text = read_secret(source).map_err(invalid)?;
    let key = SealingKey::parse(&text).map_err(|error| invalid(error.to_string()))?;
    Ok(Some(key))
}

/// Returns the key that a new server has, if the settings name one.
fn first_admin_key(settings: &Settings) -> Result<Option<IssuedKey>, Error> {
    let Some(source) = &settings.server.first_admin_key else { return Ok(None) };
    let invalid = |message: String| ConfigError::Value { setting: "first_admin_key", message };
    let text = read_secret(source).map_err(invalid)?;
    let key = IssuedKey::parse(&text).ok_or_else(|| {
        invalid(format!(
            "{source} has no key; a key is `bw_`, 16 and, after `_`, 64 hexadecimal digits: \
             `batchwright admin key generate` prints one"
        ))
    })?;
    Ok(Some(key))
}

/// Creates the key that a new server has. A server that ever had a key is not changed, so that a
/// key that was revoked stays revoked.
pub async fn create_first_key(settings: &Settings, engine: &Engine) -> Result<(), Error> {
    let parts = engine.parts();
    if settings.server.first_admin_key.is_none() {
        return Ok(());
    }
    if parts.store.had_key().await? {
        let key = first_admin_key(settings).ok().flatten();
        if let Some(key) = key
            && parts.store.key(&key.id).await?.is_none()
        {
            tracing::warn!(
                key = %key.id,
                "first_admin_key is no key of this server and is ignored: the server has had a key"
            );
        }
        return Ok(());
    }
    let Some(key) = first_admin_key(settings)? else { return Ok(()) };
    let new = NewKey {
        digest: *key.digest.as_bytes(),
        id: key.id,
        name: "first".to_owned(),
        redacted: key.redacted,
        scopes: Vec::new(),
        expires_at: None,
    };
    let by = Actor { key: None, address: None, at: parts.clock.now() };
    let created = parts.store.create_admin_key(new, by).await?;
    tracing::info!(key = %created.id, "first admin key created");
    Ok(())
}

/// Checks the files that the settings name. Returns every error.
pub fn check(settings: &Settings) -> Vec<String> {
    let mut errors = Vec::new();
    let mut add = |error: Result<(), Error>| errors.extend(error.err().map(|it| it.to_string()));
    add(tls(settings).map(drop));
    add(sealing_key(settings).map(drop));
    // A server that has data has read its first key, and the source may be gone.
    if !SqliteStore::exists(&settings.storage.data) {
        add(first_admin_key(settings).map(drop));
    }
    for folder in &settings.plugins.components {
        if !Path::new(folder).is_dir() {
            let message = format!("there is no folder {folder}");
            add(Err(ConfigError::Value { setting: "components", message }.into()));
        }
    }
    add(check_directory(&settings.plugins.directory()).map_err(Error::from));
    add(trusted_keys(settings).map(drop));
    errors
}

/// Reads the certificate and the key, if the settings name them.
pub fn tls(settings: &Settings) -> Result<Option<Arc<Tls>>, Error> {
    let invalid = |setting, message| ConfigError::Value { setting, message };
    match (&settings.api.tls_certificate, &settings.api.tls_key) {
        (None, None) => Ok(None),
        (Some(certificate), Some(key)) => Tls::open(certificate, key)
            .map(|tls| Some(Arc::new(tls)))
            .map_err(|error| invalid("tls_certificate and tls_key", error.to_string()).into()),
        (Some(_), None) => {
            Err(invalid("tls_key", "is missing; TLS needs a certificate and its key".into()).into())
        }
        (None, Some(_)) => {
            let message = "is missing; TLS needs a certificate and its key";
            Err(invalid("tls_certificate", message.into()).into())
        }
    }
}

/// Reads the keys that plugins must be signed with, if the settings name them.
fn trusted_keys(settings: &Settings) -> Result<Option<TrustedKeys>, Error> {
    let keys = settings.plugins.trusted_keys.as_deref().map(TrustedKeys::read).transpose();
    Ok(keys.map_err(|message| ConfigError::Value { setting: "trusted_keys", message })?)
}

/// Builds the webhooks of a server, and what delivers their events.
pub fn webhooks(
    settings: &Settings,
    engine: &Engine,
) -> Result<(Arc<WebhookService>, Arc<Deliverer>), Error> {
    let parts = engine.parts();
    let (store, clock) = (parts.store.clone(), parts.clock.clone());
    let key = sealing_key(settings)?;
    let service = WebhookService::new(store, clock, settings.webhooks.clone(), key);
    let service = Arc::new(service.map_err(|error| ConfigError::Value {
        setting: "webhook_allow_http",
        message: error.to_string(),
    })?);
    let deliverer = Deliverer::new(service.clone(), &parts.metrics).map_err(uncounted)?;
    Ok((service, deliverer))
}

/// Registers the metrics of HTTP requests beside those of an engine.
pub fn http_metrics(engine: &Engine) -> Result<HttpMetrics, Error> {
    HttpMetrics::register(&engine.parts().metrics).map_err(uncounted)
}

fn uncounted(error: MetricsError) -> Error {
    Error::Other(format!("metrics: {error}"))
}

/// Creates the metrics of a server.
pub fn metrics(settings: &Settings) -> Result<Metrics, Error> {
    if !settings.server.metrics {
        return Ok(Metrics::disabled());
    }
    let metrics = Metrics::new().map_err(uncounted)?;
    Ok(metrics.with_tenants(settings.server.metrics_max_tenants))
}

/// Starts the exporters of traces and of the metrics of generative AI, if there is a collector.
pub fn otlp(settings: &Settings, metrics: &Metrics) -> Result<Option<Otlp>, Error> {
    let endpoint = settings.server.otlp_endpoint.clone();
    // The variable that other programs use, too.
    let endpoint = endpoint.or_else(|| std::env::var("OTEL_EXPORTER_OTLP_ENDPOINT").ok());
    let Some(endpoint) = endpoint.filter(|endpoint| !endpoint.is_empty()) else { return Ok(None) };
    let config = OtlpConfig {
        endpoint,
        request_ratio: settings.server.trace_requests.ratio(),
        version: env!("CARGO_PKG_VERSION"),
    };
    let started = Otlp::start(&config, metrics);
    let started = started.map_err(|error| ConfigError::Value {
        setting: "otlp_endpoint",
        message: error.to_string(),
    });
    Ok(Some(started?))
}

/// Opens the data folder and loads the plugins, without exporters. Batches are not worked on
/// before [`Engine::start`].
pub async fn engine(settings: &Settings, options: Options) -> Result<Arc<Engine>, Error> {
    engine_with(settings, options, metrics(settings)?, None).await
}

/// Opens the data folder and loads the plugins like [`engine()`], with exporters.
pub async fn engine_with(
    settings: &Settings,
    options: Options,
    metrics: Metrics,
    otlp: Option<&Otlp>,
) -> Result<Arc<Engine>, Error> {
    let directory = settings.plugins.directory();
    check_directory(&directory)?;
    // A migration can take long, and a signal must be noticed meanwhile.
    let (data, measured) = (settings.storage.data.clone(), metrics.clone());
    let opening = tokio::task::spawn_blocking(move || SqliteStore::open_measured(&data, &measured));
    let store = opening.await.map_err(|error| Error::Other(error.to_string()))??;
    let objects = Arc::new(LocalObjects::open(&settings.storage.data.join("objects"))?);
    let objects = MeasuredObjects::new(objects, &metrics).map_err(uncounted)?;
    let memory = memory(settings);
    let clock = options.clock.clone();
    let store = Arc::new(store);
    let credentials = sealing_key(settings)?.map(|key| ProjectCredentials::new(store.clone(), key));
    let secrets = credentials.clone().map(|found| found as Arc<dyn ProjectSecrets>);
    let loader = loader_with(settings, options, (&memory, &metrics), secrets)?;
    let registry = Registry::open(&directory, loader).await?;
    let config = Arc::new(settings.of_batches());
    let objects = Arc::new(objects);
    let (traces, gen_ai) =
        otlp.map(|otlp| (otlp.traces.clone(), otlp.gen_ai.clone())).unwrap_or_default();
    let parts = Parts {
        store,
        objects,
        registry,
        credentials,
        clock,
        config,
        memory,
        metrics,
        traces,
        gen_ai,
    };
    Ok(Arc::new(Engine::new(parts).map_err(uncounted)?))
}
