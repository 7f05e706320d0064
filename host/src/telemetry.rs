//! The operator's log, on standard error.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::config::LogFormat;

/// Levels, by name. A number is one, too.
const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// Refuses a filter that would say nothing at all: the library takes an unknown word for the name of a module.
pub fn check(filter: &str) -> Result<(), String> {
    for part in filter.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let level = part.rsplit_once('=').map_or(part, |(_, level)| level);
        if !LEVELS.iter().any(|known| known.eq_ignore_ascii_case(level)) {
            let near = crate::config::nearest(&level.to_lowercase(), &LEVELS);
            let near = near.map_or_else(
                || format!("levels are {}", LEVELS.join(", ")),
                |near| format!("did you mean {near}?"),
            );
            return Err(format!("`{level}` is no level; {near}"));
        }
    }
    EnvFilter::try_new(filter)
        .map(drop)
        .map_err(|error| format!("`{filter}` is not a log filter: {error}"))
}

/// Starts logging. `filter` has the syntax of `tracing_subscriber::EnvFilter`, such as `info` or `info,batchwright::egress=debug`.
pub fn start(filter: &str, format: LogFormat) -> Result<(), String> {
    let filter = EnvFilter::try_new(filter).map_err(|error| {
        format!("log_level `{filter}` is not a log filter ({error}); try `info` or `debug`")
    })?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        // The library would say so on the same stream, and panic.
        .log_internal_errors(false)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    match format {
        LogFormat::Text => builder.with_target(false).init(),
        LogFormat::Json => builder.json().init(),
    }
    Ok(())
}
