//! Checks that the files of a SQLite database are still the ones that were opened.
//!
//! A database in WAL mode is three files: the database, its write-ahead log (`-wal`) and the index
//! of that log (`-shm`). SQLite continues to write to a file that was deleted, renamed or replaced,
//! and the next start does not find these writes. So every statement checks first that each path
//! still leads to the opened file. A path that leads to the opened file again is accepted again.

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

/// Number of checks that must find a suspicious state before it counts. A process that is opening
/// or closing the database causes the same state for some milliseconds.
const CHECKS: u32 = 20;
/// Delay between two of these checks.
const CHECK_INTERVAL: Duration = Duration::from_millis(50);
/// Size in bytes of the header at the start of the log.
const LOG_HEADER_BYTES: u64 = 32;
/// Size in bytes of the header that precedes the page in each frame of the log.
const FRAME_HEADER_BYTES: u64 = 24;
/// Size in bytes of one of the two header copies at the start of the index.
const INDEX_HEADER_BYTES: usize = 48;

/// The three files of an open database.
#[derive(Debug)]
pub(super) struct OpenFiles {
    database: OpenFile,
    log: OpenFile,
    index: OpenFile,
    /// Largest observed length of the log in bytes. SQLite overwrites a log and never shortens it,
    /// except in a truncating checkpoint.
    log_bytes: AtomicU64,
    is_log_truncated: AtomicBool,
}

/// A path and the file that it led to when the database was opened.
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

/// A change to a file that is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Missing,
    Replaced,
    Truncated,
    /// The file is missing, and another process uses it.
    MissingElsewhere,
    /// Another process uses a different file.
    ReplacedElsewhere,
}

/// A path that no longer leads to the file in use.
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
    /// Records the files of a database that has an open connection.
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

    /// Checks that every path still leads to the opened file.
    ///
    /// # Errors
    /// Returns the first file that was deleted, renamed, replaced or truncated.
    pub(super) fn verify(&self) -> Result<(), FileChange> {
        self.database.verify()?;
        self.log.verify()?;
        self.index.verify()?;

        if self.is_log_truncated.load(Ordering::Relaxed) {
            return Err(self.log.change(Change::Truncated));
        }
        Ok(())
    }

    /// Returns `true` if only an open connection can still read the log, because its path leads to
    /// another file while the database file is the one that was opened.
    pub(super) fn is_log_lost(&self) -> bool {
        self.log.verify().is_err() && self.database.verify().is_ok()
    }

    /// Returns `true` if the opened log is shorter than it was. Either a truncating checkpoint ran
    /// and nothing is lost, or somebody truncated the file.
    pub(super) fn is_log_shorter(&self) -> bool {
        let is_shorter = length(&self.log.path) < self.log_bytes.load(Ordering::Relaxed);
        is_shorter && self.log.verify().is_ok()
    }

    /// Records the current length of the log as the largest one.
    pub(super) fn record_log_length(&self) {
        self.log_bytes
            .fetch_max(length(&self.log.path), Ordering::Relaxed);
    }

    /// Records that a truncating checkpoint succeeded and the log restarts.
    pub(super) fn record_log_restart(&self) {
        self.log_bytes
            .store(length(&self.log.path), Ordering::Relaxed);
    }

    /// Records that frames of the log are lost. No write is accepted until the database is opened
    /// again, because SQLite would append behind the hole, which recovery never reads.
    pub(super) fn record_log_truncated(&self) {
        self.is_log_truncated.store(true, Ordering::Relaxed);
    }

    /// Renames a file at the path of the lost log and returns its new path. Recovery after a crash
    /// would otherwise read the file and overwrite new pages with old ones.
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

/// Refuses to open a database whose log is not the one that another process writes to. SQLite would
/// create an empty log next to the index of the old log, and read and write corrupt data.
///
/// # Errors
/// Returns the file that is missing or was replaced.
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

/// Compares the log with its index to detect changes under a process that has the database open.
///
/// # Errors
/// Returns the change that a process with the database open would detect. Without such a process
/// the same state is harmless, because SQLite starts from the existing files.
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
    // Read the log between two reads of the index, because a commit may change both meanwhile.
    let is_same_log = header.describes(&log);
    if is_same_log || IndexHeader::read(&index) != Some(header) {
        return Ok(());
    }
    changed(FileRole::Log, &log, Change::ReplacedElsewhere)
}

/// The header of the index (`-shm`), which describes its log. See SQLite's "WAL-Index File Format".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct IndexHeader {
    page_bytes: u64,
    frames: u64,
    /// The salt, copied from the header of the log that the index belongs to.
    salt: [u8; 8],
}

impl IndexHeader {
    /// Reads the header. Returns `None` if the index is empty or a write to it is in progress.
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

        // Numbers are in native byte order; a page size of 64 KiB is written as 1.
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

    /// Returns `true` if the file holds as many frames as the index counts, under the same salt.
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

/// Returns `true` if another process has the database open, that is, holds a shared lock on the
/// file.
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

/// Resolves symbolic links. SQLite creates its files next to the database that a link leads to, not
/// next to the link.
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

/// Returns the length in bytes, or 0 if the file is missing.
fn length(file: &Path) -> u64 {
    std::fs::metadata(file).map_or(0, |metadata| metadata.len())
}
