//! Header lookup.

use crate::bindings::exports::batchwright::plugin::inference::Header;

/// Returns the value of the first header of this name, ignoring case.
pub(crate) fn header<'a>(headers: &'a [Header], name: &str) -> Option<&'a str> {
    headers
        .iter()
        .find(|header| header.name.eq_ignore_ascii_case(name))
        .map(|header| header.value.as_str())
}
