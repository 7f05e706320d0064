//! `cargo xtask bench`: builds everything, then runs the benchmarks.

use std::process::Command;

use anyhow::Result;

use crate::build;
use crate::run::{root, run, step, target};

/// Runs one benchmark by name, or all of the default ones.
pub fn measure(name: Option<&str>) -> Result<()> {
    build::all()?;
    step("bench");
    run(Command::new(target().join("release/batchwright-bench")).args(name).current_dir(root()))
}
