//! Halves of surrogate pairs, such as `"\ud800"`. JSON allows one as an escape, and no Rust string
//! can hold it, so a parser rejects the whole body.
//!
//! `hide` rewrites each half into plain text behind a mark before the body is parsed. `restore`
//! turns marked text back into the escape after the response is written. The mark is a
//! noncharacter, which Unicode reserves for internal use, so a client's text does not contain it.

/// Mark before a hidden escape: a noncharacter, which interchanged text does not contain (Unicode
/// 23.7).
const MARK: char = '\u{FDD0}';

/// Hides lone halves as marked text: `\ud800` becomes the mark, an escaped backslash and `ud800`.
pub(crate) fn hide(json: &str) -> String {
    let mut hidden = String::with_capacity(json.len() + 16);
    let mut rest = json;
    while let Some(at) = rest.find('\\') {
        let (before, escape) = rest.split_at(at);
        hidden.push_str(before);
        let length = match (half(escape), escape.get(6..).and_then(half)) {
            (Some(0xD800..=0xDBFF), Some(0xDC00..=0xDFFF)) => 12,
            (Some(_), _) => {
                hidden.push(MARK);
                hidden.push('\\');
                6
            }
            (None, _) => 2,
        };
        let length = length.min(escape.len());
        // In invalid JSON a backslash may precede a character of several bytes.
        let length = (length..=escape.len())
            .find(|&length| escape.is_char_boundary(length))
            .unwrap_or(escape.len());
        let (whole, after) = escape.split_at(length);
        hidden.push_str(whole);
        rest = after;
    }
    hidden.push_str(rest);
    hidden
}

/// Turns marked text back into escapes.
pub(crate) fn restore(json: &str) -> String {
    json.replace(&format!("{MARK}\\\\"), "\\")
}

/// Returns the half of a surrogate pair if the text begins with the escape of one.
fn half(text: &str) -> Option<u16> {
    let digits = text.strip_prefix("\\u")?.get(..4)?;
    u16::from_str_radix(digits, 16).ok().filter(|code| (0xD800..=0xDFFF).contains(code))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hidden_halves_are_restored() {
        for (json, expected) in [
            (r#"{"a":"\ud800"}"#, r#"{"a":"\ud800"}"#),
            (r#"{"a":"x\uDC00y","b":"\ud83d\ude00"}"#, r#"{"a":"x\uDC00y","b":"😀"}"#),
            (r#"{"a":"\ud800\ud800\udc00\\ud800"}"#, r#"{"a":"\ud800𐀀\\ud800"}"#),
            (r#"{"\udfff":"\n\"\u00e4"}"#, r#"{"\udfff":"\n\"ä"}"#),
        ] {
            let value: serde_json::Value = serde_json::from_str(&hide(json)).unwrap();
            assert_eq!(restore(&value.to_string()), expected);
        }
        assert_eq!(hide(r#"{"a":"\ud83d\ude00 \\ud800"}"#), r#"{"a":"\ud83d\ude00 \\ud800"}"#);
        for broken in ["\\", "\\u", "\\ud8", "\\ü", "\\ud800\\"] {
            restore(&hide(broken));
        }
    }
}
