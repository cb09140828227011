//! A connection of either engine and statements on it, with the same text and tuples for both.

use sqlx::{Executor, SqliteConnection};

use super::interruptible::InterruptibleConnection;
use super::pool::Pooled;
use super::postgres_connection::PostgresConnection;
use crate::store::StoreError;

/// One connection, for some statements or for a transaction.
///
/// A drop within a transaction, or before a statement has ended, closes the connection, so the
/// database rolls back.
pub(in crate::store) struct Connection {
    pub(in crate::store) connection: EngineConnection,
    in_transaction: bool,
    is_done: bool,
}

pub(in crate::store) enum EngineConnection {
    Sqlite(SqliteSession),
    Postgres(PostgresConnection),
}

/// A pooled connection to SQLite that tracks whether its last statement ended.
pub(in crate::store) struct SqliteSession {
    pooled: Pooled<InterruptibleConnection>,
    /// A statement runs on the connection's thread, even if its caller no longer waits for it.
    is_running: bool,
}

/// Reads rows on a [`Connection`] as tuples: `rows!(session, fetch_all, Row, SQL, bind, bind)`.
///
/// Binds are evaluated again if the statement runs again, so they must not move anything.
macro_rules! rows {
    ($session:expr, $method:ident, $row:ty, $sql:expr $(, $bind:expr)* $(,)?) => {
        match &mut $session.connection {
            $crate::store::engine::connection::EngineConnection::Sqlite(connection) => {
                let statement = sqlx::query_as::<_, $row>($sql)$(.bind($bind))*;
                let ended = statement.$method(connection.start()).await;
                connection.end(ended)
            }
            $crate::store::engine::connection::EngineConnection::Postgres(connection) => {
                $crate::store::engine::connection::rows_in_postgres!(
                    connection, $method, $row, $sql $(, $bind)*
                )
            }
        }
    };
}

/// Reads rows as [`rows`] does, for a statement that only PostgreSQL has.
macro_rules! rows_in_postgres {
    ($connection:expr, $method:ident, $row:ty, $sql:expr $(, $bind:expr)* $(,)?) => {
        loop {
            let (inner, is_named, watch) = $connection.start();
            let statement = sqlx::query_as::<_, $row>($sql).persistent(is_named)$(.bind($bind))*;
            let ended = watch.run(statement.$method(inner)).await;
            match $connection.end(ended) {
                Ok(rows) => break Ok(rows),
                Err(failure) => match $connection.recover(failure).await {
                    Ok(()) => {}
                    Err(error) => break Err(error),
                },
            }
        }
    };
}

/// Changes rows on a [`Connection`] and returns how many: `execute!(session, SQL, bind, bind)`.
///
/// Outside a transaction the statement must be idempotent: it may run twice.
macro_rules! execute {
    ($session:expr, $sql:expr $(, $bind:expr)* $(,)?) => {
        match &mut $session.connection {
            $crate::store::engine::connection::EngineConnection::Sqlite(connection) => {
                let statement = sqlx::query($sql)$(.bind($bind))*;
                let ended = statement.execute(connection.start()).await;
                connection.end(ended).map(|done| done.rows_affected())
            }
            $crate::store::engine::connection::EngineConnection::Postgres(connection) => loop {
                let (inner, is_named, watch) = connection.start();
                let statement = sqlx::query($sql).persistent(is_named)$(.bind($bind))*;
                let ended = watch.run(statement.execute(inner)).await;
                match connection.end(ended) {
                    Ok(done) => break Ok(done.rows_affected()),
                    Err(failure) => match connection.recover(failure).await {
                        Ok(()) => {}
                        Err(error) => break Err(error),
                    },
                }
            },
        }
    };
}
pub(in crate::store) use {execute, rows, rows_in_postgres};

impl SqliteSession {
    pub(in crate::store) fn new(pooled: Pooled<InterruptibleConnection>) -> SqliteSession {
        SqliteSession {
            pooled,
            is_running: false,
        }
    }

    /// Returns the connection for one statement. [`SqliteSession::end`] must follow.
    pub(in crate::store) fn start(&mut self) -> &mut SqliteConnection {
        self.is_running = true;
        &mut self.pooled
    }

    pub(in crate::store) fn end<T>(
        &mut self,
        ended: Result<T, sqlx::Error>,
    ) -> Result<T, StoreError> {
        self.is_running = false;
        Ok(ended?)
    }

    async fn execute(&mut self, sql: &'static str) -> Result<(), StoreError> {
        let ended = self.start().execute(sqlx::raw_sql(sql)).await;
        self.end(ended).map(drop)
    }

    fn set_reusable(&mut self) {
        if !self.is_running {
            self.pooled.set_reusable();
        }
    }
}

impl Connection {
    pub(in crate::store) fn new(connection: EngineConnection) -> Connection {
        Connection {
            connection,
            in_transaction: false,
            is_done: false,
        }
    }

    /// Begins a transaction with a statement such as `begin`.
    pub(in crate::store) async fn begin(&mut self, sql: &'static str) -> Result<(), StoreError> {
        self.set_in_transaction(true);
        match &mut self.connection {
            EngineConnection::Sqlite(connection) => connection.execute(sql).await,
            EngineConnection::Postgres(connection) => connection.begin(sql).await,
        }
    }

    pub(in crate::store) async fn commit(mut self) -> Result<(), StoreError> {
        match &mut self.connection {
            EngineConnection::Sqlite(connection) => connection.execute("commit").await?,
            EngineConnection::Postgres(connection) => connection.execute_once("commit").await?,
        }
        self.set_in_transaction(false);
        self.is_done = true;
        Ok(())
    }

    /// Records whether a transaction is open, for statements that begin or end one themselves.
    pub(in crate::store) fn set_in_transaction(&mut self, in_transaction: bool) {
        self.in_transaction = in_transaction;
    }

    /// Returns the connection to its pool, and commits if the connection needed a transaction.
    pub(in crate::store) async fn done(mut self) -> Result<(), StoreError> {
        if self.in_transaction {
            return self.commit().await;
        }
        self.is_done = true;
        Ok(())
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        match &mut self.connection {
            // A failed statement does not change the state of a SQLite connection.
            EngineConnection::Sqlite(connection) if self.is_done || !self.in_transaction => {
                connection.set_reusable();
            }
            EngineConnection::Postgres(connection) if self.is_done => connection.set_reusable(),
            EngineConnection::Sqlite(_) | EngineConnection::Postgres(_) => {}
        }
    }
}
