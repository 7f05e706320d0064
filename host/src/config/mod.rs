//! Settings of the server and of the commands: their sources, and the struct of all of them.
//!
//! Each crate declares its own settings (see [`batchwright_domain::settings`]); this module adds
//! those of the process itself, reads the sources and reports every error at once. A flag
//! overrides the environment, the environment overrides the config file, and the config file
//! overrides the default.

mod arguments;
mod environment;
mod file;
mod prices;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use batchwright_api::ApiConfig;
use batchwright_batch::{BatchConfig, ExecutionConfig, OnlineConfig, RetentionConfig};
use batchwright_domain::settings::{Given, Section, Setting};
use batchwright_domain::units::{Count, Span};
use batchwright_domain::{settings, value_from_str};
use batchwright_memory::MemoryConfig;
use batchwright_plugin::PluginsConfig;
use batchwright_tenancy::{Prices, TenantDefaults};
use batchwright_webhooks::WebhookConfig;

use crate::telemetry::{LogFilter, LogFormat, Ratio};

pub use arguments::{Addresses, All, DataFolder, LoaderSettings, PluginFolder, SettingsArgs};
pub use environment::unknown_variables;

/// Error in the settings that an operator gave.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Config file that cannot be read.
    #[error("failed to read the config file {}: {source}; check --config", path.display())]
    Unreadable {
        /// Path of the config file.
        path: PathBuf,
        /// Error of the read.
        source: std::io::Error,
    },
    /// Config file that is not TOML.
    #[error("{}: {message}", path.display())]
    Invalid {
        /// Path of the config file.
        path: PathBuf,
        /// Message of the TOML parser, with the position.
        message: String,
    },
    /// Invalid values from any source, one message each.
    #[error("{}", .0.join("\n       "))]
    Values(Vec<String>),
    /// Invalid value of one setting.
    #[error("{setting}: {message}")]
    Value {
        /// Name of the setting.
        setting: &'static str,
        /// Reason and remedy.
        message: String,
    },
}

settings! {
    /// Settings of the process.
    pub struct ServerConfig in "server" {
        /// Address to listen on; port 0 picks a free port
        listen: SocketAddr = "127.0.0.1:8080", "ADDR";
        /// Address of a second listener, for health and for plugin details that only operators may
        /// see; it accepts connections even if the API has none left
        admin_listen: Option<SocketAddr> = "" (shown "none"), "ADDR";
        /// Admin key that a server has from its first start on, `env:NAME` or `file:PATH`; it is
        /// read as long as the server has never had a key
        first_admin_key: Option<String> = "" (shown "none"), "SOURCE";
        /// Time after SIGTERM in which the server serves requests but reports that it is not ready,
        /// so that load balancers stop sending requests to it
        shutdown_delay: Span = "0s", "TIME";
        /// Whether metrics are counted and served at `/metrics`
        metrics: bool = "true", "BOOL";
        /// Number of projects with a value of their own of the label `tenant` in metrics; further
        /// ones share the value `other`, and with 0 no metric has the label
        metrics_max_tenants: usize = "0", "N";
        /// URL of an OpenTelemetry collector that speaks OTLP over HTTP, such as
        /// http://127.0.0.1:4318; traces and the metrics of generative AI go there
        otlp_endpoint: Option<String> = "" (shown "OTEL_EXPORTER_OTLP_ENDPOINT, or none"), "URL";
        /// Part of the successful requests whose traces are kept, from 0 to 1; traces of failed
        /// requests are always kept
        trace_requests: Ratio = "0.01", "RATIO";
        /// Log filter, such as `info` or `info,batchwright_egress=debug`
        log_filter: LogFilter = "info", "FILTER";
        /// Log format: `text` or `json`
        log_format: LogFormat = "text", "FORMAT";
    }
}

settings! {
    /// Settings of the data folder.
    pub struct StorageConfig in "storage" {
        /// Folder for the database and the file contents
        data: PathBuf = "batchwright-data", "DIR";
    }
}

