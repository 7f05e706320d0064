//! Observer: reads the open batches now and then, and predicts when they end.
//!
//! A scrape must not wait for a database, and a thousand scrapers must cost no more than one. So
//! the metrics of open batches and of the disk are read here, every few seconds, and a scrape
//! returns what was read last.
//!
//! **Prediction.** A batch ends when its rest is done at the rate of the last ten minutes. Without
//! a result in that time, the rate since its start counts, so that an outage raises the predicted
//! end little by little. A batch without any result is expected to run at least as long as it has
//! run already. The *margin* is the time from the predicted end to the deadline; if it is negative,
//! the deadline is at risk.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use batchwright_domain::clock::{Clock, Timestamp};
use batchwright_domain::status::Status;
use batchwright_store::{BatchKey, DatedBatch, Disk, Overview, Store};
use batchwright_telemetry::{Error, Kind, Metric, Values, number};
use tokio_util::sync::CancellationToken;

use crate::health::Health;
use crate::parts::{Parts, Shared};
use crate::service::Service;

const OUTAGES: Metric = Metric {
    name: "batchwright_provider_outages",
    kind: Kind::Gauge,
    labels: &["plugin"],
    help: "Open circuit breakers of a plugin, one for each tenant and endpoint whose requests wait \
           for the provider",
};
const WAITING: Metric = Metric {
    name: "batchwright_provider_outage_waiting_requests",
    kind: Kind::Gauge,
    labels: &["plugin"],
    help: "Requests that wait for the end of an outage of a plugin",
};
const OPEN: Metric = Metric {
    name: "batchwright_batches",
    kind: Kind::Gauge,
    labels: &["status"],
    help: "Batches that have not ended, by status",
};
const IDLE: Metric = Metric {
    name: "batchwright_batches_waiting",
    kind: Kind::Gauge,
    labels: &["status"],
    help: "Batches that have not ended and wait for a place, by status",
};
const OLDEST_WAIT: Metric = Metric {
    name: "batchwright_batch_oldest_wait_seconds",
    kind: Kind::Gauge,
    labels: &["status"],
    help: "Longest time that a batch has waited for a place, by status",
};
const OLDEST: Metric = Metric {
    name: "batchwright_batch_oldest_age_seconds",
    kind: Kind::Gauge,
    labels: &["status"],
    help: "Age of the oldest batch that has not ended, by status",
};
const MARGIN: Metric = Metric {
    name: "batchwright_batch_deadline_margin_seconds",
    kind: Kind::Gauge,
    labels: &[],
    help: "Smallest time from the predicted end of an executing batch to its deadline; negative \
           if the batch is expected to miss it; absent if no executing batch has a deadline",
};
const AT_RISK: Metric = Metric {
    name: "batchwright_batches_deadline_at_risk",
    kind: Kind::Gauge,
    labels: &[],
    help: "Executing batches whose predicted end is after their deadline, of the 1000 with the \
           earliest deadline",
};
const FREE: Metric = Metric {
    name: "batchwright_disk_free_bytes",
    kind: Kind::Gauge,
    labels: &[],
    help: "Space of the file system of the data folder that the server can use",
};
const SIZE: Metric = Metric {
    name: "batchwright_disk_size_bytes",
    kind: Kind::Gauge,
    labels: &[],
    help: "Size of the file system of the data folder",
};
const DATABASE: Metric = Metric {
    name: "batchwright_store_database_bytes",
    kind: Kind::Gauge,
    labels: &[],
    help: "Size of the database, without its write-ahead log",
};

const LAST_BACKUP: Metric = Metric {
    name: "batchwright_last_backup_timestamp_seconds",
    kind: Kind::Gauge,
    labels: &[],
    help: "Time of the last backup by `batchwright backup`, in seconds since 1970; absent before \
           the first one",
};

const READY: Metric = Metric {
    name: "batchwright_ready",
    kind: Kind::Gauge,
    labels: &[],
    help: "1 if a batch that is created now would be validated, executed and stored, as \
           /health/ready says, else 0; probed every 30 seconds",
};

