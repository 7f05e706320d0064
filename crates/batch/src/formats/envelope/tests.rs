//! Tests of `envelope`.

use proptest::prelude::*;

use super::*;

fn parse(text: &str) -> Envelope<'_> {
    Envelope::parse(text).unwrap()
}

#[test]
fn envelope_parts_are_read_despite_unrepresentable_values() {
    for odd in ["", r#","odd":[1e999,"\ud800",123456789012345678901234567890]"#] {
        let body = format!(r#"{{"model":"m","n":{{}}{odd}}}"#);
        let text = format!(r#"{{"custom_id":"\u0061","url":"/v1/x","body":{body}{odd}}}"#);
        let line = parse(&text);
        assert_eq!(
            (line.custom_id.as_deref(), line.url),
            (Some("a"), Some(r#""/v1/x""#)),
            "{text}"
        );
        assert_eq!(
            (line.has_body, line.has_model, line.model.as_deref()),
            (true, true, Some("m")),
            "{text}"
        );
        assert_eq!(line.duplicates, [""; 0]);
    }
    for nothing in ["[]", "null", "1e999", r#""\ud800""#, "{}", r#"[{"a":1,"a":2}]"#] {
        assert_eq!(parse(nothing).model, None, "{nothing}");
        assert!(!parse(nothing).has_body, "{nothing}");
    }
    for no_body in [r#"{"body":1e999}"#, r#"{"body":"\ud800"}"#, r#"{"body":[{"model":"m"}]}"#] {
        assert!(!parse(no_body).has_body && parse(no_body).model.is_none(), "{no_body}");
    }
    assert!(parse(r#"{"body":{"model":7}}"#).has_model);
    for bad in ["", "{", "{} {}", r#"{"a":}"#, "nope", r#"{"body":{"model":}}"#, "01"] {
        assert!(Envelope::parse(bad).is_err(), "{bad}");
    }
}

#[test]
fn duplicate_keys_are_reported_with_their_paths() {
    for (text, paths) in [
        (r#"{"custom_id":"a","custom_id":"b"}"#, vec!["custom_id"]),
        (r#"{"body":{"model":"a","mod\u0065l":"b"}}"#, vec!["body.model"]),
        (
            concat!(
                r#"{"body":{"messages":[{"role":"user"},"#,
                r#"{"role":"user","role":"system","a":1,"a":2}]}}"#
            ),
            vec!["body.messages[1].role", "body.messages[1].a"],
        ),
        (r#"{"body":{"input":[[],{"x":1e999,"x":1}]}}"#, vec!["body.input[1].x"]),
        (r#"{"body":{"model":"a","MODEL":"b"}}"#, vec!["body.MODEL"]),
        (r#"{"body":{"input":[[{"x":1,"x":2}],1e400]}}"#, vec!["body.input[0].x"]),
        (r#"{"x":1,"body":{"x":1,"messages":[{"x":1},{"x":1}]}}"#, vec![]),
        (r#"{"body":{"tools":[{"a":1,"a":2}],"metadata":{"b":1,"b":2}}}"#, vec![]),
        (r#"{"\ud800":1,"\ud800":2}"#, vec!["\u{fffd}\u{fffd}\u{fffd}"]),
        (r#"{"body":{"model":"a"},"body":{"model":"a","model":"b"}}"#, vec!["body", "body.model"]),
    ] {
        assert_eq!(parse(text).duplicates, paths, "{text}");
    }
    let many: String = (0..50).map(|number| format!(r#""k{number}":1,"k{number}":2,"#)).collect();
    assert_eq!(
        parse(&format!(r#"{{{many}"body":{{}}}}"#)).duplicates.len(),
        MAX_REPORTED_DUPLICATES
    );
}

#[test]
fn million_nested_arrays_are_read_without_recursion() {
    for bad in [false, true] {
        let (open, close) =
            ("[".repeat(1_000_000), "]".repeat(if bad { 999_999 } else { 1_000_000 }));
        for text in [
            format!("{open}{close}"),
            format!(r#"{{"body":{open}{close}}}"#),
            format!(r#"{{"body":{{"model":"m","input":{open}{close}}}}}"#),
            format!(r#"{{"body":{{"messages":[1e999,{open}{close}],"model":"m"}}}}"#),
            format!(r#"{{"body":{{"messages":[{{"role":{open}{close}}}]}},"x":{open}{close}}}"#),
        ] {
            assert_eq!(Envelope::parse(&text).is_err(), bad, "{}", text.get(..40).unwrap());
        }
    }
    let deep =
        format!(r#"{{"body":{{"input":{}{{"x":1,"x":1}}{}}}}}"#, "[".repeat(200), "]".repeat(200));
    assert_eq!(parse(&deep).duplicates, [""; 0]);
}

proptest! {
    #[test]
    fn duplicates_are_reported_if_and_only_if_a_key_occurs_twice(
        keys in prop::collection::vec("[a-c]{1,2}", 0..6),
    ) {
        let members: Vec<String> = keys.iter().map(|key| format!(r#""{key}":1"#)).collect();
        let text = format!(r#"{{"body":{{"messages":[{{{}}}]}}}}"#, members.join(","));
        let unique: std::collections::BTreeSet<_> = keys.iter().collect();
        prop_assert_eq!(parse(&text).duplicates.is_empty(), unique.len() == keys.len());
    }
}
