//! Declaration of settings, each written once.
//!
//! A crate declares its settings with [`settings!`](crate::settings!) as a struct that belongs to a
//! section of the config
//! file. Each field is a key of that section, a flag `--key-with-dashes` and a variable
//! `BATCHWRIGHT_KEY`. All three are
//! given as text and parsed by [`Value::parse`], so they accept the same spellings and report the
//! same errors. The
//! default is text too: it is what `--help` and the reference show, and it is parsed like a given
//! value.
//!
//! Errors are collected in [`Given`], so that an operator sees all of them at once.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use crate::units::{Count, Size, Span};

/// One setting.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// Section of the config file.
    pub section: &'static str,
    /// Key in the config file; with dashes the flag, in capitals the end of the variable.
    pub name: &'static str,
    /// Placeholder of the value in help, such as `TIME`.
    pub placeholder: &'static str,
    /// Default as text; empty for an optional setting.
    pub default: &'static str,
    /// Default as shown to people.
    pub shown_default: &'static str,
    /// Documentation, one entry a line.
    pub doc: &'static [&'static str],
}

impl Setting {
    /// The documentation in one line.
    pub fn help(&self) -> String {
        self.doc.iter().map(|line| line.trim()).collect::<Vec<_>>().join(" ")
    }

    /// Name of the flag, without its dashes in front.
    pub fn flag(&self) -> String {
        self.name.replace('_', "-")
    }

    /// Name of the environment variable.
    pub fn variable(&self) -> String {
        format!("BATCHWRIGHT_{}", self.name.to_uppercase())
    }
}

/// Type of a setting's value.
pub trait Value: Sized {
    /// Parses the text of a flag, a variable or a key; the error says what would be right.
    fn parse(text: &str) -> Result<Self, String>;
}

/// Implements [`Value`] by [`std::str::FromStr`].
#[macro_export]
macro_rules! value_from_str {
    ($($type:ty)+) => {$(
        impl $crate::settings::Value for $type {
            fn parse(text: &str) -> Result<Self, String> {
                text.parse().map_err(|error| format!("{error}"))
            }
        }
    )+};
}

value_from_str!(Count Size Span);

/// Value that is more than zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Positive<T>(T);

impl<T> std::ops::Deref for Positive<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

/// Type with a zero.
pub trait Zero {
    /// Returns true for zero.
    fn is_zero(&self) -> bool;
}

impl Zero for Span {
    fn is_zero(&self) -> bool {
        self.duration().is_zero()
    }
}

impl Zero for Size {
    fn is_zero(&self) -> bool {
        self.bytes() == 0
    }
}

impl Zero for u64 {
    fn is_zero(&self) -> bool {
        *self == 0
    }
}

impl<T: Value + Zero> Value for Positive<T> {
    fn parse(text: &str) -> Result<Self, String> {
        let value = T::parse(text)?;
        if value.is_zero() { Err(format!("`{text}` must be more than 0")) } else { Ok(Self(value)) }
    }
}

impl Value for bool {
    fn parse(text: &str) -> Result<Self, String> {
        text.parse().map_err(|_| format!("`{text}` is not `true` or `false`"))
    }
}

impl Value for u64 {
    fn parse(text: &str) -> Result<Self, String> {
        text.parse().map_err(|_| format!("`{text}` is not a whole number"))
    }
}

impl Value for usize {
    fn parse(text: &str) -> Result<Self, String> {
        text.parse().map_err(|_| format!("`{text}` is not a whole number"))
    }
}

impl Value for String {
    fn parse(text: &str) -> Result<Self, String> {
        Ok(text.to_owned())
    }
}

impl Value for PathBuf {
    fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() { Err("the path is empty".into()) } else { Ok(text.into()) }
    }
}

impl Value for SocketAddr {
    fn parse(text: &str) -> Result<Self, String> {
        text.parse().map_err(|_| {
            format!("`{text}` is not an address; write it as 127.0.0.1:8080 or [::1]:8080")
        })
    }
}

/// Absent if the text is empty.
impl<T: Value> Value for Option<T> {
    fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() { Ok(None) } else { T::parse(text).map(Some) }
    }
}

/// Entries separated by commas; an empty text is an empty list.
impl Value for Vec<String> {
    fn parse(text: &str) -> Result<Self, String> {
        let entries = text.split(',').map(str::trim).filter(|entry| !entry.is_empty());
        Ok(entries.map(str::to_owned).collect())
    }
}

/// A struct of settings, as [`settings!`](crate::settings!) declares it.
pub trait Section: Sized {
    /// Every setting of the struct, in the order of its fields.
    const SETTINGS: &'static [Setting];

    /// Takes the struct's settings out of what was given, with defaults for the rest. Absent if a
    /// value is invalid; the
    /// errors are in `given` then.
    fn read(given: &mut Given) -> Option<Self>;
}

/// Text of one setting, and where it was given.
#[derive(Clone, Debug)]
struct Text {
    text: String,
    origin: String,
}

/// Texts of settings as given by flags, variables and a config file, and the errors found in them.
#[derive(Clone, Debug, Default)]
pub struct Given {
    texts: HashMap<String, Text>,
    errors: Vec<String>,
}

impl Given {
    /// Adds a setting's text unless the setting has one: sources are added in the order of their
    /// precedence. `origin`
    /// begins the message of an error, such as `--listen` or `batchwright.toml, line 3: listen`.
    pub fn add(&mut self, name: &str, text: impl Into<String>, origin: impl Into<String>) {
        let text = Text { text: text.into(), origin: origin.into() };
        self.texts.entry(name.to_owned()).or_insert(text);
    }

