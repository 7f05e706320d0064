//! Connections to the database: how they are opened, a pool of readers, and free pages.
//!
//! **Readers.** Reads run on a few read-only connections, on threads for blocking work.
//! In WAL mode, a reader sees a snapshot and neither delays the writer nor waits for the writer.
//!
//! **Free pages.** Deleted results leave free pages in the database file.
//! Some are kept for the next batch; [`compact`] returns the rest to the file system in small
//! writes.
//! The file becomes smaller when a checkpoint has copied these writes.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rusqlite::{Connection, OpenFlags};
use tokio::sync::Semaphore;

use super::super::{Result, StoreError};
use super::database_error;
use super::writer::Reading;
use crate::metrics::StoreMetrics;

/// Maximum wait of a statement for another process that has locked the database.
pub(super) const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// Maximum number of read connections.
const MAX_READERS: usize = 4;

/// Size in bytes to which SQLite truncates the file of the log after a checkpoint.
const WAL_FILE_LIMIT_BYTES: i64 = 32 << 20;

/// Message of the first error in which SQLite reported a corrupt database.
static CORRUPTION: OnceLock<String> = OnceLock::new();

/// Returns the error message if SQLite has reported a corrupt database.
pub(super) fn corruption() -> Option<String> {
    CORRUPTION.get().cloned()
}

/// Records an error that reports a corrupt database, for the readiness probe.
pub(super) fn record_corruption(error: &rusqlite::Error) {
    use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
    if matches!(error.sqlite_error_code(), Some(DatabaseCorrupt | NotADatabase)) {
        CORRUPTION.get_or_init(|| error.to_string());
    }
}

/// Has SQLite write its temporary files beside the database. A migration or a compaction may need
/// as much room as the database has, and the temporary folder of the system may be small, in
/// memory, or, in a container, read-only.
///
/// The folder applies to the process, so the first database decides. Where the user may not write,
/// SQLite looks for another folder.
fn keep_temporary_files_beside(path: &Path, connection: &Connection) {
    static DECIDED: OnceLock<()> = OnceLock::new();
    // What SQLite itself reads goes first.
    if std::env::var_os("SQLITE_TMPDIR").is_some() {
        return;
    }
    DECIDED.get_or_init(|| {
        let folder = path.parent().and_then(Path::to_str).unwrap_or_default();
        connection.pragma_update(None, "temp_store_directory", folder).ok();
    });
}

/// Opens the connection for writing; creates the database if it does not exist.
pub(super) fn open(path: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open(path)?;
    keep_temporary_files_beside(path, &connection);
    // Rows of one or two KiB fit a larger page better. Only a new database takes this setting.
    connection.pragma_update(None, "page_size", 16_384)?;
    connection.pragma_update(None, "auto_vacuum", "INCREMENTAL")?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    // A commit is on disk before the caller gets its reply.
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    // A row that is replaced leaves the counts of its table, like a row that is deleted.
    connection.pragma_update(None, "recursive_triggers", true)?;
    connection.pragma_update(None, "journal_size_limit", WAL_FILE_LIMIT_BYTES)?;
    // `Wal` runs the checkpoints.
    connection.pragma_update(None, "wal_autocheckpoint", 0)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(connection)
}

/// Opens an existing database to read it, whether a server uses it or not.
///
/// The connection may write to the log, so that the last one to close removes it: a read-only one
/// leaves the log beside the database of a stopped server, and restoration refuses such a folder.
/// Where the user may not write, it is read-only.
pub(crate) fn open_beside_server(path: &Path) -> rusqlite::Result<Connection> {
    let open = |mode| Connection::open_with_flags(path, mode | OpenFlags::SQLITE_OPEN_NO_MUTEX);
    let connection = open(OpenFlags::SQLITE_OPEN_READ_WRITE)
        .or_else(|_| open(OpenFlags::SQLITE_OPEN_READ_ONLY))?;
    keep_temporary_files_beside(path, &connection);
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.pragma_update(None, "query_only", true)?;
    // Fails here, and not at the first use, if the file is no database.
    connection.query_row("SELECT count(*) FROM sqlite_schema", [], |_| Ok(()))?;
    Ok(connection)
}

