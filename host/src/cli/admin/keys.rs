//! `batchwright admin key`

use batchwright_domain::units::Span;
use batchwright_tenancy::IssuedKey;
use clap::Subcommand;
use serde_json::{Map, Value, json};

use super::transport::Transport;
use super::{projects, text, time};
use crate::cli::client::path_segment;
use crate::cli::terminal::{errln, outln, write_secret};
use crate::clock::Clock;
use crate::error::Error;

/// Name of a key and its service account if none is given.
const DEFAULT_NAME: &str = "default";

#[derive(Subcommand)]
pub(super) enum Key {
    /// Create a key and print it, alone and once, to standard output
    Create {
        /// Project of the key, by id, slug or name; without it, the key is an admin key
        #[arg(long)]
        project: Option<String>,
        /// Name of the key, and of the service account that owns the key [default: default]
        #[arg(long)]
        name: Option<String>,
        /// Lifetime of the key, such as 90d; no limit if absent
        #[arg(long, value_name = "TIME")]
        expires_in: Option<Span>,
        /// Scopes of the key, separated by commas, such as api.batch.read; all if absent; of an
        /// admin key, metrics.read
        #[arg(long, value_delimiter = ',', value_name = "LIST")]
        scopes: Vec<String>,
    },
    /// Print a key that no server knows, for `first_admin_key` of a new server
    Generate,
    /// List keys, without their secrets
    List {
        /// Project of the keys; without it, admin keys
        #[arg(long)]
        project: Option<String>,
    },
    /// Delete a key, which the server refuses from then on
    Revoke {
        /// Id of the key, such as key_8d0c…
        id: String,
        /// Project of the key; without it, an admin key
        #[arg(long)]
        project: Option<String>,
    },
    /// Replace a key: create one with the same owner, scopes and lifetime, print it, and end the
    /// old one
    Rotate {
        /// Id of the key, such as key_8d0c…
        id: String,
        /// Project of the key; without it, an admin key
        #[arg(long)]
        project: Option<String>,
        /// Time for which the old key still works; only for the key of a project
        #[arg(long, value_name = "TIME", requires = "project")]
        overlap: Option<Span>,
    },
}

impl Key {
    pub(super) async fn run(self, transport: &Transport, as_json: bool) -> Result<(), Error> {
        match self {
            Self::Create { project, name, expires_in, scopes } => {
                let name = name.unwrap_or_else(|| DEFAULT_NAME.to_owned());
                let lifetime = expires_in.map(|span| span.duration().as_secs());
                let scopes = (!scopes.is_empty()).then_some(scopes);
                let created = match project {
                    None => new_admin_key(transport, &name, scopes, lifetime).await?,
                    Some(project) => {
                        let project = projects::path_of(transport, &project).await?;
                        let account = account(transport, &project, &name).await?;
                        let new = NewKey { account, name, scopes, lifetime };
                        new.create(transport, &project).await?
                    }
                };
                show_new(&created, as_json)?;
            }
            Self::Generate => generate()?,
            Self::List { project } => {
                let keys = path_of_keys(transport, project.as_deref()).await?;
                for key in transport.list(&keys, None).await? {
                    show(&key, as_json);
                }
            }
            Self::Revoke { id, project } => {
                let keys = path_of_keys(transport, project.as_deref()).await?;
                let deleted = transport.delete(&format!("{keys}/{}", path_segment(&id))).await?;
                if as_json {
                    outln!("{deleted}");
                } else {
                    outln!("deleted {id}");
                }
            }
            Self::Rotate { id, project, overlap } => {
                let keys = path_of_keys(transport, project.as_deref()).await?;
                let old_path = format!("{keys}/{}", path_segment(&id));
                let old = transport.get(&old_path).await?;
                let created = replacement(transport, &keys, &old).await?;
                // The old key ends only after the new one has reached the caller.
                show_new(&created, as_json)?;
                end(transport, &old_path, &old, overlap).await?;
            }
        }
        Ok(())
    }
}

/// Prints a key that no server knows.
pub(super) fn generate() -> Result<(), Error> {
    let key = IssuedKey::new().map_err(|error| {
        Error::Other(format!("the operating system has no random bits: {error}"))
    })?;
    write_secret(&key.value)
        .map_err(|error| Error::Other(format!("failed to print the key: {error}")))
}

/// Key to create in a project.
struct NewKey {
    account: String,
    name: String,
    scopes: Option<Vec<String>>,
    lifetime: Option<u64>,
}

impl NewKey {
    async fn create(self, transport: &Transport, project: &str) -> Result<Value, Error> {
        let body = new_key(&self.name, self.scopes, self.lifetime);
        let account = path_segment(&self.account);
        transport.post(&format!("{project}/service_accounts/{account}/api_keys"), &body).await
    }
}

