//! `batchwright plugin`

mod new;
mod pause;
mod pull;
mod registry;
mod show;
mod sign;
mod test;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};

use super::client::Client;
use super::{Error, trusted_keys, user_cache};
use crate::cli::terminal::write_output;
use crate::clock::Clock;
use crate::config::{self, INSTANCE_MEMORY, LogFormat, MEMORY_BUDGET, Size, Span};
use crate::memory::Memory;
use crate::plugin::{Loader, Loading, Registry};
use crate::telemetry;

#[derive(Subcommand)]
pub enum Plugin {
    /// List the plugins of a directory, with those that do not load
    List {
        /// Folder of the plugins [default: the folder `plugins` beside this program]
        #[arg(long, env = "BATCHWRIGHT_PLUGINS", value_name = "DIR", hide_env_values = true)]
        plugins: Option<PathBuf>,
        /// Ask a server instead, with what requests wait for: its address for health (--admin-listen) has the operator's words
        #[arg(long, value_name = "URL", conflicts_with = "plugins")]
        server: Option<String>,
        #[command(flatten)]
        given: Given,
    },
    /// Stop sending to a provider; its batches wait
    Pause(pause::Pause),
    /// Send to a provider again
    Resume(pause::Pause),
    /// Show what a component is: its kind, imports, endpoints, credentials and settings
    Inspect {
        /// A component (.wasm)
        file: PathBuf,
        #[command(flatten)]
        given: Given,
    },
    /// Check that plugins load: a component, a TOML file, or a directory of them
    Check {
        /// A component (.wasm), a TOML file, or a directory [default: the plugins of --config, or the folder `plugins` beside this program]
        path: Option<PathBuf>,
        /// Ask a server instead, which knows its own environment: its address for health (--admin-listen) has the operator's words
        #[arg(long, value_name = "URL", conflicts_with = "path")]
        server: Option<String>,
        #[command(flatten)]
        given: Given,
    },
    /// Begin a plugin: a small project that builds with public tools and passes `plugin test`
    New(new::New),
    /// Test a component against the contract: good, odd and hostile input, and cases that its author recorded
    Test {
        /// A component (.wasm), or a TOML file with settings and limits for one
        file: PathBuf,
        /// Folder of recorded cases (*.json)
        #[arg(long, value_name = "DIR")]
        cases: Option<PathBuf>,
        /// Settings for a component that is given without a TOML file
        #[arg(long, value_name = "JSON", default_value = "{}")]
        settings: String,
        #[command(flatten)]
        given: Given,
    },
    /// Fetch a component from an OCI registry; it is loaded when you say so in its TOML file
    Pull(pull::Pull),
    /// Sign a TOML file together with the component it names
    Sign(sign::Sign),
    /// Check the signatures of TOML files and the components they name
    Verify(sign::Verify),
}

/// How plugins are loaded, as in the settings of `serve`.
#[derive(Args)]
pub struct Given {
    /// Config file of a server, whose settings hold here
    #[arg(long, env = "BATCHWRIGHT_CONFIG", value_name = "FILE", hide_env_values = true)]
    config: Option<PathBuf>,
    /// Folder of compiled plugins [default: a folder of the user's]
    #[arg(long, env = "BATCHWRIGHT_CACHE", value_name = "DIR", hide_env_values = true)]
    cache: Option<PathBuf>,
    /// Time that compiling one plugin may take [default: 1m]
    #[arg(long, env = "BATCHWRIGHT_COMPILE_TIMEOUT", value_name = "TIME", hide_env_values = true)]
    compile_timeout: Option<Span>,
    /// Memory that compiling one plugin may take [default: 4GiB]
    #[arg(long, env = "BATCHWRIGHT_COMPILE_MEMORY", value_name = "SIZE", hide_env_values = true)]
    compile_memory: Option<Size>,
    /// Public keys: only plugins that one of them signed are loaded
    #[arg(long, env = "BATCHWRIGHT_TRUSTED_KEYS", value_name = "FILE", hide_env_values = true)]
    trusted_keys: Option<PathBuf>,
}

impl Given {
    /// Signatures are of TOML files.
    fn of_component_alone(self) -> Self {
        Self { trusted_keys: None, ..self }
    }

    fn loader(self) -> Result<Loader, Error> {
        self.loader_with_plugins().map(|(_, loader)| loader)
    }

    /// With the plugin directory that the settings have.
    fn loader_with_plugins(self) -> Result<(PathBuf, Loader), Error> {
        let given = config::Given {
            compile_timeout: self.compile_timeout,
            compile_memory: self.compile_memory,
            trusted_keys: self.trusted_keys,
            ..config::Given::default()
        };
        let settings = config::Settings::resolve(given, self.config.as_deref())?;
        let loading = Loading {
            cache: self.cache.unwrap_or_else(user_cache),
            compile_timeout: settings.compile_timeout,
            compile_memory: settings.compile_memory,
            trusted_keys: trusted_keys(&settings.trusted_keys)?,
            serials: None,
            order: None,
            compiler: None,
            memory: Memory::new(MEMORY_BUDGET.in_memory(), INSTANCE_MEMORY.in_memory()),
        };
        Ok((settings.plugins, Loader::new(loading, Clock::system())?))
    }
}

impl Plugin {
    pub async fn run(self) -> Result<ExitCode, Error> {
        // What a component says is for its author to see.
        let filter = if matches!(self, Self::Test { .. }) {
            "off,batchwright::plugin::log=debug"
        } else {
            "off"
        };
        telemetry::start(filter, LogFormat::Text).map_err(Error::Other)?;
        match self {
            Self::List { server: Some(url), .. } => {
                show::list_of_server(&Client::new(&url, None)?).await
            }
            Self::Pause(pause) => pause.run(true),
            Self::Resume(pause) => pause.run(false),
            Self::List { plugins, given, .. } => {
                let (configured, loader) = given.loader_with_plugins()?;
                let plugins = plugins.unwrap_or(configured);
                let registry = Registry::open(&plugins, loader).await?;
                Ok(show::list(&registry))
            }
            Self::Inspect { file, given } => {
                let inspected = given.of_component_alone().loader()?.inspect(&file).await?;
                write_output(format_args!("{}", show::describe(&file, &inspected)));
                Ok(ExitCode::SUCCESS)
            }
            Self::Check { server: Some(url), .. } => {
                show::list_of_server(&Client::new(&url, None)?).await
            }
            Self::Check { path, given, .. } => {
                let (configured, loader) = given.loader_with_plugins()?;
                show::check(loader, &path.unwrap_or(configured)).await
            }
            Self::New(new) => new.run(),
            Self::Test { file, cases, settings, given } => {
                let is_toml = file.extension().is_some_and(|extension| extension == "toml");
                let given = if is_toml { given } else { given.of_component_alone() };
                test::test(&given.loader()?, &file, cases.as_deref(), &settings).await
            }
            Self::Pull(pull) => pull.run().await,
            Self::Sign(sign) => sign.run(),
            Self::Verify(verify) => verify.run(),
        }
    }
}
