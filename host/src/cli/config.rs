//! `batchwright config`: checks and shows the settings of a server.

use batchwright_domain::settings::{Given, Setting};
use clap::Subcommand;
use url::Url;

use super::terminal::outln;
use crate::assemble;
use crate::config::{All, Settings, SettingsArgs, unknown_variables};
use crate::error::Error;

/// Actions of `batchwright config`.
#[derive(Subcommand)]
pub enum Config {
    /// Check the settings and the files that they name, and report every error at once
    Check {
        #[command(flatten)]
        settings: SettingsArgs<All>,
    },
    /// Show the value of every setting and where it comes from, as a config file
    Show {
        #[command(flatten)]
        settings: SettingsArgs<All>,
        /// Only show settings that differ from their defaults
        #[arg(long)]
        changed: bool,
    },
}

impl Config {
    /// Runs the command.
    pub fn run(self) -> Result<(), Error> {
        match self {
            Self::Check { settings } => check(settings),
            Self::Show { settings, changed } => show(settings, changed),
        }
    }
}

/// Checks the settings; the error lists everything that is wrong.
fn check(settings: SettingsArgs<All>) -> Result<(), Error> {
    let settings = settings.resolve()?;
    let mut errors = assemble::check(&settings);
    errors.extend(unknown_variables().into_iter().map(|unknown| {
        let hint = unknown.suggestion.map(|name| format!("; did you mean `{name}`?"));
        format!("{} is no setting{}", unknown.name, hint.unwrap_or_default())
    }));
    if errors.is_empty() {
        outln!("the settings are valid");
        return Ok(());
    }
    Err(Error::Config(crate::config::ConfigError::Values(errors)))
}

/// Shows the settings, section by section.
fn show(settings: SettingsArgs<All>, changed: bool) -> Result<(), Error> {
    let (resolved, given) = settings.explain();
    resolved?;
    let mut section = "";
    for setting in Settings::all() {
        let line = line(setting, &given);
        if changed && given.text_of(setting.name).is_none_or(|(text, _)| text == setting.default) {
            continue;
        }
        if section != setting.section {
            section = setting.section;
            outln!("\n[{section}]");
        }
        outln!("{line}");
    }
    Ok(())
}

/// Returns every setting with its value and its source.
pub(super) fn shown_settings(given: &Given) -> serde_json::Value {
    let shown = Settings::all().map(|setting| {
        let (text, origin) = given.text_of(setting.name).unwrap_or((setting.default, "default"));
        let value = serde_json::json!({"value": without_password(text), "source": origin});
        (setting.name.to_owned(), value)
    });
    shown.collect::<serde_json::Map<_, _>>().into()
}

/// Returns the line of a setting, as in a config file.
fn line(setting: &Setting, given: &Given) -> String {
    let name = setting.name;
    let (text, origin) = match given.text_of(name) {
        Some((text, origin)) => (text, origin.strip_suffix(&format!(": {name}")).unwrap_or(origin)),
        None => (setting.default, "default"),
    };
    if text.is_empty() {
        return format!("# {name} is not set ({origin})");
    }
    let value = toml_edit::Value::from(without_password(text));
    format!("{name} = {value} # {origin}", value = value.to_string().trim())
}

/// Removes the user name and the password of a URL.
fn without_password(text: &str) -> String {
    match Url::parse(text) {
        Ok(mut url) if !url.username().is_empty() || url.password().is_some() => {
            url.set_username("").ok();
            url.set_password(url.password().map(|_| "***")).ok();
            url.to_string()
        }
        _ => text.to_owned(),
    }
}
