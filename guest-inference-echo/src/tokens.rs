//! Something to count where there is no tokenizer: a word is a token, and so is each mark of punctuation.

/// The pieces of a text, each with the white space before it, so that joined they give the text again (but for white space at its end).
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

pub(crate) fn count(text: &str) -> u64 {
    pieces(text).len() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_marks_are_counted_and_nothing_is_lost() {
        assert_eq!(pieces("What is 2+2?"), ["What", " is", " 2", "+", "2", "?"]);
        assert_eq!(pieces(" ä\nö, "), [" ä", "\nö", ","]);
        assert_eq!(pieces("ab").concat(), "ab");
        assert_eq!(count(""), 0);
        assert_eq!(count("  "), 0);
    }
}
