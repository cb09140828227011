//! The only SQL. A `Store` is opened by URL; every method is one statement or one transaction.
//!
//! `events` is the log of deliveries, `invoices` the stored documents, `keys` the API keys. What the rows mean to a payment is
//! not known here: that is `domain`.

mod error;
mod events;
mod invoices;
mod keys;

use std::str::FromStr;
use std::time::Duration;

use sqlx::migrate::{Migrate, Migration, MigrationType, Migrator};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{SqlSafeStr, Sqlite, Transaction};

pub use error::StoreError;
pub use events::{Appended, EventFilter, LoggedEvent, NewEvent, Outcome, PackedBody, Source, StoredBody};
pub use invoices::{InvoiceCursor, NewInvoice, Put, StoredInvoice};
pub use keys::{ApiKey, Scope};

/// Embedded into the binary. An applied migration is never edited.
const MIGRATIONS: [(i64, &str, &str); 1] = [(1, "start", include_str!("../../migrations/sqlite/0001_start.sql"))];

/// How long a statement waits for another process that writes to the same file.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
const READERS: u32 = 4;

/// One SQLite database: a single writing connection, and several that read beside it.
#[derive(Clone, Debug)]
pub struct Store {
    write: SqlitePool,
    read: SqlitePool,
}

impl Store {
    /// Opens `sqlite://PATH`, creating the file when it is missing. Does not migrate.
    ///
    /// # Errors
    /// [`StoreError::Refused`] when the URL is no such URL, [`StoreError::Unavailable`] when the file cannot be opened.
    pub async fn connect(url: &str) -> Result<Store, StoreError> {
        let path = Store::check_url(url).map_err(StoreError::Refused)?;
        let options = SqliteConnectOptions::from_str(&format!("sqlite://{path}"))?
            .create_if_missing(true)
            .foreign_keys(true)
            .page_size(8192)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(BUSY_TIMEOUT)
            .statement_cache_capacity(64);
        // The writer first: it creates the file, which readers may not.
        let writer =
            SqlitePoolOptions::new().max_connections(1).idle_timeout(None).max_lifetime(None).acquire_timeout(BUSY_TIMEOUT);
        let write = writer.connect_with(options.clone()).await.map_err(|e| StoreError::from(e).about(path))?;
        let readers =
            SqlitePoolOptions::new().max_connections(READERS).idle_timeout(None).max_lifetime(None).acquire_timeout(BUSY_TIMEOUT);
        let read = readers.connect_with(options.create_if_missing(false).read_only(true)).await?;
        Ok(Store { write, read })
    }

    /// The path in a `sqlite://PATH` URL.
    ///
    /// # Errors
    /// In words, why it is none.
    pub fn check_url(url: &str) -> Result<&str, String> {
        match url.strip_prefix("sqlite://") {
            Some("") => Err("the database URL names no file: write sqlite://PATH".to_owned()),
            Some(path) if path.starts_with(":memory:") || path.contains("mode=memory") => {
                Err("a database in memory keeps nothing: write sqlite://PATH".to_owned())
            }
            Some(path) => Ok(path),
            None => Err("the database URL must be sqlite://PATH".to_owned()),
        }
    }

    /// Applies the embedded migrations and says which were applied now. Several processes may do it at once.
    ///
    /// # Errors
    /// [`StoreError::Refused`] when the database was made by a newer version of this program.
    pub async fn migrate(&self) -> Result<Vec<&'static str>, StoreError> {
        let migrations = MIGRATIONS
            .map(|(version, name, sql)| Migration::new(version, name.into(), MigrationType::Simple, sql.into_sql_str(), false));
        let migrator = Migrator::with_migrations(migrations.into());
        // sqlx locks nothing on SQLite; its own transactions become savepoints inside this one.
        let mut transaction = self.begin().await?;
        transaction.ensure_migrations_table("_sqlx_migrations").await?;
        let before = transaction.list_applied_migrations("_sqlx_migrations").await?;
        migrator.run_direct(None, &mut *transaction, false).await?;
        transaction.commit().await?;
        let is_new = |version: i64| before.iter().all(|applied| applied.version != version);
        Ok(MIGRATIONS.iter().filter(|(version, ..)| is_new(*version)).map(|(_, name, _)| *name).collect())
    }

    /// Can be reached, and is migrated to just what this program needs.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`], in words.
    pub async fn ping(&self) -> Result<(), StoreError> {
        let latest: i64 =
            sqlx::query_scalar("select coalesce(max(version), 0) from _sqlx_migrations").fetch_one(&self.read).await?;
        if latest == MIGRATIONS[MIGRATIONS.len() - 1].0 {
            return Ok(());
        }
        Err(StoreError::Unavailable(format!("the database is at migration {latest}, which is not what this version needs")))
    }

    /// Closes all connections. What was answered is on disk already.
    pub async fn close(&self) {
        self.read.close().await;
        self.write.close().await;
    }

    /// A write transaction takes the lock at once: one that reads first fails when another process writes in between.
    async fn begin(&self) -> Result<Transaction<'static, Sqlite>, StoreError> {
        Ok(self.write.begin_with("begin immediate").await?)
    }
}