/// Metrics that the observer reads from the store.
const OBSERVED: &[Metric] =
    &[READY, OPEN, IDLE, OLDEST_WAIT, OLDEST, MARGIN, AT_RISK, FREE, SIZE, DATABASE, LAST_BACKUP];

/// Declarations of the metrics that are read from the state of the engine.
pub const OBSERVED_METRICS: &[Metric] = &[
    OUTAGES,
    WAITING,
    READY,
    OPEN,
    IDLE,
    OLDEST_WAIT,
    OLDEST,
    MARGIN,
    AT_RISK,
    FREE,
    SIZE,
    DATABASE,
    LAST_BACKUP,
];

/// Interval between reads.
const INTERVAL: Duration = Duration::from_secs(5);

/// Number of reads from one probe of the readiness to the next. A probe writes a little.
const READS_PER_PROBE: u64 = 6;

/// Free part of the disk, in percent, below which the log warns, as the alert does.
const SHORT_DISK_PERCENT: u64 = 10;

/// Maximum number of executing batches whose end is predicted.
const MAX_PREDICTED: usize = 1000;

/// Time over which the rate of a batch is measured.
const RATE_WINDOW: Duration = Duration::from_secs(600);

/// Interval between the measurements of a batch that are kept.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(60);

/// Measurements of a batch in its window: times and numbers of results.
#[derive(Default)]
struct Samples(VecDeque<(Timestamp, u64)>);

impl Samples {
    /// Adds a measurement, and returns the results per second within the window.
    fn rate(&mut self, now: Timestamp, done: u64) -> Option<f64> {
        let is_due = |last: &(Timestamp, u64)| last.0.until(now) >= SAMPLE_INTERVAL;
        if self.0.back().is_none_or(is_due) {
            self.0.push_back((now, done));
        }
        while self.0.len() > 1
            && self.0.front().is_some_and(|first| first.0.until(now) > RATE_WINDOW)
        {
            self.0.pop_front();
        }
        let (since, before) = *self.0.front()?;
        per_second(done.saturating_sub(before), since.until(now))
    }
}

/// Returns a rate, or `None` if nothing happened or no time has passed.
fn per_second(number_of_results: u64, time: Duration) -> Option<f64> {
    let rate = number(number_of_results) / time.as_secs_f64();
    (rate.is_finite() && rate > 0.0).then_some(rate)
}

/// Returns the seconds from the predicted end of a batch to its deadline.
fn margin(batch: &DatedBatch, recent: Option<f64>, now: Timestamp) -> f64 {
    let counts = batch.counts;
    let done = counts.completed.saturating_add(counts.failed);
    let left = number(counts.total.saturating_sub(done));
    let running = batch.started_at.until(now);
    let rest = match recent.or_else(|| per_second(done, running)) {
        Some(rate) => left / rate,
        None => running.as_secs_f64(),
    };
    seconds_between(now, batch.expires_at) - rest
}

/// Returns the seconds from one time to another, negative if the other is earlier.
fn seconds_between(from: Timestamp, to: Timestamp) -> f64 {
    from.until(to).as_secs_f64() - to.until(from).as_secs_f64()
}

/// What was read last.
#[derive(Default)]
struct Observed {
    at: Option<Timestamp>,
    overview: Overview,
    disk: Option<Disk>,
    is_ready: Option<bool>,
    /// Whether the log says that little space is free.
    is_disk_short: bool,
    /// Margins of the executing batches, in seconds.
    margins: Vec<f64>,
    samples: HashMap<BatchKey, Samples>,
}

impl Observed {
    fn update(&mut self, now: Timestamp, overview: Overview) {
        let known: HashSet<&BatchKey> = overview.dated.iter().map(|batch| &batch.key).collect();
        self.samples.retain(|key, _| known.contains(key));
        self.margins.clear();
        for batch in &overview.dated {
            let done = batch.counts.completed.saturating_add(batch.counts.failed);
            let recent = self.samples.entry(batch.key.clone()).or_default().rate(now, done);
            self.margins.push(margin(batch, recent, now));
        }
        self.overview = overview;
        self.at = Some(now);
    }

