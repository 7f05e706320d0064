//! Cost of metrics: whole batches with metrics, which are scraped each second, and without them,
//! in turns.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use batchwright_bench::{Http, Server};
use bytes::Bytes;
use hyper::Method;
use serde_json::json;
use tokio::task::JoinSet;

use crate::{Paths, median, plugin_folder, request_line, run_batch, say, serve};

/// Number of requests of a round.
const REQUESTS: usize = 20_000;

/// Number of rounds of each server.
const ROUNDS: usize = 9;

/// Prints the time and the CPU time of a request with metrics, relative to one without.
pub async fn metrics(paths: &Paths) -> Result<()> {
    let stub = Server::start(Command::new(&paths.stub).arg("--fast"))?;
    let plugins = plugin_folder(paths, &stub.url)?;
    let folders = [tempfile::tempdir()?, tempfile::tempdir()?];
    let [on, off] = &folders;
    let with = Server::start(&mut serve(
        paths,
        on.path(),
        plugins.path(),
        &["--metrics-max-tenants", "100"],
    ))?;
    let without =
        Server::start(&mut serve(paths, off.path(), plugins.path(), &["--metrics", "false"]))?;
    let http = Http::default();
    let input: String = (0..REQUESTS).map(|number| request_line(number) + "\n").collect();
    let (scraper, url) = (http.clone(), format!("{}/metrics", with.url));
    let mut scraping = JoinSet::new();
    scraping.spawn(async move {
        while scraper.send(Method::GET, &url, "text/plain", Bytes::new()).await.is_ok() {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    });
    let (mut times, mut cpus) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let mut measured = Vec::new();
        // The order changes, so that neither always follows the other.
        let servers = if round % 2 == 0 { [&with, &without] } else { [&without, &with] };
        for server in servers {
            let file = http.upload(&server.url, input.as_bytes()).await?;
            let (cpu, begun) = (server.cpu_seconds()?, Instant::now());
            let batch = run_batch(&http, &server.url, &file, "completed").await?;
            if batch.pointer("/request_counts/completed") != Some(&json!(REQUESTS)) {
                bail!("not every request was answered: {batch}");
            }
            measured.push((begun.elapsed().as_secs_f64(), server.cpu_seconds()? - cpu));
        }
        if round % 2 == 1 {
            measured.reverse();
        }
        let [(time_with, cpu_with), (time_without, cpu_without)] = measured[..] else { continue };
        times.push(time_with / time_without);
        cpus.push(cpu_with / cpu_without);
        let micros = |seconds: f64| seconds * 1e6 / REQUESTS as f64;
        say(&format!(
            "metrics {round}: with {time_with:.2} s and {:.0} us CPU a request, without \
             {time_without:.2} s and {:.0} us",
            micros(cpu_with),
            micros(cpu_without)
        ));
    }
    if scraping.try_join_next().is_some() {
        bail!("the scrapes have ended");
    }
    say(&format!(
        "metrics: {:.3} of the time and {:.3} of the CPU time without them (medians of {ROUNDS}); \
         the target is 1.02",
        median(times),
        median(cpus)
    ));
    Ok(())
}
