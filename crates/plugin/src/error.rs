//! Errors of plugins: at load, with a remedy for the operator, and in a call.

use std::path::PathBuf;

use batchwright_domain::error_code::ErrorCode;

/// Error that keeps a plugin from loading. Each message names the file, the key and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file of the plugin cannot be read.
    #[error("failed to read {}: {source}", path.display())]
    Unreadable {
        /// File that cannot be read.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// The plugin directory cannot be read.
    #[error(
        "failed to read the plugin directory {}: {source}; name another one with --plugins",
        path.display()
    )]
    Directory {
        /// Plugin directory.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// The TOML file as a whole is invalid.
    #[error("{}: {message}", file.display())]
    Manifest {
        /// TOML file of the plugin.
        file: PathBuf,
        /// Error and remedy.
        message: String,
    },
    /// A key of the TOML file has an invalid value.
    #[error("{}: {key}: {message}", file.display())]
    Key {
        /// TOML file of the plugin.
        file: PathBuf,
        /// Path of the key in the file, such as `limits.max_memory`.
        key: String,
        /// Error and remedy.
        message: String,
    },
    /// The signature is missing or invalid.
    #[error("{}: signature: {message}", file.display())]
    Signature {
        /// TOML file of the plugin.
        file: PathBuf,
        /// Error and remedy.
        message: String,
    },
    /// The component is invalid, does not compile or fails in its first calls.
    #[error("{}: {message}", component.display())]
    Component {
        /// File of the component.
        component: PathBuf,
        /// Error and remedy.
        message: String,
    },
    /// The TOML file disables the plugin.
    #[error("{}: is disabled by `enabled = false`", file.display())]
    Disabled {
        /// TOML file of the plugin.
        file: PathBuf,
    },
}

/// Error of one call of a plugin.
///
/// The error affects only the request, or the batch's validation, that the call was made for.
/// Clients see the `Display` text; [`CallError::detail`] is for operators.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CallError {
    /// The call exceeded its CPU time.
    #[error(
        "Plugin `{plugin}` used more than {limit} of CPU time in one call of `{function}`; \
         the limit is [limits] call_timeout."
    )]
    Cpu {
        /// Name of the plugin.
        plugin: String,
        /// Function of the contract that was called.
        function: &'static str,
        /// Value of the limit, with its unit.
        limit: String,
    },
    /// The call exceeded its time on the wall clock.
    #[error(
        "Plugin `{plugin}` blocked in `{function}` past its deadline; \
         a plugin must not sleep or wait for a clock."
    )]
    DeadlineExceeded {
        /// Name of the plugin.
        plugin: String,
        /// Function of the contract that was called.
        function: &'static str,
    },
    /// The guest was refused linear memory.
    #[error(
        "Plugin `{plugin}` asked for more than {limit} of memory in `{function}`; \
         the limit is [limits] max_memory."
    )]
    Memory {
        /// Name of the plugin.
        plugin: String,
        /// Function of the contract that was called.
        function: &'static str,
        /// Value of the limit, with its unit.
        limit: String,
    },
    /// The guest was refused a larger table.
    #[error(
        "Plugin `{plugin}` asked for a table of more than {limit} elements in `{function}`; \
         the limit is [limits] max_table_elements."
    )]
    Table {
        /// Name of the plugin.
        plugin: String,
        /// Function of the contract that was called.
        function: &'static str,
        /// Largest number of elements of a table.
        limit: u32,
    },
    /// The guest held too many handles of resources.
    #[error(
        "Plugin `{plugin}` held more than {limit} handles in `{function}`; \
         the limit is [limits] max_handles."
    )]
    Handles {
        /// Name of the plugin.
        plugin: String,
        /// Function of the contract that was called.
        function: &'static str,
        /// Largest number of handles at a time.
        limit: u32,
    },
    /// The guest overflowed its call stack.
    #[error(
        "Plugin `{plugin}` exceeded its call stack of {limit} in `{function}`; \
         this limit is the same for all plugins."
    )]
    Stack {
        /// Name of the plugin.
        plugin: String,
        /// Function of the contract that was called.
        function: &'static str,
        /// Size of the stack, with its unit.
        limit: String,
    },
    /// The guest passed too many bytes to the host.
    #[error(
        "Plugin `{plugin}` passed more than {limit} to the host in `{function}`; \
         the limit is [limits] max_output."
    )]
    Answer {
        /// Name of the plugin.
        plugin: String,
        /// Function of the contract that was called.
        function: &'static str,
        /// Value of the limit, with its unit.
        limit: String,
    },
    /// The guest trapped, or the call failed in wasmtime.
    #[error("Plugin `{plugin}` failed in `{function}`: {message}.")]
    Trap {
        /// Name of the plugin.
        plugin: String,
        /// Function of the contract that was called.
        function: &'static str,
        /// Root cause.
        message: String,
        /// Last lines that the guest wrote. Operators see them, clients do not.
        output: String,
    },
    /// `configure` returned an error. The message may contain settings, so clients do not see it.
    #[error("Plugin `{plugin}` rejected its settings; the server's log has the reason.")]
    Configure {
        /// Name of the plugin.
        plugin: String,
        /// Error that the plugin returned. Operators see it, clients do not.
        message: String,
    },
    /// The guest returned a value that the contract forbids.
    #[error("Plugin `{plugin}` violated the contract in `{function}`: {message}")]
    Contract {
        /// Name of the plugin.
        plugin: String,
        /// Function of the contract that was called.
        function: &'static str,
        /// Violation, as a sentence.
        message: String,
    },
}

impl CallError {
    /// Returns the message for operators, which may contain settings and the guest's output.
    pub fn detail(&self) -> String {
        match self {
            Self::Trap { plugin, function, message, output } if !output.is_empty() => {
                format!("Plugin `{plugin}` failed in `{function}`: {message}; it wrote: {output}")
            }
            Self::Configure { plugin, message } => {
                format!("Plugin `{plugin}` rejected its settings: {message}")
            }
            error => error.to_string(),
        }
    }

    /// Returns the stable error code of the API.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Cpu { .. } | Self::DeadlineExceeded { .. } => ErrorCode::PluginTimeout,
            Self::Memory { .. }
            | Self::Table { .. }
            | Self::Handles { .. }
            | Self::Stack { .. } => ErrorCode::PluginOutOfMemory,
            Self::Answer { .. } => ErrorCode::PluginAnswerTooLarge,
            Self::Trap { .. } | Self::Configure { .. } => ErrorCode::PluginFailed,
            Self::Contract { .. } => ErrorCode::PluginContractViolation,
        }
    }
}
