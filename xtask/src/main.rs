//! Builds, shows, tests and measures Batchwright: `cargo xtask build | examples | demo | test | bench`.

mod bench;
mod build;
mod demo;
mod examples;
mod hostile;
mod needs;
mod run;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Builds, shows, tests and measures Batchwright")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Build dist/batchwright and dist/plugins
    Build,
    /// Build the plugins of `examples` into target/examples, and those that mean harm into target/hostile
    Examples,
    /// Build all, then run a batch through the HTTP API and show what happens
    Demo,
    /// Build all, then check formatting, lints, and run every test
    Test {
        /// Only tests whose name contains this
        filter: Option<String>,
        /// Arguments for pytest, such as `--seed 7 --kills 300` of the crash test
        #[arg(last = true)]
        pytest: Vec<String>,
    },
    /// Build all, then measure against a raw client
    Bench {
        /// One of `start`, `throughput`, `validation`; all of them if none is named
        name: Option<String>,
    },
}

fn main() -> ExitCode {
    let done = match Cli::parse().task {
        Task::Build => build::all(),
        Task::Examples => examples::all().and_then(|()| hostile::all()),
        Task::Demo => demo::show(),
        Task::Test { filter, pytest } => test::all(filter.as_deref(), &pytest),
        Task::Bench { name } => bench::measure(name.as_deref()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
