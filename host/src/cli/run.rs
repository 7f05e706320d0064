//! `batchwright run`: one batch without a server.
//!
//! Its state is a data folder like a server's, beside the output. It goes when both files of results are in place; until then the same
//! command continues where the last one stopped. It records which files this run has placed, as these alone may be replaced by its own
//! continuation. A run has no completion window.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use clap::Args;
use futures_util::{Stream, stream};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::failures::Failures;
use super::place::{Target, check};
use super::progress::Progress;
use super::run_state::{Note, Places, remove};
use super::{EndSignals, Error, SettingsArgs, loading, user_cache, warn_of_environment};
use crate::batch::{Batches, ENDPOINTS, NewFile, Request};
use crate::cli::terminal::{one_line, say};
use crate::clock::Clock;
use crate::config::{CompletionWindows, Settings, Span};
use crate::memory::Memory;
use crate::plugin::{Loader, Loading, Registry, check_directory, hex};
use crate::store::{BatchRecord, Blobs, PIECE, Paged, SqliteStore, Status, umask};
use crate::telemetry;

const TENANT: &str = "default";
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// How long a provider may be away, unless it is said.
const MAX_OUTAGE: Duration = Duration::from_secs(600);

/// The exit status of a run whose provider is away.
const AWAY: u8 = 6;

/// What a run logs, unless it is said. That a plugin was not loaded it says itself.
const RUN_LOG_LEVEL: &str =
    "info,batchwright::batch=warn,batchwright::plugin=warn,batchwright::plugin::registry=off";

/// The completion window of a run: none that anybody will see the end of.
const WINDOW: &str = "99years";

#[derive(Args)]
pub struct Run {
    /// Requests, one JSON object a line
    input: PathBuf,
    /// Where the answers go
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Where the requests go that failed [default: OUTPUT with `.errors.jsonl` in place of `.jsonl`]
    #[arg(short, long, value_name = "FILE")]
    errors: Option<PathBuf>,
    /// Endpoint of the batch [default: that of the first line]
    #[arg(long)]
    endpoint: Option<String>,
    /// Overwrite files of earlier runs
    #[arg(long)]
    force: bool,
    /// End an unfinished run: write the answers it has, and the rest as `batch_cancelled`
    #[arg(long)]
    partial: bool,
    #[command(flatten)]
    settings: SettingsArgs,
}

