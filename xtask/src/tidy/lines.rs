//! Lengths of lines and files.

use super::Source;

/// Columns of a line of code.
const MAX_CODE_COLUMNS: usize = 100;
/// Columns of a line of Markdown, tables aside.
const MAX_TEXT_COLUMNS: usize = 120;

const CODE: [&str; 5] = [".rs", ".py", ".mjs", ".js", ".wit"];

pub fn faults(sources: &[Source]) -> Vec<String> {
    let mut faults = Vec::new();
    for source in sources {
        let most = match source {
            source if source.has_extension(&CODE) => MAX_CODE_COLUMNS,
            source if source.has_extension(&[".md"]) => MAX_TEXT_COLUMNS,
            _ => continue,
        };
        for (number, line) in source.lines() {
            let columns = line.chars().count();
            if columns > most && !is_unbreakable(line) {
                faults
                    .push(format!("{}:{number}: {columns} columns, more than {most}", source.path));
            }
        }
    }
    faults
}

/// Returns true for a row of a table and for a line that one long word fills, such as a URL or a recorded message.
fn is_unbreakable(line: &str) -> bool {
    let line = line.trim();
    let longest = line.split(' ').map(|word| word.chars().count()).max().unwrap_or(0);
    line.starts_with('|') || longest > MAX_CODE_COLUMNS - 20
}
