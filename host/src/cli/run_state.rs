//! What `batchwright run` keeps of a run beside its output, and the places that it writes to.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Error;
use super::path_text;
use super::place::{Digested, Target, digest};

/// What is remembered of a run, in its folder.
const NOTE: &str = "run.json";

/// What an unfinished run is of, and what it has placed so far.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Note {
    #[serde(with = "path_text")]
    pub input: PathBuf,
    pub bytes: u64,
    pub sha256: String,
    pub endpoint: String,
    /// Files that were put in their place, or were about to be.
    pub placed: Vec<Digested>,
    /// The exit status of a run whose files are all in place: its folder is to go.
    #[serde(default)]
    pub finished: Option<u8>,
}

/// The places of one run.
pub struct Places {
    pub input: PathBuf,
    pub output: Target,
    pub errors: Target,
    pub state: PathBuf,
}

impl Places {
    /// Finds all places, and refuses what would harm the input, before anything is made.
    pub fn find(input: &Path, output: &Path, errors: Option<PathBuf>) -> Result<Self, Error> {
        let failed = |error: std::io::Error| {
            Error::Other(format!("failed to read {}: {error}", input.display()))
        };
        let found = std::fs::metadata(input).map_err(failed)?;
        if !found.is_file() {
            let message = "is no regular file; save it to a file first, as a run that is interrupted reads it again";
            return Err(Error::Usage(format!("{}: {message}", input.display())));
        }
        let input = std::fs::canonicalize(input).map_err(failed)?;
        let target = Target::find(output)?;
        let errors = match errors {
            Some(errors) => errors,
            // Beside the input where the output is no file.
            None => errors_beside(target.path().map_or(&input, |_| output)),
        };
        let errors = Target::find(&errors)?;
        if let Some(same) = [&target, &errors].into_iter().find(|target| target.is_file(&found)) {
            return Err(Error::Usage(format!(
                "{} is the input; results never go over it, so name another file",
                same.given.display()
            )));
        }
        let mut state = target.path().unwrap_or(&input).as_os_str().to_owned();
        state.push(".batchwright");
        Ok(Self { input, output: target, errors, state: state.into() })
    }
}

fn errors_beside(output: &Path) -> PathBuf {
    let mut name = match output.extension() {
        Some(extension) if extension == "jsonl" => output.with_extension("").into_os_string(),
        _ => output.as_os_str().to_owned(),
    };
    name.push(".errors.jsonl");
    name.into()
}

impl Note {
    /// What a former run left in its folder, if one did.
    pub fn read(state: &Path) -> Result<Option<Self>, Error> {
        let unreadable = |why: &dyn std::fmt::Display| {
            let state = state.display();
            Error::Other(format!(
                "{state} holds an unfinished run that cannot be read ({why}); delete the folder to begin anew"
            ))
        };
        match std::fs::read(state.join(NOTE)) {
            Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|error| unreadable(&error)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(unreadable(&error)),
        }
    }

    /// Writes it whole or not at all.
    pub fn write(&self, state: &Path) -> Result<(), Error> {
        let written = || {
            let beside = state.join("run.json.new");
            let file = std::fs::File::create(&beside)?;
            serde_json::to_writer(&file, self)?;
            file.sync_all()?;
            std::fs::rename(&beside, state.join(NOTE))
        };
        written().map_err(|error| {
            Error::Other(format!("failed to write {}: {error}", state.join(NOTE).display()))
        })
    }
}

impl Note {
    /// Refuses to continue with another input: its content counts, not its name or its date.
    pub fn check(&self, places: &Places, endpoint: Option<&str>) -> Result<(), Error> {
        let failed = |error: std::io::Error| {
            Error::Other(format!("failed to read {}: {error}", places.input.display()))
        };
        let state = places.state.display();
        let ways =
            "--partial ends that run and writes what it has, or delete the folder to begin anew";
        if digest(&places.input).map_err(failed)? != (self.bytes, self.sha256.clone()) {
            let before = self.input.display();
            return Err(Error::Usage(format!(
                "{state} holds an unfinished run of {before} whose content was another; {ways}"
            )));
        }
        match endpoint.filter(|endpoint| *endpoint != self.endpoint) {
            None => Ok(()),
            Some(endpoint) => Err(Error::Usage(format!(
                "{state} holds an unfinished run for {}, not {endpoint}; {ways}",
                self.endpoint
            ))),
        }
    }
}

/// Removes the folder of a run, its note last: that says what the rest is for.
pub fn remove(state: &Path) -> Result<(), Error> {
    let removed = || {
        for entry in std::fs::read_dir(state)? {
            let entry = entry?;
            if entry.file_name() == NOTE {
                continue;
            }
            if entry.file_type()?.is_dir() {
                std::fs::remove_dir_all(entry.path())?;
            } else {
                std::fs::remove_file(entry.path())?;
            }
        }
        std::fs::remove_file(state.join(NOTE))?;
        std::fs::remove_dir(state)
    };
    removed().map_err(|error: std::io::Error| {
        Error::Other(format!("failed to remove {}: {error}", state.display()))
    })
}