    /// Remembers the space of the disk, and logs when it becomes short and when it is no longer.
    fn update_disk(&mut self, disk: Disk) {
        let is_below = |percent: u64| disk.free.saturating_mul(100) / percent < disk.size;
        if !self.is_disk_short && is_below(SHORT_DISK_PERCENT) {
            self.is_disk_short = true;
            tracing::warn!(
                free_bytes = disk.free,
                size_bytes = disk.size,
                "disk of the data folder almost full: no request is sent once it is full"
            );
        } else if self.is_disk_short && !is_below(SHORT_DISK_PERCENT.saturating_add(2)) {
            self.is_disk_short = false;
            tracing::info!(free_bytes = disk.free, "disk of the data folder has room again");
        }
        self.disk = Some(disk);
    }
}

/// Observer of one process.
pub(crate) struct Observer {
    store: Arc<dyn Store>,
    health: Arc<Health>,
    clock: Clock,
    closing: CancellationToken,
    observed: Mutex<Observed>,
}

impl Observer {
    pub(crate) fn new(parts: &Parts, shared: &Shared, health: Arc<Health>) -> Arc<Self> {
        Arc::new(Self {
            store: parts.store.clone(),
            health,
            clock: parts.clock.clone(),
            closing: shared.closing.clone(),
            observed: Mutex::default(),
        })
    }

    /// Reads until the server closes.
    pub(crate) async fn run(self: Arc<Self>) {
        for reads in 0_u64.. {
            if reads % READS_PER_PROBE == 0 {
                // A probe of a disk that hangs takes seconds, which a shutdown does not wait for.
                let probe = self.closing.run_until_cancelled(self.health.readiness());
                let Some(readiness) = probe.await else { return };
                self.lock().is_ready = Some(readiness.reasons.is_empty());
            }
            if let Err(error) = self.read().await {
                tracing::warn!(%error, "open batches not read for the metrics");
            }
            let sleep = tokio::time::sleep(INTERVAL);
            if self.closing.run_until_cancelled(sleep).await.is_none() {
                return;
            }
        }
    }

