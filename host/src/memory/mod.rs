//! Memory that clients, providers, guests and the disk can make large: one budget, split into named pools.
//!
//! **Threat.** A client sends a large body or does not read its answer, a provider sends 16 MiB where a line had 100 bytes, the disk
//! takes no writes for a minute. Each of these holds bytes in memory, and each can happen as often as there are connections, requests
//! or plugins. So whatever can grow takes a share of a pool *before* it grows, and waits if there is none.
//!
//! **Pools.** They sum to `memory_budget`. What waits for a provider ([`Memory::lines`]) is apart from what an exchange brings
//! ([`Memory::exchanges`]), so that lines never keep an answer from being written. Clients have a pool of their own, so that a slow
//! reader holds up no batch. Linear memory of plugins is beside the budget, bounded by `instance_memory` ([`Memory::instances`]).
//!
//! **Fairness.** Each pool is shared between *holders*: the plugins that exchanges go to, or the tenants. A holder that takes more must
//! leave as much free as it then holds, so that the next holder always finds room. See [`Pool`].
//!
//! **No deadlock.** A share may grow step by step. One share of each holder may take all that is free and a quarter of the pool that is
//! kept for this, and one share of the whole pool may exceed it, so one always comes to its end and gives back what it held. A pool is
//! exceeded by one item at most: the largest line or response that the settings allow.

mod pool;

use std::sync::Arc;

pub use pool::{Pool, Share};

/// Those that share a pool: plugins or tenants, by name.
pub type Holder = Arc<str>;

/// The pools of a process.
#[derive(Clone)]
pub struct Memory {
    /// Lines in flight, held for as long as a provider thinks; by plugin. 4/16 of the budget.
    pub lines: Pool,
    /// What exchanges bring: bodies of requests, responses, and results until they are committed; by plugin. 5/16.
    pub exchanges: Pool,
    /// Pieces of input files being validated; by tenant. 2/16.
    pub validation: Pool,
    /// Hashes of the `custom_id`s of files being validated; by tenant. 1/16.
    pub custom_ids: Pool,
    /// Results on their way into files; by tenant. 2/16.
    pub finalizing: Pool,
    /// Bodies of clients' requests and of answers to clients; by tenant. 2/16.
    pub clients: Pool,
    /// Linear memory of plugins' instances and what the host keeps for each; by plugin and tenant. All of `instance_memory`.
    pub instances: Pool,
}

impl Memory {
    pub fn new(budget: usize, instance_memory: usize) -> Self {
        let part = |sixteenths: usize| Pool::new((budget / 16).saturating_mul(sixteenths));
        Self {
            lines: part(4),
            exchanges: part(5),
            validation: part(2),
            custom_ids: part(1),
            finalizing: part(2),
            clients: part(2),
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
