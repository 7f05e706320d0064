//! Contract between the host and plugins: types, versions, checks of what guests return.
//!
//! Only this module knows the versions of the WIT package. `bindings` has a module for each version
//! and converts it to `types`; `world` links and instantiates components of any version; `answer`
//! checks values of guests before they leave the crate.

pub(crate) mod answer;
mod bindings;
pub(crate) mod guest_log;
pub mod types;
pub(crate) mod world;
