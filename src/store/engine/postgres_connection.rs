//! Pooled connections to PostgreSQL that tolerate failures of the network between us and the
//! server.
//!
//! A connection breaks without notice: the server's `idle_session_timeout`, a load balancer that
//! resets it, a firewall that expires its entry and drops every packet. Three rules hide that from
//! callers:
//!
//! * A connection is idle for one minute at most, and is pinged before use if it was idle for some
//!   seconds.
//! * A statement that loses its connection runs once more, on a new one, if nothing before it in
//!   its transaction took effect. Statements outside a transaction are idempotent: reads, and the
//!   keyed append.
//! * When a connection breaks, all other idle connections are dropped with it.
//!
//! sqlx does not expose its sockets, so TCP keepalive is set where a session can set it: on the
//! server's end (`tcp_keepalives_*`). Its packets keep a firewall's entry alive from either end,
//! and free a server's process whose client vanished.

use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::PgRow;
use sqlx::{Executor, PgConnection, Row};
use tokio::time::timeout;

use super::circuit_breaker::{CircuitBreaker, StatementAbandoned, StatementFailure, Suspicion};
use super::pool::{AcquireError, Limits, Pool, Pooled};
use super::postgres_server::{Backend, Durability};
use crate::store::StoreError;

const MAX_CONNECTIONS: u32 = 10;
/// Longest wait for a free connection. It exceeds the time that a busy machine needs to detect that
/// all connections turned silent at once, and to replace them.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(3);
/// Longest wait for a new connection. Opening one takes some milliseconds, or a second on an
/// overloaded machine.
const OPEN_TIMEOUT: Duration = Duration::from_secs(2);
/// Wait for a connection after which the server is probed.
const SUSPECT_ACQUIRE_AFTER: Duration = Duration::from_millis(500);
/// Longest idle time. Firewalls and load balancers expire connections after some minutes.
const MAX_IDLE: Duration = Duration::from_secs(60);
/// Longest lifetime, so that a changed address or setting reaches every connection.
const MAX_LIFETIME: Duration = Duration::from_secs(30 * 60);
/// Idle time after which a connection is pinged before it is used.
const PING_AFTER: Duration = Duration::from_secs(2);
/// Longest wait for the answer to the ping. A silent firewall delays one delivery by this much.
const PING_TIMEOUT: Duration = Duration::from_millis(500);

/// The connections of one store. Cheap to clone.
#[derive(Clone, Debug)]
pub(in crate::store) struct PostgresPools {
    shared: Arc<Pool<Backend>>,
    /// Pool of one connection that only appends, so its statement stays prepared and readers cannot
    /// occupy it.
    appending: Arc<Pool<Backend>>,
    breaker: CircuitBreaker,
}

/// The pool that a connection comes from.
#[derive(Clone, Copy, Debug)]
pub(in crate::store) enum Purpose {
    Any,
    Append,
}

pub(in crate::store) struct PostgresConnection {
    pooled: Pooled<Backend>,
    pools: PostgresPools,
    /// Statement that began the open transaction, if any.
    begun: Option<&'static str>,
    /// `true` if no statement took effect that a new connection would lack.
    is_movable: bool,
    moves_left: u8,
    /// `true` if a statement failed or did not end.
    is_unsure: bool,
}

/// Waits for one statement of a connection.
pub(in crate::store) struct StatementWatch<'c> {
    breaker: &'c CircuitBreaker,
    process_id: Option<i32>,
}

impl StatementWatch<'_> {
    pub(in crate::store) async fn run<T>(
        &self,
        statement: impl Future<Output = T>,
    ) -> Result<T, StatementAbandoned> {
        self.breaker.run(self.process_id, statement).await
    }
}

impl PostgresPools {
    pub(in crate::store) fn new(breaker: CircuitBreaker) -> PostgresPools {
        let pool = |max_connections| {
            let limits = Limits {
                max_connections,
                acquire_timeout: ACQUIRE_TIMEOUT,
                open_timeout: OPEN_TIMEOUT,
                max_lifetime: Some(MAX_LIFETIME),
                max_idle: Some(MAX_IDLE),
            };
            let breaker = breaker.clone();
            Pool::new(limits, move || {
                let breaker = breaker.clone();
                Box::pin(async move { breaker.connect().await })
            })
        };

        PostgresPools {
            shared: pool(MAX_CONNECTIONS),
            appending: pool(1),
            breaker,
        }
    }

    pub(in crate::store) fn breaker(&self) -> &CircuitBreaker {
        &self.breaker
    }

    /// Checks out a connection that is new or answered within the last seconds.
    pub(in crate::store) async fn acquire(
        &self,
        purpose: Purpose,
    ) -> Result<PostgresConnection, StoreError> {
        self.breaker.check()?;
        let pool = match purpose {
            Purpose::Any => &self.shared,
            Purpose::Append => &self.appending,
        };
        let mut connection = PostgresConnection {
            pooled: self
                .wait(pool.acquire(|| Some(self.breaker.current_since())))
                .await?,
            pools: self.clone(),
            begun: None,
            is_movable: true,
            moves_left: 2,
            is_unsure: false,
        };

        let idle_for = connection.pooled.idle_for();
        if idle_for.is_some_and(|idle| idle > PING_AFTER) && !connection.ping().await? {
            self.drop_idle();
            connection.reopen().await?;
        }
        Ok(connection)
    }

    pub(in crate::store) async fn close(&self) {
        self.appending.close().await;
        self.shared.close().await;
    }

    fn drop_idle(&self) {
        self.appending.drop_idle();
        self.shared.drop_idle();
    }

