//! Why a line, or a file as a whole, is not JSON, in words that say what to do.

/// How the message about a line begins, whatever else it says.
pub const NOT_JSON: &str = "This line is not parseable as valid JSON.";

/// Values that programs write which JSON does not have.
const FOREIGN: [(&str, &str); 8] = [
    ("NaN", "NaN is no JSON number; leave it out or write null"),
    ("-Infinity", "Infinity is no JSON number; leave it out or write null"),
    ("Infinity", "Infinity is no JSON number; leave it out or write null"),
    ("None", "None is Python's; JSON writes null. In Python, json.dumps() writes the line"),
    ("True", "True is Python's; JSON writes true. In Python, json.dumps() writes the line"),
    ("False", "False is Python's; JSON writes false. In Python, json.dumps() writes the line"),
    ("undefined", "undefined is no JSON value; leave it out or write null"),
    ("'", "JSON writes strings in double quotes. In Python, json.dumps() writes the line"),
];

/// The message for a line that is text but no JSON.
pub fn explain(text: &str, error: &serde_json::Error) -> String {
    // The library counts bytes, from 1, up to what it did not expect.
    let at = error.column().saturating_sub(1).min(text.len());
    let before = text.get(..at).unwrap_or(text);
    let column = before.chars().count().saturating_add(1);
    // What it met may begin a little before the place where it gave up.
    let rest = (0..=8).filter_map(|back| text.get(at.saturating_sub(back)..));
    let foreign = rest
        .flat_map(|rest| FOREIGN.iter().filter(move |(value, _)| rest.starts_with(value)))
        .map(|(_, advice)| *advice)
        .next();
    let reason = error.to_string();
    let reason = reason.split(" at line ").next().unwrap_or_default();
    let reason = match foreign {
        // Within a string such a word is text.
        Some(advice)
            if ["expected value", "expected ident", "key must be", "invalid number"]
                .iter()
                .any(|words| reason.contains(words)) =>
        {
            advice
        }
        _ if error.is_eof() => {
            "it ends in the middle of a value; each request has to be whole, on one line"
        }
        _ if before.trim_end().ends_with(',')
            && text.get(at..).is_some_and(|rest| rest.starts_with(['}', ']'])) =>
        {
            "trailing comma; JSON has none before a bracket"
        }
        _ if looks_like_csv(text) => "it looks like CSV; each line has to be a JSON object",
        _ => reason,
    };
    format!("{NOT_JSON} Column {column}: {reason}.")
}

/// The message for a line that is no text.
pub fn not_utf8(bytes: &[u8], valid_up_to: usize) -> String {
    let before =
        String::from_utf8_lossy(bytes.get(..valid_up_to).unwrap_or_default()).chars().count();
    let byte = bytes.get(valid_up_to).copied().unwrap_or_default();
    let column = before.saturating_add(1);
    format!(
        "{NOT_JSON} Column {column}: the byte 0x{byte:02X} is not UTF-8; the file may have been saved as Latin-1 or Windows-1252. Save it as UTF-8."
    )
}

fn looks_like_csv(text: &str) -> bool {
    let first = text.trim_start();
    !first.starts_with(['{', '[']) && text.split([',', ';', '\t']).count() > 1
}

