//! Stub provider over real HTTP: answers `/v1/chat/completions` and the other endpoints, and can
//! misbehave on request.
//!
//! A prompt that begins with `!` is a command:
//!
//! - `!fail STATUS TIMES [RETRY_AFTER]` answers with the status that many times, then normally
//! - `!status STATUS` answers with the status every time
//! - `!quota` answers as for an account without money
//! - `!delay MS` answers after a delay
//! - `!html` answers 200 with an HTML page, `!pretty` with JSON on many lines
//! - `!headers` answers with the headers of the request
//! - `!raw`, anywhere in the body, answers with the body as received, valid JSON or not
//! - `!close` cuts the connection, `!redirect URL` redirects
//! - `!big BYTES` answers with that many bytes
//!
//! Control endpoints of the tests:
//!
//! - `GET /arrivals` returns the arrival times of each prompt, in milliseconds since 1970
//! - `GET /load` returns the peak of requests in flight and the number of refused requests since
//!   the last call; `GET /load?N` refuses more than N requests in flight with 429 from then on
//! - `GET /mode?…` changes the behavior for all following requests; see [`Mode`]
//! - `GET /streams` returns how many streams have begun, are complete or were left by their client
//! - `GET /keys` returns the idempotency keys of each prompt
//!
//! `--port PORT` sets the port, so that a killed stub can return at its address.

mod mode;
mod stream;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http_body_util::{BodyExt, Either, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use mode::{Decision, Mode};

#[derive(Default)]
struct Stub {
    name: String,
    /// Answers every request immediately with the same bytes, for benchmarks.
    fast: bool,
    /// Arrival times of each prompt, in milliseconds since 1970.
    arrivals: Mutex<HashMap<String, Vec<u64>>>,
    /// Idempotency keys of each prompt, in order of arrival.
    keys: Mutex<HashMap<String, Vec<String>>>,
    load: Mutex<Load>,
    mode: Mutex<Mode>,
    /// Background responses by id: number of polls so far, and the final response.
    jobs: Mutex<HashMap<String, (u64, Value)>>,
    streams: Arc<Mutex<stream::Counts>>,
}

#[derive(Default)]
struct Load {
    in_flight: u64,
    peak: u64,
    refused: u64,
    limit: Option<u64>,
}

/// Request in flight; dropping it ends the count.
struct InFlight<'a>(&'a Mutex<Load>);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).in_flight -= 1;
    }
}

/// Body of an answer.
type Reply = Either<Full<Bytes>, stream::Events>;

type Answer = Result<Response<Reply>, String>;

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

#[expect(clippy::print_stdout, reason = "the parent process waits for the line")]
fn announce(line: &str) {
    use std::io::Write;
    println!("{line}");
    std::io::stdout().flush().ok();
}

impl Stub {
    /// Returns a refusal, with the `retry-after` of the mode.
    fn refuse(&self, status: u16) -> Response<Reply> {
        let code = if status == 402 { "insufficient_quota" } else { "refused" };
        let mut refusal = reply(status, error("refused for now", code));
        let retry_after = self.mode.lock().unwrap_or_else(PoisonError::into_inner).retry_after;
        if let Some(seconds) = retry_after.and_then(|seconds| seconds.to_string().parse().ok()) {
            refusal.headers_mut().insert("retry-after", seconds);
        }
        refusal
    }

    /// Creates a background response and returns it with the status `queued`.
    fn begin(&self, prompt: &str, count: u64, complete: Value) -> Response<Reply> {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        let id = format!("resp_{}_{count}", jobs.len());
        let mut begun = complete.clone();
        set(&mut begun, "id", &id);
        set(&mut begun, "status", "queued");
        set(&mut begun, "prompt", prompt);
        jobs.insert(id, (0, complete));
        reply(200, begun.to_string())
    }

    /// Returns a background response; it is complete at the third poll.
    fn poll(&self, id: &str) -> Response<Reply> {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((polls, complete)) = jobs.get_mut(id) else {
            return reply(404, error("no such response", "not_found"));
        };
        *polls += 1;
        let mut answer = complete.clone();
        set(&mut answer, "id", id);
        if *polls < 3 {
            set(&mut answer, "status", "in_progress");
        }
        reply(200, answer.to_string())
    }

