//! `batchwright batch`: creates, watches, cancels and downloads batches of a server.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use futures_util::StreamExt;

use super::client::{Client, EventStream, Server, path_segment};
use super::failures::Failures;
use super::file::utc_time;
use super::list::{self, entries, page};
use super::place::{Target, check};
use super::progress::Progress;
use super::run::create::endpoint_of_first_line;
use super::terminal::{errln, one_line, outln};
use crate::clock::Clock;
use crate::error::Error;

/// Time without progress before the command requests the cause of a wait.
const STALL_CHECK_DELAY: Duration = Duration::from_secs(1);

/// Interval between two requests for the status of a batch, without events.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// Maximum time between two requests for the status of a batch, with events.
const REFRESH_INTERVAL: Duration = Duration::from_secs(1);

/// Arguments of `batchwright batch`.
#[derive(Args)]
pub struct Batch {
    #[command(flatten)]
    server: Server,
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Upload an input file and create a batch
    Create {
        /// Input file with one request as a JSON object per line, or the id of an uploaded file
        input: String,
        /// Endpoint of the batch [default: that of the first line]
        #[arg(long)]
        endpoint: Option<String>,
        /// Completion window, the time after which the batch expires
        #[arg(long, default_value = "24h")]
        completion_window: String,
        /// Metadata pair; can be given several times
        #[arg(long, value_name = "KEY=VALUE")]
        metadata: Vec<String>,
        /// Watch the batch until it ends
        #[arg(long)]
        watch: bool,
    },
    /// List batches, newest first
    List {
        /// Maximum number of batches to list, 1 to 100
        #[arg(long, default_value_t = 20)]
        limit: u32,
        /// Id of a batch; list the batches after it
        #[arg(long)]
        after: Option<String>,
    },
    /// Show a batch
    Get {
        /// Id of the batch
        id: String,
    },
    /// Show the progress of a batch until it ends
    Watch {
        /// Id of the batch
        id: String,
    },
    /// Cancel a batch; results so far are kept
    Cancel {
        /// Id of the batch
        id: String,
    },
    /// Download the output file and the error file of a batch
    Download {
        /// Id of the batch
        id: String,
        /// Path for the output file, with the results of successful requests
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
        /// Path for the error file, with the results of failed requests
        #[arg(short, long, value_name = "FILE")]
        errors: Option<PathBuf>,
        /// Overwrite existing files
        #[arg(long)]
        force: bool,
    },
}