/// What is wrong with a file as a whole, by its beginning: then that is one error, not one a line.
pub fn of_file(beginning: &[u8]) -> Option<String> {
    let whole = |what: &str| Some(format!("{NOT_JSON} {what}"));
    for (magic, format) in [
        (&b"\x1f\x8b"[..], "gzip"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"PK\x03\x04", "zip"),
        (b"BZh", "bzip2"),
        (b"\xfd7zXZ\x00", "xz"),
    ] {
        if beginning.starts_with(magic) {
            return whole(&format!("The file is compressed with {format}; decompress it."));
        }
    }
    if beginning.starts_with(b"PAR1") {
        return whole("The file is in the format Parquet; write one JSON object a line.");
    }
    let utf16 = [&b"\xff\xfe"[..], b"\xfe\xff", b"{\0", b"\0{", b"[\0", b"\0["];
    if utf16.iter().any(|mark| beginning.starts_with(mark)) {
        return whole("The file is encoded in UTF-16; save it as UTF-8.");
    }
    let text = beginning.strip_prefix(b"\xef\xbb\xbf").unwrap_or(beginning);
    let mut lines =
        text.split(|&byte| byte == b'\n').map(<[u8]>::trim_ascii).filter(|line| !line.is_empty());
    let (first, second) = (lines.next()?, lines.next()?);
    let is_cut =
        serde_json::from_slice::<serde::de::IgnoredAny>(first).is_err_and(|error| error.is_eof());
    let advice = "write each request as one JSON object on a line of its own (JSON Lines)";
    let delimiters =
        |line: &[u8]| line.iter().filter(|byte| matches!(byte, b',' | b';' | b'\t')).count();
    if !first.starts_with(b"{")
        && !first.starts_with(b"[")
        && delimiters(first) > 0
        && delimiters(first) == delimiters(second)
    {
        return whole(&format!("The file looks like CSV; {advice}."));
    }
    match first.first() {
        Some(b'[') if is_cut || first.ends_with(b",") => {
            whole(&format!("The file is one JSON array over many lines; {advice}."))
        }
        Some(b'{') if is_cut && !second.starts_with(b"{") => {
            whole(&format!("The file has JSON objects over several lines each; {advice}."))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn explained(text: &str) -> String {
        let error = serde_json::from_str::<serde::de::IgnoredAny>(text).unwrap_err();
        let message = explain(text, &error);
        message.strip_prefix(NOT_JSON).unwrap().trim().to_owned()
    }

    #[test]
    fn a_line_says_where_and_why_it_is_not_json() {
        for (text, expected) in [
            (r#"{"a":1,}"#, "Column 8: trailing comma;"),
            (r#"{"ü":NaN}"#, "Column 6: NaN is no JSON number"),
            (r#"{"a":-Infinity}"#, "Infinity is no JSON number"),
            (r#"{"a":None}"#, "None is Python's"),
            (r#"{'a':1}"#, "JSON writes strings in double quotes"),
            (r#"{"a":undefined}"#, "undefined is no JSON value"),
            (r#"{"a":"b"#, "it ends in the middle of a value"),
            ("custom_id,prompt", "it looks like CSV"),
            ("1;2;3", "it looks like CSV"),
            ("nope", "Column 2: expected"),
            ("{} x", "Column 4: trailing characters."),
        ] {
            let message = explained(text);
            assert!(message.contains(expected), "{text}: {message}");
        }
        let message = not_utf8(b"{\"\xc3\xbc\xfc\"}", 4);
        assert!(message.contains("Column 4: the byte 0xFC"), "{message}");
    }

    #[test]
    fn a_file_of_another_kind_is_named() {
        for (beginning, expected) in [
            (&b"\x1f\x8b\x08"[..], Some("gzip")),
            (b"PK\x03\x04", Some("zip")),
            (b"\xff\xfe{\0", Some("UTF-16")),
            (b"{\0\"\0", Some("UTF-16")),
            (b"[\n  {\"custom_id\":1},\n", Some("array")),
            (b"\xef\xbb\xbf[{\"custom_id\":1},\n{}]", Some("array")),
            (b"{\n  \"custom_id\": \"a\",\n", Some("several lines")),
            (b"[]\n[]\n", None),
            (b"{\"a\":1}\n{\"b\n", None),
            (b"{\"a\n{\"b\":1}\n", None),
            (b"id,prompt\na,hi\n", Some("CSV")),
            (b"", None),
            (b"\n\n{}\n", None),
        ] {
            let found = of_file(beginning);
            match expected {
                Some(word) => {
                    assert!(found.as_ref().is_some_and(|found| found.contains(word)), "{found:?}")
                }
                None => assert_eq!(found, None, "{beginning:?}"),
            }
        }
    }
}
