//! `batchwright plugin list`, `inspect` and `check`: show the state of plugins and components.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use batchwright_domain::text::printable;
use batchwright_domain::units::Size;
use batchwright_plugin::{Inspected, LoadError, Loader, Plugin, Registry};
use serde_json::Value;

use crate::cli::client::Client;
use crate::cli::progress::Progress;
use crate::cli::terminal::{outln, write_output};
use crate::clock::Clock;
use crate::error::Error;

/// Prints the plugins of a folder; returns failure if a plugin cannot be loaded.
pub fn list(registry: &Registry) -> ExitCode {
    let plugins = registry.current();
    if plugins.entries.is_empty() {
        outln!("no plugins: the folder has no .toml file");
        return ExitCode::SUCCESS;
    }
    let mut rows = vec![["NAME", "KIND", "VERSION", "STATE", "SERVES"].map(String::from)];
    for entry in &plugins.entries {
        rows.push(match &entry.serving {
            Some(plugin) => {
                let (state, served) = (entry.state().as_str().into(), serves(plugin));
                [
                    entry.name.clone(),
                    plugin.kind().to_string(),
                    plugin.description().version.clone(),
                    state,
                    served,
                ]
            }
            None => [
                entry.name.clone(),
                "-".into(),
                "-".into(),
                entry.state().as_str().into(),
                "-".into(),
            ],
        });
    }
    write_output(format_args!("{}", table(&rows)));
    for error in plugins.entries.iter().filter_map(|entry| entry.error.as_ref()) {
        outln!("\nfailed: {error}");
    }
    status(plugins.entries.iter().all(|entry| entry.error.is_none()))
}

