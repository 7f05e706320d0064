//! `cargo xtask demo`: builds everything, then runs a batch through the HTTP API and shows a
//! rejected file.
//!
//! The demo uses only the programs of a user: the server and its command line client.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::build;
use crate::run::{root, run, step, target};

/// Number of valid requests in the batch.
const REQUESTS: usize = 20_000;

/// Typical prompts of a batch.
const PROMPTS: [&str; 6] = [
    "Classify the sentiment of this review as positive, negative or neutral: \
     \\\"Arrived late, but works like a charm.\\\"",
    "Summarize in one sentence: The committee met on Tuesday and postponed the vote until the \
     budget is known.",
    "Translate into French: Where is the nearest train station?",
    "Extract all dates as ISO 8601: The trial begins on 3 May 2026 and ends two weeks later.",
    "Write a subject line for a newsletter about urban beekeeping.",
    "Is this SQL safe to run on production? DELETE FROM sessions WHERE expires_at < now();",
];

struct Demo {
    folder: std::path::PathBuf,
    url: String,
    server: Child,
}

impl Drop for Demo {
    fn drop(&mut self) {
        self.server.kill().ok();
        self.server.wait().ok();
    }
}

/// Runs the demo.
pub fn show() -> Result<()> {
    build::all()?;
    let demo = Demo::start()?;
    demo.good_batch()?;
    demo.rejected_batch()?;
    step("Point it at a real provider");
    eprintln!(
        "The `echo` plugin answered the requests above; it needs no provider. For a real one:\n\n  \
         export OPENAI_API_KEY=sk-…                      # dist/plugins/openai.toml asks for it\n  \
         dist/batchwright serve --plugins dist/plugins   # then use any of the models it lists\n\n\
         For another provider, or a model server of your own, edit `base_url` and `models` in\n\
         that file, or add a copy next to it: a running server loads the file automatically."
    );
    Ok(())
}

impl Demo {
    fn start() -> Result<Self> {
        let folder = target().join("demo");
        fs::remove_dir_all(&folder).ok();
        fs::create_dir_all(&folder)?;
        step("batchwright serve --plugins dist/plugins");
        let mut server = batchwright()
            .args([
                "serve",
                "--listen",
                "127.0.0.1:0",
                "--log-filter",
                "error,batchwright_plugin=off",
                "--data",
            ])
            .arg(folder.join("data"))
            .arg("--plugins")
            .arg(root().join("dist/plugins"))
            .stdout(Stdio::piped())
            .spawn()
            .context("failed to start dist/batchwright")?;
        let mut line = String::new();
        BufReader::new(server.stdout.take().context("standard output is piped")?)
            .read_line(&mut line)?;
        eprint!("{line}");
        let Some(url) = line.trim().strip_prefix("listening on ") else {
            server.kill().ok();
            bail!("the server does not listen; its error is above");
        };
        Ok(Self { folder, url: url.to_owned(), server })
    }

    fn good_batch(&self) -> Result<()> {
        let mut lines = String::new();
        for (number, prompt) in (1..=REQUESTS).zip(PROMPTS.iter().cycle()) {
            lines.push_str(&line(number, "echo", prompt, "user"));
        }
        // An unknown role: this request fails, and the others succeed.
        lines.push_str(&line(REQUESTS + 1, "echo", "I am not who I say I am.", "robot"));
        fs::write(self.folder.join("prompts.jsonl"), lines)?;
        step(&format!("A batch of {} requests, one of them invalid", REQUESTS + 1));
        // The exit status is not 0, because one request failed.
        self.batch(&["create", "prompts.jsonl", "--watch"]).status()?;
        let id = self.newest()?;
        run(&mut self.batch(&["download", &id, "-o", "answers.jsonl", "-e", "errors.jsonl"]))?;
        step("The first answers, and the error");
        self.head("answers.jsonl", 2)?;
        self.head("errors.jsonl", 1)
    }

    fn rejected_batch(&self) -> Result<()> {
        let lines = [
            line(1, "echo", "Fine.", "user"),
            "{\"custom_id\": \"request-2\", oops\n".to_owned(),
            line(1, "echo", "The same custom_id as line 1.", "user"),
            line(4, "no-such-model", "A model that no plugin serves.", "user"),
            line(5, "echo", "Streamed.", "user").replace("\"model\"", "\"stream\":true,\"model\""),
        ];
        fs::write(self.folder.join("invalid.jsonl"), lines.concat())?;
        step("An invalid file is rejected before any request is sent; each error names its line");
        self.batch(&["create", "invalid.jsonl", "--watch"]).status()?;
        Ok(())
    }

    fn batch(&self, arguments: &[&str]) -> Command {
        eprintln!("\x1b[2m$ batchwright batch {}\x1b[0m", arguments.join(" "));
        let mut command = batchwright();
        command.arg("batch").args(arguments).args(["--url", &self.url]).current_dir(&self.folder);
        command
    }

    fn newest(&self) -> Result<String> {
        let listed =
            batchwright().args(["batch", "list", "--limit", "1", "--url", &self.url]).output()?;
        let listed = String::from_utf8(listed.stdout)?;
        Ok(listed.split_whitespace().next().context("there is a batch")?.to_owned())
    }

    fn head(&self, file: &str, lines: usize) -> Result<()> {
        let path = self.folder.join(file);
        for line in fs::read_to_string(&path)
            .with_context(|| format!("failed to read {}", path.display()))?
            .lines()
            .take(lines)
        {
            eprintln!("{line}");
        }
        Ok(())
    }
}

fn batchwright() -> Command {
    Command::new(Path::new(&root()).join("dist/batchwright"))
}

fn line(number: usize, model: &str, prompt: &str, role: &str) -> String {
    format!(
        "{{\"custom_id\":\"request-{number}\",\"method\":\"POST\",\
         \"url\":\"/v1/chat/completions\",\"body\":{{\"model\":\"{model}\",\
         \"messages\":[{{\"role\":\"{role}\",\"content\":\"{prompt}\"}}]}}}}\n"
    )
}
