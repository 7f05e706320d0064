//! Connections: one thread that writes and commits in groups, and a pool that reads.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};
use tokio::sync::{Semaphore, mpsc, oneshot};

use super::super::{Result, StoreError};
use super::explain;

/// Writes waiting at a time; more callers wait to be let in.
const QUEUE: usize = 1024;

/// Writes in one transaction at the most.
const GROUP: usize = 256;

/// Connections that read.
const READERS: usize = 4;

pub fn open(path: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open(path)?;
    // Rows of a kilobyte or two fit a larger page better; this has an effect on a new database alone.
    connection.pragma_update(None, "page_size", 16_384)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    // A commit is on the disk before anybody is told of it.
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    connection.pragma_update(None, "journal_size_limit", 64 << 20)?;
    connection.busy_timeout(Duration::from_secs(10))?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(connection)
}

/// What is told to a waiting caller once the group's fate is known.
type Reply = Box<dyn FnOnce(Result<()>) + Send>;
/// One write: whether it went well, and its reply.
type Job = Box<dyn FnOnce(&Connection) -> (bool, Reply) + Send>;

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
            .map_err(|error| StoreError::Database(format!("the writing thread does not start: {error}")))?;
        Ok(Self { jobs })
    }

    /// Runs one write and returns when it is committed, or not.
    pub async fn write<T, F>(&self, write: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> Result<T> + Send + 'static,
    {
        let (sender, receiver) = oneshot::channel();
        let job: Job = Box::new(move |connection| {
            let done = write(connection);
            let went_well = done.is_ok();
            let reply: Reply = Box::new(move |committed| {
                // The caller may have gone; the write stands all the same.
                sender.send(committed.and(done)).ok();
            });
            (went_well, reply)
        });
        self.jobs.send(job).await.map_err(|_| StoreError::Closed)?;
        receiver.await.map_err(|_| StoreError::Closed)?
    }
}

fn run(connection: &Connection, mut waiting: mpsc::Receiver<Job>) {
    while let Some(first) = waiting.blocking_recv() {
        let mut replies = Vec::new();
        let committed = group(connection, first, &mut waiting, &mut replies);
        if let Err(error) = &committed {
            tracing::error!("a write to the database failed: {error}");
            if !connection.is_autocommit() {
                connection.execute_batch("ROLLBACK").ok();
            }
        }
        for reply in replies {
            reply(committed.clone());
        }
    }
}

/// Runs a group of writes in one transaction, each in a savepoint so that one that fails takes no other with it.
fn group(
    connection: &Connection,
    first: Job,
    waiting: &mut mpsc::Receiver<Job>,
    replies: &mut Vec<Reply>,
) -> Result<()> {
    let execute =
        |sql: &str| connection.prepare_cached(sql).and_then(|mut statement| statement.execute([])).map_err(explain);
    let begun = execute("BEGIN IMMEDIATE");
    let mut next = Some(first);
    while let Some(job) = next {
        if let Err(error) = &begun {
            // Nothing can be written now: tell each of those that wait.
            let (_, reply) = job(connection);
            replies.push(reply);
            return Err(error.clone());
        }
        execute("SAVEPOINT one")?;
        let (went_well, reply) = job(connection);
        replies.push(reply);
        if !went_well {
            execute("ROLLBACK TO one")?;
        }
        execute("RELEASE one")?;
        next = if replies.len() < GROUP { waiting.try_recv().ok() } else { None };
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
        reading.await.map_err(|error| StoreError::Database(format!("a read did not end: {error}")))?
    }
}

fn open_reader(path: &Path) -> rusqlite::Result<Connection> {
    let connection =
        Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
    connection.busy_timeout(Duration::from_secs(10))?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(connection)
}
