//! `batchwright admin`: projects, keys and the audit log, of a running server or of a data folder.

mod apply;
mod keys;
mod limits;
mod money;
mod projects;
mod transport;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::Value;

use self::transport::Transport;
use crate::cli::file::utc_time;
use crate::cli::terminal::{one_line, outln};
use crate::error::Error;

/// Arguments of `batchwright admin`.
#[derive(Args)]
pub struct Admin {
    #[command(flatten)]
    target: Target,
    #[command(subcommand)]
    action: Action,
}

/// Server or data folder.
#[derive(Args)]
struct Target {
    /// Data folder of a server that is stopped; needs no key, and is how the first key is made
    #[arg(long, global = true, value_name = "DIR")]
    data: Option<PathBuf>,
    /// URL of the server, with or without /v1; ignored with --data
    #[arg(long, global = true, env = "BATCHWRIGHT_URL", default_value = "http://127.0.0.1:8080")]
    url: String,
    /// Admin key, for a server
    #[arg(long, global = true, env = "BATCHWRIGHT_ADMIN_KEY", hide_env_values = true)]
    admin_key: Option<String>,
    /// Print the JSON of the server instead of text
    #[arg(long, global = true)]
    json: bool,
}

/// Arguments of `batchwright audit`.
#[derive(Args)]
pub struct Audit {
    #[command(flatten)]
    target: Target,
    /// First time of the entries to export, in Unix seconds
    #[arg(long, value_name = "SECONDS")]
    since: Option<i64>,
}

impl Audit {
    /// Writes the audit log as JSON lines, newest first, page by page.
    pub async fn run(self) -> Result<ExitCode, Error> {
        let transport = Transport::open(&self.target, false)?;
        let mut path = "organization/audit_logs".to_owned();
        if let Some(since) = self.since {
            path.push_str(&format!("?effective_at[gte]={since}"));
        }
        let done = transport.for_each(&path, None, |entry| outln!("{entry}")).await;
        transport.close().await;
        done.map(|()| ExitCode::SUCCESS)
    }
}

#[derive(Subcommand)]
enum Action {
    /// Manage projects, each of which is a tenant
    #[command(subcommand)]
    Project(projects::Project),
    /// Manage API keys
    #[command(subcommand)]
    Key(keys::Key),
    /// Show and change the limits of a project
    #[command(subcommand)]
    Limits(limits::LimitsCommand),
    /// Show and change the models that a project may use
    #[command(subcommand)]
    Models(limits::ModelsCommand),
    /// Show and change the budget of a project
    #[command(subcommand)]
    Budget(money::Budget),
    /// Show usage and costs
    Usage(money::UsageReport),
    /// Make projects, limits and models equal to a file; what the file does not name stays
    Apply(apply::Apply),
    /// List the audit log: who changed what, newest first
    Log {
        /// Maximum number of entries to list
        #[arg(long, default_value_t = 20)]
        limit: usize,
    },
}

impl Admin {
    /// Runs the command.
    pub async fn run(self) -> Result<ExitCode, Error> {
        if let Action::Key(keys::Key::Generate) = self.action {
            return keys::generate().map(|()| ExitCode::SUCCESS);
        }
        let may_create = matches!(self.action, Action::Key(keys::Key::Create { .. }));
        let transport = Transport::open(&self.target, may_create)?;
        let done = match self.action {
            Action::Project(project) => project.run(&transport, self.target.json).await,
            Action::Key(key) => key.run(&transport, self.target.json).await,
            Action::Limits(limits) => limits.run(&transport, self.target.json).await,
            Action::Models(models) => models.run(&transport, self.target.json).await,
            Action::Budget(budget) => budget.run(&transport, self.target.json).await,
            Action::Usage(report) => report.run(&transport, self.target.json).await,
            Action::Apply(apply) => apply.run(&transport).await,
            Action::Log { limit } => log(&transport, limit, self.target.json).await,
        };
        transport.close().await;
        done.map(|()| ExitCode::SUCCESS)
    }
}

/// Lists the newest entries of the audit log.
async fn log(transport: &Transport, limit: usize, as_json: bool) -> Result<(), Error> {
    for entry in transport.list("organization/audit_logs", Some(limit)).await? {
        if as_json {
            outln!("{entry}");
            continue;
        }
        let kind = text(&entry, "/type");
        let resource = entry.get(&kind).map(|change| text(change, "/id")).unwrap_or_default();
        let details = entry.get(&kind).and_then(|change| {
            change.get("data").or_else(|| change.get("changes_requested")).map(Value::to_string)
        });
        let actor = match text(&entry, "/actor/api_key/id") {
            id if id.is_empty() => "operator".to_owned(),
            id => format!("{id} {}", text(&entry, "/actor/ip_address")),
        };
        outln!(
            "{}  {kind:<28} {resource}  by {actor}  {}",
            time(&entry, "/effective_at"),
            one_line(&details.unwrap_or_default())
        );
    }
    Ok(())
}

/// Returns the text at a JSON pointer on one line, or an empty text.
fn text(value: &Value, pointer: &str) -> String {
    one_line(value.pointer(pointer).and_then(Value::as_str).unwrap_or_default())
}

/// Returns the time at a JSON pointer, or a dash.
fn time(value: &Value, pointer: &str) -> String {
    value.pointer(pointer).and_then(Value::as_i64).map_or_else(|| "-".to_owned(), utc_time)
}
