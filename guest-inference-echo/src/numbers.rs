//! Numbers beyond the range of a float. JSON allows them, and `serde_json::Value` does not. No
//! response depends on such a number, so its text is enough.

/// Returns the JSON with every number beyond the range of a float, such as `1e400`, as a string.
pub(crate) fn without_large_numbers(json: &str) -> String {
    let mut plain = String::with_capacity(json.len() + 16);
    let (mut in_string, mut escaped) = (false, false);
    let mut rest = json;
    while let Some(letter) = rest.chars().next() {
        let is_number = !in_string && (letter == '-' || letter.is_ascii_digit());
        let length = match is_number {
            true => rest
                .find(|letter: char| !(letter.is_ascii_digit() || "+-.eE".contains(letter)))
                .unwrap_or(rest.len()),
            false => letter.len_utf8(),
        };
        let (token, after) = rest.split_at(length);
        if is_number && token.parse::<f64>().is_ok_and(f64::is_infinite) {
            plain.push('"');
            plain.push_str(token);
            plain.push('"');
        } else {
            plain.push_str(token);
        }
        if in_string {
            in_string = escaped || letter != '"';
            escaped = !escaped && letter == '\\';
        } else {
            in_string = letter == '"';
        }
        rest = after;
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_beyond_the_float_range_become_strings() {
        let json = r#"{"a":1e400,"b":[-1e999,2],"c":"1e400 \" 1e400"}"#;
        assert_eq!(
            without_large_numbers(json),
            r#"{"a":"1e400","b":["-1e999",2],"c":"1e400 \" 1e400"}"#
        );
    }
}
