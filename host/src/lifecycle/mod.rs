//! Tests of the batch lifecycle with a real database, real components and a real provider process,
//! under a clock that the tests advance.
//!
//! The tests over HTTP are in the folder `tests` of the repository.

mod clock;
mod events;
mod lines;
mod tenants;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use batchwright_batch::{Engine, NewBatchRequest, NewFile, Service};
use batchwright_domain::ids::{BatchId, FileId, TenantId};
use batchwright_domain::settings::Given;
use batchwright_store::{BatchRecord, FileRecord};
use bytes::Bytes;
use proptest::test_runner::Config as ProptestConfig;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::assemble::{self, Options};
use crate::clock::Clock;
use crate::config::Settings;

const TENANT: &str = "default";
const CHAT: &str = "/v1/chat/completions";

/// Compile cache of all tests.
static CACHE: LazyLock<TempDir> = LazyLock::new(|| TempDir::new().unwrap());

/// Returns the path of a file that `cargo xtask build` has created.
fn built(path: &str) -> PathBuf {
    // Read at run time, because several checkouts may share one compiled test binary.
    let here =
        std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    let root = Path::new(&here).join("..");
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let built =
        path.strip_prefix("target/").map_or_else(|| root.join(path), |path| target.join(path));
    assert!(built.exists(), "{} is missing; run `cargo xtask build` first", built.display());
    built
}

/// Stub provider in a separate process.
struct StubProvider {
    child: Child,
    url: String,
}

impl StubProvider {
    fn start() -> Self {
        let mut child = Command::new(built("target/release/stub-provider"))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        Self { child, url: line.trim().rsplit(' ').next().unwrap().to_owned() }
    }

    /// Returns the number of requests for each prompt.
    async fn counts(&self) -> std::collections::BTreeMap<String, usize> {
        let connector = hyper_util::client::legacy::connect::HttpConnector::new();
        let client =
            hyper_util::client::legacy::Client::builder(hyper_util::rt::TokioExecutor::new())
                .build::<_, http_body_util::Empty<Bytes>>(connector);
        let answer = client.get(format!("{}/arrivals", self.url).parse().unwrap()).await.unwrap();
        let body = http_body_util::BodyExt::collect(answer.into_body()).await.unwrap().to_bytes();
        let arrivals: std::collections::BTreeMap<String, Vec<u64>> =
            serde_json::from_slice(&body).unwrap();
        arrivals.into_iter().map(|(prompt, times)| (prompt, times.len())).collect()
    }
}

impl Drop for StubProvider {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Server without HTTP, with the model `m` of a stub provider and the model `echo`.
struct TestServer {
    folder: TempDir,
    stub: StubProvider,
    clock: Clock,
    settings: String,
    /// Tenant of all calls.
    tenant: &'static str,
    running: Option<Arc<Engine>>,
}

impl TestServer {
    /// Starts a server with settings and plugin limits in TOML.
    async fn new(settings: &str, limits: &str) -> Self {
        let (folder, stub) = (TempDir::new().unwrap(), StubProvider::start());
        let plugins = folder.path().join("plugins");
        std::fs::create_dir(&plugins).unwrap();
        for file in [
            "validator-standard.wasm",
            "inference-openai.wasm",
            "inference-echo.wasm",
            "standard.toml",
            "echo.toml",
        ] {
            std::fs::copy(built("dist/plugins").join(file), plugins.join(file)).unwrap();
        }
        let text = format!(
            "component = \"inference-openai.wasm\"\nmodels = [\"m\"]\n\
             [settings]\nbase_url = \"{}/v1\"\n[limits]\n{limits}\n",
            stub.url
        );
        std::fs::write(plugins.join("provider.toml"), text).unwrap();
        let mut server = Self {
            folder,
            stub,
            clock: Clock::system(),
            settings: settings.into(),
            tenant: TENANT,
            running: None,
        };
        server.start().await;
        server
    }

    async fn start(&mut self) {
        let file = self.folder.path().join("settings.toml");
        std::fs::write(&file, &self.settings).unwrap();
        let mut settings = Settings::resolve(Given::default(), Some(&file)).unwrap();
        settings.storage.data = self.folder.path().join("data");
        settings.plugins.cache = Some(CACHE.path().to_owned());
        settings.plugins.plugins = Some(self.folder.path().join("plugins"));
        let engine = eventually("the data folder", async || {
            let options = Options {
                clock: self.clock.clone(),
                serials: None,
                order: None,
                compiler: Some(built("dist/batchwright")),
            };
            assemble::engine(&settings, options).await.ok()
        })
        .await;
        engine.start();
        self.running = Some(engine);
    }

