//! The task that moves SQLite's write-ahead log into the database file, and saves it if it is lost.
//!
//! It works beside the writer and not in the commit of a delivery. Between checkpoints it checks
//! whether the files are still the ones that were opened. Its connection is opened together with
//! the store and is never replaced, so it can read a log whose path leads elsewhere by now.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, Connection, SqliteConnection};
use tokio::sync::{mpsc, oneshot};
use tokio::time::MissedTickBehavior;

use super::file_identity::OpenFiles;
use crate::store::{StoreError, StoreErrorKind};

/// Moves the frames that no reader needs any more, and makes nobody wait.
pub(super) const CHECKPOINT: &str = "pragma wal_checkpoint(passive)";
/// Moves all frames and begins the log anew, so that no commit is appended behind a hole.
const RESTART_LOG: &str = "pragma wal_checkpoint(truncate)";
/// Delay between two checks of the files. What is acknowledged while the log is lost is in danger
/// for this long: a crash before the log is saved would lose it.
const CHECK_INTERVAL: Duration = Duration::from_millis(250);
/// What a saved database file must say as the open connection does.
const FINGERPRINT: &str = "
    select page_count, (select max(version) from _sqlx_migrations),
           (select hex(key) from events order by received_ms desc, key desc limit 1)
    from pragma_page_count()";

type Fingerprint = (i64, Option<i64>, Option<String>);
/// Whether a lock was in the way, the frames in the log, and how many of them were moved.
type CheckpointRow = (i64, i64, i64);

pub(super) enum Request {
    Checkpoint,
    /// Closes the connection. As the last one, it moves what is left into the database file.
    Close(oneshot::Sender<()>),
}

pub(super) struct Checkpointer {
    pub(super) connection: SqliteConnection,
    /// The task ends when all senders are gone, or when it is asked to close.
    pub(super) requests: mpsc::Receiver<Request>,
    /// Set after a checkpoint. What arrived meanwhile is left to the writer.
    pub(super) is_almost_done: Arc<AtomicBool>,
    pub(super) file: PathBuf,
    pub(super) files: Arc<OpenFiles>,
}

impl Checkpointer {
    pub(super) async fn run(mut self) {
        let mut checks = tokio::time::interval(CHECK_INTERVAL);
        checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut state = LogState::InPlace;

        let closed = loop {
            tokio::select! {
                request = self.requests.recv() => match request {
                    Some(Request::Checkpoint) => self.checkpoint().await,
                    Some(Request::Close(closed)) => break Some(closed),
                    None => break None,
                },
                _ = checks.tick() => state = self.check_files(state).await,
            }
        };

        if let Err(error) = self.connection.close().await {
            tracing::debug!(%error, "checkpoint connection did not close cleanly");
        }
        // The caller may have stopped waiting.
        let _ = closed.map(|closed| closed.send(()));
    }

    async fn checkpoint(&mut self) {
        // With another index, SQLite would move frames by the wrong map.
        if self.files.verify().is_err() {
            return;
        }
        match sqlx::query(CHECKPOINT).execute(&mut self.connection).await {
            Ok(_) => self.is_almost_done.store(true, Ordering::Relaxed),
            Err(error) => tracing::warn!(%error, "checkpoint failed; the write-ahead log grows"),
        }
    }

    async fn check_files(&mut self, state: LogState) -> LogState {
        if self.files.is_log_shorter() {
            // The log's own error is logged by the next check and by each refused statement.
            let _ = restart_shorter_log(&mut self.connection, &self.files).await;
        }
        let Err(change) = self.files.verify() else {
            return LogState::InPlace;
        };
        if state == LogState::InPlace {
            tracing::error!(error = %change, "database file changed under a running process, refusing all requests");
        }
        if state == LogState::Saved || !self.files.is_log_lost() {
            return state.max(LogState::Changed);
        }

        match save(&mut self.connection, &self.file).await {
            Ok(frames) => {
                tracing::error!(
                    frames,
                    "saved the lost write-ahead log into the database file; restart this process"
                );
                self.set_aside_foreign_log();
                LogState::Saved
            }
            Err(error) => {
                if state != LogState::SaveFailed {
                    tracing::error!(%error, "failed to save the lost write-ahead log, retrying");
                }
                LogState::SaveFailed
            }
        }
    }

    fn set_aside_foreign_log(&self) {
        match self.files.set_aside_foreign_log() {
            Ok(None) => {}
            Ok(Some(path)) => {
                tracing::warn!(path = %path.display(), "set aside a foreign write-ahead log");
            }
            Err(error) => {
                tracing::error!(%error, "failed to set aside a foreign write-ahead log; move it away before the next start");
            }
        }
    }
}

/// What has happened to the log so far, and was logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum LogState {
    InPlace,
    /// A file changed, and nothing in the log needs to be saved.
    Changed,
    SaveFailed,
    Saved,
}

/// Decides what a log that became shorter means, before anything is written to it.
///
/// # Errors
/// Frames are missing, or a reader is in the way.
pub(super) async fn restart_shorter_log(
    connection: &mut SqliteConnection,
    files: &OpenFiles,
) -> Result<(), StoreError> {
    let restarted = sqlx::query_as::<_, CheckpointRow>(RESTART_LOG)
        .fetch_one(connection)
        .await;
    match restarted {
        Ok((0, ..)) => {
            files.record_log_restart();
            Ok(())
        }
        Ok(_) => Err(StoreError::new(
            StoreErrorKind::Locked,
            "the write-ahead log became shorter, and a reader is in the way of a checkpoint",
        )),
        Err(_) => {
            files.record_log_truncated();
            Ok(files.verify()?)
        }
    }
}

/// Moves everything that the open log holds into the database file, opens that file by its path
/// and compares. Returns the number of frames.
async fn save(connection: &mut SqliteConnection, file: &Path) -> Result<i64, StoreError> {
    let (busy, frames, moved): CheckpointRow = sqlx::query_as(CHECKPOINT)
        .fetch_one(&mut *connection)
        .await?;
    if busy != 0 || moved != frames {
        return Err(StoreError::new(
            StoreErrorKind::Locked,
            format!("{moved} of {frames} frames moved: a reader is in the way"),
        ));
    }

    // Immutable: read without a log, as the next start will find the file.
    let mut reopened = SqliteConnectOptions::new()
        .filename(file)
        .read_only(true)
        .immutable(true)
        .connect()
        .await?;
    let expected: Fingerprint = sqlx::query_as(FINGERPRINT).fetch_one(connection).await?;
    let found: Fingerprint = sqlx::query_as(FINGERPRINT).fetch_one(&mut reopened).await?;
    reopened.close().await?;
    if found != expected {
        return Err(StoreError::new(
            StoreErrorKind::Io,
            format!("the database file holds {found:?}, the open connection {expected:?}"),
        ));
    }
    Ok(frames)
}
