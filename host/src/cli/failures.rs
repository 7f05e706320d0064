//! Failures summed up by their codes: what a person asks first of a batch of thousands.

use std::collections::BTreeMap;

use bytes::Bytes;
use futures_util::{Stream, TryStreamExt};
use serde::Deserialize;
use serde_json::Value;

use super::Error;

/// Kinds of failures that are told apart; the rest is summed up as one.
const MAX_KINDS: usize = 20;

/// Longest line of an error file that is looked into, in bytes.
const MAX_LINE_BYTES: usize = 1 << 20;

/// How often each code came.
#[derive(Default)]
pub struct Failures {
    counts: BTreeMap<String, u64>,
    others: u64,
}

#[derive(Deserialize)]
struct Line {
    response: Option<Response>,
    error: Option<Coded>,
}

#[derive(Deserialize)]
struct Response {
    status_code: u16,
    body: Value,
}

#[derive(Deserialize)]
struct Coded {
    code: String,
}

impl Failures {
    /// Sums up the lines of an error file as they come.
    pub async fn read(pieces: impl Stream<Item = Result<Bytes, Error>>) -> Result<Self, Error> {
        let (mut failures, mut held, mut pieces) =
            (Self::default(), Vec::new(), std::pin::pin!(pieces));
        while let Some(piece) = pieces.try_next().await? {
            for part in piece.split_inclusive(|&byte| byte == b'\n') {
                if held.len() <= MAX_LINE_BYTES {
                    held.extend_from_slice(part);
                }
                if part.ends_with(b"\n") {
                    failures.add_line(&held);
                    held.clear();
                }
            }
        }
        Ok(failures)
    }

    fn add_line(&mut self, line: &[u8]) {
        let Ok(Line { response, error }) = serde_json::from_slice(line) else {
            return self.others += 1;
        };
        match (response, error) {
            (_, Some(error)) => self.add(error.code),
            (Some(Response { status_code, body }), None) => {
                let text = |key: &str| {
                    body.pointer(key).and_then(Value::as_str).filter(|text| !text.is_empty())
                };
                let code = text("/error/code").or_else(|| text("/error/type")).unwrap_or_default();
                self.add(format!("status {status_code} {code}").trim_end().to_owned());
            }
            (None, None) => self.others += 1,
        }
    }

    pub fn add(&mut self, code: String) {
        if self.counts.len() < MAX_KINDS || self.counts.contains_key(&code) {
            let count = self.counts.entry(code).or_default();
            *count = count.saturating_add(1);
        } else {
            self.others = self.others.saturating_add(1);
        }
    }

    /// Those that came most often first.
    pub fn in_words(&self) -> String {
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

    #[tokio::test]
    async fn failures_are_summed_up_wherever_the_file_is_cut() {
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
            let pieces: Vec<_> = file
                .as_bytes()
                .chunks(size)
                .map(|piece| Ok(Bytes::copy_from_slice(piece)))
                .collect();
            let failures = Failures::read(stream::iter(pieces)).await.unwrap();
            assert_eq!(
                failures.in_words(),
                "2 provider_timeout, 1 status 400 bad_image, 1 status 429 tokens, 1 status 500, 1 others"
            );
        }
    }
}
