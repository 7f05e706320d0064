//! Settings: what they are, where they come from, what they default to.
//!
//! Each stands once, in [`Settings`]: as a flag, as `BATCHWRIGHT_…` in the environment and as a key of the config file. A flag goes
//! before the environment, that before the file, that before the default.

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

/// What an operator can get wrong in settings.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("failed to read the config file {}: {source}", path.display())]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("{}: {message}", path.display())]
    Invalid { path: PathBuf, message: String },
    /// Wherever they were given.
    #[error("{}", .0.join("\n       "))]
    Values(Vec<String>),
    #[error("{setting}: {message}")]
    Value { setting: &'static str, message: String },
}

#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Lines for people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Declares the settings once: as command line flags with environment variables, as keys of the config file, and resolved
/// with their defaults.
macro_rules! settings {
    ($($(#[doc = $doc:literal])+ $heading:literal $value:literal $name:ident: $type:ty = $default:expr, $env:literal;)+) => {
        /// Settings as given on the command line, in the environment or in a file: each may be absent.
        #[derive(Args, Clone, Debug, Default)]
        pub struct Given {
            $($(#[doc = $doc])+ #[arg(long, env = $env, value_name = $value, help_heading = $heading, hide_env_values = true)]
            pub $name: Option<$type>,)+
        }

        /// Settings, each with a value.
        #[derive(Clone, Debug)]
        pub struct Settings {
            $($(#[doc = $doc])+ pub $name: $type,)+
        }

        /// The settings' variables of the environment.
        pub const VARIABLES: &[&str] = &[$($env),+];

        impl Given {
            /// Takes every setting out of a file.
            fn from_file(file: &mut File) -> Self {
                Self { $($name: file.take(stringify!($name)),)+ }
            }

            /// Fills what is absent here from `other`, and the rest with defaults.
            fn or(self, other: Given) -> Settings {
                Settings { $($name: self.$name.or(other.$name).unwrap_or_else(|| $default),)+ }
            }
        }
    };
}

settings! {
    /// Address to listen on; port 0 picks a free one [default: 127.0.0.1:8080]
    "Server" "ADDR" listen: SocketAddr = SocketAddr::from(([127, 0, 0, 1], 8080)), "BATCHWRIGHT_LISTEN";
    /// Folder for the database and the files [default: ./batchwright-data]
    "Server" "DIR" data: PathBuf = "batchwright-data".into(), "BATCHWRIGHT_DATA";
    /// Folder of the plugins, one TOML file each [default: the folder `plugins` beside this program]
    "Server" "DIR" plugins: PathBuf = default_plugins(), "BATCHWRIGHT_PLUGINS";
    /// Requests answered at a time; one more gets 503 [default: 1024]
    "Server" "N" max_connections: Count = Count::of(1024), "BATCHWRIGHT_MAX_CONNECTIONS";
    /// Time a client has for the head of a request; a new connection without one is closed [default: 1m]
    "Server" "TIME" request_head_timeout: Span = Span::seconds(60), "BATCHWRIGHT_REQUEST_HEAD_TIMEOUT";
    /// Time a client has to send a piece of a request's body, or to take a piece of an answer [default: 1m]
    "Server" "TIME" client_timeout: Span = Span::seconds(60), "BATCHWRIGHT_CLIENT_TIMEOUT";
    /// Time a connection is kept open after an answer for the next request; more than that of the load balancer in front [default: 90s]
    "Server" "TIME" keep_alive_timeout: Span = Span::seconds(90), "BATCHWRIGHT_KEEP_ALIVE_TIMEOUT";
    /// Connections from one address at a time; 0 is no bound of its own, as clients behind a proxy share one [default: 0]
    "Server" "N" max_connections_per_address: usize = 0, "BATCHWRIGHT_MAX_CONNECTIONS_PER_ADDRESS";
    /// Names that clients may call this server by in their URLs, separated by commas; `*.example.com` is any name under one. IP addresses and
    /// localhost always count [default: any; on a loopback address: none]
    "Server" "LIST" allowed_hosts: Names = Names::default(), "BATCHWRIGHT_ALLOWED_HOSTS";
    /// Origins of web pages that may use the API, separated by commas, such as https://tool.example.com; `*` is any [default: none]
    "Server" "LIST" cors_origins: Names = Names::default(), "BATCHWRIGHT_CORS_ORIGINS";
    /// Address for health, and the plugins in the operator's words, beside that of the API; never short of connections [default: none]
    "Server" "ADDR" admin_listen: OptionalAddress = OptionalAddress(None), "BATCHWRIGHT_ADMIN_LISTEN";
    /// Time after SIGTERM in which the server works on but says that it is not ready, so that load balancers turn away [default: 0s]
    "Server" "TIME" shutdown_delay: Span = Span::seconds(0), "BATCHWRIGHT_SHUTDOWN_DELAY";
    /// Time that requests in flight are given at a shutdown [default: 30s]
    "Server" "TIME" shutdown_grace: Span = Span::seconds(30), "BATCHWRIGHT_SHUTDOWN_GRACE";
    /// Log filter, such as `info` or `info,batchwright::egress=debug` [default: info]
    "Server" "FILTER" log_level: String = "info".into(), "BATCHWRIGHT_LOG_LEVEL";
    /// Log format [default: text]
    "Server" "FORMAT" log_format: LogFormat = LogFormat::Text, "BATCHWRIGHT_LOG_FORMAT";
    /// Folder of compiled plugins, written by the host alone [default: DATA/cache]
    "Server" "DIR" cache: PathBuf = PathBuf::new(), "BATCHWRIGHT_CACHE";
    /// Time that compiling one plugin may take; more is refused [default: 1m]
    "Server" "TIME" compile_timeout: Span = COMPILE_TIMEOUT, "BATCHWRIGHT_COMPILE_TIMEOUT";
    /// Memory that compiling one plugin may take; more is refused [default: 4GiB]
    "Server" "SIZE" compile_memory: Size = COMPILE_MEMORY, "BATCHWRIGHT_COMPILE_MEMORY";
    /// Public keys (one a line, as OpenSSH writes them): only plugins that one of them signed are loaded [default: unsigned ones are, too]
    "Server" "FILE" trusted_keys: PathBuf = PathBuf::new(), "BATCHWRIGHT_TRUSTED_KEYS";

    /// Plugins without which no batch is created, by name, separated by commas; `none` requires none [default: a validator for each endpoint
    /// that is served]
    "Server" "LIST" required_plugins: RequiredPlugins = RequiredPlugins::Validators, "BATCHWRIGHT_REQUIRED_PLUGINS";

    /// Largest input file [default: 200MiB]
    "Limits" "SIZE" max_file_size: Size = Size::mib(200), "BATCHWRIGHT_MAX_FILE_SIZE";
    /// Requests in one input file [default: 50000]
    "Limits" "N" max_requests_per_file: u64 = 50_000, "BATCHWRIGHT_MAX_REQUESTS_PER_FILE";
    /// Longest line of an input file [default: 16MiB]
    "Limits" "SIZE" max_line_size: Size = Size::mib(16), "BATCHWRIGHT_MAX_LINE_SIZE";
    /// Faults listed for a rejected file; a last entry says how many more there are [default: 1000]
    "Limits" "N" max_reported_errors: usize = 1000, "BATCHWRIGHT_MAX_REPORTED_ERRORS";
    /// Completion windows a client may ask for, separated by commas [default: 24h]
    "Limits" "LIST" completion_windows: CompletionWindows = CompletionWindows::default(), "BATCHWRIGHT_COMPLETION_WINDOWS";
    /// Pairs of metadata of a batch [default: 16]
    "Limits" "N" max_metadata_pairs: usize = 16, "BATCHWRIGHT_MAX_METADATA_PAIRS";
    /// Characters of a key of metadata [default: 64]
    "Limits" "N" max_metadata_key: usize = 64, "BATCHWRIGHT_MAX_METADATA_KEY";
    /// Characters of a value of metadata [default: 512]
    "Limits" "N" max_metadata_value: usize = 512, "BATCHWRIGHT_MAX_METADATA_VALUE";
    /// Batches in one page of a list [default: 100]
    "Limits" "N" max_batches_per_page: Count = Count::of(100), "BATCHWRIGHT_MAX_BATCHES_PER_PAGE";
    /// Files in one page of a list [default: 10000]
    "Limits" "N" max_files_per_page: Count = Count::of(10_000), "BATCHWRIGHT_MAX_FILES_PER_PAGE";
    /// How long an input file is kept that names no time of its own [default: 30d]
    "Limits" "TIME" input_file_lifetime: Span = Span::seconds(30 * 86_400), "BATCHWRIGHT_INPUT_FILE_LIFETIME";

    /// How long a file of answers is kept whose batch names no time of its own; 0s is for ever. It counts for files made from then on
    /// [default: 0s]
    "Limits" "TIME" output_file_lifetime: Span = Span::seconds(0), "BATCHWRIGHT_OUTPUT_FILE_LIFETIME";
    /// The same for a file of failed requests [default: 0s]
    "Limits" "TIME" error_file_lifetime: Span = Span::seconds(0), "BATCHWRIGHT_ERROR_FILE_LIFETIME";

    /// How long a batch is remembered after its end; longer if a file of its results is still there [default: 90d]
    "Limits" "TIME" batch_lifetime: Span = Span::seconds(90 * 86_400), "BATCHWRIGHT_BATCH_LIFETIME";

    /// Batches executed at a time of those that go to one provider; also batches validated, and finished, at a time [default: 16]
    "Execution" "N" max_concurrent_batches: Count = Count::of(16), "BATCHWRIGHT_MAX_CONCURRENT_BATCHES";
    /// Batches executed at a time, of all providers together; each provider has at least one [default: 64]
    "Execution" "N" max_executing_batches: Count = Count::of(64), "BATCHWRIGHT_MAX_EXECUTING_BATCHES";
    /// Requests of one batch under way at a time [default: 256]
    "Execution" "N" max_concurrent_requests_per_batch: Count = Count::of(256), "BATCHWRIGHT_MAX_CONCURRENT_REQUESTS_PER_BATCH";
    /// Memory for all that clients and providers send and are sent: lines, responses, results, uploads, lists [default: 64MiB]
    "Execution" "SIZE" memory_budget: Size = MEMORY_BUDGET, "BATCHWRIGHT_MEMORY_BUDGET";
    /// Memory for the instances of all plugins [default: 128MiB]
    "Execution" "SIZE" instance_memory: Size = INSTANCE_MEMORY, "BATCHWRIGHT_INSTANCE_MEMORY";
    /// Time that requests in flight are given when their batch is cancelled or expires [default: 10s]
    "Execution" "TIME" stop_grace: Span = Span::seconds(10), "BATCHWRIGHT_STOP_GRACE";
    /// Attempts at a request, the first one included [default: 10]
    "Execution" "N" max_attempts: Count = Count::of(10), "BATCHWRIGHT_MAX_ATTEMPTS";
    /// Attempts at a request that may have reached the provider and brought no answer: each may be paid for [default: 3]
    "Execution" "N" max_unanswered_attempts: Count = Count::of(3), "BATCHWRIGHT_MAX_UNANSWERED_ATTEMPTS";
    /// Time after which a request is not tried again; what it waits for a provider that is away, or whose limit is reached, does not count
    /// [default: 1h]
    "Execution" "TIME" max_retry_time: Span = Span::seconds(3600), "BATCHWRIGHT_MAX_RETRY_TIME";
    /// Pause before the second attempt; it doubles with each further one [default: 500ms]
    "Execution" "TIME" retry_backoff: Span = Span::milliseconds(500), "BATCHWRIGHT_RETRY_BACKOFF";
    /// Longest pause of our own choosing between attempts [default: 1m]
    "Execution" "TIME" max_retry_backoff: Span = Span::seconds(60), "BATCHWRIGHT_MAX_RETRY_BACKOFF";
    /// Pause before a provider that is away is tried again; it doubles with each further one [default: 1s]
    "Execution" "TIME" outage_backoff: Span = Span::seconds(1), "BATCHWRIGHT_OUTAGE_BACKOFF";
    /// Longest pause between two looks whether a provider is back [default: 1m]
    "Execution" "TIME" max_outage_backoff: Span = Span::seconds(60), "BATCHWRIGHT_MAX_OUTAGE_BACKOFF";
    /// Time without an answer from a provider after which the requests that wait for it fail; 0s lets them wait for as long as their batch's
    /// window [default: 0s]. `run` has no window: it stops then, and keeps its state [default: 10m]
    "Execution" "TIME" max_outage: Span = Span::seconds(0), "BATCHWRIGHT_MAX_OUTAGE";
}

/// Memory that is bounded as a whole.
pub const MEMORY_BUDGET: Size = Size::mib(64);
pub const INSTANCE_MEMORY: Size = Size::mib(128);

/// What compiling one plugin may take.
pub const COMPILE_TIMEOUT: Span = Span::seconds(60);
pub const COMPILE_MEMORY: Size = Size::mib(4096);

/// The folder `plugins` beside the running program, or in the working directory if it does not know where it is.
pub fn default_plugins() -> PathBuf {
    let program = std::env::current_exe().ok();
    program
        .and_then(|program| Some(program.parent()?.join("plugins")))
        .unwrap_or_else(|| "plugins".into())
}

impl Settings {
    /// Resolves what was given, with the config file if there is one.
    pub fn resolve(given: Given, file: Option<&Path>) -> Result<Self, ConfigError> {
        let (from_file, mut wrong) = file.map(read).transpose()?.unwrap_or_default();
        let mut settings = given.or(from_file);
        if settings.cache.as_os_str().is_empty() {
            settings.cache = settings.data.join("cache");
        }
        wrong.extend(settings.wrong());
        if wrong.is_empty() { Ok(settings) } else { Err(ConfigError::Values(wrong)) }
    }

    /// Values that no server could work with.
    fn wrong(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        if self.memory_budget.bytes() < Size::mib(1).bytes() {
            wrong.push("memory_budget: must be at least 1MiB".to_owned());
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
                wrong.push(format!("{name}: must be longer than 0s"));
            }
        }
        for (name, size) in [
            ("max_file_size", self.max_file_size),
            ("max_line_size", self.max_line_size),
            ("compile_memory", self.compile_memory),
            ("instance_memory", self.instance_memory),
        ] {
            if size.bytes() == 0 {
                wrong.push(format!("{name}: must be more than 0"));
            }
        }
        if self.max_requests_per_file == 0 || self.max_reported_errors == 0 {
            wrong.push(
                "max_requests_per_file and max_reported_errors: must be at least 1".to_owned(),
            );
        }
        for origin in &self.cors_origins.0 {
            let is_origin = |url: &url::Url| {
                url.origin().is_tuple() && url.origin().ascii_serialization() == *origin
            };
            if origin != "*" && !url::Url::parse(origin).is_ok_and(|url| is_origin(&url)) {
                wrong.push(format!(
                    "cors_origins: `{origin}` is no origin; write it as https://tool.example.com"
                ));
            }
        }
        for host in &self.allowed_hosts.0 {
            let name = host.strip_prefix("*.").unwrap_or(host);
            if name.is_empty() || name.contains(['/', ':', ' ', '*']) {
                wrong.push(format!(
                    "allowed_hosts: `{host}` is no name; write it as batch.example.com or *.example.com"
                ));
            }
        }
        if let Err(error) = telemetry::check(&self.log_level) {
            wrong.push(format!("log_level: {error}"));
        }
        wrong
    }

    /// Warnings about what was given and does nothing.
    pub fn warnings() -> Vec<String> {
        let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
        environment::warnings(VARIABLES, names)
    }

    /// The completion windows a client may ask for.
    pub fn completion_window_names(&self) -> impl Iterator<Item = &str> {
        self.completion_windows.0.iter().map(|(name, _)| name.as_str())
    }

    /// How long a client's completion window is, if it may ask for it.
    pub fn completion_window(&self, name: &str) -> Option<Duration> {
        self.completion_windows.0.iter().find(|(known, _)| known == name).map(|(_, span)| *span)
    }
}

/// What a file says, and what is wrong in it.
fn read(path: &Path) -> Result<(Given, Vec<String>), ConfigError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| ConfigError::Unreadable { path: path.to_owned(), source })?;
    let mut file = File::parse(&text)
        .map_err(|message| ConfigError::Invalid { path: path.to_owned(), message })?;
    let given = Given::from_file(&mut file);
    Ok((
        given,
        file.end().into_iter().map(|wrong| format!("{}: {wrong}", path.display())).collect(),
    ))
}

/// The windows a client may name, each with its length.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "Listed")]
pub struct CompletionWindows(Vec<(String, Duration)>);

/// Windows as the config file has them.
#[derive(Deserialize)]
#[serde(transparent)]
struct Listed(Vec<String>);

impl TryFrom<Listed> for CompletionWindows {
    type Error = String;

    fn try_from(Listed(names): Listed) -> Result<Self, String> {
        names.join(",").parse()
    }
}

impl CompletionWindows {
    /// This window alone.
    pub fn of(name: &str) -> Result<Self, ConfigError> {
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

/// Names in a list, which may be empty.
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

/// An address, or none.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(transparent)]
pub struct OptionalAddress(pub Option<SocketAddr>);

impl std::str::FromStr for OptionalAddress {
    type Err = std::net::AddrParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(|address| Self(Some(address)))
    }
}

/// The plugins without which no batch is created.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(try_from = "Listed")]
pub enum RequiredPlugins {
    /// A validator for each endpoint that an adapter serves.
    Validators,
    /// Those of these names.
    Named(Vec<String>),
}

impl TryFrom<Listed> for RequiredPlugins {
    type Error = String;

    fn try_from(Listed(names): Listed) -> Result<Self, String> {
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
    fn a_flag_goes_before_the_file_and_the_file_before_the_default() {
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
    fn what_is_wrong_in_a_file_is_named_with_its_line() {
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
