//! Exit messages of `run`.

use std::path::Path;

use tempfile::TempDir;

use crate::{batchwright, built, check, report};

const GOOD: &str = r#"{"custom_id":"a","method":"POST","url":"/v1/chat/completions","body":{"model":"echo","messages":[{"role":"user","content":"hi"}]}}"#;

fn run(folder: &Path, arguments: &[&str]) -> String {
    let mut command = batchwright(folder);
    command.args(["run", "--log-filter", "error"]);
    if !arguments.contains(&"--plugins") {
        command.args(["--plugins", "plugins"]);
    }
    format!(
        "$ run {}\n{}\n",
        arguments.join(" "),
        report(&command.args(arguments).output().unwrap())
    )
}

#[test]
fn exit_messages_of_run() {
    let folder = TempDir::new().unwrap();
    let path = folder.path();
    std::fs::create_dir(path.join("plugins")).unwrap();
    for file in ["validator-standard.wasm", "inference-echo.wasm", "standard.toml", "echo.toml"] {
        std::fs::copy(built("dist/plugins").join(file), path.join("plugins").join(file)).unwrap();
    }
    std::fs::write(path.join("good.jsonl"), GOOD).unwrap();
    let failing = GOOD.replace("user", "robot").replace("\"a\"", "\"b\"");
    std::fs::write(path.join("failing.jsonl"), format!("{GOOD}\n{failing}\n")).unwrap();
    std::fs::write(path.join("faulty.jsonl"), "{oops\n").unwrap();
    std::fs::write(path.join("empty.jsonl"), "").unwrap();
    std::fs::write(path.join("config.toml"), "max_atempts = 3\n").unwrap();
    let texts = [
        run(path, &["good.jsonl", "-o", "good.out"]),
        run(path, &["good.jsonl", "-o", "good.out"]),
        run(path, &["failing.jsonl", "-o", "failing.out"]),
        run(path, &["failing.jsonl", "-o", "failing.out", "-e", "failing.err"]),
        run(path, &["faulty.jsonl", "-o", "faulty.out"]),
        run(path, &["empty.jsonl", "-o", "empty.out"]),
        run(path, &["missing.jsonl", "-o", "missing.out"]),
        run(path, &["good.jsonl", "-o", "good.jsonl"]),
        run(path, &["good.jsonl", "-o", "no/such/folder"]),
        run(path, &["good.jsonl", "-o", "x.out", "--config", "config.toml"]),
        run(path, &["good.jsonl", "-o", "x.out", "--config", "missing.toml"]),
        run(path, &["good.jsonl", "-o", "x.out", "--plugins", "no-plugins"]),
        run(path, &["good.jsonl", "-o", "x.out", "--max-attempts", "0"]),
        run(path, &["good.jsonl", "-o", "x.out", "--endpoint", "/v1/images"]),
    ];
    check("run", &texts.concat());
}
