//! `batchwright serve`

use std::process::ExitCode;
use std::sync::Arc;

use axum::serve::ListenerExt;
use clap::Args;
use tokio::net::TcpListener;

use super::{EndSignals, Error, SettingsArgs};
use crate::batch::Batches;
use crate::clock::Clock;
use crate::plugin::{Loader, Registry, check_directory};
use crate::store::{Blobs, SqliteStore};
use crate::{api, telemetry};

#[derive(Args)]
pub struct Serve {
    #[command(flatten)]
    settings: SettingsArgs,
}

impl Serve {
    pub async fn run(self) -> Result<ExitCode, Error> {
        let settings = self.settings.resolve()?;
        telemetry::start(&settings.log_level, settings.log_format).map_err(Error::Other)?;
        let clock = Clock::system();
        check_directory(&settings.plugins)?;
        let store = SqliteStore::open(&settings.data)?;
        let blobs = Blobs::local(&settings.data.join("objects"))?;
        let registry = Registry::open(&settings.plugins, Loader::new(&settings.cache, clock.clone())?).await?;
        let _watcher = registry.watch().inspect_err(|error| tracing::warn!("{error}")).ok();
        let listen = settings.listen;
        let listener = TcpListener::bind(listen).await.map_err(|error| {
            Error::Other(format!(
                "failed to listen on {listen}: {error}; choose another address with --listen (port 0 picks a free one)"
            ))
        })?;
        let address =
            listener.local_addr().map_err(|error| Error::Other(format!("failed to listen on {listen}: {error}")))?;
        let grace = settings.shutdown_grace.duration();
        let batches = Batches::new(Arc::new(store), blobs, registry, clock, settings);
        batches.start();
        let app = api::router(batches.clone());
        let mut signals = EndSignals::listen()?;
        println_now(&format!("listening on http://{address}"));
        let listener = listener.tap_io(|stream| {
            stream.set_nodelay(true).ok();
        });
        let ending = tokio::sync::watch::Sender::new(false);
        let mut ended = ending.subscribe();
        let server = axum::serve(listener, app).with_graceful_shutdown(async move {
            ended.wait_for(|ended| *ended).await.ok();
        });
        let serving = tokio::spawn(async move { server.await });
        signals.next().await;
        tracing::info!("shutting down; requests in flight have {grace:?}, a second signal ends the process at once");
        ending.send_replace(true);
        let orderly = async {
            batches.close().await;
            // Clients that hold a connection open are not waited for.
            tokio::time::timeout(grace, serving).await.ok();
        };
        tokio::select! {
            () = orderly => tracing::info!("stopped"),
            () = signals.next() => tracing::warn!("stopped at once; what was in flight is sent again at the next start"),
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Whoever started us may read this through a pipe.
#[expect(clippy::print_stdout, reason = "the address is the command's output")]
fn println_now(line: &str) {
    use std::io::Write;
    println!("{line}");
    std::io::stdout().flush().ok();
}
