//! Decisions about what runs when: places and turns, breakers, retries and their backoff, and the
//! saved state of waiting batches.

pub(crate) mod backoff;
pub(crate) mod breaker;
pub(crate) mod breakers;
pub(crate) mod gate;
pub(crate) mod lanes;
pub(crate) mod parked;
pub(crate) mod quotas;
pub(crate) mod retry_queue;
pub(crate) mod running;
pub(crate) mod stop;
pub(crate) mod turns;
