//! Hostile adapter: each request runs one attack, which the host must contain.
//!
//! The `custom_id` of a request names the attack and its argument. Attacks on CPU time, memory,
//! the contract, egress and the log are in `begin` and `resume`. Attacks before the first
//! request (loading, `describe`, instantiation) are components of their own, in `wat/`.
//! `tests/python/test_containment.py` and `test_egress.py` hold the expected error of each attack.

#![expect(clippy::panic, reason = "a trap is one of the attacks")]

mod bindings;

use std::cell::{Cell, RefCell};

use bindings::batchwright::plugin::logging::{Level, log};
use bindings::exports::batchwright::plugin::{
    inference::{
        self, Answer, Exchange, Failure, Header, HttpRequest, Outcome, Pause, Response, Step,
        TransportFault,
    },
    plugin,
};

struct Component;

thread_local! {
    /// Number of requests that this instance has processed.
    static SEEN: Cell<u64> = const { Cell::new(0) };
    /// Settings and bodies seen so far, for the attack that shows them in a later request.
    static KEPT: RefCell<Vec<String>> = RefCell::default();
}

impl plugin::Guest for Component {
    fn describe() -> plugin::Description {
        plugin::Description {
            name: "hostile".into(),
            version: "0.0.1".into(),
            summary: "Does what no adapter should".into(),
            endpoints: Vec::new(),
            credentials: vec![plugin::Credential {
                name: "api_key".into(),
                header: "authorization".into(),
                prefix: "Bearer ".into(),
                required: false,
            }],
            // A default that names a host must not allow egress to that host.
            settings_schema:
                r#"{"type":"object","properties":{"home":{"default":"http://169.254.169.254/"}}}"#
                    .into(),
        }
    }

    fn configure(settings: String) -> Result<(), String> {
        KEPT.with_borrow_mut(|kept| kept.push(settings.clone()));
        match settings {
            settings if settings.contains("refuse") => Err("these settings are refused".into()),
            settings if settings.contains("trap") => panic!("as requested"),
            settings if settings.contains("loop") => forever(),
            _ => Ok(()),
        }
    }
}

