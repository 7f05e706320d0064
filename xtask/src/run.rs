//! Paths of the workspace, and running of other programs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Instant;

use anyhow::{Context, Result, bail};

/// Returns the root folder of the workspace.
pub fn root() -> PathBuf {
    // Read at run time, not compiled in, because checkouts may share a target folder.
    let here = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    here.parent().unwrap_or(&here).to_owned()
}

/// Returns the target folder of cargo.
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// Returns a command for the cargo that runs this task, in the root folder.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    // `cargo run` sets these variables for xtask; with them, some build scripts would run again.
    for (name, _) in std::env::vars_os() {
        if ["CARGO_PKG_", "CARGO_MANIFEST_"]
            .iter()
            .any(|prefix| name.to_string_lossy().starts_with(prefix))
        {
            command.env_remove(&name);
        }
    }
    command
}

/// Prints the name of the next step, and the time since the first step in minutes and seconds.
pub fn step(name: &str) {
    static FIRST: OnceLock<Instant> = OnceLock::new();
    let seconds = FIRST.get_or_init(Instant::now).elapsed().as_secs();
    eprintln!("\x1b[1m==> {name}\x1b[0m ({}:{:02})", seconds / 60, seconds % 60);
}

/// Runs a command until it exits; fails if the command fails.
pub fn run(command: &mut Command) -> Result<()> {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let shown = words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ");
    let status = command.status().with_context(|| format!("failed to start `{shown}`"))?;
    if !status.success() {
        bail!("`{shown}` failed with {status}");
    }
    Ok(())
}

/// Runs a command until it exits and returns what it printed to standard output.
pub fn output(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let done = command
        .stderr(std::process::Stdio::inherit())
        .output()
        .with_context(|| format!("failed to start `{program}`"))?;
    if !done.status.success() {
        bail!("`{program}` failed with {}", done.status);
    }
    Ok(String::from_utf8(done.stdout)?)
}

/// Returns true if a list of packages changed since the folder was installed from it.
pub fn stale(list: &Path, folder: &Path) -> Result<bool> {
    Ok(fs::read(installed_from(folder)).ok() != Some(fs::read(list)?))
}

/// Records that a folder was installed from a list.
pub fn mark(list: &Path, folder: &Path) -> Result<()> {
    fs::copy(list, installed_from(folder))?;
    Ok(())
}

fn installed_from(folder: &Path) -> PathBuf {
    folder.join(".installed-from")
}
