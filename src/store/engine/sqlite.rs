//! SQLite: opened by path, one connection that writes and several that read beside it; appended to by two statements a batch.

use std::collections::HashSet;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous,
};
use sqlx::{ConnectOptions, Sqlite};
use tokio::sync::mpsc;

use super::connection::{Connection, EngineConnection, execute, rows};
use super::pool::Pool;
use crate::domain::stripe::event::EventKey;
use crate::store::{Appended, Disk, NewEvent, Space, StoreError, StoreErrorKind};

/// How long a statement waits for another process that writes to the same file.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
const READERS: u32 = 4;
/// Each remembers so many KB of the file (as SQLite writes it, with a minus); the system remembers it for all of them.
const READERS_CACHE: &str = "-512";
const PAGE_SIZE: u32 = 8192;
/// Bytes written to the log (WAL) until it is carried into the database file. While it is short, it is written over and over in
/// the same place, which makes a commit twice as fast as where its file has to grow.
const CHECKPOINT_AFTER: usize = 8 << 20;
/// What a batch writes beside its own bytes: a page of each index, at least.
const PAGES_A_BATCH: usize = 6 * PAGE_SIZE as usize;
/// Pages after which the writer carries them over itself: only when the checkpointer cannot keep up.
const CHECKPOINT_AT_LAST: &str = "16384";
/// Carries over what no reader needs any more, and makes nobody wait.
const CHECKPOINT: &str = "pragma wal_checkpoint(passive)";

#[derive(Clone, Debug)]
pub(in crate::store) struct SqliteStore {
    file: PathBuf,
    /// The file that was opened, by device and number: what its name leads to may become another.
    opened: Option<(u64, u64)>,
    write: Arc<Pool<Sqlite>>,
    read: Arc<Pool<Sqlite>>,
    /// Bytes written since the last checkpoint, about.
    written: Arc<AtomicUsize>,
    checkpoint: mpsc::Sender<()>,
    /// The checkpointer has been through: what came meanwhile is left to the writer.
    checkpoint_almost_done: Arc<AtomicBool>,
}

impl SqliteStore {
    /// Opens the file, creating it when it is missing.
    pub async fn open(path: &str) -> Result<SqliteStore, StoreError> {
        let file = file(path)?;
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
            // A container may have no folder for temporary files, or none that can be written to: a large batch would fail.
            .pragma("temp_store", "memory")
            .disable_statement_logging();
        let pool = |connections| {
            let pool = SqlitePoolOptions::new()
                .max_connections(connections)
                .test_before_acquire(false);
            pool.idle_timeout(None)
                .max_lifetime(None)
                .acquire_timeout(BUSY_TIMEOUT)
        };
        // The writer first: it creates the file, which readers may not.
        let write = Pool::new(pool(1).connect_with(options.clone()).await?);
        let reading = options
            .clone()
            .create_if_missing(false)
            .read_only(true)
            .pragma("cache_size", READERS_CACHE);
        let read = Pool::new(pool(READERS).connect_with(reading).await?);
        let checkpointer = pool(1).connect_lazy_with(options);
        let (checkpoint, due) = mpsc::channel(1);
        let checkpoint_almost_done = Arc::new(AtomicBool::new(false));
        tokio::spawn(run_checkpointer(
            checkpointer,
            due,
            checkpoint_almost_done.clone(),
        ));
        let opened = identity(&file);
        Ok(SqliteStore {
            file,
            opened,
            write,
            read,
            written: Arc::default(),
            checkpoint,
            checkpoint_almost_done,
        })
    }

    pub async fn session(&self) -> Result<Connection, StoreError> {
        self.verify_same_file()?;
        Ok(Connection::new(EngineConnection::Sqlite(
            self.read.acquire(|| None).await?,
        )))
    }

    /// A write transaction takes the lock at once: one that reads first fails when another process writes in between.
    pub async fn transaction(&self) -> Result<Connection, StoreError> {
        self.verify_same_file()?;
        let mut session =
            Connection::new(EngineConnection::Sqlite(self.write.acquire(|| None).await?));
        session.begin("begin immediate").await?;
        Ok(session)
    }

    pub fn writer(&self) -> &Arc<Pool<Sqlite>> {
        &self.write
    }

