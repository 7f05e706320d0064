//! What can go wrong with a plugin: at load, where an operator can mend it, and in a call.

use std::path::PathBuf;

/// Why a plugin does not load. Each message names the file, the key and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("failed to read {}: {source}", path.display())]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("failed to read the plugin directory {}: {source}; name another one with --plugins", path.display())]
    Directory { path: PathBuf, source: std::io::Error },
    #[error("{}: {message}", file.display())]
    Manifest { file: PathBuf, message: String },
    #[error("{}: {key}: {message}", file.display())]
    Key { file: PathBuf, key: String, message: String },
    #[error("{}: signature: {message}", file.display())]
    Signature { file: PathBuf, message: String },
    #[error("{}: {message}", component.display())]
    Component { component: PathBuf, message: String },
    #[error("{}: is turned off by `enabled = false`", file.display())]
    Disabled { file: PathBuf },
}

/// Why a call of a plugin brought nothing. Harmless to everything but the request, or the batch's validation, it was made for.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CallError {
    #[error(
        "Plugin `{plugin}` used more than {limit} of CPU time in one call of `{function}`; the limit is [limits] call_timeout."
    )]
    Cpu { plugin: String, function: &'static str, limit: String },
    #[error(
        "Plugin `{plugin}` waits in `{function}` and does not come back; a plugin has nothing to wait for."
    )]
    Asleep { plugin: String, function: &'static str },
    #[error(
        "Plugin `{plugin}` asked for more than {limit} of memory in `{function}`; the limit is [limits] memory."
    )]
    Memory { plugin: String, function: &'static str, limit: String },
    #[error(
        "Plugin `{plugin}` asked for a table of more than {limit} elements in `{function}`; the limit is [limits] table_elements."
    )]
    Table { plugin: String, function: &'static str, limit: u32 },
    #[error(
        "Plugin `{plugin}` held more than {limit} handles in `{function}`; the limit is [limits] handles."
    )]
    Handles { plugin: String, function: &'static str, limit: u32 },
    #[error(
        "Plugin `{plugin}` used up its call stack of {limit} in `{function}`; this limit is the same for all plugins."
    )]
    Stack { plugin: String, function: &'static str, limit: String },
    #[error(
        "Plugin `{plugin}` handed over more than {limit} from `{function}`; the limit is [limits] answer."
    )]
    Answer { plugin: String, function: &'static str, limit: String },
    #[error("Plugin `{plugin}` failed in `{function}`: {message}.")]
    Trap {
        plugin: String,
        function: &'static str,
        message: String,
        /// What the guest wrote last: the operator's.
        said: String,
    },
    /// What it says may hold its settings, which are the operator's.
    #[error("Plugin `{plugin}` refused its settings; the server's log says more.")]
    Configure { plugin: String, message: String },
    #[error("Plugin `{plugin}` broke the contract in `{function}`: {message}")]
    Contract { plugin: String, function: &'static str, message: String },
}

impl CallError {
    /// The operator's text.
    pub fn detail(&self) -> String {
        match self {
            Self::Trap { plugin, function, message, said } if !said.is_empty() => {
                format!("Plugin `{plugin}` failed in `{function}`: {message}; it wrote: {said}")
            }
            Self::Configure { plugin, message } => {
                format!("Plugin `{plugin}` refused its settings: {message}")
            }
            error => error.to_string(),
        }
    }

    /// A stable word for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Cpu { .. } | Self::Asleep { .. } => "plugin_timeout",
            Self::Memory { .. }
            | Self::Table { .. }
            | Self::Handles { .. }
            | Self::Stack { .. } => "plugin_out_of_memory",
            Self::Answer { .. } => "plugin_answer_too_large",
            Self::Trap { .. } | Self::Configure { .. } => "plugin_failed",
            Self::Contract { .. } => "plugin_contract_violation",
        }
    }
}
