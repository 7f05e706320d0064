//! One module for each version of the contract; all of them give the same domain types.

pub mod v0_1;
