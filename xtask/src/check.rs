//! `cargo xtask check`: what needs no running server.

use std::process::Command;

use anyhow::Result;

use crate::examples::{install, program};
use crate::run::{cargo, root, run, step};
use crate::tidy;

/// Version of cargo-deny that `deny.toml` is written for.
const CARGO_DENY: &str = "0.20.2";

pub fn all() -> Result<()> {
    step("format");
    run(cargo().args(["fmt", "--all", "--check"]))?;
    step("tidy");
    tidy::all()?;
    step("lints");
    run(cargo().args([
        "clippy",
        "--release",
        "--workspace",
        "--all-targets",
        "--",
        "--deny",
        "warnings",
    ]))?;
    step("dependencies");
    dependencies()
}

/// Checks licenses, sources and banned crates; advisories only where their database can be fetched.
fn dependencies() -> Result<()> {
    install("cargo-deny", CARGO_DENY, "")?;
    let deny = program("cargo-deny");
    let offline = ["check", "licenses", "bans", "sources"];
    run(Command::new(&deny).args(["--log-level", "error"]).args(offline).current_dir(root()))?;
    let mut advisories = Command::new(&deny);
    let output = advisories.args(["check", "advisories"]).current_dir(root()).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("failed to fetch advisory database") {
        eprintln!("advisories not checked: their database cannot be reached from here");
        return Ok(());
    }
    eprint!("{said}");
    anyhow::ensure!(output.status.success(), "advisories for a dependency; see above");
    Ok(())
}
