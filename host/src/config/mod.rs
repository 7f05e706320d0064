//! Settings of the server and of the commands: names, sources and defaults.
//!
//! The `settings!` macro declares each setting once. The declaration gives a command-line flag, an
//! environment variable `BATCHWRIGHT_…`, a key of the config file and a field of [`Settings`].
//! A flag overrides the environment, the environment overrides the config file, and the config
//! file overrides the default.

mod environment;
mod file;
mod units;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::Deserialize;

use crate::telemetry;
use file::File;

pub use file::nearest;
pub use units::{Count, Size, Span};

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

/// Format of the log on standard error.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Human-readable lines.
    #[default]
    Text,
    /// JSON, with one object per line.
    Json,
}

/// Declares the settings once: as flags with environment variables, as keys of the config file,
/// and as resolved values with their defaults.
macro_rules! settings {
    ($(
        $(#[doc = $doc:literal])+
        $heading:literal $value:literal $name:ident: $type:ty = $default:expr, $env:literal;
    )+) => {
        /// Settings from one source, the command line with the environment or the config file;
        /// each is optional.
        #[derive(Args, Clone, Debug, Default)]
        pub struct Given {
            $(
                $(#[doc = $doc])+
                #[arg(
                    long,
                    env = $env,
                    value_name = $value,
                    help_heading = $heading,
                    hide_env_values = true
                )]
                pub $name: Option<$type>,
            )+
        }

        /// Resolved settings, each with a value.
        #[derive(Clone, Debug)]
        pub struct Settings {
            $($(#[doc = $doc])+ pub $name: $type,)+
        }

        /// Environment variables of the settings.
        pub const VARIABLES: &[&str] = &[$($env),+];

        impl Given {
            /// Takes every setting from the config file.
            fn from_file(file: &mut File) -> Self {
                Self { $($name: file.take(stringify!($name)),)+ }
            }

            /// Resolves each setting: the value here, else that of `other`, else the default.
            fn or(self, other: Given) -> Settings {
                Settings { $($name: self.$name.or(other.$name).unwrap_or_else(|| $default),)+ }
            }
        }
    };
}

settings! {
    /// Address to listen on; port 0 picks a free port [default: 127.0.0.1:8080]
    "Server" "ADDR" listen: SocketAddr = SocketAddr::from(([127, 0, 0, 1], 8080)),
        "BATCHWRIGHT_LISTEN";
    /// Folder for the database and the file contents [default: ./batchwright-data]
    "Server" "DIR" data: PathBuf = "batchwright-data".into(), "BATCHWRIGHT_DATA";
    /// Plugin folder, with one TOML file per plugin
    /// [default: the folder `plugins` beside this program]
    "Server" "DIR" plugins: PathBuf = default_plugins(), "BATCHWRIGHT_PLUGINS";
    /// Maximum number of requests in flight; a request over the limit gets status 503
    /// [default: 1024]
    "Server" "N" max_connections: Count = Count::new(1024), "BATCHWRIGHT_MAX_CONNECTIONS";
    /// Timeout for the head of a request; a new connection without a head is closed then
    /// [default: 1m]
    "Server" "TIME" request_head_timeout: Span = Span::seconds(60),
        "BATCHWRIGHT_REQUEST_HEAD_TIMEOUT";
    /// Timeout for a client to send the next chunk of a request body, or to receive the next
    /// chunk of a response [default: 1m]
    "Server" "TIME" client_timeout: Span = Span::seconds(60), "BATCHWRIGHT_CLIENT_TIMEOUT";
    /// Idle timeout of a connection between two requests; it must be longer than that of the load
    /// balancer in front [default: 90s]
    "Server" "TIME" keep_alive_timeout: Span = Span::seconds(90),
        "BATCHWRIGHT_KEEP_ALIVE_TIMEOUT";
    /// Maximum number of connections per client address; 0 is no limit, because clients behind a
    /// proxy share an address [default: 0]
    "Server" "N" max_connections_per_address: usize = 0,
        "BATCHWRIGHT_MAX_CONNECTIONS_PER_ADDRESS";
    /// Host names of this server that clients may use in URLs, separated by commas;
    /// `*.example.com` allows every subdomain; IP addresses and localhost are always allowed
    /// [default: any; on a loopback address: none]
    "Server" "LIST" allowed_hosts: Names = Names::default(), "BATCHWRIGHT_ALLOWED_HOSTS";
    /// Origins of web pages that may use the API, separated by commas, such as
    /// https://tool.example.com; `*` allows any origin [default: none]
    "Server" "LIST" cors_origins: Names = Names::default(), "BATCHWRIGHT_CORS_ORIGINS";
    /// Address of a second listener, for health and for plugin details that only operators may
    /// see; it accepts connections even if the API has none left [default: none]
    "Server" "ADDR" admin_listen: OptionalAddress = OptionalAddress(None),
        "BATCHWRIGHT_ADMIN_LISTEN";
    /// Time after SIGTERM in which the server serves requests but reports that it is not ready, so
    /// that load balancers stop sending requests to it [default: 0s]
    "Server" "TIME" shutdown_delay: Span = Span::seconds(0), "BATCHWRIGHT_SHUTDOWN_DELAY";
    /// Maximum time for requests in flight to finish at shutdown [default: 30s]
    "Server" "TIME" shutdown_grace: Span = Span::seconds(30), "BATCHWRIGHT_SHUTDOWN_GRACE";
    /// Log filter, such as `info` or `info,batchwright::egress=debug` [default: info]
    "Server" "FILTER" log_level: String = "info".into(), "BATCHWRIGHT_LOG_LEVEL";
    /// Log format [default: text]
    "Server" "FORMAT" log_format: LogFormat = LogFormat::Text, "BATCHWRIGHT_LOG_FORMAT";
    /// Folder of compiled plugins, which only the server may write to [default: DATA/cache]
    "Server" "DIR" cache: PathBuf = PathBuf::new(), "BATCHWRIGHT_CACHE";
    /// Maximum time to compile one plugin; a plugin that takes longer is rejected [default: 1m]
    "Server" "TIME" compile_timeout: Span = DEFAULT_COMPILE_TIMEOUT,
        "BATCHWRIGHT_COMPILE_TIMEOUT";
    /// Maximum memory to compile one plugin; a plugin that needs more is rejected [default: 4GiB]
    "Server" "SIZE" compile_memory: Size = DEFAULT_COMPILE_MEMORY,
        "BATCHWRIGHT_COMPILE_MEMORY";
    /// File of public keys in OpenSSH format, one per line; only plugins that are signed with one
    /// of these keys are loaded [default: none, and unsigned plugins are loaded]
    "Server" "FILE" trusted_keys: PathBuf = PathBuf::new(), "BATCHWRIGHT_TRUSTED_KEYS";

    /// Names of the plugins that must be loaded to create a batch, separated by commas; `none`
    /// requires no plugin [default: a validator for each endpoint that is served]
    "Server" "LIST" required_plugins: RequiredPlugins = RequiredPlugins::Validators,
        "BATCHWRIGHT_REQUIRED_PLUGINS";

    /// Maximum size of an input file [default: 200MiB]
    "Limits" "SIZE" max_file_size: Size = Size::mib(200), "BATCHWRIGHT_MAX_FILE_SIZE";
    /// Maximum number of requests in an input file [default: 50000]
    "Limits" "N" max_requests_per_file: u64 = 50_000, "BATCHWRIGHT_MAX_REQUESTS_PER_FILE";
    /// Maximum size of a line in an input file [default: 16MiB]
    "Limits" "SIZE" max_line_size: Size = Size::mib(16), "BATCHWRIGHT_MAX_LINE_SIZE";
    /// Maximum number of errors listed for a rejected file; a last entry counts the rest
    /// [default: 1000]
    "Limits" "N" max_reported_errors: usize = 1000, "BATCHWRIGHT_MAX_REPORTED_ERRORS";
    /// Completion windows that a client may request, separated by commas [default: 24h]
    "Limits" "LIST" completion_windows: CompletionWindows = CompletionWindows::default(),
        "BATCHWRIGHT_COMPLETION_WINDOWS";
    /// Maximum number of metadata pairs of a batch [default: 16]
    "Limits" "N" max_metadata_pairs: usize = 16, "BATCHWRIGHT_MAX_METADATA_PAIRS";
    /// Maximum length of a metadata key, in characters [default: 64]
    "Limits" "N" max_metadata_key: usize = 64, "BATCHWRIGHT_MAX_METADATA_KEY";
    /// Maximum length of a metadata value, in characters [default: 512]
    "Limits" "N" max_metadata_value: usize = 512, "BATCHWRIGHT_MAX_METADATA_VALUE";
    /// Maximum number of batches in one page of a list [default: 100]
    "Limits" "N" max_batches_per_page: Count = Count::new(100),
        "BATCHWRIGHT_MAX_BATCHES_PER_PAGE";
    /// Maximum number of files in one page of a list [default: 10000]
    "Limits" "N" max_files_per_page: Count = Count::new(10_000),
        "BATCHWRIGHT_MAX_FILES_PER_PAGE";
    /// Lifetime of an input file whose upload sets none [default: 30d]
    "Limits" "TIME" input_file_lifetime: Span = Span::seconds(30 * 86_400),
        "BATCHWRIGHT_INPUT_FILE_LIFETIME";

    /// Lifetime of an output file whose batch sets none; 0s keeps the file forever; a change
    /// applies to new files [default: 0s]
    "Limits" "TIME" output_file_lifetime: Span = Span::seconds(0),
        "BATCHWRIGHT_OUTPUT_FILE_LIFETIME";
    /// Lifetime of an error file whose batch sets none; 0s keeps the file forever; a change
    /// applies to new files [default: 0s]
    "Limits" "TIME" error_file_lifetime: Span = Span::seconds(0),
        "BATCHWRIGHT_ERROR_FILE_LIFETIME";

    /// Time that a batch is kept after its end; a batch with a result file is kept until the file
    /// is deleted [default: 90d]
    "Limits" "TIME" batch_lifetime: Span = Span::seconds(90 * 86_400),
        "BATCHWRIGHT_BATCH_LIFETIME";

    /// Maximum number of batches that execute at a time per provider; the same limit applies to
    /// batches that are validated, and to batches that are finalized [default: 16]
    "Execution" "N" max_concurrent_batches: Count = Count::new(16),
        "BATCHWRIGHT_MAX_CONCURRENT_BATCHES";
    /// Maximum number of batches that execute at a time for all providers together; each provider
    /// has at least one [default: 64]
    "Execution" "N" max_executing_batches: Count = Count::new(64),
        "BATCHWRIGHT_MAX_EXECUTING_BATCHES";
    /// Maximum number of requests in flight per batch [default: 256]
    "Execution" "N" max_concurrent_requests_per_batch: Count = Count::new(256),
        "BATCHWRIGHT_MAX_CONCURRENT_REQUESTS_PER_BATCH";
    /// Memory for the data of clients and providers: lines, responses, results, uploads and lists
    /// [default: 64MiB]
    "Execution" "SIZE" memory_budget: Size = DEFAULT_MEMORY_BUDGET,
        "BATCHWRIGHT_MEMORY_BUDGET";
    /// Memory for the instances of all plugins [default: 128MiB]
    "Execution" "SIZE" instance_memory: Size = DEFAULT_INSTANCE_MEMORY,
        "BATCHWRIGHT_INSTANCE_MEMORY";
    /// Maximum time for requests in flight to finish after their batch is cancelled or expires
    /// [default: 10s]
    "Execution" "TIME" stop_grace: Span = Span::seconds(10), "BATCHWRIGHT_STOP_GRACE";
    /// Maximum number of attempts per request, including the first [default: 10]
    "Execution" "N" max_attempts: Count = Count::new(10), "BATCHWRIGHT_MAX_ATTEMPTS";
    /// Maximum number of attempts per request that may have reached the provider and got no
    /// response; the provider may charge for each [default: 3]
    "Execution" "N" max_unanswered_attempts: Count = Count::new(3),
        "BATCHWRIGHT_MAX_UNANSWERED_ATTEMPTS";
    /// Maximum time to retry a request, not counting time that the request waits for an
    /// unavailable provider or for a rate limit [default: 1h]
    "Execution" "TIME" max_retry_time: Span = Span::seconds(3600), "BATCHWRIGHT_MAX_RETRY_TIME";
    /// Backoff before the first retry of a request; it doubles with each further retry
    /// [default: 500ms]
    "Execution" "TIME" retry_backoff: Span = Span::milliseconds(500),
        "BATCHWRIGHT_RETRY_BACKOFF";
    /// Maximum backoff between two attempts, unless the provider asks for more [default: 1m]
    "Execution" "TIME" max_retry_backoff: Span = Span::seconds(60),
        "BATCHWRIGHT_MAX_RETRY_BACKOFF";
    /// Backoff before the first probe of an unavailable provider; it doubles with each further
    /// probe [default: 1s]
    "Execution" "TIME" outage_backoff: Span = Span::seconds(1), "BATCHWRIGHT_OUTAGE_BACKOFF";
    /// Maximum backoff between two probes of an unavailable provider [default: 1m]
    "Execution" "TIME" max_outage_backoff: Span = Span::seconds(60),
        "BATCHWRIGHT_MAX_OUTAGE_BACKOFF";
    /// Maximum time that requests wait for an unavailable provider before they fail; 0s lets them
    /// wait until their batch expires [default: 0s]. `run` has no completion window: it stops
    /// after this time and keeps its state [default: 10m]
    "Execution" "TIME" max_outage: Span = Span::seconds(0), "BATCHWRIGHT_MAX_OUTAGE";
}

/// Default of `memory_budget`.
pub const DEFAULT_MEMORY_BUDGET: Size = Size::mib(64);

/// Default of `instance_memory`.
pub const DEFAULT_INSTANCE_MEMORY: Size = Size::mib(128);

/// Default of `compile_timeout`.
const DEFAULT_COMPILE_TIMEOUT: Span = Span::seconds(60);

/// Default of `compile_memory`.
const DEFAULT_COMPILE_MEMORY: Size = Size::mib(4096);

/// Returns the folder `plugins` beside the running program.
///
/// If the path of the program is unknown, the folder is `plugins` in the working directory.
pub fn default_plugins() -> PathBuf {
    let program = std::env::current_exe().ok();
    program
        .and_then(|program| Some(program.parent()?.join("plugins")))
        .unwrap_or_else(|| "plugins".into())
}

impl Settings {
    /// Resolves flags and environment variables with the config file and the defaults.
    ///
    /// The error lists every invalid value of all sources.
    pub fn resolve(given: Given, file: Option<&Path>) -> Result<Self, ConfigError> {
        let (from_file, mut errors) = file.map(read).transpose()?.unwrap_or_default();
        let mut settings = given.or(from_file);
        if settings.cache.as_os_str().is_empty() {
            settings.cache = settings.data.join("cache");
        }
        errors.extend(settings.validate());
        if errors.is_empty() { Ok(settings) } else { Err(ConfigError::Values(errors)) }
    }

    /// Returns an error message for each value that a server cannot work with.
    fn validate(&self) -> Vec<String> {
        let mut errors = Vec::new();
        if self.memory_budget.bytes() < Size::mib(1).bytes() {
            errors.push("memory_budget: must be at least 1MiB".to_owned());
        }
        for (name, span) in [
            ("request_head_timeout", self.request_head_timeout),
            ("client_timeout", self.client_timeout),
            ("keep_alive_timeout", self.keep_alive_timeout),
            ("compile_timeout", self.compile_timeout),
            ("input_file_lifetime", self.input_file_lifetime),
            ("batch_lifetime", self.batch_lifetime),
            ("outage_backoff", self.outage_backoff),
            ("max_outage_backoff", self.max_outage_backoff),
            ("max_retry_time", self.max_retry_time),
        ] {
            if span.duration().is_zero() {
                errors.push(format!("{name}: must be longer than 0s"));
            }
        }
        for (name, size) in [
            ("max_file_size", self.max_file_size),
            ("max_line_size", self.max_line_size),
            ("compile_memory", self.compile_memory),
            ("instance_memory", self.instance_memory),
        ] {
            if size.bytes() == 0 {
                errors.push(format!("{name}: must be more than 0"));
            }
        }
        if self.max_requests_per_file == 0 || self.max_reported_errors == 0 {
            errors.push(
                "max_requests_per_file and max_reported_errors: must be at least 1".to_owned(),
            );
        }
        for origin in &self.cors_origins.0 {
            let is_origin = |url: &url::Url| {
                url.origin().is_tuple() && url.origin().ascii_serialization() == *origin
            };
            if origin != "*" && !url::Url::parse(origin).is_ok_and(|url| is_origin(&url)) {
                errors.push(format!(
                    "cors_origins: `{origin}` is not an origin; \
                     write it as https://tool.example.com"
                ));
            }
        }
        for host in &self.allowed_hosts.0 {
            let name = host.strip_prefix("*.").unwrap_or(host);
            if name.is_empty() || name.contains(['/', ':', ' ', '*']) {
                errors.push(format!(
                    "allowed_hosts: `{host}` is not a host name; \
                     write it as batch.example.com or *.example.com"
                ));
            }
        }
        if let Err(error) = telemetry::check(&self.log_level) {
            errors.push(format!("log_level: {error}"));
        }
        errors
    }

    /// Returns the environment variables that look like settings and are not.
    pub fn unknown_variables() -> Vec<environment::UnknownVariable> {
        let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
        environment::unknown_variables(VARIABLES, names)
    }

    /// Returns the names of the completion windows that a client may request.
    pub fn completion_window_names(&self) -> impl Iterator<Item = &str> {
        self.completion_windows.0.iter().map(|(name, _)| name.as_str())
    }

    /// Returns the length of a completion window, or none if a client may not request the window.
    pub fn completion_window(&self, name: &str) -> Option<Duration> {
        self.completion_windows.0.iter().find(|(known, _)| known == name).map(|(_, span)| *span)
    }
}

/// Reads a config file; returns its settings and its errors, each with the path and the line.
fn read(path: &Path) -> Result<(Given, Vec<String>), ConfigError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| ConfigError::Unreadable { path: path.to_owned(), source })?;
    let mut file = File::parse(&text)
        .map_err(|message| ConfigError::Invalid { path: path.to_owned(), message })?;
    let given = Given::from_file(&mut file);
    Ok((
        given,
        file.finish().into_iter().map(|error| format!("{}: {error}", path.display())).collect(),
    ))
}