value_from_str!(LogFilter LogFormat Ratio);

/// Settings that had another name, with the name that they have now.
const RENAMED: [(&str, &str); 2] =
    [("log_level", "log_filter"), ("keep_alive_timeout", "idle_timeout")];

/// Every setting, section by section.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The process.
    pub server: ServerConfig,
    /// How clients are served.
    pub api: ApiConfig,
    /// The data folder.
    pub storage: StorageConfig,
    /// Lifetimes.
    pub retention: RetentionConfig,
    /// Plugins.
    pub plugins: PluginsConfig,
    /// What clients may ask for.
    pub batch: BatchConfig,
    /// Concurrency and retries.
    pub execution: ExecutionConfig,
    /// Online requests.
    pub online: OnlineConfig,
    /// Limits of projects.
    pub tenant_defaults: TenantDefaults,
    /// Prices of models.
    pub prices: Prices,
    /// Webhooks.
    pub webhooks: WebhookConfig,
    /// Memory.
    pub memory: MemoryConfig,
}

impl Settings {
    /// Declarations of all settings, in the order of help and of the reference.
    pub fn all() -> impl Iterator<Item = &'static Setting> {
        let sections = [
            ServerConfig::SETTINGS,
            ApiConfig::SETTINGS,
            StorageConfig::SETTINGS,
            RetentionConfig::SETTINGS,
            PluginsConfig::SETTINGS,
            BatchConfig::SETTINGS,
            ExecutionConfig::SETTINGS,
            OnlineConfig::SETTINGS,
            TenantDefaults::SETTINGS,
            WebhookConfig::SETTINGS,
            MemoryConfig::SETTINGS,
        ];
        sections.into_iter().flatten()
    }

    /// Resolves flags and environment variables with the config file and the defaults.
    ///
    /// The error lists every invalid value of all sources.
    pub fn resolve(mut given: Given, file: Option<&Path>) -> Result<Self, ConfigError> {
        Self::resolve_in(&mut given, file)
    }

    /// Resolves like [`Self::resolve`], and leaves in `given` what the config file gives.
    pub fn resolve_in(given: &mut Given, file: Option<&Path>) -> Result<Self, ConfigError> {
        let prices = file.map(|file| file::read(file, given)).transpose()?;
        let server = ServerConfig::read(given);
        let api = ApiConfig::read(given);
        let storage = StorageConfig::read(given);
        let retention = RetentionConfig::read(given);
        let plugins = PluginsConfig::read(given);
        let batch = BatchConfig::read(given);
        let execution = ExecutionConfig::read(given);
        let online = OnlineConfig::read(given);
        let tenant_defaults = TenantDefaults::read(given);
        let webhooks = WebhookConfig::read(given);
        let memory = MemoryConfig::read(given);
        let errors = given.errors().to_vec();
        let settings = || {
            Some(Self {
                server: server?,
                api: api?,
                storage: storage?,
                retention: retention?,
                plugins: plugins?,
                batch: batch?,
                execution: execution?,
                online: online?,
                tenant_defaults: tenant_defaults?,
                prices: Prices::new(prices.unwrap_or_default()),
                webhooks: webhooks?,
                memory: memory?,
            })
        };
        match settings() {
            Some(settings) if errors.is_empty() => Ok(settings),
            _ => Err(ConfigError::Values(errors)),
        }
    }

    /// The part that the batch engine uses.
    pub fn of_batches(&self) -> batchwright_batch::Config {
        let mut batch = self.batch.clone();
        // Streams alone must not take all connections.
        let half =
            Count::new(u32::try_from(self.api.max_connections.get() / 2).unwrap_or(u32::MAX));
        batch.max_event_streams = batch.max_event_streams.min(half);
        batchwright_batch::Config {
            batch,
            retention: self.retention.clone(),
            execution: self.execution.clone(),
            online: self.online.clone(),
            tenant_defaults: self.tenant_defaults.clone(),
            prices: self.prices.clone(),
            required_plugins: self.plugins.required_plugins.clone(),
        }
    }

    /// Folder of compiled plugins.
    pub fn cache(&self) -> PathBuf {
        self.plugins.cache.clone().unwrap_or_else(|| self.storage.data.join("cache"))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::io::Write;
    use std::time::Duration;

    use super::*;

    fn resolve(given: Given, text: &str) -> Result<Settings, String> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        Settings::resolve(given, Some(file.path())).map_err(|error| error.to_string())
    }

    #[test]
    fn defaults_are_valid_and_names_are_unique() {
        Settings::resolve(Given::default(), None).unwrap();
        let names: Vec<_> = Settings::all().map(|setting| setting.name).collect();
        assert_eq!(names.len(), names.iter().collect::<BTreeSet<_>>().len());
    }

    #[test]
    fn flag_overrides_config_file_and_config_file_overrides_default() {
        let mut given = Given::default();
        given.add("retry_backoff", "5s", "--retry-backoff");
        let text = "[execution]\nmax_attempts = 3\nretry_backoff = \"2s\"\n\
                    [batch]\ncompletion_windows = [\"24h\", \"1h\"]\n";
        let settings = resolve(given, text).unwrap();
        assert_eq!(settings.execution.max_attempts.get(), 3);
        assert_eq!(settings.execution.retry_backoff.duration(), Duration::from_secs(5));
        assert_eq!(*settings.batch.max_requests_per_file, 50_000);
        let windows = &settings.batch.completion_windows;
        assert_eq!(windows.length("1h"), Some(Duration::from_secs(3600)));
        assert_eq!(windows.length("2h"), None);
        assert_eq!(settings.cache(), Path::new("batchwright-data/cache"));
    }

    #[test]
    fn config_file_errors_name_the_line() {
        for (text, parts) in [
            (
                "[server]\na = 1\nlissten = \"x\"",
                vec![
                    "line 2: there is no setting `a`",
                    "line 3: there is no setting `lissten`; did you mean `listen`?",
                ],
            ),
            (
                "[execution]\nmax_attempts = 0\n[server]\nclient_timeout = 5\n\n\
                 [batch]\nmax_file_size = \"x\"",
                vec!["line 2: max_attempts", "line 4: client_timeout", "line 7: max_file_size"],
            ),
            (
                "[batch]\nmax_requests_per_file = \"many\"",
                vec!["line 2: max_requests_per_file", "whole number"],
            ),
            (
                "[server]\nclient_timeout = \"0s\"\nlog_filter = \"warning\"",
                vec![
                    "line 2: client_timeout: `0s` must be more than 0",
                    "line 3: log_filter: `warning` is not a log level; did you mean `warn`?",
                ],
            ),
            ("\n[batch]\nmax_file_size = \"12 parsecs\"", vec!["line 3", "12 parsecs", "200MiB"]),
            ("[batch]\ncompletion_windows = []", vec!["line 2", "at least one window"]),
            ("[memory]\nmemory_budget = \"1KiB\"", vec!["memory_budget", "at least 1MiB"]),
            ("[server]\nlisten = ", vec!["line 2"]),
            ("max_attempts = 3", vec!["line 1: `max_attempts` belongs to the section [execution]"]),
            (
                "[server]\nmax_attempts = 3",
                vec!["line 2: `max_attempts` belongs to the section [execution]"],
            ),
            ("[sever]\nlisten = 3", vec!["line 1: there is no section [sever]", "[server]?"]),
            ("[server]\nlog_level = \"info\"", vec!["line 2: `log_level` is called `log_filter`"]),
            ("[server]\nlisten = {a = 1}", vec!["line 2: listen: write one value or a list"]),
        ] {
            let error = resolve(Given::default(), text).unwrap_err();
            for part in parts {
                assert!(error.contains(part), "`{part}` is missing from: {error}");
            }
        }
    }
}