/// Returns the exit code of `list` and `check`.
fn status(all_loaded: bool) -> ExitCode {
    if all_loaded { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Prints the plugins of a server with their outages; returns failure if a plugin is not loaded.
pub async fn list_of_server(client: &Client) -> Result<ExitCode, Error> {
    let list = client.get("plugins").await?;
    let plugins: Vec<&Value> =
        list.get("data").and_then(Value::as_array).into_iter().flatten().collect();
    let text =
        |value: &Value, key: &str| value.get(key).and_then(Value::as_str).unwrap_or("-").to_owned();
    let mut rows = vec![["NAME", "KIND", "VERSION", "STATE", "SERVES"].map(String::from)];
    let (mut notes, mut all_loaded) = (Vec::new(), true);
    let now = Clock::system().now();
    for plugin in plugins {
        let models: Vec<&str> = plugin
            .get("models")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        let name = text(plugin, "name");
        all_loaded &= !matches!(text(plugin, "state").as_str(), "failed" | "outdated");
        let waiting = plugin.get("waiting").filter(|waiting| waiting.is_object());
        let all = plugin.get("outages").and_then(Value::as_array).into_iter().flatten();
        let outages: Vec<&Value> = all.chain(waiting).collect();
        let state = if outages.is_empty() { text(plugin, "state") } else { "waiting".into() };
        rows.push([
            name.clone(),
            text(plugin, "kind"),
            text(plugin, "version"),
            state,
            models.join(", "),
        ]);
        for outage in outages {
            let seconds = |key: &str| outage.get(key).and_then(Value::as_i64).unwrap_or(0);
            let since = humantime::format_duration(Duration::from_secs(
                u64::try_from(now.as_seconds().saturating_sub(seconds("since"))).unwrap_or(0),
            ));
            let left = u64::try_from(seconds("next_attempt_at").saturating_sub(now.as_seconds()))
                .unwrap_or(0);
            let requests = match outage.get("waiting_requests").and_then(Value::as_u64) {
                Some(number) => format!(", {number} requests wait"),
                None => String::new(),
            };
            let message = Progress::waiting_message(&text(outage, "message"), left);
            notes.push(format!("{name}: {message}; since {since}{requests}"));
        }
        if let Some(error) = plugin.get("error").and_then(Value::as_str) {
            notes.push(format!("{name}: {error}"));
        }
    }
    write_output(format_args!("{}", table(&rows)));
    for note in notes {
        outln!("\n{note}");
    }
    Ok(status(all_loaded))
}

/// Returns the models of an adapter, or the scope of a validator.
fn serves(plugin: &Plugin) -> String {
    let models: BTreeSet<&str> = plugin
        .routing()
        .models
        .iter()
        .chain(plugin.routing().aliases.keys())
        .map(String::as_str)
        .collect();
    if models.is_empty() {
        format!("all batches (order {})", plugin.routing().order)
    } else {
        models.into_iter().collect::<Vec<_>>().join(", ")
    }
}

/// Formats rows as a table; each column is as wide as its widest cell.
fn table<const COLUMNS: usize>(rows: &[[String; COLUMNS]]) -> String {
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max()
    };
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> = row
            .iter()
            .enumerate()
            .map(|(column, cell)| format!("{cell:<width$}", width = width(column).unwrap_or(0)))
            .collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// Returns the output of `inspect` for a component.
pub fn describe(file: &Path, inspected: &Inspected) -> String {
    let join_or = |list: &[String], none: &str| {
        if list.is_empty() { none.to_owned() } else { list.join(", ") }
    };
    let description = &inspected.description;
    let mut rows = vec![
        ["file".to_owned(), file.display().to_string()],
        ["kind".into(), inspected.kind.to_string()],
        ["contract".into(), format!("batchwright:plugin@{}", inspected.version)],
        ["name".into(), format!("{} {}", description.name, description.version)],
        ["summary".into(), description.summary.clone()],
        ["imports".into(), join_or(&inspected.imports, "nothing")],
        ["endpoints".into(), join_or(&description.endpoints, "all")],
    ];
    for need in &description.credentials {
        let prefix = if need.prefix.is_empty() {
            String::new()
        } else {
            format!("{} ", need.prefix.trim_end())
        };
        let required = if need.required { "required" } else { "optional" };
        rows.push([
            "credential".into(),
            format!("{} ({required}), sent as `{}: {prefix}…`", need.name, need.header),
        ]);
    }
    if description.credentials.is_empty() {
        rows.push(["credential".into(), "none".into()]);
    }
    let settings =
        description.settings_schema.get("properties").and_then(|found| found.as_object());
    if settings.is_none_or(serde_json::Map::is_empty) {
        rows.push(["setting".into(), "none".into()]);
    }
    for (name, schema) in settings.into_iter().flatten() {
        let text = schema.get("description").and_then(|text| text.as_str()).unwrap_or_default();
        let default = schema
            .get("default")
            .map(|default| format!(" (default {default})"))
            .unwrap_or_default();
        rows.push(["setting".into(), printable(&format!("{name}: {text}{default}"), 500)]);
    }
    let size = inspected.size as u64;
    rows.push(["size".into(), size_text(size)]);
    rows.push(["sha256".into(), inspected.sha256.clone()]);
    table(&rows)
}

/// Formats a size in KiB below 10 MiB and in MiB above.
pub fn size_text(bytes: u64) -> String {
    if bytes < Size::mib(10).bytes() {
        format!("{} KiB", bytes.div_ceil(1024))
    } else {
        format!("{} MiB", bytes >> 20)
    }
}

/// Checks a component, a TOML file or a folder; for a folder also conflicts between plugins.
pub async fn check(loader: Loader, path: &Path) -> Result<ExitCode, Error> {
    let unreadable = |error| Error::Other(format!("failed to read {}: {error}", path.display()));
    if std::fs::metadata(path).map_err(unreadable)?.is_dir() {
        let plugins = Registry::open(path, loader).await?.current();
        if plugins.entries.is_empty() {
            return Err(Error::Other(format!(
                "there is no .toml file in {}; name another folder",
                path.display()
            )));
        }
        for entry in &plugins.entries {
            match (&entry.error, &entry.serving) {
                (Some(error), _) => outln!("failed  {error}"),
                (None, Some(plugin)) => {
                    outln!(
                        "ok      {} ({} {})",
                        entry.file.display(),
                        plugin.kind(),
                        plugin.description().version
                    );
                }
                (None, None) => outln!("off     {}", entry.file.display()),
            }
        }
        return Ok(status(plugins.entries.iter().all(|entry| entry.error.is_none())));
    }
    let found = if path.extension().is_some_and(|extension| extension == "toml") {
        loader.load(path).await.map(|plugin| (plugin.kind(), plugin.description().version.clone()))
    } else {
        loader.inspect(path).await.map(|inspected| (inspected.kind, inspected.description.version))
    };
    match found {
        Ok((kind, version)) => outln!("ok      {} ({kind} {version})", path.display()),
        Err(LoadError::Disabled { .. }) => outln!("off     {}", path.display()),
        Err(error) => {
            outln!("failed  {error}");
            return Ok(ExitCode::FAILURE);
        }
    }
    Ok(ExitCode::SUCCESS)
}
