//! Settings as flags and environment variables of a command.

use std::marker::PhantomData;
use std::path::PathBuf;

use batchwright_domain::settings::{Given, Setting};
use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Args, Command, FromArgMatches, value_parser};

use super::{ConfigError, RENAMED, Settings};

/// Which settings a command has.
pub trait Selection {
    /// Returns true if the command has the setting.
    fn contains(setting: &Setting) -> bool;
}

/// Every setting.
#[derive(Clone, Debug)]
pub struct All;

impl Selection for All {
    fn contains(_: &Setting) -> bool {
        true
    }
}

/// Settings of how a plugin is loaded.
#[derive(Clone, Debug)]
pub struct LoaderSettings;

impl Selection for LoaderSettings {
    fn contains(setting: &Setting) -> bool {
        ["cache", "components", "compile_timeout", "compile_memory", "trusted_keys"]
            .contains(&setting.name)
    }
}

/// The plugin folder alone.
#[derive(Clone, Debug)]
pub struct PluginFolder;

impl Selection for PluginFolder {
    fn contains(setting: &Setting) -> bool {
        setting.name == "plugins"
    }
}

/// The data folder alone.
#[derive(Clone, Debug)]
pub struct DataFolder;

impl Selection for DataFolder {
    fn contains(setting: &Setting) -> bool {
        setting.name == "data"
    }
}

/// Addresses of the server.
#[derive(Clone, Debug)]
pub struct Addresses;

impl Selection for Addresses {
    fn contains(setting: &Setting) -> bool {
        ["listen", "admin_listen", "tls_certificate"].contains(&setting.name)
    }
}

/// Flags and variables of a selection of settings, and the config file.
#[derive(Clone, Debug)]
pub struct SettingsArgs<S> {
    config: Option<PathBuf>,
    given: Given,
    selection: PhantomData<S>,
}

impl<S> SettingsArgs<S> {
    /// Resolves all settings; those that the command has no flag for come from the config file.
    pub fn resolve(self) -> Result<Settings, ConfigError> {
        Settings::resolve(self.given, self.config.as_deref())
    }

    /// Resolves all settings, and returns beside them what was given and where.
    pub fn explain(mut self) -> (Result<Settings, ConfigError>, Given) {
        let settings = Settings::resolve_in(&mut self.given, self.config.as_deref());
        (settings, self.given)
    }

    /// Returns true if a flag or a variable gives the setting.
    pub fn has(&self, name: &str) -> bool {
        self.given.has(name)
    }
}

impl<S: Selection> Args for SettingsArgs<S> {
    fn augment_args(command: Command) -> Command {
        let config = Arg::new("config")
            .long("config")
            .env("BATCHWRIGHT_CONFIG")
            .hide_env_values(true)
            .value_name("FILE")
            .value_parser(value_parser!(PathBuf))
            .help("Config file (TOML), with settings by section, as in the settings reference");
        let settings = Settings::all().filter(|setting| S::contains(setting));
        let command = command.arg(config).args(settings.map(argument));
        let renamed = RENAMED.iter().filter(|(_, name)| {
            Settings::all().any(|setting| setting.name == *name && S::contains(setting))
        });
        command.args(
            renamed.map(|(old, _)| {
                Arg::new(*old).long(old.replace('_', "-")).hide(true).num_args(0..=1)
            }),
        )
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

/// The flag of a setting. Values are parsed later, so that all errors are reported together.
fn argument(setting: &'static Setting) -> Arg {
    let heading = match setting.section.split_at_checked(1) {
        Some((first, rest)) => format!("{}{rest}", first.to_uppercase()),
        None => String::new(),
    };
    let shown = match setting.shown_default {
        "" => String::new(),
        shown => format!(" [default: {shown}]"),
    };
    Arg::new(setting.name)
        .long(setting.flag())
        .env(setting.variable())
        .hide_env_values(true)
        .value_name(setting.placeholder)
        .help(format!("{}{shown}", setting.help()))
        .help_heading(heading)
        .next_line_help(true)
}

impl<S: Selection> FromArgMatches for SettingsArgs<S> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut given = Given::default();
        for setting in Settings::all().filter(|setting| S::contains(setting)) {
            let Some(text) = matches.get_one::<String>(setting.name) else { continue };
            let origin = match matches.value_source(setting.name) {
                Some(ValueSource::EnvVariable) => setting.variable(),
                _ => format!("--{}", setting.flag()),
            };
            given.add(setting.name, text, origin);
        }
        for (old, name) in RENAMED {
            if matches.try_contains_id(old).unwrap_or_default() {
                let [old, name] = [old, name].map(|name| name.replace('_', "-"));
                given.add_error(format!("--{old} is called --{name}"));
            }
        }
        let config = matches.get_one::<PathBuf>("config").cloned();
        Ok(Self { config, given, selection: PhantomData })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}
