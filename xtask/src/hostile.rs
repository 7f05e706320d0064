//! Builds the hostile components of the tests into `target/hostile`.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use wit_component::{ComponentEncoder, StringEncoding, embed_component_metadata};
use wit_parser::Resolve;

use crate::build::{add_target, components, write_if_changed};
use crate::examples::WASI_TARGET;
use crate::run::{cargo, root, run, step, target};

/// Builds all hostile components.
pub fn all() -> Result<()> {
    step("hostile components");
    let to = target().join("hostile");
    components(&[("guest-hostile", "hostile.wasm")], &to)?;
    probing("wasi-0.2", &[], &to)?;
    probing("wasi-0.3", &["--features", "p3"], &to)?;
    for entry in fs::read_dir(root().join("tests/guest-hostile/wat"))? {
        let source = entry?.path();
        let name = source.file_stem().context("a file has a name")?;
        let text = fs::read_to_string(&source)?;
        let built =
            from_text(&text).with_context(|| format!("failed to build {}", source.display()))?;
        write_if_changed(&wasm(&to, &name.to_string_lossy()), &built)?;
    }
    let slow = wasm(&to, "slow");
    if !slow.exists() {
        write_if_changed(&slow, &wat::parse_str(slow_text()?)?)?;
    }
    Ok(())
}

/// Builds the guest that probes its WASI sandbox through the standard library.
fn probing(name: &str, features: &[&str], to: &Path) -> Result<()> {
    add_target(WASI_TARGET)?;
    let mut build = cargo();
    build.args([
        "build",
        "--quiet",
        "--profile",
        "guest",
        "--target",
        WASI_TARGET,
        "--package",
        "guest-wasi",
    ]);
    run(build.args(features))?;
    let built = target().join(WASI_TARGET).join("guest/guest_wasi.wasm");
    write_if_changed(&wasm(to, name), &fs::read(built)?)
}

fn wasm(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}.wasm"))
}

/// Builds a `.wat` text as its first line says: a module, a component, or a module to encode as a
/// component of a world.
fn from_text(text: &str) -> Result<Vec<u8>> {
    let mut binary = wat::parse_str(text)?;
    match text.lines().next().and_then(|line| line.strip_prefix(";; ")) {
        Some("module" | "component") => Ok(binary),
        Some(world) if world.starts_with("world: ") => {
            let mut resolve = Resolve::default();
            let (package, _) = resolve.push_path(root().join("wit/v0.1"))?;
            let world = resolve.select_world(&[package], world.strip_prefix("world: "))?;
            embed_component_metadata(&mut binary, &resolve, world, StringEncoding::UTF8, false)?;
            ComponentEncoder::default().validate(true).module(&binary)?.encode()
        }
        first => bail!(
            "the first line must be `;; world: NAME`, `;; component` or `;; module`, not {first:?}"
        ),
    }
}

/// Returns a component of one MB that takes a minute to compile: one function with 4,000 variables
/// that are all live.
fn slow_text() -> Result<String> {
    const LOCALS: usize = 4000;
    let mut text = String::from(
        "(component (core module (func (export \"f\") (param i64) (result i64) (local",
    );
    text.push_str(&" i64".repeat(LOCALS));
    text.push(')');
    for round in 0..20 {
        for local in 1..LOCALS {
            let (one, other) = ((local * 7 + round) % LOCALS, (local * 13 + round) % LOCALS);
            write!(
                text,
                "(local.set {local} (i64.add (i64.mul (local.get {}) (local.get {one})) \
                 (local.get {other})))",
                local - 1
            )?;
            if local % 50 == 0 {
                write!(
                    text,
                    "(if (i64.lt_s (local.get {local}) (local.get {})) \
                     (then (local.set {local} (local.get 0))))",
                    local - 1
                )?;
            }
        }
    }
    write!(text, "(local.get {}))))", LOCALS - 1)?;
    Ok(text)
}