/// Returns the body of the creation of a key.
fn new_key(name: &str, scopes: Option<Vec<String>>, lifetime: Option<u64>) -> Value {
    let mut body = Map::from_iter([("name".to_owned(), json!(name))]);
    body.extend(scopes.map(|scopes| ("scopes".to_owned(), json!(scopes))));
    body.extend(lifetime.map(|seconds| ("expires_in_seconds".to_owned(), json!(seconds))));
    Value::Object(body)
}

async fn new_admin_key(
    transport: &Transport,
    name: &str,
    scopes: Option<Vec<String>>,
    lifetime: Option<u64>,
) -> Result<Value, Error> {
    transport.post("organization/admin_api_keys", &new_key(name, scopes, lifetime)).await
}

/// Returns the id of the service account with a name, and creates the account if there is none.
async fn account(transport: &Transport, project: &str, name: &str) -> Result<String, Error> {
    let accounts = format!("{project}/service_accounts");
    let existing = transport.list(&accounts, None).await?;
    if let Some(found) = existing.iter().find(|account| text(account, "/name") == name) {
        return Ok(text(found, "/id"));
    }
    let body = Map::from_iter([
        ("name".to_owned(), json!(name)),
        ("create_service_account_only".to_owned(), json!(true)),
    ]);
    Ok(text(&transport.post(&accounts, &Value::Object(body)).await?, "/id"))
}

/// Returns the path of the keys of a project, or of the admin keys.
async fn path_of_keys(transport: &Transport, project: Option<&str>) -> Result<String, Error> {
    match project {
        None => Ok("organization/admin_api_keys".to_owned()),
        Some(project) => Ok(format!("{}/api_keys", projects::path_of(transport, project).await?)),
    }
}

/// Creates a key like an existing one, with a lifetime of the same length.
async fn replacement(transport: &Transport, keys: &str, old: &Value) -> Result<Value, Error> {
    let number = |pointer: &str| old.pointer(pointer).and_then(Value::as_u64);
    let lifetime = number("/expires_at")
        .zip(number("/created_at"))
        .map(|(end, start)| end.saturating_sub(start).max(1));
    let name = text(old, "/name");
    let scopes = old
        .get("scopes")
        .and_then(Value::as_array)
        .map(|scopes| scopes.iter().filter_map(Value::as_str).map(str::to_owned).collect());
    match keys.strip_suffix("/api_keys") {
        None => new_admin_key(transport, &name, scopes, lifetime).await,
        Some(project) => {
            let account = text(old, "/owner/service_account/id");
            NewKey { account, name, scopes, lifetime }.create(transport, project).await
        }
    }
}

/// Ends a replaced key, at once or after the overlap, and never later than before.
async fn end(
    transport: &Transport,
    path: &str,
    old: &Value,
    overlap: Option<Span>,
) -> Result<(), Error> {
    let Some(left) = overlap.map(|span| span.duration().as_secs()).filter(|&left| left > 0) else {
        return transport.delete(path).await.map(drop);
    };
    let end = old.pointer("/expires_at").and_then(Value::as_u64);
    let now = u64::try_from(Clock::system().now().as_seconds()).unwrap_or(0);
    if end.is_some_and(|end| end <= now.saturating_add(left)) {
        return Ok(());
    }
    transport.post(path, &json!({"expires_in_seconds": left})).await.map(drop)
}

/// Prints a new key alone on standard output; fails if it could not be delivered.
fn show_new(created: &Value, as_json: bool) -> Result<(), Error> {
    let shown = if as_json { created.to_string() } else { text(created, "/value") };
    let id = text(created, "/id");
    write_secret(&shown).map_err(|error| {
        Error::Other(format!(
            "the new key {id} could not be written to standard output: {error}; revoke it, and \
             create another one"
        ))
    })?;
    if !as_json {
        errln!("created {id}; the key is not shown again");
    }
    Ok(())
}

fn show(key: &Value, as_json: bool) {
    if as_json {
        outln!("{key}");
        return;
    }
    let scopes: Vec<_> =
        key.get("scopes").and_then(Value::as_array).into_iter().flatten().collect();
    let scopes: Vec<_> = scopes.into_iter().filter_map(Value::as_str).collect();
    outln!(
        "{}  {}  created {}  expires {}  last used {}  {}  {}",
        text(key, "/id"),
        text(key, "/redacted_value"),
        time(key, "/created_at"),
        time(key, "/expires_at"),
        time(key, "/last_used_at"),
        text(key, "/name"),
        scopes.join(",")
    );
}