impl Run {
    pub async fn run(self) -> Result<ExitCode, Error> {
        let own_cache = self.settings.given.cache.is_some();
        let own_outage = self.settings.given.max_outage.is_some();
        let own_level = self.settings.given.log_level.is_some();
        let mut settings = self.settings.resolve()?;
        // What is wrong with plugins is told as a warning of our own.
        let level = if own_level { settings.log_level.as_str() } else { RUN_LOG_LEVEL };
        telemetry::start(level, settings.log_format).map_err(Error::Other)?;
        warn_of_environment();
        umask();
        // A run has no window in which to wait: it ends, and can be continued.
        let max_outage = settings.max_outage.duration();
        let max_outage = if own_outage || !max_outage.is_zero() { max_outage } else { MAX_OUTAGE };
        settings.max_outage = Span::seconds(0);
        let places = Places::find(&self.input, &self.output, self.errors)?;
        let mut before = Note::read(&places.state)?;
        if let Some(status) = before.as_ref().and_then(|note| note.finished) {
            // It ended in the moment after its files were placed.
            let same = before
                .as_ref()
                .is_some_and(|note| note.check(&places, self.endpoint.as_deref()).is_ok());
            remove(&places.state)?;
            if !self.force && same {
                say!("this run had finished; its results are in place");
                return Ok(ExitCode::from(status));
            }
            before = None;
        }
        let ours = |target: &Target| {
            before.iter().flat_map(|note| &note.placed).any(|written| target.holds(written))
        };
        check(&[&places.output, &places.errors], self.force, ours)?;
        settings.data.clone_from(&places.state);
        settings.completion_windows = CompletionWindows::of(WINDOW)?;
        if !own_cache {
            settings.cache = user_cache();
        }
        check_directory(&settings.plugins)?;
        let had_state = places.state.exists();
        if self.partial && !had_state {
            return Err(Error::Usage(format!(
                "there is no unfinished run: {} is not there",
                places.state.display()
            )));
        }
        let batches = open(settings).await?;
        let begun = begin(&batches, &places, before, self.endpoint, self.partial).await;
        let (id, mut note) = match begun {
            Ok(begun) => begun,
            Err(error) => {
                // What holds no batch is no unfinished run.
                if unfinished_batch(&batches).await.is_ok_and(|found| found.is_none()) {
                    std::fs::remove_dir_all(&places.state).ok();
                }
                return Err(error);
            }
        };
        if self.partial {
            batches.cancel(TENANT, &id).await?;
        }
        batches.start();
        let ended = watch(&batches, &id, max_outage).await?;
        batches.close().await;
        let (mut batch, status) = match ended {
            Watched::Ended(batch) => (*batch, None),
            Watched::Stopped => (find(&batches, &id).await?, Some(130)),
            Watched::Away(why) => {
                say!("the provider has not answered for {max_outage:?}: {why}");
                (find(&batches, &id).await?, Some(AWAY))
            }
        };
        if let Some(status) = status {
            let done = batch.counts.completed.saturating_add(batch.counts.failed);
            say!(
                "stopped: {done} of {} done and kept; the same command continues",
                batch.counts.total
            );
            return Ok(ExitCode::from(status));
        }
        batch.errors = batches.errors(TENANT, &id).await?;
        place(&batches, &batch, &places, &mut note, self.force).await?;
        let failed = match &batch.error_file_id {
            Some(file) => Failures::read(content(&batches, file).await?).await?,
            None => Failures::default(),
        };
        // Only now is everything where it belongs.
        let status = report(&batch, &failed, &places.output, &places.errors);
        note.finished = Some(status);
        note.write(&places.state)?;
        remove(&places.state)?;
        Ok(ExitCode::from(status))
    }
}

/// The `url` of the first line that has one.
fn first_url(input: &Path) -> std::io::Result<Option<String>> {
    #[derive(Deserialize)]
    struct Url {
        url: String,
    }
    // A look at the beginning is enough; a file that has none there fails validation.
    let beginning = BufReader::new(std::fs::File::open(input)?.take(16 << 20));
    for line in beginning.split(b'\n') {
        let line = line?;
        let line = line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&line);
        if let Ok(Url { url }) = serde_json::from_slice(line) {
            return Ok(Some(url));
        }
    }
    Ok(None)
}

/// The endpoint that the first line of a file with a `url` asks for.
pub fn of_first_line(input: &Path) -> Result<Option<String>, Error> {
    let failed = |error: std::io::Error| {
        Error::Other(format!("failed to read {}: {error}", input.display()))
    };
    let Some(url) = first_url(input).map_err(failed)? else { return Ok(None) };
    let long = format!("/v1{url}");
    if ENDPOINTS.iter().any(|endpoint| **endpoint == url || **endpoint == long) {
        return Ok(Some(url));
    }
    let (input, endpoints) = (input.display(), ENDPOINTS.join(", "));
    Err(Error::Other(format!(
        "{input}: the first `url` in it is '{url}', which is no endpoint of a batch ({endpoints}); correct it, or give --endpoint"
    )))
}

async fn open(settings: Settings) -> Result<Arc<Batches>, Error> {
    let clock = Clock::system();
    let store = SqliteStore::open(&settings.data)?;
    let blobs = Blobs::local(&settings.data.join("objects"))?;
    let memory =
        Memory::new(settings.memory_budget.in_memory(), settings.instance_memory.in_memory());
    // The folder of a run goes with its end; what older signed files must not replace is remembered for the user.
    let kept = user_cache();
    let serials = std::fs::create_dir_all(&kept).ok().map(|()| kept.join("serials"));
    let loading = Loading { serials, order: None, ..loading(&settings, &memory)? };
    let loader = Loader::new(loading, clock.clone())?;
    let registry = Registry::open(&settings.plugins, loader).await?;
    for error in registry.current().entries.iter().filter_map(|entry| entry.error.as_ref()) {
        say!("warning: a plugin does not load: {error}");
    }
    Ok(Batches::new(Arc::new(store), blobs, registry, clock, settings, memory))
}