    /// Counts a request as in flight; returns None above the limit.
    fn enter(&self) -> Option<InFlight<'_>> {
        let mut load = self.load.lock().unwrap_or_else(PoisonError::into_inner);
        if load.limit.is_some_and(|limit| load.in_flight >= limit) {
            load.refused += 1;
            return None;
        }
        load.in_flight += 1;
        load.peak = load.peak.max(load.in_flight);
        Some(InFlight(&self.load))
    }

    /// Answers a control endpoint, or a provider request as its prompt and the mode say.
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
            let body = json!({"most": load.peak, "refused": load.refused}).to_string();
            let limit = request.uri().query().and_then(|query| query.parse().ok()).or(load.limit);
            *load = Load { in_flight: load.in_flight, limit, ..Load::default() };
            return Ok(reply(200, body));
        }
        if path == "/keys" {
            return Ok(reply(
                200,
                json!(*self.keys.lock().unwrap_or_else(PoisonError::into_inner)).to_string(),
            ));
        }
        if path == "/streams" {
            let counts = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
            return Ok(reply(200, counts.to_json()));
        }
        if path == "/mode" {
            let mode = Mode::parse(request.uri().query().unwrap_or_default());
            *self.mode.lock().unwrap_or_else(PoisonError::into_inner) = mode;
            return Ok(reply(200, "{}"));
        }
        if let Some(id) = path.strip_prefix("/v1/responses/") {
            let decision =
                self.mode.lock().unwrap_or_else(PoisonError::into_inner).decide(&headers);
            if let Decision::Refused(status) = decision {
                return Ok(reply(status, error("refused for now", "refused")));
            }
            return Ok(self.poll(id));
        }
        let body =
            request.into_body().collect().await.map_err(|error| error.to_string())?.to_bytes();
        if self.fast {
            return Ok(reply(200, Bytes::from_static(FAST_RESPONSE.as_bytes())));
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
            #[expect(clippy::disallowed_methods, reason = "a provider has a clock of its own")]
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            times.push(u64::try_from(now.as_millis()).unwrap_or(u64::MAX));
            times.len() as u64
        };
        if let Some(key) = headers.get("idempotency-key").and_then(Value::as_str) {
            let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
            keys.entry(prompt.clone()).or_default().push(key.to_owned());
        }
        let decision = self.mode.lock().unwrap_or_else(PoisonError::into_inner).decide(&headers);
        match decision {
            Decision::Refused(status) => return Ok(self.refuse(status)),
            Decision::Hangs => std::future::pending().await,
            Decision::After(latency) => tokio::time::sleep(latency).await,
        }
        let Some(_in_flight) = self.enter() else {
            return Ok(reply(429, error("too many requests in flight", "rate_limit_exceeded")));
        };
        if stream::is_wanted(&body, &prompt) {
            let begun = (prompt.as_str(), &headers);
            let events = stream::begin(&path, &body, begun, &self.streams);
            let mut response = Response::new(Either::Right(events));
            let kind = hyper::header::HeaderValue::from_static("text/event-stream; charset=utf-8");
            response.headers_mut().insert("content-type", kind);
            return Ok(response);
        }
        let complete = answer_to(&path, &body, &format!("{}: {prompt}", self.name));
        if body.get("background") == Some(&Value::Bool(true)) {
            return Ok(self.begin(&prompt, count, complete));
        }
        let Some(command) = prompt.strip_prefix('!') else {
            return Ok(reply(200, complete.to_string()));
        };
        let words: Vec<&str> = command.split_whitespace().collect();
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
            "status" => Ok(reply(status, error("refused as requested", "ordered"))),
            "quota" => Ok(reply(429, error("no money left", "insufficient_quota"))),
            "delay" => {
                tokio::time::sleep(Duration::from_millis(number(1).unwrap_or(0))).await;
                Ok(reply(200, complete.to_string()))
            }
            "html" => Ok(reply(200, "<html>an error page</html>")),
            "pretty" => Ok(reply(200, format!("{complete:#}"))),
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
            "close" => Err("closed as requested".into()),
            _ => Ok(reply(200, complete.to_string())),
        }
    }
}

/// Response of a model server to a short question.
const FAST_RESPONSE: &str = concat!(
    r#"{"id":"chatcmpl-0123456789","object":"chat.completion","created":1700000000,"#,
    r#""model":"stub","choices":[{"index":0,"message":{"role":"assistant","content":"#,
    r#""Paris is the capital of France, and has been for most of its history.","#,
    r#""refusal":null},"logprobs":null,"finish_reason":"stop"}],"#,
    r#""usage":{"prompt_tokens":14,"completion_tokens":16,"total_tokens":30,"#,
    r#""prompt_tokens_details":{"cached_tokens":0},"#,
    r#""completion_tokens_details":{"reasoning_tokens":0}},"system_fingerprint":null}"#,
);

fn reply(status: u16, body: impl Into<Bytes>) -> Response<Reply> {
    let mut response = Response::new(Either::Left(Full::new(body.into())));
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

/// Returns a response with the request body as received, if the body asks for it.
fn raw(body: &[u8]) -> Option<String> {
    let body = std::str::from_utf8(body).ok().filter(|body| body.contains("!raw"))?;
    Some(format!(
        "{{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion\",\"created\":1,\
         \"model\":\"raw\",\"choices\":[{{\"index\":0,\"message\":\
         {{\"role\":\"assistant\",\"content\":\"raw\"}},\"finish_reason\":\"stop\"}}],\
         \"sent\":{body}}}"
    ))
}

/// Returns the text of the last message, or the prompt, or the input.
fn prompt(body: &Value) -> String {
    let last = body.get("messages").and_then(Value::as_array).and_then(|messages| messages.last());
    let found = last
        .and_then(|message| message.get("content"))
        .or(body.get("prompt"))
        .or(body.get("input"));
    found.and_then(Value::as_str).unwrap_or_default().to_owned()
}

/// Returns the response of an endpoint to a body, with a text as its content.
fn answer_to(path: &str, body: &Value, text: &str) -> Value {
    let model = body.get("model").cloned().unwrap_or_default();
    let usage = json!({"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 2},
        "completion_tokens_details": {"reasoning_tokens": 1}});
    match path.rsplit('/').next() {
        Some("embeddings") => {
            json!({"object": "list", "model": model,
            "usage": {"prompt_tokens": 7, "total_tokens": 7},
            "data": [{"object": "embedding", "index": 0, "embedding": [0.5, -0.5]}]})
        }
        Some("responses") => {
            json!({"id": "resp_1", "object": "response", "model": model, "status": "completed",
            "output": [{"type": "message", "role": "assistant",
                "content": [{"type": "output_text", "text": text}]}],
            "usage": {"input_tokens": 7, "output_tokens": 3, "total_tokens": 10}})
        }
        Some("moderations") => {
            json!({"id": "modr-1", "model": model, "results": [{"flagged": false}]})
        }
        _ => {
            json!({"id": "chatcmpl-1", "object": "chat.completion", "created": 1,
            "model": model, "usage": usage,
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text},
                "finish_reason": "stop"}]})
        }
    }
}
