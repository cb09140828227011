//! Whether the files of a SQLite database are still the ones that were opened.
//!
//! A database in WAL mode is three files: the database, its write-ahead log (`-wal`) and the index
//! of that log (`-shm`). SQLite goes on writing to a file that was deleted, renamed or replaced,
//! and the next start does not find what was written there. So every statement checks first that
//! each path still leads to the opened file. A path that leads there again is accepted again.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rustix::fs::{FlockOperation, fcntl_lock};
use rustix::io::Errno;

use crate::store::{StoreError, StoreErrorKind};

/// Checks of a suspicious state before it counts. A process that opens or closes the database at
/// this moment shows the same state for some milliseconds.
const CHECKS: u32 = 20;
/// Delay between two of these checks.
const CHECK_INTERVAL: Duration = Duration::from_millis(50);
/// Bytes at the start of the log: its header.
const LOG_HEADER_BYTES: u64 = 32;
/// Bytes of a frame of the log that precede its page.
const FRAME_HEADER_BYTES: u64 = 24;
/// Bytes of one of the two copies of the header at the start of the index.
const INDEX_HEADER_BYTES: usize = 48;

/// The three files of an open database.
#[derive(Debug)]
pub(super) struct OpenFiles {
    database: OpenFile,
    log: OpenFile,
    index: OpenFile,
    /// Largest length of the log that was seen, in bytes. SQLite writes over a log and never
    /// shortens it unless somebody asks for a truncating checkpoint.
    log_bytes: AtomicU64,
    is_log_truncated: AtomicBool,
}

/// A path, and the file that it led to when it was opened.
#[derive(Debug)]
struct OpenFile {
    role: FileRole,
    path: PathBuf,
    opened: Option<Identity>,
}

/// Device and inode number.
type Identity = (u64, u64);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FileRole {
    Database,
    Log,
    Index,
}

/// What happened to a file that is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Missing,
    Replaced,
    Truncated,
    /// It is missing, and another process uses it.
    MissingElsewhere,
    /// Another process uses a different one.
    ReplacedElsewhere,
}

/// A file that is no longer the one in use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FileChange {
    role: FileRole,
    path: PathBuf,
    change: Change,
}

impl fmt::Display for FileChange {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self.role {
            FileRole::Database => "",
            FileRole::Log => "the write-ahead log ",
            FileRole::Index => "the index of the write-ahead log ",
        })?;
        write!(f, "{} ", self.path.display())?;

        f.write_str(match self.change {
            Change::Missing => "is no longer there",
            Change::Replaced => "is no longer the file that was opened",
            Change::Truncated => "was truncated while it was in use",
            Change::MissingElsewhere => "is missing, and a running process still uses it",
            Change::ReplacedElsewhere => "is not the file that a running process uses",
        })
    }
}

impl From<FileChange> for StoreError {
    fn from(change: FileChange) -> StoreError {
        let kind = match (change.role, change.change) {
            (FileRole::Log | FileRole::Index, _) => StoreErrorKind::LogLost,
            (FileRole::Database, Change::Missing | Change::MissingElsewhere) => {
                StoreErrorKind::FileMissing
            }
            (
                FileRole::Database,
                Change::Replaced | Change::ReplacedElsewhere | Change::Truncated,
            ) => StoreErrorKind::FileReplaced,
        };
        StoreError::new(kind, change.to_string())
    }
}

impl OpenFiles {
    /// Remembers the files of a database that has an open connection.
    pub(super) fn remember(file: &Path) -> OpenFiles {
        let open_file = |role, path: PathBuf| OpenFile {
            role,
            opened: identity(&path),
            path,
        };
        let log = open_file(FileRole::Log, log_path(file));

        OpenFiles {
            database: open_file(FileRole::Database, file.to_owned()),
            index: open_file(FileRole::Index, index_path(file)),
            log_bytes: AtomicU64::new(length(&log.path)),
            log,
            is_log_truncated: AtomicBool::new(false),
        }
    }

    /// # Errors
    /// The first file that was deleted, renamed, replaced or truncated.
    pub(super) fn verify(&self) -> Result<(), FileChange> {
        self.database.verify()?;
        self.log.verify()?;
        self.index.verify()?;

        if self.is_log_truncated.load(Ordering::Relaxed) {
            return Err(self.log.change(Change::Truncated));
        }
        Ok(())
    }

    /// Returns true if the log holds what only an open connection can still read: its path leads
    /// elsewhere, and the database file is the one that was opened.
    pub(super) fn is_log_lost(&self) -> bool {
        self.log.verify().is_err() && self.database.verify().is_ok()
    }

    /// Returns true if the opened log is shorter than it was. Either somebody made a truncating
    /// checkpoint, and nothing is lost, or somebody cut the file.
    pub(super) fn is_log_shorter(&self) -> bool {
        let is_shorter = length(&self.log.path) < self.log_bytes.load(Ordering::Relaxed);
        is_shorter && self.log.verify().is_ok()
    }

    /// Records the present length of the log as the largest one.
    pub(super) fn record_log_length(&self) {
        self.log_bytes
            .fetch_max(length(&self.log.path), Ordering::Relaxed);
    }

    /// Records that a truncating checkpoint succeeded: the log begins anew.
    pub(super) fn record_log_restart(&self) {
        self.log_bytes
            .store(length(&self.log.path), Ordering::Relaxed);
    }

    /// Records that frames of the log are gone. No write is accepted until the database is opened
    /// again: SQLite would append behind the hole, where a recovery never looks.
    pub(super) fn record_log_truncated(&self) {
        self.is_log_truncated.store(true, Ordering::Relaxed);
    }

