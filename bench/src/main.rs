//! Benchmarks of `dist/batchwright`, each with a reference measured in the same run.
//!
//! Machines differ and are noisy, so the ratios count, not the absolute numbers.

mod keys;
mod limits;
mod metrics;
mod online;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use batchwright_bench::{Http, Server};
use bytes::Bytes;
use hyper::Method;
use serde_json::{Value, json};
use tokio::task::JoinSet;

/// Number of requests of a throughput round.
const REQUESTS: usize = 40_000;
/// Number of connections to the provider.
const CONNECTIONS: usize = 64;
/// Number of rounds; the median counts.
const ROUNDS: usize = 3;
/// Size of the input file of the validation benchmark, in bytes.
const VALIDATION_BYTES: usize = 200_000_000;

/// Programs under test, and their plugin directory.
struct Paths {
    host: PathBuf,
    plugins: PathBuf,
    stub: PathBuf,
}

#[tokio::main]
async fn main() -> Result<()> {
    let dist = PathBuf::from("dist");
    let stub = std::env::current_exe()?.with_file_name("stub-provider");
    let paths = Paths { host: dist.join("batchwright"), plugins: dist.join("plugins"), stub };
    match std::env::args().nth(1).as_deref() {
        None => {
            start(&paths).await?;
            throughput(&paths).await?;
            keys::keys(&paths).await?;
            online::online(&paths).await?;
            validation(&paths).await
        }
        Some("start") => start(&paths).await,
        Some("throughput") => throughput(&paths).await,
        Some("keys") => keys::keys(&paths).await,
        Some("metrics") => metrics::metrics(&paths).await,
        Some("online") => online::online(&paths).await,
        Some("validation") => validation(&paths).await,
        // Takes two minutes, so it runs only by name.
        Some("limits") => limits::limits(&paths).await,
        Some(other) => {
            bail!(
                "unknown benchmark `{other}`; known are start, throughput, keys, metrics, \
                 online, validation and limits"
            )
        }
    }
}

