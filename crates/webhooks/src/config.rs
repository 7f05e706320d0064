//! Settings of webhooks.

use batchwright_domain::settings;
use batchwright_domain::settings::{Positive, Value};
use batchwright_domain::units::Span;

settings! {
    /// Settings of webhooks.
    pub struct WebhookConfig in "webhooks" {
        /// Hosts of webhook endpoints, as `host` or `host:port` and separated by commas, that plain
        /// HTTP and private addresses are allowed for; others are reached by HTTPS at public
        /// addresses
        webhook_allow_http: Hosts = "" (shown "none"), "LIST";
        /// Maximum number of webhook endpoints of a project
        webhook_max_endpoints: u64 = "20", "N";
        /// Timeout of one attempt to deliver an event
        webhook_timeout: Positive<Span> = "20s", "TIME";
        /// Time for which the delivery of an event is attempted; an endpoint that has failed for as
        /// long is disabled
        webhook_retry_time: Positive<Span> = "72h", "TIME";
        /// Time for which ended deliveries are listed
        webhook_delivery_lifetime: Positive<Span> = "30d", "TIME";
    }
}

/// List of hosts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hosts(pub Vec<String>);

impl Value for Hosts {
    fn parse(text: &str) -> Result<Self, String> {
        let hosts = Vec::<String>::parse(text)?;
        batchwright_egress::Outbound::new(&hosts).map_err(|error| error.to_string())?;
        Ok(Self(hosts))
    }
}
