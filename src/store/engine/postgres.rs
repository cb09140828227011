//! PostgreSQL: opened by URL, appended to by one statement a batch, and watched.
//!
//! When the server is away, nobody waits for it: the gate closes with the first failure, everything is refused at once, and a
//! task knocks until the server answers again.

use std::collections::HashSet;
use std::pin::pin;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{ConnectOptions, Connection as _, PgConnection, Postgres, Row};
use tokio::sync::watch;
use tokio::time::timeout;

use super::connection::{Connection, EngineConnection, PostgresConnection, rows_in_postgres};
use super::pool::Pool;
use crate::store::{Appended, NewEvent, StoreError, StoreErrorClass, StoreErrorKind};

/// Compiling a statement takes longer than any of ours runs. And who folds an invoice's history gathers some ten rows, for which the
/// server would make hash tables as large as this, since it expects millions: with the usual 4 MB, a fifth of a read went into that.
const SESSION: [(&str, &str); 2] = [("jit", "off"), ("work_mem", "128kB")];
const CONNECTIONS: u32 = 10;
/// How long to wait for a free connection, or for a new one.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long to wait for one until the server is asked whether it is there: the pool finds by itself that a connection is dead, tells
/// nobody, and tries to open another.
const ACQUIRE_DOUBT_AFTER: Duration = Duration::from_millis(500);
/// How long one statement may take.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a statement takes until the server is asked whether it is there: one that is paused refuses nothing.
const DOUBT_AFTER: Duration = Duration::from_secs(1);
/// How often a server that is away is asked again.
const KNOCK: Duration = Duration::from_millis(200);

#[derive(Clone, Debug)]
pub(in crate::store) struct PostgresStore {
    pool: Arc<Pool<Postgres>>,
    /// One connection that appends, and nothing else: it has its statement ready, and never waits for readers. (A pool, since
    /// that opens it again.)
    appending: Arc<Pool<Postgres>>,
    /// A pooler stands between us and the server, and may hand each transaction to another of its connections.
    is_pooled: bool,
    gate: CircuitBreaker,
}

/// Closed while the server is away.
#[derive(Clone, Debug)]
pub(in crate::store) struct CircuitBreaker(Arc<BreakerState>);

#[derive(Debug)]
struct BreakerState {
    options: PgConnectOptions,
    is_closed: watch::Sender<bool>,
    /// The server is being asked whether it is there.
    is_doubted: AtomicBool,
    /// How often it has answered a statement.
    answers: AtomicU64,
    /// Connections that are older may lead to a server that is gone.
    opened: Mutex<Instant>,
}

/// What makes one ask whether the server is there.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Doubt {
    /// Somebody waited in vain.
    NoAnswer,
    /// It takes nothing: somebody made it read-only, or it is no longer the primary.
    ReadOnly,
}

/// What a new connection leads to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Found {
    Primary,
    /// As the primary, but for what it takes.
    ReadOnly,
    Standby,
}

/// A statement did not end in time, or the server went away meanwhile. It may have been done.
#[derive(Debug)]
pub(in crate::store) struct StatementAbandoned;

impl PostgresStore {
    /// # Errors
    /// [`StoreErrorKind::UnsafeCommit`] if the server acknowledges commits that are not on its disk.
    pub async fn open(url: &str) -> Result<PostgresStore, StoreError> {
        let options = PgConnectOptions::from_str(url)
            .map_err(|e| StoreError::new(StoreErrorKind::Rejected, e.to_string()))?;
        for name in unknown_parameters(url) {
            tracing::warn!(
                name,
                "this parameter of DATABASE_URL is not known: it does nothing"
            );
        }
        // A parameter that poolers do not know; nothing here is a float.
        let options = options
            .extra_float_digits(None)
            .application_name("stripe-reconciler")
            .disable_statement_logging();
        let looked_at = timeout(STATEMENT_TIMEOUT, look_at(url, &options)).await;
        let is_pooled = looked_at.map_err(|_| StoreError::unresponsive())??;
        // Poolers do not know these parameters.
        let options = if is_pooled {
            options
        } else {
            options.options(SESSION)
        };
        let state = BreakerState {
            options: options.clone(),
            is_closed: watch::Sender::new(false),
            is_doubted: AtomicBool::new(false),
            answers: AtomicU64::new(0),
            opened: Mutex::new(Instant::now()),
        };
        let gate = CircuitBreaker(Arc::new(state));
        let pool = |connections| {
            let watched = gate.clone();
            let pool = PgPoolOptions::new()
                .max_connections(connections)
                .acquire_timeout(ACQUIRE_TIMEOUT)
                .test_before_acquire(false)
                .before_acquire(move |_, about| {
                    let is_current = about.age <= watched.opened().elapsed();
                    Box::pin(async move { Ok(is_current) })
                });
            Pool::new(pool.connect_lazy_with(options.clone()))
        };
        Ok(PostgresStore {
            pool: pool(CONNECTIONS),
            appending: pool(1),
            is_pooled,
            gate,
        })
    }

