//! `cargo xtask bench`: builds all and measures it.

use std::process::Command;

use anyhow::Result;

use crate::build;
use crate::run::{root, run, step, target};

pub fn measure(name: Option<&str>) -> Result<()> {
    build::all()?;
    step("bench");
    run(Command::new(target().join("release/batchwright-bench")).args(name).current_dir(root()))
}
