//! Bindings generated from `wit/`.
#![expect(unsafe_code, reason = "the canonical ABI passes pointers")]
#![allow(
    clippy::allow_attributes,
    missing_docs,
    unreachable_pub,
    reason = "generated code is not linted"
)]

wit_bindgen::generate!({ path: "../wit/v0.1", world: "streaming-adapter" });

use crate::Component;
export!(Component with_types_in self);
