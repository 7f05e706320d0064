//! Errors of an input file that validation rejects.

use crate::{TestServer, check, report};

/// A line of the chat endpoint with this body.
fn line(custom_id: &str, body: &str) -> String {
    format!(
        r#"{{"custom_id":"{custom_id}","method":"POST","url":"/v1/chat/completions","body":{body}}}"#
    )
}

#[test]
fn errors_of_a_rejected_file() {
    let good = r#"{"model":"echo","messages":[]}"#;
    let lines = [
        "{\"custom_id\": \"a\", oops".to_owned(),
        "[]".to_owned(),
        "{}".to_owned(),
        r#"{"custom_id":1,"method":2,"url":3,"body":4}"#.to_owned(),
        line("a", good).replace("POST", "GET"),
        line("b", good).replace("chat/completions", "embeddings"),
        line("c", good),
        line("c", good),
        line("d", r#"{"model":"echo","messages":[],"stream":true}"#),
        line("e", r#"{"messages":[]}"#),
        line("f", r#"{"model":7,"messages":[]}"#),
        line("g", r#"{"model":"echo"}"#),
        line("h", r#"{"model":"echo","messages":{}}"#),
        line("i", r#"{"model":"no-such-model","messages":[]}"#),
        line("j", r#"{"model":"echo","model":"echo","messages":[]}"#),
        "{\"custom_id\":\"k\u{0}\"}".to_owned(),
    ];
    let server = TestServer::start(&[]);
    std::fs::write(server.folder.path().join("in.jsonl"), lines.join("\n")).unwrap();
    let endpoint = ["--endpoint", "/v1/chat/completions", "--watch"];
    let created = server.client(&[&["batch", "create", "in.jsonl"], endpoint.as_slice()].concat());
    check("rejected-file", &report(&created));
}

#[test]
fn errors_of_files_in_another_format() {
    let server = TestServer::start(&[]);
    let mut text = String::new();
    for (name, content) in [
        ("array", "[\n{\"custom_id\":\"a\"},\n{\"custom_id\":\"b\"}\n]".as_bytes()),
        ("csv", b"custom_id,prompt\na,hello\nb,world\n"),
        ("gzip", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03"),
        ("zip", b"PK\x03\x04aaaaaaaaaaaaaaaa"),
        ("utf-16", b"\xff\xfe{\x00}\x00"),
        ("blank", b"\n\n\n"),
    ] {
        std::fs::write(server.folder.path().join("in.jsonl"), content).unwrap();
        let arguments =
            ["batch", "create", "in.jsonl", "--endpoint", "/v1/chat/completions", "--watch"];
        text.push_str(&format!("=== {name}\n{}", report(&server.client(&arguments))));
    }
    check("rejected-formats", &text);
}