    /// A connection for statements that each stand alone.
    pub async fn session(&self) -> Result<Connection, StoreError> {
        self.session_of(&self.pool).await
    }

    async fn session_of(&self, pool: &Arc<Pool<Postgres>>) -> Result<Connection, StoreError> {
        let mut session = self.acquire(pool).await?;
        if self.is_pooled {
            // sqlx prepares and executes in two steps, and a pooler keeps both on one connection only within a transaction.
            session.begin(BEGIN).await?;
        }
        Ok(session)
    }

    /// A transaction whose statements each stand alone.
    pub async fn transaction(&self) -> Result<Connection, StoreError> {
        let mut session = self.acquire(&self.pool).await?;
        session.begin(BEGIN).await?;
        Ok(session)
    }

    /// A transaction that is as if it ran alone, or fails.
    pub async fn serializable(&self) -> Result<Connection, StoreError> {
        let mut session = self.acquire(&self.pool).await?;
        session.begin(BEGIN_SERIALIZABLE).await?;
        Ok(session)
    }

    async fn acquire(&self, pool: &Arc<Pool<Postgres>>) -> Result<Connection, StoreError> {
        self.gate.pass()?;
        let not_before = || Some(*self.gate.opened());
        let acquired = self.gate.judge(
            self.gate
                .doubted(ACQUIRE_DOUBT_AFTER, pool.acquire(not_before))
                .await,
        )?;
        let (named, gate) = (!self.is_pooled, self.gate.clone());
        Ok(Connection::new(EngineConnection::Postgres(
            PostgresConnection {
                inner: acquired,
                named,
                gate,
                is_unsure: false,
            },
        )))
    }

    /// A connection of its own, for migrations: they may take long, and change what others have prepared.
    pub async fn connect_dedicated(&self) -> Result<PgConnection, StoreError> {
        Ok(self.gate.0.options.connect().await?)
    }

    /// Within a transaction, which a pooler keeps on one connection to the server: forgets the names that another client of the
    /// pooler has given to statements there.
    pub async fn deallocate_statements(
        &self,
        connection: &mut PgConnection,
    ) -> Result<(), StoreError> {
        if self.is_pooled {
            sqlx::raw_sql("deallocate all").execute(connection).await?;
        }
        Ok(())
    }

    /// The whole batch in one statement: one round trip, one commit.
    pub async fn append(&self, batch: &[NewEvent]) -> Result<Vec<Appended>, StoreError> {
        let firsts = crate::store::events::firsts(batch);
        let column = |pick: fn(&NewEvent) -> Option<&str>| -> Vec<Option<String>> {
            firsts
                .iter()
                .map(|event| pick(event).map(str::to_owned))
                .collect()
        };
        let mentions = || {
            firsts
                .iter()
                .flat_map(|event| event.mentions.iter().map(move |mention| (event, mention)))
        };
        let mut session = self.session_of(&self.appending).await?;
        let EngineConnection::Postgres(connection) = &mut session.connection else {
            unreachable!("the sessions of this store are PostgreSQL's")
        };
        let new = rows_in_postgres!(
            connection,
            fetch_all,
            (Vec<u8>,),
            APPEND,
            firsts.iter().map(|e| e.key.0.to_vec()).collect::<Vec<_>>(),
            column(|e| e.id.as_deref()),
            column(|e| e.event_type.as_deref()),
            column(|e| e.api_version.as_deref()),
            column(|e| e.object_id.as_deref()),
            firsts.iter().map(|e| e.created_s).collect::<Vec<_>>(),
            firsts.iter().map(|e| e.received_ms).collect::<Vec<_>>(),
            column(|e| Some(e.source.as_str())),
            column(|e| e.secret_label.as_deref()),
            column(|e| Some(e.outcome.as_str())),
            column(|e| e.unreadable_reason.as_deref()),
            column(|e| e.telling.as_deref()),
            firsts.iter().map(|e| e.linked()).collect::<Vec<_>>(),
            firsts.iter().map(|e| e.body.as_bytes()).collect::<Vec<_>>(),
            mentions()
                .map(|(_, m)| m.object_id.as_str())
                .collect::<Vec<_>>(),
            mentions()
                .map(|(e, _)| e.key.0.to_vec())
                .collect::<Vec<_>>()
        )?;
        session.done().await?;
        let mut new: HashSet<Vec<u8>> = new.into_iter().map(|(key,)| key).collect();
        Ok(crate::store::events::answers(batch, |key| {
            new.remove(&key.0[..])
        }))
    }

