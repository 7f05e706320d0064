//! Connections: one thread that writes and commits in groups, and a pool that reads.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};
use tokio::sync::{Semaphore, mpsc, oneshot};

use super::super::{Result, StoreError};
use super::explain;

/// How long a statement waits for another process that holds the database.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// Writes waiting at a time; more callers wait to be let in.
const QUEUE: usize = 1024;

/// Writes in one transaction at the most.
const GROUP: usize = 256;

/// Connections that read.
const READERS: usize = 4;

/// Bytes of the write-ahead log after which it is copied into the database, and the size to which its file is cut.
const WAL_CHECKPOINT: u64 = 16 << 20;
const WAL_KEPT: i64 = 32 << 20;

/// How long a checkpoint waits for those that read. It goes on to read from the database alone, so it need not wait for those that begin.
const CHECKPOINT_PATIENCE: Duration = Duration::from_millis(500);

/// Growth of the log after a checkpoint that somebody kept from beginning it anew, before the next attempt.
const RETRY_GROWTH: u64 = 8 << 20;

/// Why the database cannot be used any more, if SQLite has found it damaged.
static DAMAGE: OnceLock<String> = OnceLock::new();

pub fn damage() -> Option<String> {
    DAMAGE.get().cloned()
}

/// Remembers damage for those who ask for the state of the store.
pub fn note_damage(error: &rusqlite::Error) {
    use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
    if matches!(error.sqlite_error_code(), Some(DatabaseCorrupt | NotADatabase)) {
        DAMAGE.get_or_init(|| error.to_string());
    }
}

pub fn open(path: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open(path)?;
    // Rows of a kilobyte or two fit a larger page better; this has an effect on a new database alone.
    connection.pragma_update(None, "page_size", 16_384)?;
    connection.pragma_update(None, "auto_vacuum", "INCREMENTAL")?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    // A commit is on the disk before anybody is told of it.
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    connection.pragma_update(None, "journal_size_limit", WAL_KEPT)?;
    // Checkpoints are ours: SQLite's own never begin the log anew while somebody reads.
    connection.pragma_update(None, "wal_autocheckpoint", 0)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(connection)
}

/// Pages that are not used and kept all the same: the next batch needs them again. 64 MiB of them.
const KEPT: i64 = 4096;

/// Pages given back in one write, so that others do not wait long.
const GIVEN_BACK: i64 = 512;

/// Brings a database that was made before space could be given back into the form for that. It is written anew, once.
pub fn allow_compacting(connection: &Connection) -> rusqlite::Result<()> {
    let incremental = 2;
    if connection.pragma_query_value(None, "auto_vacuum", |row| row.get::<_, i64>(0))?
        == incremental
    {
        return Ok(());
    }
    connection.pragma_update(None, "auto_vacuum", incremental)?;
    connection.execute_batch("VACUUM")
}

/// Gives some unused pages back to the file system; whether there are more.
pub fn compact(connection: &Connection) -> Result<bool> {
    let unused = || {
        connection
            .pragma_query_value(None, "freelist_count", |row| row.get::<_, i64>(0))
            .map_err(explain)
    };
    let more = unused()?.saturating_sub(KEPT);
    if more <= 0 {
        return Ok(false);
    }
    // It gives back a page at each step.
    let sql = format!("PRAGMA incremental_vacuum({})", more.min(GIVEN_BACK));
    let mut statement = connection.prepare(&sql).map_err(explain)?;
    let mut steps = statement.query([]).map_err(explain)?;
    while steps.next().map_err(explain)?.is_some() {}
    // A database that could not be brought into the form for it gives nothing back.
    Ok(more > GIVEN_BACK && unused()?.saturating_sub(KEPT) < more)
}

/// What is told to a waiting caller once the group's fate is known.
type Reply = Box<dyn FnOnce(Result<()>) + Send>;
/// One write: how it went by itself, and its reply. Given an error in place of the connection, it does nothing and has failed with that.
type Write = Box<dyn FnOnce(Result<&Connection>) -> (Result<()>, Reply) + Send>;

/// What the thread that writes is asked for.
enum Job {
    Write(Write),
    /// To put everything into the database and end.
    Close(oneshot::Sender<()>),
}

