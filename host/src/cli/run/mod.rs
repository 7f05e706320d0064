//! `batchwright run`: a resumable batch without a server.
//!
//! **Problem.** A batch takes hours and its responses cost money. A run can be interrupted at any
//! step: Ctrl-C, a closed terminal, a crash, an outage of the provider. The same command must then
//! continue without sending finished requests again, and it must never damage a file that it did
//! not write.
//!
//! **State.** A run keeps a state folder, `OUTPUT.batchwright`, with the layout of a server's data
//! folder and the record `run.json`. The database commits each result, so a continued run sends
//! only the requests that have no committed result. The record holds the digest of the input and
//! the endpoint; a run with other input or another endpoint is refused. `run.json` is written
//! before the batch is created, so that a folder with a batch always has a record. The plugin cache
//! and the plugin serials are in the user's cache folder, because they must survive the state
//! folder.
//!
//! **Results.** The results go to drafts and are renamed to their paths at the end. The digest of
//! each draft is recorded before the rename. A continued run may therefore replace a file that an
//! earlier attempt placed, and recognizes any other file at the same path. Existing files are
//! overwritten only with `--force`. A pipe or device is written directly.
//!
//! **End.** After the last rename the exit status is recorded, then the state folder is removed,
//! `run.json` last. A crash between these steps is harmless: the next run finds the recorded
//! status, removes the folder and returns that status. `--partial` cancels an unfinished batch and
//! writes the results that it has.
//!
//! **Waiting.** A run has no completion window in which to wait for an unavailable provider. It
//! stops after `max_outage` (10 minutes by default) with status 6 and keeps its state. A signal
//! (SIGINT, SIGTERM or SIGHUP) lets requests in flight finish and stops the run with status 130; a
//! second signal ends the process at once.

pub mod create;
mod results;
mod state;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use batchwright_batch::{Engine, Service};
use batchwright_domain::ids::{BatchId, DEFAULT_TENANT};
use batchwright_domain::settings::Section;
use batchwright_domain::settings::Value;
use batchwright_domain::units::Span;
use batchwright_plugin::check_directory;
use batchwright_store::{BatchRecord, Paged, umask};
use batchwright_tenancy::TenantDefaults;
use clap::Args;

use crate::assemble::Options;
use crate::cli::failures::Failures;
use crate::cli::place::{Target, check};
use crate::cli::progress::Progress;
use crate::cli::run::create::{COMPLETION_WINDOW, create_or_resume};
use crate::cli::run::results::{content, place_results, report};
use crate::cli::run::state::{RunPaths, RunState, remove};
use crate::cli::terminal::errln;
use crate::cli::{ProcessSignals, user_cache, warn_unknown_variables};
use crate::clock::Clock;
use crate::config::{All, ConfigError, Settings, SettingsArgs};
use crate::error::Error;
use crate::{assemble, telemetry};

/// Interval between two updates of the progress display.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Default of `max_outage` for a run.
const DEFAULT_MAX_OUTAGE: Duration = Duration::from_secs(600);

/// Exit status of a run whose provider is unavailable.
const PROVIDER_UNAVAILABLE_STATUS: u8 = 6;

/// Default log filter of a run.
///
/// The registry is off because the command prints the errors of plugins itself.
const LOG_FILTER: &str =
    "info,batchwright_batch=warn,batchwright_plugin=warn,batchwright_plugin::registry=off";

/// Arguments of `batchwright run`.
#[derive(Args)]
pub struct Run {
    /// Input file, one request as a JSON object per line
    input: PathBuf,
    /// Output file, for the results of successful requests
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Error file, for the results of failed requests
    /// [default: OUTPUT with `.errors.jsonl` in place of `.jsonl`]
    #[arg(short, long, value_name = "FILE")]
    errors: Option<PathBuf>,
    /// Endpoint of the batch [default: that of the first line]
    #[arg(long)]
    endpoint: Option<String>,
    /// Overwrite existing output and error files
    #[arg(long)]
    force: bool,
    /// End an unfinished run: write its results so far, and the other requests as `batch_cancelled`
    #[arg(long)]
    partial: bool,
    #[command(flatten)]
    settings: SettingsArgs<All>,
}

