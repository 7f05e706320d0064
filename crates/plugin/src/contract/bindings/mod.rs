//! Bindings to guests: one module for each version of the contract. All modules convert to and from
//! the same domain types.

/// Version 0.1 of the contract.
pub(crate) mod v0_1;