    /// Renames a file that lies in the place of the lost log, and returns its new path. Recovery
    /// after a crash would read it and write old pages over new ones.
    pub(super) fn set_aside_foreign_log(&self) -> std::io::Result<Option<PathBuf>> {
        let Some(found) = identity(&self.log.path).filter(|found| Some(*found) != self.log.opened)
        else {
            return Ok(None);
        };
        let mut aside = self.log.path.clone().into_os_string();
        aside.push(format!(".set-aside-{}", found.1));
        std::fs::rename(&self.log.path, &aside)?;
        Ok(Some(aside.into()))
    }
}

impl OpenFile {
    fn verify(&self) -> Result<(), FileChange> {
        match identity(&self.path) {
            found if found == self.opened => Ok(()),
            None => Err(self.change(Change::Missing)),
            Some(_) => Err(self.change(Change::Replaced)),
        }
    }

    fn change(&self, change: Change) -> FileChange {
        FileChange {
            role: self.role,
            path: self.path.clone(),
            change,
        }
    }
}

/// Refuses to open a database whose log is not the one that another process writes to. SQLite
/// would create an empty log beside the index of the old one, and read and write nonsense.
///
/// # Errors
/// The file that is missing or was replaced.
pub(super) async fn verify_joinable(file: &Path) -> Result<(), FileChange> {
    let mut found = Ok(());
    for check in 0..CHECKS {
        if check > 0 {
            tokio::time::sleep(CHECK_INTERVAL).await;
        }
        found = compare_log_with_index(file);
        if found.is_ok() || !is_in_use(file) {
            return Ok(());
        }
    }
    found
}

/// # Errors
/// What a process that has the database open would find changed. Without such a process, the same
/// state is harmless: SQLite begins with what is there.
fn compare_log_with_index(file: &Path) -> Result<(), FileChange> {
    let (log, index) = (log_path(file), index_path(file));
    let changed = |role, path: &Path, change| {
        Err(FileChange {
            role,
            path: path.to_owned(),
            change,
        })
    };

    if !log.exists() {
        return changed(FileRole::Log, &log, Change::MissingElsewhere);
    }
    if !index.exists() {
        return changed(FileRole::Index, &index, Change::MissingElsewhere);
    }
    let Some(header) = IndexHeader::read(&index) else {
        return Ok(());
    };
    // The log is read between two reads of the index: a commit may change both meanwhile.
    let is_same_log = header.describes(&log);
    if is_same_log || IndexHeader::read(&index) != Some(header) {
        return Ok(());
    }
    changed(FileRole::Log, &log, Change::ReplacedElsewhere)
}

/// What the index (`-shm`) says about its log. See "The WAL-Index File Format" of SQLite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct IndexHeader {
    page_bytes: u64,
    frames: u64,
    /// Copied from the header of the log that the index belongs to.
    salt: [u8; 8],
}

impl IndexHeader {
    /// Returns `None` if the index is empty, or is just being written.
    ///
    /// The caller must not have the database open: closing any handle to a file gives up all locks
    /// of the process on it.
    fn read(index: &Path) -> Option<IndexHeader> {
        let mut bytes = [0; 2 * INDEX_HEADER_BYTES];
        File::open(index).ok()?.read_exact(&mut bytes).ok()?;
        let (first, second) = bytes.split_at(INDEX_HEADER_BYTES);
        let is_initialised = first[12] == 1;
        if first != second || !is_initialised {
            return None;
        }

        // Numbers are in the byte order of the machine; a page of 64 KiB is written as 1.
        let page_bytes = match u16::from_ne_bytes([first[14], first[15]]) {
            1 => 1 << 16,
            bytes => u64::from(bytes),
        };
        let frames = u32::from_ne_bytes(first[16..20].try_into().ok()?);
        Some(IndexHeader {
            page_bytes,
            frames: u64::from(frames),
            salt: first[32..40].try_into().ok()?,
        })
    }

    /// Returns true if the file holds as many frames as the index counts, under the same salt.
    fn describes(&self, log: &Path) -> bool {
        if self.frames == 0 {
            return true;
        }
        let mut header = [0; LOG_HEADER_BYTES as usize];
        let read = File::open(log).and_then(|mut log| log.read_exact(&mut header));
        let frames_bytes = self.frames * (self.page_bytes + FRAME_HEADER_BYTES);
        read.is_ok()
            && header[16..24] == self.salt
            && length(log) >= LOG_HEADER_BYTES + frames_bytes
    }
}

/// Returns true if another process has the database open: it holds a shared lock on the file.
///
/// The caller must not have the database open, see [`IndexHeader::read`].
fn is_in_use(file: &Path) -> bool {
    let opened = File::options().read(true).write(true).open(file);
    let locked = opened.map(|file| fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive));
    matches!(locked, Ok(Err(Errno::AGAIN | Errno::ACCESS)))
}

fn log_path(file: &Path) -> PathBuf {
    with_suffix(file, "-wal")
}

fn index_path(file: &Path) -> PathBuf {
    with_suffix(file, "-shm")
}

/// SQLite puts its files beside the database that a symbolic link leads to, not beside the link.
fn with_suffix(file: &Path, suffix: &str) -> PathBuf {
    let file = file.canonicalize().unwrap_or_else(|_| file.to_owned());
    let mut path = file.into_os_string();
    path.push(suffix);
    path.into()
}

fn identity(file: &Path) -> Option<Identity> {
    let metadata = std::fs::metadata(file).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

/// Length in bytes, 0 if the file is missing.
fn length(file: &Path) -> u64 {
    std::fs::metadata(file).map_or(0, |metadata| metadata.len())
}
