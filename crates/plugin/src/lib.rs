//! Plugins: WebAssembly components that validate lines and talk to providers.
//!
//! The host finds plugins in a directory, compiles, pools and calls them, and holds them to limits.
//!
//! Architecture invariant: this module knows no HTTP routes and no storage. Code above it sees
//! plugins only through the types of [`types`], whatever version of the contract a component was
//! built for. Values of guests are checked before they leave this module.

#![deny(missing_docs)]
#![warn(unreachable_pub)]

mod answer;
mod bindings;
mod cache;
pub mod compile;
mod config;
pub mod conformance;
mod credentials;
mod engine;
mod error;
mod files;
mod instance;
mod instances;
mod kept;
mod load;
mod log;
mod manifest;
mod order;
mod plugin;
mod read;
mod registry;
#[cfg(target_os = "linux")]
mod sandbox;
mod schema;
mod serials;
pub mod signature;
mod snapshot;
mod trust;
pub mod types;
mod wasi;
pub mod watch;

pub use answer::for_people;
pub use config::{PluginsConfig, RequiredPlugins};
pub use error::{CallError, LoadError};
pub use files::{ComponentFile, Files, MOST_COMPONENT, signature_file};
pub use load::{Inspected, Loader, Loading, OPTIONAL_MODEL, plugin_name};
pub use manifest::read_secret;
pub use plugin::{BEGINNING, Plugin};
pub use read::{hex, sha256};
pub use registry::{Registry, check_directory};
pub use schema::add_defaults;
pub use snapshot::{Entry, EntryState, Route, Snapshot};
