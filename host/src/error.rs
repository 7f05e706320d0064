//! Expected errors of commands, each with its exit status.

use batchwright_plugin::LoadError;
use batchwright_store::StoreError;

use crate::config::ConfigError;

/// Exit statuses with their meanings, as documented.
#[cfg(test)]
pub const EXIT_STATUSES: [(u8, &str); 8] = [
    (0, "success"),
    (1, "a request failed, or another failure"),
    (2, "invalid arguments; nothing was changed"),
    (3, "invalid setting"),
    (4, "a plugin cannot be loaded, or a required plugin is missing"),
    (5, "the data folder or its disk cannot be used"),
    (6, "`run`: the provider is unavailable; the same command continues"),
    (130, "`run`: stopped by a signal; the same command continues"),
];

/// Error of a command, with a message for the user and an exit code.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Invalid setting.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Plugin that cannot be loaded.
    #[error(transparent)]
    Plugin(#[from] LoadError),
    /// Failure of the data folder or its disk.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Required plugin that is not loaded.
    #[error("{0}")]
    Required(String),
    /// Invalid arguments; the command changed nothing.
    #[error("{0}")]
    Usage(String),
    /// The server has no such resource.
    #[error("{0}")]
    NotFound(String),
    /// Any other failure.
    #[error("{0}")]
    Other(String),
}

impl Error {
    /// Returns the exit code: 1 for other failures, 2 for arguments (as clap does), 3 for settings,
    /// 4 for plugins, 5 for the data folder or its disk.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_) => 3,
            Self::Usage(_) => 2,
            Self::Plugin(_) | Self::Required(_) => 4,
            Self::Store(_) => 5,
            Self::NotFound(_) | Self::Other(_) => 1,
        }
    }
}
