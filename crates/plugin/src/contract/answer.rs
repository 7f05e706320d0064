//! Validation of the steps and answers that adapters return.
//!
//! A value of a guest is untrusted input. Code above the `plugin` module sees only validated
//! values.

use batchwright_domain::text::printable;
use serde_json::value::RawValue;

use crate::contract::types::{Answer, Failure, Response, Step};

/// Largest state of an exchange or a pause.
const MAX_STATE_BYTES: usize = 64 << 10;

/// Longest code of a failure.
const MAX_CODE_CHARS: usize = 64;
/// Longest message of a failure.
const MAX_MESSAGE_CHARS: usize = 4000;

/// Validates a step and puts the body of its answer on one line. Returns the violation as a
/// sentence.
pub(crate) fn check_step(step: Step) -> Result<Step, String> {
    match step {
        Step::Send { state, .. } | Step::Wait { state, .. } if state.len() > MAX_STATE_BYTES => {
            Err(format!(
                "it returned a state of {} bytes; the limit is {MAX_STATE_BYTES}.",
                state.len()
            ))
        }
        Step::Retry { after_milliseconds, otherwise } => {
            let otherwise = bounded_for_retry(check_answer(otherwise)?);
            Ok(Step::Retry { after_milliseconds, otherwise })
        }
        Step::Done(answer) => Ok(Step::Done(check_answer(answer)?)),
        step => Ok(step),
    }
}

/// Bounds an answer that is kept in memory until the next attempt: many requests wait at the same
/// time, and a wait can be long.
fn bounded_for_retry(answer: Answer) -> Answer {
    match answer {
        Answer::Response(response) if response.body.len() > MAX_STATE_BYTES => {
            Answer::Failure(Failure {
                code: "answer_too_large".into(),
                message: format!(
                    "No attempt is left. The last answer had status {} and {} bytes; \
                     answers of more than {MAX_STATE_BYTES} bytes are not kept between attempts.",
                    response.status,
                    response.body.len()
                ),
            })
        }
        answer => answer,
    }
}

fn check_answer(answer: Answer) -> Result<Answer, String> {
    match answer {
        Answer::Response(response) => {
            if !(200..600).contains(&response.status) {
                return Err(format!("{} is not a status from 200 to 599.", response.status));
            }
            let body = one_line_object(response.body)?;
            Ok(Answer::Response(Response { body, ..response }))
        }
        Answer::Failure(mut failure) => {
            failure.code = printable(&failure.code, MAX_CODE_CHARS);
            failure.message = printable(&failure.message, MAX_MESSAGE_CHARS);
            Ok(Answer::Failure(failure))
        }
    }
}

/// Returns a JSON object without line breaks. Every value stays as the guest wrote it, including
/// numbers of any size.
fn one_line_object(text: String) -> Result<String, String> {
    let object: &RawValue = serde_json::from_str(&text)
        .map_err(|error| format!("the body of its answer is not JSON: {error}."))?;
    let object = object.get();
    if !object.starts_with('{') {
        return Err("the body of its answer is not a JSON object.".into());
    }
    // A line break inside a string is an escape, so a literal line break is between values.
    if object.contains(['\n', '\r']) { Ok(minify(object)) } else { Ok(object.to_owned()) }
}

/// Returns valid JSON without the white space between its values.
fn minify(json: &str) -> String {
    let mut compact = String::with_capacity(json.len());
    let mut in_string = false;
    let mut escaped = false;
    for letter in json.chars() {
        if in_string {
            in_string = escaped || letter != '"';
            escaped = !escaped && letter == '\\';
        } else if matches!(letter, ' ' | '\t' | '\n' | '\r') {
            continue;
        } else {
            in_string = letter == '"';
        }
        compact.push(letter);
    }
    compact
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn response(status: u16, body: &str) -> Result<String, String> {
        let answer =
            Answer::Response(Response { status, request_id: None, body: body.into(), usage: None });
        match check_step(Step::Done(answer))? {
            Step::Done(Answer::Response(response)) => Ok(response.body),
            _ => Err("another step".into()),
        }
    }

    #[test]
    fn response_body_becomes_one_line_and_keeps_values_verbatim() {
        let body =
            "{\n  \"a\": 1.0000000000000000001e400,\r\n\t\"b \\\" \\\\\": [ \"x\\n y\" , {} ]\n}";
        let line = r#"{"a":1.0000000000000000001e400,"b \" \\":["x\n y",{}]}"#;
        assert_eq!(response(200, body).as_deref(), Ok(line));
        assert_eq!(response(200, " {\"a\": 1} ").as_deref(), Ok("{\"a\": 1}"));
    }

    #[test]
    fn check_step_rejects_invalid_bodies_statuses_and_states() {
        for body in ["", "[]", "\"{}\"", "{", "{} {}", "nul"] {
            assert!(response(200, body).is_err(), "{body}");
        }
        for status in [0, 100, 199, 600, u16::MAX] {
            assert!(response(status, "{}").is_err(), "{status}");
        }
        let step = Step::Wait { milliseconds: 1, state: vec![0; MAX_STATE_BYTES + 1] };
        assert!(check_step(step).is_err());
    }

    #[test]
    fn failure_code_and_message_are_truncated_and_sanitized() {
        let failure = Failure { code: "c".repeat(1000), message: "\x1b[2Jü\n".repeat(10_000) };
        let Ok(Step::Done(Answer::Failure(failure))) =
            check_step(Step::Done(Answer::Failure(failure)))
        else {
            panic!()
        };
        assert_eq!(
            (failure.code.len(), failure.message.chars().count()),
            (MAX_CODE_CHARS, MAX_MESSAGE_CHARS)
        );
        assert!(failure.message.starts_with(" [2Jü  [2J"), "{}", failure.message);
    }

    #[test]
    fn retry_answer_above_the_limit_becomes_a_failure() {
        let otherwise = |body: String| {
            let otherwise =
                Answer::Response(Response { status: 503, request_id: None, body, usage: None });
            match check_step(Step::Retry { after_milliseconds: None, otherwise }) {
                Ok(Step::Retry { otherwise, .. }) => otherwise,
                other => panic!("{other:?}"),
            }
        };
        assert!(matches!(otherwise("{}".into()), Answer::Response(_)));
        let large = otherwise(format!(r#"{{"x":"{}"}}"#, "x".repeat(MAX_STATE_BYTES)));
        assert!(
            matches!(large, Answer::Failure(failure) if failure.message.contains("status 503"))
        );
    }

    fn json() -> impl Strategy<Value = serde_json::Value> {
        use serde_json::{Value, json};
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            ".*".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map(".*", inner, 0..4).prop_map(|map| json!(map)),
            ]
        })
    }

    proptest! {
        #[test]
        fn response_body_on_one_line_has_equal_value(
            value in prop::collection::btree_map(".*", json(), 0..4)
        ) {
            let value = serde_json::json!(value);
            let line = response(200, &serde_json::to_string_pretty(&value).unwrap()).unwrap();
            prop_assert!(!line.contains('\n'));
            prop_assert_eq!(serde_json::from_str::<serde_json::Value>(&line).unwrap(), value);
        }
    }
}
