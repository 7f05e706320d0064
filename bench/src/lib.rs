//! Shared by benchmarks and end-to-end tests: a plain HTTP client, and server processes that are
//! killed on drop.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Method, Request};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;

/// HTTP client that shares no code with the host.
#[derive(Clone)]
pub struct Http {
    client: Client<HttpConnector, Full<Bytes>>,
    key: Option<String>,
}

impl Default for Http {
    fn default() -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        Self { client: Client::builder(TokioExecutor::new()).build(connector), key: None }
    }
}

impl Http {
    /// Returns the client with an API key.
    pub fn with_key(self, key: &str) -> Self {
        Self { key: Some(format!("Bearer {key}")), ..self }
    }

    /// Sends a request with a content type; returns status and body.
    pub async fn send(
        &self,
        method: Method,
        url: &str,
        kind: &str,
        body: Bytes,
    ) -> Result<(u16, Bytes)> {
        let mut request = Request::builder().method(method).uri(url).header("content-type", kind);
        if let Some(key) = &self.key {
            request = request.header("authorization", key);
        }
        let response = self.client.request(request.body(Full::new(body))?).await?;
        let status = response.status().as_u16();
        Ok((status, response.into_body().collect().await?.to_bytes()))
    }

    /// Sends and receives JSON; fails unless the status is 200.
    pub async fn json(
        &self,
        method: Method,
        url: &str,
        body: &serde_json::Value,
    ) -> Result<serde_json::Value> {
        let body = if body.is_null() { Bytes::new() } else { Bytes::from(body.to_string()) };
        let (status, answer) = self.send(method, url, "application/json", body).await?;
        ensure!(status == 200, "{url} answered {status}: {}", String::from_utf8_lossy(&answer));
        Ok(serde_json::from_slice(&answer)?)
    }

    /// Uploads an input file and returns its id.
    pub async fn upload(&self, base: &str, content: &[u8]) -> Result<String> {
        let mut body = b"--edge\r\n\
            Content-Disposition: form-data; name=\"purpose\"\r\n\r\nbatch\r\n--edge\r\n\
            Content-Disposition: form-data; name=\"file\"; filename=\"in.jsonl\"\r\n\r\n"
            .to_vec();
        body.extend_from_slice(content);
        body.extend_from_slice(b"\r\n--edge--\r\n");
        let kind = "multipart/form-data; boundary=edge";
        let (status, answer) =
            self.send(Method::POST, &format!("{base}/v1/files"), kind, Bytes::from(body)).await?;
        ensure!(
            status == 200,
            "the upload was answered {status}: {}",
            String::from_utf8_lossy(&answer)
        );
        let file: serde_json::Value = serde_json::from_slice(&answer)?;
        Ok(file.get("id").and_then(|id| id.as_str()).context("a file has an id")?.to_owned())
    }
}

/// Server process that prints `listening on http://ADDR`; killed on drop.
pub struct Server {
    child: Child,
    /// Base URL, without a path.
    pub url: String,
}

impl Server {
    /// Starts a command and waits until it listens.
    pub fn start(command: &mut Command) -> Result<Self> {
        let mut child = command
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("failed to start {command:?}"))?;
        let output = child.stdout.take().context("standard output is piped")?;
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line)?;
        let Some(url) = line.trim().strip_prefix("listening on ") else {
            child.kill().ok();
            child.wait()?;
            anyhow::bail!("{command:?} does not listen; it printed {line:?}");
        };
        Ok(Self { url: url.to_owned(), child })
    }

    /// Returns the process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Returns the CPU time used so far, user and system, in seconds.
    pub fn cpu_seconds(&self) -> Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid()))?;
        // The name is in parentheses and may contain any character, so parsing starts after it.
        let fields: Vec<&str> =
            stat.rsplit_once(')').context("stat has a name")?.1.split_whitespace().collect();
        let ticks = |index: usize| {
            fields.get(index).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0)
        };
        // utime and stime, in ticks; Linux reports 100 ticks a second to user space.
        Ok((ticks(11) + ticks(12)) / 100.0)
    }

    /// Returns the peak resident memory, in bytes.
    pub fn peak_memory(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))
            .context("status has VmHWM")?;
        let kib: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
        Ok(kib * 1024)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
