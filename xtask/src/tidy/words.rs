//! Words that the project does not use, each with the plain word for it.

use super::Source;

const BANNED: [(&str, &str); 10] = [
    ("mend", "fix"),
    ("mended", "fixed"),
    ("anew", "again"),
    ("whoever", "name the reader, client or operator"),
    ("for want of", "without"),
    ("is told of", "is reported"),
    ("are told of", "are reported"),
    ("at the most", "at most"),
    ("takes up", "reads, starts or occupies"),
    ("stands", "is"),
];

/// Files that have to name the words.
const EXEMPT: [&str; 2] = ["xtask/src/tidy/words.rs", "LICENSE"];

pub fn faults(sources: &[Source]) -> Vec<String> {
    let mut faults = Vec::new();
    for source in sources {
        if EXEMPT.contains(&source.path.as_str()) || source.path.ends_with(".lock") {
            continue;
        }
        for (number, line) in source.lines() {
            let line = line.to_lowercase();
            for (word, instead) in BANNED {
                if contains_word(&line, word) {
                    faults.push(format!("{}:{number}: `{word}`; write: {instead}", source.path));
                }
            }
        }
    }
    faults
}

/// Returns true if a text has the word with no letter or digit on either side.
pub fn contains_word(text: &str, word: &str) -> bool {
    let is_part = |found: Option<char>| found.is_some_and(|found| found.is_alphanumeric());
    text.match_indices(word).any(|(at, _)| {
        let before = text.get(..at).and_then(|text| text.chars().next_back());
        let after = text.get(at.saturating_add(word.len())..).and_then(|text| text.chars().next());
        !is_part(before) && !is_part(after)
    })
}