/// Completion windows that a client may request, each a name and its length.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "NameList")]
pub struct CompletionWindows(Vec<(String, Duration)>);

/// List of strings in the config file, before it is parsed.
#[derive(Deserialize)]
#[serde(transparent)]
struct NameList(Vec<String>);

impl TryFrom<NameList> for CompletionWindows {
    type Error = String;

    fn try_from(NameList(names): NameList) -> Result<Self, String> {
        names.join(",").parse()
    }
}

impl CompletionWindows {
    /// Returns a list of one window; `name` is also its length, such as `24h`.
    pub fn single(name: &str) -> Result<Self, ConfigError> {
        name.parse()
            .map_err(|message| ConfigError::Value { setting: "completion_windows", message })
    }
}

impl Default for CompletionWindows {
    fn default() -> Self {
        Self(vec![("24h".into(), Duration::from_secs(86_400))])
    }
}

impl std::str::FromStr for CompletionWindows {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names = text.split(',').map(str::trim).filter(|name| !name.is_empty());
        let windows = names
            .map(|name| Ok((name.to_owned(), name.parse::<Span>()?.duration())))
            .collect::<Result<Vec<_>, String>>()?;
        if windows.is_empty() {
            Err("name at least one window, such as 24h".into())
        } else {
            Ok(Self(windows))
        }
    }
}