    pub async fn close(&self) {
        self.appending.close().await;
        self.pool.close().await;
    }
}

/// What sqlx reads of a URL, in one of its spellings or another.
const PARAMETERS: [&str; 18] = [
    "application_name",
    "dbname",
    "host",
    "hostaddr",
    "options",
    "password",
    "port",
    "ssl-ca",
    "ssl-cert",
    "ssl-key",
    "ssl-mode",
    "ssl-root-cert",
    "sslcert",
    "sslkey",
    "sslmode",
    "sslrootcert",
    "statement-cache-capacity",
    "user",
];

/// Names only: sqlx itself would say their values as well, and one may be a password whose name is misspelt.
fn unknown_parameters(url: &str) -> impl Iterator<Item = &str> {
    let names = url
        .split_once('?')
        .map_or("", |(_, query)| query)
        .split('&')
        .map(|part| part.split('=').next().unwrap_or_default());
    names.filter(|name| {
        !name.is_empty() && !PARAMETERS.contains(name) && !name.starts_with("options[")
    })
}

/// What a connection is told when it is made, a pooler is told with every transaction.
const BEGIN: &str = "begin; set local jit = off";
const BEGIN_SERIALIZABLE: &str = "begin isolation level serializable; set local jit = off";

/// Events come sorted, mentions are sorted here, so that batches of several replicas take their locks in one order.
const APPEND: &str = "
    with incoming as (
        select * from unnest($1::bytea[], $2::text[], $3::text[], $4::text[], $5::text[], $6::bigint[], $7::bigint[], $8::text[],
                             $9::text[], $10::text[], $11::text[], $12::text[], $13::text[], $14::bytea[])
            as row (key, id, event_type, api_version, object_id, created_s, received_ms, source, secret_label, outcome,
                    unreadable_reason, telling, linked, body)
    ), new as (
        insert into events (key, id, event_type, api_version, object_id, created_s, received_ms, source, secret_label, outcome,
                            unreadable_reason, telling, linked, body)
        select * from incoming
        on conflict do nothing returning key
    ), linked as (
        insert into mentions (object_id, event_key)
        select mention.* from unnest($15::text[], $16::bytea[]) as mention (object_id, event_key)
        join new on new.key = mention.event_key
        order by mention.object_id, mention.event_key
        on conflict do nothing
    )
    select key from new";

/// Is there a pooler in between? `statement-cache-capacity=0` in the URL says so; and so does a server that listens on
/// another port than the one that we came to.
async fn look_at(url: &str, options: &PgConnectOptions) -> Result<bool, StoreError> {
    let mut connection = options.connect().await?;
    let about = "select inet_server_port(), current_setting('synchronous_commit')";
    let row = sqlx::Executor::fetch_one(&mut connection, sqlx::raw_sql(about)).await?;
    let (port, commits): (Option<i32>, String) = (row.try_get(0)?, row.try_get(1)?);
    connection.close().await?;
    if commits == "off" {
        return Err(StoreError::new(
            StoreErrorKind::UnsafeCommit,
            "its synchronous_commit is off: \
             set it on (alter database ... set synchronous_commit = on)",
        ));
    }
    let by_socket = options.get_socket().is_some() || options.get_host().starts_with('/');
    let elsewhere = !by_socket && port.is_none_or(|port| port != i32::from(options.get_port()));
    Ok(elsewhere || url.contains("statement-cache-capacity=0"))
}

impl CircuitBreaker {
    fn pass(&self) -> Result<(), StoreError> {
        if *self.0.is_closed.borrow() {
            return Err(StoreError::new(
                StoreErrorKind::Unreachable,
                "the server is away",
            ));
        }
        Ok(())
    }

    /// Gives a statement up when it takes too long, or when it turns out meanwhile that the server is away.
    pub async fn limited<T>(
        &self,
        statement: impl Future<Output = T>,
    ) -> Result<T, StatementAbandoned> {
        self.doubted(DOUBT_AFTER, statement).await
    }

