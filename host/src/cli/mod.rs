//! The command line.

mod batch;
mod client;
mod failures;
mod file;
mod path_text;
mod place;
mod plugin;
mod progress;
mod run;
mod run_state;
mod serve;
mod terminal;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::cli::terminal::say;
use crate::config::{ConfigError, Given, Settings};
use crate::memory::Memory;
use crate::plugin::signature::TrustedKeys;
use crate::plugin::{LoadError, Loading, compile};
use crate::store::StoreError;

/// With the commit that it was built from.
pub const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (", env!("BATCHWRIGHT_COMMIT"), ")");

#[derive(Parser)]
#[command(name = "batchwright", version = VERSION, about, max_term_width = 100)]
#[command(
    after_help = "Every setting can also stand in the environment as BATCHWRIGHT_… or in the file of --config."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve the Batch API
    Serve(serve::Serve),
    /// Run one batch without a server
    #[command(mut_arg("listen", |arg| arg.hide(true)), mut_arg("data", |arg| arg.hide(true)))]
    Run(run::Run),
    /// Look at plugins
    #[command(subcommand)]
    Plugin(plugin::Plugin),
    /// Work with the batches of a server
    Batch(batch::Batch),
    /// List and delete the files of a server
    File(file::File),
    /// Compile a component from standard input to standard output: what the host starts for each
    #[command(name = compile::COMMAND, hide = true)]
    Compile(compile::Process),
}

/// Settings, wherever they are given.
#[derive(Args)]
struct SettingsArgs {
    /// Config file (TOML) with any of the settings below, written as in max_file_size = "200MiB"
    #[arg(long, env = "BATCHWRIGHT_CONFIG", value_name = "FILE", hide_env_values = true)]
    config: Option<PathBuf>,
    #[command(flatten)]
    given: Given,
}

impl SettingsArgs {
    fn resolve(self) -> Result<Settings, ConfigError> {
        Settings::resolve(self.given, self.config.as_deref())
    }
}

/// Why a command did not do what it was asked for, in words for people.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Plugin(#[from] LoadError),
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Plugins that have to be there are not.
    #[error("{0}")]
    Required(String),
    /// What was asked for cannot be done as it was asked for; nothing was done.
    #[error("{0}")]
    Usage(String),
    #[error("{0}")]
    Other(String),
}

impl Error {
    /// 2 is the command line, by clap's word or ours; 3 a setting, 4 a plugin, 5 the data folder or the disk.
    fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_) => 3,
            Self::Usage(_) => 2,
            Self::Plugin(_) | Self::Required(_) => 4,
            Self::Store(_) => 5,
            Self::Other(_) => 1,
        }
    }
}

pub fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Command::Compile(process) = cli.command {
        // Before there are threads that it has no use for.
        return process.run();
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            say!("error: the async runtime does not start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let done = runtime.block_on(async {
        match cli.command {
            Command::Serve(serve) => serve.run().await,
            Command::Run(run) => run.run().await,
            Command::Plugin(plugin) => plugin.run().await,
            Command::Batch(batch) => batch.run().await,
            Command::File(file) => file.run().await,
            Command::Compile(process) => Ok(process.run()),
        }
    });
    // What still runs on a blocking thread, a compilation given up say, is not waited for.
    runtime.shutdown_background();
    if terminal::is_output_lost() {
        say!("error: the output could not be written");
        return ExitCode::FAILURE;
    }
    done.unwrap_or_else(|error| {
        say!("error: {error}");
        ExitCode::from(error.exit_code())
    })
}

/// Requests from outside that the process end. Heard from the moment this is made, so that none is lost between two.
struct EndSignals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
    /// Those that end a process which does not listen for them.
    others: [Signal; 2],
}

impl EndSignals {
    fn listen() -> Result<Self, Error> {
        let failed =
            |error: std::io::Error| Error::Other(format!("signals cannot be heard: {error}"));
        Ok(Self {
            interrupt: signal(SignalKind::interrupt()).map_err(failed)?,
            terminate: signal(SignalKind::terminate()).map_err(failed)?,
            hangup: signal(SignalKind::hangup()).map_err(failed)?,
            others: [
                signal(SignalKind::user_defined1()).map_err(failed)?,
                signal(SignalKind::user_defined2()).map_err(failed)?,
            ],
        })
    }

    async fn next(&mut self) -> EndSignal {
        let [one, two] = &mut self.others;
        loop {
            let other = tokio::select! {
                _ = self.interrupt.recv() => return EndSignal::Interrupt,
                _ = self.terminate.recv() => return EndSignal::Terminate,
                _ = self.hangup.recv() => return EndSignal::Hangup,
                _ = one.recv() => "SIGUSR1",
                _ = two.recv() => "SIGUSR2",
            };
            tracing::info!(signal = other, "signal ignored");
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum EndSignal {
    /// A person at the terminal.
    Interrupt,
    /// A supervisor.
    Terminate,
    /// The terminal has gone; or, for a server, its operator wants plugins and keys read again.
    Hangup,
}

/// How plugins are loaded, as settings have it.
fn loading(settings: &Settings, memory: &Memory) -> Result<Loading, Error> {
    Ok(Loading {
        cache: settings.cache.clone(),
        compile_timeout: settings.compile_timeout,
        compile_memory: settings.compile_memory,
        trusted_keys: trusted_keys(&settings.trusted_keys)?,
        serials: Some(settings.data.join("serials")),
        order: Some(settings.data.join("plugin-order")),
        compiler: None,
        memory: memory.clone(),
    })
}

/// The keys of a file; an empty path is none.
fn trusted_keys(file: &Path) -> Result<Option<TrustedKeys>, Error> {
    if file.as_os_str().is_empty() {
        return Ok(None);
    }
    let keys = TrustedKeys::read(file);
    Ok(Some(keys.map_err(|message| ConfigError::Value { setting: "trusted_keys", message })?))
}

/// Tells of variables that were meant as settings and are none.
fn warn_of_environment() {
    for warning in Settings::warnings() {
        tracing::warn!("{warning}");
    }
}

/// The cache of compiled plugins for commands that have no data folder.
fn user_cache() -> PathBuf {
    let own =
        std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    own.or_else(home).unwrap_or_else(std::env::temp_dir).join("batchwright")
}
