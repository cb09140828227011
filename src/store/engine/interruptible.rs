//! A SQLite connection whose statement ends when nobody waits for it any more.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, SqliteConnection};

use super::pool::Poolable;

/// Instructions of SQLite's virtual machine between two checks: some milliseconds at most.
const CHECK_EVERY: i32 = 10_000;

/// A SQLite connection that interrupts its statement when it is dropped.
///
/// sqlx runs each connection on a thread of its own. Dropping the connection alone lets the thread
/// finish its statement: a reader that nobody waits for keeps its snapshot, and with it the WAL
/// grows.
pub(in crate::store) struct InterruptibleConnection {
    /// `None` only while it is closed.
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
        let is_wanted = move || !flag.load(Ordering::Relaxed);
        connection
            .lock_handle()
            .await?
            .set_progress_handler(CHECK_EVERY, is_wanted);

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
        // The file is closed either way. Only the last connection could fail in a checkpoint, and
        // the WAL keeps what it could not copy.
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