impl std::fmt::Display for CompletionWindows {
    fn fmt(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
        let names: Vec<_> = self.0.iter().map(|(name, _)| format!("'{name}'")).collect();
        formatter.write_str(&names.join(", "))
    }
}

/// List of names, which may be empty; separated by commas in a flag or a variable.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(transparent)]
pub struct Names(pub Vec<String>);

impl std::str::FromStr for Names {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let names = text.split(',').map(str::trim).filter(|name| !name.is_empty());
        Ok(Self(names.map(str::to_owned).collect()))
    }
}

/// Optional socket address.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(transparent)]
pub struct OptionalAddress(pub Option<SocketAddr>);

impl std::str::FromStr for OptionalAddress {
    type Err = std::net::AddrParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(|address| Self(Some(address)))
    }
}

/// Plugins that must be loaded to create a batch.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(try_from = "NameList")]
pub enum RequiredPlugins {
    /// Any validator for each endpoint that an adapter serves.
    Validators,
    /// Plugins with these names; none if the list is empty.
    Named(Vec<String>),
}

impl TryFrom<NameList> for RequiredPlugins {
    type Error = String;

    fn try_from(NameList(names): NameList) -> Result<Self, String> {
        names.join(",").parse()
    }
}

impl std::str::FromStr for RequiredPlugins {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names: Vec<String> = text
            .split(',')
            .map(str::trim)
            .filter(|name| !name.is_empty())
            .map(str::to_owned)
            .collect();
        match names.as_slice() {
            [none] if none == "none" => Ok(Self::Named(Vec::new())),
            [] => Err("name at least one plugin, or write `none` to require none".into()),
            _ => Ok(Self::Named(names)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn from_file(text: &str) -> Result<Settings, String> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        Settings::resolve(Given::default(), Some(file.path())).map_err(|error| error.to_string())
    }

    #[test]
    fn flag_overrides_config_file_and_config_file_overrides_default() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(
            b"max_attempts = 3\nretry_backoff = \"2s\"\ncompletion_windows = [\"24h\", \"1h\"]\n",
        )
        .unwrap();
        let given = Given { retry_backoff: Some(Span::seconds(5)), ..Given::default() };
        let settings = Settings::resolve(given, Some(file.path())).unwrap();
        assert_eq!(settings.max_attempts.get(), 3);
        assert_eq!(settings.retry_backoff.duration(), Duration::from_secs(5));
        assert_eq!(settings.max_requests_per_file, 50_000);
        assert_eq!(settings.completion_window("1h"), Some(Duration::from_secs(3600)));
        assert_eq!(settings.completion_window("2h"), None);
        assert_eq!(settings.cache, Path::new("batchwright-data/cache"));
    }

