//! OpenAI-compatible Batch API server whose validation rules and inference providers are
//! WebAssembly components.

mod api;
mod batch;
mod cli;
mod clock;
mod config;
mod egress;
mod memory;
mod plugin;
mod store;
mod telemetry;

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    cli::main()
}
