//! Text for people: shortened, on one line, with suggestions.

/// Characters of a client's value that an error message repeats.
const MAX_QUOTED_CHARACTERS: usize = 100;

/// Similarity from which a name is suggested, from 0 to 1.
const MIN_SIMILARITY: f64 = 0.8;

/// Returns the first characters of a client's value, as many as an error message repeats.
pub fn truncate_for_message(text: &str) -> String {
    text.chars().take(MAX_QUOTED_CHARACTERS).collect()
}

/// Returns at most `max_characters` of an untrusted text, on one line, for a terminal, a log or a
/// table.
pub fn printable(text: &str, max_characters: usize) -> String {
    text.chars()
        .take(max_characters)
        .map(|letter| if letter.is_control() { ' ' } else { letter })
        .collect()
}

/// Returns the known name that is most similar to `given`, or none if none is similar enough.
pub fn nearest<'a>(given: &str, known: &[&'a str]) -> Option<&'a str> {
    let similarity = |name: &&str| strsim::jaro_winkler(given, name);
    let best = known.iter().max_by(|one, other| similarity(one).total_cmp(&similarity(other)))?;
    (similarity(best) > MIN_SIMILARITY).then_some(best)
}

/// Returns bytes in lowercase hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    let digit = |value: u8| char::from_digit(u32::from(value), 16).unwrap_or_default();
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_suggests_similar_names_only() {
        assert_eq!(nearest("max_atempts", &["listen", "max_attempts"]), Some("max_attempts"));
        assert_eq!(nearest("colour", &["listen", "max_attempts"]), None);
    }

    #[test]
    fn hex_has_two_digits_for_each_byte() {
        assert_eq!(hex(&[0, 0x1f, 0xff]), "001fff");
    }

    #[test]
    fn printable_text_has_one_line_and_a_maximum() {
        assert_eq!(printable("a\nb\u{1b}[1mcdef", 8), "a b [1mc");
    }
}
