//! `cargo xtask build`: the guests, then the host, then both in `dist`.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use wit_component::ComponentEncoder;

use crate::run::{cargo, root, run, step, target};
use crate::{examples, hostile, needs};

const TARGET: &str = "wasm32-unknown-unknown";

/// Each guest's package, and the file its component becomes.
const GUESTS: [(&str, &str); 4] = [
    ("guest-validator", "validator-standard.wasm"),
    ("guest-one-model", "one-model.wasm"),
    ("guest-inference-openai", "inference-openai.wasm"),
    ("guest-inference-echo", "inference-echo.wasm"),
];

/// Part of what can be built.
#[derive(Clone, Copy, clap::ValueEnum)]
pub enum Part {
    /// dist/batchwright and dist/plugins
    Dist,
    /// dist/plugins alone
    Plugins,
    /// target/examples: plugins in other languages
    Examples,
    /// target/hostile: components that attack the host, for tests
    Hostile,
}

pub fn run_part(part: Part) -> Result<()> {
    match part {
        Part::Dist => all(),
        Part::Plugins => guests().and_then(|()| plugins()),
        Part::Examples => examples::all(),
        Part::Hostile => hostile::all(),
    }
}

pub fn all() -> Result<()> {
    needs::to_build()?;
    guests()?;
    host()?;
    plugins()?;
    eprintln!("built {}", root().join("dist").display());
    Ok(())
}

/// Builds the guests as core modules and encodes them as components, which then import nothing.
fn guests() -> Result<()> {
    step("guests");
    components(&GUESTS, &root().join("dist/plugins"))
}

/// Builds guests' packages as components.
pub fn components(guests: &[(&str, &str)], to: &Path) -> Result<()> {
    add_target(TARGET)?;
    let mut build = cargo();
    build.args(["build", "--quiet", "--profile", "guest", "--target", TARGET]);
    for (package, _) in guests {
        build.args(["--package", package]);
    }
    run(&mut build)?;
    fs::create_dir_all(to)?;
    for (package, file) in guests {
        let module =
            target().join(TARGET).join("guest").join(format!("{}.wasm", package.replace('-', "_")));
        let module =
            fs::read(&module).with_context(|| format!("failed to read {}", module.display()))?;
        let component = ComponentEncoder::default().validate(true).module(&module)?.encode()?;
        write_if_changed(&to.join(file), &component)?;
    }
    Ok(())
}

fn host() -> Result<()> {
    step("host");
    run(cargo().args([
        "build",
        "--release",
        "--package",
        "batchwright",
        "--package",
        "batchwright-bench",
    ]))?;
    let dist = root().join("dist/batchwright");
    // A running server keeps the file it was started from.
    fs::remove_file(&dist).ok();
    fs::copy(target().join("release/batchwright"), &dist)
        .context("failed to copy the host to dist")?;
    Ok(())
}

fn plugins() -> Result<()> {
    for entry in fs::read_dir(root().join("plugins"))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            let name = path.file_name().context("a file has a name")?;
            write_if_changed(&root().join("dist/plugins").join(name), &fs::read(&path)?)?;
        }
    }
    Ok(())
}

/// The target's standard library may be missing on a fresh machine.
pub fn add_target(name: &str) -> Result<()> {
    let sysroot =
        Command::new("rustc").args(["--print", "sysroot"]).current_dir(root()).output()?;
    let sysroot = String::from_utf8(sysroot.stdout)?;
    if Path::new(sysroot.trim()).join("lib/rustlib").join(name).exists() {
        return Ok(());
    }
    let added = run(Command::new("rustup").args(["target", "add", name]).current_dir(root()));
    ensure!(
        added.is_ok(),
        "the target {name} is missing; install it with `rustup target add {name}`"
    );
    Ok(())
}

/// Leaves a file alone that is as it should be, so that a server watching it sees no change.
pub fn write_if_changed(path: &Path, bytes: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|found| found == bytes) {
        return Ok(());
    }
    // Beside it first, then in its place: whoever reads it meanwhile sees the one or the other.
    let beside = path.with_extension("new");
    fs::write(&beside, bytes)?;
    fs::rename(&beside, path)?;
    Ok(())
}
