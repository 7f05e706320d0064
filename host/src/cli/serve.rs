//! `batchwright serve`: runs the server until a signal stops it.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use batchwright_api as api;
use batchwright_api::Authenticator;
use batchwright_batch::Engine;
use batchwright_plugin::watch::watch;
use batchwright_store::umask;
use batchwright_telemetry::Otlp;
use clap::Args;
use futures_util::FutureExt;
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{ProcessSignal, ProcessSignals, VERSION, warn_unknown_variables};
use crate::assemble::Options;
use crate::cli::terminal::outln;
use crate::config::{All, ConfigError, Settings, SettingsArgs};
use crate::error::Error;
use crate::reload::{Reloaded, Reloader};
use crate::supervisor::Supervisor;
use crate::telemetry::LogFilter;
use crate::{assemble, telemetry};

/// Minimum time for clients to receive responses in flight, after all other work has ended.
const FINAL_RESPONSE_GRACE: Duration = Duration::from_secs(1);

/// Arguments of `batchwright serve`.
#[derive(Args)]
pub struct Serve {
    #[command(flatten)]
    settings: SettingsArgs<All>,
    /// Serve without keys on an address that other machines can reach
    #[arg(long)]
    insecure: bool,
}

impl Serve {
    /// Runs the server until shutdown.
    pub async fn run(self) -> Result<ExitCode, Error> {
        // From here on, a signal no longer ends the process automatically. The first process of a
        // container that has no handler does not even notice SIGTERM.
        let mut signals = ProcessSignals::listen()?;
        let (settings, given) = self.settings.clone().explain();
        let settings = settings?;
        let log = telemetry::start(&settings.server.log_filter, settings.server.log_format);
        warn_unknown_variables();
        let mut supervisor = Supervisor::starting();
        raise_file_limit();
        umask();
        let settings = Arc::new(settings);
        let mut must_reload = false;
        let prepared = tokio::select! {
            biased;
            () = terminated(&mut signals, &mut must_reload) => {
                return Ok(stopped_while_starting(&supervisor));
            }
            prepared = Prepared::new(&settings, self.insecure) => prepared?,
        };
        let Prepared { engine, authenticator, tls, otlp, listener, admin } = prepared;
        let (listener, address) = listener;
        let _watcher = watch(&engine.parts().registry);
        let metrics = assemble::http_metrics(&engine)?;
        let reloader = Arc::new(Reloader::new(
            self.settings,
            (&settings, given),
            engine.clone(),
            tls.clone(),
            log,
        ));
        if let Some(tls) = &tls {
            tls.register_metrics(&metrics)
                .map_err(|error| Error::Other(format!("metrics: {error}")))?;
        }
        let (webhooks, deliverer) = assemble::webhooks(&settings, &engine)?;
        if terminated(&mut signals, &mut must_reload).now_or_never().is_some() {
            return Ok(stopped_while_starting(&supervisor));
        }
        // Nothing that can fail follows: requests are sent from here on.
        engine.start();
        let served = (&*engine, &webhooks);
        let app = api::router(served, &authenticator, (&settings.api, address), &metrics);
        let scheme = if tls.is_some() { "https" } else { "http" };
        outln!("listening on {scheme}://{address}");
        let shutdown = CancellationToken::new();
        let tasks = TaskTracker::new();
        if let Some((listener, address)) = admin {
            outln!("health and metrics on http://{address}");
            if !address.ip().is_loopback() {
                tracing::warn!(
                    %address,
                    "admin listener without keys: restrict the address to operators"
                );
            }
            let router = {
                let process = Arc::new(OperatedProcess(reloader.clone()));
                api::admin_router(served, (&settings.api, address), &metrics, process)
            };
            let (settings, metrics) = (settings.clone(), metrics.clone());
            let token = shutdown.clone();
            tasks.spawn(async move {
                let stopped = token.cancelled();
                api::serve_admin(listener, router, &settings.api, &metrics, stopped).await
            });
        }
        tasks.spawn(authenticator.run(shutdown.clone()));
        tasks.spawn(deliverer.run(shutdown.clone()));
        if let Some(tls) = &tls {
            tasks.spawn(tls.clone().watch(shutdown.clone()));
        }
        let (api_settings, token) = (settings.clone(), shutdown.clone());
        tasks.spawn(async move {
            api::serve(listener, app, &api_settings.api, tls, &metrics, token.cancelled()).await
        });
        // The first readiness probe logs at once if the server is not ready.
        let health = engine.health().clone();
        tokio::spawn(async move { health.readiness().await });
        log_start(&settings, &engine, address);
        let serving = format!("serving on {scheme}://{address}");
        supervisor.ready(&serving);
        let signal = loop {
            // What came during the start is done now.
            let signal = match std::mem::take(&mut must_reload) {
                true => ProcessSignal::Hangup,
                false => signals.next().await,
            };
            match signal {
                ProcessSignal::Hangup => {
                    tracing::info!(signal = "SIGHUP", "reloading");
                    supervisor.reloading();
                    if let Err(error) = reloader.reload() {
                        tracing::error!(
                            %error,
                            "settings not reloaded, nothing changed; the next SIGHUP tries again"
                        );
                        supervisor.ready(&format!("{serving}; the last reload failed"));
                    } else {
                        supervisor.ready(&serving);
                    }
                }
                signal => break signal,
            }
        };
        supervisor.stopping(stop_time(&settings));
        let stopping = async {
            shut_down(&settings, &engine, signal, &shutdown, &tasks).await;
            if let Some(otlp) = otlp {
                otlp.end().await;
            }
        };
        tokio::select! {
            () = stopping => {
                tracing::info!("server stopped");
            }
            () = terminated(&mut signals, &mut must_reload) => {
                tracing::warn!("server stopped at once, next start sends requests in flight again");
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Server that has everything that it needs, and does nothing yet.
struct Prepared {
    engine: Arc<Engine>,
    authenticator: Arc<Authenticator>,
    tls: Option<Arc<api::Tls>>,
    otlp: Option<Otlp>,
    listener: (TcpListener, SocketAddr),
    admin: Option<(TcpListener, SocketAddr)>,
}

impl Prepared {
    async fn new(settings: &Settings, is_insecure: bool) -> Result<Self, Error> {
        let tls = assemble::tls(settings)?;
        let metrics = assemble::metrics(settings)?;
        let otlp = assemble::otlp(settings, &metrics)?;
        let options = Options::of_server(settings);
        let engine = assemble::engine_with(settings, options, metrics, otlp.as_ref()).await?;
        assemble::create_first_key(settings, &engine).await?;
        let authenticator = authenticator(&engine, settings, is_insecure).await?;
        let listener = bind(settings.server.listen, "--listen").await?;
        let admin = match settings.server.admin_listen {
            Some(address) => Some(bind(address, "--admin-listen").await?),
            None => None,
        };
        Ok(Self { engine, authenticator, tls, otlp, listener, admin })
    }
}

/// Waits for a signal that ends the process, and notes a request to reload.
async fn terminated(signals: &mut ProcessSignals, must_reload: &mut bool) {
    while signals.next().await == ProcessSignal::Hangup {
        *must_reload = true;
    }
}

/// Ends a process that has sent no request yet.
fn stopped_while_starting(supervisor: &Supervisor) -> ExitCode {
    supervisor.stopping(Duration::ZERO);
    tracing::info!("server stopped before it had started");
    ExitCode::SUCCESS
}

/// Process of the server, for its admin listener.
struct OperatedProcess(Arc<Reloader>);

impl api::Process for OperatedProcess {
    fn reload(&self) -> Result<api::ReloadOutcome, String> {
        let reloaded = self.0.reload().map_err(|error| error.to_string())?;
        let Reloaded { applied, needs_restart } = reloaded;
        Ok(api::ReloadOutcome { applied, needs_restart })
    }

    fn log_filter(&self) -> String {
        self.0.filter().to_string()
    }

    fn set_log_filter(&self, filter: &str) -> Result<(), String> {
        let filter: LogFilter = filter.parse()?;
        self.0.set_filter(&filter).map_err(|error| error.to_string())
    }
}

/// Creates the authenticator; fails if every client of another machine would have access.
async fn authenticator(
    engine: &Engine,
    settings: &Settings,
    insecure: bool,
) -> Result<Arc<Authenticator>, Error> {
    let parts = engine.parts();
    let authenticator = Authenticator::load(parts.store.clone(), parts.clock.clone()).await?;
    let address = settings.server.listen;
    if address.ip().is_loopback() {
        return Ok(authenticator);
    }
    if authenticator.has_no_keys() && !insecure {
        let message = format!(
            "there are no keys, and every client that reaches {address} could read and delete all \
             data; create a key with `batchwright admin key create --data {} --name NAME`, set \
             first_admin_key, listen on 127.0.0.1, or give --insecure",
            settings.storage.data.display()
        );
        return Err(ConfigError::Value { setting: "listen", message }.into());
    }
    if authenticator.has_no_keys() {
        tracing::warn!(
            %address,
            "no keys: every client that reaches this address can read and delete all data"
        );
    } else if settings.api.tls_certificate.is_none() {
        tracing::warn!(%address, "no TLS: keys can be read on the network, unless a proxy has TLS");
    }
    Ok(authenticator)
}

/// Logs the version, the addresses, the folders and the main limits in one line.
fn log_start(settings: &Settings, engine: &Engine, address: SocketAddr) {
    let plugins = engine.parts().registry.current();
    let names = plugins
        .entries
        .iter()
        .filter(|entry| entry.serving.is_some())
        .map(|entry| entry.name.as_str());
    tracing::info!(
        version = VERSION,
        %address,
        data = %settings.storage.data.display(),
        plugins = %settings.plugins.directory().display(),
        loaded = names.collect::<Vec<_>>().join(","),
        max_file_size = %*settings.batch.max_file_size,
        max_requests_per_file = *settings.batch.max_requests_per_file,
        max_concurrent_batches = settings.execution.max_concurrent_batches.get(),
        memory_budget = %settings.memory.memory_budget.size(),
        instance_memory = %*settings.memory.instance_memory,
        "server started"
    );
}

/// Returns the time that a shutdown takes at most, beside that of the store.
fn stop_time(settings: &Settings) -> Duration {
    let delay = settings.server.shutdown_delay.duration();
    let grace = settings.execution.shutdown_grace.duration();
    delay.saturating_add(grace).saturating_add(FINAL_RESPONSE_GRACE)
}

/// Shuts down in three steps.
///
/// 1. For `shutdown_delay` after SIGTERM the server works as before but reports that it is not
///    ready, so that load balancers stop sending requests to it.
/// 2. For `shutdown_grace` the requests in flight finish, while clients still get responses.
/// 3. The listeners close, and the store closes last.
async fn shut_down(
    settings: &Settings,
    engine: &Engine,
    signal: ProcessSignal,
    shutdown: &CancellationToken,
    tasks: &TaskTracker,
) {
    let delay = settings.server.shutdown_delay.duration();
    let grace = settings.execution.shutdown_grace.duration();
    engine.drain();
    if signal == ProcessSignal::Terminate && !delay.is_zero() {
        tracing::info!(?delay, "not ready, shutdown delayed");
        tokio::time::sleep(delay).await;
    }
    tracing::info!(?grace, "shutting down, a second signal stops the server at once");
    let started = Instant::now();
    engine.close().await;
    shutdown.cancel();
    tasks.close();
    // The timeout bounds the wait for clients that hold a connection open.
    let left = grace.saturating_sub(started.elapsed()).max(FINAL_RESPONSE_GRACE);
    tokio::time::timeout(left, tasks.wait()).await.ok();
    engine.close_store().await;
}

/// Binds a listener; the error names the flag. Returns the address with the port in use.
async fn bind(listen: SocketAddr, flag: &str) -> Result<(TcpListener, SocketAddr), Error> {
    let failed = |error: std::io::Error| {
        Error::Other(format!(
            "failed to listen on {listen}: {error}; \
             choose another address with {flag} (port 0 picks a free port)"
        ))
    };
    let listener = TcpListener::bind(listen).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    Ok((listener, address))
}

/// Raises the limit of open files to its maximum.
///
/// Each connection is an open file, and the initial limit of many systems is low.
fn raise_file_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).ok();
}
