//! Stands in for a provider, over real HTTP: answers `/v1/chat/completions` and the other endpoints, and can be told to misbehave.
//!
//! A prompt that begins with `!` is an order:
//! `!fail STATUS TIMES [RETRY_AFTER]` answers with the status that many times before it answers well; `!status STATUS` always;
//! `!quota` is an account without money; `!delay MS` waits; `!html` answers 200 with a page; `!pretty` with many lines;
//! `!headers` with the request's headers; `!raw` anywhere in the body with the body as it came, whether it can be parsed here or not; `!close` cuts the connection; `!redirect URL` sends elsewhere; `!big BYTES` answers at length.
//! `GET /arrivals` tells when each prompt came, each time, in milliseconds since 1970. `GET /load` tells how many requests were under way at
//! once at the most, and how many were refused, since it was last asked; `GET /load?N` has more than N at once refused with 429 from then on.
//! `GET /mode?…` has it behave otherwise from then on; see [`Mode`]. `GET /keys` tells the idempotency keys that each prompt came with.
//! `--port PORT` has it listen there, so that it can come back after it was killed.

mod mode;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use mode::{Mode, Taken};

#[derive(Default)]
struct Stub {
    name: String,
    /// Answers with the same bytes at once, for measuring.
    fast: bool,
    arrivals: Mutex<HashMap<String, Vec<u64>>>,
    keys: Mutex<HashMap<String, Vec<String>>>,
    load: Mutex<Load>,
    mode: Mutex<Mode>,
    /// Responses being made in the background: how often each was asked for.
    jobs: Mutex<HashMap<String, (u64, Value)>>,
}

#[derive(Default)]
struct Load {
    now: u64,
    most: u64,
    refused: u64,
    limit: Option<u64>,
}

/// A request under way.
struct UnderWay<'a>(&'a Mutex<Load>);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).now -= 1;
    }
}

type Answer = Result<Response<Full<Bytes>>, String>;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut stub = Stub { name: "stub".into(), ..Stub::default() };
    let mut port = 0;
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--fast" => stub.fast = true,
            "--name" => stub.name = arguments.next().unwrap_or_default(),
            "--port" => port = arguments.next().unwrap_or_default().parse()?,
            other => anyhow::bail!(
                "unknown argument `{other}`; known are --fast, --name NAME and --port PORT"
            ),
        }
    }
    let listener = TcpListener::bind(("127.0.0.1", port)).await?;
    announce(&format!("listening on http://{}", listener.local_addr()?));
    let stub = Arc::new(stub);
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let stub = stub.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let stub = stub.clone();
                async move { stub.answer(request).await }
            });
            auto::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), service)
                .await
                .ok();
        });
    }
}

#[expect(clippy::print_stdout, reason = "whoever starts this waits for the line")]
fn announce(line: &str) {
    use std::io::Write;
    println!("{line}");
    std::io::stdout().flush().ok();
}

impl Stub {
    /// Refuses a request, with what the mode says of the time until it is taken.
    fn refuse(&self, status: u16) -> Response<Full<Bytes>> {
        let code = if status == 402 { "insufficient_quota" } else { "refused" };
        let mut refusal = reply(status, error("refused for now", code));
        let retry_after = self.mode.lock().unwrap_or_else(PoisonError::into_inner).retry_after;
        if let Some(seconds) = retry_after.and_then(|seconds| seconds.to_string().parse().ok()) {
            refusal.headers_mut().insert("retry-after", seconds);
        }
        refusal
    }

    /// Begins to make a response in the background.
    fn begin(&self, prompt: &str, count: u64, well: Value) -> Response<Full<Bytes>> {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        let id = format!("resp_{}_{count}", jobs.len());
        let mut begun = well.clone();
        set(&mut begun, "id", &id);
        set(&mut begun, "status", "queued");
        set(&mut begun, "prompt", prompt);
        jobs.insert(id, (0, well));
        reply(200, begun.to_string())
    }

    /// Says how far a response is that is made in the background: it takes two questions.
    fn poll(&self, id: &str) -> Response<Full<Bytes>> {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((asked, well)) = jobs.get_mut(id) else {
            return reply(404, error("no such response", "not_found"));
        };
        *asked += 1;
        let mut answer = well.clone();
        set(&mut answer, "id", id);
        if *asked < 3 {
            set(&mut answer, "status", "in_progress");
        }
        reply(200, answer.to_string())
    }

