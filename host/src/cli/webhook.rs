//! `batchwright webhook`: webhook endpoints of a project and their deliveries.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

use super::client::{Client, Server, path_segment};
use super::file::utc_time;
use super::list::{self, entries, page};
use super::terminal::{errln, one_line, outln, write_secret};
use crate::error::Error;

/// Arguments of `batchwright webhook`.
#[derive(Args)]
pub struct Webhook {
    #[command(flatten)]
    server: Server,
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Create an endpoint and print its secret, alone and once, to standard output
    Create {
        /// HTTPS URL that events are sent to
        endpoint: String,
        /// Name of the endpoint
        #[arg(long, default_value = "batches")]
        name: String,
        /// Events to send, separated by commas [default: all]
        #[arg(long, value_delimiter = ',', value_name = "LIST")]
        events: Vec<String>,
    },
    /// List endpoints
    List {
        /// Maximum number of endpoints to list, 1 to 100
        #[arg(long, default_value_t = 20)]
        limit: u32,
        /// Id of an endpoint; list the endpoints after it
        #[arg(long)]
        after: Option<String>,
    },
    /// Change an endpoint, which also enables one that the server has disabled
    Update {
        /// Id of the endpoint
        id: String,
        /// HTTPS URL that events are sent to
        #[arg(long, value_name = "URL")]
        endpoint: Option<String>,
        /// Name of the endpoint
        #[arg(long)]
        name: Option<String>,
        /// Events to send from now on, separated by commas
        #[arg(long, value_delimiter = ',', value_name = "LIST")]
        events: Option<Vec<String>>,
    },
    /// Delete an endpoint, with what was not delivered yet
    Delete {
        /// Id of the endpoint
        id: String,
    },
    /// Replace the secret of an endpoint and print the new one, alone and once
    RotateSecret {
        /// Id of the endpoint
        id: String,
        /// Let the old secret sign, too, for 24 hours
        #[arg(long)]
        keep_old: bool,
    },
    /// Send a sample event now, and print the status of the answer
    Test {
        /// Id of the endpoint
        id: String,
        /// Event to send
        #[arg(long, default_value = "batch.completed")]
        event: String,
    },
    /// List the deliveries of an endpoint, newest first
    Deliveries {
        /// Id of the endpoint
        id: String,
        /// Maximum number of deliveries to list, 1 to 100
        #[arg(long, default_value_t = 20)]
        limit: u32,
        /// Id of an event; list the deliveries after it
        #[arg(long)]
        after: Option<String>,
    },
    /// Deliver an event again, under the same id
    Redeliver {
        /// Id of the endpoint
        id: String,
        /// Id of the event
        event: String,
    },
}

