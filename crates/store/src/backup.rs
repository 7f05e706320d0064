//! Backup of a data folder, also of a running server, and its restoration.
//!
//! **Consistent.** The database is copied in one read transaction. The objects that the *copy*
//! names are copied after it: an object that has a record is complete and never changes, so a later
//! copy of it is the same. An object that is deleted meanwhile is counted as missing.
//!
//! **Incremental.** An object that the backup has already is not copied again, also if the backup
//! that copied it was interrupted.
//!
//! **Whole or not at all.** A backup is described by its manifest, which is replaced last. Until
//! then the backup before it stays valid. The manifest has the size and the SHA-256 of everything,
//! and a last line, without which it is not complete.
//!
//! **Restoration.** Everything is compared with the manifest before the database appears in the new
//! folder. A folder that a server uses, or that has a database or a write-ahead log, is refused: an
//! old log beside a restored database would damage it.
//!
//! **Bounds.** The manifest and the records of objects are read side by side, in the same order, so
//! that memory does not depend on their number.

mod manifest;

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rusqlite::backup::StepResult;
use rusqlite::{Connection, OpenFlags};
use sha2::{Digest, Sha256};

use self::manifest::{FORMAT, Line, MANIFEST, Manifest};
use crate::objects::LocalObjects;
use crate::private::create_folder;
use crate::sqlite::{DATABASE_FILE, LAST_BACKUP, lock_folder, open_beside_server};
use crate::{Result, StoreError};

/// Lock of a backup folder, which also marks it: other folders are refused.
const LOCK: &str = "backup.lock";

/// Files of the data folder beside the database and the objects.
const SMALL_FILES: [&str; 2] = ["serials", "plugin-order"];

/// Maximum number of steps of the copy of a database that another program locks; each waits for
/// seconds.
const MAX_LOCKED_STEPS: usize = 30;

/// Size of a copy buffer, in bytes.
const BUFFER_BYTES: usize = 256 << 10;

/// What a backup or a restoration has done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BackupReport {
    /// Size of the database, in bytes.
    pub database_bytes: u64,
    /// Number of objects in the backup.
    pub objects: u64,
    /// Number of objects that were copied.
    pub copied: u64,
    /// Size of the objects that were copied, in bytes.
    pub copied_bytes: u64,
    /// Number of objects that were deleted while the backup ran, or that are lost.
    pub missing: u64,
    /// True if the data folder does not know of the backup, and so neither does its server.
    pub is_unknown: bool,
}

fn failed(path: &Path, what: &str, error: &dyn std::fmt::Display) -> StoreError {
    StoreError::Folder { folder: path.display().to_string(), message: format!("{what}: {error}") }
}

/// Copies a file into another one, which is flushed to disk. Returns its size and its SHA-256.
fn copy(from: &Path, to: &Path) -> std::io::Result<(u64, String)> {
    let (mut source, mut target) = (File::open(from)?, File::create(to)?);
    let found = read_through(&mut source, Some(&mut target))?;
    target.sync_all()?;
    Ok(found)
}

/// Reads a file to its end. Returns its size and its SHA-256.
fn read_through(
    source: &mut File,
    mut target: Option<&mut File>,
) -> std::io::Result<(u64, String)> {
    let (mut buffer, mut digest, mut bytes) = (vec![0; BUFFER_BYTES], Sha256::new(), 0_u64);
    loop {
        let read = source.read(&mut buffer)?;
        let data = buffer.get(..read).unwrap_or_default();
        if data.is_empty() {
            break;
        }
        digest.update(data);
        if let Some(target) = &mut target {
            target.write_all(data)?;
        }
        bytes = bytes.saturating_add(read as u64);
    }
    let sha256 = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok((bytes, sha256))
}

