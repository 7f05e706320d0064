//! Memory budget of the process, split into named pools.
//!
//! **Threat.** Clients, providers, guests and the disk can make the host hold any number of bytes.
//! A client sends a large body or does not read its response.
//! A provider sends 16 MiB where a line has 100 bytes.
//! The disk accepts no writes for a minute.
//! Each case can happen as often as there are connections, requests or plugins.
//! A buffer therefore reserves memory from a pool *before* the buffer grows, and waits while the
//! pool has no room.
//! Waiting is the backpressure: a task without memory reads, sends and calls nothing.
//!
//! **Layers.** The first layer is the pool: one pool for each stage of the work.
//! The sizes of the pools sum to `memory_budget`.
//! Lines that wait for a provider ([`Memory::lines`]) and the bodies of exchanges
//! ([`Memory::exchanges`]) have separate pools, so that waiting lines never keep a result from
//! being written.
//! Clients have a pool of their own, so that a slow reader delays no batch.
//! Linear memory of plugins is outside the budget and has its own limit, `instance_memory`
//! ([`Memory::instances`]).
//!
//! **Fairness.** The second layer is the *holder*: a plugin or a tenant that shares a pool.
//! A holder that reserves more must leave as many bytes free as the holder then holds, so that the
//! next holder always finds room.
//! Tenants of one plugin share in the same way what the plugin may hold.
//! [`Pool`] has the exact rules.
//!
//! **No deadlock.** A reservation may grow in steps, and reservations that wait for each other
//! could wait forever. One reservation of each holder, the priority reservation, may therefore
//! reserve all free bytes and, beyond the free bytes, a quarter of the pool that nothing else may
//! use. One reservation of the whole pool, the oversized reservation, may exceed the pool. At least
//! one reservation can always grow, so it completes and releases its bytes to the others. A pool is
//! exceeded by at most one item: the largest line or response that the settings allow.

#![deny(missing_docs)]
#![warn(unreachable_pub)]

mod config;
mod metrics;
mod pool;

use std::sync::Arc;

pub use config::{Budget, MemoryConfig};
pub use metrics::METRICS;
pub use pool::{Pool, Reservation};

/// Name of a plugin or tenant that shares a pool, or `plugin/tenant`.
pub type Holder = Arc<str>;

/// Pools of the process.
#[derive(Clone)]
pub struct Memory {
    /// Lines in flight, held until the provider responds; by plugin and tenant. 4/16 of the budget.
    pub lines: Pool,
    /// Request bodies, responses, and results until their commit; by plugin and tenant. 5/16.
    pub exchanges: Pool,
    /// Chunks of input files in validation; by tenant. 2/16.
    pub validation: Pool,
    /// Hashes of the `custom_id`s of files in validation; by tenant. 1/16.
    pub custom_ids: Pool,
    /// Results that finalizing copies into files; by tenant. 2/16.
    pub finalizing: Pool,
    /// Bodies of client requests and of responses to clients; by tenant. 2/16.
    pub clients: Pool,
    /// Linear memory of plugin instances and the host's overhead for each; by plugin and tenant.
    /// All of `instance_memory`.
    pub instances: Pool,
}

impl Memory {
    /// Splits `budget` bytes between the pools and gives `instance_memory` bytes to instances.
    pub fn new(budget: usize, instance_memory: usize) -> Self {
        let pool = |sixteenths: usize| Pool::new((budget / 16).saturating_mul(sixteenths));
        Self {
            lines: pool(4),
            exchanges: pool(5),
            validation: pool(2),
            custom_ids: pool(1),
            finalizing: pool(2),
            clients: pool(2),
            instances: Pool::new(instance_memory),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pools_sum_to_the_budget() {
        let budget = 64 << 20;
        let memory = Memory::new(budget, 1);
        let Memory { lines, exchanges, validation, custom_ids, finalizing, clients, instances: _ } =
            memory;
        let pools = [lines, exchanges, validation, custom_ids, finalizing, clients];
        assert_eq!(pools.iter().map(Pool::size).sum::<usize>(), budget);
    }
}
