//! `batchwright batch`: the batches of a server.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::Error;
use super::client::{Client, Server};
use super::failures::Failures;
use super::file::time;
use super::place::{Target, check};
use super::progress::Progress;
use super::run::of_first_line;
use super::terminal::{one_line, put, say};
use crate::clock::Clock;

/// How long nothing moves before it is asked what a batch waits for.
const STILL: Duration = Duration::from_secs(1);

const LOOK: Duration = Duration::from_millis(500);

#[derive(Args)]
pub struct Batch {
    #[command(flatten)]
    server: Server,
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Upload a file of requests and create a batch of it
    Create {
        /// Requests, one JSON object a line; or the id of a file that was uploaded before
        input: String,
        /// Endpoint of the batch [default: that of the first line]
        #[arg(long)]
        endpoint: Option<String>,
        /// Time in which it is to be done
        #[arg(long, default_value = "24h")]
        completion_window: String,
        /// A pair of metadata, KEY=VALUE; may be given several times
        #[arg(long, value_name = "KEY=VALUE")]
        metadata: Vec<String>,
        /// Watch it to its end
        #[arg(long)]
        watch: bool,
    },
    /// List batches, newest first
    List {
        /// How many, 1 to 100
        #[arg(long, default_value_t = 20)]
        limit: u32,
        /// Begin after this one
        #[arg(long)]
        after: Option<String>,
    },
    /// Show a batch
    Get { id: String },
    /// Show how a batch comes along, to its end
    Watch { id: String },
    /// Cancel a batch; what is done stays done
    Cancel { id: String },
    /// Download a batch's files
    Download {
        id: String,
        /// Where the answers go
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
        /// Where the requests go that failed
        #[arg(short, long, value_name = "FILE")]
        errors: Option<PathBuf>,
        /// Overwrite files that are there
        #[arg(long)]
        force: bool,
    },
}

