//! `batchwright completions` and `batchwright man`: what packages install beside the program.

use std::path::PathBuf;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::Cli;
use super::terminal::outln;
use crate::error::Error;

/// Arguments of `batchwright completions`.
#[derive(Args)]
pub struct Completions {
    /// Shell that reads the script
    #[arg(value_enum)]
    shell: Shell,
}

impl Completions {
    /// Prints the script.
    pub fn run(&self) -> Result<(), Error> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "batchwright", &mut script);
        outln!("{}", String::from_utf8_lossy(&script).trim_end());
        Ok(())
    }
}

/// Arguments of `batchwright man`.
#[derive(Args)]
pub struct Man {
    /// Folder for the pages, which exists
    folder: PathBuf,
}

impl Man {
    /// Writes one page for the program and one for each command.
    pub fn run(&self) -> Result<(), Error> {
        clap_mangen::generate_to(Cli::command(), &self.folder).map_err(|error| {
            Error::Other(format!("failed to write to {}: {error}", self.folder.display()))
        })
    }
}
