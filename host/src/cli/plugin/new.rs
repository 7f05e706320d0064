//! `batchwright plugin new`: creates a plugin project from templates.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, ValueEnum};

use crate::cli::terminal::outln;
use crate::error::Error;

/// Arguments of `batchwright plugin new`.
///
/// The new folder has the source, the contract, cases for `plugin test`, a TOML file to load the
/// plugin with, and a README with the commands.
#[derive(Args)]
pub struct New {
    /// Name of the plugin and of its folder: lower-case letters, digits and `-`
    name: String,
    /// Kind of the plugin
    #[arg(long, value_enum)]
    kind: Kind,
    /// Programming language of the plugin
    #[arg(long, value_enum)]
    lang: Lang,
    /// Parent folder [default: the working directory]
    #[arg(long, value_name = "DIR", default_value = ".", hide_default_value = true)]
    to: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum Kind {
    /// Translates requests and responses for a provider
    Adapter,
    /// Checks the lines of input files
    Validator,
}

// No doc comments here: they would become help texts of the values.
#[derive(Clone, Copy, ValueEnum)]
enum Lang {
    Rust,
    Python,
    Js,
    C,
}

/// Path of a file in the project and text of the file, both with `{{name}}` for the plugin's name.
type Template = (&'static str, &'static str);

/// Includes files of a folder in `templates/`.
macro_rules! templates {
    ($folder:literal: $($file:literal),+) => {
        &[$(($file, include_str!(concat!("../../../../templates/", $folder, "/", $file)))),+]
    };
}

/// Files of the plugin contract, which every project contains.
const CONTRACT_FILES: &[Template] = &[
    ("wit/plugin.wit", include_str!("../../../../wit/v0.1/plugin.wit")),
    ("wit/validation.wit", include_str!("../../../../wit/v0.1/validation.wit")),
    ("wit/inference.wit", include_str!("../../../../wit/v0.1/inference.wit")),
    ("wit/classification.wit", include_str!("../../../../wit/v0.1/classification.wit")),
    ("wit/streaming.wit", include_str!("../../../../wit/v0.1/streaming.wit")),
    ("wit/logging.wit", include_str!("../../../../wit/v0.1/logging.wit")),
    ("wit/worlds.wit", include_str!("../../../../wit/v0.1/worlds.wit")),
];

impl New {
    /// Returns the files of the project; a later file replaces an earlier one with the same path.
    fn templates(&self) -> [&'static [Template]; 4] {
        let own_templates: &[Template] = match (self.lang, self.kind) {
            (Lang::Rust, Kind::Adapter) => {
                templates!("rust-adapter": "README.md", "Cargo.toml", "src/lib.rs", ".gitignore")
            }
            (Lang::Rust, Kind::Validator) => {
                templates!("rust-validator": "README.md", "Cargo.toml", "src/lib.rs", ".gitignore")
            }
            (Lang::Python, Kind::Adapter) => {
                templates!(
                    "python-adapter":
                    "README.md", "requirements.txt", "plugin.py", ".gitignore"
                )
            }
            (Lang::Python, Kind::Validator) => {
                templates!(
                    "python-validator":
                    "README.md", "requirements.txt", "plugin.py", ".gitignore"
                )
            }
            (Lang::Js, Kind::Adapter) => {
                templates!(
                    "js-adapter":
                    "README.md", "package.json", "plugin.js", "{{name}}.toml", ".gitignore"
                )
            }
            (Lang::Js, Kind::Validator) => {
                templates!(
                    "js-validator":
                    "README.md", "package.json", "plugin.js", "{{name}}.toml", ".gitignore"
                )
            }
            (Lang::C, Kind::Adapter) => {
                templates!("c-adapter": "README.md", "Makefile", "plugin.c", ".gitignore")
            }
            (Lang::C, Kind::Validator) => {
                templates!("c-validator": "README.md", "Makefile", "plugin.c", ".gitignore")
            }
        };
        let shared_templates: &[Template] = match self.kind {
            Kind::Adapter => {
                templates!(
                    "adapter":
                    "{{name}}.toml", "cases/answer.json", "cases/busy.json", "cases/timeout.json"
                )
            }
            Kind::Validator => templates!("validator": "{{name}}.toml", "cases/tokens.json"),
        };
        let library_templates: &[Template] = match self.lang {
            Lang::C => templates!("c": "json.h"),
            _ => &[],
        };
        // The templates of a language come after the shared ones, which they may replace.
        [shared_templates, library_templates, own_templates, CONTRACT_FILES]
    }

    /// Creates the project and prints the commands to build and test it.
    pub fn run(self) -> Result<ExitCode, Error> {
        check_name(&self.name).map_err(Error::Other)?;
        let folder = self.to.join(&self.name);
        let failed = |path: &Path, error: std::io::Error| {
            Error::Other(format!("failed to create {}: {error}", path.display()))
        };
        // The folder must be new, so that no existing work is overwritten.
        std::fs::create_dir(&folder).map_err(|error| match error.kind() {
            std::io::ErrorKind::AlreadyExists => Error::Other(format!(
                "{} already exists; choose another name, or another folder with --to",
                folder.display()
            )),
            std::io::ErrorKind::NotFound => Error::Other(format!(
                "there is no folder {}; create it, or name another folder with --to",
                self.to.display()
            )),
            _ => failed(&folder, error),
        })?;
        for (path, text) in self.templates().into_iter().flatten() {
            let path = folder.join(path.replace("{{name}}", &self.name));
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent).map_err(|error| failed(parent, error))?;
            }
            std::fs::write(&path, text.replace("{{name}}", &self.name))
                .map_err(|error| failed(&path, error))?;
        }
        outln!("created {}; build and test it as in its README.md:\n", folder.display());
        let readme = self.templates().into_iter().flatten().find(|(path, _)| *path == "README.md");
        let (_, readme) = readme.copied().unwrap_or_default();
        outln!("    cd {}", folder.display());
        for command in commands(readme) {
            outln!("    {}", command.replace("{{name}}", &self.name));
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Returns the lines of the first shell block of a README.
fn commands(readme: &str) -> impl Iterator<Item = &str> {
    readme.lines().skip_while(|line| *line != "```sh").skip(1).take_while(|line| *line != "```")
}

/// Fails for a name that the tools of one of the four languages reject.
fn check_name(name: &str) -> Result<(), String> {
    let is_allowed = |character: char| {
        character.is_ascii_lowercase() || character.is_ascii_digit() || character == '-'
    };
    if name.len() <= 40
        && name.starts_with(|character: char| character.is_ascii_lowercase())
        && name.chars().all(is_allowed)
    {
        return Ok(());
    }
    Err(format!(
        "`{}` is not a plugin name; use lower-case letters, digits and `-`, a letter first, \
         at most 40 characters",
        name.escape_debug()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_project_has_every_file_of_the_contract() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../wit/v0.1");
        let files = std::fs::read_dir(folder).unwrap();
        let mut files: Vec<String> = files
            .map(|file| format!("wit/{}", file.unwrap().file_name().to_string_lossy()))
            .collect();
        let mut copied: Vec<&str> = CONTRACT_FILES.iter().map(|(path, _)| *path).collect();
        files.sort();
        copied.sort_unstable();
        assert_eq!(copied, files);
    }
}
