//! Imports between the rooms of a crate: modules of one job each, whose arrows point one way.

use super::Source;

/// Room, and the rooms of the same crate that it may import.
type Room = (&'static str, &'static [&'static str]);

/// Crates that have rooms, each with its rooms, leaf first.
const CRATES: [(&str, &[Room]); 2] = [
    (
        "batch",
        &[
            ("config", &[]),
            ("metrics", &[]),
            ("spans", &[]),
            ("credentials", &[]),
            ("formats", &[]),
            ("policy", &[]),
            ("objects", &[]),
            ("schedule", &["config", "formats"]),
            ("parts", &["config", "credentials", "metrics", "objects", "schedule", "spans"]),
            ("rules", &["formats", "schedule"]),
            ("request", &["config", "formats", "metrics", "schedule", "spans"]),
            (
                "service",
                &["config", "credentials", "objects", "parts", "policy", "schedule", "spans"],
            ),
            ("health", &["config", "parts", "schedule"]),
            ("janitor", &["config", "objects", "parts"]),
            (
                "online",
                &["config", "formats", "metrics", "parts", "request", "rules", "schedule", "spans"],
            ),
            (
                "worker",
                &[
                    "config", "formats", "metrics", "objects", "parts", "policy", "request",
                    "rules", "schedule", "spans",
                ],
            ),
            ("observer", &["health", "parts", "service"]),
            ("progress", &["parts"]),
            (
                "engine",
                &[
                    "health", "janitor", "metrics", "observer", "online", "parts", "progress",
                    "schedule", "service", "spans", "worker",
                ],
            ),
        ],
    ),
    (
        "plugin",
        &[
            ("config", &[]),
            ("error", &[]),
            ("reference", &[]),
            ("contract", &["error"]),
            ("package", &["contract", "error", "reference"]),
            ("sandbox", &["contract", "package"]),
            ("compile", &["package", "sandbox"]),
            ("plugin", &["contract", "error", "package", "sandbox"]),
            ("load", &["compile", "contract", "error", "package", "plugin", "sandbox"]),
            ("directory", &["config", "contract", "error", "load", "package", "plugin"]),
            ("conformance", &["contract", "error", "plugin", "reference"]),
        ],
    ),
];

/// Returns each import between rooms that the table does not allow.
pub fn faults(sources: &[Source]) -> Vec<String> {
    let mut faults = Vec::new();
    for (name, rooms) in CRATES {
        let folder = format!("crates/{name}/src/");
        for source in sources {
            let Some(path) = source.path.strip_prefix(&folder) else { continue };
            let room = path.split('/').next().unwrap_or_default().trim_end_matches(".rs");
            if room == "lib" {
                continue;
            }
            let Some((_, allowed)) = rooms.iter().find(|(known, _)| *known == room) else {
                faults.push(format!("{}: `{room}` is not in the table of rooms", source.path));
                continue;
            };
            for (number, line) in source.lines() {
                let path = &source.path;
                if line.trim().starts_with("//") {
                    continue;
                }
                for import in line.split("crate::").skip(1) {
                    let end =
                        import.find(|letter: char| !letter.is_alphanumeric() && letter != '_');
                    let other = import.split_at(end.unwrap_or(import.len())).0;
                    let is_room = rooms.iter().any(|(known, _)| *known == other);
                    if is_room && other != room && !allowed.contains(&other) {
                        faults.push(format!("{path}:{number}: `{room}` must not import `{other}`"));
                    }
                }
            }
        }
    }
    faults
}
