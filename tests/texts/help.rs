//! `--help` of every command.

use std::path::Path;

use crate::{batchwright, check, report};

const COMMANDS: [&str; 64] = [
    "",
    "serve",
    "run",
    "plugin",
    "plugin list",
    "plugin pause",
    "plugin resume",
    "plugin inspect",
    "plugin check",
    "plugin new",
    "plugin test",
    "plugin pull",
    "plugin sign",
    "plugin verify",
    "admin",
    "admin project create",
    "admin project list",
    "admin project rename",
    "admin project archive",
    "admin key create",
    "admin key generate",
    "admin key list",
    "admin key revoke",
    "admin key rotate",
    "admin limits show",
    "admin limits set",
    "admin limits model",
    "admin budget show",
    "admin budget set",
    "admin budget remove",
    "admin usage",
    "admin models show",
    "admin models allow",
    "admin models deny",
    "admin models any",
    "admin apply",
    "admin log",
    "batch",
    "batch create",
    "batch list",
    "batch get",
    "batch watch",
    "batch cancel",
    "batch download",
    "file list",
    "file delete",
    "audit",
    "health",
    "doctor",
    "config check",
    "config show",
    "gc",
    "backup",
    "restore",
    "completions",
    "man",
    "webhook create",
    "webhook list",
    "webhook update",
    "webhook delete",
    "webhook rotate-secret",
    "webhook test",
    "webhook deliveries",
    "webhook redeliver",
];

#[test]
fn help_of_every_command() {
    for command in COMMANDS {
        let words: Vec<&str> = command.split_whitespace().collect();
        let output = batchwright(Path::new("/")).args(&words).arg("--help").output().unwrap();
        check(&format!("help {command}").trim().replace(' ', "-"), &report(&output));
    }
}

/// A command that is added and not listed above fails here.
#[test]
fn every_command_is_covered() {
    for (parent, listed) in COMMANDS.iter().map(|command| (*command, COMMANDS)) {
        let words: Vec<&str> = parent.split_whitespace().collect();
        let output = batchwright(Path::new("/")).args(&words).arg("--help").output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let Some((_, commands)) = text.split_once("Commands:\n") else { continue };
        for line in commands.lines().take_while(|line| !line.is_empty()) {
            // A deeper line continues the text of the command above it.
            let Some(name) = line.strip_prefix("  ").filter(|line| !line.starts_with(' ')) else {
                continue;
            };
            let name = name.split_whitespace().next().unwrap_or_default();
            let whole = format!("{parent} {name}");
            let whole = whole.trim();
            let known = listed.iter().any(|known| known.starts_with(whole));
            assert!(known || name == "help", "`{whole}` has no snapshot of its help");
        }
    }
}
