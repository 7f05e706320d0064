//! Repository tasks: `cargo xtask build | check | docs | unit | e2e | test | demo | dist | bench`.

mod bench;
mod build;
mod check;
mod demo;
mod dist;
mod examples;
mod hostile;
mod needs;
mod run;
mod test;
mod tidy;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Builds, checks, tests and measures Batchwright")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Build dist/batchwright and dist/plugins, or another part
    Build {
        /// What to build
        #[arg(value_enum, default_value = "dist")]
        part: build::Part,
    },
    /// Check format, lints, tidy rules and licenses of dependencies; needs no running server
    Check,
    /// Write the generated pages of docs/reference
    Docs,
    /// Run the unit tests of all crates and guests
    Unit {
        /// Only tests whose name contains this
        name: Option<String>,
    },
    /// Run the end-to-end tests: the built server, real components, the official SDKs
    E2e {
        /// Only tests whose name contains this
        name: Option<String>,
        /// Arguments for pytest, such as `--seed 7 --kills 300` of the crash test
        #[arg(last = true)]
        pytest: Vec<String>,
    },
    /// Run everything: build, check, unit, e2e
    Test,
    /// Build, then run a batch through the HTTP API and show each step
    Demo,
    /// Build a release in dist/release: archive, Debian package, licenses, bill of materials
    Dist {
        /// What to pack
        #[arg(value_enum, default_value = "all")]
        part: dist::Part,
        /// Pack the program that the tests use, which is larger and needs no second build
        #[arg(long)]
        quick: bool,
    },
    /// Build, then run the benchmarks
    Bench {
        /// `start`, `throughput`, `keys`, `online`, `validation` or `limits`; without a name all
        /// except `limits`
        name: Option<String>,
    },
}

fn main() -> ExitCode {
    let done = match Cli::parse().task {
        Task::Build { part } => build::run_part(part),
        Task::Check => check::all(),
        Task::Docs => test::reference(true),
        Task::Unit { name } => test::unit(name.as_deref()),
        Task::E2e { name, pytest } => test::e2e(name.as_deref(), &pytest),
        Task::Test => test::all(),
        Task::Demo => demo::show(),
        Task::Dist { part, quick } => dist::pack(part, quick),
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
