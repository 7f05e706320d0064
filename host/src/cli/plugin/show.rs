//! `batchwright plugin list`, `inspect` and `check`

use std::path::Path;
use std::process::ExitCode;

use crate::cli::Error;
use crate::config::Size;
use crate::plugin::{Inspected, LoadError, Loader, Plugin, Registry, for_people};

#[expect(clippy::print_stdout, reason = "what is found is the command's output")]
pub fn list(registry: &Registry) {
    let plugins = registry.current();
    if plugins.entries.is_empty() {
        println!("There is no plugin: no .toml file is in the directory.");
        return;
    }
    let mut rows = vec![["NAME", "KIND", "VERSION", "STATE", "SERVES"].map(String::from)];
    for entry in &plugins.entries {
        rows.push(match &entry.serving {
            Some(plugin) => {
                let (state, served) = (entry.state().as_str().into(), serves(plugin));
                [entry.name.clone(), plugin.kind.to_string(), plugin.description.version.clone(), state, served]
            }
            None => [entry.name.clone(), "-".into(), "-".into(), entry.state().as_str().into(), "-".into()],
        });
    }
    print!("{}", table(&rows));
    for error in plugins.entries.iter().filter_map(|entry| entry.error.as_ref()) {
        println!("\nfailed: {error}");
    }
}

fn serves(plugin: &Plugin) -> String {
    let models: Vec<&str> = plugin.models.iter().chain(plugin.aliases.keys()).map(String::as_str).collect();
    if models.is_empty() { format!("all batches (order {})", plugin.order) } else { models.join(", ") }
}

/// Columns as wide as their widest cell.
fn table<const COLUMNS: usize>(rows: &[[String; COLUMNS]]) -> String {
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
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

/// What `inspect` prints.
pub fn describe(file: &Path, inspected: &Inspected) -> String {
    let or = |list: &[String], none: &str| if list.is_empty() { none.to_owned() } else { list.join(", ") };
    let description = &inspected.description;
    let mut rows = vec![
        ["file".to_owned(), file.display().to_string()],
        ["kind".into(), inspected.kind.to_string()],
        ["contract".into(), format!("batchwright:plugin@{}", inspected.version)],
        ["name".into(), format!("{} {}", description.name, description.version)],
        ["summary".into(), description.summary.clone()],
        ["imports".into(), or(&inspected.imports, "nothing")],
        ["endpoints".into(), or(&description.endpoints, "all")],
    ];
    for need in &description.credentials {
        let prefix = if need.prefix.is_empty() { String::new() } else { format!("{} ", need.prefix.trim_end()) };
        let required = if need.required { "required" } else { "optional" };
        rows.push(["credential".into(), format!("{} ({required}), sent as `{}: {prefix}…`", need.name, need.header)]);
    }
    if description.credentials.is_empty() {
        rows.push(["credential".into(), "none".into()]);
    }
    let settings = description.settings_schema.get("properties").and_then(|found| found.as_object());
    if settings.is_none_or(serde_json::Map::is_empty) {
        rows.push(["setting".into(), "none".into()]);
    }
    for (name, schema) in settings.into_iter().flatten() {
        let text = schema.get("description").and_then(|text| text.as_str()).unwrap_or_default();
        let default = schema.get("default").map(|default| format!(" (default {default})")).unwrap_or_default();
        rows.push(["setting".into(), for_people(&format!("{name}: {text}{default}"), 500)]);
    }
    let size = inspected.size as u64;
    rows.push(["size".into(), size_text(size)]);
    rows.push(["sha256".into(), inspected.sha256.clone()]);
    table(&rows)
}

pub fn size_text(bytes: u64) -> String {
    if bytes < Size::mib(10).bytes() { format!("{} KiB", bytes.div_ceil(1024)) } else { format!("{} MiB", bytes >> 20) }
}

#[expect(clippy::print_stdout, reason = "what is found is the command's output")]
pub async fn check(loader: &Loader, path: &Path) -> Result<ExitCode, Error> {
    let unreadable = |error| Error::Other(format!("failed to read {}: {error}", path.display()));
    let mut files = Vec::new();
    if std::fs::metadata(path).map_err(unreadable)?.is_dir() {
        for found in std::fs::read_dir(path).map_err(unreadable)? {
            files.push(found.map_err(unreadable)?.path());
        }
        files.retain(|file| file.extension().is_some_and(|extension| extension == "toml"));
        files.sort();
        if files.is_empty() {
            return Err(Error::Other(format!("there is no .toml file in {}", path.display())));
        }
    } else {
        files.push(path.to_owned());
    }
    let mut all_well = true;
    for file in files {
        let found = if file.extension().is_some_and(|extension| extension == "toml") {
            loader.load(&file).await.map(|plugin| (plugin.kind, plugin.description.version))
        } else {
            loader.inspect(&file).await.map(|inspected| (inspected.kind, inspected.description.version))
        };
        match found {
            Ok((kind, version)) => println!("ok      {} ({kind} {version})", file.display()),
            Err(LoadError::Disabled { .. }) => println!("off     {}", file.display()),
            Err(error) => {
                all_well = false;
                println!("failed  {error}");
            }
        }
    }
    Ok(if all_well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
