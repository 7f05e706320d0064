//! Plugin directory: which plugins serve now.
//!
//! `watch` detects changes, `registry` loads them without losing a serving plugin, `snapshot` is
//! the
//! immutable result that requests are routed by, and `order` survives a restart.

pub(crate) mod metrics;
pub(crate) mod order;
pub(crate) mod registry;
pub(crate) mod snapshot;
pub mod watch;