/// Copies a file under a temporary name, and renames it when it is complete and, if an `expected`
/// size and SHA-256 are given, equal to them.
fn copy_whole(from: &Path, to: &Path, expected: Option<(u64, &str)>) -> Result<(u64, String)> {
    let draft = with_suffix(to, ".part");
    let copying = || {
        if let Some(folder) = to.parent() {
            create_folder(folder)?;
        }
        copy(from, &draft)
    };
    let copied = copying().map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => StoreError::Missing(error.to_string()),
        _ => failed(from, "cannot be copied", &error),
    });
    let whole = copied.and_then(|found| {
        if let Some(expected) = expected {
            compare(from, &found, expected)?;
        }
        let renamed = std::fs::rename(&draft, to).and_then(|()| match to.parent() {
            Some(folder) => sync_folder(folder),
            None => Ok(()),
        });
        renamed.map(|()| found).map_err(|error| failed(to, "cannot be written", &error))
    });
    if whole.is_err() {
        std::fs::remove_file(&draft).ok();
    }
    whole
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Flushes the entries of a folder to disk.
fn sync_folder(folder: &Path) -> std::io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Copies the database of a data folder, which a server may use, and checks the copy.
fn copy_database(data: &Path, to: &Path) -> Result<()> {
    let from = data.join(DATABASE_FILE);
    let copying = || {
        let source = open_beside_server(&from)?;
        let mut target = Connection::open(to)?;
        let backup = rusqlite::backup::Backup::new(&source, &mut target)?;
        // In one step, so that writes of the server do not start it again. A step waits for a lock.
        let mut step = backup.step(-1)?;
        for _ in 0..MAX_LOCKED_STEPS {
            if step == StepResult::Done {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
            step = backup.step(-1)?;
        }
        drop(backup);
        if step != StepResult::Done {
            return Ok("another program locks it; stop that program".to_owned());
        }
        // One file, without a log beside it.
        target.pragma_update(None, "journal_mode", "DELETE")?;
        target.query_row("PRAGMA quick_check", [], |row| row.get::<_, String>(0))
    };
    match copying() {
        Ok(verdict) if verdict == "ok" => Ok(()),
        Ok(fault) => Err(failed(&from, "the database cannot be copied", &fault)),
        Err(error) => Err(failed(&from, "the database cannot be copied", &error)),
    }
}

/// Backs up a data folder, whose server may be running, into a folder.
///
/// `now` is the time in Unix seconds, and `version` that of the program.
pub fn backup(
    data: &Path,
    to: &Path,
    must_be_new: bool,
    now: i64,
    version: &str,
) -> Result<BackupReport> {
    if !data.join(DATABASE_FILE).exists() {
        let message = "has no database; name the folder that the server has as --data".to_owned();
        return Err(StoreError::Folder { folder: data.display().to_string(), message });
    }
    if !data.join("objects").is_dir() {
        let message = "has no folder `objects`; mount or restore it".to_owned();
        return Err(StoreError::Folder { folder: data.display().to_string(), message });
    }
    create_folder(to).map_err(|error| failed(to, "cannot be created", &error))?;
    check_apart(data, to)?;
    check_is_backup(to)?;
    let cannot_write = |error: std::io::Error| failed(to, "cannot be written", &error);
    // Two backups into the same folder would mix.
    let lock = File::options().create(true).truncate(false).write(true).open(to.join(LOCK));
    let lock = lock.map_err(cannot_write)?;
    if lock.try_lock().is_err() {
        let message = "is in use by another backup; wait for its end".to_owned();
        return Err(StoreError::Folder { folder: to.display().to_string(), message });
    }
    let before = Manifest::open(to)?;
    if must_be_new && before.is_some() {
        let message = "has a backup already, which is kept; name another folder".to_owned();
        return Err(StoreError::Folder { folder: to.display().to_string(), message });
    }
    let old_files = files_of(to)?;
    remove_leftovers(to, &old_files);
    // A name of its own, so that the database of the backup before stays until the end.
    let mut number = 0_u32;
    let name = loop {
        let name = format!("batchwright-{now}-{number}.db");
        if !to.join(&name).exists() {
            break name;
        }
        number = number.saturating_add(1);
    };
    let database = to.join(&name);
    let draft = with_suffix(&database, ".part");
    std::fs::remove_file(&draft).ok();
    copy_database(data, &draft)?;
    std::fs::rename(&draft, &database).map_err(cannot_write)?;
    let manifest_draft = to.join(format!("{MANIFEST}.part"));
    let mut manifest = BufWriter::new(File::create(&manifest_draft).map_err(cannot_write)?);
    let mut write = |line: &Line| -> Result<()> {
        let text = serde_json::to_string(line)
            .map_err(|error| failed(to, "the manifest cannot be written", &error))?;
        writeln!(manifest, "{text}").map_err(cannot_write)
    };
    write(&Line::Backup { format: FORMAT, version: version.to_owned(), created_at: now })?;
    let mut opened = File::open(&database).map_err(cannot_write)?;
    let (bytes, sha256) = read_through(&mut opened, None).map_err(cannot_write)?;
    let mut report = BackupReport { database_bytes: bytes, ..BackupReport::default() };
    write(&Line::File { name: name.clone(), restored_as: DATABASE_FILE.into(), bytes, sha256 })?;
    let mut new_files = vec![name];
    for small in SMALL_FILES {
        let from = data.join(small);
        if from.exists() {
            let name = format!("{small}-{now}-{number}");
            let (bytes, sha256) = copy_whole(&from, &to.join(&name), None)?;
            let restored_as = small.to_owned();
            write(&Line::File { name: name.clone(), restored_as, bytes, sha256 })?;
            new_files.push(name);
        }
    }
    copy_objects((data, to), &database, before, &mut report, &mut write)?;
    write(&Line::End { objects: report.objects })?;
    let file = manifest.into_inner().map_err(|error| failed(to, "cannot be written", &error))?;
    file.sync_all().map_err(cannot_write)?;
    std::fs::rename(&manifest_draft, to.join(MANIFEST)).map_err(cannot_write)?;
    sync_folder(to).map_err(cannot_write)?;
    for old in old_files.iter().filter(|old| !new_files.contains(old)) {
        std::fs::remove_file(to.join(old)).ok();
    }
    remove_objects_that_are_gone(to, &database)?;
    // For the metric of the server. The backup is valid without it.
    report.is_unknown = note_backup(data, now).is_err();
    Ok(report)
}

/// Writes the time of a backup into its data folder, readable to the server also if root backs up.
fn note_backup(data: &Path, now: i64) -> std::io::Result<()> {
    let path = data.join(LAST_BACKUP);
    let draft = with_suffix(&path, ".part");
    std::fs::write(&draft, now.to_string())?;
    std::fs::set_permissions(&draft, std::fs::Permissions::from_mode(0o644))?;
    std::fs::rename(&draft, &path)
}

/// Refuses a backup folder that is the data folder, or one of which contains the other.
fn check_apart(data: &Path, to: &Path) -> Result<()> {
    let canonical = |path: &Path| {
        path.canonicalize().map_err(|error| failed(path, "cannot be resolved", &error))
    };
    let (data, to) = (canonical(data)?, canonical(to)?);
    if data.starts_with(&to) || to.starts_with(&data) {
        let message = "overlaps the data folder; name a folder outside of it".to_owned();
        return Err(StoreError::Folder { folder: to.display().to_string(), message });
    }
    Ok(())
}

/// Refuses a folder with other contents than a backup, since a backup removes what it replaces.
fn check_is_backup(to: &Path) -> Result<()> {
    let is_marked = to.join(LOCK).exists();
    let mut entries = to.read_dir().map_err(|error| failed(to, "cannot be read", &error))?;
    if is_marked || entries.next().is_none() {
        return Ok(());
    }
    let message = "has other files than a backup; name a new or empty folder, or that of an \
                   earlier backup"
        .to_owned();
    Err(StoreError::Folder { folder: to.display().to_string(), message })
}

/// Removes what an interrupted backup has left: files that the manifest does not name.
fn remove_leftovers(to: &Path, known: &[String]) {
    for file in std::fs::read_dir(to).into_iter().flatten().flatten() {
        let name = file.file_name();
        let name = name.to_string_lossy();
        let is_file = file.file_type().is_ok_and(|kind| kind.is_file());
        if is_of_backup(&name) && is_file && !known.iter().any(|known| *known == name) {
            std::fs::remove_file(file.path()).ok();
        }
    }
}

/// Returns true for the names of a backup's files beside the manifest, and of their drafts:
/// `NAME-TIME-NUMBER`, with an ending.
fn is_of_backup(name: &str) -> bool {
    let is_numbered = |prefix: &str| {
        let number = name.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('-'));
        number.filter(|number| number.starts_with(|c: char| c.is_ascii_digit())).is_some_and(
            |number| {
                let ending = number.trim_start_matches(|c: char| c.is_ascii_digit() || c == '-');
                let of_draft = [".part", ".db.part", ".db.part-journal", ".db.part-wal"];
                ending.is_empty() || ending == ".db" || of_draft.contains(&ending)
            },
        )
    };
    name == format!("{MANIFEST}.part")
        || is_numbered("batchwright")
        || SMALL_FILES.iter().any(|small| is_numbered(small))
}

