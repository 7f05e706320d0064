//! State of `batchwright run`: the paths of a run, and the record in its state folder.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::cli::path_text;
use crate::cli::place::{FileDigest, Target, digest};
use crate::error::Error;

/// Name of the record in the state folder.
const STATE_FILE_NAME: &str = "run.json";

/// Record of a run: its input, its endpoint and its progress in placing result files.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct RunState {
    /// Path of the input file with all links resolved, for messages.
    #[serde(with = "path_text")]
    pub input: PathBuf,
    /// Size of the input file in bytes.
    pub bytes: u64,
    /// SHA-256 of the input file in hexadecimal.
    pub sha256: String,
    /// Endpoint of the batch.
    pub endpoint: String,
    /// Result files that the run wrote, each recorded before its rename.
    pub placed: Vec<FileDigest>,
    /// Exit status of a run whose result files are all in place; its folder can be removed.
    #[serde(default)]
    pub finished: Option<u8>,
}

/// Paths of one run.
pub struct RunPaths {
    /// Input file with all links resolved.
    pub input: PathBuf,
    /// Output file, for the results of successful requests.
    pub output: Target,
    /// Error file, for the results of failed requests.
    pub errors: Target,
    /// State folder: `OUTPUT.batchwright`, or `INPUT.batchwright` if the output is not a file.
    pub state: PathBuf,
}

impl RunPaths {
    /// Resolves all paths and creates nothing; fails if a result would overwrite the input.
    pub fn resolve(input: &Path, output: &Path, errors: Option<PathBuf>) -> Result<Self, Error> {
        let failed = |error: std::io::Error| {
            Error::Other(format!("failed to read {}: {error}", input.display()))
        };
        let found = std::fs::metadata(input).map_err(failed)?;
        if !found.is_file() {
            return Err(Error::Usage(format!(
                "{}: is not a regular file; \
                 save it to a file first, because a continued run reads it again",
                input.display()
            )));
        }
        let input = std::fs::canonicalize(input).map_err(failed)?;
        let target = Target::resolve(output)?;
        let errors = match errors {
            Some(errors) => errors,
            // If the output is a pipe or device, the error file is beside the input.
            None => errors_beside(target.path().map_or(&input, |_| output)),
        };
        let errors = Target::resolve(&errors)?;
        if let Some(same) = [&target, &errors].into_iter().find(|target| target.is_file(&found)) {
            return Err(Error::Usage(format!(
                "{} is the input, which results never overwrite; name another file",
                same.given.display()
            )));
        }
        let mut state = target.path().unwrap_or(&input).as_os_str().to_owned();
        state.push(".batchwright");
        Ok(Self { input, output: target, errors, state: state.into() })
    }
}

/// Returns the default error file: the path with `.errors.jsonl` in place of `.jsonl`.
fn errors_beside(output: &Path) -> PathBuf {
    let mut name = match output.extension() {
        Some(extension) if extension == "jsonl" => output.with_extension("").into_os_string(),
        _ => output.as_os_str().to_owned(),
    };
    name.push(".errors.jsonl");
    name.into()
}

impl RunState {
    /// Reads the record of an unfinished run; none if the state folder has no record.
    pub fn read(state: &Path) -> Result<Option<Self>, Error> {
        let unreadable = |why: &dyn std::fmt::Display| {
            let state = state.display();
            Error::Other(format!(
                "{state} holds an unfinished run that cannot be read ({why}); \
                 delete the folder to start again"
            ))
        };
        match std::fs::read(state.join(STATE_FILE_NAME)) {
            Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|error| unreadable(&error)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(unreadable(&error)),
        }
    }

    /// Writes the record atomically: the old record stays until the new one is complete.
    pub fn write(&self, state: &Path) -> Result<(), Error> {
        let write = || {
            let draft = state.join("run.json.new");
            let file = std::fs::File::create(&draft)?;
            serde_json::to_writer(&file, self)?;
            file.sync_all()?;
            std::fs::rename(&draft, state.join(STATE_FILE_NAME))
        };
        write().map_err(|error| {
            Error::Other(format!(
                "failed to write {}: {error}",
                state.join(STATE_FILE_NAME).display()
            ))
        })
    }

    /// Fails if the run was started with another input or endpoint.
    ///
    /// The content of the input decides, not its name or its modification time.
    pub fn check(&self, paths: &RunPaths, endpoint: Option<&str>) -> Result<(), Error> {
        let failed = |error: std::io::Error| {
            Error::Other(format!("failed to read {}: {error}", paths.input.display()))
        };
        let state = paths.state.display();
        let remedy = "give --partial to end that run and write its results so far, \
                      or delete the folder to start again";
        if digest(&paths.input).map_err(failed)? != (self.bytes, self.sha256.clone()) {
            let before = self.input.display();
            return Err(Error::Usage(format!(
                "{state} holds an unfinished run of {before} with other content; {remedy}"
            )));
        }
        match endpoint.filter(|endpoint| *endpoint != self.endpoint) {
            None => Ok(()),
            Some(endpoint) => Err(Error::Usage(format!(
                "{state} holds an unfinished run for {}, not {endpoint}; {remedy}",
                self.endpoint
            ))),
        }
    }
}

/// Removes the state folder of a run.
///
/// The record goes last, so that the next run finishes the removal after a crash.
pub fn remove(state: &Path) -> Result<(), Error> {
    let remove = || {
        for entry in std::fs::read_dir(state)? {
            let entry = entry?;
            if entry.file_name() == STATE_FILE_NAME {
                continue;
            }
            if entry.file_type()?.is_dir() {
                std::fs::remove_dir_all(entry.path())?;
            } else {
                std::fs::remove_file(entry.path())?;
            }
        }
        std::fs::remove_file(state.join(STATE_FILE_NAME))?;
        std::fs::remove_dir(state)
    };
    remove().map_err(|error: std::io::Error| {
        Error::Other(format!("failed to remove {}: {error}", state.display()))
    })
}