impl inference::Guest for Component {
    fn begin(request: inference::Request) -> Step {
        SEEN.set(SEEN.get() + 1);
        if KEPT.with_borrow(|kept| kept.iter().any(|text| text.contains("spin"))) {
            forever();
        }
        KEPT.with_borrow_mut(|kept| kept.push(request.body.clone()));
        let (attack, argument) =
            request.custom_id.split_once(' ').unwrap_or((&request.custom_id, ""));
        match attack {
            "loop" => forever(),
            "memory" => {
                log(Level::Warn, "fills its memory");
                let mut held = Vec::new();
                loop {
                    held.push(std::hint::black_box(vec![1_u8; 1 << 20]));
                }
            }
            "trap" => panic!("as requested"),
            "recursion" => done(200, format!(r#"{{"depth":{}}}"#, depth(0))),
            "gigantic" => done(200, format!(r#"{{"x":"{}"}}"#, "x".repeat(20 << 20))),
            "many" => many(),
            "headers" => {
                let headers = [("host", "x"); 30_000];
                send("POST", argument, &headers, attack)
            }
            "inflate" => match send("POST", argument, &[], attack) {
                Step::Send(mut exchange) => {
                    exchange.request.body = vec![b'x'; 12 << 20];
                    Step::Send(exchange)
                }
                step => step,
            },
            "not-utf8" => done(200, broken_text(b"{\"x\":\"\xff\xfe\"}")),
            "not-utf8-failure" => fail(&broken_text(b"\xff"), broken_text(b"\xc3\x28")),
            "not-json" => done(200, "{oops".into()),
            "not-object" => done(200, "[]".into()),
            "two-lines" => done(200, "{\"x\":\n\"y\"}\r\n".into()),
            "bad-status" => done(7, "{}".into()),
            "long-failure" => fail(&"c".repeat(100_000), "m\n\u{1b}[31m".repeat(100_000)),
            "endless" => pause(),
            "big-state" => Step::Wait(Pause { milliseconds: 0, state: vec![0; 1 << 20] }),
            "wait-forever" => Step::Wait(Pause { milliseconds: u64::MAX, state: Vec::new() }),
            "retry-forever" => Step::Retry(inference::Advice {
                after_milliseconds: Some(u64::MAX),
                otherwise: Answer::Failure(Failure {
                    code: "tired".into(),
                    message: "No attempt is left.".into(),
                }),
            }),
            "log" => {
                for line in 0..10_000 {
                    let message = format!(
                        "line {line}\n2026-01-01T00:00:00Z ERROR forged\u{1b}[2J {}",
                        "x".repeat(5000)
                    );
                    log(Level::Error, &message);
                }
                done(200, "{}".into())
            }
            "kept" => done(
                200,
                format!(r#"{{"kept":{}}}"#, KEPT.with_borrow(|kept| quoted(&kept.concat()))),
            ),
            "send" | "follow" | "memory-after" | "loop-after" => {
                send("POST", argument, &[], attack)
            }
            "job" => send("POST", argument, &[], &request.custom_id),
            "method" => send("GET / HTTP/1.1\r\nx: ", argument, &[], attack),
            "header-value" => send("POST", argument, &[("x-a", "1\r\nx-forged: 2")], attack),
            "header-name" => send("POST", argument, &[("x-a: 1\r\nx-forged", "2")], attack),
            "forged" => {
                let headers = [
                    ("host", "evil.example"),
                    ("content-length", "1"),
                    ("transfer-encoding", "chunked"),
                    ("authorization", "Bearer forged"),
                    ("Authorization", "Bearer forged too"),
                    ("accept-encoding", "gzip"),
                    ("connection", "x-fine"),
                    ("x-fine", "1"),
                ];
                send("POST", argument, &headers, attack)
            }
            _ => done(200, format!(r#"{{"seen":{}}}"#, SEEN.get())),
        }
    }

    fn resume(state: Vec<u8>, outcome: Outcome) -> Step {
        let attack = String::from_utf8_lossy(&state).into_owned();
        match (attack.split_once(' '), &outcome) {
            (Some(("job", url)), Outcome::Response(_)) => {
                let state = format!("poll {url}").into_bytes();
                return Step::Wait(Pause { milliseconds: 100, state });
            }
            (Some(("poll", url)), Outcome::Elapsed) => return send("GET", url, &[], &attack),
            // Ends a refused poll, where a careful adapter asks for a retry.
            (Some(("poll", _)), Outcome::Response(response)) => {
                let body = String::from_utf8_lossy(&response.body).into_owned();
                return done(response.status, body);
            }
            _ => {}
        }
        match outcome {
            Outcome::Elapsed if attack == "endless" => pause(),
            Outcome::Elapsed => done(200, "{}".into()),
            Outcome::Response(_) if attack == "loop-after" => forever(),
            Outcome::Response(response) if attack == "memory-after" => {
                // Returns and logs all that the guest received: no secret may be in it.
                let headers = response
                    .headers
                    .iter()
                    .map(|header| format!("{}: {}\n", header.name, header.value));
                let seen = format!(
                    "{}{}",
                    headers.collect::<String>(),
                    String::from_utf8_lossy(&response.body)
                );
                log(Level::Warn, &seen);
                done(200, format!(r#"{{"seen":{}}}"#, quoted(&seen)))
            }
            Outcome::Response(response) => {
                let location = response.headers.iter().find(|header| header.name == "location");
                match location.filter(|_| attack == "follow") {
                    Some(location) => send("GET", &location.value, &[], "followed"),
                    None if (300..400).contains(&response.status) => {
                        done(200, r#"{"redirect":"not followed"}"#.into())
                    }
                    None => done(200, String::from_utf8_lossy(&response.body).into_owned()),
                }
            }
            Outcome::Error(error) => {
                let fault = match error.fault {
                    TransportFault::NameResolution => "name-resolution",
                    TransportFault::Connection => "connection",
                    TransportFault::Tls => "tls",
                    TransportFault::Timeout => "timeout",
                    TransportFault::Protocol => "protocol",
                    TransportFault::TooLarge => "too-large",
                    TransportFault::NotAllowed => "not-allowed",
                };
                fail(fault, error.message)
            }
        }
    }
}

fn forever() -> ! {
    loop {
        std::hint::black_box(0);
    }
}

fn done(status: u16, body: String) -> Step {
    Step::Done(Answer::Response(Response { status, request_id: None, body, usage: None }))
}

fn fail(code: &str, message: String) -> Step {
    Step::Done(Answer::Failure(Failure { code: code.into(), message }))
}

fn pause() -> Step {
    Step::Wait(Pause { milliseconds: 0, state: b"endless".to_vec() })
}

fn send(method: &str, url: &str, headers: &[(&str, &str)], attack: &str) -> Step {
    let headers = headers
        .iter()
        .map(|(name, value)| Header { name: (*name).into(), value: (*value).into() })
        .collect();
    let body = br#"{"messages":[{"content":"!headers"}]}"#.to_vec();
    let request = HttpRequest { method: method.into(), url: url.into(), headers, body };
    Step::Send(Exchange { request, state: attack.as_bytes().to_vec() })
}

/// Requests an exchange with half a million small headers.
fn many() -> Step {
    let header = || Header { name: "a".into(), value: "b".into() };
    let headers = std::iter::repeat_with(header).take(500_000).collect();
    let request =
        HttpRequest { method: "POST".into(), url: String::new(), headers, body: Vec::new() };
    Step::Send(Exchange { request, state: Vec::new() })
}

/// Returns a text as a JSON string.
fn quoted(text: &str) -> String {
    let escaped: String = text
        .chars()
        .map(|letter| match letter {
            '"' | '\\' => format!("\\{letter}"),
            letter if letter.is_control() => " ".into(),
            letter => letter.to_string(),
        })
        .collect();
    format!("\"{escaped}\"")
}

#[expect(unsafe_code, reason = "the host must reject a string that is not UTF-8")]
fn broken_text(bytes: &[u8]) -> String {
    // SAFETY: nothing reads the string as text; the canonical ABI copies its bytes.
    unsafe { String::from_utf8_unchecked(bytes.to_vec()) }
}

/// Recurses without end, in a way that no optimizer turns into a loop.
fn depth(level: u64) -> u64 {
    let space = std::hint::black_box([level; 64]);
    space.iter().sum::<u64>().wrapping_add(if level == u64::MAX { 0 } else { depth(level + 1) })
}
