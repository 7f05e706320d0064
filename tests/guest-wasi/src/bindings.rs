//! Bindings generated from WIT.
#![expect(unsafe_code, reason = "the canonical ABI passes pointers")]
#![allow(
    clippy::allow_attributes,
    missing_docs,
    unreachable_pub,
    dead_code,
    reason = "generated code is not ours to lint"
)]

#[cfg(not(feature = "p3"))]
wit_bindgen::generate!({ path: "../../wit/v0.1", world: "adapter" });

#[cfg(feature = "p3")]
wit_bindgen::generate!({
    path: ["../../wit/v0.1", "wit"],
    world: "batchwright:tests/curious",
    // Synchronous calls: a wait inside one blocks the whole call.
    async: false,
    generate_all,
});

use crate::Component;
export!(Component with_types_in self);
