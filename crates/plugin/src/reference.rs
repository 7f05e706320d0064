//! Keys that people write into files of a plugin, for the reference pages.
//!
//! The macros declare a struct and its keys at once, so that the documentation of a field is the
//! documentation of its key.

use std::fmt::Display;
use std::num::{NonZeroU32, NonZeroUsize};

use batchwright_domain::units::{Size, Span};

/// Key of a table or of an object.
#[derive(Clone, Debug)]
pub struct Key {
    /// Name of the key.
    pub name: &'static str,
    /// Type of the value, in words.
    pub kind: &'static str,
    /// Value of an absent key, in words, or `required`.
    pub default: String,
    /// Meaning of the value, in sentences.
    pub meaning: &'static str,
}

/// Declares a struct whose fields are keys, each with its type and its default in words, and a
/// function that returns the keys.
macro_rules! keys {
    (
        $(#[$meta:meta])*
        $vis:vis struct $name:ident, $keys:ident {
            $(
                $(#[doc = $doc:literal])+
                $(#[serde($($serde:tt)*)])?
                $field_vis:vis $field:ident: $type:ty, $kind:literal, $default:literal;
            )*
        }
    ) => {
        $(#[$meta])*
        $vis struct $name {
            $(
                $(#[doc = $doc])+
                $(#[serde($($serde)*)])?
                $field_vis $field: $type,
            )*
        }

        /// Returns the keys in the order of the file.
        pub fn $keys() -> Vec<$crate::reference::Key> {
            vec![$($crate::reference::Key {
                name: stringify!($field),
                kind: $kind,
                default: $default.to_owned(),
                meaning: concat!($($doc),+).trim_ascii(),
            }),*]
        }
    };
}

pub(crate) use keys;

/// Value that has a form in files.
pub(crate) trait Shown {
    /// Type of the value, in words.
    const KIND: &'static str;
    /// Returns the value as a file has it.
    fn shown(&self) -> String;
}

macro_rules! shown {
    ($($type:ty: $kind:literal),*) => {
        $(impl Shown for $type {
            const KIND: &'static str = $kind;
            fn shown(&self) -> String {
                self.to_string()
            }
        })*
    };
}

shown!(
    Size: "size", Span: "duration", NonZeroU32: "whole number", NonZeroUsize: "whole number"
);

impl<T: Shown + Display> Shown for Option<T> {
    const KIND: &'static str = T::KIND;

    fn shown(&self) -> String {
        self.as_ref().map_or_else(|| "none".to_owned(), Shown::shown)
    }
}
