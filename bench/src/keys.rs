//! Cost of checking a key: the same requests to a server without keys and to one with keys.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use batchwright_bench::{Http, Server};
use hyper::Method;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::{Paths, median, plugin_folder, say, serve};

/// Number of requests of a round.
const REQUESTS: usize = 20_000;

/// Number of clients at a time.
const CLIENTS: usize = 16;

/// Number of rounds, each with both servers; the median counts.
const ROUNDS: usize = 5;

/// Measures the CPU time of a request to a server without keys and to one with keys.
pub async fn keys(paths: &Paths) -> Result<()> {
    let plugins = plugin_folder(paths, "http://127.0.0.1:9")?;
    let (open, keyed) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let created = Command::new(&paths.host)
        .args(["admin", "key", "create", "--name", "bench", "--data"])
        .arg(keyed.path())
        .output()?;
    let admin = String::from_utf8(created.stdout)?;
    let open = Server::start(&mut serve(paths, open.path(), plugins.path(), &[]))?;
    let keyed = Server::start(&mut serve(paths, keyed.path(), plugins.path(), &[]))?;
    let key = project_key(&Http::default().with_key(admin.trim()), &keyed.url).await?;
    let (without, with) = (Http::default(), Http::default().with_key(&key));
    let (mut costs, mut differences) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let cost = cost(&without, &open).await?;
        costs.push(cost);
        differences.push(self::cost(&with, &keyed).await? - cost);
    }
    say(&format!(
        "keys: {:.1} us of CPU time a request without keys, {:+.1} us with a key (medians of \
         {ROUNDS}, {REQUESTS} requests each)",
        median(costs),
        median(differences)
    ));
    Ok(())
}

/// Creates a key of the default project.
async fn project_key(admin: &Http, url: &str) -> Result<String> {
    let projects = format!("{url}/v1/organization/projects");
    let listed = admin.json(Method::GET, &projects, &Value::Null).await?;
    let id = listed.pointer("/data/0/id").and_then(Value::as_str).context("no project")?;
    let accounts = format!("{projects}/{id}/service_accounts");
    let account = admin.json(Method::POST, &accounts, &json!({"name": "bench"})).await?;
    let key = account.pointer("/api_key/value").and_then(Value::as_str).context("no key")?;
    Ok(key.to_owned())
}

/// Returns the CPU time of a request in microseconds.
async fn cost(http: &Http, server: &Server) -> Result<f64> {
    let url = format!("{}/v1/models/echo", server.url);
    let before = server.cpu_seconds()?;
    let mut clients = JoinSet::new();
    for _ in 0..CLIENTS {
        let (http, url) = (http.clone(), url.clone());
        clients.spawn(async move {
            for _ in 0..REQUESTS / CLIENTS {
                let answer = http.json(Method::GET, &url, &Value::Null).await?;
                ensure!(answer.get("id") == Some(&json!("echo")), "{answer}");
            }
            anyhow::Ok(())
        });
    }
    while let Some(done) = clients.join_next().await {
        done??;
    }
    Ok((server.cpu_seconds()? - before) * 1e6 / REQUESTS as f64)
}
