//! Writer thread: commits writes in groups and runs the checkpoints of the write-ahead log.
//!
//! **Write groups.** A durable commit costs a disk flush, and a thousand results a second cannot
//! each pay for one.
//! SQLite allows one writer at a time anyway.
//! All writes therefore go through one thread and one queue, and the thread commits the writes that
//! wait together in one transaction.
//! The queue is bounded, so that a slow disk causes backpressure and not memory use.
//!
//! **Isolation within a group.** Each write runs in a savepoint.
//! A write that fails is rolled back to its savepoint, and the rest of the group commits.
//! On a full or failing disk, SQLite rolls back the whole transaction itself; every write of the
//! group then fails, also the writes that had succeeded.
//! A caller gets its reply after the commit, and `synchronous = FULL` makes the commit durable.
//! Writes run in the order in which they were queued, so a write sees every earlier write.
//!
//! **WAL checkpoints.** The write-ahead log grows until a checkpoint copies it into the database
//! and the next write starts the log from its beginning.
//! The automatic checkpoints of SQLite are passive: the log never restarts while a reader uses the
//! log, and with clients that poll there is always a reader.
//! The writer therefore runs `wal_checkpoint(RESTART)` itself once the log has 16 MiB.
//! A RESTART checkpoint blocks no new readers and waits only for the readers that use the old log.
//! If a long reader, such as a backup, outlasts the wait, the log grows by another 8 MiB before the
//! next attempt, so that the writer does not stall at each group.
//! [`Writer::close`] truncates the log, so that a clean shutdown leaves a single file.

use std::cell::Cell;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rusqlite::Connection;
use tokio::sync::{mpsc, oneshot};

use super::super::{Result, StoreError};
use super::connection::{BUSY_TIMEOUT, Compaction, compact};
use super::database_error;
use crate::metrics::StoreMetrics;

/// Capacity of the write queue; further callers wait.
const WRITE_QUEUE_CAPACITY: usize = 1024;

/// Maximum number of writes in one transaction.
const MAX_WRITES_PER_GROUP: usize = 256;

/// Size of the write-ahead log in bytes at which a checkpoint is due.
const WAL_CHECKPOINT_BYTES: u64 = 16 << 20;

/// Maximum wait of a checkpoint for active readers.
const CHECKPOINT_TIMEOUT: Duration = Duration::from_millis(500);

/// Growth of the log in bytes between a checkpoint that readers blocked and the next attempt.
const CHECKPOINT_RETRY_BYTES: u64 = 8 << 20;

/// Sends the result of a write to its caller, given the outcome of the group's commit.
type Reply = Box<dyn FnOnce(Result<()>) + Send>;
/// Runs one write and returns its own outcome and its reply.
///
/// Given an error in place of the connection, the write does nothing and fails with that error.
type Write = Box<dyn FnOnce(Result<&Connection>) -> (Result<()>, Reply) + Send>;

/// Task of the writer thread.
enum Job {
    Write(Write),
    /// Copies the log into the database, which gives removed pages back to the file system.
    Checkpoint(oneshot::Sender<()>),
    /// Truncates the log and ends the thread.
    Close(oneshot::Sender<()>),
}

/// Handle of the writer thread.
///
/// Each write happens completely or not at all. Writes that wait together share one commit.
pub(super) struct Writer {
    jobs: mpsc::Sender<Job>,
}

/// Number of waiting writes or of reads in progress, read when it is called.
pub(super) type Reading = Box<dyn Fn() -> usize + Send + Sync>;

impl Writer {
    /// Starts the writer thread on a connection.
    pub(super) fn start(connection: Connection, metrics: Arc<StoreMetrics>) -> Result<Self> {
        let (jobs, waiting) = mpsc::channel(WRITE_QUEUE_CAPACITY);
        std::thread::Builder::new()
            .name("store-writer".into())
            .spawn(move || {
                let closed = run(&connection, waiting, &metrics);
                // The last connection removes the log, so the caller waits for its end.
                drop(connection);
                if let Some(closed) = closed {
                    closed.send(()).ok();
                }
            })
            .map_err(|error| {
                StoreError::Database(format!("the writer thread did not start: {error}"))
            })?;
        Ok(Self { jobs })
    }

