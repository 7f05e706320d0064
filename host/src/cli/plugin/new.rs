//! `batchwright plugin new`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, ValueEnum};

use crate::cli::Error;
use crate::cli::terminal::put;

/// A folder with everything in it: source, the contract, a case for `plugin test`, a TOML file to load it with, and a README with the commands.
#[derive(Args)]
pub struct New {
    /// The plugin's name, and the folder's: lower-case letters, digits and `-`
    name: String,
    /// What it is to be
    #[arg(long, value_enum)]
    kind: Kind,
    /// The language to write it in
    #[arg(long, value_enum)]
    lang: Lang,
    /// The folder to make it in [default: the working directory]
    #[arg(long, value_name = "DIR", default_value = ".", hide_default_value = true)]
    to: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum Kind {
    /// Talks to a provider
    Adapter,
    /// Judges the lines of input files
    Validator,
}

#[derive(Clone, Copy, ValueEnum)]
enum Lang {
    Rust,
    Python,
    Js,
    C,
}

/// A file's place in the project, and its text with `{{name}}` in it.
type Template = (&'static str, &'static str);

/// Texts of `templates/`, as they stand there.
macro_rules! files {
    ($folder:literal: $($file:literal),+) => {
        &[$(($file, include_str!(concat!("../../../../templates/", $folder, "/", $file)))),+]
    };
}

const CONTRACT: &[Template] = &[
    ("wit/plugin.wit", include_str!("../../../../wit/v0.1/plugin.wit")),
    ("wit/validation.wit", include_str!("../../../../wit/v0.1/validation.wit")),
    ("wit/inference.wit", include_str!("../../../../wit/v0.1/inference.wit")),
    ("wit/classification.wit", include_str!("../../../../wit/v0.1/classification.wit")),
    ("wit/logging.wit", include_str!("../../../../wit/v0.1/logging.wit")),
    ("wit/worlds.wit", include_str!("../../../../wit/v0.1/worlds.wit")),
];

impl New {
    /// What the project is made of, in several lists.
    fn templates(&self) -> [&'static [Template]; 4] {
        let own: &[Template] = match (self.lang, self.kind) {
            (Lang::Rust, Kind::Adapter) => {
                files!("rust-adapter": "README.md", "Cargo.toml", "src/lib.rs", ".gitignore")
            }
            (Lang::Rust, Kind::Validator) => {
                files!("rust-validator": "README.md", "Cargo.toml", "src/lib.rs", ".gitignore")
            }
            (Lang::Python, Kind::Adapter) => {
                files!("python-adapter": "README.md", "requirements.txt", "plugin.py", ".gitignore")
            }
            (Lang::Python, Kind::Validator) => {
                files!("python-validator": "README.md", "requirements.txt", "plugin.py", ".gitignore")
            }
            (Lang::Js, Kind::Adapter) => {
                files!("js-adapter": "README.md", "package.json", "plugin.js", "{{name}}.toml", ".gitignore")
            }
            (Lang::Js, Kind::Validator) => {
                files!("js-validator": "README.md", "package.json", "plugin.js", "{{name}}.toml", ".gitignore")
            }
            (Lang::C, Kind::Adapter) => {
                files!("c-adapter": "README.md", "Makefile", "plugin.c", ".gitignore")
            }
            (Lang::C, Kind::Validator) => {
                files!("c-validator": "README.md", "Makefile", "plugin.c", ".gitignore")
            }
        };
        let shared: &[Template] = match self.kind {
            Kind::Adapter => {
                files!("adapter": "{{name}}.toml", "cases/answer.json", "cases/busy.json", "cases/timeout.json")
            }
            Kind::Validator => files!("validator": "{{name}}.toml", "cases/tokens.json"),
        };
        let library: &[Template] = match self.lang {
            Lang::C => files!("c": "json.h"),
            _ => &[],
        };
        // What a language has of its own stands in for what all have.
        [shared, library, own, CONTRACT]
    }

    pub fn run(self) -> Result<ExitCode, Error> {
        check_name(&self.name).map_err(Error::Other)?;
        let folder = self.to.join(&self.name);
        let failed = |path: &Path, error: std::io::Error| {
            Error::Other(format!("failed to make {}: {error}", path.display()))
        };
        // An author's work is never written over.
        std::fs::create_dir(&folder).map_err(|error| match error.kind() {
            std::io::ErrorKind::AlreadyExists => Error::Other(format!(
                "{} is there already; choose another name, or another folder with --to",
                folder.display()
            )),
            std::io::ErrorKind::NotFound => Error::Other(format!(
                "there is no folder {}; make it, or name another with --to",
                self.to.display()
            )),
            _ => failed(&folder, error),
        })?;
        for (place, text) in self.templates().into_iter().flatten() {
            let path = folder.join(place.replace("{{name}}", &self.name));
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent).map_err(|error| failed(parent, error))?;
            }
            std::fs::write(&path, text.replace("{{name}}", &self.name))
                .map_err(|error| failed(&path, error))?;
        }
        put!("{} is made. Its README.md says how to build and test it:\n", folder.display());
        let readme =
            self.templates().into_iter().flatten().find(|(place, _)| *place == "README.md");
        let (_, readme) = readme.copied().unwrap_or_default();
        put!("    cd {}", folder.display());
        for command in commands(readme) {
            put!("    {}", command.replace("{{name}}", &self.name));
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// The lines of the first shell block of a README.
fn commands(readme: &str) -> impl Iterator<Item = &str> {
    readme.lines().skip_while(|line| *line != "```sh").skip(1).take_while(|line| *line != "```")
}

/// Names that all four languages' tools take.
fn check_name(name: &str) -> Result<(), String> {
    let fits =
        |letter: char| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == '-';
    if name.len() <= 40
        && name.starts_with(|letter: char| letter.is_ascii_lowercase())
        && name.chars().all(fits)
    {
        return Ok(());
    }
    Err(format!(
        "`{}` is no name for a plugin; take lower-case letters, digits and `-`, a letter first, at most 40",
        name.escape_debug()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guide_shows_the_adapters_as_they_are() {
        let guide = include_str!("../../../../docs/writing-plugins.md");
        for lang in [Lang::Rust, Lang::Python, Lang::Js, Lang::C] {
            let new =
                New { name: "my-adapter".into(), kind: Kind::Adapter, lang, to: PathBuf::new() };
            let source = ["src/lib.rs", "plugin.py", "plugin.js", "plugin.c"];
            let found =
                new.templates().into_iter().flatten().find(|(place, _)| source.contains(place));
            let (place, text) = found.unwrap();
            assert!(
                guide.contains(&text.replace("{{name}}", &new.name)),
                "docs/writing-plugins.md shows another {place}"
            );
        }
    }
}
