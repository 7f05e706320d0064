//! `cargo xtask check`: format, lints, tidy and dependencies; no server, no tests.

use std::process::{Child, Command, Stdio};

use anyhow::Result;

use crate::examples::{install, program};
use crate::run::{cargo, root, run, step};
use crate::test::{python_environment, reference};
use crate::tidy;

/// Version of cargo-deny that `deny.toml` is written for.
const CARGO_DENY: &str = "0.20.2";

/// Runs every check; stops at the first that fails.
pub fn all() -> Result<()> {
    // The database of advisories comes over the network, which takes a while or fails.
    let advisories = advisories()?;
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
    step("Python");
    ruff()?;
    step("reference pages");
    reference(false)?;
    step("dependencies");
    dependencies(advisories)
}

/// Checks the format and the lints of the Python tests and examples.
fn ruff() -> Result<()> {
    let ruff = python_environment()?.with_file_name("ruff");
    let folders = ["tests/python", "examples/policy-python"];
    for command in [&["format", "--check", "--quiet"][..], &["check", "--quiet"]] {
        run(Command::new(&ruff).args(command).arg("--no-cache").args(folders).current_dir(root()))?;
    }
    Ok(())
}

/// Starts the check of advisories.
fn advisories() -> Result<Child> {
    install("cargo-deny", CARGO_DENY, "")?;
    let mut check = Command::new(program("cargo-deny"));
    check.args(["check", "advisories"]).current_dir(root());
    Ok(check.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?)
}

/// Checks licenses, sources and banned crates; advisories only where their database can be fetched.
fn dependencies(advisories: Child) -> Result<()> {
    let offline = ["check", "licenses", "bans", "sources"];
    let mut deny = Command::new(program("cargo-deny"));
    run(deny.args(["--log-level", "error"]).args(offline).current_dir(root()))?;
    let output = advisories.wait_with_output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    if stderr.contains("failed to fetch advisory database") {
        eprintln!("advisories not checked: the advisory database is unreachable");
        return Ok(());
    }
    eprint!("{stderr}");
    anyhow::ensure!(output.status.success(), "a dependency has an advisory, listed above");
    Ok(())
}
