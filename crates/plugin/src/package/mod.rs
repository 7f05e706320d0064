//! Package of a plugin: what an operator puts into the plugin directory.
//!
//! A TOML file (`manifest`) names a component and its settings (`schema`), credentials and limits,
//! and what it serves (`routing`). `files` reads each file once, `signature` and `trust` decide
//! whether the package is loaded, and `serials` remembers which signed packages are too old.

pub(crate) mod credentials;
pub(crate) mod files;
pub(crate) mod limits;
pub(crate) mod manifest;
pub(crate) mod read;
pub(crate) mod routing;
pub(crate) mod schema;
pub(crate) mod secrets_folder;
pub(crate) mod serials;
pub mod signature;
pub(crate) mod state_file;
pub(crate) mod trust;