/// Free pages that the database keeps for the next batch: 64 MiB.
const MIN_FREE_PAGES: i64 = 4096;

/// Maximum number of free pages that one write returns, so that other writes do not wait long.
const MAX_VACUUM_PAGES: i64 = 512;

/// Enables incremental vacuum in a database of an older version, which rewrites the database once.
pub(super) fn enable_incremental_vacuum(connection: &Connection) -> rusqlite::Result<()> {
    let incremental = 2;
    if connection.pragma_query_value(None, "auto_vacuum", |row| row.get::<_, i64>(0))?
        == incremental
    {
        return Ok(());
    }
    connection.pragma_update(None, "auto_vacuum", incremental)?;
    connection.execute_batch("VACUUM")
}

/// Outcome of one step of [`compact`].
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Compaction {
    /// The database has no pages to return.
    Nothing,
    /// Pages were returned and more remain.
    More,
    /// The last pages were returned. The file becomes smaller at the next checkpoint.
    Complete,
}

/// Removes some free pages from the end of the database.
pub(super) fn compact(connection: &Connection) -> Result<Compaction> {
    let free_pages = || {
        connection
            .pragma_query_value(None, "freelist_count", |row| row.get::<_, i64>(0))
            .map_err(database_error)
    };
    let excess = free_pages()?.saturating_sub(MIN_FREE_PAGES);
    if excess <= 0 {
        return Ok(Compaction::Nothing);
    }
    // Each step of the statement returns one page.
    let sql = format!("PRAGMA incremental_vacuum({})", excess.min(MAX_VACUUM_PAGES));
    let mut statement = connection.prepare(&sql).map_err(database_error)?;
    let mut steps = statement.query([]).map_err(database_error)?;
    while steps.next().map_err(database_error)?.is_some() {}
    let remaining = free_pages()?.saturating_sub(MIN_FREE_PAGES);
    Ok(if remaining >= excess {
        // A database without incremental vacuum returns no pages.
        Compaction::Nothing
    } else if remaining > 0 {
        Compaction::More
    } else {
        Compaction::Complete
    })
}

/// Pool of read-only connections, which are opened on demand.
pub(super) struct Readers {
    path: PathBuf,
    idle: Arc<Mutex<Vec<Connection>>>,
    permits: Arc<Semaphore>,
    metrics: Arc<StoreMetrics>,
}

impl Readers {
    /// Creates a pool for the database at `path` without any connection.
    pub(super) fn new(path: PathBuf, metrics: Arc<StoreMetrics>) -> Self {
        let permits = Arc::new(Semaphore::new(MAX_READERS));
        Self { path, idle: Arc::default(), permits, metrics }
    }

    /// Returns what reads the number of connections in use.
    pub(super) fn in_use(&self) -> Reading {
        let permits = self.permits.clone();
        Box::new(move || MAX_READERS.saturating_sub(permits.available_permits()))
    }

    /// Closes all connections after their reads have ended.
    ///
    /// Readers close before the writer: only a last connection that can write removes the log.
    pub(super) async fn close(&self) {
        let all = u32::try_from(MAX_READERS).unwrap_or(u32::MAX);
        let permits = self.permits.clone().acquire_many_owned(all).await;
        self.permits.close();
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).clear();
        drop(permits);
    }

    /// Runs one read on a free connection; waits while all connections are in use.
    pub(super) async fn read<T, F>(&self, read: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> Result<T> + Send + 'static,
    {
        let began = Instant::now();
        let permit = self.permits.clone().acquire_owned().await.map_err(|_| StoreError::Closed)?;
        self.metrics.read_waited(began.elapsed());
        let (path, idle) = (self.path.clone(), self.idle.clone());
        let task = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            let pooled = idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let connection = match pooled {
                Some(connection) => connection,
                None => open_reader(&path).map_err(database_error)?,
            };
            let found = read(&connection);
            idle.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
            found
        });
        task.await.map_err(|error| StoreError::Database(format!("a read task failed: {error}")))?
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
