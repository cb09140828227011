//! A SQLite connection that interrupts its statement when the caller stops waiting.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, SqliteConnection};

use super::pool::Poolable;

/// Instructions of SQLite's virtual machine between two checks, which take some milliseconds at
/// most.
const CHECK_EVERY: i32 = 10_000;

/// A SQLite connection that interrupts its statement when it is dropped.
///
/// sqlx runs each connection on a thread of its own. Dropping the connection alone lets the thread
/// finish its statement, so an abandoned reader would keep its snapshot and the WAL would grow.
pub(in crate::store) struct InterruptibleConnection {
    /// The connection. `None` only while it is being closed.
    connection: Option<SqliteConnection>,
    is_abandoned: Arc<AtomicBool>,
}

impl InterruptibleConnection {
    pub(in crate::store) async fn open(
        options: &SqliteConnectOptions,
    ) -> Result<InterruptibleConnection, sqlx::Error> {
        let mut connection = options.connect().await?;
        let is_abandoned = Arc::new(AtomicBool::new(false));
        let flag = is_abandoned.clone();
        connection
            .lock_handle()
            .await?
            .set_progress_handler(CHECK_EVERY, move || !flag.load(Ordering::Relaxed));

        Ok(InterruptibleConnection {
            connection: Some(connection),
            is_abandoned,
        })
    }
}

impl Drop for InterruptibleConnection {
    fn drop(&mut self) {
        self.is_abandoned.store(true, Ordering::Relaxed);
    }
}

impl Poolable for InterruptibleConnection {
    async fn close(mut self) {
        // The file is closed either way. Only the last connection can fail in a checkpoint, and the
        // WAL keeps the frames that were not copied.
        if let Some(connection) = self.connection.take() {
            let _ = sqlx::Connection::close(connection).await;
        }
    }
}

impl Deref for InterruptibleConnection {
    type Target = SqliteConnection;

    fn deref(&self) -> &SqliteConnection {
        let connection = self.connection.as_ref();
        connection.expect("only closing takes it")
    }
}

impl DerefMut for InterruptibleConnection {
    fn deref_mut(&mut self) -> &mut SqliteConnection {
        let connection = self.connection.as_mut();
        connection.expect("only closing takes it")
    }
}