/// Hides the flag of a setting that has no meaning without clients and tenants.
pub fn hide_setting_of_servers(arg: clap::Arg) -> clap::Arg {
    let is_of_servers = arg.get_id().as_str().starts_with("tls_")
        || TenantDefaults::SETTINGS.iter().any(|setting| arg.get_id() == setting.name);
    if is_of_servers { arg.hide(true) } else { arg }
}

impl Run {
    /// Runs or continues the batch; returns success only if every request succeeded.
    pub async fn run(self) -> Result<ExitCode, Error> {
        let [own_cache, own_outage, own_filter] =
            ["cache", "max_outage", "log_filter"].map(|name| self.settings.has(name));
        let mut settings = self.settings.resolve()?;
        // The default filter is quieter than that of a server: `open` prints plugin errors.
        let filter = if own_filter {
            settings.server.log_filter.clone()
        } else {
            setting("log_filter", LOG_FILTER)?
        };
        telemetry::start(&filter, settings.server.log_format);
        warn_unknown_variables();
        umask();
        // `watch` applies `max_outage` and stops the run; in the batch it would fail requests.
        let max_outage = settings.execution.max_outage.duration();
        let max_outage =
            if own_outage || !max_outage.is_zero() { max_outage } else { DEFAULT_MAX_OUTAGE };
        settings.execution.max_outage = Span::seconds(0);
        settings.tenant_defaults = TenantDefaults::default();
        let paths = RunPaths::resolve(&self.input, &self.output, self.errors)?;
        let mut before = RunState::read(&paths.state)?;
        if let Some(status) = before.as_ref().and_then(|saved| saved.finished) {
            // The earlier run stopped between the last rename and the removal of its folder.
            let same = before
                .as_ref()
                .is_some_and(|saved| saved.check(&paths, self.endpoint.as_deref()).is_ok());
            remove(&paths.state)?;
            if !self.force && same {
                errln!("this run had finished; its results are in place");
                return Ok(ExitCode::from(status));
            }
            before = None;
        }
        let may_replace = |target: &Target| {
            before.iter().flat_map(|saved| &saved.placed).any(|written| target.matches(written))
        };
        check(&[&paths.output, &paths.errors], self.force, may_replace)?;
        settings.storage.data.clone_from(&paths.state);
        settings.batch.completion_windows = setting("completion_windows", COMPLETION_WINDOW)?;
        if !own_cache {
            settings.plugins.cache = Some(user_cache());
        }
        check_directory(&settings.plugins.directory())?;
        let had_state = paths.state.exists();
        if self.partial && !had_state {
            return Err(Error::Usage(format!(
                "there is no unfinished run: {} does not exist",
                paths.state.display()
            )));
        }
        let engine = open(settings).await?;
        let service = engine.service();
        let created = create_or_resume(&engine, &paths, before, self.endpoint, self.partial).await;
        let (id, mut saved) = match created {
            Ok(created) => created,
            Err(error) => {
                // A folder that this run created and that has no batch is not an unfinished run.
                let is_empty = unfinished_batch(service).await.is_ok_and(|found| found.is_none());
                if is_empty && !had_state {
                    std::fs::remove_dir_all(&paths.state).ok();
                }
                return Err(error);
            }
        };
        if self.partial {
            service.cancel(&DEFAULT_TENANT.into(), &id).await?;
        }
        engine.start();
        let ended = watch(&engine, &id, max_outage).await?;
        engine.close().await;
        let (mut batch, status) = match ended {
            RunEnd::Ended(batch) => (*batch, None),
            RunEnd::Stopped => (get_batch(service, &id).await?, Some(130)),
            RunEnd::ProviderUnavailable(cause) => {
                errln!("the provider has not answered for {max_outage:?}: {cause}");
                (get_batch(service, &id).await?, Some(PROVIDER_UNAVAILABLE_STATUS))
            }
        };
        if let Some(status) = status {
            let done = batch.counts.completed.saturating_add(batch.counts.failed);
            errln!(
                "stopped: {done} of {} done and kept; the same command continues",
                batch.counts.total
            );
            return Ok(ExitCode::from(status));
        }
        batch.errors = service.errors(&DEFAULT_TENANT.into(), &id).await?;
        place_results(service, &batch, &paths, &mut saved, self.force).await?;
        let failed = match &batch.error_file_id {
            Some(file) => Failures::read(content(service, file).await?).await?,
            None => Failures::default(),
        };
        // All result files are in place: the run is finished.
        let status = report(&batch, &failed, &paths.output, &paths.errors);
        saved.finished = Some(status);
        saved.write(&paths.state)?;
        remove(&paths.state)?;
        Ok(ExitCode::from(status))
    }
}

