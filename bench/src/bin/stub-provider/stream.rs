//! Streams of the stub: server-sent events in the form of the OpenAI API.
//!
//! A prompt that begins with `!stream-` is a command:
//!
//! - `!stream-error` sends an error as the first event of a 200
//! - `!stream-cut` cuts the connection after two events
//! - `!stream-slow N MS` sends N events of text, with a pause of MS milliseconds before each
//! - `!stream-key` sends the value of the header `authorization`, one letter in each event
//! - `!stream-none` answers without a stream

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame};
use serde_json::{Value, json};
use tokio::sync::mpsc;

/// Events of a stream, as they are sent.
pub struct Events(mpsc::Receiver<Result<Bytes, std::io::Error>>);

impl Body for Events {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        self.0.poll_recv(context).map(|event| event.map(|event| event.map(Frame::data)))
    }
}

/// Counts of streams.
#[derive(Default)]
pub struct Counts {
    begun: u64,
    complete: u64,
    /// Streams whose client has left.
    left: u64,
    /// Events sent.
    events: u64,
}

impl Counts {
    /// Returns the counts as JSON.
    pub fn to_json(&self) -> String {
        json!({"begun": self.begun, "complete": self.complete, "left": self.left,
            "events": self.events})
        .to_string()
    }
}

/// Events to send, and the pause before each.
struct Plan {
    events: Vec<String>,
    pause: Duration,
    is_cut: bool,
}

/// Returns true if a request asks for a stream.
pub fn is_wanted(body: &Value, prompt: &str) -> bool {
    body.get("stream") == Some(&Value::Bool(true)) && prompt != "!stream-none"
}

/// Begins the stream of a request.
pub fn begin(
    path: &str,
    body: &Value,
    (prompt, headers): (&str, &Value),
    counts: &Arc<Mutex<Counts>>,
) -> Events {
    let plan = plan(path, body, prompt, headers);
    let (sender, receiver) = mpsc::channel(1);
    let counts = counts.clone();
    tokio::spawn(async move {
        let count =
            |add: fn(&mut Counts)| add(&mut counts.lock().unwrap_or_else(PoisonError::into_inner));
        count(|counts| counts.begun += 1);
        for event in plan.events {
            tokio::time::sleep(plan.pause).await;
            if sender.send(Ok(Bytes::from(event))).await.is_err() {
                count(|counts| counts.left += 1);
                return;
            }
            count(|counts| counts.events += 1);
        }
        if plan.is_cut {
            sender.send(Err(std::io::Error::other("cut as requested"))).await.ok();
        }
        count(|counts| counts.complete += 1);
    });
    Events(receiver)
}

fn plan(path: &str, body: &Value, prompt: &str, headers: &Value) -> Plan {
    let words: Vec<&str> = prompt.split_whitespace().collect();
    let number = |index: usize| words.get(index).and_then(|word| word.parse::<u64>().ok());
    let command = words.first().copied().unwrap_or_default();
    let (mut texts, mut pause, mut is_cut) = (Vec::new(), Duration::ZERO, false);
    match command {
        "!stream-error" => {
            let error = json!({"error": {"message": "refused in the stream", "code": "server_error",
                "type": "server_error", "param": null}});
            return Plan { events: vec![format!("data: {error}\n\n")], pause, is_cut };
        }
        "!stream-slow" => {
            texts.extend((0..number(1).unwrap_or(1)).map(|number| format!("{number} ")));
            pause = Duration::from_millis(number(2).unwrap_or(0));
        }
        "!stream-key" => {
            let key = headers.get("authorization").and_then(Value::as_str).unwrap_or_default();
            texts.extend(key.chars().map(String::from));
        }
        _ => texts.extend(prompt.split_inclusive(' ').map(str::to_owned)),
    }
    if command == "!stream-cut" {
        texts = vec!["one ".into(), "two".into()];
        is_cut = true;
    }
    let events = if path.ends_with("/responses") {
        of_responses(&texts)
    } else {
        of_choices(path, body, &texts, is_cut)
    };
    Plan { events, pause, is_cut }
}

fn of_choices(path: &str, body: &Value, texts: &[String], is_cut: bool) -> Vec<String> {
    let is_chat = path.ends_with("/chat/completions");
    let object = if is_chat { "chat.completion.chunk" } else { "text_completion" };
    let chunk = |choices: Value, usage: Value| {
        let chunk = json!({"id": "chatcmpl-1", "object": object, "created": 1,
            "model": body.get("model"), "choices": choices, "usage": usage});
        format!("data: {chunk}\n\n")
    };
    let choice = |text: &str, end: Value| {
        let mut choice = json!({"index": 0, "finish_reason": end});
        let (key, value) = match is_chat {
            true => ("delta", json!({"content": text, "x_unknown": {"kept": true}})),
            false => ("text", json!(text)),
        };
        if let Some(members) = choice.as_object_mut() {
            members.insert(key.into(), value);
        }
        json!([choice])
    };
    let mut events: Vec<String> =
        texts.iter().map(|text| chunk(choice(text, Value::Null), Value::Null)).collect();
    if is_cut {
        return events;
    }
    events.push(chunk(choice("", json!("stop")), Value::Null));
    let wants_usage = body.pointer("/stream_options/include_usage") == Some(&Value::Bool(true));
    if wants_usage {
        let usage = json!({"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10});
        events.push(chunk(json!([]), usage));
    }
    events.push("data: [DONE]\n\n".into());
    events
}

fn of_responses(texts: &[String]) -> Vec<String> {
    let event = |kind: &str, more: Value| {
        let mut data = json!({"type": kind});
        if let (Some(data), Some(more)) = (data.as_object_mut(), more.as_object()) {
            data.extend(more.clone());
        }
        format!("event: {kind}\ndata: {data}\n\n")
    };
    let response = |status: &str, text: &str, usage: Value| {
        json!({"id": "resp_1", "object": "response", "status": status, "model": "m",
            "created_at": 1, "usage": usage, "output": [{"type": "message", "id": "msg_1",
            "role": "assistant", "status": status, "content": [{"type": "output_text",
            "text": text, "annotations": []}]}]})
    };
    let begun = json!({"response": response("in_progress", "", Value::Null), "sequence_number": 0});
    let mut events = vec![event("response.created", begun)];
    for (number, text) in texts.iter().enumerate() {
        let delta = json!({"item_id": "msg_1", "output_index": 0, "content_index": 0,
            "delta": text, "sequence_number": number + 1, "logprobs": []});
        events.push(event("response.output_text.delta", delta));
    }
    let usage = json!({"input_tokens": 7, "output_tokens": 3, "total_tokens": 10,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": 0}});
    let complete = json!({"response": response("completed", &texts.concat(), usage),
        "sequence_number": texts.len() + 1});
    events.push(event("response.completed", complete));
    events
}
