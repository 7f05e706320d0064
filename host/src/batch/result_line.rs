//! A line of a result file.

use sha2::{Digest, Sha256};

use crate::plugin::hex;
use crate::plugin::types::{Answer, Failure, Usage};
use crate::store::{Ending, ResultRow, TokenUsage};

/// Sixteen bytes in hexadecimal that are the same whenever they are asked for.
fn derived(parts: &[&[u8]]) -> String {
    let mut digest = Sha256::new();
    for part in parts {
        digest.update(part);
        digest.update([0]);
    }
    hex(digest.finalize().get(..16).unwrap_or_default())
}

/// The id of a batch's request: the same after a restart, in every attempt.
pub fn request_id(batch: &str, line: u64) -> String {
    format!("batch_req_{}", derived(&[b"request", batch.as_bytes(), &line.to_le_bytes()]))
}

/// The id of a batch's output or error file, so that finalizing can be repeated.
pub fn file_id(batch: &str, kind: &str) -> String {
    format!("file-{}", derived(&[b"file", batch.as_bytes(), kind.as_bytes()]))
}

/// The row of a request that ended with this answer.
pub fn row(batch: &str, line: u64, custom_id: &str, answer: &Answer) -> ResultRow {
    let id = request_id(batch, line);
    // A string is always JSON.
    let custom_id = serde_json::to_string(custom_id).unwrap_or_default();
    let (ending, payload, usage) = match answer {
        Answer::Response(response) => {
            let ending = if (200..300).contains(&response.status) {
                Ending::Completed
            } else {
                Ending::Failed
            };
            let call = derived(&[b"call", batch.as_bytes(), &line.to_le_bytes()]);
            let (status, body) = (response.status, &response.body);
            let theirs =
                response.request_id.as_deref().map(provider_request_id).unwrap_or_default();
            let payload = format!(
                r#"{{"id":"{id}","custom_id":{custom_id},"response":{{"status_code":{status},"request_id":"{call}",{theirs}"body":{body}}},"error":null}}"#
            );
            (ending, payload, response.usage)
        }
        Answer::Failure(failure) => (Ending::Failed, failure_line(&id, &custom_id, failure), None),
    };
    ResultRow {
        line,
        ending,
        payload: one_line(payload).into_bytes(),
        usage: usage.map(tokens).unwrap_or_default(),
    }
}

/// JSON without letters that many readers of lines take for the end of one. They can only be within strings, where an escape means the same.
fn one_line(json: String) -> String {
    const ENDS: [(char, &str); 3] =
        [('\u{85}', "\\u0085"), ('\u{2028}', "\\u2028"), ('\u{2029}', "\\u2029")];
    if json.is_ascii() || !json.contains(ENDS.map(|(letter, _)| letter)) {
        return json;
    }
    ENDS.iter().fold(json, |json, (letter, escape)| json.replace(*letter, escape))
}

/// The provider's own id of the exchange as a member of the response, for its support: what can be shown of it.
fn provider_request_id(id: &str) -> String {
    const LONGEST: usize = 256;
    let shown: String = id.chars().filter(|letter| !letter.is_control()).take(LONGEST).collect();
    let value = serde_json::to_string(&shown).unwrap_or_default();
    if shown.is_empty() { String::new() } else { format!(r#""provider_request_id":{value},"#) }
}

/// The line of a request that was not executed.
pub fn not_executed(batch: &str, line: u64, custom_id: &str, code: &str, message: &str) -> Vec<u8> {
    let custom_id = serde_json::to_string(custom_id).unwrap_or_default();
    let failure = Failure { code: code.into(), message: message.into() };
    one_line(failure_line(&request_id(batch, line), &custom_id, &failure)).into_bytes()
}

fn failure_line(id: &str, custom_id: &str, failure: &Failure) -> String {
    let error = serde_json::json!({"code": failure.code, "message": failure.message});
    format!(r#"{{"id":"{id}","custom_id":{custom_id},"response":null,"error":{error}}}"#)
}

fn tokens(usage: Usage) -> TokenUsage {
    TokenUsage {
        input: usage.input_tokens,
        cached_input: usage.cached_input_tokens,
        output: usage.output_tokens,
        reasoning: usage.reasoning_tokens,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugin::types::Response;

    #[test]
    fn a_line_has_the_contracts_shape() {
        let response = |status| {
            Answer::Response(Response {
                status,
                request_id: None,
                body: r#"{"a":1}"#.into(),
                usage: None,
            })
        };
        let good = row("batch_1", 3, "a\"b\n", &response(200));
        let id = request_id("batch_1", 3);
        assert_eq!(id.len(), "batch_req_".len() + 32);
        let text = String::from_utf8(good.payload).unwrap();
        assert!(
            text.starts_with(&format!(
                r#"{{"id":"{id}","custom_id":"a\"b\n","response":{{"status_code":200,"request_id":""#
            )),
            "{text}"
        );
        assert!(text.ends_with(r#"","body":{"a":1}},"error":null}"#), "{text}");
        let odd = Response {
            status: 200,
            request_id: None,
            body: "{\"a\":\"\u{2028}\u{85}\"}".into(),
            usage: None,
        };
        let text = String::from_utf8(row("batch_1", 3, "\u{2029}", &Answer::Response(odd)).payload)
            .unwrap();
        assert!(
            text.contains(r#""custom_id":"\u2029""#) && text.contains(r#"{"a":"\u2028\u0085"}"#),
            "{text}"
        );
        let with_id = Response {
            status: 200,
            request_id: Some("req\n\"1".into()),
            body: "{}".into(),
            usage: None,
        };
        let text =
            String::from_utf8(row("batch_1", 3, "a", &Answer::Response(with_id)).payload).unwrap();
        let parsed: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(parsed.pointer("/response/provider_request_id"), Some(&"req\"1".into()));
        assert_eq!(good.ending, Ending::Completed);
        assert_eq!(row("batch_1", 3, "a", &response(404)).ending, Ending::Failed);
        let failure = Answer::Failure(Failure { code: "c".into(), message: "\"m\"".into() });
        let text = String::from_utf8(row("batch_1", 4, "a", &failure).payload).unwrap();
        assert!(
            text.ends_with(
                r#""custom_id":"a","response":null,"error":{"code":"c","message":"\"m\""}}"#
            ),
            "{text}"
        );
        assert_ne!(request_id("batch_1", 3), request_id("batch_1", 4));
        assert_ne!(file_id("batch_1", "output"), file_id("batch_1", "error"));
    }
}
