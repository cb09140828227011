//! SQLite: opens a file with one connection that writes and several that read, and appends a batch
//! in one call to the connection's thread.

use std::collections::HashSet;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use sqlx::ConnectOptions;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous};
use tokio::sync::{mpsc, oneshot};

use super::checkpointer::{CHECKPOINT, Checkpointer, Request, restart_shorter_log};
use super::connection::{Connection, EngineConnection, SqliteSession, execute, rows};
use super::file_identity::{self, OpenFiles};
use super::interruptible::InterruptibleConnection;
use super::pool::{AcquireError, Limits, Pool, Pooled};
use crate::domain::stripe::event::EventKey;
use crate::store::{Appended, Disk, NewEvent, Space, StoreError, StoreErrorKind};

/// Longest wait of a statement for another process that writes to the same file, and longest wait
/// of a caller for a free connection.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
const READERS: u32 = 4;
/// Page cache of each reader in KiB; SQLite writes the unit as a minus sign. The cache of the
/// operating system serves all of them.
const READERS_CACHE: &str = "-512";
const PAGE_SIZE: u32 = 8192;
/// Bytes written to the WAL before a checkpoint. While the WAL is short, SQLite overwrites the same
/// blocks, which makes a commit twice as fast as one that extends the file.
const CHECKPOINT_AFTER: usize = 8 << 20;
/// Bytes that a batch writes in addition to its rows, at least one page of each index.
const PAGES_A_BATCH: usize = 6 * PAGE_SIZE as usize;
/// Pages in the WAL after which the writer runs a checkpoint itself. That happens only if the
/// checkpointer cannot keep up.
const CHECKPOINT_AT_LAST: &str = "16384";
/// Statement that reads the settings of the writer that decide whether an acknowledged commit
/// survives a crash.
const DURABILITY: &str =
    "select synchronous, journal_mode from pragma_synchronous, pragma_journal_mode";

#[derive(Clone, Debug)]
pub(in crate::store) struct SqliteStore {
    file: PathBuf,
    /// The files that were opened. Their paths may lead to other files later.
    files: Arc<OpenFiles>,
    write: Arc<Pool<InterruptibleConnection>>,
    read: Arc<Pool<InterruptibleConnection>>,
    /// Approximate bytes written since the last checkpoint.
    written: Arc<AtomicUsize>,
    checkpointer: mpsc::Sender<Request>,
    /// `true` after the checkpointer has run. The writer moves the frames that were written
    /// meanwhile.
    checkpoint_almost_done: Arc<AtomicBool>,
}

/// The binds of [`APPEND`].
struct AppendBinds {
    /// A JSON array with the small columns of each event.
    events: String,
    /// Keys, observations and bodies, one after the other.
    blob: Vec<u8>,
    /// A JSON array of mentioned objects and positions in `blob`.
    mentions: String,
}

fn append_binds(batch: &[NewEvent]) -> AppendBinds {
    let mut blob = Vec::with_capacity(
        batch
            .iter()
            .map(|event| event.body.as_bytes().len() + 1024)
            .sum(),
    );
    let (mut events, mut mentions) = (Vec::with_capacity(batch.len()), Vec::new());
    for event in crate::store::events::firsts(batch) {
        let at = blob.len() + 1;
        let observation = event.observation.as_deref().unwrap_or_default();
        blob.extend_from_slice(&event.key.0);
        blob.extend_from_slice(observation.as_bytes());
        blob.extend_from_slice(event.body.as_bytes());
        events.push((
            (at, observation.len(), event.body.as_bytes().len()),
            (
                &event.id,
                &event.event_type,
                &event.api_version,
                &event.object_id,
                event.created_s,
                event.received_ms,
            ),
            (
                event.source.as_str(),
                &event.secret_label,
                event.outcome.as_str(),
                &event.unreadable_reason,
                event.linked(),
            ),
        ));
        mentions.extend(
            event
                .mentions
                .iter()
                .map(|mention| (&mention.object_id, at)),
        );
    }

    AppendBinds {
        events: serde_json::to_string(&events).expect("strings and numbers always serialise"),
        blob,
        mentions: serde_json::to_string(&mentions).expect("strings and numbers always serialise"),
    }
}