    async fn restart(&mut self) {
        if let Some(running) = self.running.take() {
            running.close().await;
        }
        self.start().await;
    }

    /// Adds a plugin with a component from `cargo xtask build` and restarts the server.
    async fn add_plugin(&mut self, name: &str, component: &str, text: &str) {
        let plugins = self.folder.path().join("plugins");
        std::fs::copy(built(component), plugins.join(format!("{name}.wasm"))).unwrap();
        let text = format!("component = \"{name}.wasm\"\n{text}");
        std::fs::write(plugins.join(format!("{name}.toml")), text).unwrap();
        self.restart().await;
    }

    fn engine(&self) -> &Arc<Engine> {
        self.running.as_ref().unwrap()
    }

    fn service(&self) -> &Arc<Service> {
        self.engine().service()
    }

    fn tenant(&self) -> TenantId {
        self.tenant.into()
    }

    async fn upload(&self, bytes: &[u8], lifetime: Option<Duration>) -> FileRecord {
        let mut upload = self.service().upload(&self.tenant()).await.unwrap();
        upload.write(bytes).await.unwrap();
        let new = NewFile { filename: "in.jsonl".into(), purpose: "batch".into(), lifetime };
        upload.finish(new).await.unwrap()
    }

    /// Creates a batch of a file and returns the batch id.
    async fn create_of(&self, file: &FileRecord, output_lifetime: Option<Duration>) -> BatchId {
        let request = NewBatchRequest {
            input_file_id: file.id.clone(),
            endpoint: CHAT.into(),
            completion_window: "24h".into(),
            metadata: None,
            output_lifetime,
            idempotency_key: None,
            api_key: None,
        };
        self.service().create(&self.tenant(), request).await.unwrap().new.id
    }

    /// Creates a batch of lines and returns the batch id.
    async fn create(&self, lines: &[Value]) -> BatchId {
        let file = self.upload(&jsonl(lines), None).await;
        self.create_of(&file, None).await
    }

    /// Returns a batch with all its errors.
    async fn batch(&self, id: &BatchId) -> BatchRecord {
        let service = self.service();
        let mut batch = service.get(&self.tenant(), id).await.unwrap().unwrap();
        if batch.has_more_errors() {
            batch.errors = service.errors(&self.tenant(), id).await.unwrap();
        }
        batch
    }

    /// Waits until a batch meets a condition.
    async fn until(
        &self,
        id: &BatchId,
        what: &str,
        condition: impl Fn(&BatchRecord) -> bool,
    ) -> BatchRecord {
        eventually(what, async || Some(self.batch(id).await).filter(&condition)).await
    }

    /// Waits for the end of a batch.
    async fn ended(&self, id: &BatchId) -> BatchRecord {
        self.until(id, "the end of the batch", |batch| batch.status.is_final()).await
    }

    /// Returns the lines of a result file, or none if there is no file.
    async fn results(&self, id: Option<&FileId>) -> Vec<Value> {
        let Some(id) = id else { return Vec::new() };
        let size = self.service().content_size(&self.tenant(), id).await.unwrap();
        let bytes = self.service().content(&self.tenant(), id, 0..size).await.unwrap();
        let text = String::from_utf8(bytes.into()).unwrap();
        assert!(text.ends_with('\n'));
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

/// Returns a configuration with a number of cases, which `PROPTEST_CASES` overrides.
fn cases(number: u32) -> ProptestConfig {
    let cases =
        std::env::var("PROPTEST_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(number);
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

/// Polls until there is a value. For events that happen soon, in another thread or process.
async fn eventually<T>(what: &str, mut poll: impl AsyncFnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = poll().await {
            return found;
        }
        assert!(started.elapsed() < Duration::from_secs(30), "timed out waiting for {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn chat(custom_id: &str, model: &str, prompt: &str) -> Value {
    let body = json!({"model": model, "messages": [{"role": "user", "content": prompt}]});
    json!({"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body})
}

fn jsonl(lines: &[Value]) -> Vec<u8> {
    lines.iter().flat_map(|line| format!("{line}\n").into_bytes()).collect()
}

fn custom_ids(lines: &[Value]) -> Vec<&str> {
    lines.iter().map(|line| line["custom_id"].as_str().unwrap()).collect()
}

/// Returns the code of an error line, or the status of the provider's response.
fn code(line: &Value) -> String {
    line["error"]["code"]
        .as_str()
        .map_or_else(|| line["response"]["status_code"].to_string(), str::to_owned)
}
