//! PostgreSQL: opening a database by URL, transactions, and appending a batch in one statement.

use std::collections::HashSet;
use std::str::FromStr;

use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, PgConnection};
use tokio::time::timeout;

use super::circuit_breaker::{CircuitBreaker, STATEMENT_TIMEOUT, unsafe_commit};
use super::connection::{Connection, EngineConnection, rows_in_postgres};
use super::postgres_connection::{PostgresPools, Purpose};
use super::postgres_server::{Durability, ServerReport, ServerTarget};
use crate::store::{Appended, NewEvent, StoreError, StoreErrorClass, StoreErrorKind};

/// Time after which the server itself ends a statement, a second after its client timed out or
/// disconnected.
const SERVER_TIMEOUT: &str = "6s";
/// Settings of each session. A pooler accepts none of them.
///
/// * `jit`: compiling a statement takes longer than any of our statements runs.
/// * `work_mem`: folding the history of an invoice reads some ten rows. The server expects millions
///   and would allocate hash tables for them; with the default of 4 MB that took a fifth of a read.
/// * `statement_timeout`: ends a statement whose client vanished without closing the connection.
/// * `tcp_keepalives_*`: the server's end sends a packet every 30 seconds without traffic, which
///   keeps the entry in a firewall alive, and ends a session after one minute without a client.
const SESSION: [(&str, &str); 6] = [
    ("jit", "off"),
    ("work_mem", "128kB"),
    ("statement_timeout", SERVER_TIMEOUT),
    ("tcp_keepalives_idle", "30"),
    ("tcp_keepalives_interval", "10"),
    ("tcp_keepalives_count", "3"),
];

/// Begins a transaction that commits durably. The last row is a [`Durability`].
///
/// Behind a pooler no session setting survives, so each transaction sets them.
macro_rules! begin {
    ($begin:literal) => {
        concat!(
            $begin,
            "; set local jit = off;
             set local statement_timeout = '6s';
             select set_config('synchronous_commit', 'on', true)
             where current_setting('synchronous_commit') = 'off';
             select current_setting('fsync') = 'on', current_setting('full_page_writes') = 'on'"
        )
    };
}
const BEGIN: &str = begin!("begin");
const BEGIN_SERIALIZABLE: &str = begin!("begin isolation level serializable");

#[derive(Clone, Debug)]
pub(in crate::store) struct PostgresStore {
    pools: PostgresPools,
}

impl PostgresStore {
    /// Opens a database. Creates nothing.
    ///
    /// # Errors
    /// [`StoreErrorKind::UnsafeCommit`] if the server acknowledges commits that may be lost.
    pub async fn open(url: &str) -> Result<PostgresStore, StoreError> {
        let options = PgConnectOptions::from_str(url)
            .map_err(|e| StoreError::new(StoreErrorKind::Rejected, e.to_string()))?;
        for name in unknown_parameters(url) {
            tracing::warn!(name, "ignoring unknown parameter of DATABASE_URL");
        }
        let options = options
            // Poolers reject this parameter, and no column is a float.
            .extra_float_digits(None)
            .application_name("stripe-reconciler")
            .disable_statement_logging();

        let inspected = timeout(STATEMENT_TIMEOUT, inspect(&options)).await;
        let report = inspected.map_err(|_| StoreError::unresponsive())??;
        check_durability(report.durability)?;

        let is_pooled = is_pooled(url, &options, &report);
        let target = ServerTarget {
            options: if is_pooled {
                options
            } else {
                options.options(SESSION)
            },
            is_pooled,
        };
        Ok(PostgresStore {
            pools: PostgresPools::new(CircuitBreaker::new(target)),
        })
    }

    /// Returns a connection for independent statements.
    pub async fn session(&self) -> Result<Connection, StoreError> {
        self.session_for(Purpose::Any).await
    }

    async fn session_for(&self, purpose: Purpose) -> Result<Connection, StoreError> {
        let mut session = self.acquire(purpose).await?;
        if self.is_pooled() {
            // sqlx prepares and executes in two steps. A pooler keeps both on one connection only
            // within a transaction.
            session.begin(BEGIN).await?;
        }
        Ok(session)
    }