    /// Returns what reads the number of writes that wait, without keeping the thread alive.
    pub(super) fn waiting(&self) -> Reading {
        let jobs = self.jobs.downgrade();
        Box::new(move || {
            let jobs = jobs.upgrade();
            jobs.map_or(0, |jobs| jobs.max_capacity().saturating_sub(jobs.capacity()))
        })
    }

    /// Runs one write and returns its result after the commit or the rollback.
    pub(super) async fn write<T, F>(&self, write: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> Result<T> + Send + 'static,
    {
        let (sender, receiver) = oneshot::channel();
        let job: Write = Box::new(move |connection| {
            let done = connection.and_then(write);
            let outcome = done.as_ref().map(drop).map_err(StoreError::clone);
            let reply: Reply = Box::new(move |committed| {
                // The commit stays valid if the caller was dropped meanwhile.
                sender.send(committed.and(done)).ok();
            });
            (outcome, reply)
        });
        self.jobs.send(Job::Write(job)).await.map_err(|_| StoreError::Closed)?;
        receiver.await.map_err(|_| StoreError::Closed)?
    }

    /// Returns some free pages to the file system; returns true if more remain.
    ///
    /// The file becomes smaller at the end, unless a reader is active for long.
    pub(super) async fn compact(&self) -> Result<bool> {
        let compaction = self.write(compact).await?;
        if compaction == Compaction::Complete {
            self.run(Job::Checkpoint).await;
        }
        Ok(compaction == Compaction::More)
    }

    /// Ends the thread after all queued writes and truncates the write-ahead log.
    pub(super) async fn close(&self) {
        self.run(Job::Close).await;
    }

    async fn run(&self, job: impl FnOnce(oneshot::Sender<()>) -> Job) {
        let (sender, done) = oneshot::channel();
        if self.jobs.send(job(sender)).await.is_ok() {
            done.await.ok();
        }
    }
}

thread_local! {
    /// Pages in the write-ahead log after the latest commit of this thread.
    static WAL_PAGES: Cell<u64> = const { Cell::new(0) };
}

/// Checkpoint schedule of the write-ahead log, which keeps the log bounded despite readers.
struct Wal {
    page_size: u64,
    /// Pages in the log at which the next checkpoint is due.
    due_pages: u64,
}

impl Wal {
    fn new(connection: &Connection) -> Self {
        connection.wal_hook(Some(|_, pages| {
            WAL_PAGES.set(u64::try_from(pages).unwrap_or(0));
            Ok(())
        }));
        let page_size =
            connection.pragma_query_value(None, "page_size", |row| row.get::<_, i64>(0));
        let page_size =
            page_size.ok().and_then(|size| u64::try_from(size).ok()).unwrap_or(4096).max(512);
        Self { page_size, due_pages: WAL_CHECKPOINT_BYTES / page_size }
    }

    /// Copies the log into the database and restarts the log, if a checkpoint is due.
    fn checkpoint_if_due(&mut self, connection: &Connection) {
        let pages = WAL_PAGES.get();
        if pages >= self.due_pages {
            self.checkpoint(connection, pages);
        }
    }

