//! Imports between the crates of the host, as in the diagram of ARCHITECTURE.md.

use anyhow::{Context, Result};
use toml::Table;

use super::Source;

/// Each crate, and the crates of this repository that it may depend on.
const ALLOWED: [(&str, &[&str]); 11] = [
    ("batchwright-domain", &[]),
    ("batchwright-telemetry", &[]),
    ("batchwright-memory", &["domain", "telemetry"]),
    ("batchwright-tenancy", &["domain"]),
    ("batchwright-egress", &["domain", "telemetry", "memory"]),
    ("batchwright-store", &["domain", "telemetry"]),
    ("batchwright-plugin", &["domain", "telemetry", "memory", "egress"]),
    ("batchwright-webhooks", &["domain", "telemetry", "tenancy", "egress", "store"]),
    (
        "batchwright-batch",
        &["domain", "telemetry", "memory", "tenancy", "egress", "store", "plugin"],
    ),
    (
        "batchwright-api",
        &["domain", "telemetry", "memory", "tenancy", "store", "plugin", "webhooks", "batch"],
    ),
    (
        "batchwright",
        &[
            "domain",
            "telemetry",
            "memory",
            "tenancy",
            "egress",
            "store",
            "plugin",
            "webhooks",
            "batch",
            "api",
        ],
    ),
];

/// Returns each dependency between crates that is not allowed.
pub fn faults(sources: &[Source]) -> Result<Vec<String>> {
    let mut faults = Vec::new();
    for source in sources {
        let of_host = source.path == "host/Cargo.toml" || source.path.starts_with("crates/");
        if !of_host || !source.path.ends_with("Cargo.toml") {
            continue;
        }
        let manifest: Table =
            source.text.parse().with_context(|| format!("failed to parse {}", source.path))?;
        let package = manifest.get("package").and_then(|package| package.get("name"));
        let name = package.and_then(|name| name.as_str()).context("a package has a name")?;
        let Some((_, allowed)) = ALLOWED.iter().find(|(known, _)| *known == name) else {
            faults.push(format!("{}: `{name}` is not in the table of crates", source.path));
            continue;
        };
        let dependencies = manifest.get("dependencies").and_then(|found| found.as_table());
        let ours = dependencies
            .into_iter()
            .flat_map(Table::keys)
            .filter_map(|dependency| dependency.strip_prefix("batchwright-"));
        for dependency in ours.filter(|dependency| !allowed.contains(dependency)) {
            faults.push(format!("{}: `{name}` must not use `{dependency}`", source.path));
        }
    }
    Ok(faults)
}
