//! Plugins: WebAssembly components that judge lines and talk to providers, found in a directory, compiled, pooled, held to limits and called.
//!
//! Architecture invariant: this room knows no HTTP routes and no storage. Everything above it sees plugins through the types of
//! [`types`], whatever version of the contract a component was built for, and only after they were checked.

mod answer;
mod bindings;
mod cache;
pub mod compile;
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
#[expect(clippy::module_inception, reason = "a plugin is what the room is about")]
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
pub use error::{CallError, LoadError};
pub use files::{ComponentFile, Files, MOST_COMPONENT, signature_file};
pub use load::{Inspected, Loader, Loading, OPTIONAL_MODEL, plugin_name};
pub use manifest::read_secret;
pub use plugin::{BEGINNING, Plugin};
pub use read::{hex, sha256};
pub use registry::{Registry, check_directory};
pub use schema::add_defaults;
pub use snapshot::{Entry, EntryState, Route, Snapshot};
