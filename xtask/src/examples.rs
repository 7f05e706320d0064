//! The plugins of `examples`, each built with the public tools of its language, as their README files say.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use wasi_preview1_component_adapter_provider::{
    WASI_SNAPSHOT_PREVIEW1_ADAPTER_NAME, WASI_SNAPSHOT_PREVIEW1_REACTOR_ADAPTER,
};
use wit_bindgen_core::{Files, wit_parser::Resolve};
use wit_component::ComponentEncoder;

use crate::build::add_target;
use crate::run::{cargo, mark, root, run, stale, step, target};

const RUST_TARGET: &str = "wasm32-wasip2";

/// Builds them all into `target/examples`.
pub fn all() -> Result<()> {
    step("examples");
    let to = target().join("examples");
    fs::create_dir_all(&to)?;
    rust(&to)?;
    let python = tools()?;
    policy_in_python(&python, &to)?;
    policy_in_c(&python, &to)?;
    javascript(&to)
}

fn rust(to: &Path) -> Result<()> {
    add_target(RUST_TARGET)?;
    run(cargo().args([
        "build",
        "--quiet",
        "--profile",
        "guest",
        "--target",
        RUST_TARGET,
        "--package",
        "anthropic-adapter",
    ]))?;
    let built = target().join(RUST_TARGET).join("guest/anthropic_adapter.wasm");
    fs::copy(built, to.join("anthropic.wasm")).context("failed to copy the component")?;
    Ok(())
}

/// A Python with componentize-py and a C compiler.
fn tools() -> Result<PathBuf> {
    let folder = target().join("tools");
    let python = folder.join("bin/python");
    let wanted = root().join("examples/requirements.txt");
    if stale(&wanted, &folder)? {
        run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder))?;
        run(Command::new(&python).args(["-m", "pip", "install", "--quiet", "--requirement"]).arg(&wanted))?;
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
    command.arg("-d").arg(wit()).args(["-w", "validator", "componentize", "policy", "-o"]).arg(&built);
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
    command.arg("--wit").arg(wit()).args(["--world", "adapter", "--sync", "--js", "ollama.js", "--output"]).arg(&built);
    run(command.current_dir(folder))
}

/// What `wit-bindgen c`, `zig cc` and `wasm-tools component new` do.
fn policy_in_c(python: &Path, to: &Path) -> Result<()> {
    let source = root().join("examples/policy-c/policy.c");
    let built = to.join("policy-c.wasm");
    if newer(&built, &[source.clone(), root().join("examples/requirements.txt")]) {
        return Ok(());
    }
    let folder = to.join("policy-c");
    fs::create_dir_all(&folder)?;
    let mut resolve = Resolve::default();
    let (package, _) = resolve.push_path(wit())?;
    let world = resolve.select_world(&[package], Some("validator"))?;
    let mut files = Files::default();
    wit_bindgen_c::Opts::default().build().generate(&mut resolve, world, &mut files)?;
    for (name, bytes) in files.iter() {
        fs::write(folder.join(name), bytes)?;
    }
    let mut compile = Command::new(python);
    compile.args([
        "-m",
        "ziglang",
        "cc",
        "--target=wasm32-wasi",
        "-mexec-model=reactor",
        "-Os",
        "-s",
        "-Wall",
        "-Werror",
        "-I.",
    ]);
    compile.arg(&source).args(["validator.c", "validator_component_type.o", "-o", "policy.wasm"]);
    let cache = to.join("zig-cache");
    run(compile.current_dir(&folder).env("ZIG_GLOBAL_CACHE_DIR", &cache).env("ZIG_LOCAL_CACHE_DIR", &cache))?;
    let module = fs::read(folder.join("policy.wasm"))?;
    let component = ComponentEncoder::default()
        .validate(true)
        .module(&module)?
        .adapter(WASI_SNAPSHOT_PREVIEW1_ADAPTER_NAME, WASI_SNAPSHOT_PREVIEW1_REACTOR_ADAPTER)?
        .encode()?;
    fs::write(built, component)?;
    Ok(())
}

/// Whether a file is newer than all of its sources, and than the contract.
fn newer(file: &Path, sources: &[PathBuf]) -> bool {
    let time = |path: &Path| fs::metadata(path).and_then(|found| found.modified());
    let Ok(built) = time(file) else { return false };
    let contract = fs::read_dir(wit()).into_iter().flatten().flatten().map(|entry| entry.path());
    sources.iter().cloned().chain(contract).all(|source| time(&source).is_ok_and(|changed| changed < built))
}