    async fn read(&self) -> batchwright_store::Result<()> {
        let now = self.clock.now();
        let overview = self.store.overview(now, MAX_PREDICTED).await?;
        self.lock().update(now, overview);
        let disk = self.store.disk().await?;
        self.lock().update_disk(disk);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Observed> {
        self.observed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the metrics to what was read last.
    fn show(&self, values: &Values) {
        let observed = self.lock();
        if let Some(disk) = observed.disk {
            values.set_number(&FREE, &[], disk.free);
            values.set_number(&SIZE, &[], disk.size);
            values.set_number(&DATABASE, &[], disk.database);
            if let Some(at) = disk.last_backup {
                values.set(&LAST_BACKUP, &[], number(at.as_seconds().max(0).unsigned_abs()));
            }
        }
        if let Some(is_ready) = observed.is_ready {
            values.set_number(&READY, &[], u64::from(is_ready));
        }
        let Some(at) = observed.at else { return };
        for status in Status::ALL.into_iter().filter(|status| !status.is_final()) {
            let open = observed.overview.open.iter().find(|open| open.status == status);
            let label = [status.as_str()];
            values.set_number(&OPEN, &label, open.map_or(0, |open| open.number));
            values.set_number(&IDLE, &label, open.map_or(0, |open| open.waiting));
            let age =
                |since: Option<Timestamp>| since.map_or(0.0, |since| since.until(at).as_secs_f64());
            values.set(&OLDEST, &label, age(open.map(|open| open.oldest)));
            values.set(&OLDEST_WAIT, &label, age(open.and_then(|open| open.waiting_since)));
        }
        if let Some(smallest) = observed.margins.iter().copied().reduce(f64::min) {
            values.set(&MARGIN, &[], smallest);
        }
        let at_risk = observed.margins.iter().filter(|margin| **margin < 0.0).count();
        values.set_number(&AT_RISK, &[], at_risk as u64);
    }
}

/// Registers the metrics that are read from the state of the engine, and of the plugins and memory
/// pools that it uses.
pub(crate) fn register(
    parts: &Parts,
    service: &Arc<Service>,
    observer: &Arc<Observer>,
) -> Result<(), Error> {
    let metrics = &parts.metrics;
    parts.memory.register_metrics(metrics)?;
    parts.registry.register_metrics(metrics)?;
    let observer = observer.clone();
    metrics.read(OBSERVED, move |values| observer.show(values))?;
    let (service, registry) = (service.clone(), parts.registry.clone());
    metrics.read(&[OUTAGES, WAITING], move |values| {
        for plugin in registry.current().adapters() {
            values.set(&OUTAGES, &[plugin.name()], 0.0);
            values.set(&WAITING, &[plugin.name()], 0.0);
        }
        for (key, outage) in service.outages() {
            values.increment(&OUTAGES, &[&key.plugin]);
            values.add(&WAITING, &[&key.plugin], number(outage.waiting));
        }
    })
}

#[cfg(test)]
mod tests {
    use batchwright_store::Counts;

    use super::*;

    const START: Timestamp = Timestamp::from_millis(1_000_000);

    fn batch(total: u64, completed: u64, window: u64) -> DatedBatch {
        DatedBatch {
            key: BatchKey::new(b"b"),
            started_at: START,
            expires_at: START.after(Duration::from_secs(window)),
            counts: Counts { total, completed, failed: 0 },
        }
    }

    /// Returns the margin after each number of results, ten seconds apart.
    fn margins(done: impl IntoIterator<Item = u64>, total: u64, window: u64) -> Vec<f64> {
        let (mut observed, mut now) = (Observed::default(), START);
        done.into_iter()
            .map(|done| {
                now = now.after(Duration::from_secs(10));
                let dated = vec![batch(total, done, window)];
                observed.update(now, Overview { open: Vec::new(), dated });
                observed.margins[0].round()
            })
            .collect()
    }

    #[test]
    fn margin_follows_the_rate_of_the_last_minutes() {
        // Ten results a second: the rest of 900 takes 90 s of the 990 s that are left.
        assert_eq!(margins([100], 1000, 1000), [900.0]);
        // After half an hour at that rate it is one a second.
        let done = (1..=180).map(|step| step * 100).chain((1..=90).map(|step| 18_000 + step * 10));
        let found = margins(done, 20_000, 86_400);
        assert_eq!(found[179], 86_400.0 - 1800.0 - 200.0);
        assert_eq!(found[269], 86_400.0 - 2700.0 - 1100.0);
    }

    #[test]
    fn batch_without_results_is_at_risk_when_half_of_its_window_is_over() {
        let found = margins(vec![0; 60], 10, 600);
        assert!(found[28] > 0.0 && found[30] < 0.0, "{found:?}");
    }

    #[test]
    fn outage_raises_the_predicted_end_until_the_deadline_is_at_risk() {
        // Half is done in 1000 s, then nothing.
        let done = (1..=100).map(|step| step * 5).chain(vec![500; 200]);
        let found = margins(done, 1000, 3600);
        assert_eq!(found[99], 1600.0);
        // No result in ten minutes: the mean rate counts.
        assert_eq!(found[161], 3600.0 - 1620.0 * 2.0);
        assert!(found[179] == 0.0 && found[180] < 0.0, "{:?}", &found[178..182]);
    }

    #[test]
    fn batch_with_all_results_keeps_the_rest_of_its_window() {
        assert_eq!(margins([10], 10, 100), [90.0]);
        assert_eq!(margins([5, 5, 5, 5, 10], 10, 20)[4], -30.0);
    }
}
