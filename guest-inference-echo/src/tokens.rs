//! Approximate token counter: each word is one token, and each punctuation mark is one token.

/// Splits a text into tokens, each with the white space before it. The tokens joined are the text,
/// without white space at its end.
pub(crate) fn pieces(text: &str) -> Vec<&str> {
    let mut pieces = Vec::new();
    let mut start = 0;
    let mut in_word = false;
    for (at, letter) in text.char_indices() {
        let is_word = letter.is_alphanumeric();
        if in_word && !is_word {
            pieces.extend(text.get(start..at));
            start = at;
        }
        in_word = is_word;
        if !is_word && !letter.is_whitespace() {
            let end = at + letter.len_utf8();
            pieces.extend(text.get(start..end));
            start = end;
        }
    }
    if in_word {
        pieces.extend(text.get(start..));
    }
    pieces
}

/// Returns the number of tokens of a text.
pub(crate) fn count(text: &str) -> u64 {
    pieces(text).len() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_words_and_punctuation_and_join_to_the_text() {
        assert_eq!(pieces("What is 2+2?"), ["What", " is", " 2", "+", "2", "?"]);
        assert_eq!(pieces(" ä\nö, "), [" ä", "\nö", ","]);
        assert_eq!(pieces("ab").concat(), "ab");
        assert_eq!(count(""), 0);
        assert_eq!(count("  "), 0);
    }
}
