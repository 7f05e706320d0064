//! Maximum line lengths of code and Markdown.

use super::Source;

/// Maximum columns of a line of code.
const MAX_CODE_COLUMNS: usize = 100;
/// Maximum columns of a line of Markdown, except table rows.
const MAX_TEXT_COLUMNS: usize = 120;

/// Extensions of code files.
const CODE_EXTENSIONS: [&str; 5] = [".rs", ".py", ".mjs", ".js", ".wit"];

/// Returns each line that is too long.
pub fn faults(sources: &[Source]) -> Vec<String> {
    let mut faults = Vec::new();
    for source in sources {
        let max_columns = match source {
            source if source.has_extension(&CODE_EXTENSIONS) => MAX_CODE_COLUMNS,
            source if source.has_extension(&[".md"]) => MAX_TEXT_COLUMNS,
            _ => continue,
        };
        for (number, line) in source.lines() {
            let columns = line.chars().count();
            if columns > max_columns && !is_unbreakable(line) {
                faults.push(format!(
                    "{}:{number}: {columns} columns, more than {max_columns}",
                    source.path
                ));
            }
        }
    }
    faults
}

/// Returns true for a table row, and for a line that one long word fills, such as a URL.
fn is_unbreakable(line: &str) -> bool {
    let line = line.trim();
    let longest = line.split(' ').map(|word| word.chars().count()).max().unwrap_or(0);
    line.starts_with('|') || longest > MAX_CODE_COLUMNS - 20
}
