//! Setting values with a unit, such as `30s` or `64MiB`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, de};

/// Duration of at most a hundred years, written as `100ms`, `30s`, `1h 30m` or `30d`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(Duration);

impl Span {
    /// Returns a span of whole seconds.
    pub const fn seconds(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }

    /// Returns a span of whole milliseconds.
    pub const fn milliseconds(milliseconds: u64) -> Self {
        Self(Duration::from_millis(milliseconds))
    }

    /// Returns the span as a [`Duration`].
    pub const fn duration(self) -> Duration {
        self.0
    }
}

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let span = humantime::parse_duration(text).map_err(|error| {
            format!("`{text}` is not a duration ({error}); write it as 100ms, 30s or 24h")
        })?;
        // The bound keeps a sum with a timestamp from overflowing.
        if span > Duration::from_secs(100 * 365 * 86_400) {
            return Err(format!("`{text}` is longer than 100 years; write a shorter duration"));
        }
        Ok(Self(span))
    }
}

impl fmt::Display for Span {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        humantime::format_duration(self.0).fmt(formatter)
    }
}

/// Whole number from 1 to `u32::MAX`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Count(u32);

impl Count {
    /// Returns `number` as a count, and 1 for 0.
    pub const fn new(number: u32) -> Self {
        Self(if number == 0 { 1 } else { number })
    }

    /// Returns the number, which is at least 1.
    pub const fn get(self) -> usize {
        self.0 as usize
    }

    fn from_number(number: Option<i64>, given: &dyn fmt::Display) -> Result<Self, String> {
        let number =
            number.and_then(|number| u32::try_from(number).ok()).filter(|number| *number > 0);
        number.map(Self).ok_or_else(|| format!("`{given}` is not a whole number of at least 1"))
    }
}

impl FromStr for Count {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::from_number(text.parse().ok(), &text)
    }
}

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = i64::deserialize(deserializer)?;
        Self::from_number(Some(number), &number).map_err(de::Error::custom)
    }
}

/// Number of bytes, written as `512KiB`, `64MiB` or `200MB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(u64);

impl Size {
    /// Returns a size of `count` mebibytes.
    pub const fn mib(count: u64) -> Self {
        Self(count << 20)
    }

    /// Returns the size in bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// Returns the size in bytes as `usize`.
    ///
    /// A size above the address space becomes `usize::MAX`, which has the effect of no limit.
    pub fn in_memory(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let size = bytesize::ByteSize::from_str(text).map_err(|error| {
            format!("`{text}` is not a size ({error}); write it as 512KiB, 64MiB or 200MiB")
        })?;
        Ok(Self(size.as_u64()))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        for (unit, name) in [(1_u64 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")] {
            if self.0 >= unit && self.0.is_multiple_of(unit) {
                return write!(formatter, "{}{name}", self.0 / unit);
            }
        }
        write!(formatter, "{} bytes", self.0)
    }
}

/// Implements `Deserialize` from a string, with the error of `from_str`.
macro_rules! deserialize_from_str {
    ($($name:ident)+) => {$(
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
            }
        }
    )+};
}

deserialize_from_str!(Span Size);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_spans_parse_and_display_units() {
        assert_eq!("64MiB".parse::<Size>(), Ok(Size::mib(64)));
        assert_eq!("200MB".parse::<Size>().map(Size::bytes), Ok(200_000_000));
        assert_eq!(Size::mib(64).to_string(), "64MiB");
        assert_eq!("1500 bytes", Size(1500).to_string());
        assert_eq!("30d".parse::<Span>(), Ok(Span::seconds(30 * 86_400)));
        assert_eq!("100ms".parse::<Span>(), Ok(Span::milliseconds(100)));
        assert!("soon".parse::<Span>().is_err());
        assert!("1000000y".parse::<Span>().is_err());
    }
}