/// Returns the names of the files of a backup beside its objects.
fn files_of(backup: &Path) -> Result<Vec<String>> {
    let mut files = Vec::new();
    let Some(mut lines) = Manifest::open(backup)? else { return Ok(files) };
    while let Some(Line::File { name, .. }) = lines.next()? {
        files.push(name);
    }
    Ok(files)
}

/// Opens the copy of a database, which nothing else uses.
fn open_copy(database: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    Connection::open_with_flags(database, flags)
}

/// Objects of a copied database, in the order of tenants and ids.
fn each_object(database: &Path, mut each: impl FnMut(String, String) -> Result<()>) -> Result<()> {
    let unreadable = |error: rusqlite::Error| failed(database, "cannot be read", &error);
    let connection = open_copy(database).map_err(unreadable)?;
    let sql = "SELECT tenants.name, files.id FROM files
        JOIN tenants ON tenants.key = files.tenant WHERE NOT removed
        ORDER BY tenants.name, files.id";
    let mut statement = connection.prepare(sql).map_err(unreadable)?;
    let mut rows = statement.query([]).map_err(unreadable)?;
    while let Some(row) = rows.next().map_err(unreadable)? {
        each(row.get(0).map_err(unreadable)?, row.get(1).map_err(unreadable)?)?;
    }
    Ok(())
}

