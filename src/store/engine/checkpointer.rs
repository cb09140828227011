//! The task that moves SQLite's write-ahead log into the database file, and rescues the log if its
//! path is lost.
//!
//! The task runs in parallel to the writer, outside the commit of a delivery. Between checkpoints
//! it checks whether the files are still the ones that were opened. Its connection is opened
//! together with the store and is never replaced, so it can still read a log whose path now leads
//! to another file.

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

/// Statement that moves the frames that no reader needs any more. It blocks no other connection.
pub(super) const CHECKPOINT: &str = "pragma wal_checkpoint(passive)";
/// Statement that moves all frames and restarts the log, so that no commit is appended behind a
/// hole.
const RESTART_LOG: &str = "pragma wal_checkpoint(truncate)";
/// Delay between two checks of the files. A delivery acknowledged while the log is lost is at risk
/// for this long: a crash before the log is saved would lose the delivery.
const CHECK_INTERVAL: Duration = Duration::from_millis(250);
/// Query whose result must be the same on the open connection and in the saved database file.
const FINGERPRINT: &str = "
    select page_count, (select max(version) from _sqlx_migrations),
           (select hex(key) from events order by received_ms desc, key desc limit 1)
    from pragma_page_count()";

type Fingerprint = (i64, Option<i64>, Option<String>);
/// Result of a checkpoint: 1 if a lock blocked it, the frames in the log, and the frames moved.
type CheckpointRow = (i64, i64, i64);

pub(super) enum Request {
    Checkpoint,
    /// Closes the connection. The last connection to close moves the remaining frames into the
    /// database file.
    Close(oneshot::Sender<()>),
}

pub(super) struct Checkpointer {
    pub(super) connection: SqliteConnection,
    /// The task ends when all senders are dropped, or on [`Request::Close`].
    pub(super) requests: mpsc::Receiver<Request>,
    /// `true` after a checkpoint. The writer moves the frames that arrived meanwhile.
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
        // With a different index, SQLite would move frames to the wrong pages.
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
            // The next check and each refused statement log the error of the log itself.
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

/// The last state of the log that was written to the server log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum LogState {
    InPlace,
    /// A file changed, and no frame of the log needs to be saved.
    Changed,
    SaveFailed,
    Saved,
}

/// Decides whether a log that became shorter lost frames, before anything is written to it.
///
/// # Errors
/// Returns an error if frames are missing, or if a reader blocks the checkpoint.
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
            "the write-ahead log became shorter, and a reader blocks the checkpoint",
        )),
        Err(_) => {
            files.record_log_truncated();
            Ok(files.verify()?)
        }
    }
}

/// Moves all frames of the open log into the database file, opens that file by its path and
/// compares fingerprints. Returns the number of frames.
async fn save(connection: &mut SqliteConnection, file: &Path) -> Result<i64, StoreError> {
    let (busy, frames, moved): CheckpointRow = sqlx::query_as(CHECKPOINT)
        .fetch_one(&mut *connection)
        .await?;
    if busy != 0 || moved != frames {
        return Err(StoreError::new(
            StoreErrorKind::Locked,
            format!("{moved} of {frames} frames moved: a reader blocks the checkpoint"),
        ));
    }

    // `immutable` reads the file without a log, as the next start will.
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