impl SqliteStore {
    /// Opens the file, and creates it if it is missing.
    pub async fn open(path: &str) -> Result<SqliteStore, StoreError> {
        let file = file(path)?;
        file_identity::verify_joinable(&file).await?;
        create_private_file(&file);
        let options = options_of(path)?
            .create_if_missing(true)
            .foreign_keys(true)
            .page_size(PAGE_SIZE)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(BUSY_TIMEOUT)
            .statement_cache_capacity(64)
            .pragma("wal_autocheckpoint", CHECKPOINT_AT_LAST)
            // A container may lack a writable folder for temporary files: a large batch would fail.
            .pragma("temp_store", "memory")
            .disable_statement_logging();

        // Open the writer first: it creates the file, which readers cannot.
        let write = pool_of(1, options.clone());
        acquire(&write).await?.set_reusable();
        let reading = options
            .clone()
            .create_if_missing(false)
            .read_only(true)
            .pragma("cache_size", READERS_CACHE);
        let read = pool_of(READERS, reading);
        acquire(&read).await?.set_reusable();

        let connection = options.connect().await?;
        let files = Arc::new(OpenFiles::remember(&file));
        let (checkpointer, requests) = mpsc::channel(1);
        let checkpoint_almost_done = Arc::new(AtomicBool::new(false));
        let task = Checkpointer {
            connection,
            requests,
            is_almost_done: checkpoint_almost_done.clone(),
            file: file.clone(),
            files: files.clone(),
        };
        tokio::spawn(task.run());

        Ok(SqliteStore {
            file,
            files,
            write,
            read,
            written: Arc::default(),
            checkpointer,
            checkpoint_almost_done,
        })
    }

    /// Returns a connection for statements that read.
    pub async fn session(&self) -> Result<Connection, StoreError> {
        self.files.verify()?;
        let reader = acquire(&self.read).await?;
        Ok(Connection::new(EngineConnection::Sqlite(
            SqliteSession::new(reader),
        )))
    }

    /// Returns a write transaction. The transaction takes the lock at once, because one that reads
    /// first fails if another process writes in between.
    pub async fn transaction(&self) -> Result<Connection, StoreError> {
        let mut session = self.writing_session().await?;
        session.begin("begin immediate").await?;
        Ok(session)
    }

    /// Returns the permission bits of the database file if every user of the machine may read it.
    pub fn exposed_mode(&self) -> Option<u32> {
        const READABLE_BY_OTHERS: u32 = 0o004;
        let mode = std::fs::metadata(&self.file).ok()?.mode() & 0o777;
        (mode & READABLE_BY_OTHERS != 0).then_some(mode)
    }

    async fn writing_session(&self) -> Result<Connection, StoreError> {
        let writer = self.writer().await?;
        Ok(Connection::new(EngineConnection::Sqlite(
            SqliteSession::new(writer),
        )))
    }

    /// Returns the connection that writes.
    ///
    /// # Errors
    /// Returns, among others, [`StoreErrorKind::LogLost`] if a write would be lost.
    pub async fn writer(&self) -> Result<Pooled<InterruptibleConnection>, StoreError> {
        self.files.verify()?;
        let mut writer = acquire(&self.write).await?;
        if self.files.is_log_shorter() {
            restart_shorter_log(&mut writer, &self.files).await?;
        }
        Ok(writer)
    }

