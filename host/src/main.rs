//! OpenAI-compatible Batch API server whose validation rules and inference providers are
//! WebAssembly components.

mod assemble;
mod cli;
mod config;
mod error;
#[cfg(test)]
mod lifecycle;
#[cfg(test)]
mod reference;
mod reload;
mod supervisor;
mod telemetry;

use std::process::ExitCode;

use batchwright_domain::clock;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    cli::main()
}