    /// Adds an error that belongs to no value, such as an unknown key.
    pub fn add_error(&mut self, error: impl Into<String>) {
        self.errors.push(error.into());
    }

    /// Returns true if the setting was given, by whatever source.
    pub fn has(&self, name: &str) -> bool {
        self.texts.contains_key(name)
    }

    /// Returns the text of a setting that was given, and where; none if its default counts.
    pub fn text_of(&self, name: &str) -> Option<(&str, &str)> {
        self.texts.get(name).map(|given| (given.text.as_str(), given.origin.as_str()))
    }

    /// Replaces the text of a setting.
    pub fn replace(&mut self, name: &str, text: String) {
        let origin = self.texts.remove(name).map(|before| before.origin).unwrap_or_default();
        self.texts.insert(name.to_owned(), Text { text, origin });
    }

    /// Parses a setting, or its default if it was not given.
    pub fn take<T: Value>(&mut self, setting: &Setting) -> Option<T> {
        let given = self.texts.get(setting.name);
        let text = given.map_or(setting.default, |given| &given.text);
        match T::parse(text) {
            Ok(value) => Some(value),
            Err(error) => {
                let origin = given.map_or(setting.name, |given| &given.origin);
                self.errors.push(format!("{origin}: {error}"));
                None
            }
        }
    }

    /// All errors found so far.
    pub fn errors(&self) -> &[String] {
        &self.errors
    }
}

/// Declares a struct of settings.
///
/// ```
/// batchwright_domain::settings! {
///     /// Settings of a cache.
///     pub struct CacheConfig in "cache" {
///         /// Time that an entry is kept
///         entry_lifetime: batchwright_domain::units::Span = "1m", "TIME";
///         /// Folder of the entries
///         folder: Option<std::path::PathBuf> = "" (shown "DATA/cache"), "DIR";
///     }
/// }
/// use batchwright_domain::settings::{Given, Section};
/// let config = CacheConfig::read(&mut Given::default()).unwrap();
/// assert_eq!(config.entry_lifetime.duration().as_secs(), 60);
/// assert_eq!(config.folder, None);
/// assert_eq!(CacheConfig::SETTINGS[0].variable(), "BATCHWRIGHT_ENTRY_LIFETIME");
/// ```
#[macro_export]
macro_rules! settings {
    (
        $(#[doc = $title:literal])+
        pub struct $struct:ident in $section:literal {
            $(
                $(#[doc = $doc:literal])+
                $name:ident: $type:ty = $default:literal
                    $((shown $shown:literal))?, $placeholder:literal;
            )+
        }
    ) => {
        $(#[doc = $title])+
        #[derive(Clone, Debug)]
        pub struct $struct {
            $($(#[doc = $doc])+ pub $name: $type,)+
        }

        impl $crate::settings::Section for $struct {
            const SETTINGS: &'static [$crate::settings::Setting] = &[$(
                $crate::settings::Setting {
                    section: $section,
                    name: stringify!($name),
                    placeholder: $placeholder,
                    default: $default,
                    shown_default: $crate::settings!(@shown $default $($shown)?),
                    doc: &[$($doc),+],
                },
            )+];

            fn read(given: &mut $crate::settings::Given) -> Option<Self> {
                let mut settings = Self::SETTINGS.iter();
                $(let $name: Option<$type> = given.take(settings.next()?);)+
                Some(Self { $($name: $name?,)+ })
            }
        }
    };
    (@shown $default:literal) => { $default };
    (@shown $default:literal $shown:literal) => { $shown };
}

#[cfg(test)]
#[expect(unreachable_pub, reason = "the macro declares public structs")]
mod tests {
    use super::*;

    settings! {
        /// Settings of a test.
        pub struct TestConfig in "test" {
            /// Attempts
            attempts: Count = "3", "N";
            /// Pause
            pause: Span = "1s", "TIME";
            /// Address
            address: Option<SocketAddr> = "" (shown "none"), "ADDR";
            /// Names
            names: Vec<String> = "", "LIST";
        }
    }

    #[test]
    fn first_source_has_precedence_and_defaults_fill_the_rest() {
        let mut given = Given::default();
        given.add("attempts", "5", "--attempts");
        given.add("attempts", "7", "file: attempts");
        given.add("names", "a, b,", "--names");
        let config = TestConfig::read(&mut given).unwrap();
        assert_eq!((config.attempts.get(), config.pause), (5, Span::seconds(1)));
        assert_eq!((config.address, config.names), (None, vec!["a".to_owned(), "b".to_owned()]));
        assert_eq!(TestConfig::SETTINGS[2].shown_default, "none");
    }

    #[test]
    fn errors_name_the_source_and_are_reported_together() {
        let mut given = Given::default();
        given.add("attempts", "0", "--attempts");
        given.add("pause", "5", "BATCHWRIGHT_PAUSE");
        given.add("address", "here", "x.toml, line 2: address");
        assert!(TestConfig::read(&mut given).is_none());
        let errors = given.errors();
        assert_eq!(errors.len(), 3);
        assert_eq!(errors[0], "--attempts: `0` is not a whole number of at least 1");
        assert!(errors[1].starts_with("BATCHWRIGHT_PAUSE: `5` is not a duration"));
        assert!(errors[2].starts_with("x.toml, line 2: address: `here` is not an address"));
    }
}
