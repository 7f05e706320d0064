//! Names in documents: settings, limits, error codes, flags, variables and commands exist in the code.

use std::collections::BTreeSet;

use super::Source;

/// Files whose words count as code.
const CODE: [&str; 8] = [".rs", ".py", ".mjs", ".js", ".c", ".toml", ".json", ".sql"];

/// Names of other programs and protocols that documents mention.
const FOREIGN: [&str; 1] = ["--no-install-recommends"];

/// Where the commands are known from: each has a snapshot of its help.
const HELP: &str = "tests/texts/snapshots/help-";

pub fn faults(sources: &[Source]) -> Vec<String> {
    let words = words(sources);
    let mut faults = Vec::new();
    for source in sources {
        let is_contract = source.path.ends_with(".wit");
        // The log of changes names what is gone.
        if !is_contract && !source.path.ends_with(".md") || source.path == "CHANGELOG.md" {
            continue;
        }
        for (number, line) in source.lines() {
            if is_contract && !line.trim_start().starts_with("//") {
                continue;
            }
            for quoted in line.split('`').skip(1).step_by(2) {
                for name in unknown(quoted, &words, sources) {
                    let path = &source.path;
                    faults.push(format!("{path}:{number}: `{name}` does not exist in the code"));
                }
            }
        }
    }
    faults
}

/// Every identifier of the code.
fn words(sources: &[Source]) -> BTreeSet<&str> {
    let is_part = |letter: char| letter.is_alphanumeric() || letter == '_' || letter == '-';
    let code = sources.iter().filter(|source| source.has_extension(&CODE));
    let dashed = code.clone().flat_map(|source| source.text.split(|letter| !is_part(letter)));
    let plain = code.flat_map(|source| {
        source.text.split(move |letter: char| !letter.is_alphanumeric() && letter != '_')
    });
    let contract = sources.iter().filter(|source| source.path.ends_with(".wit"));
    let declared = contract.flat_map(|source| {
        let lines = source.text.lines().filter(|line| !line.trim_start().starts_with("//"));
        lines.flat_map(move |line| line.split(move |letter| !is_part(letter)))
    });
    dashed.chain(plain).chain(declared).collect()
}

/// Names in a quotation that look like ours and that no code has.
fn unknown<'a>(quoted: &'a str, words: &BTreeSet<&str>, sources: &[Source]) -> Vec<&'a str> {
    if let Some(command) = quoted.strip_prefix("batchwright ") {
        return unknown_command(command, sources).into_iter().collect();
    }
    let names =
        quoted.split(|letter: char| !letter.is_alphanumeric() && letter != '_' && letter != '-');
    let unknown = names.filter(|name| {
        let flag = name.strip_prefix("--").map(|flag| flag.replace('-', "_"));
        let is_name = |text: &str| {
            text.starts_with(|first: char| first.is_ascii_lowercase())
                && text.chars().all(|letter| {
                    letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == '_'
                })
        };
        if FOREIGN.contains(name) || words.contains(name) {
            return false;
        }
        match flag {
            Some(flag) => is_name(&flag) && !words.contains(flag.as_str()),
            None => name.starts_with("BATCHWRIGHT_") || name.contains('_') && is_name(name),
        }
    });
    unknown.collect()
}

/// The command, if it has no help. A list such as `batch get | list` is several commands.
fn unknown_command<'a>(command: &'a str, sources: &[Source]) -> Option<&'a str> {
    let is_word = |word: &&str| word.chars().all(|letter| letter.is_ascii_lowercase());
    let words: Vec<&str> = command.split([' ', '|']).filter(|word| !word.is_empty()).collect();
    let known =
        |name: &str| sources.iter().any(|source| source.path == format!("{HELP}{name}.snap"));
    let (first, more) = words.split_first()?;
    if !is_word(first) {
        return None;
    }
    let has_subcommands =
        sources.iter().any(|source| source.path.starts_with(&format!("{HELP}{first}-")));
    if !has_subcommands {
        return (!known(first)).then_some(command);
    }
    let more = more.iter().take_while(|word| is_word(word));
    more.copied().any(|word| !known(&format!("{first}-{word}"))).then_some(command)
}
