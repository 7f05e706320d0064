//! Normalization of request paths: some clients send a trailing slash, or two slashes instead of
//! one.

use axum::http::Uri;
use axum::http::uri::PathAndQuery;

/// Path segment before the name of a model, which may contain slashes.
const MODELS_SEGMENT: &str = "/models/";

/// Returns a URI without redundant slashes in its path, or none if the path has no such slashes.
pub(crate) fn normalized(uri: &Uri) -> Option<Uri> {
    let path = uri.path();
    let (head, name) = match path.find(MODELS_SEGMENT) {
        Some(at) => path.split_at(at.saturating_add(MODELS_SEGMENT.len())),
        None => (path, ""),
    };
    let is_redundant = head.contains("//") || path.len() > 1 && path.ends_with('/');
    if !is_redundant {
        return None;
    }
    let mut normal = String::with_capacity(path.len());
    for segment in head.split('/').filter(|segment| !segment.is_empty()) {
        normal.push('/');
        normal.push_str(segment);
    }
    if !name.is_empty() {
        normal.push('/');
        normal.push_str(name.trim_end_matches('/'));
    }
    if normal.is_empty() {
        normal.push('/');
    }
    if let Some(query) = uri.query() {
        normal.push('?');
        normal.push_str(query);
    }
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(PathAndQuery::try_from(normal).ok()?);
    Uri::from_parts(parts).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redundant_slashes_are_removed_except_in_model_names() {
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
