//! `cargo xtask build`: builds guests and host, and copies both to `dist`.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use wit_component::ComponentEncoder;

use crate::run::{cargo, root, run, step, target};
use crate::{examples, hostile, needs};

/// Target of guests that import nothing.
const GUEST_TARGET: &str = "wasm32-unknown-unknown";

/// Package of each guest, and file name of its component.
const GUESTS: [(&str, &str); 4] = [
    ("guest-validator", "validator-standard.wasm"),
    ("guest-one-model", "one-model.wasm"),
    ("guest-inference-openai", "inference-openai.wasm"),
    ("guest-inference-echo", "inference-echo.wasm"),
];

/// Part of the build.
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

/// Builds one part.
pub fn run_part(part: Part) -> Result<()> {
    match part {
        Part::Dist => all(),
        Part::Plugins => guests().and_then(|()| plugins()),
        Part::Examples => examples::all(),
        Part::Hostile => hostile::all(),
    }
}

/// Builds everything in `dist`.
pub fn all() -> Result<()> {
    needs::to_build()?;
    guests()?;
    host()?;
    plugins()?;
    eprintln!("built {}", root().join("dist").display());
    Ok(())
}

/// Builds the guests that ship, which import nothing.
fn guests() -> Result<()> {
    step("guests");
    components(&GUESTS, &root().join("dist/plugins"))
}

/// Builds guest packages as core modules and encodes them as components in a folder.
pub fn components(guests: &[(&str, &str)], to: &Path) -> Result<()> {
    add_target(GUEST_TARGET)?;
    let mut build = cargo();
    build.args(["build", "--quiet", "--profile", "guest", "--target", GUEST_TARGET]);
    for (package, _) in guests {
        build.args(["--package", package]);
    }
    run(&mut build)?;
    fs::create_dir_all(to)?;
    for (package, file) in guests {
        let module = target()
            .join(GUEST_TARGET)
            .join("guest")
            .join(format!("{}.wasm", package.replace('-', "_")));
        let module =
            fs::read(&module).with_context(|| format!("failed to read {}", module.display()))?;
        let component = ComponentEncoder::default().validate(true).module(&module)?.encode()?;
        write_if_changed(&to.join(file), &component)?;
    }
    Ok(())
}

fn host() -> Result<()> {
    step("host");
    // The whole workspace is selected, as in tests: the features of dependencies depend on the
    // selected packages, and equal features mean that wasmtime is compiled once.
    run(cargo().args(["build", "--release", "--workspace", "--bins"]))?;
    let dist = root().join("dist/batchwright");
    // A running server keeps its executable open, so the file must be replaced, not overwritten.
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

/// Returns the names of the files of the plugins that ship.
pub fn shipped_plugins() -> Result<Vec<String>> {
    let mut names: Vec<String> = GUESTS.iter().map(|(_, file)| (*file).to_owned()).collect();
    for entry in fs::read_dir(root().join("plugins"))? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    Ok(names)
}

/// Installs the standard library of a target with rustup, if missing.
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

/// Writes a file unless it has these bytes already, so that a watching server sees no change.
pub fn write_if_changed(path: &Path, bytes: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|found| found == bytes) {
        return Ok(());
    }
    // The rename is atomic: a concurrent reader sees either the old or the new file.
    let beside = path.with_extension("new");
    fs::write(&beside, bytes)?;
    fs::rename(&beside, path)?;
    Ok(())
}