    /// Counts a request in, unless there are too many.
    fn enter(&self) -> Option<UnderWay<'_>> {
        let mut load = self.load.lock().unwrap_or_else(PoisonError::into_inner);
        if load.limit.is_some_and(|limit| load.now >= limit) {
            load.refused += 1;
            return None;
        }
        load.now += 1;
        load.most = load.most.max(load.now);
        Some(UnderWay(&self.load))
    }

    async fn answer(&self, request: Request<Incoming>) -> Answer {
        let path = request.uri().path().to_owned();
        let headers: Value = request
            .headers()
            .iter()
            .map(|(name, value)| {
                (name.to_string(), Value::from(String::from_utf8_lossy(value.as_bytes())))
            })
            .collect::<serde_json::Map<_, _>>()
            .into();
        if path == "/arrivals" {
            return Ok(reply(
                200,
                json!(*self.arrivals.lock().unwrap_or_else(PoisonError::into_inner)).to_string(),
            ));
        }
        if path == "/load" {
            let mut load = self.load.lock().unwrap_or_else(PoisonError::into_inner);
            let said = json!({"most": load.most, "refused": load.refused}).to_string();
            let limit = request.uri().query().and_then(|query| query.parse().ok()).or(load.limit);
            *load = Load { now: load.now, limit, ..Load::default() };
            return Ok(reply(200, said));
        }
        if path == "/keys" {
            return Ok(reply(
                200,
                json!(*self.keys.lock().unwrap_or_else(PoisonError::into_inner)).to_string(),
            ));
        }
        if path == "/mode" {
            let mode = Mode::parse(request.uri().query().unwrap_or_default());
            *self.mode.lock().unwrap_or_else(PoisonError::into_inner) = mode;
            return Ok(reply(200, "{}"));
        }
        if let Some(id) = path.strip_prefix("/v1/responses/") {
            let taken = self.mode.lock().unwrap_or_else(PoisonError::into_inner).take(&headers);
            if let Taken::Refused(status) = taken {
                return Ok(reply(status, error("refused for now", "refused")));
            }
            return Ok(self.poll(id));
        }
        let body =
            request.into_body().collect().await.map_err(|error| error.to_string())?.to_bytes();
        if self.fast {
            return Ok(reply(200, Bytes::from_static(FAST.as_bytes())));
        }
        if let Some(answer) = raw(&body) {
            return Ok(reply(200, answer));
        }
        let Ok(body) = serde_json::from_slice::<Value>(&body) else {
            return Ok(reply(400, error("the body is not JSON", "invalid_json")));
        };
        let prompt = prompt(&body);
        let count = {
            let mut arrivals = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
            let times = arrivals.entry(prompt.clone()).or_default();
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            times.push(u64::try_from(now.as_millis()).unwrap_or(u64::MAX));
            times.len() as u64
        };
        if let Some(key) = headers.get("idempotency-key").and_then(Value::as_str) {
            let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
            keys.entry(prompt.clone()).or_default().push(key.to_owned());
        }
        let taken = self.mode.lock().unwrap_or_else(PoisonError::into_inner).take(&headers);
        match taken {
            Taken::Refused(status) => return Ok(self.refuse(status)),
            Taken::Hangs => std::future::pending().await,
            Taken::After(latency) => tokio::time::sleep(latency).await,
        }
        let Some(_under_way) = self.enter() else {
            return Ok(reply(429, error("too many at once", "rate_limit_exceeded")));
        };
        let well = answer_to(&path, &body, &format!("{}: {prompt}", self.name));
        if body.get("background") == Some(&Value::Bool(true)) {
            return Ok(self.begin(&prompt, count, well));
        }
        let Some(order) = prompt.strip_prefix('!') else { return Ok(reply(200, well.to_string())) };
        let words: Vec<&str> = order.split_whitespace().collect();
        let number = |index: usize| words.get(index).and_then(|word| word.parse::<u64>().ok());
        let status = u16::try_from(number(1).unwrap_or(500)).unwrap_or(500);
        match words.first().copied().unwrap_or_default() {
            "fail" if count <= number(2).unwrap_or(1) => {
                let mut refusal = reply(status, error("try again", "rate_limit_exceeded"));
                if let Some(seconds) = words.get(3).and_then(|word| word.parse().ok()) {
                    refusal.headers_mut().insert("retry-after", seconds);
                }
                Ok(refusal)
            }
            "status" => Ok(reply(status, error("refused as ordered", "ordered"))),
            "quota" => Ok(reply(429, error("no money left", "insufficient_quota"))),
            "delay" => {
                tokio::time::sleep(Duration::from_millis(number(1).unwrap_or(0))).await;
                Ok(reply(200, well.to_string()))
            }
            "html" => Ok(reply(200, "<html>an error page</html>")),
            "pretty" => Ok(reply(200, format!("{well:#}"))),
            "headers" => Ok(reply(200, answer_to(&path, &body, &headers.to_string()).to_string())),
            "redirect" => {
                let mut elsewhere = reply(307, "");
                if let Some(url) = words.get(1).and_then(|url| url.parse().ok()) {
                    elsewhere.headers_mut().insert("location", url);
                }
                Ok(elsewhere)
            }
            "big" => {
                let length = usize::try_from(number(1).unwrap_or(0)).unwrap_or(0);
                Ok(reply(200, answer_to(&path, &body, &"x".repeat(length)).to_string()))
            }
            "close" => Err("closed as ordered".into()),
            _ => Ok(reply(200, well.to_string())),
        }
    }
}

