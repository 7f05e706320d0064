//! Metrics of the database and of the object store.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use batchwright_domain::ids::ObjectKey;
use batchwright_telemetry::{
    Counter, DURATION_BUCKETS, Error, Histogram, Kind, Metric, Metrics, NUMBER_BUCKETS,
};
use bytes::Bytes;

use crate::objects::{ObjectUpload, PartSize};
use crate::{Objects, Result, StoreError};

const COMMIT: Metric = Metric {
    name: "batchwright_store_commit_duration_seconds",
    kind: Kind::Histogram(DURATION_BUCKETS),
    labels: &["outcome"],
    help: "Time of a write group, from its first write to the end of its durable commit, by \
           outcome: `committed` or `failed`",
};
const GROUP: Metric = Metric {
    name: "batchwright_store_group_writes",
    kind: Kind::Histogram(NUMBER_BUCKETS),
    labels: &[],
    help: "Number of writes that share a commit",
};
const WAL: Metric = Metric {
    name: "batchwright_store_wal_bytes",
    kind: Kind::Gauge,
    labels: &[],
    help: "Size of the write-ahead log since its last restart; it restarts at 16 MiB, and grows \
           beyond that while a reader is active for long",
};
const QUEUE: Metric = Metric {
    name: "batchwright_store_waiting_writes",
    kind: Kind::Gauge,
    labels: &[],
    help: "Writes that wait for the writer",
};
const READERS: Metric = Metric {
    name: "batchwright_store_reads_in_progress",
    kind: Kind::Gauge,
    labels: &[],
    help: "Read connections in use",
};
const READ_WAIT: Metric = Metric {
    name: "batchwright_store_read_wait_seconds_total",
    kind: Kind::Counter,
    labels: &[],
    help: "Time that reads have waited for a connection",
};
const OPERATIONS: Metric = Metric {
    name: "batchwright_object_operations_total",
    kind: Kind::Counter,
    labels: &["operation", "outcome"],
    help: "Operations of the object store (`create`, `put_part`, `complete`, `abort`, `size`, \
           `read`, `delete`, `probe`), by outcome: `succeeded`, `missing` or `failed`",
};
const OPERATION: Metric = Metric {
    name: "batchwright_object_operation_duration_seconds",
    kind: Kind::Histogram(DURATION_BUCKETS),
    labels: &["operation"],
    help: "Time of operations of the object store",
};

/// Declarations of the metrics of the database and of the object store.
pub const METRICS: &[Metric] =
    &[COMMIT, GROUP, WAL, QUEUE, READERS, READ_WAIT, OPERATIONS, OPERATION];

/// Metrics of the database.
pub(crate) struct StoreMetrics {
    commit: Histogram,
    group: Histogram,
    read_wait: Counter,
    wal_bytes: Arc<AtomicU64>,
}

impl StoreMetrics {
    pub(crate) fn register(metrics: &Metrics) -> std::result::Result<Arc<Self>, Error> {
        let commit = metrics.histogram(&COMMIT)?;
        commit.prepare(&["failed"]);
        Ok(Arc::new(Self {
            commit,
            group: metrics.histogram(&GROUP)?,
            read_wait: metrics.counter(&READ_WAIT)?,
            wal_bytes: Arc::default(),
        }))
    }

    /// Registers what is read with each scrape: the writes that wait, and the reads in progress.
    pub(crate) fn register_state(
        &self,
        metrics: &Metrics,
        state: impl Fn() -> (usize, usize) + Send + Sync + 'static,
    ) -> std::result::Result<(), Error> {
        let wal_bytes = self.wal_bytes.clone();
        metrics.read(&[WAL, QUEUE, READERS], move |values| {
            let (waiting, reading) = state();
            values.set_number(&WAL, &[], wal_bytes.load(Ordering::Relaxed));
            values.set_number(&QUEUE, &[], waiting as u64);
            values.set_number(&READERS, &[], reading as u64);
        })
    }

    /// Records a write group.
    pub(crate) fn committed(&self, began: Instant, writes: usize, succeeded: bool) {
        let outcome = if succeeded { "committed" } else { "failed" };
        self.commit.observe(&[outcome], began.elapsed().as_secs_f64());
        self.group.observe(&[], batchwright_telemetry::number(writes as u64));
    }

    /// Records the size of the write-ahead log.
    pub(crate) fn wal(&self, bytes: u64) {
        self.wal_bytes.store(bytes, Ordering::Relaxed);
    }

    /// Records the wait of a read for a connection.
    pub(crate) fn read_waited(&self, wait: Duration) {
        self.read_wait.add(&[], wait.as_secs_f64());
    }
}

/// Object store whose operations are counted.
pub struct MeasuredObjects {
    objects: Arc<dyn Objects>,
    metrics: ObjectMetrics,
}

#[derive(Clone)]
struct ObjectMetrics {
    operations: Counter,
    duration: Histogram,
}

impl ObjectMetrics {
    /// Counts the operation that `running` performs.
    async fn measure<T>(
        &self,
        operation: &'static str,
        running: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let began = Instant::now();
        let result = running.await;
        let outcome = match &result {
            Ok(_) => "succeeded",
            Err(StoreError::Missing(_)) => "missing",
            Err(_) => "failed",
        };
        self.operations.increment(&[operation, outcome]);
        self.duration.observe(&[operation], began.elapsed().as_secs_f64());
        result
    }
}

impl MeasuredObjects {
    /// Counts the operations of an object store.
    pub fn new(objects: Arc<dyn Objects>, metrics: &Metrics) -> std::result::Result<Self, Error> {
        let metrics = ObjectMetrics {
            operations: metrics.counter(&OPERATIONS)?,
            duration: metrics.histogram(&OPERATION)?,
        };
        Ok(Self { objects, metrics })
    }
}

#[async_trait]
impl Objects for MeasuredObjects {
    fn part_size(&self) -> PartSize {
        self.objects.part_size()
    }

    async fn create(&self, key: &ObjectKey) -> Result<Box<dyn ObjectUpload>> {
        let upload = self.metrics.measure("create", self.objects.create(key)).await?;
        Ok(Box::new(MeasuredUpload { upload, metrics: self.metrics.clone() }))
    }

    async fn size(&self, key: &ObjectKey) -> Result<u64> {
        self.metrics.measure("size", self.objects.size(key)).await
    }

    async fn read_range(&self, key: &ObjectKey, range: Range<u64>) -> Result<Bytes> {
        self.metrics.measure("read", self.objects.read_range(key, range)).await
    }

    async fn delete(&self, key: &ObjectKey) -> Result<()> {
        self.metrics.measure("delete", self.objects.delete(key)).await
    }

    async fn probe(&self) -> Result<()> {
        self.metrics.measure("probe", self.objects.probe()).await
    }
}

struct MeasuredUpload {
    upload: Box<dyn ObjectUpload>,
    metrics: ObjectMetrics,
}

#[async_trait]
impl ObjectUpload for MeasuredUpload {
    async fn put_part(&mut self, part: Bytes) -> Result<()> {
        self.metrics.measure("put_part", self.upload.put_part(part)).await
    }

    async fn complete(self: Box<Self>) -> Result<()> {
        let Self { upload, metrics } = *self;
        metrics.measure("complete", upload.complete()).await
    }

    async fn abort(self: Box<Self>) {
        let Self { upload, metrics } = *self;
        let aborted = async {
            upload.abort().await;
            Ok(())
        };
        metrics.measure("abort", aborted).await.ok();
    }
}
