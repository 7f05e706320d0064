//! `cargo xtask unit | e2e | test`: unit tests, end-to-end tests, everything.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::run::{cargo, mark, root, run, stale, step, target};
use crate::{build, check, dist, examples, hostile, needs};

/// Module of host tests that generate the reference pages.
const REFERENCE_TESTS: &str = "reference::";

/// Module of host tests that use built components and the stub provider.
const LIFECYCLE_TESTS: &str = "lifecycle::";

/// Runs everything that must pass before a change is merged.
pub fn all() -> Result<()> {
    needs::to_test()?;
    build::all()?;
    hostile::all()?;
    examples::all()?;
    dist::pack(dist::Part::All, true)?;
    check::all()?;
    unit(None)?;
    run_e2e(None, &[], true)?;
    step("passed");
    Ok(())
}

/// Runs the unit tests, which need no build output.
pub fn unit(name: Option<&str>) -> Result<()> {
    step("unit tests and guest tests");
    run(rust(&["--lib", "--bins"]).args(name).args(["--", "--skip", LIFECYCLE_TESTS]))
}

/// Checks that the generated pages of docs/reference are up to date, or writes them.
pub fn reference(write: bool) -> Result<()> {
    let mut tests = rust(&["--bin", "batchwright"]);
    if write {
        tests.env("UPDATE_REFERENCE", "1");
    }
    run(tests.arg(REFERENCE_TESTS))
}

/// Builds and runs the end-to-end tests. With a name, example plugins are built by the tests that
/// use them.
pub fn e2e(name: Option<&str>, pytest: &[String]) -> Result<()> {
    needs::to_test()?;
    build::all()?;
    // Several Python tests run at a time, so none may build what another one needs.
    let all = name.is_none();
    if all {
        hostile::all()?;
        examples::all()?;
        dist::pack(dist::Part::All, true)?;
    }
    run_e2e(name, pytest, all)
}

fn run_e2e(name: Option<&str>, pytest: &[String], all_built: bool) -> Result<()> {
    step("end to end, Rust");
    run(rust(&["--bin", "batchwright"]).arg(name.unwrap_or(LIFECYCLE_TESTS)))?;
    run(rust(&["--test", "components", "--test", "texts"]).args(name))?;
    python(name, pytest, all_built)?;
    node(name)
}

/// Returns a test run of the workspace's targets. The whole workspace is selected each time,
/// because the features of dependencies, and so what is compiled, depend on the selected packages.
fn rust(targets: &[&str]) -> Command {
    let mut tests = cargo();
    // Snapshots belong to this checkout, even if checkouts share compiled tests.
    tests.env("INSTA_WORKSPACE_ROOT", root());
    tests.args(["test", "--release", "--quiet", "--workspace"]).args(targets);
    tests
}

/// Returns the Python environment of the tests; installs it if necessary.
pub fn python_environment() -> Result<PathBuf> {
    let folder = target().join("python");
    let python = folder.join("bin/python");
    let requirements = root().join("tests/python/requirements.txt");
    if stale(&requirements, &folder)? {
        run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder))?;
        let mut install = Command::new(&python);
        install.args(["-m", "pip", "install", "--quiet", "--requirement"]).arg(&requirements);
        run(&mut install)?;
        mark(&requirements, &folder)?;
    }
    Ok(python)
}

/// Runs the Python tests: official `openai` package, stub provider, real processes.
///
/// Tests that measure time or memory run alone. The others mostly wait, so three run at a time.
fn python(name: Option<&str>, more: &[String], all_built: bool) -> Result<()> {
    let environment = python_environment()?;
    node_tests()?;
    let pytest = |selection: &[&str]| {
        let mut pytest = Command::new(&environment);
        if all_built {
            pytest.env("TEST_PLUGINS_BUILT", "1");
        }
        // -rs prints the skipped tests with their reasons.
        pytest
            .args(["-B", "-m", "pytest", "--quiet", "-rs", "-p", "no:cacheprovider"])
            .arg(root().join("tests/python"))
            .args(selection)
            .args(more)
            .current_dir(root());
        pytest
    };
    let Some(name) = name else {
        step("end to end, Python, tests that run alone");
        run(&mut pytest(&["-m", "quiet"]))?;
        step("end to end, Python, three tests at a time");
        return run(&mut pytest(&["-m", "not quiet", "--numprocesses", "3"]));
    };
    step("end to end, Python");
    // pytest exits with 5 if no test matches.
    let status = pytest(&["-k", name]).status()?;
    anyhow::ensure!(matches!(status.code(), Some(0 | 5)), "the Python tests failed with {status}");
    Ok(())
}

/// Returns the folder of the Node tests; installs what they need if necessary. One of the Python
/// tests runs them too.
fn node_tests() -> Result<PathBuf> {
    let tests = root().join("tests/node");
    let modules = tests.join("node_modules");
    if stale(&tests.join("package-lock.json"), &modules)? {
        run(Command::new("npm")
            .args(["ci", "--no-audit", "--no-fund", "--loglevel=error"])
            .current_dir(&tests))?;
        mark(&tests.join("package-lock.json"), &modules)?;
    }
    Ok(tests)
}

/// Runs the Node tests with the official `openai` package.
fn node(name: Option<&str>) -> Result<()> {
    step("end to end, Node");
    let tests = node_tests()?;
    let mut node = Command::new("node");
    node.arg("--test");
    if let Some(name) = name {
        node.arg(format!("--test-name-pattern={name}"));
    }
    run(node.current_dir(&tests))
}
