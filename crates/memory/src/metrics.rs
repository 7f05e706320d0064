//! Metrics of the pools.

use batchwright_telemetry::{Error, Kind, Metric, Metrics};

use super::{Memory, Pool};

const SIZE: Metric = Metric {
    name: "batchwright_memory_pool_size_bytes",
    kind: Kind::Gauge,
    labels: &["pool"],
    help: "Size of a memory pool",
};
const USED: Metric = Metric {
    name: "batchwright_memory_pool_used_bytes",
    kind: Kind::Gauge,
    labels: &["pool"],
    help: "Bytes reserved from a memory pool, without the one oversized reservation it may have",
};
const WAITING: Metric = Metric {
    name: "batchwright_memory_pool_waiting_holders",
    kind: Kind::Gauge,
    labels: &["pool"],
    help: "Plugins and tenants with a reservation that waits for bytes of a memory pool",
};

/// Declarations of the metrics of the pools.
pub const METRICS: &[Metric] = &[SIZE, USED, WAITING];

impl Memory {
    /// Registers the metrics of the pools.
    pub fn register_metrics(&self, metrics: &Metrics) -> Result<(), Error> {
        let memory = self.clone();
        metrics.read(METRICS, move |values| {
            for (name, pool) in memory.pools() {
                #[expect(
                    clippy::cast_precision_loss,
                    reason = "a metric is a floating point number"
                )]
                let set = |metric, value: usize| values.set(metric, &[name], value as f64);
                set(&SIZE, pool.size());
                set(&USED, pool.used());
                set(&WAITING, pool.waiting_holders());
            }
        })
    }

    fn pools(&self) -> [(&'static str, &Pool); 7] {
        let Self { lines, exchanges, validation, custom_ids, finalizing, clients, instances } =
            self;
        [
            ("lines", lines),
            ("exchanges", exchanges),
            ("validation", validation),
            ("custom_ids", custom_ids),
            ("finalizing", finalizing),
            ("clients", clients),
            ("instances", instances),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn reserved_bytes_and_waiting_holders_are_shown() {
        let (memory, metrics) = (Memory::new(16 << 20, 1), Metrics::new().unwrap());
        memory.register_metrics(&metrics).unwrap();
        let holder = "t".into();
        let reservation = memory.custom_ids.reserve(&holder, 1000).await;
        let text = metrics.text().unwrap();
        let has =
            |text: &str, line: &str| assert!(text.lines().any(|found| found == line), "{text}");
        has(&text, "batchwright_memory_pool_size_bytes{pool=\"custom_ids\"} 1048576");
        has(&text, "batchwright_memory_pool_used_bytes{pool=\"custom_ids\"} 1000");
        has(&text, "batchwright_memory_pool_waiting_holders{pool=\"custom_ids\"} 0");
        drop(reservation);
        let text = metrics.text().unwrap();
        has(&text, "batchwright_memory_pool_used_bytes{pool=\"custom_ids\"} 0");
        // The first gets the overdraft, the second is the oversized one, and the others wait.
        for holder in ["a", "b", "c", "d"] {
            let pool = memory.custom_ids.clone();
            tokio::spawn(async move {
                let _reservation = pool.reserve(&holder.into(), 600_000).await;
                std::future::pending::<()>().await;
            });
        }
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        let text = metrics.text().unwrap();
        has(&text, "batchwright_memory_pool_waiting_holders{pool=\"custom_ids\"} 2");
        has(&text, "batchwright_memory_pool_used_bytes{pool=\"custom_ids\"} 600000");
    }
}
