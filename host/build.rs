//! The commit that the program is built from, for `--version` and the log.

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
    // What HEAD names changes with each commit, and HEAD itself with each branch.
    let places = [
        git(&["rev-parse", "--git-path", "HEAD"]),
        git(&["symbolic-ref", "--quiet", "HEAD"])
            .and_then(|name| git(&["rev-parse", "--git-path", &name])),
    ];
    for place in places.into_iter().flatten().filter(|place| Path::new(place).exists()) {
        println!("cargo::rerun-if-changed={place}");
    }
}
