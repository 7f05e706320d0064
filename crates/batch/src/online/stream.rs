//! Stream of an online request: the events of a provider, passed on as they arrive.
//!
//! An event goes to the client unchanged, unknown fields included. Three things are changed: a
//! secret that is spread over several events is redacted ([`Scrubber`]), the event with the usage
//! is left out if the client has not asked for it, and a stream that breaks ends with an error
//! event, which the SDKs raise.

use batchwright_domain::error_code::ErrorCode;
use batchwright_domain::usage::TokenUsage;
use batchwright_egress::{Events, Permit};
use batchwright_memory::Reservation;

use crate::formats::server_event::{self, Event};
use crate::online::metering::Metering;
use crate::online::scrub::Scrubber;

/// Stream of events for a client.
pub struct OnlineStream {
    events: Events,
    /// First event, which has arrived already.
    first: Option<Vec<u8>>,
    scrubber: Scrubber,
    /// Usage that the provider has reported.
    usage: Option<TokenUsage>,
    wants_usage: bool,
    /// True once the events of the provider have ended.
    is_ended: bool,
    /// Absent once the usage is counted.
    metering: Option<Metering>,
    reservation: Reservation,
    /// Place of the exchange at the provider.
    permit: Option<Permit>,
}

impl OnlineStream {
    pub(super) fn new(
        events: Events,
        first: Vec<u8>,
        (permit, reservation): (Option<Permit>, Reservation),
        metering: Metering,
        wants_usage: bool,
    ) -> Self {
        let scrubber = Scrubber::new(events.secrets().clone());
        Self {
            events,
            first: Some(first),
            scrubber,
            usage: None,
            wants_usage,
            is_ended: false,
            metering: Some(metering),
            reservation,
            permit,
        }
    }

    /// Returns the next event, or none at the end.
    pub async fn next(&mut self) -> Option<Vec<u8>> {
        loop {
            if let Some(ready) = self.scrubber.next() {
                return Some(ready);
            }
            if self.is_ended {
                // Without an event that ends it, the stream ends here.
                self.finish().await;
                return None;
            }
            let event = match self.first.take() {
                Some(event) => Ok(Some(event)),
                None => self.events.next(&mut self.reservation).await,
            };
            match event {
                Ok(Some(event)) => self.pass(event).await,
                Ok(None) => self.end(None),
                Err(error) => {
                    let message = format!("The stream of the provider broke off. {error}");
                    self.end(Some(server_event::error_event(
                        ErrorCode::ProviderError.as_str(),
                        &message,
                    )));
                }
            }
        }
    }

    /// Takes over an event of the provider.
    async fn pass(&mut self, event: Vec<u8>) {
        match server_event::parse(&event) {
            Event::Done => {
                // A client that has seen the end finds its usage counted.
                self.finish().await;
                self.scrubber.flush();
                self.scrubber.push_other(event);
            }
            Event::Data(mut data) => {
                if let Some(usage) = server_event::usage(&data) {
                    self.usage = Some(usage);
                }
                if !self.wants_usage && server_event::is_usage_alone(&data) {
                    return;
                }
                let is_last = data.get("type").and_then(serde_json::Value::as_str)
                    == Some("response.completed");
                if is_last {
                    self.finish().await;
                }
                let has_text = !server_event::texts(&mut data).is_empty();
                if let Some(metering) = self.metering.as_mut().filter(|_| has_text) {
                    metering.saw_text();
                }
                self.scrubber.push(event, data);
            }
            Event::Other => self.scrubber.push_other(event),
        }
    }

    /// Ends the stream, with a last event if one is given.
    fn end(&mut self, last: Option<Vec<u8>>) {
        self.is_ended = true;
        self.permit = None;
        self.scrubber.flush();
        if let Some(last) = last {
            self.scrubber.push_other(last);
        }
    }

    /// Counts the usage, once.
    async fn finish(&mut self) {
        if let Some(metering) = self.metering.take() {
            let usage = self.usage.unwrap_or_else(|| metering.seen());
            metering.finish(usage).await;
        }
    }
}