impl Batch {
    /// Runs the command.
    ///
    /// Returns failure if a watched batch has failed requests or a download is incomplete.
    pub async fn run(self) -> Result<ExitCode, Error> {
        let client = self.server.client()?;
        let as_json = self.server.json;
        match self.action {
            Action::Create { input, endpoint, completion_window, metadata, watch } => {
                let body =
                    new_batch(&client, &input, endpoint, &completion_window, &metadata).await?;
                let batch = client.post("batches", &body).await?;
                if watch {
                    return follow(&client, text(&batch, "id"), as_json).await;
                }
                show(&client, &batch, as_json).await;
            }
            Action::List { limit, after } => {
                let found = client.get(&page("batches", limit, &[("after", after)])).await?;
                let names = match as_json {
                    true => HashMap::new(),
                    false => input_file_names(&client, entries(&found)).await,
                };
                list::show(&found, as_json, "batches", |batch| show_line(batch, &names));
            }
            Action::Get { id } => {
                show(
                    &client,
                    &client.get(&format!("batches/{}", path_segment(&id))).await?,
                    as_json,
                )
                .await
            }
            Action::Watch { id } => return follow(&client, &id, as_json).await,
            Action::Cancel { id } => {
                show(
                    &client,
                    &client
                        .post(&format!("batches/{}/cancel", path_segment(&id)), &json!({}))
                        .await?,
                    as_json,
                )
                .await;
            }
            Action::Download { id, output, errors, force } => {
                return download(&client, &id, &output, errors.as_deref(), force).await;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Uploads the input unless it is a file id, and returns the body of the creation request.
async fn new_batch(
    client: &Client,
    input: &str,
    endpoint: Option<String>,
    window: &str,
    metadata_pairs: &[String],
) -> Result<Value, Error> {
    let mut metadata = serde_json::Map::new();
    for pair in metadata_pairs {
        let Some((key, value)) = pair.split_once('=') else {
            return Err(Error::Other(format!(
                "--metadata `{pair}` is not a pair; write it as KEY=VALUE"
            )));
        };
        metadata.insert(key.to_owned(), value.into());
    }
    let is_file = std::path::Path::new(input).exists();
    let id = if !is_file && input.starts_with("file-") {
        input.to_owned()
    } else {
        text(&client.upload(input.as_ref()).await?, "id").to_owned()
    };
    let of_file = match &endpoint {
        None if is_file => endpoint_of_first_line(input.as_ref())?,
        _ => None,
    };
    let endpoint = endpoint.or(of_file).unwrap_or_else(|| "/v1/chat/completions".into());
    let metadata = if metadata.is_empty() { Value::Null } else { Value::Object(metadata) };
    Ok(json!({
        "input_file_id": id,
        "endpoint": endpoint,
        "completion_window": window,
        "metadata": metadata,
    }))
}

/// Shows the progress of a batch until it ends; success requires that every request succeeded.
async fn follow(client: &Client, id: &str, as_json: bool) -> Result<ExitCode, Error> {
    let mut progress = Progress::new();
    let mut last = (0, Instant::now());
    let mut events = client.events(&format!("batches/{}/events", path_segment(id))).await;
    loop {
        let batch = client.get(&format!("batches/{}", path_segment(id))).await?;
        let (done, failed, total) = counts(&batch);
        let status = text(&batch, "status").to_owned();
        if done > last.0 {
            last = (done, Instant::now());
        }
        // The cause of a wait needs a second request, which is sent only without progress.
        let waiting = if status == "in_progress" && last.1.elapsed() > STALL_CHECK_DELAY {
            waiting_message(client, id).await
        } else {
            None
        };
        progress.show(&status.replace('_', " "), done, failed, total, waiting.as_deref());
        if matches!(status.as_str(), "completed" | "failed" | "cancelled" | "expired") {
            progress.finish();
            show(client, &batch, as_json).await;
            let succeeded = status == "completed" && failed == 0;
            return Ok(if succeeded { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        wait_for_change(&mut events).await;
    }
}

/// Waits for the next event of a batch, for a moment; without events, until the next poll.
async fn wait_for_change(events: &mut Option<EventStream>) {
    let Some(stream) = events else { return tokio::time::sleep(POLL_INTERVAL).await };
    match tokio::time::timeout(REFRESH_INTERVAL, stream.next()).await {
        // What waits is looked up now and then, also without a change.
        Ok(Some(Ok(_))) | Err(_) => {}
        Ok(None | Some(Err(_))) => {
            *events = None;
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }
}

/// Returns a message with the cause of a batch's wait; none if the batch does not wait.
async fn waiting_message(client: &Client, id: &str) -> Option<String> {
    let plugins = client.get(&format!("batches/{}/plugins", path_segment(id))).await.ok()?;
    let waiting = plugins.get("waiting").filter(|waiting| waiting.is_object())?;
    let next = waiting.get("next_attempt_at").and_then(Value::as_i64).unwrap_or(0);
    let left = next.saturating_sub(Clock::system().now().as_seconds());
    Some(Progress::waiting_message(text(waiting, "message"), u64::try_from(left).unwrap_or(0)))
}

/// Downloads the output and error files; returns failure if a file is missing or was not named.
async fn download(
    client: &Client,
    id: &str,
    output: &Path,
    errors: Option<&Path>,
    force: bool,
) -> Result<ExitCode, Error> {
    let output = Target::resolve(output)?;
    let errors = errors.map(Target::resolve).transpose()?;
    check(
        &[Some(&output), errors.as_ref()].into_iter().flatten().collect::<Vec<_>>(),
        force,
        |_| false,
    )?;
    let batch = client.get(&format!("batches/{}", path_segment(id))).await?;
    let files = [("output_file_id", Some(&output)), ("error_file_id", errors.as_ref())];
    let (mut found, mut complete) = (false, true);
    for (key, to) in files {
        let file = text(&batch, key);
        if file.is_empty() {
            if let Some(to) = to.filter(|to| to.exists()) {
                // The status must show that the existing file is not a result of this batch.
                complete = false;
                errln!("the batch has no {key}; {} stays as it is", to.given.display());
            }
            continue;
        }
        found = true;
        let Some(to) = to else {
            complete = false;
            errln!("{key} {file} is not downloaded; name a path for it with --errors");
            continue;
        };
        let chunks = client.content(file).await?;
        if to.path().is_some() {
            to.place(to.draft(None, chunks).await?, force)?;
        } else {
            to.write_through(chunks).await?;
        }
        errln!("{key} {file} -> {}", to.given.display());
    }
    if !found {
        return Err(Error::Other(format!(
            "the batch has no files; its status is '{}'",
            text(&batch, "status")
        )));
    }
    Ok(if complete { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Returns the string member `key` of an object, or an empty string.
fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or_default()
}

/// Returns the names of the input files by id; a deleted file has an empty name.
async fn input_file_names(
    client: &Client,
    batches: impl Iterator<Item = &Value>,
) -> HashMap<String, String> {
    let mut names = HashMap::new();
    for batch in batches {
        let id = text(batch, "input_file_id");
        if !names.contains_key(id) {
            let file = client.get(&format!("files/{}", path_segment(id))).await.unwrap_or_default();
            names.insert(id.to_owned(), text(&file, "filename").to_owned());
        }
    }
    names
}

/// Returns the numbers of done requests, of failed requests among them, and of all requests.
fn counts(batch: &Value) -> (u64, u64, u64) {
    let count = |key: &str| {
        batch.pointer(&format!("/request_counts/{key}")).and_then(Value::as_u64).unwrap_or(0)
    };
    (count("completed").saturating_add(count("failed")), count("failed"), count("total"))
}

/// Prints a batch with its errors and a summary of failures, or the JSON of the server.
async fn show(client: &Client, batch: &Value, as_json: bool) {
    if as_json {
        outln!("{batch:#}");
        return;
    }
    let (done, failed, total) = counts(batch);
    outln!(
        "{}  {}  {done}/{total} done, {failed} failed",
        text(batch, "id"),
        text(batch, "status")
    );
    for key in ["output_file_id", "error_file_id"] {
        if let Some(id) = batch.get(key).and_then(Value::as_str) {
            outln!("  {key}  {id}");
        }
    }
    let mut rejected = Failures::default();
    for error in batch.pointer("/errors/data").and_then(Value::as_array).into_iter().flatten() {
        rejected.add(text(error, "code"));
        let line = error
            .get("line")
            .and_then(Value::as_u64)
            .map(|line| format!("line {line}: "))
            .unwrap_or_default();
        let param = error
            .get("param")
            .and_then(Value::as_str)
            .map(|param| format!(" ({param})"))
            .unwrap_or_default();
        let (code, message) = (text(error, "code"), text(error, "message"));
        outln!("  {}", one_line(&format!("{line}{code}{param}: {message}")));
    }
    let error_file = batch.get("error_file_id").and_then(Value::as_str);
    let failed = match error_file {
        // A deleted error file leaves nothing to count.
        Some(file) => match client.content(file).await {
            Ok(chunks) => Failures::read(chunks).await.unwrap_or_default(),
            Err(_) => Failures::default(),
        },
        None => rejected,
    };
    let failed = failed.summary();
    if !failed.is_empty() {
        outln!("  failed: {failed}");
    }
}

/// Prints a batch of a list, with the name of its input file.
fn show_line(batch: &Value, names: &HashMap<String, String>) {
    let (done, failed, total) = counts(batch);
    let created = utc_time(batch.get("created_at").and_then(Value::as_i64).unwrap_or(0));
    let name = names.get(text(batch, "input_file_id")).map(String::as_str).unwrap_or_default();
    let (id, status) = (text(batch, "id"), text(batch, "status"));
    outln!(
        "{id}  {created}  {status:11}  {done}/{total} done, {failed} failed  {}",
        one_line(name)
    );
}
