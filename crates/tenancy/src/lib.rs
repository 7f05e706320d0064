//! Decisions about tenants: which key belongs to whom, and what its holder may do.
//!
//! **Threat.** A client guesses or changes a key, goes on with a key that was revoked or has
//! expired, or uses a key for what its scopes do not allow.
//!
//! **Keys.** A key has 256 random bits, so nobody can guess it and a plain SHA-256 digest protects
//! it: a slow password hash would add nothing.
//! The digest covers the complete text of the key, so a changed letter makes another key.
//! The text of a key exists once, in the response to its creation.
//!
//! Architecture invariant: this crate does no I/O but for random bits of the operating system. Its
//! callers read records and report the outcome.

#![deny(missing_docs)]
#![warn(unreachable_pub)]

pub mod key;
pub mod limits;
pub mod prices;
pub mod principal;
pub mod project;
pub mod quota;
pub mod scope;
pub mod sealing;

pub use key::{IssuedKey, KeyDigest, PresentedKey};
pub use limits::{TenantDefaults, WhenOverLimit};
pub use prices::{ModelPrice, Prices};
pub use principal::{Denied, KeyFacts, Principal, ProjectPrincipal, authenticate};
pub use scope::{METRICS_SCOPE, Scope, Scopes};
pub use sealing::{SealingError, SealingKey};