    /// Copies the log into the database and restarts the log.
    fn checkpoint(&mut self, connection: &Connection, pages: u64) {
        connection.busy_timeout(CHECKPOINT_TIMEOUT).ok();
        let busy =
            connection.query_row("PRAGMA wal_checkpoint(RESTART)", [], |row| row.get::<_, i64>(0));
        connection.busy_timeout(BUSY_TIMEOUT).ok();
        self.due_pages = match busy {
            Ok(0) => {
                WAL_PAGES.set(0);
                WAL_CHECKPOINT_BYTES / self.page_size
            }
            // A reader, such as a backup, is active for long.
            Ok(_) => pages.saturating_add(CHECKPOINT_RETRY_BYTES / self.page_size),
            Err(error) => {
                tracing::warn!(%error, "wal checkpoint failed");
                pages.saturating_add(CHECKPOINT_RETRY_BYTES / self.page_size)
            }
        };
    }
}

/// Runs jobs until the writer is closed or dropped; returns the sender to report the end to.
fn run(
    connection: &Connection,
    mut waiting: mpsc::Receiver<Job>,
    metrics: &StoreMetrics,
) -> Option<oneshot::Sender<()>> {
    let mut wal = Wal::new(connection);
    let mut next = waiting.blocking_recv();
    while let Some(job) = next {
        let first = match job {
            Job::Write(first) => first,
            Job::Checkpoint(done) => {
                wal.checkpoint(connection, WAL_PAGES.get());
                done.send(()).ok();
                next = waiting.blocking_recv();
                continue;
            }
            Job::Close(closed) => {
                connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).ok();
                return Some(closed);
            }
        };
        wal.checkpoint_if_due(connection);
        let mut replies = Vec::new();
        let mut after = None;
        let began = Instant::now();
        let committed = commit_group(connection, first, &mut waiting, &mut replies, &mut after);
        metrics.committed(began, replies.len(), committed.is_ok());
        metrics.wal(WAL_PAGES.get().saturating_mul(wal.page_size));
        if let Err(error) = &committed {
            tracing::error!(%error, "write group failed");
            if !connection.is_autocommit() {
                connection.execute_batch("ROLLBACK").ok();
            }
        }
        for reply in replies {
            reply(committed.clone());
        }
        next = after.or_else(|| waiting.blocking_recv());
    }
    None
}

/// Runs a group of writes in one transaction, each in a savepoint, and commits.
///
/// `after` gets a job that was taken from the queue and does not belong to the group.
fn commit_group(
    connection: &Connection,
    first: Write,
    waiting: &mut mpsc::Receiver<Job>,
    replies: &mut Vec<Reply>,
    after: &mut Option<Job>,
) -> Result<()> {
    let execute = |sql: &str| {
        connection
            .prepare_cached(sql)
            .and_then(|mut statement| statement.execute([]))
            .map_err(database_error)
    };
    let begun = execute("BEGIN IMMEDIATE");
    if let Err(error) = &begun {
        replies.push(first(Err(error.clone())).1);
        return begun.map(drop);
    }
    let mut next = Some(first);
    while let Some(job) = next {
        if let Err(error) = execute("SAVEPOINT one") {
            // The caller of this write learns of the failure too, and may try again.
            replies.push(job(Err(error.clone())).1);
            return Err(error);
        }
        let (outcome, reply) = job(Ok(connection));
        replies.push(reply);
        if let Err(error) = outcome {
            // On a full or failing disk SQLite has rolled back the whole transaction.
            if connection.is_autocommit() {
                return Err(error);
            }
            execute("ROLLBACK TO one")?;
        }
        execute("RELEASE one")?;
        next = match waiting.try_recv() {
            Ok(Job::Write(write)) if replies.len() < MAX_WRITES_PER_GROUP => Some(write),
            // Another job, or a write beyond the limit, runs after this group.
            Ok(job) => {
                *after = Some(job);
                None
            }
            Err(_) => None,
        };
    }
    execute("COMMIT").map(drop)
}

#[cfg(test)]
mod tests {
    use super::super::connection::open;
    use super::*;

    fn start(connection: Connection) -> Writer {
        let metrics = batchwright_telemetry::Metrics::disabled();
        Writer::start(connection, StoreMetrics::register(&metrics).unwrap()).unwrap()
    }

