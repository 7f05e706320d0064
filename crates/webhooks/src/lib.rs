//! Webhooks: endpoints of projects, signed events, and their delivery.
//!
//! **Problem.** A client that waits for a batch polls. With a webhook, the server tells it, once
//! and for sure, and neither a slow endpoint nor a hostile one may harm others.
//!
//! **Never lost.** The transaction that ends a batch also inserts the deliveries (see
//! [`batchwright_store::webhooks`]). A delivery is attempted until the endpoint answers with a 2xx
//! or until `webhook_retry_time` is over, also across restarts. An attempt whose outcome was not
//! recorded is repeated, with the same id, by which a receiver finds duplicates.
//!
//! **Signed.** Each attempt is signed as Standard Webhooks says ([`sign`]), so that
//! `client.webhooks.unwrap()` of the official SDKs accepts it.
//!
//! **Threats.** The URL comes from a tenant: it points into the operator's network, or resolves to
//! it, or redirects there. [`batchwright_egress::Outbound`] checks the address that is dialed, and
//! follows no redirect. A slow endpoint occupies one attempt at a time, and a tenant a few, so that
//! others are not delayed. An answer is read for a few bytes only.

#![deny(missing_docs)]
#![warn(unreachable_pub)]

mod config;
mod delivery;
mod metrics;
mod service;
pub mod sign;

pub use config::WebhookConfig;
pub use delivery::Deliverer;
pub use metrics::METRICS;
pub use service::{NewEndpoint, Secret, Tested, WebhookError, WebhookService};