    /// All in one call to the connection's thread, however many there are. Small columns go as JSON, what is large or binary as
    /// parts of one blob.
    pub async fn append(&self, batch: &[NewEvent]) -> Result<Vec<Appended>, StoreError> {
        self.verify_same_file()?;
        let mut blob = Vec::with_capacity(
            batch
                .iter()
                .map(|event| event.body.as_bytes().len() + 1024)
                .sum(),
        );
        let (mut events, mut mentions) = (Vec::with_capacity(batch.len()), Vec::new());
        for event in crate::store::events::firsts(batch) {
            let at = blob.len() + 1;
            let telling = event.telling.as_deref().unwrap_or_default();
            blob.extend_from_slice(&event.key.0);
            blob.extend_from_slice(telling.as_bytes());
            blob.extend_from_slice(event.body.as_bytes());
            events.push((
                (at, telling.len(), event.body.as_bytes().len()),
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
        let json =
            |rows: serde_json::Result<String>| rows.expect("strings and numbers always serialise");
        let (events, mentions) = (
            json(serde_json::to_string(&events)),
            json(serde_json::to_string(&mentions)),
        );
        let bytes = blob.len();
        let mut session =
            Connection::new(EngineConnection::Sqlite(self.write.acquire(|| None).await?));
        if self.checkpoint_almost_done.swap(false, Ordering::Relaxed) {
            // The little that is left. With nothing in it that is still needed, the log starts anew with what is written next.
            execute!(session, CHECKPOINT)?;
        }
        session.set_in_transaction(true);
        // All rows: with the first, the statements that follow would be left undone.
        let answered = rows!(
            session,
            fetch_all,
            (String,),
            APPEND,
            events,
            blob,
            mentions
        )?;
        session.set_in_transaction(false);
        session.done().await?;
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

    /// SQLite goes on writing to a file that was moved away or replaced, where nobody will find it again.
    fn verify_same_file(&self) -> Result<(), StoreError> {
        match identity(&self.file) {
            found if found == self.opened => Ok(()),
            None => Err(StoreError::new(
                StoreErrorKind::FileMissing,
                format!("{} is no longer there", self.file.display()),
            )),
            Some(_) => Err(StoreError::new(
                StoreErrorKind::FileReplaced,
                format!(
                    "{} is no longer the file that was opened",
                    self.file.display()
                ),
            )),
        }
    }

    fn note_written(&self, bytes: usize) {
        if self.written.fetch_add(bytes, Ordering::Relaxed) + bytes > CHECKPOINT_AFTER {
            self.written.store(0, Ordering::Relaxed);
            // One that is under way or waits already will do.
            let _ = self.checkpoint.try_send(());
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
            // None yet: nothing was written.
            log: Some(std::fs::metadata(log).map_or(0, |log| log.len())),
            disk: Some(Disk { free, size }),
        })
    }

    pub async fn close(&self) {
        self.read.close().await;
        self.write.close().await;
    }
}

/// It will hold what is nobody else's business; SQLite gives its log and its index of that the rights of the file.
fn create_private_file(file: &Path) {
    let created = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(file);
    // What cannot be made, or is there already, SQLite opens or says what is wrong with it.
    drop(created);
}

fn options_of(path: &str) -> Result<SqliteConnectOptions, sqlx::Error> {
    SqliteConnectOptions::from_str(&format!("sqlite://{path}"))
}

/// The file that a URL names after `sqlite://`.
pub(in crate::store) fn file(path: &str) -> Result<PathBuf, sqlx::Error> {
    Ok(options_of(path)?.get_filename().to_owned())
}

/// Where a file is, whatever its name.
fn identity(file: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(file)
        .ok()
        .map(|about| (about.dev(), about.ino()))
}

/// Answers which keys were there before, in hex. `$1`: events, `$2`: keys, tellings and bodies, `$3`: mentions.
/// They go first: what an event mentions that is there already adds nothing to it.
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

/// Carries what was appended into the database file, beside the writer and not in the commit of a delivery, as long as there is
/// a store.
async fn run_checkpointer(
    pool: SqlitePool,
    mut due: mpsc::Receiver<()>,
    checkpoint_almost_done: Arc<AtomicBool>,
) {
    while due.recv().await.is_some() {
        match sqlx::query(CHECKPOINT).execute(&pool).await {
            Ok(_) => checkpoint_almost_done.store(true, Ordering::Relaxed),
            Err(error) => tracing::warn!(%error, "the log of the database could not be shortened"),
        }
    }
    pool.close().await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn no_connection_needs_a_folder_for_temporary_files() {
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
