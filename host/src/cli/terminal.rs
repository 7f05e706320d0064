//! Terminal output of the commands: every line on standard output and standard error.
//!
//! **Threat.** Commands print text that others wrote: model names and error messages of clients,
//! responses of providers, file names, descriptions of plugins. A terminal obeys control characters
//! in such text. An escape sequence can move the cursor, clear the screen, rename the window or
//! overwrite a line that the user has to see. A bidirectional control character can display text in
//! an order that differs from its bytes, and so hide a file extension or a host name.
//!
//! **Defense.** All lines pass through this module. The progress bar, which draws on the terminal
//! itself, escapes its message with the same function.
//!
//! 1. `errln!` and `outln!` escape the complete line after it is formatted. A caller cannot forget
//!    to escape one value.
//! 2. The escape is `\uXXXX`, the notation of JSON. A JSON document that `--json` prints stays
//!    valid JSON with the same meaning.
//! 3. Line feeds and tabs pass, because the commands use them for their own layout. A value that
//!    must stay on its line passes through [`one_line`] first, so that a foreign value cannot add a
//!    line that looks like output of the command.
//!
//! The log is out of scope here: `tracing-subscriber` writes it.
//!
//! **Lost output.** A closed terminal or pipe never ends a command, because a batch in progress is
//! worth more than its messages. Errors of standard error are ignored. An error of standard output
//! sets a flag, and the process ends with status 1, because a script must not take truncated output
//! for complete output. A reader that closes the pipe, such as `head`, is not an error.

use std::fmt::Arguments;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};

/// Escapes control characters and bidirectional control characters; line feeds and tabs stay.
pub fn escape_control_characters(text: &str) -> String {
    let is_unsafe = |character: char| {
        let is_bidirectional_control = matches!(
            character,
            '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
        );
        (character.is_control() && !matches!(character, '\n' | '\t')) || is_bidirectional_control
    };
    if !text.contains(is_unsafe) {
        return text.to_owned();
    }
    let mut escaped = String::with_capacity(text.len().saturating_add(16));
    for character in text.chars() {
        if is_unsafe(character) {
            // The notation of JSON keeps printed JSON valid.
            escaped.push_str(&format!("\\u{:04x}", u32::from(character)));
        } else {
            escaped.push(character);
        }
    }
    escaped
}

/// Escapes a foreign value like [`escape_control_characters`], with its line feeds and tabs.
pub fn one_line(text: &str) -> String {
    escape_control_characters(text).replace('\n', "\\n").replace('\t', "\\t")
}

/// Set when a write to standard output failed for a reason other than a closed pipe.
static OUTPUT_FAILED: AtomicBool = AtomicBool::new(false);

/// Returns true if output of the command was lost, other than to a reader that closed the pipe.
pub fn output_failed() -> bool {
    OUTPUT_FAILED.load(Ordering::Relaxed)
}

/// Writes a line to standard error, escaped; `errln!` calls this function.
pub fn write_error(text: Arguments<'_>) {
    // A closed terminal must not end a command in the middle of its work.
    writeln!(std::io::stderr().lock(), "{}", escape_control_characters(&text.to_string())).ok();
}

/// Writes text to standard output, escaped and flushed, without a line feed at the end.
pub fn write_output(text: Arguments<'_>) {
    let mut output = std::io::stdout().lock();
    let written = output
        .write_all(escape_control_characters(&text.to_string()).as_bytes())
        .and_then(|()| output.flush());
    if written.is_err_and(|error| error.kind() != std::io::ErrorKind::BrokenPipe) {
        OUTPUT_FAILED.store(true, Ordering::Relaxed);
    }
}

/// Writes a line to standard output, escaped and flushed; `outln!` calls this function.
pub fn write_line(text: Arguments<'_>) {
    write_output(format_args!("{text}\n"));
}

/// Writes a line that exists nowhere else to standard output. Unlike [`write_line`], it fails also
/// if the reader has closed the pipe.
pub fn write_secret(secret: &str) -> std::io::Result<()> {
    let mut output = std::io::stdout().lock();
    output.write_all(escape_control_characters(secret).as_bytes())?;
    output.write_all(b"\n")?;
    output.flush()
}

/// Prints a formatted line to standard error: progress, warnings, errors.
macro_rules! errln {
    ($($text:tt)+) => { $crate::cli::terminal::write_error(format_args!($($text)+)) };
}

/// Prints a formatted line to standard output: the result of a command.
macro_rules! outln {
    ($($text:tt)+) => { $crate::cli::terminal::write_line(format_args!($($text)+)) };
}

pub(crate) use {errln, outln};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_escaped() {
        for (text, expected) in [
            ("plain ü\n\tx", "plain ü\n\tx"),
            ("\u{1b}[2J", "\\u001b[2J"),
            ("a\rb\u{7}", "a\\u000db\\u0007"),
            ("\u{9b}1m\u{202e}x", "\\u009b1m\\u202ex"),
        ] {
            assert_eq!(escape_control_characters(text), expected);
        }
    }
}
