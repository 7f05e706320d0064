//! `batchwright serve`

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{EndSignal, EndSignals, Error, SettingsArgs, VERSION, loading, warn_of_environment};
use crate::batch::Batches;
use crate::cli::terminal::put;
use crate::clock::Clock;
use crate::config::Settings;
use crate::memory::Memory;
use crate::plugin::watch::watch;
use crate::plugin::{Loader, Registry, check_directory};
use crate::store::{Blobs, SqliteStore, umask};
use crate::{api, telemetry};
use rustix::process::{Resource, getrlimit, setrlimit};

/// What answers that are being read have at least, once everything else has ended.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

#[derive(Args)]
pub struct Serve {
    #[command(flatten)]
    settings: SettingsArgs,
}

impl Serve {
    pub async fn run(self) -> Result<ExitCode, Error> {
        let settings = self.settings.resolve()?;
        telemetry::start(&settings.log_level, settings.log_format).map_err(Error::Other)?;
        warn_of_environment();
        // From here on a signal ends nothing by itself.
        let mut signals = EndSignals::listen()?;
        raise_file_limit();
        umask();
        let clock = Clock::system();
        check_directory(&settings.plugins)?;
        let store = SqliteStore::open(&settings.data)?;
        let blobs = Blobs::local(&settings.data.join("objects"))?;
        let memory =
            Memory::new(settings.memory_budget.in_memory(), settings.instance_memory.in_memory());
        let loader = Loader::new(loading(&settings, &memory)?, clock.clone())?;
        let registry = Registry::open(&settings.plugins, loader).await?;
        let _watcher = watch(&registry);
        let (listener, address) = bind(settings.listen, "--listen").await?;
        let admin = match settings.admin_listen.0 {
            Some(address) => Some(bind(address, "--admin-listen").await?),
            None => None,
        };
        if !address.ip().is_loopback() {
            tracing::warn!(
                %address,
                "there are no keys yet: whoever reaches this address reads and deletes everything; listen on loopback, or let only trusted clients through"
            );
        }
        let settings = Arc::new(settings);
        let batches =
            Batches::new(Arc::new(store), blobs, registry, clock, (*settings).clone(), memory);
        batches.start();
        let app = api::router(batches.clone(), &settings, address);
        println_now(&format!("listening on http://{address}"));
        let ending = CancellationToken::new();
        let tasks = TaskTracker::new();
        if let Some((listener, address)) = admin {
            println_now(&format!("health on http://{address}"));
            let (router, settings, ended) = (
                api::admin_router(batches.clone(), &settings, address),
                settings.clone(),
                ending.clone(),
            );
            tasks.spawn(async move {
                api::serve_admin(listener, router, &settings, ended.cancelled()).await
            });
        }
        let (of_api, ended) = (settings.clone(), ending.clone());
        tasks.spawn(async move { api::serve(listener, app, &of_api, ended.cancelled()).await });
        // Tells the log at once if the server is not ready.
        let first_look = batches.clone();
        tokio::spawn(async move { first_look.readiness().await });
        announce(&settings, &batches, address);
        let signal = loop {
            match signals.next().await {
                EndSignal::Hangup => {
                    tracing::info!(
                        "SIGHUP: plugins, their secrets and the trusted keys are read again"
                    );
                    batches.registry().request_read();
                }
                signal => break signal,
            }
        };
        let again = async { while signals.next().await == EndSignal::Hangup {} };
        tokio::select! {
            () = shut_down(&settings, &batches, signal, &ending, &tasks) => tracing::info!("stopped"),
            () = again => tracing::warn!("stopped at once; what was in flight is sent again at the next start"),
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Says in one line what runs here.
fn announce(settings: &Settings, batches: &Batches, address: SocketAddr) {
    let plugins = batches.registry().current();
    let names = plugins
        .entries
        .iter()
        .filter(|entry| entry.serving.is_some())
        .map(|entry| entry.name.as_str());
    tracing::info!(
        version = VERSION,
        %address,
        data = %settings.data.display(),
        plugins = %settings.plugins.display(),
        loaded = names.collect::<Vec<_>>().join(","),
        max_file_size = %settings.max_file_size,
        max_requests_per_file = settings.max_requests_per_file,
        max_concurrent_batches = settings.max_concurrent_batches.get(),
        memory_budget = %settings.memory_budget,
        instance_memory = %settings.instance_memory,
        "server started"
    );
}

/// Ends in order: not ready, but working on for `shutdown_delay`, so that a load balancer turns away; then what is in flight is finished
/// within `shutdown_grace`, while clients are still answered; then the listeners close.
async fn shut_down(
    settings: &Settings,
    batches: &Batches,
    signal: EndSignal,
    ending: &CancellationToken,
    tasks: &TaskTracker,
) {
    let (delay, grace) = (settings.shutdown_delay.duration(), settings.shutdown_grace.duration());
    batches.drain();
    if signal == EndSignal::Terminate && !delay.is_zero() {
        tracing::info!("not ready any more; shutting down in {delay:?}");
        tokio::time::sleep(delay).await;
    }
    tracing::info!(
        "shutting down; requests in flight have {grace:?}, a second signal ends the process at once"
    );
    let begun = Instant::now();
    batches.close().await;
    ending.cancel();
    tasks.close();
    // Clients that hold a connection open are not waited for.
    let left = grace.saturating_sub(begun.elapsed()).max(LAST_ANSWERS);
    tokio::time::timeout(left, tasks.wait()).await.ok();
    batches.close_store().await;
}

async fn bind(listen: SocketAddr, flag: &str) -> Result<(TcpListener, SocketAddr), Error> {
    let failed = |error: std::io::Error| {
        Error::Other(format!(
            "failed to listen on {listen}: {error}; choose another address with {flag} (port 0 picks a free one)"
        ))
    };
    let listener = TcpListener::bind(listen).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    Ok((listener, address))
}

/// Every connection is a file, and many systems let a process have few unless it asks for more.
fn raise_file_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).ok();
}

/// Prints a line that whoever started the server may read through a pipe.
fn println_now(line: &str) {
    put!("{line}");
}