    fn insert(x: i64) -> impl FnOnce(&Connection) -> Result<usize> + Send + 'static {
        move |db| db.execute("INSERT INTO t VALUES (?1)", [x]).map_err(database_error)
    }

    #[tokio::test]
    async fn failed_write_rolls_back_alone_unless_sqlite_rolled_back_the_transaction() {
        let folder = tempfile::tempdir().unwrap();
        let connection = open(&folder.path().join("db")).unwrap();
        connection.execute_batch("CREATE TABLE t (x INTEGER PRIMARY KEY)").unwrap();
        let writer = start(connection);
        let (gate, open_gate) = std::sync::mpsc::sync_channel::<()>(1);
        // The first write blocks the thread until the others are queued: all share one group.
        let first = writer.write(move |_| open_gate.recv().map_err(|_| StoreError::Closed));
        let others = async {
            let writes = tokio::join!(
                writer.write(insert(1)),
                writer.write(|db| insert(2)(db).and(Err::<(), _>(StoreError::Fenced))),
                writer.write(insert(3)),
                async { gate.send(()) },
            );
            (writes.0, writes.1, writes.2)
        };
        let (first, (one, two, three)) = tokio::join!(first, others);
        assert!(first.is_ok() && one.is_ok() && three.is_ok());
        assert!(matches!(two, Err(StoreError::Fenced)));
        let count = |db: &Connection| {
            db.query_row("SELECT count(*) FROM t", [], |row| row.get::<_, i64>(0))
                .map_err(database_error)
        };
        assert_eq!(writer.write(count).await.unwrap(), 2);

        // On a full disk the transaction is rolled back when the write returns.
        // No write of the group may be reported as committed.
        let lost = writer.write(|db| {
            insert(4)(db)?;
            db.execute_batch("ROLLBACK").map_err(database_error)?;
            Err::<(), _>(StoreError::Full("no room".into()))
        });
        assert!(matches!(lost.await, Err(StoreError::Full(_))));
        writer.write(insert(5)).await.unwrap();
        assert_eq!(writer.write(count).await.unwrap(), 3);
    }

    #[tokio::test]
    async fn write_whose_savepoint_fails_reports_the_failure_and_not_a_closed_store() {
        use rusqlite::hooks::{AuthAction, AuthContext, Authorization};

        let folder = tempfile::tempdir().unwrap();
        let connection = open(&folder.path().join("db")).unwrap();
        connection.execute_batch("CREATE TABLE t (x INTEGER PRIMARY KEY)").unwrap();
        let deny = |context: AuthContext<'_>| match context.action {
            AuthAction::Savepoint { .. } => Authorization::Deny,
            _ => Authorization::Allow,
        };
        connection.authorizer(Some(deny)).unwrap();
        let writer = start(connection);
        let refused = writer.write(insert(1)).await;
        assert!(matches!(refused, Err(StoreError::Database(_))), "{refused:?}");
    }

    #[tokio::test]
    async fn compaction_makes_the_file_smaller_without_further_writes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("db");
        let connection = open(&path).unwrap();
        connection.execute_batch("CREATE TABLE t (x INTEGER PRIMARY KEY, y)").unwrap();
        let writer = start(connection);
        let execute = |sql: &'static str| {
            writer.write(move |db| db.execute(sql, []).map(drop).map_err(database_error))
        };
        let fill = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100) \
                    INSERT INTO t SELECT i, zeroblob(1000000) FROM n";
        execute(fill).await.unwrap();
        execute("DELETE FROM t").await.unwrap();
        writer.run(Job::Checkpoint).await;
        let size = || std::fs::metadata(&path).unwrap().len();
        assert!(size() > 100_000_000);
        while writer.compact().await.unwrap() {}
        assert!(size() < 70 << 20, "{}", size());
    }

    #[tokio::test]
    async fn closed_writer_leaves_no_log() {
        for _ in 0..20 {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("db");
            let connection = open(&path).unwrap();
            connection.execute_batch("CREATE TABLE t (x INTEGER PRIMARY KEY)").unwrap();
            let writer = start(connection);
            writer.write(insert(1)).await.unwrap();
            writer.close().await;
            assert!(!folder.path().join("db-wal").exists());
        }
    }
}
