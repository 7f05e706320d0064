//! Snapshots of every text that a user reads: help, reports on plugins, API errors, the end of
//! `run`.
//!
//! A changed word is a changed file in `snapshots/`. `INSTA_UPDATE=always cargo xtask e2e texts`
//! writes the files; the
//! diff belongs in the same commit as the change.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod api;
mod help;
mod plugins;
mod rejected;
mod run;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use tempfile::TempDir;

/// Folder of the checkout, read at run time: checkouts may share compiled tests.
fn root() -> PathBuf {
    Path::new(&std::env::var_os("CARGO_MANIFEST_DIR").unwrap()).join("..")
}

/// A file that `cargo xtask build` made.
fn built(path: &str) -> PathBuf {
    let path = root().join(path);
    assert!(path.exists(), "{} is missing; run `cargo xtask build`", path.display());
    path.canonicalize().unwrap()
}

/// `dist/batchwright` in an environment without settings, at a width of 100 columns.
fn batchwright(folder: &Path) -> Command {
    let mut command = Command::new(built("dist/batchwright"));
    command.env_clear().env("COLUMNS", "100").env("XDG_CACHE_HOME", built("dist").join("cache"));
    command.current_dir(folder).stdin(Stdio::null());
    command
}

/// Standard output, standard error and exit status in one text.
fn report(output: &Output) -> String {
    let mut text = String::new();
    for (name, bytes) in [("stdout", &output.stdout), ("stderr", &output.stderr)] {
        if !bytes.is_empty() {
            text.push_str(&format!("--- {name}\n{}", String::from_utf8_lossy(bytes)));
        }
    }
    text.push_str(&format!("--- exit status {}\n", output.status.code().unwrap()));
    text
}

/// Compares a text with its snapshot, after replacing what differs between runs.
fn check(name: &str, text: &str) {
    let mut settings = insta::Settings::clone_current();
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    for (pattern, replacement) in [
        (r"\x1b\[[0-9;]*m", ""),
        // Progress depends on when it is polled.
        (r"(?m)^(validating|in_progress|finalizing|completed|failed)(: .* done.*)?\n", ""),
        (r"(/[\w.-]+)*/\.tmp\w+", "FOLDER"),
        (r"(/[\w.-]+)*/dist\b", "DIST"),
        (r"\b(batch_req|batch|file|req)([_-])[0-9a-f]{32}\b", "$1${2}ID"),
        (r"\b[0-9a-f]{64}\b", "DIGEST"),
        (r"\b[0-9a-f]{32}\b", "ID"),
        (r"127\.0\.0\.1:\d{5}", "ADDRESS"),
        (r"\b1[78]\d{8}\b", "TIME"),
        (r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d+)?)?Z?)?", "DATE"),
        (r"\d+\.\d+\.\d+ \([0-9a-f]{7,12}(-dirty)?\)", "VERSION"),
        (r"\b\d+\.\d+ ?(s|ms|µs)\b", "DURATION"),
        (r"\b\d+ us\b", "DURATION"),
        (r"memory up to \d+ KiB", "memory up to SIZE"),
    ] {
        settings.add_filter(pattern, replacement);
    }
    settings.bind(|| insta::assert_snapshot!(name, text));
}

/// A server with the plugins that ship, which ends with the test.
struct TestServer {
    folder: TempDir,
    child: Child,
    url: String,
}

impl TestServer {
    fn start(arguments: &[&str]) -> Self {
        let folder = TempDir::new().unwrap();
        let plugins = folder.path().join("plugins");
        std::fs::create_dir(&plugins).unwrap();
        for file in ["validator-standard.wasm", "inference-echo.wasm", "standard.toml", "echo.toml"]
        {
            std::fs::copy(built("dist/plugins").join(file), plugins.join(file)).unwrap();
        }
        let mut command = batchwright(folder.path());
        command.args(["serve", "--listen", "127.0.0.1:0", "--log-filter", "error"]).args(arguments);
        let command = command.args(["--data", "data", "--plugins", "plugins"]);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let url = line.trim().strip_prefix("listening on ").expect("the server listens").to_owned();
        Self { folder, child, url }
    }

    /// Runs a client command of the same program against this server.
    fn client(&self, arguments: &[&str]) -> Output {
        let mut command = batchwright(self.folder.path());
        command.args(arguments).args(["--url", &self.url]).output().unwrap()
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