/// The thread that writes. Each write is whole or not at all; those that wait together are committed together, so that many share
/// the price of one commit.
pub struct Writer {
    jobs: mpsc::Sender<Job>,
}

impl Writer {
    pub fn start(connection: Connection) -> Result<Self> {
        let (jobs, waiting) = mpsc::channel(QUEUE);
        std::thread::Builder::new()
            .name("store-writer".into())
            .spawn(move || run(&connection, waiting))
            .map_err(|error| {
                StoreError::Database(format!("the writing thread does not start: {error}"))
            })?;
        Ok(Self { jobs })
    }

    /// Runs one write and returns when it is committed, or not.
    pub async fn write<T, F>(&self, write: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> Result<T> + Send + 'static,
    {
        let (sender, receiver) = oneshot::channel();
        let job: Write = Box::new(move |connection| {
            let done = connection.and_then(write);
            let by_itself = done.as_ref().map(drop).map_err(StoreError::clone);
            let reply: Reply = Box::new(move |committed| {
                // The caller may have gone; the write stands all the same.
                sender.send(committed.and(done)).ok();
            });
            (by_itself, reply)
        });
        self.jobs.send(Job::Write(job)).await.map_err(|_| StoreError::Closed)?;
        receiver.await.map_err(|_| StoreError::Closed)?
    }

    /// Ends the thread once what waits is written. Nothing is left beside the database then.
    pub async fn close(&self) {
        let (sender, closed) = oneshot::channel();
        if self.jobs.send(Job::Close(sender)).await.is_ok() {
            closed.await.ok();
        }
    }
}

thread_local! {
    /// Pages in the write-ahead log after the last commit of this thread.
    static WAL_PAGES: Cell<u64> = const { Cell::new(0) };
}

/// The write-ahead log of the connection that writes: bounded, whoever reads.
struct Wal {
    page_size: u64,
    /// Pages at which the next checkpoint is due.
    due: u64,
}

impl Wal {
    fn of(connection: &Connection) -> Self {
        connection.wal_hook(Some(|_, pages| {
            WAL_PAGES.set(u64::try_from(pages).unwrap_or(0));
            Ok(())
        }));
        let page_size =
            connection.pragma_query_value(None, "page_size", |row| row.get::<_, i64>(0));
        let page_size =
            page_size.ok().and_then(|size| u64::try_from(size).ok()).unwrap_or(4096).max(512);
        Self { page_size, due: WAL_CHECKPOINT / page_size }
    }

    /// Copies the log into the database once it is large, and begins it anew.
    fn keep_small(&mut self, connection: &Connection) {
        let pages = WAL_PAGES.get();
        if pages < self.due {
            return;
        }
        connection.busy_timeout(CHECKPOINT_PATIENCE).ok();
        let busy =
            connection.query_row("PRAGMA wal_checkpoint(RESTART)", [], |row| row.get::<_, i64>(0));
        connection.busy_timeout(BUSY_TIMEOUT).ok();
        self.due = match busy {
            Ok(0) => {
                WAL_PAGES.set(0);
                WAL_CHECKPOINT / self.page_size
            }
            // Somebody reads for long, a backup say.
            Ok(_) => pages.saturating_add(RETRY_GROWTH / self.page_size),
            Err(error) => {
                tracing::warn!("the write-ahead log was not copied into the database: {error}");
                pages.saturating_add(RETRY_GROWTH / self.page_size)
            }
        };
    }
}

fn run(connection: &Connection, mut waiting: mpsc::Receiver<Job>) {
    let mut wal = Wal::of(connection);
    let mut next = waiting.blocking_recv();
    while let Some(job) = next {
        let first = match job {
            Job::Write(first) => first,
            Job::Close(closed) => {
                connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).ok();
                closed.send(()).ok();
                return;
            }
        };
        wal.keep_small(connection);
        let mut replies = Vec::new();
        let mut after = None;
        let committed = group(connection, first, &mut waiting, &mut replies, &mut after);
        if let Err(error) = &committed {
            tracing::error!("a group of writes came to nothing: {error}");
            if !connection.is_autocommit() {
                connection.execute_batch("ROLLBACK").ok();
            }
        }
        for reply in replies {
            reply(committed.clone());
        }
        next = after.or_else(|| waiting.blocking_recv());
    }
}

