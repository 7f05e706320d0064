//! Formats of lines: reading of input files, parsing of request lines, and writing of results.

pub(crate) mod envelope;
pub(crate) mod input;
pub(crate) mod line;
pub(crate) mod not_json;
pub(crate) mod result_line;
pub(crate) mod server_event;
