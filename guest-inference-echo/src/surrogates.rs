//! Halves of surrogate pairs. JSON may hold one as an escape, text may not: here it becomes text that is known again on the way out.

/// Stands before an escape that is text for now: a noncharacter, which no text has (Unicode 23.7).
const MARK: char = '\u{FDD0}';

/// JSON whose lone halves are marked text: `\ud800` becomes the mark, a backslash and `ud800`.
pub(crate) fn hidden(json: &str) -> String {
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
        // An escaped letter may have several bytes in what is no JSON.
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

/// JSON in which marked text is what it was.
pub(crate) fn restored(json: &str) -> String {
    json.replace(&format!("{MARK}\\\\"), "\\")
}

/// The half of a surrogate pair that a text begins with as an escape.
fn half(text: &str) -> Option<u16> {
    let digits = text.strip_prefix("\\u")?.get(..4)?;
    u16::from_str_radix(digits, 16).ok().filter(|code| (0xD800..=0xDFFF).contains(code))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_come_back_as_they_were() {
        for (json, expected) in [
            (r#"{"a":"\ud800"}"#, r#"{"a":"\ud800"}"#),
            (r#"{"a":"x\uDC00y","b":"\ud83d\ude00"}"#, r#"{"a":"x\uDC00y","b":"😀"}"#),
            (r#"{"a":"\ud800\ud800\udc00\\ud800"}"#, r#"{"a":"\ud800𐀀\\ud800"}"#),
            (r#"{"\udfff":"\n\"\u00e4"}"#, r#"{"\udfff":"\n\"ä"}"#),
        ] {
            let value: serde_json::Value = serde_json::from_str(&hidden(json)).unwrap();
            assert_eq!(restored(&value.to_string()), expected);
        }
        assert_eq!(hidden(r#"{"a":"\ud83d\ude00 \\ud800"}"#), r#"{"a":"\ud83d\ude00 \\ud800"}"#);
        for broken in ["\\", "\\u", "\\ud8", "\\ü", "\\ud800\\"] {
            restored(&hidden(broken));
        }
    }
}
