//! An adapter that does, request by request, what no adapter should: the host must contain each.
//!
//! The request's `custom_id` says what to do.

#![expect(clippy::panic, reason = "a trap is one of the things to contain")]

mod bindings;

use std::cell::Cell;

use bindings::exports::batchwright::plugin::{
    inference::{self, Answer, Exchange, Header, HttpRequest, Outcome, Pause, Response, Step},
    plugin,
};

struct Component;

thread_local! {
    /// Requests this instance has seen.
    static SEEN: Cell<u64> = const { Cell::new(0) };
}

impl plugin::Guest for Component {
    fn describe() -> plugin::Description {
        plugin::Description {
            name: "hostile".into(),
            version: "0.0.1".into(),
            summary: "Does what no adapter should".into(),
            endpoints: Vec::new(),
            credentials: Vec::new(),
            settings_schema: r#"{"type":"object"}"#.into(),
        }
    }

    fn configure(settings: String) -> Result<(), String> {
        if settings.contains("refuse") { Err("these settings are refused".into()) } else { Ok(()) }
    }
}

impl inference::Guest for Component {
    fn begin(request: inference::Request) -> Step {
        SEEN.set(SEEN.get() + 1);
        let (order, url) = request.custom_id.split_once(' ').unwrap_or((&request.custom_id, ""));
        match order {
            "loop" => loop {
                std::hint::black_box(0);
            },
            "memory" => {
                let mut held = Vec::new();
                loop {
                    held.push(std::hint::black_box(vec![1_u8; 1 << 20]));
                }
            }
            "trap" => panic!("as ordered"),
            "recursion" => done(200, format!(r#"{{"depth":{}}}"#, depth(0))),
            "gigantic" => done(200, format!(r#"{{"x":"{}"}}"#, "x".repeat(4 << 20))),
            "not-json" => done(200, "{oops".into()),
            "not-object" => done(200, "[]".into()),
            "bad-status" => done(7, "{}".into()),
            "endless" => pause(),
            "big-state" => Step::Wait(Pause { milliseconds: 0, state: vec![0; 1 << 20] }),
            "send" => send(url, Vec::new()),
            "header" => send(url, vec![("x-a", "1\r\nx-forged: 2")]),
            "forged" => send(
                url,
                vec![
                    ("host", "evil.example"),
                    ("content-length", "1"),
                    ("transfer-encoding", "chunked"),
                    ("x-fine", "1"),
                ],
            ),
            _ => done(200, format!(r#"{{"seen":{}}}"#, SEEN.get())),
        }
    }

    fn resume(state: Vec<u8>, outcome: Outcome) -> Step {
        match outcome {
            Outcome::Elapsed if state == b"endless" => pause(),
            Outcome::Elapsed => done(200, "{}".into()),
            Outcome::Response(response) => done(200, String::from_utf8_lossy(&response.body).into_owned()),
            Outcome::Error(error) => {
                let message = error.message.replace(['"', '\\'], "'");
                done(500, format!(r#"{{"error":{{"message":"{:?}: {message}"}}}}"#, error.fault))
            }
        }
    }
}

fn done(status: u16, body: String) -> Step {
    Step::Done(Answer::Response(Response { status, request_id: None, body, usage: None }))
}

fn pause() -> Step {
    Step::Wait(Pause { milliseconds: 0, state: b"endless".to_vec() })
}

fn send(url: &str, headers: Vec<(&str, &str)>) -> Step {
    let headers = headers.into_iter().map(|(name, value)| Header { name: name.into(), value: value.into() }).collect();
    let body = br#"{"messages":[{"content":"!headers"}]}"#.to_vec();
    let request = HttpRequest { method: "POST".into(), url: url.into(), headers, body };
    Step::Send(Exchange { request, state: Vec::new() })
}

/// Recursion that no optimizer turns into a loop.
fn depth(level: u64) -> u64 {
    let space = std::hint::black_box([level; 64]);
    space.iter().sum::<u64>().wrapping_add(if level == u64::MAX { 0 } else { depth(level + 1) })
}
