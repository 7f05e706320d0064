//! `batchwright run`: one batch without a server.
//!
//! Its state is a data folder like a server's, beside the output. It goes when the batch has ended; until then the same command
//! continues where the last one stopped.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use bytes::Bytes;
use clap::Args;
use futures_util::TryStreamExt;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::progress::Progress;
use super::{EndSignals, Error, SettingsArgs, loading, user_cache};
use crate::batch::{Batches, NewFile, Request};
use crate::clock::Clock;
use crate::config::Settings;
use crate::plugin::{Loader, Registry, check_directory};
use crate::store::{BatchRecord, Blobs, Paged, SqliteStore, Status};
use crate::telemetry;

const TENANT: &str = "default";
const LOOK: Duration = Duration::from_millis(100);

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
    #[command(flatten)]
    settings: SettingsArgs,
}

/// What an unfinished run was of.
#[derive(Debug, Deserialize, PartialEq, Serialize)]
struct Unfinished {
    input: PathBuf,
    bytes: u64,
    modified: u128,
    endpoint: String,
}

impl Run {
    pub async fn run(self) -> Result<ExitCode, Error> {
        let own_cache = self.settings.given.cache.is_some();
        let own_level = self.settings.given.log_level.is_some();
        let mut settings = self.settings.resolve()?;
        let state = PathBuf::from(format!("{}.batchwright", self.output.display()));
        settings.data.clone_from(&state);
        if !own_cache {
            settings.cache = user_cache();
        }
        // What is wrong with plugins is told as a warning of our own.
        let level = if own_level { settings.log_level.as_str() } else { "warn,batchwright::plugin=off" };
        telemetry::start(level, settings.log_format).map_err(Error::Other)?;
        let errors = self.errors.unwrap_or_else(|| errors_beside(&self.output));
        let unfinished = describe(&self.input, self.endpoint)?;
        check_directory(&settings.plugins)?;
        let batches = open(settings).await?;
        let id = match begin(&batches, &state, &self.input, unfinished).await {
            Ok(id) => id,
            Err(error) => {
                // What holds no batch is no unfinished run.
                if unfinished_batch(&batches).await.is_ok_and(|found| found.is_none()) {
                    std::fs::remove_dir_all(&state).ok();
                }
                return Err(error);
            }
        };
        batches.start();
        let ended = watch(&batches, &id).await?;
        batches.close().await;
        let Some(batch) = ended else {
            let batch = find(&batches, &id).await?;
            let done = batch.counts.completed.saturating_add(batch.counts.failed);
            eprintln!("stopped: {done} of {} done and kept; the same command continues", batch.counts.total);
            return Ok(ExitCode::from(130));
        };
        copy(&batches, batch.output_file_id.as_deref(), &self.output).await?;
        copy(&batches, batch.error_file_id.as_deref(), &errors).await?;
        // Only now is everything where it belongs.
        std::fs::remove_dir_all(&state)
            .map_err(|error| Error::Other(format!("failed to remove {}: {error}", state.display())))?;
        Ok(report(&batch, &self.output, &errors))
    }
}

fn errors_beside(output: &Path) -> PathBuf {
    let name = output.to_string_lossy();
    PathBuf::from(format!("{}.errors.jsonl", name.strip_suffix(".jsonl").unwrap_or(&name)))
}

fn describe(input: &Path, endpoint: Option<String>) -> Result<Unfinished, Error> {
    let failed = |error: std::io::Error| Error::Other(format!("failed to read {}: {error}", input.display()));
    let metadata = std::fs::metadata(input).map_err(failed)?;
    let modified = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
    let endpoint = match endpoint {
        Some(endpoint) => endpoint,
        None => first_url(input).map_err(failed)?.unwrap_or_else(|| "/v1/chat/completions".into()),
    };
    let input = std::fs::canonicalize(input).map_err(failed)?;
    Ok(Unfinished { input, bytes: metadata.len(), modified: modified.as_nanos(), endpoint })
}

