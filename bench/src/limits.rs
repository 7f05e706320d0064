//! Batches against a provider that refuses, beside plain tasks with the official SDK's backoff.

use std::collections::HashMap;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use batchwright_bench::{Http, Server};
use bytes::Bytes;
use hyper::Method;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::{CONNECTIONS, Paths, plugin_folder, request_line, run_batch, say, serve};

const LINES: usize = 1500;

/// How the stub is told to take requests, each with a name.
const MODES: [(&str, &str); 8] = [
    ("nothing refused", ""),
    ("1 % refused at random", "random=1"),
    ("5 %", "random=5"),
    ("10 %", "random=10"),
    ("20 %", "random=20"),
    ("100 a second", "rate=100"),
    ("100 a second, and says when", "rate=100&retry-after=1"),
    ("200 in each 5 s", "window=200/5"),
];

/// What it took: seconds, and requests that were refused.
struct Took(f64, u64);

pub async fn limits(paths: &Paths) -> Result<()> {
    say(
        "| provider | seconds | refused | plain tasks: seconds | refused | ratio |\n|---|---|---|---|---|---|",
    );
    for (name, mode) in MODES {
        let mode = format!("latency=100-200&{mode}");
        let ours = ours(paths, &mode).await?;
        let theirs = plain(paths, &mode).await?;
        say(&format!(
            "| {name} | {:.1} | {} | {:.1} | {} | {:.2} |",
            ours.0,
            ours.1,
            theirs.0,
            theirs.1,
            ours.0 / theirs.0
        ));
    }
    Ok(())
}

async fn stub(paths: &Paths, mode: &str) -> Result<Server> {
    let stub = Server::start(&mut Command::new(&paths.stub))?;
    Http::default().json(Method::GET, &format!("{}/mode?{mode}", stub.url), &Value::Null).await?;
    Ok(stub)
}

/// Requests beyond one for each line.
async fn refused(stub: &Server) -> Result<u64> {
    let arrivals =
        Http::default().json(Method::GET, &format!("{}/arrivals", stub.url), &Value::Null).await?;
    let arrivals: HashMap<String, Vec<u64>> = serde_json::from_value(arrivals)?;
    Ok(arrivals.values().map(|times| times.len() as u64 - 1).sum())
}

async fn ours(paths: &Paths, mode: &str) -> Result<Took> {
    let stub = stub(paths, mode).await?;
    let (plugins, data) = (plugin_folder(paths, &stub.url)?, tempfile::tempdir()?);
    let server = Server::start(&mut serve(paths, data.path(), plugins.path(), &[]))?;
    let http = Http::default();
    let input: String = (0..LINES).map(|number| request_line(number) + "\n").collect();
    let file = http.upload(&server.url, input.as_bytes()).await?;
    let begun = Instant::now();
    let batch = run_batch(&http, &server.url, &file, "completed").await?;
    let took = begun.elapsed().as_secs_f64();
    if batch.pointer("/request_counts/completed") != Some(&json!(LINES)) {
        bail!("not every request was answered: {batch}");
    }
    Ok(Took(took, refused(&stub).await?))
}

async fn plain(paths: &Paths, mode: &str) -> Result<Took> {
    let stub = stub(paths, mode).await?;
    let url = format!("{}/v1/chat/completions", stub.url);
    let begun = Instant::now();
    let mut tasks = JoinSet::new();
    let dice = Arc::new(AtomicU32::new(1));
    for task in 0..CONNECTIONS {
        let (http, url, dice) = (Http::default(), url.clone(), dice.clone());
        tasks.spawn(async move {
            for number in (task..LINES).step_by(CONNECTIONS) {
                let line: Value = serde_json::from_str(&request_line(number))?;
                let body = Bytes::from(line.get("body").unwrap_or(&Value::Null).to_string());
                let mut pause = 0.5_f64;
                while http.send(Method::POST, &url, "application/json", body.clone()).await?.0
                    != 200
                {
                    // The SDK's: doubled up to eight seconds, of which up to a quarter is left out by chance.
                    let dice = dice.fetch_add(2_654_435_761, Ordering::Relaxed);
                    let chance = f64::from(dice) / f64::from(u32::MAX);
                    tokio::time::sleep(Duration::from_secs_f64(pause * (1.0 - 0.25 * chance)))
                        .await;
                    pause = (pause * 2.0).min(8.0);
                }
            }
            anyhow::Ok(())
        });
    }
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    Ok(Took(begun.elapsed().as_secs_f64(), refused(&stub).await?))
}