    /// Checks that commits of this connection reach the disk before they return.
    async fn verify_durability(session: &mut Connection) -> Result<(), StoreError> {
        const FULL: i64 = 2;
        let (synchronous, journal) = rows!(session, fetch_one, (i64, String), DURABILITY)?;
        if synchronous >= FULL && journal == "wal" {
            return Ok(());
        }
        Err(StoreError::new(
            StoreErrorKind::UnsafeCommit,
            format!("synchronous is {synchronous} and journal_mode is {journal}"),
        ))
    }

    /// Appends a batch of any size in one call to the connection's thread. Passes small columns as
    /// JSON, and large or binary columns as parts of one blob.
    pub async fn append(&self, batch: &[NewEvent]) -> Result<Vec<Appended>, StoreError> {
        let AppendBinds {
            events,
            blob,
            mentions,
        } = append_binds(batch);
        let bytes = blob.len();
        let mut session = self.writing_session().await?;
        if self.checkpoint_almost_done.swap(false, Ordering::Relaxed) {
            // Copies the few remaining frames. With the next write SQLite then restarts the WAL at
            // its beginning.
            execute!(session, CHECKPOINT)?;
            SqliteStore::verify_durability(&mut session).await?;
        }

        session.set_in_transaction(true);

        // Drain all rows: `fetch_one` would stop before the later statements run.
        let EngineConnection::Sqlite(connection) = &mut session.connection else {
            unreachable!("this store opens SQLite connections")
        };
        let append = sqlx::query_as::<_, (String,)>(APPEND);
        let append = append.bind(events).bind(blob).bind(mentions);
        let ended = append.fetch_all(connection.start()).await;
        let answered = connection.end(ended)?;
        session.set_in_transaction(false);
        session.done().await?;

        // Check again: the log may have been deleted since, and the commit with it.
        self.files.verify()?;
        self.files.record_log_length();
        self.note_written(bytes + PAGES_A_BATCH);
        let known = answered
            .first()
            .map(|(keys,)| serde_json::from_str::<HashSet<String>>(keys));
        let mut known = known
            .and_then(Result::ok)
            .ok_or_else(|| StoreError::damaged("the keys of known events"))?;

        Ok(crate::store::events::answers(batch, |key| {
            known.insert(hex::encode_upper(key.0))
        }))
    }

    fn note_written(&self, bytes: usize) {
        if self.written.fetch_add(bytes, Ordering::Relaxed) + bytes > CHECKPOINT_AFTER {
            self.written.store(0, Ordering::Relaxed);
            // A full queue means that a checkpoint is about to run anyway.
            let _ = self.checkpointer.try_send(Request::Checkpoint);
        }
    }

