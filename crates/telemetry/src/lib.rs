//! What the server tells about itself: metrics for Prometheus ([`metrics`]), traces ([`trace`]) and
//! their export ([`otlp`]).
//!
//! Nothing here holds a prompt, an answer or a credential: labels and attributes are ids, names
//! that the operator chose, codes and numbers.
//!
//! Architecture invariant: this crate imports no other crate of the project, so any may use it.

#![deny(missing_docs)]
#![warn(unreachable_pub)]

pub mod metrics;
pub mod otlp;
pub mod trace;

pub use metrics::{
    CONTENT_TYPE, Counter, DURATION_BUCKETS, Error, Histogram, Kind, LONG_DURATION_BUCKETS, Metric,
    Metrics, NUMBER_BUCKETS, Values, number,
};
pub use otlp::{GenAi, Inference, Otlp, OtlpConfig, OtlpError};
pub use trace::{Context, Role, Span, Traces};