/// Begins the batch, or finds the one that was begun before. Returns its id.
async fn begin(
    batches: &Arc<Batches>,
    places: &Places,
    before: Option<Note>,
    endpoint: Option<String>,
    partial: bool,
) -> Result<(String, Note), Error> {
    if let (Some(batch), Some(note)) = (unfinished_batch(batches).await?, before) {
        if !partial {
            note.check(places, endpoint.as_deref())?;
            say!("continuing an unfinished run");
        }
        return Ok((batch.new.id, note));
    }
    if partial {
        let message = format!("{} holds no unfinished run", places.state.display());
        return Err(Error::Usage(message));
    }
    batches
        .registry()
        .current()
        .check_required(&batches.settings().required_plugins, TENANT, &ENDPOINTS)
        .map_err(Error::Required)?;
    let failed = |error: std::io::Error| {
        Error::Other(format!("failed to read {}: {error}", places.input.display()))
    };
    let endpoint = match endpoint {
        Some(endpoint) => endpoint,
        None => of_first_line(&places.input)?.unwrap_or_else(|| "/v1/chat/completions".into()),
    };
    let told = |error: &dyn std::fmt::Display| {
        Error::Other(format!("{}: {error}", places.input.display()))
    };
    let mut file = std::fs::File::open(&places.input).map_err(failed)?;
    let mut upload = batches.upload(TENANT).await?;
    let (mut buffer, mut digest, mut size) = (vec![0; 1 << 20], Sha256::new(), 0_u64);
    loop {
        let read = file.read(&mut buffer).map_err(failed)?;
        let Some(bytes) = buffer.get(..read).filter(|bytes| !bytes.is_empty()) else { break };
        digest.update(bytes);
        size = size.saturating_add(read as u64);
        upload.write(Bytes::copy_from_slice(bytes)).await.map_err(|error| told(&error))?;
    }
    let filename = places
        .input
        .file_name()
        .map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let new = NewFile { filename, purpose: "batch".into(), lifetime: None };
    let file = upload.finish(new).await.map_err(|error| told(&error))?;
    let note = Note {
        input: places.input.clone(),
        bytes: size,
        sha256: hex(&digest.finalize()),
        endpoint: endpoint.clone(),
        placed: Vec::new(),
        finished: None,
    };
    // The note first: whatever happens after it, the next run knows what this folder is for.
    note.write(&places.state)?;
    let request = Request {
        input_file_id: file.id,
        endpoint,
        completion_window: WINDOW.into(),
        metadata: None,
        output_lifetime: None,
        idempotency_key: None,
    };
    let batch =
        batches.create(TENANT, request).await.map_err(|error| Error::Other(error.to_string()))?;
    Ok((batch.new.id, note))
}

/// Puts the results in their places, those of a former attempt included. A file without a line is not written.
async fn place(
    batches: &Arc<Batches>,
    batch: &BatchRecord,
    places: &Places,
    note: &mut Note,
    force: bool,
) -> Result<(), Error> {
    for (target, id) in
        [(&places.output, &batch.output_file_id), (&places.errors, &batch.error_file_id)]
    {
        let Some(id) = id else { continue };
        if target.path().is_none() {
            target.write_through(content(batches, id).await?).await?;
            continue;
        }
        if note.placed.iter().any(|written| target.holds(written)) {
            continue;
        }
        let draft = target.draft(Some(&places.state), content(batches, id).await?).await?;
        let overwrite = force || note.placed.iter().any(|written| target.holds(written));
        note.placed.retain(|written| written.path != draft.digested.path);
        note.placed.push(draft.digested.clone());
        note.write(&places.state)?;
        target.place(draft, overwrite)?;
    }
    Ok(())
}

/// The content of a file of results, piece by piece.
async fn content(
    batches: &Arc<Batches>,
    id: &str,
) -> Result<impl Stream<Item = Result<Bytes, Error>>, Error> {
    let (batches, id) = (batches.clone(), id.to_owned());
    let size = batches.content_size(TENANT, &id).await?;
    Ok(stream::try_unfold(0, move |at: u64| {
        let (batches, id) = (batches.clone(), id.clone());
        async move {
            if at >= size {
                return Ok(None);
            }
            let next = at.saturating_add(PIECE).min(size);
            Ok(Some((batches.content(TENANT, &id, at..next).await?, next)))
        }
    }))
}