    async fn wait<T>(
        &self,
        acquiring: impl Future<Output = Result<T, AcquireError>>,
    ) -> Result<T, StoreError> {
        let waited = self
            .breaker
            .with_deadline(SUSPECT_ACQUIRE_AFTER, acquiring)
            .await;

        match waited {
            Ok(Ok(acquired)) => Ok(acquired),
            Ok(Err(AcquireError::Open(error))) => Err(error),
            Ok(Err(AcquireError::Closed)) => Err(sqlx::Error::PoolClosed.into()),
            Ok(Err(AcquireError::TimedOut)) => {
                self.breaker.suspect(Suspicion::NoAnswer);
                Err(sqlx::Error::PoolTimedOut.into())
            }
            Ok(Err(AcquireError::OpenTimedOut)) => {
                self.breaker.suspect(Suspicion::NoAnswer);
                Err(StoreError::unresponsive())
            }
            Err(abandoned) => Err(self.breaker.record_abandoned(abandoned).into()),
        }
    }
}

impl PostgresConnection {
    /// Returns the connection for one statement, whether the statement may be prepared under a
    /// name, and the watch to run it under. [`PostgresConnection::end`] must follow.
    pub(in crate::store) fn start(&mut self) -> (&mut PgConnection, bool, StatementWatch<'_>) {
        self.is_unsure = true;
        let watch = StatementWatch {
            breaker: &self.pools.breaker,
            process_id: self.pooled.process_id,
        };
        let is_named = !self.pools.breaker.target().is_pooled;
        (&mut self.pooled.connection, is_named, watch)
    }

    pub(in crate::store) fn end<T>(
        &mut self,
        ended: Result<Result<T, sqlx::Error>, StatementAbandoned>,
    ) -> Result<T, StatementFailure> {
        let recorded = self.pools.breaker.record(ended);
        self.is_unsure = recorded.is_err();
        if recorded.is_ok() {
            self.is_movable = self.begun.is_none();
        }
        recorded
    }

    /// Prepares for running the failed statement again, on a new connection.
    ///
    /// # Errors
    /// The failure itself, if running the statement again does not help or is not safe.
    pub(in crate::store) async fn recover(
        &mut self,
        failure: StatementFailure,
    ) -> Result<(), StoreError> {
        let error = match failure {
            StatementFailure::ConnectionLost(error) => error,
            StatementFailure::Other(error) => return Err(error),
        };
        self.pools.drop_idle();
        if !self.is_movable || self.moves_left == 0 {
            return Err(error);
        }

        self.moves_left -= 1;
        self.reopen().await?;
        if let Some(sql) = self.begun {
            self.begin_once(sql).await?;
            self.is_movable = true;
        }
        Ok(())
    }

    /// Begins a transaction that commits durably, with a statement such as `begin`.
    pub(in crate::store) async fn begin(&mut self, sql: &'static str) -> Result<(), StoreError> {
        while let Err(failure) = self.begin_once(sql).await {
            self.recover(failure).await?;
        }
        self.begun = Some(sql);
        self.is_movable = true;
        Ok(())
    }

    async fn begin_once(&mut self, sql: &'static str) -> Result<(), StatementFailure> {
        let (inner, _, watch) = self.start();
        let ended = watch.run(inner.fetch_all(sqlx::raw_sql(sql))).await;
        let rows = self.end(ended)?;

        let durability = rows.last().map(durability_of_row);
        let durability = durability.unwrap_or(Err(sqlx::Error::RowNotFound));
        let verified = durability
            .map_err(StoreError::from)
            .and_then(|durability| self.pools.breaker.verify_durability(durability));
        verified.map_err(|error| {
            self.is_unsure = true;
            StatementFailure::Other(error)
        })
    }

    /// Executes a statement without parameters that is not prepared and not repeated.
    pub(in crate::store) async fn execute_once(
        &mut self,
        sql: &'static str,
    ) -> Result<(), StoreError> {
        let (inner, _, watch) = self.start();
        let ended = watch.run(inner.execute(sqlx::raw_sql(sql))).await;
        self.end(ended).map(drop).map_err(StoreError::from)
    }

    /// Returns the connection to its pool, unless its last statement failed.
    pub(in crate::store) fn set_reusable(&mut self) {
        if !self.is_unsure {
            self.pooled.set_reusable();
        }
    }

    /// Returns whether the connection still leads to the server.
    ///
    /// # Errors
    /// The server must not be used: it is a standby, or no longer durable.
    async fn ping(&mut self) -> Result<bool, StoreError> {
        let breaker = &self.pools.breaker;
        let asking = breaker.target().inspect(&mut self.pooled.connection);
        match timeout(PING_TIMEOUT, asking).await {
            Ok(Ok(report)) => breaker.verify(&report).map(|()| true),
            Ok(Err(_)) | Err(_) => Ok(false),
        }
    }

    async fn reopen(&mut self) -> Result<(), StoreError> {
        self.pools.breaker.check()?;
        self.pools.wait(self.pooled.reopen()).await
    }
}

impl From<StatementFailure> for StoreError {
    fn from(failure: StatementFailure) -> StoreError {
        match failure {
            StatementFailure::ConnectionLost(error) | StatementFailure::Other(error) => error,
        }
    }
}

fn durability_of_row(row: &PgRow) -> Result<Durability, sqlx::Error> {
    Ok(Durability {
        fsync: row.try_get(0)?,
        full_page_writes: row.try_get(1)?,
        synchronous_commit: true,
    })
}
