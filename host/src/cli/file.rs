//! `batchwright file`: lists and deletes the files of a server.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::Value;

use super::client::{Client, Server, path_segment};
use super::list::{page, show};
use super::terminal::{errln, one_line, outln};
use crate::error::Error;

/// Arguments of `batchwright file`.
#[derive(Args)]
pub struct File {
    #[command(flatten)]
    server: Server,
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// List files, newest first
    List {
        /// Maximum number of files to list, 1 to 10000
        #[arg(long, default_value_t = 20)]
        limit: u32,
        /// Id of a file; list the files after it
        #[arg(long)]
        after: Option<String>,
        /// Purpose of the files to list, such as `batch` for input or `batch_output` for results
        #[arg(long)]
        purpose: Option<String>,
    },
    /// Delete files; a batch that already reads a deleted file continues
    Delete {
        /// Ids of files
        #[arg(required = true)]
        ids: Vec<String>,
    },
}

impl File {
    /// Runs the command; returns failure if one file could not be deleted.
    pub async fn run(self) -> Result<ExitCode, Error> {
        let client = self.server.client()?;
        match self.action {
            Action::List { limit, after, purpose } => {
                let page = page("files", limit, &[("after", after), ("purpose", purpose)]);
                show(&client.get(&page).await?, self.server.json, "files", show_file);
                Ok(ExitCode::SUCCESS)
            }
            Action::Delete { ids } => delete(&client, &ids).await,
        }
    }
}

/// Deletes each file and prints the error of each file that cannot be deleted.
async fn delete(client: &Client, ids: &[String]) -> Result<ExitCode, Error> {
    let mut all_deleted = true;
    for id in ids {
        match client.delete(&format!("files/{}", path_segment(id))).await {
            Ok(_) => outln!("deleted {id}"),
            Err(error) => {
                all_deleted = false;
                errln!("error: {error}");
            }
        }
    }
    Ok(if all_deleted { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Prints a file.
fn show_file(file: &Value) {
    let text = |key: &str| file.get(key).and_then(Value::as_str).unwrap_or_default();
    let number = |key: &str| file.get(key).and_then(Value::as_i64);
    let size = bytesize::ByteSize(
        number("bytes").and_then(|bytes| u64::try_from(bytes).ok()).unwrap_or(0),
    );
    let expires = number("expires_at")
        .map_or_else(|| "never expires".into(), |at| format!("expires {}", utc_time(at)));
    let created = utc_time(number("created_at").unwrap_or(0));
    let (id, purpose, name) = (text("id"), text("purpose"), one_line(text("filename")));
    outln!(
        "{id}  {created}  {purpose:12}  {:>10}  {expires}  {name}",
        size.display().iec().to_string()
    );
}

/// Formats Unix seconds as an RFC 3339 time in UTC.
pub fn utc_time(seconds: i64) -> String {
    let since = std::time::Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
    humantime::format_rfc3339_seconds(std::time::UNIX_EPOCH + since).to_string()
}
