//! The only SQL. A `Store` is opened by URL; every method is one statement or one transaction.
//!
//! `events` is the log of deliveries, `invoices` the stored documents, `keys` the API keys, `reconciling` what the passes against
//! Stripe's API keep, `monitor` what the person on call is told, `copying` and `tables` what is carried to another database: one text
//! of SQL for both engines, run through `session`, on connections that `pool` keeps ready. What differs between them, opening and
//! appending, is in `sqlite` and `postgres`. What the rows mean to a payment is not known here: that is `domain`.

mod copy;
mod engine;
mod error;
mod event_rows;
mod events;
mod invoice_reads;
mod invoices;
mod keys;
mod monitoring;
mod reconcile;

use std::cmp::Ordering;
use std::time::Duration;

use sqlx::migrate::{Migrate, Migration, MigrationType, Migrator};
use sqlx::{Connection as _, SqlSafeStr};

pub use copy::rows::{CopyPage, CopyTarget, Row, Value};
pub use copy::tables::Table;
pub use error::{StoreError, StoreErrorClass, StoreErrorKind};
pub use event_rows::{
    Appended, EventFilter, LoggedEvent, NewEvent, Outcome, PackedBody, Source, StoredBody,
};
pub use events::ObservedPage;
pub use invoices::{InvoiceCursor, InvoicePage, NewInvoice, ObservationRow, Put, StoredInvoice};
pub use keys::{ApiKey, Scope};
pub use monitoring::{ActivityDelta, COUNTED, Counted, Disk, LogRow, Space, UnmatchedInvoice};
pub use reconcile::{
    Backlog, CLOCKS_DIFFER_MS, CheckCandidate, CheckResult, Comparison, LookupKind, LookupState,
    PendingLookup, Run,
};

pub use engine::postgres_server::Durability;

use engine::connection::{Connection, rows};
use engine::postgres::PostgresStore;
use engine::sqlite::SqliteStore;

/// Embedded into the binary, in the words of each engine. An applied migration is never edited.
const MIGRATIONS: [(i64, &str, [&str; 2]); 4] = [
    (
        1,
        "start",
        [
            include_str!("../../migrations/sqlite/0001_start.sql"),
            include_str!("../../migrations/postgres/0001_start.sql"),
        ],
    ),
    (
        2,
        "reconcile",
        [
            include_str!("../../migrations/sqlite/0002_reconcile.sql"),
            include_str!("../../migrations/postgres/0002_reconcile.sql"),
        ],
    ),
    (
        3,
        "signs",
        [
            include_str!("../../migrations/sqlite/0003_signs.sql"),
            include_str!("../../migrations/postgres/0003_signs.sql"),
        ],
    ),
    (
        4,
        "find",
        [
            include_str!("../../migrations/sqlite/0004_find.sql"),
            include_str!("../../migrations/postgres/0004_find.sql"),
        ],
    ),
];
const MIGRATIONS_TABLE: &str = "_sqlx_migrations";
/// Who migrates holds this lock of PostgreSQL's. Any number, as long as it stays. That a table is there already is no news.
const MIGRATION_LOCK: &str =
    "set local client_min_messages = warning; select pg_advisory_xact_lock(7305821964)";

/// One database; cheap to clone.
#[derive(Clone, Debug)]
pub struct Store(Engine);

#[derive(Clone, Debug)]
enum Engine {
    Sqlite(SqliteStore),
    Postgres(PostgresStore),
}

impl Store {
    /// Opens `sqlite://PATH`, creating the file when it is missing, or `postgres://...`. Does not migrate.
    ///
    /// # Errors
    /// [`StoreErrorKind::Rejected`] if the URL is invalid, another kind if the database cannot be
    /// reached.
    pub async fn connect(url: &str) -> Result<Store, StoreError> {
        Store::check_url(url)
            .map_err(|reason| StoreError::new(StoreErrorKind::Rejected, reason))?;
        Ok(Store(match url.strip_prefix("sqlite://") {
            Some(path) => Engine::Sqlite(
                SqliteStore::open(path)
                    .await
                    .map_err(|e| e.with_subject(path))?,
            ),
            None => Engine::Postgres(PostgresStore::open(url).await?),
        }))
    }

    /// As [`Store::connect`], but creates nothing.
    ///
    /// # Errors
    /// [`StoreErrorKind::FileMissing`] if there is no such file.
    pub async fn connect_to_existing(url: &str) -> Result<Store, StoreError> {
        Store::check_url(url)
            .map_err(|reason| StoreError::new(StoreErrorKind::Rejected, reason))?;
        if let Some(file) = url
            .strip_prefix("sqlite://")
            .map(engine::sqlite::file)
            .transpose()?
            && !file.exists()
        {
            return Err(StoreError::new(
                StoreErrorKind::FileMissing,
                file.display().to_string(),
            ));
        }
        Store::connect(url).await
    }

    /// Whether `connect` can make anything of this URL.
    ///
    /// # Errors
    /// In words that do not show a password, why not.
    pub fn check_url(url: &str) -> Result<(), String> {
        if url.starts_with("postgres://") || url.starts_with("postgresql://") {
            return url
                .parse::<sqlx::postgres::PgConnectOptions>()
                .map(drop)
                .map_err(|e| format!("it cannot be read: {e}"));
        }
        match url.strip_prefix("sqlite://") {
            Some("") => Err("it names no file: write sqlite://PATH".to_owned()),
            Some(path) if path.starts_with(":memory:") || path.contains("mode=memory") => {
                Err("a database in memory keeps nothing: write sqlite://PATH".to_owned())
            }
            Some(path) => engine::sqlite::file(path)
                .map(drop)
                .map_err(|e| format!("it cannot be read: {e}")),
            None => {
                Err("it must be sqlite://PATH or postgres://USER:PASSWORD@HOST/DATABASE".to_owned())
            }
        }
    }

