//! Names and slugs of projects.

use batchwright_domain::ids::TenantId;

/// Maximum length of the name of a project, a service account or a key, in characters.
pub const MAX_NAME_CHARS: usize = 128;

/// Maximum length of a slug that is made from a name. A slug has up to 63 characters; the rest is
/// for a number that tells projects of similar names apart.
const MAX_SLUG_CHARS: usize = 54;

/// Slug of a name without any letter or digit of ASCII.
const SLUG_FALLBACK: &str = "project";

/// Reason why a text cannot be a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameFault {
    /// No visible character.
    #[error("it is empty")]
    Empty,
    /// More than [`MAX_NAME_CHARS`].
    #[error("it has more than {MAX_NAME_CHARS} characters")]
    TooLong,
    /// Line break or another control character.
    #[error("it contains a control character")]
    Control,
}

/// Checks the name of a project, a service account or a key; returns it without the spaces around.
pub fn check_name(name: &str) -> Result<&str, NameFault> {
    let trimmed = name.trim();
    if trimmed.is_empty() {
        Err(NameFault::Empty)
    } else if name.chars().nth(MAX_NAME_CHARS).is_some() {
        Err(NameFault::TooLong)
    } else if name.chars().any(char::is_control) {
        Err(NameFault::Control)
    } else {
        Ok(trimmed)
    }
}

/// Makes a slug from a name: lower-case ASCII letters, digits, and a hyphen for the rest.
pub fn slug(name: &str) -> TenantId {
    let mut slug = String::new();
    for character in name.chars().map(|character| character.to_ascii_lowercase()) {
        if slug.len() >= MAX_SLUG_CHARS {
            break;
        }
        if character.is_ascii_alphanumeric() {
            slug.push(character);
        } else if !slug.is_empty() && !slug.ends_with('-') {
            slug.push('-');
        }
    }
    let slug = slug.trim_end_matches('-');
    if slug.is_empty() { SLUG_FALLBACK.into() } else { slug.into() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn slug_has_letters_digits_and_single_hyphens() {
        for (name, expected) in [
            ("Acme", "acme"),
            ("  Acme -- Labs!  ", "acme-labs"),
            ("Zürich 2", "z-rich-2"),
            ("東京", "project"),
            ("../../etc", "etc"),
        ] {
            assert_eq!(slug(name).as_str(), expected);
        }
    }

    #[test]
    fn name_is_trimmed_and_refused_if_empty_long_or_with_control_characters() {
        assert_eq!(check_name(" Acme "), Ok("Acme"));
        assert_eq!(check_name(" \u{a0}"), Err(NameFault::Empty));
        assert_eq!(check_name(&"é".repeat(128)), Ok(&*"é".repeat(128)));
        assert_eq!(check_name(&"é".repeat(129)), Err(NameFault::TooLong));
        assert_eq!(check_name("a\nb"), Err(NameFault::Control));
    }

    proptest! {
        #[test]
        fn slug_of_any_name_is_valid(name in "\\PC{0,200}") {
            let slug = slug(&name);
            let slug = slug.as_str();
            prop_assert!((1..=MAX_SLUG_CHARS).contains(&slug.len()));
            prop_assert!(slug.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-')));
            prop_assert!(!slug.starts_with('-') && !slug.ends_with('-'));
        }
    }
}