/// Parses a value of a setting that a run fixes.
fn setting<T: Value>(name: &'static str, text: &str) -> Result<T, ConfigError> {
    T::parse(text).map_err(|message| ConfigError::Value { setting: name, message })
}

/// Opens the state folder and the plugins; prints a warning for each plugin that is not loaded.
async fn open(settings: Settings) -> Result<Arc<Engine>, Error> {
    // The state folder is removed at the end; serials must survive it.
    let cache = user_cache();
    let serials = std::fs::create_dir_all(&cache).ok().map(|()| cache.join("serials"));
    let options = Options { clock: Clock::system(), serials, order: None, compiler: None };
    let engine = assemble::engine(&settings, options).await?;
    let registry = &engine.parts().registry;
    for error in registry.current().entries.iter().filter_map(|entry| entry.error.as_ref()) {
        errln!("warning: plugin not loaded: {error}");
    }
    Ok(engine)
}

/// Returns the batch in the state folder of an earlier run.
pub(crate) async fn unfinished_batch(service: &Service) -> Result<Option<BatchRecord>, Error> {
    Ok(match service.list(&DEFAULT_TENANT.into(), None, 1, usize::MAX).await? {
        Paged::Page(page) => page.items.into_iter().next(),
        Paged::UnknownAfter => None,
    })
}

/// Returns the batch of this run; fails if it is no longer in the state folder.
async fn get_batch(service: &Service, id: &BatchId) -> Result<BatchRecord, Error> {
    let found = service.get(&DEFAULT_TENANT.into(), id).await?;
    found.ok_or_else(|| {
        Error::Other("the state folder holds no batch; delete the folder to start again".into())
    })
}

/// Reason why a run ended.
enum RunEnd {
    /// The batch has a final status.
    Ended(Box<BatchRecord>),
    /// A signal asked the run to stop.
    Stopped,
    /// The provider was unavailable for `max_outage`; the cause.
    ProviderUnavailable(String),
}

/// Shows progress until the batch ends, a signal arrives, or `max_outage` is exceeded.
async fn watch(engine: &Engine, id: &BatchId, max_outage: Duration) -> Result<RunEnd, Error> {
    let service = engine.service();
    let mut progress = Progress::new();
    let mut signals = ProcessSignals::listen()?;
    loop {
        let batch = get_batch(service, id).await?;
        let counts = batch.counts;
        let done = counts.completed.saturating_add(counts.failed);
        let now = engine.parts().clock.now();
        let waiting = service.waits_for(&DEFAULT_TENANT.into(), &batch);
        let message = waiting.as_ref().map(|waiting| {
            Progress::waiting_message(&waiting.cause, now.until(waiting.next).as_secs())
        });
        progress.show(
            &batch.status.as_str().replace('_', " "),
            done,
            counts.failed,
            counts.total,
            message.as_deref(),
        );
        if batch.status.is_final() {
            progress.finish();
            return Ok(RunEnd::Ended(Box::new(batch)));
        }
        let outages = service.outages();
        let longest = outages.iter().map(|(_, outage)| outage).min_by_key(|outage| outage.since);
        if let Some(outage) =
            longest.filter(|outage| !max_outage.is_zero() && outage.since.until(now) >= max_outage)
        {
            progress.finish();
            return Ok(RunEnd::ProviderUnavailable(outage.trouble.detail.clone()));
        }
        tokio::select! {
            () = tokio::time::sleep(POLL_INTERVAL) => {}
            _ = signals.next() => {
                progress.finish();
                errln!(
                    "stopping after the requests in flight; press Ctrl-C again to stop at once"
                );
                tokio::spawn(async move {
                    signals.next().await;
                    std::process::exit(130);
                });
                return Ok(RunEnd::Stopped);
            }
        }
    }
}
