//! Reload of a running server: by SIGHUP, and by `POST /reload` of the admin listener.
//!
//! What can change takes effect: the log filter, plugins with their secrets and the trusted keys,
//! and the certificate. Other settings that differ from those in use are named: they need a
//! restart. A config file with an error changes nothing, and the error is the answer.

use std::sync::{Arc, Mutex, PoisonError};

use batchwright_api::Tls;
use batchwright_batch::Engine;
use batchwright_domain::settings::Given;
use batchwright_tenancy::Prices;

use crate::config::{All, Settings, SettingsArgs};
use crate::error::Error;
use crate::telemetry::{LogControl, LogFilter};

/// What a reload has done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reloaded {
    /// Settings whose new values are in use.
    pub applied: Vec<&'static str>,
    /// Settings whose new values need a restart.
    pub needs_restart: Vec<&'static str>,
}

/// Reloads a server.
pub struct Reloader {
    args: SettingsArgs<All>,
    engine: Arc<Engine>,
    tls: Option<Arc<Tls>>,
    log: LogControl,
    prices: Prices,
    /// What was given when the server started, and what was applied since.
    in_use: Mutex<Given>,
}

impl Reloader {
    /// Creates a reloader of a server that was started with these arguments.
    pub fn new(
        args: SettingsArgs<All>,
        (settings, given): (&Settings, Given),
        engine: Arc<Engine>,
        tls: Option<Arc<Tls>>,
        log: LogControl,
    ) -> Self {
        let prices = settings.prices.clone();
        Self { args, engine, tls, log, prices, in_use: Mutex::new(given) }
    }

    /// Reads the settings again and applies what can change.
    pub fn reload(&self) -> Result<Reloaded, Error> {
        // Two reloads at once: the one that reads the file last applies it last.
        let mut in_use = self.in_use.lock().unwrap_or_else(PoisonError::into_inner);
        let (settings, given) = self.args.clone().explain();
        let settings = settings?;
        let mut reloaded = Reloaded::default();
        for setting in Settings::all() {
            let text = |given: &Given| {
                given.text_of(setting.name).map_or(setting.default, |(text, _)| text).to_owned()
            };
            if text(&given) == text(&in_use) {
                continue;
            }
            if setting.name == "log_filter" {
                self.set_filter(&settings.server.log_filter)?;
                in_use.replace(setting.name, text(&given));
                reloaded.applied.push(setting.name);
            } else {
                reloaded.needs_restart.push(setting.name);
            }
        }
        if settings.prices != self.prices {
            reloaded.needs_restart.push("prices");
        }
        drop(in_use);
        self.engine.parts().registry.request_read();
        if let Some(tls) = &self.tls {
            tls.request_read();
        }
        tracing::info!(
            applied = reloaded.applied.join(","),
            needs_restart = reloaded.needs_restart.join(","),
            "settings reloaded; plugins, secrets, trusted keys and the certificate are read again"
        );
        Ok(reloaded)
    }

    /// Returns the log filter that is in use.
    pub fn filter(&self) -> LogFilter {
        self.log.current()
    }

    /// Changes the log filter until the next change or restart.
    pub fn set_filter(&self, filter: &LogFilter) -> Result<(), Error> {
        let before = self.log.current();
        self.log.set(filter).map_err(|error| Error::Other(format!("log filter: {error}")))?;
        tracing::info!(%before, now = %filter, "log filter changed");
        Ok(())
    }
}
