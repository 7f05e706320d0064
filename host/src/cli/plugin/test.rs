//! `batchwright plugin test`: runs the conformance checks on a component.

use std::path::Path;
use std::process::ExitCode;

use batchwright_plugin::types::Kind;
use batchwright_plugin::{Loader, Plugin, add_defaults, conformance};

use super::show::size_text;
use crate::cli::terminal::outln;
use crate::error::Error;

/// Runs the checks and prints each result; returns failure if a check fails.
pub async fn test(
    loader: &Loader,
    file: &Path,
    cases: Option<&Path>,
    settings: &str,
) -> Result<ExitCode, Error> {
    let plugin = if file.extension().is_some_and(|extension| extension == "toml") {
        if settings != "{}" {
            return Err(Error::Other(
                "--settings is for a component (.wasm); a TOML file has its own [settings]".into(),
            ));
        }
        loader.load_to_test(file).await?
    } else {
        load_component(loader, file, settings).await?
    };
    let description = &plugin.description();
    outln!(
        "{} {} {}, {}",
        plugin.kind(),
        description.name,
        description.version,
        description.summary
    );
    let report = conformance::check(&plugin, cases).await;
    for check in &report.checks {
        match &check.problem {
            None => outln!("ok      {}", check.name),
            Some(problem) => outln!("failed  {}: {problem}", check.name),
        }
    }
    for (function, calls) in report.calls() {
        let (count, memory) = (calls.count(), size_text(calls.memory as u64));
        let (median, longest) = (calls.median().as_micros(), calls.longest().as_micros());
        outln!(
            "cost    {function}: {count} calls, \
             CPU time {median} us (median) to {longest} us, memory up to {memory}"
        );
    }
    let failed = report.failed();
    outln!("{} checks, {failed} failed", report.checks.len());
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Loads a component with a generated TOML file: the given settings, default limits and dummy
/// credentials.
async fn load_component(
    loader: &Loader,
    component: &Path,
    settings: &str,
) -> Result<Plugin, Error> {
    let other = |message: String| Error::Other(message);
    let unusable = |error: &dyn std::fmt::Display| {
        other(format!("--settings: {error}; give a JSON object, such as '{{\"base_url\": \"…\"}}'"))
    };
    let mut settings = serde_json::from_str(settings).map_err(|error| unusable(&error))?;
    let inspected = loader.inspect(component).await?;
    let failed =
        |error: std::io::Error| other(format!("failed to create a temporary folder: {error}"));
    let folder = tempfile::TempDir::new().map_err(failed)?;
    let beside = |name: &str| folder.path().join(name);
    std::fs::copy(component, beside("component.wasm")).map_err(failed)?;
    std::fs::write(beside("secret"), "not-a-secret").map_err(failed)?;
    let mut manifest = toml::Table::new();
    manifest.insert("component".into(), "component.wasm".into());
    if inspected.kind == Kind::Adapter {
        manifest.insert("models".into(), vec![toml::Value::from("m")].into());
    }
    // A default of the schema allows no host, so the defaults are written as settings.
    add_defaults(&mut settings, &inspected.description.settings_schema);
    // Every host of the URLs is allowed, because the checks send no request.
    let urls = settings.iter().filter_map(|(_, value)| url::Url::parse(value.as_str()?).ok());
    let hosts = urls
        .filter_map(|url| Some(format!("{}:{}", url.host_str()?, url.port_or_known_default()?)));
    let hosts: Vec<toml::Value> = hosts.map(toml::Value::from).collect();
    if inspected.kind == Kind::Adapter {
        manifest.insert("allow".into(), hosts.into());
    }
    manifest.insert(
        "settings".into(),
        toml::Table::try_from(settings).map_err(|error| unusable(&error))?.into(),
    );
    let source = toml::Value::from(format!("file:{}", beside("secret").display()));
    let needs = inspected.description.credentials.iter();
    // A credential needs a host, and the settings may have no URL. Nothing is sent to this host.
    let credential = toml::Table::from_iter([
        ("from".to_owned(), source),
        ("hosts".to_owned(), vec![toml::Value::from("host.invalid")].into()),
    ]);
    let credentials: toml::Table =
        needs.map(|need| (need.name.clone(), credential.clone().into())).collect();
    manifest.insert("credentials".into(), credentials.into());
    manifest.insert("allow_plain_http".into(), true.into());
    let file = beside("plugin.toml");
    std::fs::write(&file, manifest.to_string()).map_err(failed)?;
    Ok(loader.load(&file).await?)
}
