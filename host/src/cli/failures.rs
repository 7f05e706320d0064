//! Summary of failures by error code, for batches with thousands of failed requests.

use std::collections::BTreeMap;

use batchwright_domain::text::truncate_for_message;
use bytes::Bytes;
use futures_util::{Stream, TryStreamExt};
use serde::Deserialize;
use serde_json::Value;

use super::terminal::one_line;
use crate::error::Error;

/// Maximum number of codes with a count of their own; other codes share one count.
const MAX_CODES: usize = 20;

/// Maximum size of an error file line that is parsed, in bytes; longer lines count as others.
const MAX_LINE_BYTES: usize = 1 << 20;

/// Number of failures per error code.
#[derive(Default)]
pub struct Failures {
    counts: BTreeMap<String, u64>,
    others: u64,
}

#[derive(Deserialize)]
pub(crate) struct Line {
    response: Option<Response>,
    error: Option<ErrorCode>,
}

#[derive(Deserialize)]
struct Response {
    status_code: u16,
    body: Value,
}

#[derive(Deserialize)]
struct ErrorCode {
    code: String,
}

impl Failures {
    /// Counts the lines of an error file while its chunks arrive; fails if the stream fails.
    pub async fn read(chunks: impl Stream<Item = Result<Bytes, Error>>) -> Result<Self, Error> {
        let (mut failures, mut buffer, mut chunks) =
            (Self::default(), Vec::new(), std::pin::pin!(chunks));
        while let Some(chunk) = chunks.try_next().await? {
            for part in chunk.split_inclusive(|&byte| byte == b'\n') {
                if buffer.len() <= MAX_LINE_BYTES {
                    buffer.extend_from_slice(part);
                }
                if part.ends_with(b"\n") {
                    failures.add_line(&buffer);
                    buffer.clear();
                }
            }
        }
        Ok(failures)
    }

    /// Counts the failure on one line of an error file.
    fn add_line(&mut self, line: &[u8]) {
        let Ok(Line { response, error }) = serde_json::from_slice(line) else {
            return self.others += 1;
        };
        match (response, error) {
            (_, Some(error)) => self.add(&error.code),
            (Some(Response { status_code, body }), None) => {
                let text = |key: &str| {
                    body.pointer(key).and_then(Value::as_str).filter(|text| !text.is_empty())
                };
                let code = text("/error/code").or_else(|| text("/error/type")).unwrap_or_default();
                self.add(format!("status {status_code} {code}").trim_end());
            }
            (None, None) => self.others += 1,
        }
    }

    /// Counts one failure with this code.
    pub fn add(&mut self, code: &str) {
        // A provider or a plugin chose the code, and it is printed.
        let code = one_line(&truncate_for_message(code));
        if self.counts.len() < MAX_CODES || self.counts.contains_key(&code) {
            let count = self.counts.entry(code).or_default();
            *count = count.saturating_add(1);
        } else {
            self.others = self.others.saturating_add(1);
        }
    }

    /// Returns the counts as text, most frequent code first; empty without failures.
    pub fn summary(&self) -> String {
        let mut counts: Vec<(&str, u64)> =
            self.counts.iter().map(|(code, count)| (code.as_str(), *count)).collect();
        if self.others > 0 {
            counts.push(("others", self.others));
        }
        counts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        counts.iter().map(|(code, count)| format!("{count} {code}")).collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
mod tests {
    use futures_util::stream;

    use super::*;

    #[test]
    fn codes_are_shortened_and_stay_on_one_line() {
        let mut failures = Failures::default();
        failures.add("a\n\u{1b}[2Jall answered");
        failures.add(&"b".repeat(5000));
        let summary = failures.summary();
        assert!(summary.contains(r"a\n\u001b[2Jall answered"), "{summary}");
        assert!(summary.len() < 200 && !summary.contains('\n'), "{summary}");
    }

    #[tokio::test]
    async fn summary_does_not_depend_on_chunk_boundaries() {
        let file = [
            r#"{"response":null,"error":{"code":"provider_timeout","message":"m"}}"#,
            r#"{"response":{"status_code":400,"body":{"error":{"code":"bad_image","type":"t"}}},"error":null}"#,
            r#"{"response":{"status_code":429,"body":{"error":{"code":null,"type":"tokens"}}},"error":null}"#,
            r#"{"response":{"status_code":500,"body":{}},"error":null}"#,
            r#"{"response":null,"error":{"code":"provider_timeout","message":"m"}}"#,
            "nonsense",
        ]
        .join("\n")
            + "\n";
        for size in [1, 7, 1000] {
            let chunks: Vec<_> = file
                .as_bytes()
                .chunks(size)
                .map(|chunk| Ok(Bytes::copy_from_slice(chunk)))
                .collect();
            let failures = Failures::read(stream::iter(chunks)).await.unwrap();
            assert_eq!(
                failures.summary(),
                "2 provider_timeout, 1 status 400 bad_image, 1 status 429 tokens, \
                 1 status 500, 1 others"
            );
        }
    }
}
