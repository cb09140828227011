//! One connection to a PostgreSQL server: opening it, and the server's report about its role and
//! settings.
//!
//! Every new connection queries whether the server is a primary and whether its commits are
//! durable. Both can change while this program runs.

use sqlx::postgres::{PgConnectOptions, PgRow};
use sqlx::{ConnectOptions, Connection as _, Executor, PgConnection, Row};

use super::pool::Poolable;
use crate::store::StoreError;

/// Statement that reads [`ServerReport`] and pins `synchronous_commit` for the session.
///
/// A session that sets the parameter itself no longer follows `alter system`, `alter role` and
/// `alter database`. The statement keeps the value (it may be `remote_apply`), unless it is `off`.
///
/// `client_connection_check_interval` ends a statement within a second after its client closed the
/// connection, which this program does when the caller stops waiting for the statement. Servers
/// before version 14 and on Windows lack it; there `statement_timeout` ends the statement.
const INSPECT_AND_PIN: &str = "
    select set_config('synchronous_commit', case current_setting('synchronous_commit')
                      when 'off' then 'on' else current_setting('synchronous_commit') end, false);
    select set_config(name, '1s', false) from pg_settings
    where name = 'client_connection_check_interval' and version() !~* 'msvc|visual c|mingw';
    select pg_is_in_recovery(), current_setting('transaction_read_only') = 'on', pg_backend_pid(),
           inet_server_port(), current_setting('fsync') = 'on',
           current_setting('full_page_writes') = 'on',
           (select reset_val from pg_settings where name = 'synchronous_commit') <> 'off'";

/// Statement that reads [`ServerReport`]. A pooler may hand the session to another client, so it
/// sets no parameter.
const INSPECT: &str = "
    select pg_is_in_recovery(), current_setting('transaction_read_only') = 'on', null::int,
           inet_server_port(), current_setting('fsync') = 'on',
           current_setting('full_page_writes') = 'on',
           current_setting('synchronous_commit') <> 'off'";

/// Statement that lists the server processes that may be executing a statement. The state is null
/// or `disabled` where the server does not show it.
const BUSY_BACKENDS: &str =
    "select pid from pg_stat_activity where state is null or state not like 'idle%'";

/// The address of a server and the options for connecting.
#[derive(Clone, Debug)]
pub(in crate::store) struct ServerTarget {
    pub options: PgConnectOptions,
    /// A pooler stands between this program and the server, and may execute each transaction on
    /// another of its connections.
    pub is_pooled: bool,
}

/// A connection and the server process that serves it.
pub(in crate::store) struct Backend {
    pub connection: PgConnection,
    /// Id of the server process. `None` behind a pooler, where the process changes with each
    /// transaction.
    pub process_id: Option<i32>,
}

/// A server's report about its role, port and settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::store) struct ServerReport {
    pub role: ServerRole,
    pub durability: Durability,
    pub process_id: Option<i32>,
    /// Port the server listens on. `None` on a Unix socket.
    pub port: Option<i32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::store) enum ServerRole {
    Primary,
    /// A primary that currently rejects writes.
    ReadOnly,
    Standby,
}

/// Settings of the server that decide whether acknowledged commits survive a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Durability {
    pub fsync: bool,
    pub full_page_writes: bool,
    /// `true` if a session commits synchronously by default. Sessions of this program always do.
    pub synchronous_commit: bool,
}

impl Durability {
    pub const SAFE: Durability = Durability {
        fsync: true,
        full_page_writes: true,
        synchronous_commit: true,
    };

    /// Returns the name of each setting and whether it is off.
    pub(crate) fn is_off(self) -> [(&'static str, bool); 3] {
        [
            ("fsync", !self.fsync),
            ("full_page_writes", !self.full_page_writes),
            ("synchronous_commit", !self.synchronous_commit),
        ]
    }

    /// Returns the setting that makes acknowledged commits unsafe although this program's sessions
    /// commit synchronously. `None` if commits are durable.
    pub(in crate::store) fn violation(self) -> Option<&'static str> {
        match self {
            Durability { fsync: false, .. } => Some(
                "fsync is off: set it on (alter system set fsync = on, select pg_reload_conf())",
            ),
            Durability {
                full_page_writes: false,
                ..
            } => Some(
                "full_page_writes is off: set it on (alter system set full_page_writes = on, \
                 select pg_reload_conf())",
            ),
            _ => None,
        }
    }
}

impl ServerTarget {
    /// Opens a connection without a time limit.
    pub async fn connect(&self) -> Result<(Backend, ServerReport), StoreError> {
        let mut connection = self.options.connect().await?;
        let report = self.inspect(&mut connection).await?;
        let backend = Backend {
            connection,
            process_id: report.process_id,
        };
        Ok((backend, report))
    }

    /// Queries the report of the server that a connection leads to.
    pub async fn inspect(&self, connection: &mut PgConnection) -> Result<ServerReport, StoreError> {
        let sql = if self.is_pooled {
            INSPECT
        } else {
            INSPECT_AND_PIN
        };
        let rows = connection.fetch_all(sqlx::raw_sql(sql)).await?;
        let row = rows.last().ok_or(sqlx::Error::RowNotFound)?;
        Ok(ServerReport::from_row(row)?)
    }
}

impl ServerReport {
    fn from_row(row: &PgRow) -> Result<ServerReport, sqlx::Error> {
        let role = match (row.try_get(0)?, row.try_get(1)?) {
            (true, _) => ServerRole::Standby,
            (false, true) => ServerRole::ReadOnly,
            (false, false) => ServerRole::Primary,
        };

        Ok(ServerReport {
            role,
            process_id: row.try_get(2)?,
            port: row.try_get(3)?,
            durability: Durability {
                fsync: row.try_get(4)?,
                full_page_writes: row.try_get(5)?,
                synchronous_commit: row.try_get(6)?,
            },
        })
    }
}

impl Backend {
    /// Lists the server processes that may be executing a statement.
    pub async fn busy_backends(&mut self) -> Result<Vec<i32>, StoreError> {
        let statement = sqlx::raw_sql(BUSY_BACKENDS);
        let rows = self.connection.fetch_all(statement).await?;
        let pids: Result<Vec<i32>, sqlx::Error> = rows.iter().map(|row| row.try_get(0)).collect();
        Ok(pids?)
    }
}

impl Poolable for Backend {
    async fn close(self) {
        // An unavailable server needs no orderly close.
        let _ = self.connection.close().await;
    }
}