    /// Applies the embedded migrations and says which were applied now. Several processes may do it at once.
    ///
    /// # Errors
    /// [`StoreErrorKind::SchemaNewer`] if a newer version of this program migrated the database.
    pub async fn migrate(&self) -> Result<Vec<&'static str>, StoreError> {
        if self.ping().await.is_ok() {
            return Ok(Vec::new());
        }
        // sqlx's own lock is none on SQLite, and belongs to a connection on PostgreSQL, which a pooler does not know. A
        // transaction is a lock on both; sqlx's transactions become savepoints inside it.
        match &self.0 {
            Engine::Sqlite(store) => {
                let mut connection = store.writer().await?;
                let mut transaction = connection.begin_with("begin immediate").await?;
                let applied = migrate_on(&mut *transaction, 0).await?;
                transaction.commit().await?;
                connection.set_reusable();
                Ok(applied)
            }
            Engine::Postgres(store) => {
                let mut connection = store.connect_dedicated().await?;
                let mut transaction = connection.begin().await?;
                sqlx::raw_sql(MIGRATION_LOCK)
                    .execute(&mut *transaction)
                    .await?;
                store.deallocate_statements(&mut transaction).await?;
                let applied = migrate_on(&mut *transaction, 1).await?;
                transaction.commit().await?;
                connection.close().await?;
                Ok(applied)
            }
        }
    }

    /// Can be reached, and is migrated to just what this program needs.
    ///
    /// # Errors
    /// In words, why not.
    pub async fn ping(&self) -> Result<(), StoreError> {
        const LATEST: &str = "select coalesce(max(version), 0) from _sqlx_migrations";
        let mut session = self.session().await?;
        let (latest,) = rows!(session, fetch_one, (i64,), LATEST)?;
        session.done().await?;
        let needed = MIGRATIONS[MIGRATIONS.len() - 1].0;
        match latest.cmp(&needed) {
            Ordering::Equal => Ok(()),
            Ordering::Less => Err(StoreError::new(
                StoreErrorKind::SchemaOlder,
                format!(
                    "it is at migration {latest}, this version needs {needed}: \
                     run `stripe-reconciler migrate`"
                ),
            )),
            Ordering::Greater => Err(StoreError::new(
                StoreErrorKind::SchemaNewer,
                format!("it is at migration {latest}, this version knows {needed}"),
            )),
        }
    }

    /// Returns what [`Store::ping`] does, or [`StoreErrorKind::Unresponsive`] after `limit`.
    pub async fn ping_within(&self, limit: Duration) -> Result<(), StoreError> {
        tokio::time::timeout(limit, self.ping())
            .await
            .unwrap_or_else(|_| Err(StoreError::unresponsive()))
    }

    /// Appends a batch in one transaction; durable when it returns, or nothing is kept. Answers in the order of the batch.
    /// Repeating is harmless: a key that is there already, or twice in the batch, is a duplicate.
    pub async fn append(&self, batch: &[NewEvent]) -> Result<Vec<Appended>, StoreError> {
        match &self.0 {
            Engine::Sqlite(store) => store.append(batch).await,
            Engine::Postgres(store) => store.append(batch).await,
        }
    }

    /// Returns which settings of the server make acknowledged commits unsafe, as last reported.
    /// SQLite's settings are ours and always safe.
    pub fn durability(&self) -> Durability {
        match &self.0 {
            Engine::Sqlite(_) => Durability::SAFE,
            Engine::Postgres(store) => store.durability(),
        }
    }

    /// Closes all connections. What was answered is on disk already.
    pub async fn close(&self) {
        match &self.0 {
            Engine::Sqlite(store) => store.close().await,
            Engine::Postgres(store) => store.close().await,
        }
    }

    /// A connection for statements that read, or that each stand alone.
    async fn session(&self) -> Result<Connection, StoreError> {
        match &self.0 {
            Engine::Sqlite(store) => store.session().await,
            Engine::Postgres(store) => store.session().await,
        }
    }

    /// A transaction whose statements each stand alone: nothing in it depends on what it read, and no other can disturb it.
    async fn writing(&self) -> Result<Connection, StoreError> {
        match &self.0 {
            Engine::Sqlite(store) => store.transaction().await,
            Engine::Postgres(store) => store.transaction().await,
        }
    }

    /// A transaction that sees no other's writes: it is as if it ran alone, or it is [`StoreErrorKind::Contended`].
    async fn transaction(&self) -> Result<Connection, StoreError> {
        match &self.0 {
            Engine::Sqlite(store) => store.transaction().await,
            Engine::Postgres(store) => store.serializable().await,
        }
    }
}

async fn migrate_on(
    connection: &mut impl Migrate,
    engine: usize,
) -> Result<Vec<&'static str>, StoreError> {
    let migrations = MIGRATIONS.map(|(version, name, sql)| {
        Migration::new(
            version,
            name.into(),
            MigrationType::Simple,
            sql[engine].into_sql_str(),
            false,
        )
    });
    let mut migrator = Migrator::with_migrations(migrations.into());
    // Its lock belongs to a session; ours, to the transaction, is held already.
    migrator.set_locking(false);
    connection.ensure_migrations_table(MIGRATIONS_TABLE).await?;
    let before = connection.list_applied_migrations(MIGRATIONS_TABLE).await?;
    migrator.run_direct(None, connection, false).await?;
    let is_new = |version: i64| before.iter().all(|applied| applied.version != version);
    Ok(MIGRATIONS
        .iter()
        .filter(|(version, ..)| is_new(*version))
        .map(|(_, name, _)| *name)
        .collect())
}