impl Webhook {
    /// Runs the command; returns failure if a test was answered with another status than 2xx.
    pub async fn run(self) -> Result<ExitCode, Error> {
        let (client, as_json) = (self.server.client()?, self.server.json);
        match self.action {
            Action::Create { endpoint, name, events } => {
                let events = if events.is_empty() { all_events(&client).await? } else { events };
                let body = json!({"url": endpoint, "name": name, "event_types": events});
                show_secret(&client.post("webhook_endpoints", &body).await?, as_json)?;
            }
            Action::List { limit, after } => {
                let found =
                    client.get(&page("webhook_endpoints", limit, &[("after", after)])).await?;
                list::show(&found, as_json, "endpoints", show_endpoint);
            }
            Action::Update { id, endpoint, name, events } => {
                let mut body = Map::new();
                body.extend(endpoint.map(|url| ("url".to_owned(), json!(url))));
                body.extend(name.map(|name| ("name".to_owned(), json!(name))));
                body.extend(events.map(|events| ("event_types".to_owned(), json!(events))));
                show_one(
                    &client.post(&path(&id), &Value::Object(body)).await?,
                    as_json,
                    show_endpoint,
                );
            }
            Action::Delete { id } => {
                let deleted = client.delete(&path(&id)).await?;
                show_one(&deleted, as_json, |deleted| outln!("deleted {}", text(deleted, "id")));
            }
            Action::RotateSecret { id, keep_old } => {
                let body = json!({"keep_old_secret_active_for_24_hours": keep_old});
                let path = format!("{}/rotate_secret", path(&id));
                show_secret(&client.post(&path, &body).await?, as_json)?;
            }
            Action::Test { id, event } => {
                let body = json!({"event_type": event});
                let tested = client.post(&format!("{}/test", path(&id)), &body).await?;
                let status = tested.get("status_code").and_then(Value::as_u64).unwrap_or(0);
                show_one(&tested, as_json, |_| outln!("the endpoint answered {status}"));
                if !(200..300).contains(&status) {
                    return Ok(ExitCode::FAILURE);
                }
            }
            Action::Deliveries { id, limit, after } => {
                let path = format!("{}/deliveries", path(&id));
                let found = client.get(&page(&path, limit, &[("after", after)])).await?;
                list::show(&found, as_json, "deliveries", show_delivery);
            }
            Action::Redeliver { id, event } => {
                let path = format!("{}/deliveries/{}/redeliver", path(&id), path_segment(&event));
                show_one(&client.post(&path, &json!({})).await?, as_json, show_delivery);
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn path(id: &str) -> String {
    format!("webhook_endpoints/{}", path_segment(id))
}

/// Returns every event that the server has.
async fn all_events(client: &Client) -> Result<Vec<String>, Error> {
    let found = client.get("webhook_event_types").await?;
    Ok(entries(&found).filter_map(Value::as_str).map(str::to_owned).collect())
}

fn text(object: &Value, key: &str) -> String {
    one_line(object.get(key).and_then(Value::as_str).unwrap_or_default())
}

fn time(object: &Value, key: &str) -> String {
    object.get(key).and_then(Value::as_i64).map_or_else(|| "-".to_owned(), utc_time)
}

/// Prints a secret alone on standard output; fails if it could not be delivered.
fn show_secret(endpoint: &Value, as_json: bool) -> Result<(), Error> {
    let id = text(endpoint, "id");
    let shown = if as_json { endpoint.to_string() } else { text(endpoint, "signing_secret") };
    write_secret(&shown).map_err(|error| {
        Error::Other(format!(
            "the secret of {id} could not be written to standard output: {error}; rotate it with \
             'batchwright webhook rotate-secret {id}'"
        ))
    })?;
    if !as_json {
        errln!("endpoint {id}; the secret is not shown again");
    }
    Ok(())
}

fn show_one(object: &Value, as_json: bool, show: impl Fn(&Value)) {
    if as_json {
        outln!("{object}");
    } else {
        show(object);
    }
}

fn show_endpoint(endpoint: &Value) {
    let events: Vec<_> = endpoint
        .get("event_types")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let state = match endpoint.get("disabled_at").and_then(Value::as_i64) {
        Some(at) => format!("disabled {}", utc_time(at)),
        None => match endpoint.get("failing_since").and_then(Value::as_i64) {
            Some(since) => format!("failing since {}", utc_time(since)),
            None => "enabled".to_owned(),
        },
    };
    let (id, name, url) = (text(endpoint, "id"), text(endpoint, "name"), text(endpoint, "url"));
    outln!("{id}  {state}  {url}  {}  {name}", events.join(","));
}

fn show_delivery(delivery: &Value) {
    let number = |key: &str| {
        delivery
            .get(key)
            .and_then(Value::as_u64)
            .map_or_else(|| "-".to_owned(), |it| it.to_string())
    };
    outln!(
        "{}  {}  {}  {}  attempts {}  status {}  next {}  {}",
        text(delivery, "id"),
        time(delivery, "created_at"),
        text(delivery, "event_type"),
        text(delivery, "status"),
        number("attempts"),
        number("status_code"),
        time(delivery, "next_attempt_at"),
        text(delivery, "detail")
    );
}
