//! Stream of an online request: the events of a provider, passed on as they arrive.
//!
//! An event goes to the client unchanged, unknown fields included. Three things are changed: a
//! secret that is spread over several events is redacted ([`Scrubber`]), the event with the usage
//! is left out if the client has not asked for it, and a stream that breaks ends with an error
//! event, which the SDKs raise.

use batchwright_domain::error_code::ErrorCode;
use batchwright_egress::{Events, LimitFeedback, Permit, Refusals};
use batchwright_memory::Reservation;
use tokio_util::sync::CancellationToken;

use crate::formats::server_event::{self, Event, texts};
use crate::online::count::RequestCount;
use crate::online::metering::Metering;
use crate::online::scrub::Scrubber;

/// Stream of events for a client.
pub struct OnlineStream {
    events: Events,
    /// First event, which has arrived already.
    first: Option<Vec<u8>>,
    scrubber: Scrubber,
    wants_usage: bool,
    /// True once the provider has sent an error.
    has_failed: bool,
    /// True once the events of the provider have ended.
    is_ended: bool,
    /// Absent once the usage is counted.
    metering: Option<Metering>,
    /// Absent until the client gets the stream, and once the request is counted.
    count: Option<RequestCount>,
    reservation: Reservation,
    /// Place of the exchange at the provider.
    permit: Option<Permit>,
    /// Cancelled when the server ends.
    ended: CancellationToken,
}

impl OnlineStream {
    pub(super) fn new(
        events: Events,
        first: Vec<u8>,
        (permit, reservation, ended): (Option<Permit>, Reservation, CancellationToken),
        metering: Metering,
        wants_usage: bool,
    ) -> Self {
        let scrubber = Scrubber::new(events.secrets().clone());
        Self {
            events,
            first: Some(first),
            scrubber,
            wants_usage,
            has_failed: false,
            is_ended: false,
            metering: Some(metering),
            count: None,
            reservation,
            permit,
            ended,
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
                None => {
                    let next = self.events.next(&mut self.reservation);
                    match self.ended.run_until_cancelled(next).await {
                        Some(event) => event,
                        None => {
                            let code = ErrorCode::ServerNotReady.as_str();
                            let message = "The server is shutting down.";
                            self.finish().await;
                            self.end(Some(server_event::error_event(code, message)));
                            continue;
                        }
                    }
                }
            };
            match event {
                Ok(Some(event)) => self.pass(event).await,
                Ok(None) => {
                    if let Some(permit) = &mut self.permit {
                        permit.finish(LimitFeedback::Accepted, &mut Refusals::default());
                    }
                    self.finish().await;
                    self.end(None);
                }
                Err(error) => {
                    self.finish().await;
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
                self.count_end();
                self.scrubber.flush();
                self.scrubber.push_other(event);
            }
            Event::Data(mut data) => {
                if let Some((metering, usage)) = self.metering.as_mut().zip(data.usage) {
                    metering.report(usage);
                }
                self.has_failed |= data.is_error;
                if !self.wants_usage && data.is_usage_alone {
                    return;
                }
                if data.is_last {
                    self.finish().await;
                    self.count_end();
                }
                // A large event is passed on as it is.
                let texts = data.values.as_mut().map_or(1, |values| texts(values).len());
                if let Some(metering) = self.metering.as_mut().filter(|_| texts > 0) {
                    metering.saw_text();
                }
                self.scrubber.push(event, data.values, texts);
            }
            Event::Other => self.scrubber.push_other(event),
        }
    }

    /// Takes over the count of the request.
    pub(super) fn count(&mut self, count: RequestCount) {
        self.count = Some(count);
    }

    /// Ends the stream, with a last event if one is given.
    fn end(&mut self, last: Option<Vec<u8>>) {
        // Only an error adds an event.
        self.has_failed |= last.is_some();
        self.count_end();
        self.is_ended = true;
        self.permit = None;
        self.scrubber.flush();
        if let Some(last) = last {
            self.scrubber.push_other(last);
        }
    }

    /// Counts the request, once.
    fn count_end(&mut self) {
        if let Some(count) = self.count.take() {
            count.ended(!self.has_failed);
        }
    }

    /// Counts the usage, once.
    async fn finish(&mut self) {
        let Some(metering) = self.metering.take() else { return };
        if self.has_failed && !metering.has_answer() {
            // No model has answered.
            metering.release();
        } else {
            let usage = metering.usage();
            metering.finish(usage).await;
        }
    }
}
