//! Detection of environment variables that look like settings and are not.

use batchwright_domain::text::nearest;

use super::Settings;

/// Prefix of every variable that Batchwright reads.
const VARIABLE_PREFIX: &str = "BATCHWRIGHT_";

/// Variables with the prefix that commands read and that are not settings.
const COMMAND_VARIABLES: [&str; 4] =
    ["BATCHWRIGHT_CONFIG", "BATCHWRIGHT_URL", "BATCHWRIGHT_API_KEY", "BATCHWRIGHT_ADMIN_KEY"];

/// Variable that has the prefix and that neither a setting nor a command reads.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct UnknownVariable {
    /// Name of the variable.
    pub name: String,
    /// Known variable with the most similar name, if one is similar enough to be meant.
    pub suggestion: Option<String>,
}

/// Returns the unknown variables of the environment, sorted by name.
pub fn unknown_variables() -> Vec<UnknownVariable> {
    unknown(std::env::vars_os().filter_map(|(name, _)| name.into_string().ok()))
}

/// Returns the unknown variables among `variables`, sorted by name.
fn unknown(variables: impl Iterator<Item = String>) -> Vec<UnknownVariable> {
    let settings: Vec<String> = Settings::all().map(|setting| setting.variable()).collect();
    let known: Vec<&str> = settings.iter().map(String::as_str).chain(COMMAND_VARIABLES).collect();
    let mut unknown: Vec<UnknownVariable> = variables
        .filter(|name| name.starts_with(VARIABLE_PREFIX) && !known.contains(&name.as_str()))
        .filter(|name| !is_kubernetes_service_variable(name))
        .map(|name| {
            let suggestion = nearest(&name, &known).map(str::to_owned);
            UnknownVariable { name, suggestion }
        })
        .collect();
    unknown.sort();
    unknown
}

/// Returns true for a variable with which Kubernetes announces a service to every container.
///
/// A service `batchwright` creates `BATCHWRIGHT_PORT`, `BATCHWRIGHT_SERVICE_HOST`,
/// `BATCHWRIGHT_PORT_8080_TCP_ADDR` and others.
fn is_kubernetes_service_variable(name: &str) -> bool {
    let is_port = |rest: &str| {
        let mut parts = rest.split('_');
        let number = parts.next().unwrap_or_default();
        number.bytes().all(|digit| digit.is_ascii_digit())
            && matches!(parts.next(), Some("TCP" | "UDP" | "SCTP"))
    };
    name.ends_with("_SERVICE_HOST")
        || name.contains("_SERVICE_PORT")
        || name.ends_with("_PORT")
        || name
            .match_indices("_PORT_")
            .any(|(at, port)| name.get(at.saturating_add(port.len())..).is_some_and(is_port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_variables_lists_mistyped_names_and_ignores_kubernetes_services() {
        let given = [
            "BATCHWRIGHT_LISTENN",
            "BATCHWRIGHT_LISTEN",
            "BATCHWRIGHT_URL",
            "BATCHWRIGHT_PORT",
            "BATCHWRIGHT_PORT_8080_TCP",
            "BATCHWRIGHT_PORT_8080_TCP_ADDR",
            "BATCHWRIGHT_SERVICE_HOST",
            "BATCHWRIGHT_SERVICE_PORT_HTTP",
            "BATCHWRIGHT_ADMIN_SERVICE_HOST",
            "BATCHWRIGHT_SOMETHING_ELSE_ENTIRELY",
            "PATH",
        ];
        let unknown = unknown(given.iter().map(|name| (*name).to_owned()));
        assert_eq!(unknown.len(), 2, "{unknown:?}");
        assert_eq!(unknown[0].name, "BATCHWRIGHT_LISTENN");
        assert_eq!(unknown[0].suggestion.as_deref(), Some("BATCHWRIGHT_LISTEN"));
    }
}
