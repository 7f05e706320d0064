//! Papers of a release: the bill of materials, and the licenses of what is linked into the program.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::examples::{install, program};
use crate::run::{cargo, output, root, run, step};

/// Version of cargo-cyclonedx that writes the bill of materials.
const CARGO_CYCLONEDX: &str = "0.5.9";

/// Name of the bill of materials.
const BILL: &str = "batchwright.cdx.json";

/// First words of the names of files with a license, in capitals.
const LICENSE_FILES: [&str; 6] =
    ["LICENSE", "LICENCE", "COPYING", "NOTICE", "UNLICENSE", "COPYRIGHT"];

/// Number of folders below that of a package that are searched.
const MAX_DEPTH: usize = 2;

/// Package of the bill of materials.
struct Linked {
    name: String,
    version: String,
    license: String,
    folder: PathBuf,
}

/// Adds the papers to the folder of a release.
pub fn add(folder: &Path) -> Result<()> {
    step("bill of materials");
    let bill = bill_of_materials()?;
    fs::write(folder.join(BILL), &bill)?;
    step("licenses");
    let linked = linked(&serde_json::from_str(&bill)?)?;
    fs::write(folder.join("THIRD-PARTY-LICENSES.txt"), licenses(&linked)?)?;
    Ok(())
}

/// Returns the bill of materials, in CycloneDX 1.5.
fn bill_of_materials() -> Result<String> {
    install("cargo-cyclonedx", CARGO_CYCLONEDX, "")?;
    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let mut tool = Command::new(program("cargo-cyclonedx"));
    tool.args(["cyclonedx", "--format", "json", "--spec-version", "1.5", "--no-build-deps"])
        .args(["--quiet", "--target", &target, "--override-filename", "batchwright.cdx"])
        .arg("--manifest-path")
        .arg(root().join("host/Cargo.toml"));
    run(&mut tool)?;
    // The tool writes a file beside each package of the workspace.
    let bill = fs::read_to_string(root().join("host").join(BILL))?;
    for entry in members()? {
        fs::remove_file(entry.join(BILL)).ok();
    }
    // Without the folder of this checkout, the same source has the same bill.
    let here = format!("file://{}", root().display());
    Ok(bill.replace(&here, "file:///batchwright"))
}

/// Returns the folders of the packages of the workspace.
fn members() -> Result<Vec<PathBuf>> {
    Ok(packages(&["--no-deps"])?.into_iter().map(|package| package.folder).collect())
}

/// Returns the packages that cargo knows.
fn packages(more: &[&str]) -> Result<Vec<Linked>> {
    let mut metadata = cargo();
    metadata.args(["metadata", "--format-version", "1", "--locked"]).args(more);
    let found: Value = serde_json::from_str(&output(&mut metadata)?)?;
    let packages = found.get("packages").and_then(Value::as_array).context("no packages")?;
    let package = |package: &Value| Linked {
        name: text(package, "name"),
        version: text(package, "version"),
        license: text(package, "license"),
        folder: PathBuf::from(text(package, "manifest_path")).parent().unwrap_or(&root()).into(),
    };
    Ok(packages.iter().map(package).collect())
}

fn text(value: &Value, name: &str) -> String {
    value.get(name).and_then(Value::as_str).unwrap_or_default().to_owned()
}

/// Returns the packages of the bill that are not of this workspace.
fn linked(bill: &Value) -> Result<Vec<Linked>> {
    let components = bill.get("components").and_then(Value::as_array).context("no components")?;
    let key = |name: &str, version: &str| format!("{name} {version}");
    let wanted: BTreeSet<String> = components
        .iter()
        .map(|component| key(&text(component, "name"), &text(component, "version")))
        .collect();
    let root = root();
    let linked: Vec<Linked> = packages(&[])?
        .into_iter()
        .filter(|package| wanted.contains(&key(&package.name, &package.version)))
        .filter(|package| !package.folder.starts_with(&root))
        .collect();
    ensure!(linked.len() > 100, "only {} linked packages were found", linked.len());
    Ok(linked)
}

/// Returns every license with the packages that it applies to, each text once.
fn licenses(linked: &[Linked]) -> Result<String> {
    let mut texts: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut without = Vec::new();
    for package in linked {
        let shown = format!("{} {} ({})", package.name, package.version, package.license);
        let found = license_files(&package.folder)?;
        if found.is_empty() {
            without.push(shown.clone());
        }
        for path in found {
            let bytes = fs::read(&path).with_context(|| path.display().to_string())?;
            let text = String::from_utf8_lossy(&bytes).replace('\r', "");
            texts.entry(text.trim_end().to_owned()).or_default().push(shown.clone());
        }
    }
    let mut page = String::from(
        "Licenses of the packages that are linked into batchwright\n\n\
         Above each text are the packages that it comes with.\n",
    );
    if !without.is_empty() {
        page.push_str(
            "\nThese packages come without a text; that of the license that they name is below, \
             with others:\n\n",
        );
        for package in &without {
            writeln!(page, "  {package}")?;
        }
    }
    let mut texts: Vec<_> = texts.into_iter().collect();
    texts.sort_by(|one, other| one.1.cmp(&other.1));
    for (text, mut packages) in texts {
        packages.dedup();
        write!(page, "\n{}\n\n", "=".repeat(80))?;
        for package in packages {
            writeln!(page, "  {package}")?;
        }
        write!(page, "\n{text}\n")?;
    }
    Ok(page)
}

/// Returns the files of a package that have a license, also those of code that it contains.
fn license_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let (mut found, mut folders) = (Vec::new(), vec![(folder.to_owned(), 0)]);
    while let Some((folder, depth)) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let entry = entry?;
            let kind = entry.file_type()?;
            let name = entry.file_name().to_string_lossy().to_uppercase();
            let is_license = LICENSE_FILES.iter().any(|start| name.starts_with(start));
            let is_source = [".RS", ".C", ".H", ".PY"].iter().any(|end| name.ends_with(end));
            if kind.is_dir() && depth < MAX_DEPTH {
                folders.push((entry.path(), depth + 1));
            } else if kind.is_file() && is_license && !is_source {
                found.push(entry.path());
            }
        }
    }
    found.sort();
    Ok(found)
}
