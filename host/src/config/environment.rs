//! Variables of the environment that look like settings and are none.

use super::file::nearest;

/// How all of ours begin.
const PREFIX: &str = "BATCHWRIGHT_";

/// Those of commands that are no settings.
const OTHERS: [&str; 3] = ["BATCHWRIGHT_CONFIG", "BATCHWRIGHT_URL", "BATCHWRIGHT_API_KEY"];

/// A warning for each variable that nobody reads.
pub fn warnings(settings: &[&str], variables: impl Iterator<Item = String>) -> Vec<String> {
    let known: Vec<&str> = settings.iter().copied().chain(OTHERS).collect();
    let unknown =
        variables.filter(|name| name.starts_with(PREFIX) && !known.contains(&name.as_str()));
    let mut warnings: Vec<String> = unknown
        .filter(|name| !is_of_kubernetes(name))
        .map(|name| {
            let hint = nearest(&name, &known)
                .map_or_else(String::new, |near| format!("; did you mean {near}?"));
            format!("the environment variable {name} is no setting{hint}")
        })
        .collect();
    warnings.sort();
    warnings
}

/// Kubernetes tells every container of the services there are: a service `batchwright` is `BATCHWRIGHT_PORT`, `BATCHWRIGHT_SERVICE_HOST`,
/// `BATCHWRIGHT_PORT_8080_TCP_ADDR` and so on.
fn is_of_kubernetes(name: &str) -> bool {
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
    fn a_mistyped_variable_is_named_and_those_of_kubernetes_are_not() {
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
        let told = warnings(
            &["BATCHWRIGHT_LISTEN", "BATCHWRIGHT_DATA"],
            given.iter().map(|name| (*name).to_owned()),
        );
        assert_eq!(told.len(), 2, "{told:?}");
        assert!(
            told[0]
                .ends_with("BATCHWRIGHT_LISTENN is no setting; did you mean BATCHWRIGHT_LISTEN?"),
            "{told:?}"
        );
    }
}
