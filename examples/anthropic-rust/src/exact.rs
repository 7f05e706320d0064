//! JSON reader and writer that keep every number exactly.
//!
//! `serde_json::Value` loses numbers that do not fit its types: an integer beyond 64 bits,
//! `1e400`, forty digits. `read` turns such a number into a string behind a mark, and `write`
//! turns the string back into the number.

use serde_json::Value;

/// Mark before such a number: a noncharacter, which interchanged text does not contain (Unicode
/// 23.7).
const MARK: char = '\u{FDD0}';

/// Parses JSON and marks numbers that `Value` cannot hold.
pub(crate) fn read(json: &str) -> serde_json::Result<Value> {
    let mut marked = String::with_capacity(json.len());
    let mut rest = json;
    while let Some(at) =
        rest.find(|letter: char| letter == '"' || letter == '-' || letter.is_ascii_digit())
    {
        let (before, token) = rest.split_at(at);
        marked.push_str(before);
        let length =
            if token.starts_with('"') { string_length(token) } else { number_length(token) };
        let (token, after) = token.split_at(length);
        if token.starts_with('"') || is_exact(token) {
            marked.push_str(token);
        } else {
            marked.push_str(&format!("\"{MARK}{token}\""));
        }
        rest = after;
    }
    marked.push_str(rest);
    serde_json::from_str(&marked)
}

/// Writes JSON and restores marked numbers.
pub(crate) fn write(value: &Value) -> String {
    let json = value.to_string();
    let mut plain = String::with_capacity(json.len());
    let mut rest = json.as_str();
    while let Some((before, after)) = rest.split_once(&format!("\"{MARK}")) {
        plain.push_str(before);
        let (number, after) = after.split_once('"').unwrap_or((after, ""));
        plain.push_str(number);
        rest = after;
    }
    plain.push_str(rest);
    plain
}

/// Returns the length of the string at the start of the text.
fn string_length(token: &str) -> usize {
    let mut escaped = false;
    for (at, letter) in token.char_indices().skip(1) {
        if !escaped && letter == '"' {
            return at + 1;
        }
        escaped = !escaped && letter == '\\';
    }
    token.len()
}

/// Returns the length of the number at the start of the text.
fn number_length(token: &str) -> usize {
    token
        .find(|letter: char| !(letter.is_ascii_digit() || "+-.eE".contains(letter)))
        .unwrap_or(token.len())
}

/// Returns true if `Value` holds the number exactly. Also true for text that is not a number: the
/// parser rejects it.
fn is_exact(token: &str) -> bool {
    let Ok(float) = token.parse::<f64>() else { return true };
    if serde_json::from_str::<serde::de::IgnoredAny>(token).is_err() {
        return true;
    }
    let is_integer = token.bytes().all(|byte| byte == b'-' || byte.is_ascii_digit());
    match is_integer {
        true => token.parse::<i64>().is_ok() || token.parse::<u64>().is_ok(),
        false => float.is_finite() && token.bytes().filter(u8::is_ascii_digit).count() <= 17,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_as_they_were_read() {
        for json in [
            r#"{"a":123456789012345678901234567890,"b":[1e400,-0.12345678901234567890]}"#,
            r#"{"c":"1e400 \" 2","d":-7}"#,
            r#"{"a":18446744073709551615,"b":1.5}"#,
            "-1e400",
        ] {
            assert_eq!(write(&read(json).unwrap()), json);
        }
        assert_eq!(read("1.10").unwrap().as_f64(), Some(1.1));
        for bad in ["01", "1.", "-", "{\"a\":1e}", "\"", "[1 2]"] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }
}