/// Copies the objects that the backup does not have yet.
fn copy_objects(
    (data, to): (&Path, &Path),
    database: &Path,
    mut before: Option<Manifest>,
    report: &mut BackupReport,
    write: &mut impl FnMut(&Line) -> Result<()>,
) -> Result<()> {
    let mut known = next_object(&mut before)?;
    each_object(database, |tenant, id| {
        let path = LocalObjects::relative_path(&tenant, &id);
        let target = to.join("objects").join(&path);
        while known.as_ref().is_some_and(|(key, ..)| *key < (tenant.clone(), id.clone())) {
            known = next_object(&mut before)?;
        }
        let kept = known.as_ref().filter(|(key, bytes, _)| {
            *key == (tenant.clone(), id.clone())
                && std::fs::metadata(&target).is_ok_and(|found| found.len() == *bytes)
        });
        let (bytes, sha256) = match kept {
            Some((_, bytes, sha256)) => (*bytes, sha256.clone()),
            None => match copy_once(&data.join("objects").join(&path), &target) {
                Ok((found, false)) => found,
                Ok((copied, true)) => {
                    report.copied = report.copied.saturating_add(1);
                    report.copied_bytes = report.copied_bytes.saturating_add(copied.0);
                    copied
                }
                Err(StoreError::Missing(_)) => {
                    report.missing = report.missing.saturating_add(1);
                    return write(&Line::Missing { tenant, id });
                }
                Err(error) => return Err(error),
            },
        };
        report.objects = report.objects.saturating_add(1);
        write(&Line::Object { tenant, id, bytes, sha256 })
    })
}

/// Copies an object, unless an interrupted backup has copied it already. Returns its size and its
/// SHA-256, and true if it was copied now.
fn copy_once(from: &Path, to: &Path) -> Result<((u64, String), bool)> {
    let size = |path: &Path| std::fs::metadata(path).ok().map(|found| found.len());
    if size(to).is_some_and(|bytes| Some(bytes) == size(from)) {
        let read = |path: &Path| read_through(&mut File::open(path)?, None);
        if let (Ok(found), Ok(expected)) = (read(to), read(from))
            && found == expected
        {
            return Ok((found, false));
        }
    }
    Ok((copy_whole(from, to, None)?, true))
}

/// Object of a manifest: its tenant and id, its size and its SHA-256.
type Known = ((String, String), u64, String);

/// Returns the next object of a manifest.
fn next_object(manifest: &mut Option<Manifest>) -> Result<Option<Known>> {
    while let Some(line) = manifest.as_mut().map(Manifest::next).transpose()?.flatten() {
        if let Line::Object { tenant, id, bytes, sha256 } = line {
            return Ok(Some(((tenant, id), bytes, sha256)));
        }
    }
    *manifest = None;
    Ok(None)
}

