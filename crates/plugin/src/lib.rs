//! Plugins: WebAssembly components that validate lines and talk to providers.
//!
//! The host finds plugins in a directory, compiles, pools and calls them, and holds them to limits.
//!
//! Architecture invariant: this module knows no HTTP routes and no storage. Code above it sees
//! plugins only through the types of [`types`], whatever version of the contract a component was
//! built for. Values of guests are checked before they leave this module.

#![deny(missing_docs)]
#![warn(unreachable_pub)]

pub mod compile;
mod config;
pub mod conformance;
mod contract;
mod directory;
mod error;
mod load;
mod package;
mod plugin;
mod reference;
mod sandbox;

pub use config::{PluginsConfig, RequiredPlugins};
pub use contract::types;
pub use directory::metrics::METRICS;
pub use directory::registry::{Registry, check_directory};
pub use directory::snapshot::{Entry, EntryState, Route, Snapshot};
pub use directory::watch;
pub use error::{CallError, LoadError};
pub use load::inspect::Inspected;
pub use load::{Loader, LoaderConfig, plugin_name};
pub use package::credentials::ProjectSecrets;
pub use package::files::{
    ComponentFile, ComponentFolders, Files, MAX_COMPONENT_BYTES, signature_file,
};
pub use package::manifest::read_secret;
pub use package::read::sha256;
pub use package::routing::Routing;
pub use package::schema::add_defaults;
pub use package::signature;
pub use plugin::{CLASSIFY_BODY_BYTES, Plugin};
pub use sandbox::metrics::METRICS as SANDBOX_METRICS;

/// Keys of the files that people write for a plugin, with their types, defaults and meanings.
pub mod file_keys {
    pub use crate::conformance::case_file::{
        batch_keys, case_keys, exchange_keys, request_keys, response_keys, validator_case_keys,
    };
    pub use crate::package::limits::limit_keys;
    pub use crate::package::manifest::{credential_keys, manifest_keys};
    pub use crate::reference::Key;
}
