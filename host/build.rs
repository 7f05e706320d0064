//! Sets `BATCHWRIGHT_COMMIT` to the commit of the build, for `--version` and the log.

use std::path::Path;
use std::process::Command;

fn main() {
    let git = |arguments: &[&str]| {
        let output = Command::new("git")
            .args(arguments)
            .output()
            .ok()
            .filter(|output| output.status.success())?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let commit = git(&["rev-parse", "--short=12", "HEAD"]).filter(|commit| !commit.is_empty());
    println!("cargo::rustc-env=BATCHWRIGHT_COMMIT={}", commit.as_deref().unwrap_or("unknown"));
    println!("cargo::rerun-if-changed=build.rs");
    // The branch file changes with each commit, and HEAD changes with each switch of the branch.
    let paths = [
        git(&["rev-parse", "--git-path", "HEAD"]),
        git(&["symbolic-ref", "--quiet", "HEAD"])
            .and_then(|name| git(&["rev-parse", "--git-path", &name])),
    ];
    for path in paths.into_iter().flatten().filter(|path| Path::new(path).exists()) {
        println!("cargo::rerun-if-changed={path}");
    }
}
