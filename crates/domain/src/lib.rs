//! Values of the Batch API: identifiers, states, sizes, settings, time.
//!
//! This crate does no I/O beyond reading the system clock. Every other crate may depend on it.

#![deny(missing_docs)]
#![warn(unreachable_pub)]

pub mod clock;
pub mod endpoint;
pub mod error_code;
pub mod ids;
pub mod limits;
pub mod money;
pub mod settings;
pub mod status;
pub mod text;
pub mod units;
pub mod usage;
pub mod webhook;
pub mod window;
