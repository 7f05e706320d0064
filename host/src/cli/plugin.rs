//! `batchwright plugin`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Subcommand;

use super::{Error, user_cache};
use crate::clock::Clock;
use crate::config::{LogFormat, Size, default_plugins};
use crate::plugin::types::Kind;
use crate::plugin::{Inspected, LoadError, Loader, Plugin as Loaded, Registry, conformance};
use crate::telemetry;

#[derive(Subcommand)]
pub enum Plugin {
    /// List the plugins of a directory, with those that do not load
    List {
        /// Folder of the plugins [default: the folder `plugins` beside this program]
        #[arg(long, env = "BATCHWRIGHT_PLUGINS", value_name = "DIR", hide_env_values = true)]
        plugins: Option<PathBuf>,
    },
    /// Show what a component is: its kind, imports, endpoints, credentials and settings
    Inspect {
        /// A component (.wasm)
        file: PathBuf,
    },
    /// Check that plugins load: a component, a TOML file, or a directory of them
    Check {
        /// A component (.wasm), a TOML file, or a directory
        path: PathBuf,
    },
    /// Test a component against the contract: good, odd and hostile input, and cases that its author recorded
    Test {
        /// A component (.wasm), or a TOML file with settings and limits for one
        file: PathBuf,
        /// Folder of recorded cases (*.json)
        #[arg(long, value_name = "DIR")]
        cases: Option<PathBuf>,
        /// Settings for a component that is given without a TOML file
        #[arg(long, value_name = "JSON", default_value = "{}")]
        settings: String,
    },
}

#[expect(clippy::print_stdout, reason = "what is found is the command's output")]
impl Plugin {
    pub async fn run(self) -> Result<ExitCode, Error> {
        telemetry::start("off", LogFormat::Text).map_err(Error::Other)?;
        let loader = Loader::new(&user_cache(), Clock::system())?;
        match self {
            Self::List { plugins } => {
                let plugins = plugins.unwrap_or_else(default_plugins);
                let registry = Registry::open(&plugins, loader).await?;
                list(&registry);
                Ok(ExitCode::SUCCESS)
            }
            Self::Inspect { file } => {
                let inspected = loader.inspect(&file).await?;
                print!("{}", describe(&file, &inspected));
                Ok(ExitCode::SUCCESS)
            }
            Self::Check { path } => check(&loader, &path).await,
            Self::Test { file, cases, settings } => test(&loader, &file, cases.as_deref(), &settings).await,
        }
    }
}

#[expect(clippy::print_stdout, reason = "what is found is the command's output")]
fn list(registry: &Registry) {
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

fn serves(plugin: &Loaded) -> String {
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

fn describe(file: &Path, inspected: &Inspected) -> String {
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
    let settings = description.settings_schema.get("properties").and_then(|found| found.as_object());
    for (name, schema) in settings.into_iter().flatten() {
        let text = schema.get("description").and_then(|text| text.as_str()).unwrap_or_default();
        rows.push(["setting".into(), format!("{name}: {text}")]);
    }
    let size = inspected.size as u64;
    rows.push(["size".into(), size_text(size)]);
    rows.push(["sha256".into(), inspected.sha256.clone()]);
    table(&rows)
}

fn size_text(bytes: u64) -> String {
    if bytes < Size::mib(10).bytes() { format!("{} KiB", bytes.div_ceil(1024)) } else { format!("{} MiB", bytes >> 20) }
}

#[expect(clippy::print_stdout, reason = "what is found is the command's output")]
async fn check(loader: &Loader, path: &Path) -> Result<ExitCode, Error> {
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

#[expect(clippy::print_stdout, reason = "what is found is the command's output")]
async fn test(loader: &Loader, file: &Path, cases: Option<&Path>, settings: &str) -> Result<ExitCode, Error> {
    let plugin = if file.extension().is_some_and(|extension| extension == "toml") {
        loader.load(file).await?
    } else {
        load_alone(loader, file, settings).await?
    };
    let description = &plugin.description;
    println!("{} {} {}, {}", plugin.kind, description.name, description.version, description.summary);
    let report = conformance::check(&plugin, cases).await;
    for check in &report.checks {
        match &check.problem {
            None => println!("ok      {}", check.name),
            Some(problem) => println!("failed  {}: {problem}", check.name),
        }
    }
    for timing in &report.timings {
        let (median, longest) = (timing.median.as_micros(), timing.longest.as_micros());
        println!("time    {}: median {median} us, longest {longest} us, {} calls", timing.function, timing.calls);
    }
    println!("memory  {} of an instance", size_text(report.memory as u64));
    let failed = report.failed();
    println!("{} checks, {failed} failed", report.checks.len());
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Loads a component with a TOML file made for it: with these settings, the default limits, and credentials that open nothing.
async fn load_alone(loader: &Loader, component: &Path, settings: &str) -> Result<Loaded, Error> {
    let other = |message: String| Error::Other(message);
    let settings: toml::Table = serde_json::from_str(settings).map_err(|error| {
        other(format!("--settings: {error}; give a JSON object, such as '{{\"base_url\": \"…\"}}'"))
    })?;
    let inspected = loader.inspect(component).await?;
    let failed = |error: std::io::Error| other(format!("no temporary folder can be made: {error}"));
    let folder = tempfile::TempDir::new().map_err(failed)?;
    let beside = |name: &str| folder.path().join(name);
    std::fs::copy(component, beside("component.wasm")).map_err(failed)?;
    std::fs::write(beside("secret"), "not-a-secret").map_err(failed)?;
    let mut manifest = toml::Table::new();
    manifest.insert("component".into(), "component.wasm".into());
    if inspected.kind == Kind::Adapter {
        manifest.insert("models".into(), vec![toml::Value::from("m")].into());
    }
    manifest.insert("settings".into(), settings.into());
    let source = toml::Value::from(format!("file:{}", beside("secret").display()));
    let needs = inspected.description.credentials.iter();
    let credentials: toml::Table = needs.map(|need| (need.name.clone(), source.clone())).collect();
    manifest.insert("credentials".into(), credentials.into());
    let file = beside("plugin.toml");
    std::fs::write(&file, manifest.to_string()).map_err(failed)?;
    Ok(loader.load(&file).await?)
}