/// Runs a group of writes in one transaction, each in a savepoint so that one that fails takes no other with it. `after` is what was taken
/// from the queue and does not belong to the group.
fn group(
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
            .map_err(explain)
    };
    let begun = execute("BEGIN IMMEDIATE");
    if let Err(error) = &begun {
        replies.push(first(Err(error.clone())).1);
        return begun.map(drop);
    }
    let mut next = Some(first);
    while let Some(job) = next {
        execute("SAVEPOINT one")?;
        let (by_itself, reply) = job(Ok(connection));
        replies.push(reply);
        if let Err(error) = by_itself {
            // On a full disk or a failing one SQLite gives up the whole transaction, and with it what the others wrote.
            if connection.is_autocommit() {
                return Err(error);
            }
            execute("ROLLBACK TO one")?;
        }
        execute("RELEASE one")?;
        next = match waiting.try_recv() {
            Ok(Job::Write(write)) if replies.len() < GROUP => Some(write),
            // It has its turn after this group.
            Ok(job) => {
                *after = Some(job);
                None
            }
            Err(_) => None,
        };
    }
    execute("COMMIT").map(drop)
}

/// Connections that read, opened as they are needed.
pub struct Readers {
    path: PathBuf,
    idle: Arc<Mutex<Vec<Connection>>>,
    permits: Arc<Semaphore>,
}

impl Readers {
    pub fn new(path: PathBuf) -> Self {
        Self { path, idle: Arc::default(), permits: Arc::new(Semaphore::new(READERS)) }
    }

    /// Closes all connections once their reads have ended: the last connection of all removes the write-ahead log, if it may write.
    pub async fn close(&self) {
        let all = u32::try_from(READERS).unwrap_or(u32::MAX);
        let permits = self.permits.clone().acquire_many_owned(all).await;
        self.permits.close();
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).clear();
        drop(permits);
    }

    pub async fn read<T, F>(&self, read: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> Result<T> + Send + 'static,
    {
        let permit = self.permits.clone().acquire_owned().await.map_err(|_| StoreError::Closed)?;
        let (path, idle) = (self.path.clone(), self.idle.clone());
        let reading = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            let kept = idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let connection = match kept {
                Some(connection) => connection,
                None => open_reader(&path).map_err(explain)?,
            };
            let found = read(&connection);
            idle.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
            found
        });
        reading
            .await
            .map_err(|error| StoreError::Database(format!("a read did not end: {error}")))?
    }
}

fn open_reader(path: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open_with_flags(
        path,
        OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX,
    )?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(connection)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn insert(x: i64) -> impl FnOnce(&Connection) -> Result<usize> + Send + 'static {
        move |db| db.execute("INSERT INTO t VALUES (?1)", [x]).map_err(explain)
    }

    #[tokio::test]
    async fn a_write_that_fails_takes_no_other_with_it_unless_the_transaction_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let connection = open(&folder.path().join("db")).unwrap();
        connection.execute_batch("CREATE TABLE t (x INTEGER PRIMARY KEY)").unwrap();
        let writer = Writer::start(connection).unwrap();
        let (gate, open_gate) = std::sync::mpsc::channel::<()>();
        // The first holds up the thread until the others wait, so that they share its transaction.
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
            db.query_row("SELECT count(*) FROM t", [], |row| row.get::<_, i64>(0)).map_err(explain)
        };
        assert_eq!(writer.write(count).await.unwrap(), 2);

        // What a full disk does: the transaction is gone when the write returns. Nothing of the group may be reported as written.
        let lost = writer.write(|db| {
            insert(4)(db)?;
            db.execute_batch("ROLLBACK").map_err(explain)?;
            Err::<(), _>(StoreError::Full("no room".into()))
        });
        assert!(matches!(lost.await, Err(StoreError::Full(_))));
        writer.write(insert(5)).await.unwrap();
        assert_eq!(writer.write(count).await.unwrap(), 3);
    }
}
