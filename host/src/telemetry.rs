//! The operator's log, on standard error.

use std::fmt;
use std::io::IsTerminal;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use batchwright_domain::text::nearest;
use tracing_subscriber::EnvFilter;

/// Names of the levels; a filter may also give a level as a number.
const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// Format of the log on standard error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// Human-readable lines.
    #[default]
    Text,
    /// JSON, with one object per line.
    Json,
}

impl FromStr for LogFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(format!("`{text}` is not a log format; write `text` or `json`")),
        }
    }
}

/// Number from 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ratio(f64);

impl Ratio {
    /// Returns the number.
    pub fn ratio(self) -> f64 {
        self.0
    }
}

impl FromStr for Ratio {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = text.parse::<f64>().ok().filter(|number| (0.0..=1.0).contains(number));
        number.map(Self).ok_or_else(|| format!("`{text}` is not a number from 0 to 1"))
    }
}

/// Valid filter in the syntax of `tracing_subscriber::EnvFilter`, such as `info` or
/// `info,batchwright_egress=debug`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogFilter(String);

impl FromStr for LogFilter {
    type Err = String;

    /// Rejects a word that is not a level: the library would use it as the name of a module, and
    /// then log nothing at all.
    fn from_str(filter: &str) -> Result<Self, String> {
        for part in filter.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let level = part.rsplit_once('=').map_or(part, |(_, level)| level);
            if !LEVELS.iter().any(|known| known.eq_ignore_ascii_case(level)) {
                let hint = nearest(&level.to_lowercase(), &LEVELS).map_or_else(
                    || format!("levels are {}", LEVELS.join(", ")),
                    |near| format!("did you mean `{near}`?"),
                );
                return Err(format!("`{level}` is not a log level; {hint}"));
            }
        }
        EnvFilter::try_new(filter)
            .map_err(|error| format!("`{filter}` is not a log filter: {error}"))?;
        Ok(Self(filter.to_owned()))
    }
}

impl fmt::Display for LogFilter {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

/// Control of the log filter of the process.
#[derive(Clone)]
pub struct LogControl(Arc<Control>);

struct Control {
    /// Filter that is in use.
    current: Mutex<LogFilter>,
    set: Box<dyn Fn(EnvFilter) -> Result<(), String> + Send + Sync>,
}

impl LogControl {
    /// Returns the filter that is in use.
    pub fn current(&self) -> LogFilter {
        self.0.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes the filter, from now on.
    pub fn set(&self, filter: &LogFilter) -> Result<(), String> {
        (self.0.set)(EnvFilter::new(&filter.0))?;
        *self.0.current.lock().unwrap_or_else(PoisonError::into_inner) = filter.clone();
        Ok(())
    }
}

/// Starts logging.
pub fn start(filter: &LogFilter, format: LogFormat) -> LogControl {
    let builder = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(&filter.0))
        // The library would report a failed write to the same stream, and panic.
        .log_internal_errors(false)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    type Set = Box<dyn Fn(EnvFilter) -> Result<(), String> + Send + Sync>;
    let set: Set = match format {
        LogFormat::Text => {
            let builder = builder.with_target(false).with_filter_reloading();
            let handle = builder.reload_handle();
            builder.init();
            Box::new(move |filter| handle.reload(filter).map_err(|error| error.to_string()))
        }
        LogFormat::Json => {
            let builder = builder.json().with_filter_reloading();
            let handle = builder.reload_handle();
            builder.init();
            Box::new(move |filter| handle.reload(filter).map_err(|error| error.to_string()))
        }
    };
    LogControl(Arc::new(Control { current: Mutex::new(filter.clone()), set }))
}
