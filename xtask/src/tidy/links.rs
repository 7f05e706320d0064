//! Links between documents: every relative target exists.

use std::path::{Component, Path, PathBuf};

use super::Source;
use crate::run::root;

/// Returns each relative link of a Markdown file whose target does not exist.
pub fn faults(sources: &[Source]) -> Vec<String> {
    let mut faults = Vec::new();
    for source in sources.iter().filter(|source| source.path.ends_with(".md")) {
        // A template's links belong to the project that it becomes.
        if source.path.starts_with("templates/") {
            continue;
        }
        for (number, line) in source.lines() {
            for target in targets(line) {
                let target = target.split('#').next().unwrap_or_default();
                if target.is_empty() || target.contains(':') {
                    continue;
                }
                let folder = Path::new(&source.path).parent().unwrap_or(Path::new(""));
                if !root().join(normalized(&folder.join(target))).exists() {
                    faults.push(format!("{}:{number}: no file `{target}`", source.path));
                }
            }
        }
    }
    faults
}

/// Returns the text between `](` and `)`, for each link of a line.
fn targets(line: &str) -> impl Iterator<Item = &str> {
    line.split("](").skip(1).filter_map(|rest| rest.split(')').next())
}

/// Resolves `..` without the file system, which may not have the folder.
fn normalized(path: &Path) -> PathBuf {
    let mut whole = PathBuf::new();
    for component in path.components() {
        if component == Component::ParentDir {
            whole.pop();
        } else {
            whole.push(component);
        }
    }
    whole
}
