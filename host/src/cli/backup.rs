//! `batchwright backup` and `batchwright restore`: copies of a data folder.

use std::path::PathBuf;

use batchwright_store::backup::{self, BackupReport};
use batchwright_store::umask;
use clap::Args;

use super::terminal::{errln, outln};
use crate::clock::Clock;
use crate::config::{DataFolder, SettingsArgs};
use crate::error::Error;

/// Arguments of `batchwright backup`.
///
/// The server of the data folder may be running.
#[derive(Args)]
pub struct Backup {
    /// Folder of the backup; a later backup into the same folder copies what is new
    folder: PathBuf,
    #[command(flatten)]
    settings: SettingsArgs<DataFolder>,
    /// Fail if the folder has a backup already
    #[arg(long)]
    new: bool,
    /// Only compare the backup with its manifest
    #[arg(long, conflicts_with = "new")]
    verify: bool,
}

/// Arguments of `batchwright restore`.
///
/// The data folder must not have a database.
#[derive(Args)]
pub struct Restore {
    /// Folder of the backup
    folder: PathBuf,
    #[command(flatten)]
    settings: SettingsArgs<DataFolder>,
}

impl Backup {
    /// Runs the command.
    pub async fn run(self) -> Result<(), Error> {
        umask();
        let folder = self.folder.clone();
        let data = self.settings.resolve()?.storage.data;
        let now = Clock::system().now().as_seconds();
        let (is_check, must_be_new) = (self.verify, self.new);
        let running = tokio::task::spawn_blocking(move || match is_check {
            true => backup::verify(&folder),
            false => backup::backup(&data, &folder, must_be_new, now, env!("CARGO_PKG_VERSION")),
        });
        let report = ended(running).await?;
        let shown = self.folder.display();
        if self.verify {
            outln!("{shown} is complete: {}", contents(&report));
            warn_missing(&report);
            return Ok(());
        }
        let size = bytesize::ByteSize(report.copied_bytes).display().iec();
        outln!("backed up to {shown}: {}; {} copied, {size}", contents(&report), report.copied);
        if report.is_unknown {
            errln!(
                "warning: the time could not be written into the data folder, so the metric of the \
                 server stays at the backup before, and its alert may fire"
            );
        }
        warn_missing(&report);
        Ok(())
    }
}

impl Restore {
    /// Runs the command.
    pub async fn run(self) -> Result<(), Error> {
        umask();
        let folder = self.folder;
        let data = self.settings.resolve()?.storage.data;
        let shown = data.display().to_string();
        let running = tokio::task::spawn_blocking(move || backup::restore(&folder, &data));
        let report = ended(running).await?;
        outln!("restored to {shown}: {}", contents(&report));
        warn_missing(&report);
        Ok(())
    }
}

async fn ended(
    running: tokio::task::JoinHandle<batchwright_store::Result<BackupReport>>,
) -> Result<BackupReport, Error> {
    let ended = running.await.map_err(|error| Error::Other(error.to_string()))?;
    Ok(ended?)
}

fn contents(report: &BackupReport) -> String {
    let size = bytesize::ByteSize(report.database_bytes).display().iec();
    format!("database {size}, {} objects", report.objects)
}

/// Warns of files whose content the backup does not have.
fn warn_missing(report: &BackupReport) {
    if report.missing > 0 {
        errln!(
            "warning: {} files have no content: they were deleted during the backup, or are lost; \
             another backup counts those that are lost",
            report.missing
        );
    }
}
