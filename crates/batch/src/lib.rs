//! Batch lifecycle: create, validate, execute, finalize, cancel, expire and recover; and the files
//! that batches read and write.
//!
//! **Parts.** An [`Engine`] has five parts that share no lock:
//!
//! - [`Service`] answers clients: it creates, lists and cancels batches, and stores and returns
//!   files. It works on no batch.
//! - The worker claims batches and processes each one to its end.
//! - [`Online`] answers single requests while their clients wait.
//! - The janitor removes data that nothing refers to any more.
//! - [`Health`] probes the store and the plugins.
//!
//! **Rooms.** `formats` parses and writes lines, `schedule` decides what runs when, `rules` judges
//! lines, `request` makes one attempt at one request, and `worker` and `online` use them. A room
//! imports only rooms before it.
//!
//! Architecture invariant: this crate contains no HTTP routes, no SQL and no WebAssembly. Durable
//! state goes through `store`, calls to providers go through `plugin`, and the time comes from
//! `clock`.

#![deny(missing_docs)]
#![warn(unreachable_pub)]

mod config;
mod credentials;
mod engine;
mod formats;
mod health;
mod janitor;
mod metrics;
mod objects;
mod observer;
mod online;
mod parts;
mod policy;
mod progress;
mod request;
mod rules;
mod schedule;
mod service;
mod spans;
mod worker;

pub use config::{BatchConfig, Config, ExecutionConfig, OnlineConfig, RetentionConfig};
pub use credentials::{CredentialError, ProjectCredentials};
pub use engine::Engine;
pub use health::{Health, Readiness};
pub use metrics::METRICS;
pub use observer::OBSERVED_METRICS;
pub use online::{Answered, Online, OnlineAnswer, OnlineError, OnlineRequest, OnlineStream};
pub use parts::Parts;
pub use progress::{ListenError, ProgressHub, ProgressListener};
pub use schedule::breaker::Outage;
pub use schedule::breakers::BreakerKey;
pub use service::create::{CreateError, NewBatchRequest};
pub use service::files::{NewFile, Upload, UploadError};
pub use service::{BatchPlugins, Service};
