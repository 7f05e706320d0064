//! Lines of the output file and of the error file.

use batchwright_domain::ids::{BatchId, FileId};
use batchwright_domain::text::hex;
use batchwright_domain::usage::TokenUsage;
use batchwright_plugin::types::{Answer, Failure, Usage};
use batchwright_store::{ResultKind, ResultRow};
use sha2::{Digest, Sha256};

/// Derives 16 bytes in hexadecimal from the parts. The same parts always give the same id.
fn derived_id(parts: &[&[u8]]) -> String {
    let mut digest = Sha256::new();
    for part in parts {
        digest.update(part);
        digest.update([0]);
    }
    hex(digest.finalize().get(..16).unwrap_or_default())
}

/// Returns the id of a request, which is the same in every attempt and after a restart.
pub(crate) fn request_id(batch: &BatchId, line: u64) -> String {
    format!(
        "batch_req_{}",
        derived_id(&[b"request", batch.as_str().as_bytes(), &line.to_le_bytes()])
    )
}

/// Returns the id of an online request: new, or derived from the key that makes a retry of it safe.
pub(crate) fn online_request_id(tenant: &str, key: Option<&str>, body: &str) -> String {
    let id = match key {
        Some(key) => {
            let parts = [tenant.as_bytes(), key.as_bytes(), body.as_bytes()];
            derived_id(&[b"online", parts[0], parts[1], parts[2]])
        }
        None => uuid::Uuid::new_v4().simple().to_string(),
    };
    format!("batch_req_{id}")
}

/// Returns the id of the output file or of the error file.
///
/// The id depends on the batch and the kind only, so that a repeated finalization is idempotent.
pub(crate) fn file_id(batch: &BatchId, kind: &str) -> FileId {
    format!("file-{}", derived_id(&[b"file", batch.as_str().as_bytes(), kind.as_bytes()])).into()
}

/// Creates the result row of a request from its answer.
pub(crate) fn row(batch: &BatchId, line: u64, custom_id: &str, answer: &Answer) -> ResultRow {
    let id = request_id(batch, line);
    // The serialization of a string cannot fail.
    let custom_id = serde_json::to_string(custom_id).unwrap_or_default();
    let (kind, payload, usage) = match answer {
        Answer::Response(response) => {
            let kind = if (200..300).contains(&response.status) {
                ResultKind::Completed
            } else {
                ResultKind::Failed
            };
            let call = derived_id(&[b"call", batch.as_str().as_bytes(), &line.to_le_bytes()]);
            let (status, body) = (response.status, &response.body);
            let provider_id =
                response.request_id.as_deref().map(provider_request_id).unwrap_or_default();
            let begin = format!(
                r#"{{"id":"{id}","custom_id":{custom_id},"response":{{"status_code":{status},"#
            );
            let payload = format!(
                r#"{begin}"request_id":"{call}",{provider_id}"body":{body}}},"error":null}}"#
            );
            (kind, payload, response.usage)
        }
        Answer::Failure(failure) => {
            (ResultKind::Failed, failure_line(&id, &custom_id, failure), None)
        }
    };
    ResultRow {
        line,
        kind,
        payload: one_line(payload).into_bytes(),
        usage: usage.map(tokens).unwrap_or_default(),
        charge: None,
    }
}

/// Escapes the characters that many line readers take for a line end.
///
/// In JSON these characters can only be inside strings, where the escape has the same meaning.
fn one_line(json: String) -> String {
    const ENDS: [(char, &str); 3] =
        [('\u{85}', "\\u0085"), ('\u{2028}', "\\u2028"), ('\u{2029}', "\\u2029")];
    if json.is_ascii() || !json.contains(ENDS.map(|(end, _)| end)) {
        return json;
    }
    ENDS.iter().fold(json, |json, (end, escape)| json.replace(*end, escape))
}

/// Returns the request id of the provider as a JSON member, without control characters.
///
/// The support of the provider can find the request by this id.
fn provider_request_id(id: &str) -> String {
    const MAX_CHARS: usize = 256;
    let shown: String = id.chars().filter(|char| !char.is_control()).take(MAX_CHARS).collect();
    let value = serde_json::to_string(&shown).unwrap_or_default();
    if shown.is_empty() { String::new() } else { format!(r#""provider_request_id":{value},"#) }
}

/// Returns the line of a request that was not executed.
pub(crate) fn not_executed(
    batch: &BatchId,
    line: u64,
    custom_id: &str,
    code: &str,
    message: &str,
) -> Vec<u8> {
    let custom_id = serde_json::to_string(custom_id).unwrap_or_default();
    let failure = Failure { code: code.into(), message: message.into() };
    one_line(failure_line(&request_id(batch, line), &custom_id, &failure)).into_bytes()
}

/// Formats the line of a request that has no response.
fn failure_line(id: &str, custom_id: &str, failure: &Failure) -> String {
    let error = serde_json::json!({"code": failure.code, "message": failure.message});
    format!(r#"{{"id":"{id}","custom_id":{custom_id},"response":null,"error":{error}}}"#)
}

/// Converts the usage that an adapter reports.
pub(crate) fn tokens(usage: Usage) -> TokenUsage {
    TokenUsage {
        input: usage.input_tokens,
        cached_input: usage.cached_input_tokens,
        output: usage.output_tokens,
        reasoning: usage.reasoning_tokens,
    }
}

#[cfg(test)]
mod tests {
    use batchwright_plugin::types::Response;

    use super::*;

    #[test]
    fn result_line_has_the_shape_of_the_api() {
        let response = |status| {
            Answer::Response(Response {
                status,
                request_id: None,
                body: r#"{"a":1}"#.into(),
                usage: None,
            })
        };
        let good = row(&"batch_1".into(), 3, "a\"b\n", &response(200));
        let id = request_id(&"batch_1".into(), 3);
        assert_eq!(id.len(), "batch_req_".len() + 32);
        let text = String::from_utf8(good.payload).unwrap();
        let begin = format!(
            r#"{{"id":"{id}","custom_id":"a\"b\n","response":{{"status_code":200,"request_id":"#
        );
        assert!(text.starts_with(&format!(r#"{begin}""#)), "{text}");
        assert!(text.ends_with(r#"","body":{"a":1}},"error":null}"#), "{text}");
        let odd = Response {
            status: 200,
            request_id: None,
            body: "{\"a\":\"\u{2028}\u{85}\"}".into(),
            usage: None,
        };
        let text = String::from_utf8(
            row(&"batch_1".into(), 3, "\u{2029}", &Answer::Response(odd)).payload,
        )
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
            String::from_utf8(row(&"batch_1".into(), 3, "a", &Answer::Response(with_id)).payload)
                .unwrap();
        let parsed: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(parsed.pointer("/response/provider_request_id"), Some(&"req\"1".into()));
        assert_eq!(good.kind, ResultKind::Completed);
        assert_eq!(row(&"batch_1".into(), 3, "a", &response(404)).kind, ResultKind::Failed);
        let failure = Answer::Failure(Failure { code: "c".into(), message: "\"m\"".into() });
        let text = String::from_utf8(row(&"batch_1".into(), 4, "a", &failure).payload).unwrap();
        assert!(
            text.ends_with(
                r#""custom_id":"a","response":null,"error":{"code":"c","message":"\"m\""}}"#
            ),
            "{text}"
        );
        assert_ne!(request_id(&"batch_1".into(), 3), request_id(&"batch_1".into(), 4));
        assert_ne!(file_id(&"batch_1".into(), "output"), file_id(&"batch_1".into(), "error"));
    }
}
