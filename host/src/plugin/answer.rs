//! What an adapter answers is input like any other: checked here, so that nothing above this room sees it unchecked.

use serde_json::value::RawValue;

use super::types::{Answer, Failure, Response, Step};

/// Largest state of an exchange or a pause, in bytes.
const MOST_STATE: usize = 64 << 10;

/// Longest code and message of a failure, in characters.
const LONGEST_CODE: usize = 64;
const LONGEST_MESSAGE: usize = 4000;

/// The step with its answer checked and on one line, or what is wrong with it.
pub fn checked(step: Step) -> Result<Step, String> {
    match step {
        Step::Send { state, .. } | Step::Wait { state, .. } if state.len() > MOST_STATE => {
            Err(format!("a state of {} bytes is more than {MOST_STATE}.", state.len()))
        }
        Step::Retry { after_milliseconds, otherwise } => {
            Ok(Step::Retry { after_milliseconds, otherwise: brief(checked_answer(otherwise)?) })
        }
        Step::Done(answer) => Ok(Step::Done(checked_answer(answer)?)),
        step => Ok(step),
    }
}

/// An answer as it is kept while a request waits for its next attempt, which may be long, and many do.
fn brief(answer: Answer) -> Answer {
    match answer {
        Answer::Response(response) if response.body.len() > MOST_STATE => {
            Answer::Failure(Failure {
                code: "answer_too_large".into(),
                message: format!(
                    "No attempt is left. The last answer, of status {}, had {} bytes, more than is kept between attempts.",
                    response.status,
                    response.body.len()
                ),
            })
        }
        answer => answer,
    }
}

fn checked_answer(answer: Answer) -> Result<Answer, String> {
    match answer {
        Answer::Response(response) => {
            if !(200..600).contains(&response.status) {
                return Err(format!("{} is not a status from 200 to 599.", response.status));
            }
            let body = one_line_object(response.body)?;
            Ok(Answer::Response(Response { body, ..response }))
        }
        Answer::Failure(mut failure) => {
            failure.code = for_people(&failure.code, LONGEST_CODE);
            failure.message = for_people(&failure.message, LONGEST_MESSAGE);
            Ok(Answer::Failure(failure))
        }
    }
}

/// A guest's words as they may be shown to people, on a terminal, in a log or a table: on one line, and not too long.
pub fn for_people(text: &str, characters: usize) -> String {
    text.chars()
        .take(characters)
        .map(|letter| if letter.is_control() { ' ' } else { letter })
        .collect()
}

/// A JSON object without line breaks; every value stays as it was written, numbers of any size included.
fn one_line_object(text: String) -> Result<String, String> {
    let object: &RawValue = serde_json::from_str(&text)
        .map_err(|error| format!("the body of its answer is not JSON: {error}."))?;
    let object = object.get();
    if !object.starts_with('{') {
        return Err("the body of its answer is not a JSON object.".into());
    }
    // Within a string a line break is written as an escape, so one that stands here stands between values.
    if object.contains(['\n', '\r']) { Ok(without_spaces(object)) } else { Ok(object.to_owned()) }
}

/// Valid JSON without the white space between its values.
fn without_spaces(json: &str) -> String {
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
        match checked(Step::Done(answer))? {
            Step::Done(Answer::Response(response)) => Ok(response.body),
            _ => Err("another step".into()),
        }
    }

    #[test]
    fn a_body_comes_out_as_one_line_with_its_values_as_written() {
        let body =
            "{\n  \"a\": 1.0000000000000000001e400,\r\n\t\"b \\\" \\\\\": [ \"x\\n y\" , {} ]\n}";
        let line = r#"{"a":1.0000000000000000001e400,"b \" \\":["x\n y",{}]}"#;
        assert_eq!(response(200, body).as_deref(), Ok(line));
        assert_eq!(response(200, " {\"a\": 1} ").as_deref(), Ok("{\"a\": 1}"));
    }

    #[test]
    fn what_is_no_object_or_no_status_is_refused() {
        for body in ["", "[]", "\"{}\"", "{", "{} {}", "nul"] {
            assert!(response(200, body).is_err(), "{body}");
        }
        for status in [0, 100, 199, 600, u16::MAX] {
            assert!(response(status, "{}").is_err(), "{status}");
        }
        let step = Step::Wait { milliseconds: 1, state: vec![0; MOST_STATE + 1] };
        assert!(checked(step).is_err());
    }

    #[test]
    fn a_failures_words_are_kept_short() {
        let failure = Failure { code: "c".repeat(1000), message: "\x1b[2Jü\n".repeat(10_000) };
        let Ok(Step::Done(Answer::Failure(failure))) =
            checked(Step::Done(Answer::Failure(failure)))
        else {
            panic!()
        };
        assert_eq!(
            (failure.code.len(), failure.message.chars().count()),
            (LONGEST_CODE, LONGEST_MESSAGE)
        );
        assert!(failure.message.starts_with(" [2Jü  [2J"), "{}", failure.message);
    }

    #[test]
    fn what_is_kept_between_attempts_is_small() {
        let otherwise = |body: String| {
            let otherwise =
                Answer::Response(Response { status: 503, request_id: None, body, usage: None });
            match checked(Step::Retry { after_milliseconds: None, otherwise }) {
                Ok(Step::Retry { otherwise, .. }) => otherwise,
                other => panic!("{other:?}"),
            }
        };
        assert!(matches!(otherwise("{}".into()), Answer::Response(_)));
        let large = otherwise(format!(r#"{{"x":"{}"}}"#, "x".repeat(MOST_STATE)));
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
        fn one_line_means_the_same_as_many(value in prop::collection::btree_map(".*", json(), 0..4)) {
            let value = serde_json::json!(value);
            let line = response(200, &serde_json::to_string_pretty(&value).unwrap()).unwrap();
            prop_assert!(!line.contains('\n'));
            prop_assert_eq!(serde_json::from_str::<serde_json::Value>(&line).unwrap(), value);
        }
    }
}
