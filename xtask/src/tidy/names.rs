//! Names in documents: every setting, limit, error code, flag, variable and command that a document
//! quotes must exist in the code.

use std::collections::BTreeSet;

use super::Source;

/// Extensions of files whose words count as code.
const CODE_EXTENSIONS: [&str; 7] = [".rs", ".py", ".mjs", ".js", ".c", ".toml", ".json"];

/// Extensions of quoted file names.
const EXTENSIONS: [&str; 5] = [".rs", ".py", ".wit", ".toml", ".md"];

/// Quoted names that belong to other programs.
const FOREIGN_NAMES: [&str; 2] = ["--no-install-recommends", "--adapt"];

/// Path prefix of the help snapshots, one per command.
const HELP_SNAPSHOTS: &str = "tests/texts/snapshots/help-";

/// Returns each quoted name that does not exist in the code.
pub fn faults(sources: &[Source]) -> Vec<String> {
    let words = words(sources);
    let mut faults = Vec::new();
    for source in sources {
        let is_contract = source.path.ends_with(".wit");
        // The changelog names removed settings and flags.
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

/// Returns every identifier of the code.
fn words(sources: &[Source]) -> BTreeSet<&str> {
    let is_part = |letter: char| letter.is_alphanumeric() || letter == '_' || letter == '-';
    let code = sources.iter().filter(|source| source.has_extension(&CODE_EXTENSIONS));
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

/// Returns the names in a quotation that look like names of this project but are not in the code.
fn unknown<'a>(quoted: &'a str, words: &BTreeSet<&str>, sources: &[Source]) -> Vec<&'a str> {
    // A path names files, and a name that ends with `_` or `*` names several.
    if quoted.contains('/') || EXTENSIONS.iter().any(|extension| quoted.ends_with(extension)) {
        return Vec::new();
    }
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
        if FOREIGN_NAMES.contains(name) || words.contains(name) {
            return false;
        }
        match flag {
            Some(flag) => is_name(&flag) && !words.contains(flag.as_str()),
            None => {
                let is_whole = !name.ends_with('_');
                // A variable is a setting in capitals.
                let setting = name.strip_prefix("BATCHWRIGHT_").map(str::to_lowercase);
                if setting.is_some_and(|setting| words.contains(setting.as_str())) {
                    return false;
                }
                is_whole
                    && (name.starts_with("BATCHWRIGHT_") || name.contains('_') && is_name(name))
            }
        }
    });
    unknown.collect()
}

/// Returns the command if it has no help snapshot; `batch get | list` is two commands, and
/// `admin key` a group of commands.
fn unknown_command<'a>(command: &'a str, sources: &[Source]) -> Option<&'a str> {
    let is_word = |word: &&str| word.chars().all(|letter| letter.is_ascii_lowercase());
    let words: Vec<&str> = command.split([' ', '|']).filter(|word| !word.is_empty()).collect();
    let known = |name: &str| {
        sources.iter().any(|source| source.path == format!("{HELP_SNAPSHOTS}{name}.snap"))
    };
    let is_group = |name: &str| {
        sources.iter().any(|source| source.path.starts_with(&format!("{HELP_SNAPSHOTS}{name}-")))
    };
    let (first, more) = words.split_first()?;
    if !is_word(first) {
        return None;
    }
    if !is_group(first) {
        return (!known(first)).then_some(command);
    }
    // Groups that the next word may be in, the deepest last.
    let mut groups = vec![(*first).to_owned()];
    for word in more.iter().take_while(|word| is_word(word)) {
        let nested = |group: &String| format!("{group}-{word}");
        if let Some(group) = groups.iter().map(nested).find(|name| is_group(name)) {
            groups.push(group);
        } else if !groups.iter().map(nested).any(|name| known(&name)) {
            return Some(command);
        }
    }
    None
}
