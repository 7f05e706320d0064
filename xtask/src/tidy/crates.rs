//! Imports between the crates of the host: the arrows of ARCHITECTURE.md.

use anyhow::{Context, Result};
use toml::Table;

use super::Source;

/// Each crate, and the crates of this repository that it may depend on.
const ALLOWED: [(&str, &[&str]); 1] = [("batchwright", &[])];

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
        for dependency in dependencies.into_iter().flat_map(Table::keys) {
            if dependency.starts_with("batchwright") && !allowed.contains(&dependency.as_str()) {
                faults.push(format!("{}: `{name}` must not use `{dependency}`", source.path));
            }
        }
    }
    Ok(faults)
}