/// Removes the objects of earlier backups that the database does not name any more.
fn remove_objects_that_are_gone(to: &Path, database: &Path) -> Result<()> {
    let unreadable = |error: rusqlite::Error| failed(database, "cannot be read", &error);
    let connection = open_copy(database).map_err(unreadable)?;
    let sql = "SELECT 1 FROM files JOIN tenants ON tenants.key = files.tenant
        WHERE NOT removed AND tenants.name = ?1 AND files.id = ?2";
    let mut statement = connection.prepare(sql).map_err(unreadable)?;
    let folders = |path: &Path| std::fs::read_dir(path).into_iter().flatten().flatten();
    for tenant in folders(&to.join("objects")) {
        for object in folders(&tenant.path().join("files")) {
            let (tenant, id) = (tenant.file_name(), object.file_name());
            let (tenant, id) = (tenant.to_string_lossy(), id.to_string_lossy());
            let known = statement.query_row([&*tenant, &*id], |_| Ok(()));
            if matches!(known, Err(rusqlite::Error::QueryReturnedNoRows)) {
                std::fs::remove_file(object.path()).ok();
            }
        }
    }
    Ok(())
}

/// Compares everything in a backup with its manifest.
pub fn verify(backup: &Path) -> Result<BackupReport> {
    each_file(backup, |from, _, expected| {
        let mut file = File::open(from).map_err(|error| failed(from, "cannot be read", &error))?;
        let found = read_through(&mut file, None)
            .map_err(|error| failed(from, "cannot be read", &error))?;
        compare(from, &found, expected)
    })
}

/// Calls a function with each file of a backup: its path, its place in a data folder, its size and
/// its SHA-256. The database is the last one.
fn each_file(
    backup: &Path,
    mut each: impl FnMut(&Path, &Path, (u64, &str)) -> Result<()>,
) -> Result<BackupReport> {
    let no_backup = || {
        let message = format!("is no backup: it has no {MANIFEST}");
        StoreError::Folder { folder: backup.display().to_string(), message }
    };
    let mut manifest = Manifest::open(backup)?.ok_or_else(no_backup)?;
    let (mut report, mut database) = (BackupReport::default(), None);
    while let Some(line) = manifest.next()? {
        match line {
            Line::File { name, restored_as, bytes, sha256 } if restored_as == DATABASE_FILE => {
                report.database_bytes = bytes;
                database = Some((manifest.checked_name(name)?, bytes, sha256));
            }
            Line::File { name, restored_as, bytes, sha256 } => {
                let (name, to) =
                    (manifest.checked_name(name)?, manifest.checked_name(restored_as)?);
                each(&backup.join(name), Path::new(&to), (bytes, &sha256))?;
            }
            Line::Object { tenant, id, bytes, sha256 } => {
                let path = LocalObjects::relative_path(&tenant, &id);
                let path = Path::new("objects").join(path);
                each(&backup.join(&path), &path, (bytes, &sha256))?;
                report.objects = report.objects.saturating_add(1);
            }
            Line::Missing { .. } => report.missing = report.missing.saturating_add(1),
            Line::Backup { .. } | Line::End { .. } => {}
        }
    }
    let Some((name, bytes, sha256)) = database else {
        return Err(manifest.damaged("it has no database"));
    };
    each(&backup.join(name), Path::new(DATABASE_FILE), (bytes, &sha256))?;
    Ok(report)
}

fn compare(path: &Path, found: &(u64, String), expected: (u64, &str)) -> Result<()> {
    if (found.0, found.1.as_str()) == expected {
        return Ok(());
    }
    let message = "the backup is damaged";
    let (found, expected) = ((found.0, &found.1), expected);
    let detail = format!(
        "expected {} bytes with the SHA-256 {}, found {} bytes with {}",
        expected.0, expected.1, found.0, found.1
    );
    Err(failed(path, message, &detail))
}

/// Restores a backup into a data folder without a database, which no server uses.
pub fn restore(backup: &Path, data: &Path) -> Result<BackupReport> {
    let _lock = lock_folder(data)?;
    for name in ["", "-wal", "-shm", "-journal"] {
        if with_suffix(&data.join(DATABASE_FILE), name).exists() {
            let message = format!(
                "has the file {DATABASE_FILE}{name} already; restore into a new folder, or move \
                 the old files away"
            );
            return Err(StoreError::Folder { folder: data.display().to_string(), message });
        }
    }
    let report = each_file(backup, |from, to, expected| {
        // The database comes last, so a damaged object leaves no database behind.
        copy_whole(from, &data.join(to), Some(expected)).map(drop)
    })?;
    sync_folder(data).map_err(|error| failed(data, "cannot be written", &error))?;
    Ok(report)
}
