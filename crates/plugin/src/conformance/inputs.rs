//! Inputs of the conformance checks: valid, odd and hostile.

use batchwright_domain::endpoint::Endpoint;
use batchwright_egress::TransportErrorKind;

/// Endpoints of the API, each with a valid body.
pub(crate) const ENDPOINTS: [(Endpoint, &str); 5] = [
    (Endpoint::ChatCompletions, r#"{"model":"m","messages":[{"role":"user","content":"hi"}]}"#),
    (Endpoint::Completions, r#"{"model":"m","prompt":"hi"}"#),
    (Endpoint::Embeddings, r#"{"model":"m","input":["a","b"]}"#),
    (Endpoint::Responses, r#"{"model":"m","input":"hi"}"#),
    (Endpoint::Moderations, r#"{"model":"m","input":"hi"}"#),
];

/// Request bodies that a client may send and that validators may have accepted.
pub(crate) const ODD_BODIES: [&str; 12] = [
    "{}",
    r#"{"model":"m","messages":[]}"#,
    r#"{"model":"m","messages":null,"input":null,"prompt":null}"#,
    r#"{"model":"m","messages":[{"role":"user","content":7},7,null,[]]}"#,
    r#"{"model":"m","messages":[{"role":"user","content":"\u0000 ü 😀 \ud83d\ude00"}],"n":1e999}"#,
    r#"{"model":"m","messages":[{"role":"user","content":"\ud800"}],"\udfff":1}"#,
    r#"{"model":"m","model":"n","messages":[{"role":"user","content":"x"}]}"#,
    r#"{"model":"m","messages":[{"role":"\ud800","content":"x"}]}"#,
    r#"{"model":"m","messages":[{"role":{"toString":1,"valueOf":2},"content":"x"}]}"#,
    concat!(
        r#"{"model":"m","seed":123456789012345678901234567890,"#,
        r#""messages":[{"role":"user","content":"x"}],"__proto__":{"a":1}}"#,
    ),
    concat!(
        r#"{"model":"m","messages":[{"role":"user","content":[{"type":"nobody knows"}]}],"#,
        r#""tools":"x","stop":{}}"#,
    ),
    r#"{"model":"m","input":{"a":[[[[[[[[]]]]]]]]},"prompt":[[1,2],[3]]}"#,
];

/// Response bodies that a provider may send.
pub(crate) const ODD_RESPONSE_BODIES: [&[u8]; 20] = [
    b"",
    b"{}",
    b"[]",
    b"null",
    b"<html><body>an error page</body></html>",
    b"{\"error\":\"as a string\"}",
    b"{\"error\":{\"message\":\"m\",\"type\":\"t\"}}",
    b"{\"choices\":[],\"usage\":{\"prompt_tokens\":-1}}",
    b"\xff\xfe not UTF-8",
    b"\xef\xbb\xbf{\"id\":\"x\"}",
    b"{oops}",
    b"{\"id\":1,}",
    b"{\"id\":[\x00]}",
    b"{\"id\":NaN}",
    b"{\"id\":1e999}",
    b"{\"id\":\"\\ud800\"}",
    b"{\"id\":\"x\",\"usage\":{\"prompt_tokens\":18446744073709551616,\"completion_tokens\":1.5}}",
    b"{\"error\":{\"message\":\"\xff\"}}",
    b"{\"id\":\"\xff\",\"choices\":[{\"message\":{\"content\":\"\xff\"}}]}",
    b"{\"message\":{\"content\":null},\"content\":[{\"type\":\"text\"}],\"usage\":7",
];

/// All faults of an exchange.
pub(crate) const FAULTS: [TransportErrorKind; 7] = [
    TransportErrorKind::NameResolution,
    TransportErrorKind::Connection,
    TransportErrorKind::Tls,
    TransportErrorKind::Timeout,
    TransportErrorKind::Protocol,
    TransportErrorKind::TooLarge,
    TransportErrorKind::NotAllowed,
];

/// Lines of an input file, valid and invalid.
pub(crate) const INPUT_LINES: [&str; 15] = [
    concat!(
        r#"{"custom_id":"a","method":"POST","url":"/v1/chat/completions","#,
        r#""body":{"model":"m","messages":[{"role":"user","content":"hi"}]}}"#,
    ),
    r#"{"custom_id":"b","method":"POST","url":"/v1/embeddings","body":{"model":"m","input":"hi"}}"#,
    "{}",
    "[]",
    "null",
    "7",
    "\"text\"",
    "no json",
    "{\"custom_id\":",
    r#"{"custom_id":7,"method":[],"url":{},"body":"x"}"#,
    concat!(
        r#"{"custom_id":"\ud800","method":"POST","url":"/v1/chat/completions","#,
        r#""body":{"\udfff":1e999}}"#,
    ),
    "{\"custom_id\":\"\u{0}\u{1}\"}",
    "{\"custom_id\":\"z\",\"body\":[\u{0}]}",
    concat!(
        r#"{"custom_id":"ü😀","method":"get","url":"","#,
        r#""body":{"model":null,"messages":{},"stream":"yes"}}"#,
    ),
    r#"{"custom_id":"c","custom_id":"d","body":{},"body":[]}"#,
];

/// Request body that differs from all bodies above.
pub(crate) const OTHER_BODY: &str = concat!(
    r#"{"model":"other","messages":[{"role":"user","content":"other"}],"#,
    r#""input":"other","prompt":"other"}"#,
);

/// Values of `retry-after` that a provider may send instead of seconds.
pub(crate) const ODD_RETRY_AFTER_VALUES: [&str; 6] = [
    "3",
    "0x10",
    "-1",
    "1e9",
    "",
    "99999999999999999999999999999999999999999999999999999999999999999999999999999999",
];
