//! Compiler process: compiles one component within the layers of its confinement.

use std::io::{Read, Write};
use std::process::ExitCode;

use clap::Args;
use rustix::process::nice;

#[cfg(target_os = "linux")]
use super::confinement;
use crate::compile::MISSING_LAYER_PREFIX;
use crate::package::files::MAX_COMPONENT_BYTES;
use crate::sandbox::engine::{self, EngineKind};

/// Exit code: the compiler rejects the component.
pub(crate) const EXIT_INVALID_COMPONENT: u8 = 1;

/// Exit code: the process cannot set its limits, read its input or write its output.
pub(crate) const EXIT_HOST_ERROR: u8 = 3;

/// Exit code: the component itself does not fit into memory.
pub(crate) const EXIT_OUT_OF_MEMORY: u8 = 4;

/// Compiler process, with its arguments.
#[derive(Args)]
pub struct Process {
    /// Memory limit, in bytes
    #[arg(long)]
    memory: u64,
    /// CPU time limit, in seconds
    #[arg(long)]
    seconds: u64,
    /// Id of the parent process
    #[arg(long)]
    parent: u32,
    /// Selects the engine with asynchronous functions
    #[arg(long)]
    concurrent: bool,
}

impl Process {
    /// Compiles the component on standard input and writes the code to standard output.
    pub fn run(self) -> ExitCode {
        match self.compile() {
            Ok(()) => ExitCode::SUCCESS,
            Err((code, message)) => {
                eprintln!("{message}");
                ExitCode::from(code)
            }
        }
    }

    fn compile(self) -> Result<(), (u8, String)> {
        self.confine().map_err(|error| {
            (EXIT_HOST_ERROR, format!("the limits of the compiler cannot be set: {error}"))
        })?;
        let engine_kind = if self.concurrent { EngineKind::Concurrent } else { EngineKind::Plain };
        let mut bytes = Vec::new();
        let read = std::io::stdin().lock().take(MAX_COMPONENT_BYTES).read_to_end(&mut bytes);
        read.map_err(|error| {
            let code = if error.kind() == std::io::ErrorKind::OutOfMemory {
                EXIT_OUT_OF_MEMORY
            } else {
                EXIT_HOST_ERROR
            };
            (code, format!("the component cannot be read: {error}"))
        })?;
        let compiler =
            engine::compiler(engine_kind).map_err(|message| (EXIT_HOST_ERROR, message))?;
        let compiled = compiler
            .precompile_component(&bytes)
            .map_err(|error| (EXIT_INVALID_COMPONENT, format!("{error:#}")))?;
        std::io::stdout().lock().write_all(&compiled).map_err(|error| {
            (EXIT_HOST_ERROR, format!("its compiled code cannot be written: {error}"))
        })
    }

    /// Sets the limits and enters the sandbox.
    fn confine(&self) -> std::io::Result<()> {
        #[cfg(target_os = "linux")]
        {
            use rustix::process::{Signal, getppid, set_parent_process_death_signal};
            set_parent_process_death_signal(Some(Signal::KILL))?;
            // A parent that ended before the call above sends no signal.
            if getppid()
                .is_none_or(|parent| parent.as_raw_nonzero().get().cast_unsigned() != self.parent)
            {
                return Err(std::io::Error::other("the parent process has ended"));
            }
        }
        // Optional, as a system may forbid it.
        nice(10).ok();
        #[cfg(target_os = "linux")]
        {
            confinement::limit(self.memory, self.seconds)?;
            for layer in confinement::enter() {
                eprintln!("{MISSING_LAYER_PREFIX}{layer}");
            }
        }
        Ok(())
    }
}