impl Batch {
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
                let after = after.map(|id| format!("&after={id}")).unwrap_or_default();
                list(
                    &client,
                    &client.get(&format!("batches?limit={limit}{after}")).await?,
                    as_json,
                )
                .await;
            }
            Action::Get { id } => {
                show(&client, &client.get(&format!("batches/{id}")).await?, as_json).await
            }
            Action::Watch { id } => return follow(&client, &id, as_json).await,
            Action::Cancel { id } => {
                show(
                    &client,
                    &client.post(&format!("batches/{id}/cancel"), &json!({})).await?,
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

async fn new_batch(
    client: &Client,
    input: &str,
    endpoint: Option<String>,
    window: &str,
    pairs: &[String],
) -> Result<Value, Error> {
    let mut metadata = serde_json::Map::new();
    for pair in pairs {
        let Some((key, value)) = pair.split_once('=') else {
            return Err(Error::Other(format!(
                "--metadata `{pair}` is no pair; write it as KEY=VALUE"
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
        None if is_file => of_first_line(input.as_ref())?,
        _ => None,
    };
    let endpoint = endpoint.or(of_file).unwrap_or_else(|| "/v1/chat/completions".into());
    let metadata = if metadata.is_empty() { Value::Null } else { Value::Object(metadata) };
    Ok(
        json!({"input_file_id": id, "endpoint": endpoint, "completion_window": window, "metadata": metadata}),
    )
}

async fn follow(client: &Client, id: &str, as_json: bool) -> Result<ExitCode, Error> {
    let mut progress = Progress::new();
    let mut last = (0, Instant::now());
    loop {
        let batch = client.get(&format!("batches/{id}")).await?;
        let (done, failed, total) = counts(&batch);
        let status = text(&batch, "status").to_owned();
        if done > last.0 {
            last = (done, Instant::now());
        }
        // What it waits for is asked only when nothing has moved for a while.
        let waits = if status == "in_progress" && last.1.elapsed() > STILL {
            waits(client, id).await
        } else {
            None
        };
        progress.show(&status.replace('_', " "), done, failed, total, waits.as_deref());
        if matches!(status.as_str(), "completed" | "failed" | "cancelled" | "expired") {
            progress.end();
            show(client, &batch, as_json).await;
            let well = status == "completed" && failed == 0;
            return Ok(if well { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// What a batch waits for, in words.
async fn waits(client: &Client, id: &str) -> Option<String> {
    let plugins = client.get(&format!("batches/{id}/plugins")).await.ok()?;
    let waiting = plugins.get("waiting").filter(|waiting| waiting.is_object())?;
    let next = waiting.get("next_attempt_at").and_then(Value::as_i64).unwrap_or(0);
    let left = next.saturating_sub(Clock::system().now().as_seconds());
    Some(Progress::waiting(text(waiting, "message"), u64::try_from(left).unwrap_or(0)))
}

async fn download(
    client: &Client,
    id: &str,
    output: &Path,
    errors: Option<&Path>,
    force: bool,
) -> Result<ExitCode, Error> {
    let output = Target::find(output)?;
    let errors = errors.map(Target::find).transpose()?;
    check(
        &[Some(&output), errors.as_ref()].into_iter().flatten().collect::<Vec<_>>(),
        force,
        |_| false,
    )?;
    let batch = client.get(&format!("batches/{id}")).await?;
    let places = [("output_file_id", Some(&output)), ("error_file_id", errors.as_ref())];
    let (mut found, mut all_here) = (false, true);
    for (key, to) in places {
        let file = text(&batch, key);
        if file.is_empty() {
            if let Some(to) = to.filter(|to| to.exists()) {
                // Whoever reads it must not take it for this batch's.
                all_here = false;
                say!("the batch has no {key}; {} stays as it is", to.given.display());
            }
            continue;
        }
        found = true;
        let Some(to) = to else {
            all_here = false;
            say!("{key} {file} is not downloaded; name a place for it with --errors");
            continue;
        };
        let pieces = client.content(file).await?;
        if to.path().is_some() {
            to.place(to.draft(None, pieces).await?, force)?;
        } else {
            to.write_through(pieces).await?;
        }
        say!("{key} {file} -> {}", to.given.display());
    }
    if !found {
        return Err(Error::Other(format!(
            "the batch has no files; its status is '{}'",
            text(&batch, "status")
        )));
    }
    Ok(if all_here { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or_default()
}

/// The names of batches' input files, by id, as far as they are still there.
async fn names(client: &Client, batches: impl Iterator<Item = &Value>) -> HashMap<String, String> {
    let mut names = HashMap::new();
    for batch in batches {
        let id = text(batch, "input_file_id");
        if !names.contains_key(id) {
            let file = client.get(&format!("files/{id}")).await.unwrap_or_default();
            names.insert(id.to_owned(), text(&file, "filename").to_owned());
        }
    }
    names
}

/// Done, of these failed, and in total.
fn counts(batch: &Value) -> (u64, u64, u64) {
    let count = |key: &str| {
        batch.pointer(&format!("/request_counts/{key}")).and_then(Value::as_u64).unwrap_or(0)
    };
    (count("completed").saturating_add(count("failed")), count("failed"), count("total"))
}

async fn show(client: &Client, batch: &Value, as_json: bool) {
    if as_json {
        put!("{batch:#}");
        return;
    }
    let (done, failed, total) = counts(batch);
    put!("{}  {}  {done}/{total} done, {failed} failed", text(batch, "id"), text(batch, "status"));
    for key in ["output_file_id", "error_file_id"] {
        if let Some(id) = batch.get(key).and_then(Value::as_str) {
            put!("  {key}  {id}");
        }
    }
    let mut rejected = Failures::default();
    for error in batch.pointer("/errors/data").and_then(Value::as_array).into_iter().flatten() {
        rejected.add(text(error, "code").to_owned());
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
        put!("  {line}{}{param}: {}", text(error, "code"), one_line(text(error, "message")));
    }
    let ended = batch.get("error_file_id").and_then(Value::as_str);
    let failed = match ended {
        // What failed is in the file; if it is gone, there is nothing to sum up.
        Some(file) => match client.content(file).await {
            Ok(pieces) => Failures::read(pieces).await.unwrap_or_default(),
            Err(_) => Failures::default(),
        },
        None => rejected,
    };
    let failed = failed.in_words();
    if !failed.is_empty() {
        put!("  failed: {failed}");
    }
}

async fn list(client: &Client, list: &Value, as_json: bool) {
    if as_json {
        put!("{list:#}");
        return;
    }
    let data = list.get("data").and_then(Value::as_array);
    let names = names(client, data.into_iter().flatten()).await;
    for batch in data.into_iter().flatten() {
        let (done, failed, total) = counts(batch);
        let created = time(batch.get("created_at").and_then(Value::as_i64).unwrap_or(0));
        let name = names.get(text(batch, "input_file_id")).map(String::as_str).unwrap_or_default();
        let (id, status) = (text(batch, "id"), text(batch, "status"));
        put!(
            "{id}  {created}  {status:11}  {done}/{total} done, {failed} failed  {}",
            one_line(name)
        );
    }
    if list.get("has_more") == Some(&Value::Bool(true)) {
        say!("there are more: --after {}", text(list, "last_id"));
    }
}
