//! Requests of `batchwright admin`: to a server, or to the same routes in this process on a data
//! folder.

use std::sync::Arc;

use batchwright_api::OperatorApi;
use batchwright_domain::clock::Clock;
use batchwright_memory::Memory;
use batchwright_store::{SqliteStore, Store, umask};
use http::Method;
use serde_json::Value;

use super::Target;
use crate::cli::client::{Client, path_segment, response_error_of};
use crate::cli::terminal::errln;
use crate::error::Error;

/// Memory budget of a command, in bytes: bodies of requests are small.
const MEMORY_BUDGET_BYTES: usize = 64 << 20;

/// Number of entries of a page.
const PAGE_ENTRIES: usize = 100;

/// Way to the routes of the administration.
pub(super) enum Transport {
    /// Server.
    Server(Box<Client>),
    /// Data folder, which no server uses meanwhile.
    Folder { routes: OperatorApi, store: Arc<SqliteStore> },
}

impl Transport {
    /// Opens the data folder, or creates a client of a server. A folder without a database is an
    /// error unless it may be created.
    pub(super) fn open(target: &Target, may_create: bool) -> Result<Self, Error> {
        let Some(data) = &target.data else {
            let Some(key) = target.admin_key.clone() else {
                return Err(Error::Usage(
                    "an admin key is missing: give --admin-key or BATCHWRIGHT_ADMIN_KEY, or, \
                     while the server is stopped, its data folder with --data"
                        .into(),
                ));
            };
            return Ok(Self::Server(Box::new(Client::new(&target.url, Some(key))?)));
        };
        if !SqliteStore::exists(data) {
            let shown = data.display();
            if !may_create {
                return Err(Error::Usage(format!(
                    "{shown} has no database; name the folder that the server has as --data"
                )));
            }
            errln!("warning: {shown} has no database yet; a new one is created there");
        }
        umask();
        let store = Arc::new(SqliteStore::open(data)?);
        let memory = Memory::new(MEMORY_BUDGET_BYTES, 0);
        let routes = OperatorApi::new(store.clone(), Clock::system(), memory);
        Ok(Self::Folder { routes, store })
    }

    /// Closes the data folder.
    pub(super) async fn close(self) {
        if let Self::Folder { store, .. } = self {
            store.close().await;
        }
    }

    pub(super) async fn get(&self, path: &str) -> Result<Value, Error> {
        match self {
            Self::Server(client) => client.get(path).await,
            Self::Folder { routes, .. } => call(routes, Method::GET, path, None).await,
        }
    }

    pub(super) async fn post(&self, path: &str, body: &Value) -> Result<Value, Error> {
        match self {
            Self::Server(client) => client.post(path, body).await,
            Self::Folder { routes, .. } => call(routes, Method::POST, path, Some(body)).await,
        }
    }

    pub(super) async fn delete(&self, path: &str) -> Result<Value, Error> {
        match self {
            Self::Server(client) => client.delete(path).await,
            Self::Folder { routes, .. } => call(routes, Method::DELETE, path, None).await,
        }
    }

    /// Calls a function with each entry of a list, up to `max`, and holds one page at a time.
    pub(super) async fn for_each(
        &self,
        path: &str,
        max: Option<usize>,
        mut each: impl FnMut(Value),
    ) -> Result<(), Error> {
        let (mut left, mut after) = (max.unwrap_or(usize::MAX), String::new());
        let separator = if path.contains('?') { '&' } else { '?' };
        while left > 0 {
            let limit = PAGE_ENTRIES.min(left);
            let mut page = self.get(&format!("{path}{separator}limit={limit}{after}")).await?;
            let Some(Value::Array(data)) = page.get_mut("data").map(Value::take) else { break };
            left = left.saturating_sub(data.len());
            let is_empty = data.is_empty();
            data.into_iter().for_each(&mut each);
            let has_more = page.get("has_more") == Some(&Value::Bool(true));
            match page.get("last_id").and_then(Value::as_str) {
                Some(last) if has_more && !is_empty => {
                    after = format!("&after={}", path_segment(last));
                }
                _ => break,
            }
        }
        Ok(())
    }

    /// Returns the entries of a list, up to `max`.
    pub(super) async fn list(&self, path: &str, max: Option<usize>) -> Result<Vec<Value>, Error> {
        let mut entries = Vec::new();
        self.for_each(path, max, |entry| entries.push(entry)).await?;
        Ok(entries)
    }

    /// Returns the project with an id, a slug or a name.
    pub(super) async fn project(&self, wanted: &str) -> Result<Value, Error> {
        let projects = self.list("organization/projects?include_archived=true", None).await?;
        let by = |key: &str| {
            projects.iter().find(|project| {
                project.get(key).and_then(Value::as_str).is_some_and(|found| found == wanted)
            })
        };
        // An archived project may have the name of an active one.
        let active = projects.iter().find(|project| {
            super::text(project, "/status") == "active" && super::text(project, "/name") == wanted
        });
        by("id").or_else(|| by("slug")).or(active).or_else(|| by("name")).cloned().ok_or_else(
            || {
                Error::Other(format!(
                    "there is no project `{wanted}`; `batchwright admin project list` shows all"
                ))
            },
        )
    }
}

/// Calls a route of the administration in this process.
async fn call(
    routes: &OperatorApi,
    method: Method,
    path: &str,
    body: Option<&Value>,
) -> Result<Value, Error> {
    let failed = |error: String| Error::Other(format!("the request failed: {error}"));
    let (status, bytes) =
        routes.call(method, path, body).await.map_err(|error| failed(error.to_string()))?;
    if !status.is_success() {
        return Err(response_error_of(status, &bytes));
    }
    serde_json::from_slice(&bytes).map_err(|error| failed(error.to_string()))
}
