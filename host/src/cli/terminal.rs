//! What commands print. Words of clients, providers and files may hold control characters: here they are written as escapes, so that no
//! model's name moves the cursor, renames the window or hides a line. A terminal or a pipe that is gone ends nothing.

use std::fmt::Arguments;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};

/// Text whose control characters, and those that turn the direction of writing, are escapes; ends of lines and tabs stay.
pub fn plain(text: &str) -> String {
    let is_odd = |letter: char| {
        let turns = matches!(letter, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        (letter.is_control() && !matches!(letter, '\n' | '\t')) || turns
    };
    if !text.contains(is_odd) {
        return text.to_owned();
    }
    let mut plain = String::with_capacity(text.len().saturating_add(16));
    for letter in text.chars() {
        if is_odd(letter) {
            // As JSON writes it, so that JSON stays JSON.
            plain.push_str(&format!("\\u{:04x}", u32::from(letter)));
        } else {
            plain.push(letter);
        }
    }
    plain
}

/// A value on one line: what comes from elsewhere must not make up lines of its own.
pub fn one_line(text: &str) -> String {
    plain(text).replace('\n', "\\n").replace('\t', "\\t")
}

/// Output that was asked for could not be written, and its reader has not gone away by itself.
static IS_LOST: AtomicBool = AtomicBool::new(false);

pub fn is_output_lost() -> bool {
    IS_LOST.load(Ordering::Relaxed)
}

pub fn write_error(text: Arguments<'_>) {
    // A hangup of the terminal is no reason to end in the middle of something.
    writeln!(std::io::stderr().lock(), "{}", plain(&text.to_string())).ok();
}

pub fn write_output(text: Arguments<'_>) {
    let mut output = std::io::stdout().lock();
    let written =
        output.write_all(plain(&text.to_string()).as_bytes()).and_then(|()| output.flush());
    if written.is_err_and(|error| error.kind() != std::io::ErrorKind::BrokenPipe) {
        IS_LOST.store(true, Ordering::Relaxed);
    }
}

/// Prints a line of a command's output.
pub fn write_line(text: Arguments<'_>) {
    write_output(format_args!("{text}\n"));
}

/// Prints a line for people on standard error.
macro_rules! say {
    ($($text:tt)+) => { $crate::cli::terminal::write_error(format_args!($($text)+)) };
}

/// Prints a line of a command's output.
macro_rules! put {
    ($($text:tt)+) => { $crate::cli::terminal::write_line(format_args!($($text)+)) };
}

pub(crate) use {put, say};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_shown_and_not_obeyed() {
        for (text, expected) in [
            ("plain ü\n\tx", "plain ü\n\tx"),
            ("\u{1b}[2J", "\\u001b[2J"),
            ("a\rb\u{7}", "a\\u000db\\u0007"),
            ("\u{9b}1m\u{202e}x", "\\u009b1m\\u202ex"),
        ] {
            assert_eq!(plain(text), expected);
        }
    }
}
