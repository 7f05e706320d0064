//! Command line: the subcommands, their settings, exit codes and signals.

mod admin;
mod backup;
mod batch;
mod client;
mod config;
mod doctor;
mod failures;
mod file;
mod gc;
mod generate;
mod health;
mod list;
mod path_text;
mod place;
mod plugin;
mod progress;
mod run;
mod serve;
mod terminal;
mod webhook;

use std::path::PathBuf;
use std::process::ExitCode;

use batchwright_plugin::compile;
use clap::{Parser, Subcommand};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::cli::terminal::errln;
use crate::config::unknown_variables;
use crate::error::Error;

/// Version of the program with the commit of its build.
pub const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (", env!("BATCHWRIGHT_COMMIT"), ")");

#[derive(Parser)]
#[command(name = "batchwright", version = VERSION, about, max_term_width = 100)]
#[command(
    after_help = "Every setting is also an environment variable BATCHWRIGHT_… and a key of the \
                  config file (--config)."
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve the Batch API
    Serve(serve::Serve),
    /// Run one batch without a server
    #[command(mut_arg("listen", |arg| arg.hide(true)), mut_arg("data", |arg| arg.hide(true)))]
    #[command(mut_args(run::hide_setting_of_servers))]
    Run(run::Run),
    /// Manage plugins
    #[command(subcommand)]
    Plugin(plugin::Plugin),
    /// Manage projects and API keys
    Admin(admin::Admin),
    /// Manage the batches of a server
    Batch(batch::Batch),
    /// List and delete the files of a server
    File(file::File),
    /// Manage the webhook endpoints of a project
    Webhook(webhook::Webhook),
    /// Export the audit log as JSON lines, of a running server or of a data folder
    Audit(admin::Audit),
    /// Ask the running server of these settings for its health
    Health(health::Health),
    /// Check what a server needs on this machine, and say what to do
    Doctor(doctor::Doctor),
    /// Check and show the settings of a server
    #[command(subcommand)]
    Config(config::Config),
    /// Say what the cleanup of a data folder would remove
    Gc(gc::Gc),
    /// Back up a data folder, also of a running server
    Backup(backup::Backup),
    /// Restore a backup into a new data folder
    Restore(backup::Restore),
    /// Print the completion script of a shell
    Completions(generate::Completions),
    /// Write the manual pages into a folder
    Man(generate::Man),
    /// Compile a component from standard input to standard output, in a process of its own
    #[command(name = compile::COMMAND, hide = true)]
    Compile(compile::Process),
}

/// Parses the command line, runs the command and returns its exit code.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Command::Compile(process) = cli.command {
        // The compiler process needs no runtime: its sandbox starts before any thread exists.
        return process.run();
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            errln!("error: failed to start the async runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let has_handlers = matches!(cli.command, Command::Serve(_) | Command::Run(_));
    let command = async {
        match cli.command {
            Command::Serve(serve) => serve.run().await,
            Command::Run(run) => run.run().await,
            Command::Plugin(plugin) => plugin.run().await,
            Command::Admin(admin) => admin.run().await,
            Command::Batch(batch) => batch.run().await,
            Command::File(file) => file.run().await,
            Command::Webhook(webhook) => webhook.run().await,
            Command::Audit(audit) => audit.run().await,
            Command::Health(health) => health.run().await.map(|()| ExitCode::SUCCESS),
            Command::Doctor(doctor) => doctor.run().await,
            Command::Config(config) => config.run().map(|()| ExitCode::SUCCESS),
            Command::Gc(gc) => gc.run().await.map(|()| ExitCode::SUCCESS),
            Command::Backup(backup) => backup.run().await.map(|()| ExitCode::SUCCESS),
            Command::Restore(restore) => restore.run().await.map(|()| ExitCode::SUCCESS),
            Command::Completions(completions) => completions.run().map(|()| ExitCode::SUCCESS),
            Command::Man(man) => man.run().map(|()| ExitCode::SUCCESS),
            Command::Compile(process) => Ok(process.run()),
        }
    };
    // The kernel drops a signal to the first process of a container that has no handler for it.
    let is_first = std::process::id() == 1 && !has_handlers;
    let result = runtime.block_on(async {
        tokio::select! {
            result = command => result,
            result = ended_by_signal(), if is_first => result,
        }
    });
    // Blocking threads may still run, for example an abandoned compilation; do not wait for them.
    runtime.shutdown_background();
    if terminal::output_failed() {
        errln!("error: the output could not be written to standard output and is incomplete");
        return ExitCode::FAILURE;
    }
    result.unwrap_or_else(|error| {
        errln!("error: {error}");
        ExitCode::from(error.exit_code())
    })
}

/// Waits for a signal that ends a process, and returns the status of a process that it has ended.
async fn ended_by_signal() -> Result<ExitCode, Error> {
    let mut signals = ProcessSignals::listen()?;
    Ok(match signals.next().await {
        ProcessSignal::Interrupt => ExitCode::from(130),
        ProcessSignal::Terminate => ExitCode::from(143),
        ProcessSignal::Hangup => ExitCode::from(129),
    })
}

/// Signal handlers of the process.
///
/// The handlers exist from `listen` on, so that no signal is lost between two calls of `next`.
struct ProcessSignals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
    /// Signals that are ignored, but that end a process without a handler.
    ignored: [Signal; 2],
}

impl ProcessSignals {
    /// Installs the handlers.
    fn listen() -> Result<Self, Error> {
        let failed = |error: std::io::Error| {
            Error::Other(format!("failed to install the signal handlers: {error}"))
        };
        Ok(Self {
            interrupt: signal(SignalKind::interrupt()).map_err(failed)?,
            terminate: signal(SignalKind::terminate()).map_err(failed)?,
            hangup: signal(SignalKind::hangup()).map_err(failed)?,
            ignored: [
                signal(SignalKind::user_defined1()).map_err(failed)?,
                signal(SignalKind::user_defined2()).map_err(failed)?,
            ],
        })
    }

    /// Waits for the next signal that is not ignored.
    async fn next(&mut self) -> ProcessSignal {
        let [user_defined1, user_defined2] = &mut self.ignored;
        loop {
            let ignored = tokio::select! {
                _ = self.interrupt.recv() => return ProcessSignal::Interrupt,
                _ = self.terminate.recv() => return ProcessSignal::Terminate,
                _ = self.hangup.recv() => return ProcessSignal::Hangup,
                _ = user_defined1.recv() => "SIGUSR1",
                _ = user_defined2.recv() => "SIGUSR2",
            };
            tracing::info!(signal = ignored, "signal ignored");
        }
    }
}

/// Signal that a command acts on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ProcessSignal {
    /// SIGINT, from a user at the terminal.
    Interrupt,
    /// SIGTERM, from a supervisor.
    Terminate,
    /// SIGHUP: a server reloads plugins and keys, and `run` stops as for SIGINT.
    Hangup,
}

/// Logs a warning for each environment variable that looks like a setting and is not.
fn warn_unknown_variables() {
    for unknown in unknown_variables() {
        tracing::warn!(
            variable = unknown.name,
            did_you_mean = unknown.suggestion,
            "unknown environment variable ignored"
        );
    }
}

/// Returns the cache folder of compiled plugins for commands without a data folder.
fn user_cache() -> PathBuf {
    let xdg =
        std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    xdg.or_else(home).unwrap_or_else(std::env::temp_dir).join("batchwright")
}