/// The `url` of the first line that has one.
pub fn first_url(input: &Path) -> std::io::Result<Option<String>> {
    #[derive(Deserialize)]
    struct Url {
        url: String,
    }
    use std::io::Read;
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

async fn open(settings: Settings) -> Result<Arc<Batches>, Error> {
    let clock = Clock::system();
    let store = SqliteStore::open(&settings.data)?;
    let blobs = Blobs::local(&settings.data.join("objects"))?;
    let registry = Registry::open(&settings.plugins, Loader::new(loading(&settings)?, clock.clone())?).await?;
    for error in registry.current().entries.iter().filter_map(|entry| entry.error.as_ref()) {
        eprintln!("warning: a plugin does not load: {error}");
    }
    Ok(Batches::new(Arc::new(store), blobs, registry, clock, settings))
}

/// Begins the batch, or finds the one that was begun before. Returns its id.
async fn begin(batches: &Batches, state: &Path, input: &Path, now: Unfinished) -> Result<String, Error> {
    let note = state.join("run.json");
    let found = unfinished_batch(batches).await?;
    if found.is_some()
        && let Ok(text) = std::fs::read_to_string(&note)
    {
        let other = |why: &str| {
            Error::Other(format!(
                "{} holds an unfinished run {why}; finish that one, or delete the folder",
                state.display()
            ))
        };
        let before: Unfinished = serde_json::from_str(&text).map_err(|_| other("that cannot be read"))?;
        if before != now {
            return Err(other(&format!("of {} as it was then", before.input.display())));
        }
    }
    // The note first: whatever happens after it, the next run knows what this folder is for. The folder holds one batch at the most.
    let written = serde_json::to_vec(&now).map_err(std::io::Error::from).and_then(|text| std::fs::write(&note, text));
    written.map_err(|error| Error::Other(format!("failed to write {}: {error}", note.display())))?;
    if let Some(batch) = found {
        eprintln!("continuing an unfinished run");
        return Ok(batch.new.id);
    }
    let failed = |error: std::io::Error| Error::Other(format!("failed to read {}: {error}", input.display()));
    let mut file = tokio::fs::File::open(input).await.map_err(failed)?;
    let mut upload = batches.upload(TENANT).await?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = file.read(&mut buffer).await.map_err(failed)?;
        let Some(bytes) = buffer.get(..read).filter(|bytes| !bytes.is_empty()) else { break };
        upload
            .write(Bytes::copy_from_slice(bytes))
            .await
            .map_err(|error| Error::Other(format!("{}: {error}", input.display())))?;
    }
    let filename = input.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let new = NewFile { filename, purpose: "batch".into(), lifetime: None };
    let file = upload.finish(new).await.map_err(|error| Error::Other(format!("{}: {error}", input.display())))?;
    let request = Request {
        input_file_id: file.id,
        endpoint: now.endpoint.clone(),
        completion_window: "24h".into(),
        metadata: None,
        output_lifetime: None,
        idempotency_key: None,
    };
    let batch = batches.create(TENANT, request).await.map_err(|error| Error::Other(error.to_string()))?;
    Ok(batch.new.id)
}

/// The batch of a folder that a former run left.
async fn unfinished_batch(batches: &Batches) -> Result<Option<BatchRecord>, Error> {
    Ok(match batches.list(TENANT, None, 1).await? {
        Paged::Page(page) => page.items.into_iter().next(),
        Paged::UnknownAfter => None,
    })
}

async fn find(batches: &Batches, id: &str) -> Result<BatchRecord, Error> {
    let found = batches.get(TENANT, id).await?;
    found.ok_or_else(|| Error::Other("the unfinished run is not in its folder any more; delete the folder".into()))
}

/// Shows progress until the batch has ended; none if somebody wants it to stop.
async fn watch(batches: &Batches, id: &str) -> Result<Option<BatchRecord>, Error> {
    let mut progress = Progress::new();
    let mut signals = EndSignals::listen()?;
    loop {
        let batch = find(batches, id).await?;
        let counts = batch.counts;
        let done = counts.completed.saturating_add(counts.failed);
        progress.show(&batch.status.as_str().replace('_', " "), done, counts.failed, counts.total);
        if batch.status.is_final() {
            progress.end();
            return Ok(Some(batch));
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            () = signals.next() => {
                progress.end();
                eprintln!("stopping: requests in flight are finished first, a second Ctrl-C leaves them");
                tokio::spawn(async move {
                    signals.next().await;
                    std::process::exit(130);
                });
                return Ok(None);
            }
        }
    }
}

/// Writes a result file to its place, whole or not at all. One without a line is not there, nor is what a former run left in its place.
async fn copy(batches: &Batches, id: Option<&str>, to: &Path) -> Result<(), Error> {
    let failed = |error: std::io::Error| Error::Other(format!("failed to write {}: {error}", to.display()));
    let Some(id) = id else {
        return match std::fs::remove_file(to) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(failed(error)),
            _ => Ok(()),
        };
    };
    let beside = PathBuf::from(format!("{}.partial", to.display()));
    let mut file = tokio::fs::File::create(&beside).await.map_err(failed)?;
    let mut bytes = batches.content(TENANT, id, None).await?;
    while let Some(piece) = bytes.try_next().await? {
        file.write_all(&piece).await.map_err(failed)?;
    }
    file.flush().await.map_err(failed)?;
    file.sync_all().await.map_err(failed)?;
    std::fs::rename(&beside, to).map_err(failed)
}

fn report(batch: &BatchRecord, output: &Path, errors: &Path) -> ExitCode {
    for error in &batch.errors {
        let place = error.line.map(|line| format!("line {line}: ")).unwrap_or_default();
        let param = error.param.as_ref().map(|param| format!(" ({param})")).unwrap_or_default();
        eprintln!("{place}{}{param}: {}", error.code, error.message);
    }
    let counts = batch.counts;
    match batch.status {
        Status::Failed => eprintln!("rejected: nothing was executed; mend the input and run again"),
        status => {
            let (completed, failed) = (counts.completed, counts.failed);
            eprintln!("{}: {completed} of {} answered, {failed} failed", status.as_str(), counts.total);
            if batch.output_file_id.is_some() {
                eprintln!("answers: {}", output.display());
            }
            if batch.error_file_id.is_some() {
                eprintln!("errors: {}", errors.display());
            }
        }
    }
    let every_line = batch.status == Status::Completed && counts.failed == 0;
    if every_line { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
