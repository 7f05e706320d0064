//! Batches against a provider that refuses requests, compared with plain tasks that use the backoff
//! of the official SDK.

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

/// Number of requests per measurement.
const REQUESTS: usize = 1500;

/// Names and queries of the stub modes to measure.
const STUB_MODES: [(&str, &str); 8] = [
    ("nothing refused", ""),
    ("1 % refused at random", "random=1"),
    ("5 %", "random=5"),
    ("10 %", "random=10"),
    ("20 %", "random=20"),
    ("100 a second", "rate=100"),
    ("100 a second, with retry-after", "rate=100&retry-after=1"),
    ("200 in each 5 s", "window=200/5"),
];

/// Duration in seconds, and number of refused requests.
struct Outcome(f64, u64);

/// Prints a table row for each stub mode.
pub async fn limits(paths: &Paths) -> Result<()> {
    say("| provider | seconds | refused | plain tasks: seconds | refused | ratio |\n\
         |---|---|---|---|---|---|");
    for (name, mode) in STUB_MODES {
        let mode = format!("latency=100-200&{mode}");
        let host = measure_host(paths, &mode).await?;
        let plain = measure_plain(paths, &mode).await?;
        say(&format!(
            "| {name} | {:.1} | {} | {:.1} | {} | {:.2} |",
            host.0,
            host.1,
            plain.0,
            plain.1,
            host.0 / plain.0
        ));
    }
    Ok(())
}

async fn stub(paths: &Paths, mode: &str) -> Result<Server> {
    let stub = Server::start(&mut Command::new(&paths.stub))?;
    Http::default().json(Method::GET, &format!("{}/mode?{mode}", stub.url), &Value::Null).await?;
    Ok(stub)
}

/// Returns the number of arrivals beyond one per request.
async fn refused(stub: &Server) -> Result<u64> {
    let arrivals =
        Http::default().json(Method::GET, &format!("{}/arrivals", stub.url), &Value::Null).await?;
    let arrivals: HashMap<String, Vec<u64>> = serde_json::from_value(arrivals)?;
    Ok(arrivals.values().map(|times| times.len() as u64 - 1).sum())
}

/// Measures the host.
async fn measure_host(paths: &Paths, mode: &str) -> Result<Outcome> {
    let stub = stub(paths, mode).await?;
    let (plugins, data) = (plugin_folder(paths, &stub.url)?, tempfile::tempdir()?);
    let server = Server::start(&mut serve(paths, data.path(), plugins.path(), &[]))?;
    let http = Http::default();
    let input: String = (0..REQUESTS).map(|number| request_line(number) + "\n").collect();
    let file = http.upload(&server.url, input.as_bytes()).await?;
    let begun = Instant::now();
    let batch = run_batch(&http, &server.url, &file, "completed").await?;
    let took = begun.elapsed().as_secs_f64();
    if batch.pointer("/request_counts/completed") != Some(&json!(REQUESTS)) {
        bail!("not every request was answered: {batch}");
    }
    Ok(Outcome(took, refused(&stub).await?))
}

/// Measures plain tasks with the backoff of the SDK.
async fn measure_plain(paths: &Paths, mode: &str) -> Result<Outcome> {
    let stub = stub(paths, mode).await?;
    let url = format!("{}/v1/chat/completions", stub.url);
    let begun = Instant::now();
    let mut tasks = JoinSet::new();
    let dice = Arc::new(AtomicU32::new(1));
    for task in 0..CONNECTIONS {
        let (http, url, dice) = (Http::default(), url.clone(), dice.clone());
        tasks.spawn(async move {
            for number in (task..REQUESTS).step_by(CONNECTIONS) {
                let line: Value = serde_json::from_str(&request_line(number))?;
                let body = Bytes::from(line.get("body").unwrap_or(&Value::Null).to_string());
                let mut pause = 0.5_f64;
                while http.send(Method::POST, &url, "application/json", body.clone()).await?.0
                    != 200
                {
                    // Backoff of the SDK: doubled up to 8 s, minus a random quarter at most.
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
    Ok(Outcome(begun.elapsed().as_secs_f64(), refused(&stub).await?))
}