    pub fn space(&self) -> Result<Space, StoreError> {
        let unseen = |error: std::io::Error| {
            StoreError::new(
                StoreErrorKind::Io,
                format!("{}: {error}", self.file.display()),
            )
        };
        let log = self.file.with_file_name(
            [self.file.file_name().unwrap_or_default(), "-wal".as_ref()].join("".as_ref()),
        );
        let folder = self
            .file
            .parent()
            .filter(|folder| !folder.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        let disk = rustix::fs::statvfs(folder).map_err(|error| unseen(error.into()))?;
        let (free, size) = (disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize);

        Ok(Space {
            database: std::fs::metadata(&self.file).map_err(unseen)?.len(),
            // A missing WAL means that no write has happened yet.
            wal: Some(std::fs::metadata(log).map_or(0, |log| log.len())),
            disk: Some(Disk { free, size }),
        })
    }

    pub async fn close(&self) {
        self.read.close().await;
        self.write.close().await;

        let (closing, closed) = oneshot::channel();
        let request = Request::Close(closing);
        if self.checkpointer.send(request).await.is_ok() {
            // The task ends without an answer only if it panics.
            let _ = closed.await;
        }
    }
}

/// Creates the file so that only its owner can read it. SQLite gives the WAL and its index the same
/// permissions.
fn create_private_file(file: &Path) {
    let created = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(file);
    // If the file exists or cannot be created, SQLite opens it or reports the reason.
    drop(created);
}

fn options_of(path: &str) -> Result<SqliteConnectOptions, sqlx::Error> {
    SqliteConnectOptions::from_str(&format!("sqlite://{path}"))
}

/// Returns the path that follows `sqlite://` in a URL.
pub(in crate::store) fn file(path: &str) -> Result<PathBuf, sqlx::Error> {
    Ok(options_of(path)?.get_filename().to_owned())
}

/// Statement that appends a batch and returns as JSON, in hexadecimal digits, the keys that were
/// stored before. `$1`: events, `$2`: keys, observations and bodies, `$3`: mentions.
///
/// Mentions are inserted first, so that an event that is already stored adds no mentions.
const APPEND: &str = "
    begin immediate;
    select json_group_array(hex(key)) from events where key in (select substr($2, value->>'$[0][0]', 32) from json_each($1));
    insert into mentions (object_id, event_key)
    select value->>0, substr($2, value->>1, 32) from json_each($3)
    where substr($2, value->>1, 32) not in (select key from events) on conflict do nothing;
    insert into events (key, id, event_type, api_version, object_id, created_s, received_ms, source, secret_label, outcome,
                        unreadable_reason, linked, telling, body)
    select substr($2, value->>'$[0][0]', 32), value->>'$[1][0]', value->>'$[1][1]', value->>'$[1][2]', value->>'$[1][3]',
           value->>'$[1][4]', value->>'$[1][5]', value->>'$[2][0]', value->>'$[2][1]', value->>'$[2][2]', value->>'$[2][3]',
           value->>'$[2][4]', nullif(cast(substr($2, (value->>'$[0][0]') + 32, value->>'$[0][1]') as text), ''),
           substr($2, (value->>'$[0][0]') + 32 + (value->>'$[0][1]'), value->>'$[0][2]')
    from json_each($1) where true on conflict do nothing;
    commit";
const _: () = assert!(
    EventKey::LENGTH == 32,
    "APPEND cuts keys out of its blob by their length"
);

fn pool_of(
    max_connections: u32,
    options: SqliteConnectOptions,
) -> Arc<Pool<InterruptibleConnection>> {
    let limits = Limits {
        max_connections,
        acquire_timeout: BUSY_TIMEOUT,
        open_timeout: BUSY_TIMEOUT,
        max_lifetime: None,
        max_idle: None,
    };

    Pool::new(limits, move || {
        let options = options.clone();
        Box::pin(async move { Ok(InterruptibleConnection::open(&options).await?) })
    })
}

async fn acquire(
    pool: &Arc<Pool<InterruptibleConnection>>,
) -> Result<Pooled<InterruptibleConnection>, StoreError> {
    pool.acquire(|| None).await.map_err(|error| match error {
        AcquireError::TimedOut | AcquireError::OpenTimedOut => sqlx::Error::PoolTimedOut.into(),
        AcquireError::Closed => sqlx::Error::PoolClosed.into(),
        AcquireError::Open(error) => error,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn writer_with_weaker_durability_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&format!("{}/test.db", folder.path().display()))
            .await
            .unwrap();
        let mut session = store.writing_session().await.unwrap();
        SqliteStore::verify_durability(&mut session).await.unwrap();
        for weaker in ["pragma synchronous = normal", "pragma synchronous = off"] {
            execute!(session, weaker).unwrap();
            let noticed = SqliteStore::verify_durability(&mut session).await;
            assert!(noticed.is_err(), "{weaker}");
        }
    }

    #[tokio::test]
    async fn no_connection_needs_folder_for_temporary_files() {
        let folder = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&format!("{}/test.db", folder.path().display()))
            .await
            .unwrap();
        for mut session in [
            store.session().await.unwrap(),
            store.transaction().await.unwrap(),
        ] {
            let (kept_in,) = rows!(session, fetch_one, (i64,), "pragma temp_store").unwrap();
            assert_eq!(kept_in, 2, "2 is memory");
        }
    }
}
