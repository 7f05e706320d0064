//! `batchwright plugin`: lists, checks, tests, creates, fetches and signs plugins.

mod new;
mod pause;
mod pull;
mod registry;
mod show;
mod sign;
mod test;

use std::path::PathBuf;
use std::process::ExitCode;

use batchwright_plugin::{Loader, Registry};
use clap::{Args, Subcommand};

use super::client::Client;
use super::user_cache;
use crate::assemble::Options;
use crate::cli::terminal::write_output;
use crate::clock::Clock;
use crate::config::{LoaderSettings, Settings, SettingsArgs};
use crate::error::Error;
use crate::telemetry::LogFormat;
use crate::{assemble, telemetry};

/// Subcommands of `batchwright plugin`.
#[derive(Subcommand)]
pub enum Plugin {
    /// List the plugins of a folder, including plugins that cannot be loaded
    List {
        /// Plugin folder [default: the folder `plugins` beside this program]
        #[arg(long, env = "BATCHWRIGHT_PLUGINS", value_name = "DIR", hide_env_values = true)]
        plugins: Option<PathBuf>,
        /// List the plugins of a running server, with outages; its admin address (--admin-listen)
        /// shows operator details
        #[arg(long, value_name = "URL", conflicts_with = "plugins")]
        server: Option<String>,
        #[command(flatten)]
        given: LoaderArgs,
    },
    /// Pause a plugin: no requests are sent, and its batches wait
    Pause(pause::Pause),
    /// Resume a paused plugin
    Resume(pause::Pause),
    /// Show the kind, imports, endpoints, credentials and settings of a component
    Inspect {
        /// Component (.wasm)
        file: PathBuf,
        #[command(flatten)]
        given: LoaderArgs,
    },
    /// Check that a component, a plugin's TOML file, or all plugins of a folder can be loaded
    Check {
        /// Component (.wasm), TOML file or folder
        /// [default: the plugins of --config, or the folder `plugins` beside this program]
        path: Option<PathBuf>,
        /// Check the plugins of a running server, in its environment; its admin address
        /// (--admin-listen) shows operator details
        #[arg(long, value_name = "URL", conflicts_with = "path")]
        server: Option<String>,
        #[command(flatten)]
        given: LoaderArgs,
    },
    /// Create a plugin project that builds with public tools and passes `plugin test`
    New(new::New),
    /// Test a component against the contract, with valid, unusual and hostile input and with
    /// recorded cases
    Test {
        /// Component (.wasm), or TOML file with settings and limits
        file: PathBuf,
        /// Folder of recorded cases (*.json)
        #[arg(long, value_name = "DIR")]
        cases: Option<PathBuf>,
        /// Settings of a component without a TOML file
        #[arg(long, value_name = "JSON", default_value = "{}")]
        settings: String,
        #[command(flatten)]
        given: LoaderArgs,
    },
    /// Fetch a component from an OCI registry; it stays disabled until its TOML file enables it
    Pull(pull::Pull),
    /// Sign a plugin's TOML file together with its component
    Sign(sign::Sign),
    /// Verify the signatures of plugins' TOML files and components
    Verify(sign::Verify),
}

/// Arguments of the plugin loader, a subset of the settings of `serve`.
#[derive(Args)]
pub struct LoaderArgs {
    #[command(flatten)]
    settings: SettingsArgs<LoaderSettings>,
}

impl LoaderArgs {
    /// Creates a loader for components without a TOML file, which have no signature.
    fn loader_of_components(self) -> Result<Loader, Error> {
        let mut settings = self.resolve()?;
        settings.plugins.trusted_keys = None;
        loader(&settings)
    }

    /// Creates the loader; fails if a setting is invalid.
    fn loader(self) -> Result<Loader, Error> {
        loader(&self.resolve()?)
    }

    /// Creates the loader; returns it with the plugin folder of the settings.
    fn loader_with_plugins(self) -> Result<(PathBuf, Loader), Error> {
        let settings = self.resolve()?;
        Ok((settings.plugins.directory(), loader(&settings)?))
    }

    /// Resolves the settings, with the user's cache by default.
    fn resolve(self) -> Result<Settings, Error> {
        let mut settings = self.settings.resolve()?;
        settings.plugins.cache.get_or_insert_with(user_cache);
        Ok(settings)
    }
}

/// Creates a loader that remembers nothing between commands.
fn loader(settings: &Settings) -> Result<Loader, Error> {
    let options = Options { clock: Clock::system(), serials: None, order: None, compiler: None };
    assemble::loader(settings, options)
}

/// Creates a client of a server, with the key of the environment. The admin address needs none.
fn server(url: &str) -> Result<Client, Error> {
    Client::new(url, std::env::var("BATCHWRIGHT_API_KEY").ok().filter(|key| !key.is_empty()))
}

impl Plugin {
    /// Runs the subcommand.
    pub async fn run(self) -> Result<ExitCode, Error> {
        // The author of a component needs its log lines.
        let filter = if matches!(self, Self::Test { .. }) {
            "off,batchwright_plugin::log=debug"
        } else {
            "off"
        };
        if let Ok(filter) = filter.parse() {
            telemetry::start(&filter, LogFormat::Text);
        }
        match self {
            Self::List { server: Some(url), .. } => show::list_of_server(&server(&url)?).await,
            Self::Pause(pause) => pause.run(true),
            Self::Resume(pause) => pause.run(false),
            Self::List { plugins, given, .. } => {
                let (configured, loader) = given.loader_with_plugins()?;
                let plugins = plugins.unwrap_or(configured);
                let registry = Registry::open(&plugins, loader).await?;
                Ok(show::list(&registry))
            }
            Self::Inspect { file, given } => {
                let inspected = given.loader_of_components()?.inspect(&file).await?;
                write_output(format_args!("{}", show::describe(&file, &inspected)));
                Ok(ExitCode::SUCCESS)
            }
            Self::Check { server: Some(url), .. } => show::list_of_server(&server(&url)?).await,
            Self::Check { path, given, .. } => {
                let (configured, loader) = given.loader_with_plugins()?;
                show::check(loader, &path.unwrap_or(configured)).await
            }
            Self::New(new) => new.run(),
            Self::Test { file, cases, settings, given } => {
                let is_toml = file.extension().is_some_and(|extension| extension == "toml");
                let loader =
                    if is_toml { given.loader()? } else { given.loader_of_components()? };
                test::test(&loader, &file, cases.as_deref(), &settings).await
            }
            Self::Pull(pull) => pull.run().await,
            Self::Sign(sign) => sign.run(),
            Self::Verify(verify) => verify.run(),
        }
    }
}