/// What a model server says to a short question.
const FAST: &str = r#"{"id":"chatcmpl-0123456789","object":"chat.completion","created":1700000000,"model":"stub","choices":[{"index":0,"message":{"role":"assistant","content":"Paris is the capital of France, and has been for most of its history.","refusal":null},"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":14,"completion_tokens":16,"total_tokens":30,"prompt_tokens_details":{"cached_tokens":0},"completion_tokens_details":{"reasoning_tokens":0}},"system_fingerprint":null}"#;

fn reply(status: u16, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = hyper::StatusCode::from_u16(status).unwrap_or_default();
    let headers = response.headers_mut();
    headers.insert("content-type", hyper::header::HeaderValue::from_static("application/json"));
    headers.insert("x-request-id", hyper::header::HeaderValue::from_static("req_stub"));
    response
}

fn set(object: &mut Value, key: &str, value: &str) {
    if let Some(object) = object.as_object_mut() {
        object.insert(key.to_owned(), value.into());
    }
}

fn error(message: &str, code: &str) -> String {
    json!({"error": {"message": message, "type": "stub_error", "param": null, "code": code}})
        .to_string()
}

/// An answer that holds the request's body as it came, if that asks for it.
fn raw(body: &[u8]) -> Option<String> {
    let body = std::str::from_utf8(body).ok().filter(|body| body.contains("!raw"))?;
    Some(format!(
        r#"{{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"raw","choices":[{{"index":0,"message":{{"role":"assistant","content":"raw"}},"finish_reason":"stop"}}],"sent":{body}}}"#
    ))
}

/// The last message's text, or the prompt, or the input.
fn prompt(body: &Value) -> String {
    let last = body.get("messages").and_then(Value::as_array).and_then(|messages| messages.last());
    let found = last
        .and_then(|message| message.get("content"))
        .or(body.get("prompt"))
        .or(body.get("input"));
    found.and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn answer_to(path: &str, body: &Value, text: &str) -> Value {
    let model = body.get("model").cloned().unwrap_or_default();
    let usage = json!({"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 2}, "completion_tokens_details": {"reasoning_tokens": 1}});
    match path.rsplit('/').next() {
        Some("embeddings") => {
            json!({"object": "list", "model": model, "usage": {"prompt_tokens": 7, "total_tokens": 7},
            "data": [{"object": "embedding", "index": 0, "embedding": [0.5, -0.5]}]})
        }
        Some("responses") => {
            json!({"id": "resp_1", "object": "response", "model": model, "status": "completed",
            "output": [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}],
            "usage": {"input_tokens": 7, "output_tokens": 3, "total_tokens": 10}})
        }
        Some("moderations") => {
            json!({"id": "modr-1", "model": model, "results": [{"flagged": false}]})
        }
        _ => {
            json!({"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": model, "usage": usage,
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]})
        }
    }
}