#[expect(clippy::print_stdout, reason = "benchmarks print their results")]
fn say(line: &str) {
    println!("{line}");
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

/// Creates a plugin directory: standard validator, echo, and the OpenAI adapter for a stub.
fn plugin_folder(paths: &Paths, stub: &str) -> Result<tempfile::TempDir> {
    let folder = tempfile::tempdir()?;
    for file in [
        "validator-standard.wasm",
        "inference-openai.wasm",
        "inference-echo.wasm",
        "standard.toml",
        "echo.toml",
    ] {
        std::fs::copy(paths.plugins.join(file), folder.path().join(file))
            .with_context(|| format!("{file} is not built"))?;
    }
    let openai = format!(
        "component = \"inference-openai.wasm\"\nmodels = [\"stub\"]\n\
         [settings]\nbase_url = \"{stub}/v1\"\n[limits]\nmax_in_flight = {CONNECTIONS}\n"
    );
    std::fs::write(folder.path().join("openai.toml"), openai)?;
    Ok(folder)
}

fn serve(paths: &Paths, data: &Path, plugins: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(&paths.host);
    command.args(["serve", "--listen", "127.0.0.1:0", "--log-filter", "warn"]);
    command.arg("--data").arg(data).arg("--plugins").arg(plugins).args(more);
    command
}

/// Measures the time from process start to the first 200 of `/health/ready`, with a warm cache.
async fn start(paths: &Paths) -> Result<()> {
    let data = tempfile::tempdir()?;
    let plugins = plugin_folder(paths, "http://127.0.0.1:9")?;
    let http = Http::default();
    let mut times = Vec::new();
    for round in 0..11 {
        let begun = Instant::now();
        let server = Server::start(&mut serve(paths, data.path(), plugins.path(), &[]))?;
        let ready =
            http.json(Method::GET, &format!("{}/health/ready", server.url), &Value::Null).await?;
        let took = begun.elapsed().as_secs_f64() * 1000.0;
        if ready.pointer("/plugins/loaded") != Some(&json!(3)) {
            bail!("not all plugins are loaded: {ready}");
        }
        if round == 0 {
            say(&format!("start: {took:.0} ms with an empty cache, which compiles three plugins"));
        } else {
            times.push(took);
        }
    }
    let (least, most) =
        (times.iter().copied().fold(f64::MAX, f64::min), times.iter().copied().fold(0.0, f64::max));
    say(&format!(
        "start: {:.0} ms to ready with a warm cache and three plugins \
         (median of 10, {least:.0} to {most:.0}); the target is 100",
        median(times)
    ));
    Ok(())
}

/// Returns one line of an input file.
fn request_line(number: usize) -> String {
    format!(
        "{{\"custom_id\":\"request-{number}\",\"method\":\"POST\",\
         \"url\":\"/v1/chat/completions\",\"body\":{{\"model\":\"stub\",\"messages\":[\
         {{\"role\":\"system\",\"content\":\"You are a helpful assistant.\"}},\
         {{\"role\":\"user\",\"content\":\
         \"What is the capital of France? This is question {number}.\"}}],\
         \"max_tokens\":100}}}}"
    )
}

/// Measures a whole batch (validate, adapter, exchange, durable result, finalize) against a client
/// that only does the HTTP exchanges.
async fn throughput(paths: &Paths) -> Result<()> {
    let stub = Server::start(Command::new(&paths.stub).arg("--fast"))?;
    let plugins = plugin_folder(paths, &stub.url)?;
    let data = tempfile::tempdir()?;
    let server = Server::start(&mut serve(paths, data.path(), plugins.path(), &[]))?;
    let http = Http::default();
    let input: String = (0..REQUESTS).map(|number| request_line(number) + "\n").collect();
    let mut ratios = Vec::new();
    for round in 0..ROUNDS {
        let raw = raw_client(&stub.url, |number| Bytes::from(request_line(number))).await?;
        let file = http.upload(&server.url, input.as_bytes()).await?;
        let cpu = server.cpu_seconds()?;
        let begun = Instant::now();
        let batch = run_batch(&http, &server.url, &file, "completed").await?;
        let rate = REQUESTS as f64 / begun.elapsed().as_secs_f64();
        let cpu = (server.cpu_seconds()? - cpu) * 1e6 / REQUESTS as f64;
        if batch.pointer("/request_counts/completed") != Some(&json!(REQUESTS)) {
            bail!("not every request was answered: {batch}");
        }
        ratios.push(rate / raw);
        say(&format!(
            "throughput {round}: raw client {raw:.0}/s, batch {rate:.0}/s, ratio {:.2}, \
             CPU {cpu:.0} us a request",
            rate / raw
        ));
    }
    let memory = server.peak_memory()? >> 20;
    say(&format!(
        "throughput: {:.2} of a raw client (median of {ROUNDS}, {REQUESTS} requests, \
         {CONNECTIONS} connections), peak memory {memory} MiB; the target is 0.5",
        median(ratios)
    ));
    Ok(())
}

/// Returns the requests a second of a client that sends bodies and drops the responses.
async fn raw_client(base: &str, body: fn(usize) -> Bytes) -> Result<f64> {
    let http = Http::default();
    let url = format!("{base}/v1/chat/completions");
    let begun = Instant::now();
    let mut clients = JoinSet::new();
    for connection in 0..CONNECTIONS {
        let (http, url) = (http.clone(), url.clone());
        clients.spawn(async move {
            for number in (connection..REQUESTS).step_by(CONNECTIONS) {
                let sent = http.send(Method::POST, &url, "application/json", body(number)).await?;
                ensure!(sent.0 == 200, "{url} answered {}", sent.0);
            }
            anyhow::Ok(())
        });
    }
    while let Some(done) = clients.join_next().await {
        done??;
    }
    Ok(REQUESTS as f64 / begun.elapsed().as_secs_f64())
}

/// Creates a batch and waits until it has the expected final status.
async fn run_batch(http: &Http, url: &str, file: &str, expected: &str) -> Result<Value> {
    let new = json!({
        "input_file_id": file,
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
    });
    let batch = http.json(Method::POST, &format!("{url}/v1/batches"), &new).await?;
    let id = batch.get("id").and_then(Value::as_str).context("a batch has an id")?.to_owned();
    loop {
        let batch = http.json(Method::GET, &format!("{url}/v1/batches/{id}"), &Value::Null).await?;
        let status = batch.get("status").and_then(Value::as_str).unwrap_or_default();
        if status == expected {
            return Ok(batch);
        }
        if matches!(status, "completed" | "failed" | "cancelled" | "expired") {
            bail!("the batch ended with another status than {expected}: {batch}");
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Measures the validation of a file whose last line is invalid, against `serde_json` on one core.
async fn validation(paths: &Paths) -> Result<()> {
    let mut input = String::with_capacity(VALIDATION_BYTES + 10_000);
    let mut number = 0;
    while input.len() < VALIDATION_BYTES {
        // About two kilobytes with some escapes: a prompt with a quoted passage.
        let passage = "The quick brown fox said: \\\"jump\\\" over the lazy dog.\\n".repeat(32);
        input.push_str(
            &request_line(number)
                .replace("This is question", &format!("{passage} This is question")),
        );
        input.push('\n');
        number += 1;
    }
    let lines = number;
    let mut natives = Vec::new();
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        for line in input.lines() {
            serde_json::from_str::<Checked>(line)?;
        }
        natives.push(input.len() as f64 / 1e6 / begun.elapsed().as_secs_f64());
    }
    input.push_str("{\"custom_id\":1}\n");
    let data = tempfile::tempdir()?;
    let plugins = plugin_folder(paths, "http://127.0.0.1:9")?;
    let more = ["--max-file-size", "1GiB", "--max-requests-per-file", "10000000"];
    let server = Server::start(&mut serve(paths, data.path(), plugins.path(), &more))?;
    let http = Http::default();
    let file = http.upload(&server.url, input.as_bytes()).await?;
    let mut rates = Vec::new();
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        run_batch(&http, &server.url, &file, "failed").await?;
        rates.push(input.len() as f64 / 1e6 / begun.elapsed().as_secs_f64());
    }
    let (native, rate) = (median(natives), median(rates));
    say(&format!(
        "validation: {rate:.0} MB/s on all cores ({} MB, {lines} lines), \
         serde_json on one core {native:.0} MB/s, ratio {:.2}, peak memory {} MiB; the target is 1",
        input.len() / 1_000_000,
        rate / native,
        server.peak_memory()? >> 20
    ));
    Ok(())
}

/// Fields that a native program would check.
#[derive(serde::Deserialize)]
#[expect(dead_code, reason = "the benchmark measures deserialization")]
struct Checked<'a> {
    custom_id: &'a str,
    method: &'a str,
    url: &'a str,
    body: Body<'a>,
}

#[derive(serde::Deserialize)]
#[expect(dead_code, reason = "the benchmark measures deserialization")]
struct Body<'a> {
    model: &'a str,
    messages: serde::de::IgnoredAny,
}