    #[test]
    fn config_file_errors_name_the_line() {
        for (text, parts) in [
            (
                "a = 1\nlissten = \"x\"",
                vec![
                    "line 1: there is no setting `a`",
                    "line 2: there is no setting `lissten`; did you mean listen?",
                ],
            ),
            (
                "max_attempts = 0\nclient_timeout = 5\n\nmax_file_size = \"x\"",
                vec!["line 1: max_attempts", "line 2: client_timeout", "line 4: max_file_size"],
            ),
            (
                "max_requests_per_file = \"many\"",
                vec!["line 1: max_requests_per_file", "whole number"],
            ),
            (
                "client_timeout = \"0s\"\nlog_level = \"warning\"",
                vec![
                    "client_timeout: must be longer",
                    "log_level: `warning` is no level; did you mean warn?",
                ],
            ),
            ("\n\nmax_file_size = \"12 parsecs\"", vec!["line 3", "12 parsecs", "200MiB"]),
            ("max_attempts = 0", vec!["line 1", "at least 1"]),
            ("completion_windows = []", vec!["at least one window"]),
            ("memory_budget = \"1KiB\"", vec!["memory_budget", "at least 1MiB"]),
            ("listen = ", vec!["line 1"]),
        ] {
            let error = from_file(text).unwrap_err();
            for part in parts {
                assert!(error.contains(part), "`{part}` is missing from: {error}");
            }
        }
    }
}
