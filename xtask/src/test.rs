//! `cargo xtask test`: everything that must hold before a change goes in.

use std::process::Command;

use anyhow::Result;

use crate::run::{cargo, mark, root, run, stale, step, target};
use crate::{build, examples, hostile, needs};

pub fn all(filter: Option<&str>, more: &[String]) -> Result<()> {
    needs::to_test()?;
    step("formatting");
    run(cargo().args(["fmt", "--all", "--check"]))?;
    build::all()?;
    hostile::all()?;
    examples::all()?;
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
    step("unit tests and guest tests");
    run(cargo().args(["test", "--release", "--quiet", "--workspace"]).args(filter))?;
    python(filter, more)?;
    node(filter)
}

/// The official `openai` package for Python, a stub provider and real processes.
fn python(filter: Option<&str>, more: &[String]) -> Result<()> {
    step("end to end, Python");
    let folder = target().join("python");
    let python = folder.join("bin/python");
    let tests = root().join("tests/python");
    if stale(&tests.join("requirements.txt"), &folder)? {
        run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder))?;
        run(Command::new(&python)
            .args(["-m", "pip", "install", "--quiet", "--requirement"])
            .arg(tests.join("requirements.txt")))?;
        mark(&tests.join("requirements.txt"), &folder)?;
    }
    let mut pytest = Command::new(&python);
    // -rs: what was skipped, and why.
    pytest
        .args(["-B", "-m", "pytest", "--quiet", "-rs", "-p", "no:cacheprovider"])
        .arg(&tests)
        .args(more)
        .current_dir(root());
    if let Some(filter) = filter {
        pytest.args(["-k", filter]);
        // 5: there is no test of that name here.
        let status = pytest.status()?;
        anyhow::ensure!(
            matches!(status.code(), Some(0 | 5)),
            "the Python tests failed with {status}"
        );
        return Ok(());
    }
    run(&mut pytest)
}

/// The official `openai` package for Node.
fn node(filter: Option<&str>) -> Result<()> {
    step("end to end, Node");
    let tests = root().join("tests/node");
    let modules = tests.join("node_modules");
    if stale(&tests.join("package-lock.json"), &modules)? {
        run(Command::new("npm")
            .args(["ci", "--no-audit", "--no-fund", "--loglevel=error"])
            .current_dir(&tests))?;
        mark(&tests.join("package-lock.json"), &modules)?;
    }
    let mut node = Command::new("node");
    node.arg("--test");
    if let Some(filter) = filter {
        node.arg(format!("--test-name-pattern={filter}"));
    }
    run(node.current_dir(&tests))
}