    /// Returns a transaction of independent statements.
    pub async fn transaction(&self) -> Result<Connection, StoreError> {
        let mut session = self.acquire(Purpose::Any).await?;
        session.begin(BEGIN).await?;
        Ok(session)
    }

    /// Returns a transaction that behaves as if it ran alone, or fails.
    pub async fn serializable(&self) -> Result<Connection, StoreError> {
        let mut session = self.acquire(Purpose::Any).await?;
        session.begin(BEGIN_SERIALIZABLE).await?;
        Ok(session)
    }

    async fn acquire(&self, purpose: Purpose) -> Result<Connection, StoreError> {
        let connection = self.pools.acquire(purpose).await?;
        Ok(Connection::new(EngineConnection::Postgres(connection)))
    }

    /// Returns a connection outside the pool, for migrations, which may take long and invalidate
    /// the prepared statements of other connections.
    pub async fn connect_dedicated(&self) -> Result<PgConnection, StoreError> {
        let mut connection = self.pools.breaker().connect().await?.connection;
        if !self.is_pooled() {
            let unlimited = sqlx::raw_sql("set statement_timeout = 0");
            sqlx::Executor::execute(&mut connection, unlimited).await?;
        }
        Ok(connection)
    }

    /// Deallocates the statements that another client of the pooler has prepared on this
    /// connection. Call it within a transaction, which a pooler keeps on one connection.
    pub async fn deallocate_statements(
        &self,
        connection: &mut PgConnection,
    ) -> Result<(), StoreError> {
        if self.is_pooled() {
            sqlx::raw_sql("deallocate all").execute(connection).await?;
        }
        Ok(())
    }

    /// Appends a batch in one statement, which needs one round trip and one commit.
    pub async fn append(&self, batch: &[NewEvent]) -> Result<Vec<Appended>, StoreError> {
        let appended = self.append_once(batch).await;
        if self.is_pooled()
            && appended
                .as_ref()
                .err()
                .is_some_and(|error| error.class() == StoreErrorClass::Away)
        {
            // The connection broke in the commit that a pooler makes necessary. Appending again is
            // harmless.
            return self.append_once(batch).await;
        }
        appended
    }

    async fn append_once(&self, batch: &[NewEvent]) -> Result<Vec<Appended>, StoreError> {
        let firsts = crate::store::events::firsts(batch);
        let column = |pick: fn(&NewEvent) -> Option<&str>| -> Vec<Option<&str>> {
            firsts.iter().map(|event| pick(event)).collect()
        };
        let mentions = || {
            firsts
                .iter()
                .flat_map(|event| event.mentions.iter().map(move |mention| (event, mention)))
        };

        let mut session = self.session_for(Purpose::Append).await?;
        let EngineConnection::Postgres(connection) = &mut session.connection else {
            unreachable!("this store opens PostgreSQL connections")
        };
        let rows = rows_in_postgres!(
            connection,
            fetch_all,
            AppendRow,
            APPEND,
            firsts.iter().map(|e| &e.key.0[..]).collect::<Vec<_>>(),
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
            column(|e| e.observation.as_deref()),
            firsts.iter().map(|e| e.linked()).collect::<Vec<_>>(),
            firsts.iter().map(|e| e.body.as_bytes()).collect::<Vec<_>>(),
            mentions()
                .map(|(_, m)| m.object_id.as_str())
                .collect::<Vec<_>>(),
            mentions().map(|(e, _)| &e.key.0[..]).collect::<Vec<_>>()
        )?;
        session.done().await?;

        let mut new = self.new_keys(rows)?;
        Ok(crate::store::events::answers(batch, |key| {
            new.remove(&key.0[..])
        }))
    }

    /// Returns the keys of new events, or an error if their commit may be lost.
    fn new_keys(&self, rows: Vec<AppendRow>) -> Result<HashSet<Vec<u8>>, StoreError> {
        let mut keys = HashSet::with_capacity(rows.len());
        for row in rows {
            match row {
                (Some(key), ..) => {
                    keys.insert(key);
                }
                (None, fsync, full_page_writes, synchronous_commit) => {
                    let durability = Durability {
                        fsync: fsync.unwrap_or_default(),
                        full_page_writes: full_page_writes.unwrap_or_default(),
                        synchronous_commit: synchronous_commit.unwrap_or_default(),
                    };
                    self.pools.breaker().verify_durability(durability)?;
                    return Err(unsafe_commit(SYNCHRONOUS_COMMIT_OFF));
                }
            }
        }

        Ok(keys)
    }

