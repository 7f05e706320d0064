//! `batchwright gc`: what the cleanup of a server would remove.

use batchwright_domain::units::Span;
use batchwright_store::inspect::{Horizon, garbage};
use clap::Args;

use super::terminal::outln;
use crate::clock::Clock;
use crate::config::{All, SettingsArgs};
use crate::error::Error;

/// Arguments of `batchwright gc`.
#[derive(Args)]
pub struct Gc {
    #[command(flatten)]
    settings: SettingsArgs<All>,
    /// Only say what would go; a running server removes it by itself, within the hour
    #[arg(long, required = true)]
    dry_run: bool,
    /// Also count what becomes removable within this time
    #[arg(long, value_name = "TIME", default_value = "0s")]
    within: Span,
}

impl Gc {
    /// Runs the command.
    pub async fn run(self) -> Result<(), Error> {
        let settings = self.settings.resolve()?;
        let retention = &settings.retention;
        let now = Clock::system().now().after(self.within.duration());
        let audit = retention.audit_lifetime.duration();
        let horizon = Horizon {
            now,
            batch_lifetime: retention.batch_lifetime.duration(),
            audit_before: (!audit.is_zero()).then(|| now.before(audit)),
        };
        let data = settings.storage.data.clone();
        let running = tokio::task::spawn_blocking(move || garbage(&data, &horizon));
        let found = running.await.map_err(|error| Error::Other(error.to_string()))??;
        let size = |bytes: u64| bytesize::ByteSize(bytes).display().iec().to_string();
        outln!("files          {} ({})", found.files.0, size(found.files.1));
        if found.files_in_use.0 > 0 {
            let (files, bytes) = found.files_in_use;
            outln!("files in use   {files} ({}), after the end of their batches", size(bytes));
        }
        outln!("batches        {}", found.batches);
        outln!("audit entries  {}", found.audit_entries);
        Ok(())
    }
}
