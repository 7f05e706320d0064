//! One request: an attempt at the request, its exchanges with the provider, and its job there.

pub(crate) mod assessment;
pub(crate) mod attempt;
mod conclusion;
pub(crate) mod context;
pub(crate) mod exchange;
pub(crate) mod failures;
pub(crate) mod jobs;
pub(crate) mod outcome;
pub(crate) mod served_by;
mod steps;