    pub async fn close(&self) {
        self.pools.close().await;
    }

    /// Returns the settings that the server last reported.
    pub fn durability(&self) -> Durability {
        self.pools.breaker().durability()
    }

    fn is_pooled(&self) -> bool {
        self.pools.breaker().target().is_pooled
    }
}

/// A row of [`APPEND`]: a key, or the settings of a [`Durability`].
type AppendRow = (Option<Vec<u8>>, Option<bool>, Option<bool>, Option<bool>);

/// Parameters of a URL that sqlx reads, in all their spellings.
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

/// Lists the parameters of a URL that have no effect. Returns names only: sqlx would log the values
/// too, and a value may be a password under a misspelled name.
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

/// Statement that appends a batch and returns the keys of events that are new.
///
/// A row without a key reports unsafe settings: they may have changed since the connection was
/// opened. Events come sorted by key and mentions are sorted here, so that batches of several
/// replicas take their locks in one order.
const APPEND: &str = "
    with incoming as (
        select * from unnest($1::bytea[], $2::text[], $3::text[], $4::text[], $5::text[],
                             $6::bigint[], $7::bigint[], $8::text[], $9::text[], $10::text[],
                             $11::text[], $12::text[], $13::text[], $14::bytea[])
            as row (key, id, event_type, api_version, object_id, created_s, received_ms, source,
                    secret_label, outcome, unreadable_reason, telling, linked, body)
    ), new as (
        insert into events (key, id, event_type, api_version, object_id, created_s, received_ms,
                            source, secret_label, outcome, unreadable_reason, telling, linked, body)
        select * from incoming
        on conflict do nothing returning key
    ), linked as (
        insert into mentions (object_id, event_key)
        select mention.*
        from unnest($15::text[], $16::bytea[]) as mention (object_id, event_key)
        join new on new.key = mention.event_key
        order by mention.object_id, mention.event_key
        on conflict do nothing
    )
    select key, null, null, null from new
    union all
    select null, * from (
        select current_setting('fsync') = 'on', current_setting('full_page_writes') = 'on',
               current_setting('synchronous_commit') <> 'off'
    ) as durable (fsync, full_page_writes, synchronous_commit)
    where not (fsync and full_page_writes and synchronous_commit)";

/// Queries the report of the server, before it is known whether a pooler stands in between.
async fn inspect(options: &PgConnectOptions) -> Result<ServerReport, StoreError> {
    let target = ServerTarget {
        options: options.clone(),
        is_pooled: true,
    };
    let (backend, report) = target.connect().await?;
    super::pool::Poolable::close(backend).await;
    Ok(report)
}

const SYNCHRONOUS_COMMIT_OFF: &str =
    "synchronous_commit is off: set it on (alter database ... set synchronous_commit = on)";

/// Checks at the start the settings that an operator can still correct before deliveries arrive.
/// Later, `synchronous_commit` may change, because the sessions of a running `serve` override it.
fn check_durability(durability: Durability) -> Result<(), StoreError> {
    let violation = durability.violation();
    let violation =
        violation.or((!durability.synchronous_commit).then_some(SYNCHRONOUS_COMMIT_OFF));
    violation.map_or(Ok(()), |setting| Err(unsafe_commit(setting)))
}

/// Returns whether a pooler stands in between. The signs are `statement-cache-capacity=0` in the
/// URL, and a server that listens on a port other than the one in the URL.
fn is_pooled(url: &str, options: &PgConnectOptions, report: &ServerReport) -> bool {
    let is_socket = options.get_socket().is_some() || options.get_host().starts_with('/');
    let own_port = i32::from(options.get_port());
    let is_elsewhere = !is_socket && report.port != Some(own_port);
    is_elsewhere || url.contains("statement-cache-capacity=0")
}