    /// The same; after so long, the server is asked whether it is there.
    async fn doubted<T>(
        &self,
        after: Duration,
        waiting: impl Future<Output = T>,
    ) -> Result<T, StatementAbandoned> {
        let mut waiting = pin!(waiting);
        if let Ok(ended) = timeout(after, &mut waiting).await {
            return Ok(ended);
        }
        self.doubt(Doubt::NoAnswer);
        let mut is_closed = self.0.is_closed.subscribe();
        tokio::select! {
            ended = timeout(STATEMENT_TIMEOUT - after, waiting) => ended.map_err(|_| StatementAbandoned),
            _ = is_closed.wait_for(|is_closed| *is_closed) => Err(StatementAbandoned),
        }
    }

    /// Takes a result, and closes when it says that the server is away. Where it does not say so, but somebody waited in vain,
    /// others may be in the way: then the server is asked first.
    pub fn judge<T>(
        &self,
        ended: Result<Result<T, sqlx::Error>, StatementAbandoned>,
    ) -> Result<T, StoreError> {
        let in_vain = match ended {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(sqlx::Error::PoolTimedOut)) => "no connection is free",
            Ok(Err(error)) => {
                let error = StoreError::from(error);
                if matches!(
                    error.kind(),
                    StoreErrorKind::ReadOnly | StoreErrorKind::Standby
                ) {
                    self.doubt(Doubt::ReadOnly);
                }
                if error.class() == StoreErrorClass::Away {
                    self.close(error.reason());
                }
                return Err(error);
            }
            Err(StatementAbandoned) => "a statement did not end in time",
        };
        self.doubt(Doubt::NoAnswer);
        Err(StoreError::new(StoreErrorKind::Locked, in_vain))
    }

    /// The server has answered a statement.
    pub fn heard(&self) {
        self.0.answers.fetch_add(1, Ordering::Relaxed);
    }

    /// Asks the server whether it is there, and closes when it is not. Where a machine has too much to do, it may be too slow to
    /// say so, and yet answer others meanwhile.
    fn doubt(&self, why: Doubt) {
        if *self.0.is_closed.borrow() || self.0.is_doubted.swap(true, Ordering::AcqRel) {
            return;
        }
        let gate = self.clone();
        tokio::spawn(async move {
            let answers = || gate.0.answers.load(Ordering::Relaxed);
            let before = answers();
            match gate.ask().await {
                Ok(Found::Standby) => gate.close("it is a standby"),
                // What was opened before leads to what was the primary.
                Ok(Found::Primary) if why == Doubt::ReadOnly => *gate.opened() = Instant::now(),
                Err(error) if error.class() == StoreErrorClass::Away && answers() == before => {
                    gate.close("the server does not answer")
                }
                _ => {}
            }
            gate.0.is_doubted.store(false, Ordering::Release);
        });
    }

    fn close(&self, reason: &str) {
        if !self.0.is_closed.send_replace(true) {
            tracing::warn!(
                reason,
                "the database is away: everything is refused until it is back"
            );
            tokio::spawn(self.clone().knock());
        }
    }

    fn opened(&self) -> MutexGuard<'_, Instant> {
        self.0.opened.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn knock(self) {
        while !matches!(self.ask().await, Ok(Found::Primary | Found::ReadOnly)) {
            tokio::time::sleep(KNOCK).await;
        }
        *self.opened() = Instant::now();
        self.0.is_closed.send_replace(false);
        tracing::warn!("the database is back");
    }

    async fn ask(&self) -> Result<Found, StoreError> {
        const ABOUT: &str =
            "select pg_is_in_recovery(), current_setting('transaction_read_only') = 'on'";
        let asked = async {
            let mut connection = self.0.options.connect().await?;
            let row = sqlx::Executor::fetch_one(&mut connection, sqlx::raw_sql(ABOUT)).await?;
            connection.close().await?;
            Ok::<(bool, bool), sqlx::Error>((row.try_get(0)?, row.try_get(1)?))
        };
        let asked = timeout(ACQUIRE_TIMEOUT, asked)
            .await
            .map_err(|_| StoreError::new(StoreErrorKind::Unreachable, "it does not answer"))?;
        Ok(match asked? {
            (true, _) => Found::Standby,
            (false, true) => Found::ReadOnly,
            (false, false) => Found::Primary,
        })
    }
}
