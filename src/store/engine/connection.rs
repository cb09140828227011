//! A connection of either engine, and statements on it: the same text and the same tuples for both.

use sqlx::{Executor, PgConnection, Postgres, Sqlite};

use super::pool::Pooled;
use super::postgres::{CircuitBreaker, StatementAbandoned};
use crate::store::StoreError;

/// One connection, for a few statements or for a transaction.
///
/// When it is dropped in the middle of a transaction, or after a statement that did not end, the connection is closed: what it
/// had begun is rolled back.
pub(in crate::store) struct Connection {
    pub(in crate::store) connection: EngineConnection,
    in_transaction: bool,
    /// It came to its end.
    is_done: bool,
}

pub(in crate::store) enum EngineConnection {
    Sqlite(Pooled<Sqlite>),
    Postgres(PostgresConnection),
}

pub(in crate::store) struct PostgresConnection {
    pub(in crate::store) inner: Pooled<Postgres>,
    /// Statements may be prepared under a name.
    pub(in crate::store) named: bool,
    pub(in crate::store) gate: CircuitBreaker,
    /// A statement did not end, or failed.
    pub(in crate::store) is_unsure: bool,
}

/// Reads rows on a [`Connection`], as tuples: `rows!(session, fetch_all, Row, SQL, bind, bind)`.
macro_rules! rows {
    ($session:expr, $method:ident, $row:ty, $sql:expr $(, $bind:expr)* $(,)?) => {
        match &mut $session.connection {
            $crate::store::engine::connection::EngineConnection::Sqlite(connection) => {
                let statement = sqlx::query_as::<_, $row>($sql)$(.bind($bind))*;
                statement.$method(&mut **connection).await.map_err($crate::store::StoreError::from)
            }
            $crate::store::engine::connection::EngineConnection::Postgres(connection) => {
                $crate::store::engine::connection::rows_in_postgres!(connection, $method, $row, $sql $(, $bind)*)
            }
        }
    };
}
/// As [`rows`], where a statement is only PostgreSQL's.
macro_rules! rows_in_postgres {
    ($connection:expr, $method:ident, $row:ty, $sql:expr $(, $bind:expr)* $(,)?) => {{
        let (inner, named, gate) = $connection.start();
        let statement = sqlx::query_as::<_, $row>($sql).persistent(named)$(.bind($bind))*;
        let ended = gate.limited(statement.$method(inner)).await;
        $connection.end(ended)
    }};
}
/// Changes rows on a [`Connection`], and says how many: `execute!(session, SQL, bind, bind)`.
macro_rules! execute {
    ($session:expr, $sql:expr $(, $bind:expr)* $(,)?) => {
        match &mut $session.connection {
            $crate::store::engine::connection::EngineConnection::Sqlite(connection) => {
                let executed = sqlx::query($sql)$(.bind($bind))*.execute(&mut **connection).await;
                executed.map(|done| done.rows_affected()).map_err($crate::store::StoreError::from)
            }
            $crate::store::engine::connection::EngineConnection::Postgres(connection) => {
                let (inner, named, gate) = connection.start();
                let statement = sqlx::query($sql).persistent(named)$(.bind($bind))*;
                let ended = gate.limited(statement.execute(inner)).await;
                connection.end(ended).map(|done| done.rows_affected())
            }
        }
    };
}
pub(in crate::store) use {execute, rows, rows_in_postgres};

impl PostgresConnection {
    /// The connection, for one statement; whether that may be prepared under a name; and who watches how long it takes.
    pub(in crate::store) fn start(&mut self) -> (&mut PgConnection, bool, &CircuitBreaker) {
        self.is_unsure = true;
        (&mut self.inner, self.named, &self.gate)
    }

    pub(in crate::store) fn end<T>(
        &mut self,
        ended: Result<Result<T, sqlx::Error>, StatementAbandoned>,
    ) -> Result<T, StoreError> {
        let judged = self.gate.judge(ended);
        self.is_unsure = judged.is_err();
        if judged.is_ok() {
            self.gate.heard();
        }
        judged
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

    pub(in crate::store) async fn begin(&mut self, sql: &'static str) -> Result<(), StoreError> {
        self.set_in_transaction(true);
        self.execute_plainly(sql).await
    }

    pub(in crate::store) async fn commit(mut self) -> Result<(), StoreError> {
        self.execute_plainly("commit").await?;
        self.set_in_transaction(false);
        self.is_done = true;
        Ok(())
    }

    /// For statements that begin or end a transaction themselves.
    pub(in crate::store) fn set_in_transaction(&mut self, in_transaction: bool) {
        self.in_transaction = in_transaction;
    }

    /// Ends a session that may have needed a transaction.
    pub(in crate::store) async fn done(mut self) -> Result<(), StoreError> {
        if self.in_transaction {
            return self.commit().await;
        }
        self.is_done = true;
        Ok(())
    }

    /// Without preparing it.
    async fn execute_plainly(&mut self, sql: &'static str) -> Result<(), StoreError> {
        match &mut self.connection {
            EngineConnection::Sqlite(connection) => {
                Ok((**connection).execute(sqlx::raw_sql(sql)).await.map(drop)?)
            }
            EngineConnection::Postgres(connection) => {
                let (inner, _, gate) = connection.start();
                let ended = gate.limited(inner.execute(sqlx::raw_sql(sql))).await;
                connection.end(ended).map(drop)
            }
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let (is_done, in_transaction) = (self.is_done, self.in_transaction);
        match &mut self.connection {
            EngineConnection::Sqlite(connection) if is_done => connection.set_ready(),
            EngineConnection::Sqlite(connection) if in_transaction => connection.close_on_drop(),
            EngineConnection::Sqlite(_) => {}
            EngineConnection::Postgres(connection) if is_done && !connection.is_unsure => {
                connection.inner.set_ready()
            }
            // It could be asked what it is doing; a server that is gone would keep its place meanwhile.
            EngineConnection::Postgres(connection) => connection.inner.close_on_drop(),
        }
    }
}
