//! Paths as clients write them: with a slash at the end, or two where one should be.

use axum::http::Uri;
use axum::http::uri::PathAndQuery;

/// What follows is the name of a model, which may hold slashes of its own.
const MODELS: &str = "/models/";

/// A URI whose path has no needless slashes; none if it has none as it is.
pub fn normalized(uri: &Uri) -> Option<Uri> {
    let path = uri.path();
    let (head, name) = match path.find(MODELS) {
        Some(at) => path.split_at(at.saturating_add(MODELS.len())),
        None => (path, ""),
    };
    let is_needless = head.contains("//") || path.len() > 1 && path.ends_with('/');
    if !is_needless {
        return None;
    }
    let mut plain = String::with_capacity(path.len());
    for segment in head.split('/').filter(|segment| !segment.is_empty()) {
        plain.push('/');
        plain.push_str(segment);
    }
    if !name.is_empty() {
        plain.push('/');
        plain.push_str(name.trim_end_matches('/'));
    }
    if plain.is_empty() {
        plain.push('/');
    }
    if let Some(query) = uri.query() {
        plain.push('?');
        plain.push_str(query);
    }
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(PathAndQuery::try_from(plain).ok()?);
    Uri::from_parts(parts).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn needless_slashes_go_and_names_of_models_keep_theirs() {
        for (given, expected) in [
            ("/v1/batches", None),
            ("/", None),
            ("/v1/models/org//m", None),
            ("/v1/batches/", Some("/v1/batches")),
            ("//v1//batches//x/?a=/b/", Some("/v1/batches/x?a=/b/")),
            ("/v1/models/", Some("/v1/models")),
            ("//v1/models/org//m/", Some("/v1/models/org//m")),
            ("//", Some("/")),
            ("/v1/files/%2F/", Some("/v1/files/%2F")),
        ] {
            let uri =
                Uri::builder().scheme("http").authority("h").path_and_query(given).build().unwrap();
            let expected = expected.map(|path| format!("http://h{path}"));
            assert_eq!(normalized(&uri).map(|uri| uri.to_string()), expected, "{given}");
        }
    }
}