/// The batch of a folder that a former run left.
async fn unfinished_batch(batches: &Batches) -> Result<Option<BatchRecord>, Error> {
    Ok(match batches.list(TENANT, None, 1, usize::MAX).await? {
        Paged::Page(page) => page.items.into_iter().next(),
        Paged::UnknownAfter => None,
    })
}

async fn find(batches: &Batches, id: &str) -> Result<BatchRecord, Error> {
    let found = batches.get(TENANT, id).await?;
    found.ok_or_else(|| {
        Error::Other("the unfinished run is not in its folder any more; delete the folder".into())
    })
}

/// How a run came to its end.
enum Watched {
    Ended(Box<BatchRecord>),
    /// Somebody wants it to stop.
    Stopped,
    /// The provider has not answered for too long; what it said last.
    Away(String),
}

/// Shows progress until the batch has ended, or for as long as its provider is not away for too long.
async fn watch(batches: &Batches, id: &str, max_outage: Duration) -> Result<Watched, Error> {
    let mut progress = Progress::new();
    let mut signals = EndSignals::listen()?;
    loop {
        let batch = find(batches, id).await?;
        let counts = batch.counts;
        let done = counts.completed.saturating_add(counts.failed);
        let now = batches.clock().now();
        let waits = batches.waits(TENANT, &batch);
        let words = waits
            .as_ref()
            .map(|waits| Progress::waiting(&waits.cause, now.until(waits.next).as_secs()));
        progress.show(
            &batch.status.as_str().replace('_', " "),
            done,
            counts.failed,
            counts.total,
            words.as_deref(),
        );
        if batch.status.is_final() {
            progress.end();
            return Ok(Watched::Ended(Box::new(batch)));
        }
        let outages = batches.outages();
        let longest = outages.iter().map(|(_, outage)| outage).min_by_key(|outage| outage.since);
        if let Some(outage) =
            longest.filter(|outage| !max_outage.is_zero() && outage.since.until(now) >= max_outage)
        {
            progress.end();
            return Ok(Watched::Away(outage.trouble.detail.clone()));
        }
        tokio::select! {
            () = tokio::time::sleep(POLL_INTERVAL) => {}
            _ = signals.next() => {
                progress.end();
                say!("stopping: requests in flight are finished first, a second Ctrl-C leaves them");
                tokio::spawn(async move {
                    signals.next().await;
                    std::process::exit(130);
                });
                return Ok(Watched::Stopped);
            }
        }
    }
}

fn report(batch: &BatchRecord, failures: &Failures, output: &Target, errors: &Target) -> u8 {
    let mut rejected = Failures::default();
    batch.errors.iter().for_each(|error| rejected.add(error.code.clone()));
    let by_code = rejected.in_words();
    for error in &batch.errors {
        let place = error.line.map(|line| format!("line {line}: ")).unwrap_or_default();
        let param = error.param.as_ref().map(|param| format!(" ({param})")).unwrap_or_default();
        say!("{place}{}{param}: {}", error.code, one_line(&error.message));
    }
    let counts = batch.counts;
    match batch.status {
        Status::Failed if counts.total == 0 => {
            say!("rejected ({by_code}): nothing was executed; correct the input and run again")
        }
        status => {
            let (completed, failed) = (counts.completed, counts.failed);
            say!("{}: {completed} of {} answered, {failed} failed", status.as_str(), counts.total);
            let by_code = failures.in_words();
            if !by_code.is_empty() {
                say!("failed: {by_code}");
            }
            for (what, id, target) in [
                ("answers", &batch.output_file_id, output),
                ("errors", &batch.error_file_id, errors),
            ] {
                let place = target.given.display();
                if id.is_some() {
                    say!("{what}: {place}");
                } else if target.exists() {
                    say!("{what}: none; {place} is of an earlier run and stays as it is");
                }
            }
        }
    }
    let every_line = batch.status == Status::Completed && counts.failed == 0;
    u8::from(!every_line)
}
