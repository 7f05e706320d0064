//! Builds the plugins of `examples` with the public tools of each language, as their README files
//! say.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::build::add_target;
use crate::run::{cargo, mark, root, run, stale, step, target};

/// Target of guests that use the standard library, which imports WASI.
pub const WASI_TARGET: &str = "wasm32-wasip2";

/// Package of each example in Rust, and file name of its component.
const RUST_EXAMPLES: [(&str, &str); 2] =
    [("anthropic-adapter", "anthropic.wasm"), ("polled-adapter", "polled.wasm")];

/// Builds all example plugins into `target/examples`.
pub fn all() -> Result<()> {
    step("examples");
    let to = target().join("examples");
    fs::create_dir_all(&to)?;
    rust(&to)?;
    let python = tools()?;
    install_cargo_tools()?;
    policy_in_python(&python, &to)?;
    policy_in_c(&python, &to)?;
    javascript(&to)
}

fn rust(to: &Path) -> Result<()> {
    add_target(WASI_TARGET)?;
    let mut build = cargo();
    build.args(["build", "--quiet", "--profile", "guest", "--target", WASI_TARGET]);
    for (package, _) in RUST_EXAMPLES {
        build.args(["--package", package]);
    }
    run(&mut build)?;
    for (package, file) in RUST_EXAMPLES {
        let built = format!("guest/{}.wasm", package.replace('-', "_"));
        fs::copy(target().join(WASI_TARGET).join(built), to.join(file))
            .context("failed to copy the component")?;
    }
    Ok(())
}

/// Returns a Python environment with componentize-py and a C compiler; installs it if necessary.
fn tools() -> Result<PathBuf> {
    let folder = target().join("tools");
    let python = folder.join("bin/python");
    let wanted = root().join("examples/requirements.txt");
    if stale(&wanted, &folder)? {
        run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder))?;
        run(Command::new(&python)
            .args(["-m", "pip", "install", "--quiet", "--requirement"])
            .arg(&wanted))?;
        mark(&wanted, &folder)?;
    }
    Ok(python)
}

fn wit() -> PathBuf {
    root().join("wit/v0.1")
}

fn policy_in_python(python: &Path, to: &Path) -> Result<()> {
    let folder = root().join("examples/policy-python");
    let built = to.join("policy-python.wasm");
    if newer(&built, &[folder.join("policy.py"), root().join("examples/requirements.txt")]) {
        return Ok(());
    }
    let componentize = python.with_file_name("componentize-py");
    let mut command = Command::new(componentize);
    command
        .arg("-d")
        .arg(wit())
        .args(["-w", "validator", "componentize", "policy", "-o"])
        .arg(&built);
    run(command.current_dir(folder).env("PYTHONDONTWRITEBYTECODE", "1"))
}

fn javascript(to: &Path) -> Result<()> {
    let folder = root().join("examples/ollama-javascript");
    let modules = folder.join("node_modules");
    if stale(&folder.join("package.json"), &modules)? {
        run(Command::new("npm")
            .args(["install", "--no-package-lock", "--no-audit", "--no-fund", "--loglevel=error"])
            .current_dir(&folder))?;
        mark(&folder.join("package.json"), &modules)?;
    }
    let built = to.join("ollama.wasm");
    if newer(&built, &[folder.join("ollama.js"), folder.join("package.json")]) {
        return Ok(());
    }
    let mut command = Command::new(modules.join(".bin/componentize-qjs"));
    command
        .arg("--wit")
        .arg(wit())
        .args(["--world", "adapter", "--sync", "--js", "ollama.js", "--output"])
        .arg(&built);
    run(command.current_dir(folder))
}

/// Runs the commands of its README: `wit-bindgen c`, `zig cc`, `wasm-tools component new`.
fn policy_in_c(python: &Path, to: &Path) -> Result<()> {
    let source = root().join("examples/policy-c/policy.c");
    let built = to.join("policy-c.wasm");
    if newer(&built, &[source.clone(), root().join("examples/requirements.txt")]) {
        return Ok(());
    }
    let folder = to.join("policy-c");
    fs::create_dir_all(&folder)?;
    run(Command::new(program("wit-bindgen"))
        .arg("c")
        .arg(wit())
        .args(["--world", "validator"])
        .current_dir(&folder))?;
    let mut compile = Command::new(python);
    compile.args(["-m", "ziglang", "cc", "--target=wasm32-wasi", "-mexec-model=reactor"]);
    compile.args(["-Os", "-s", "-Wall", "-Werror", "-I."]).arg(&source);
    compile.args(["validator.c", "validator_component_type.o", "-o", "policy.core.wasm"]);
    run(compile.current_dir(&folder))?;
    let mut encode = Command::new(program("wasm-tools"));
    run(encode.args(["component", "new", "policy.core.wasm", "-o"]).arg(built).current_dir(&folder))
}

/// Installs a tool of the Rust ecosystem under the target folder.
pub fn install(package: &str, version: &str, features: &str) -> Result<()> {
    let mut install = cargo();
    install.args(["install", "--locked", "--quiet", "--version", version, "--root"]);
    install.arg(cargo_tools()).arg("--no-default-features");
    // The tools share what they depend on. Compiling them takes longer than they ever run.
    install.arg("--target-dir").arg(cargo_tools().join("build"));
    install.env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "0");
    if !features.is_empty() {
        install.args(["--features", features]);
    }
    // cargo does nothing if this version is installed already.
    run(install.arg(package))
}

/// Returns the path of an installed tool.
pub fn program(name: &str) -> PathBuf {
    cargo_tools().join("bin").join(name)
}

fn cargo_tools() -> PathBuf {
    target().join("cargo-tools")
}

/// Installs the two tools that C needs, in the versions that the README files name.
fn install_cargo_tools() -> Result<()> {
    install("wit-bindgen-cli", "0.61.1", "c")?;
    install("wasm-tools", "1.263.0", "component")
}

/// Returns true if a file is newer than all of its sources and the contract.
fn newer(file: &Path, sources: &[PathBuf]) -> bool {
    let time = |path: &Path| fs::metadata(path).and_then(|found| found.modified());
    let Ok(built) = time(file) else { return false };
    let contract = fs::read_dir(wit()).into_iter().flatten().flatten().map(|entry| entry.path());
    sources
        .iter()
        .cloned()
        .chain(contract)
        .all(|source| time(&source).is_ok_and(|changed| changed < built))
}
