//! `batchwright serve`

use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::{EndSignals, Error, SettingsArgs, loading};
use crate::batch::Batches;
use crate::clock::Clock;
use crate::plugin::{Loader, Registry, check_directory};
use crate::store::{Blobs, SqliteStore};
use crate::{api, telemetry};
use rustix::process::{Resource, getrlimit, setrlimit};

#[derive(Args)]
pub struct Serve {
    #[command(flatten)]
    settings: SettingsArgs,
}

impl Serve {
    pub async fn run(self) -> Result<ExitCode, Error> {
        let settings = self.settings.resolve()?;
        raise_file_limit();
        telemetry::start(&settings.log_level, settings.log_format).map_err(Error::Other)?;
        let clock = Clock::system();
        check_directory(&settings.plugins)?;
        let store = SqliteStore::open(&settings.data)?;
        let blobs = Blobs::local(&settings.data.join("objects"))?;
        let registry = Registry::open(&settings.plugins, Loader::new(loading(&settings)?, clock.clone())?).await?;
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
        let batches = Batches::new(Arc::new(store), blobs, registry, clock, settings.clone());
        batches.start();
        let app = api::router(batches.clone(), &settings);
        let mut signals = EndSignals::listen()?;
        println_now(&format!("listening on http://{address}"));
        let ending = CancellationToken::new();
        let ended = ending.clone();
        let serving = tokio::spawn(async move { api::serve(listener, app, &settings, ended.cancelled()).await });
        signals.next().await;
        tracing::info!("shutting down; requests in flight have {grace:?}, a second signal ends the process at once");
        ending.cancel();
        let orderly = async {
            // Clients that hold a connection open are not waited for.
            tokio::join!(batches.close(), async { tokio::time::timeout(grace, serving).await.ok() });
        };
        tokio::select! {
            () = orderly => tracing::info!("stopped"),
            () = signals.next() => tracing::warn!("stopped at once; what was in flight is sent again at the next start"),
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Every connection is a file, and many systems let a process have few unless it asks for more.
fn raise_file_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).ok();
}

/// Whoever started us may read this through a pipe.
#[expect(clippy::print_stdout, reason = "the address is the command's output")]
fn println_now(line: &str) {
    use std::io::Write;
    println!("{line}");
    std::io::stdout().flush().ok();
}
