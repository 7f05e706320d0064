//! Notifications of a supervisor, by the protocol of `sd_notify`.
//!
//! A supervisor sets `NOTIFY_SOCKET`; without it, nothing is sent. The server says when it is
//! ready, asks for more time while a start or a stop takes long, and reports that it lives as
//! often as `WATCHDOG_USEC` demands. Only the runtime has to run for that: a slow disk or an
//! unreachable provider is a matter of the health checks, and no restart makes it better.

use std::fmt::Display;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

/// Maximum number of notifications that wait. A supervisor that reads none gets no more.
const MAX_WAITING: usize = 16;

/// Interval between two requests for more time to start.
const EXTENSION_INTERVAL: Duration = Duration::from_secs(10);

/// Time to start that is asked for; a multiple of the interval, so that one lost request is fine.
const EXTENSION: Duration = Duration::from_secs(60);

/// Time after which a start that has not ended gets no more time.
const MAX_START: Duration = Duration::from_secs(6 * 3600);

/// Time for what a shutdown does after its grace period.
const AFTER_GRACE: Duration = Duration::from_secs(20);

/// Supervisor of this process, if there is one.
pub struct Supervisor {
    sender: Option<SyncSender<String>>,
    starting: Option<DropGuard>,
}

impl Supervisor {
    /// Asks for time to start until the server is ready, and starts to report that it lives.
    pub fn starting() -> Self {
        let is_supervised = std::env::var_os("NOTIFY_SOCKET").is_some();
        let sender = is_supervised.then(start_sender).flatten();
        let token = CancellationToken::new();
        if let Some(sender) = &sender {
            let extending = extend_start(sender.clone());
            tokio::spawn(token.clone().run_until_cancelled_owned(extending));
            if let Some(timeout) = sd_notify::watchdog_enabled() {
                tokio::spawn(report_life(sender.clone(), timeout / 3));
            }
        }
        Self { sender, starting: Some(token.drop_guard()) }
    }

    /// Says that the server serves requests.
    pub fn ready(&mut self, status: &str) {
        self.starting = None;
        self.send(&format!("READY=1\nSTATUS={status}"));
    }

    /// Says that settings are read again, which ends with `ready`.
    pub fn reloading(&self) {
        match NotifyState::monotonic_usec_now() {
            Ok(now) => self.send(&format!("RELOADING=1\n{now}")),
            Err(error) => tracing::debug!(%error, "reload not reported"),
        }
    }

    /// Says that the server stops, and asks for the time that its settings give it.
    pub fn stopping(&self, time: Duration) {
        let extension = extension(time.saturating_add(AFTER_GRACE));
        self.send(&format!("STOPPING=1\nSTATUS=draining\n{extension}"));
    }

    fn send(&self, message: &str) {
        if let Some(sender) = &self.sender {
            send(sender, message.to_owned());
        }
    }
}

/// Starts the thread that sends: a supervisor that does not read blocks it, and nothing else.
fn start_sender() -> Option<SyncSender<String>> {
    let (sender, messages) = sync_channel(MAX_WAITING);
    let thread = std::thread::Builder::new().name("supervisor".to_owned());
    match thread.spawn(move || send_all(&messages)) {
        Ok(_) => Some(sender),
        Err(error) => {
            tracing::warn!(%error, "no thread for the notifications of the supervisor");
            None
        }
    }
}

fn send_all(messages: &Receiver<String>) {
    while let Ok(message) = messages.recv() {
        // A supervisor that is gone must not stop the server.
        if let Err(error) = sd_notify::notify(&[NotifyState::Custom(&message)]) {
            not_sent(&error);
        }
    }
}

fn send(sender: &SyncSender<String>, message: String) {
    if let Err(error) = sender.try_send(message) {
        not_sent(&error);
    }
}

fn not_sent(error: &dyn Display) {
    tracing::debug!(%error, "supervisor not notified");
}

/// Asks for more time until the start is over: a migration must not be killed and begin again.
async fn extend_start(sender: SyncSender<String>) {
    let end = Instant::now() + MAX_START;
    while Instant::now() < end {
        send(&sender, extension(EXTENSION));
        tokio::time::sleep(EXTENSION_INTERVAL).await;
    }
}

/// Reports that the runtime runs.
async fn report_life(sender: SyncSender<String>, interval: Duration) {
    let mut ticks = tokio::time::interval(interval.max(Duration::from_millis(10)));
    loop {
        ticks.tick().await;
        send(&sender, "WATCHDOG=1".to_owned());
    }
}

/// Returns the notification that asks for time.
fn extension(time: Duration) -> String {
    format!("EXTEND_TIMEOUT_USEC={}", time.as_micros())
}
