//! Error messages for lines and files that are not JSON, with the cause and the remedy.

/// Beginning of every message of this module. It is part of the API contract.
pub(crate) const NOT_JSON: &str = "This line is not parseable as valid JSON.";

/// Tokens of other languages that JSON does not have, each with a remedy.
const FOREIGN_TOKENS: [(&str, &str); 8] = [
    ("NaN", "NaN is not a JSON number; omit it or use null"),
    ("-Infinity", "Infinity is not a JSON number; omit it or use null"),
    ("Infinity", "Infinity is not a JSON number; omit it or use null"),
    ("None", "None is Python syntax; JSON uses null. In Python, write lines with json.dumps()"),
    ("True", "True is Python syntax; JSON uses true. In Python, write lines with json.dumps()"),
    ("False", "False is Python syntax; JSON uses false. In Python, write lines with json.dumps()"),
    ("undefined", "undefined is not a JSON value; omit it or use null"),
    ("'", "JSON strings use double quotes. In Python, write lines with json.dumps()"),
];

/// Returns the message for a line that is UTF-8 but not JSON.
pub(crate) fn explain(text: &str, error: &serde_json::Error) -> String {
    // serde_json counts bytes, from 1, up to the unexpected token.
    let at = error.column().saturating_sub(1).min(text.len());
    let before = text.get(..at).unwrap_or(text);
    let column = before.chars().count().saturating_add(1);
    // The unexpected token may begin a few bytes before the position of the error.
    let rest = (0..=8).filter_map(|back| text.get(at.saturating_sub(back)..));
    let foreign = rest
        .flat_map(|rest| FOREIGN_TOKENS.iter().filter(move |(value, _)| rest.starts_with(value)))
        .map(|(_, advice)| *advice)
        .next();
    let reason = error.to_string();
    let reason = reason.split(" at line ").next().unwrap_or_default();
    let reason = match foreign {
        // A token is the cause only of these errors. In a string, it is ordinary text.
        Some(advice)
            if ["expected value", "expected ident", "key must be", "invalid number"]
                .iter()
                .any(|kind| reason.contains(kind)) =>
        {
            advice
        }
        _ if error.is_eof() => {
            "the line ends in the middle of a value; write each request on a single line"
        }
        _ if before.trim_end().ends_with(',')
            && text.get(at..).is_some_and(|rest| rest.starts_with(['}', ']'])) =>
        {
            "trailing comma; remove the comma before the closing bracket"
        }
        _ if looks_like_csv(text) => "the line looks like CSV; write each request as a JSON object",
        _ => reason,
    };
    format!("{NOT_JSON} Column {column}: {reason}.")
}

/// Returns the message for a line that is not UTF-8.
pub(crate) fn not_utf8(bytes: &[u8], valid_up_to: usize) -> String {
    let before =
        String::from_utf8_lossy(bytes.get(..valid_up_to).unwrap_or_default()).chars().count();
    let byte = bytes.get(valid_up_to).copied().unwrap_or_default();
    let column = before.saturating_add(1);
    format!(
        "{NOT_JSON} Column {column}: the byte 0x{byte:02X} is not UTF-8; the file may have been \
         saved as Latin-1 or Windows-1252. Save it as UTF-8."
    )
}

/// Returns true if a line looks like CSV.
fn looks_like_csv(text: &str) -> bool {
    let first = text.trim_start();
    !first.starts_with(['{', '[']) && text.split([',', ';', '\t']).count() > 1
}

/// Returns the message for a file in another format, or `None` if the file may be JSON Lines.
///
/// The check uses the beginning of the file. It replaces one error for every line by a single
/// error.
pub(crate) fn of_file(beginning: &[u8]) -> Option<String> {
    let message = |cause: &str| Some(format!("{NOT_JSON} {cause}"));
    for (magic, format) in [
        (&b"\x1f\x8b"[..], "gzip"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"PK\x03\x04", "zip"),
        (b"BZh", "bzip2"),
        (b"\xfd7zXZ\x00", "xz"),
    ] {
        if beginning.starts_with(magic) {
            return message(&format!("The file is compressed with {format}; decompress it."));
        }
    }
    if beginning.starts_with(b"PAR1") {
        return message("The file is in Parquet format; write one JSON object per line.");
    }
    let utf16 = [&b"\xff\xfe"[..], b"\xfe\xff", b"{\0", b"\0{", b"[\0", b"\0["];
    if utf16.iter().any(|mark| beginning.starts_with(mark)) {
        return message("The file is encoded in UTF-16; save it as UTF-8.");
    }
    let text = beginning.strip_prefix(b"\xef\xbb\xbf").unwrap_or(beginning);
    let mut lines =
        text.split(|&byte| byte == b'\n').map(<[u8]>::trim_ascii).filter(|line| !line.is_empty());
    let (first, second) = (lines.next()?, lines.next()?);
    let is_cut =
        serde_json::from_slice::<serde::de::IgnoredAny>(first).is_err_and(|error| error.is_eof());
    let advice = "write each request as one JSON object on its own line (JSON Lines)";
    let delimiters =
        |line: &[u8]| line.iter().filter(|byte| matches!(byte, b',' | b';' | b'\t')).count();
    if !first.starts_with(b"{")
        && !first.starts_with(b"[")
        && delimiters(first) > 0
        && delimiters(first) == delimiters(second)
    {
        return message(&format!("The file looks like CSV; {advice}."));
    }
    match first.first() {
        Some(b'[') if is_cut || first.ends_with(b",") => {
            message(&format!("The file is one JSON array that spans many lines; {advice}."))
        }
        Some(b'{') if is_cut && !second.starts_with(b"{") => {
            message(&format!("The file has JSON objects that span several lines; {advice}."))
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
    fn line_errors_name_the_column_and_the_cause() {
        for (text, expected) in [
            (r#"{"a":1,}"#, "Column 8: trailing comma;"),
            (r#"{"ü":NaN}"#, "Column 6: NaN is not a JSON number"),
            (r#"{"a":-Infinity}"#, "Infinity is not a JSON number"),
            (r#"{"a":None}"#, "None is Python syntax"),
            (r#"{'a':1}"#, "JSON strings use double quotes"),
            (r#"{"a":undefined}"#, "undefined is not a JSON value"),
            (r#"{"a":"b"#, "the line ends in the middle of a value"),
            ("custom_id,prompt", "the line looks like CSV"),
            ("1;2;3", "the line looks like CSV"),
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
    fn files_of_other_formats_are_detected() {
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
