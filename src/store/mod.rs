//! The only SQL. A `Store` is opened by URL; every method is one statement or one transaction.
//!
//! `events` is the log of deliveries, `invoices` the stored documents, `invoice_reads` what a read
//! needs in one round trip, `keys` the API keys, `reconcile` the state of reconciliation,
//! `monitoring` the totals for operators, `copy` moves everything to another database. Both engines
//! share the SQL text and run it through `engine/connection`. Where they differ, in opening and
//! appending, see `engine/sqlite` and `engine/postgres`. What rows mean to a payment is not known
//! here: that is `domain`.

mod copy;
mod engine;
mod error;
mod event_rows;
mod events;
mod invoice_reads;
mod invoices;
mod keys;
mod migrations;
mod monitoring;
mod reconcile;

pub use copy::rows::{CopyPage, CopyTarget, Row, Value};
pub use copy::tables::Table;
pub use error::{StoreError, StoreErrorClass, StoreErrorKind};
pub use event_rows::{
    Appended, EventFilter, LoggedEvent, NewEvent, Outcome, PackedBody, Source, StoredBody,
};
pub use events::ObservedPage;
pub use invoices::{InvoiceCursor, InvoicePage, NewInvoice, ObservationRow, Put, StoredInvoice};
pub use keys::{ApiKey, Scope};
pub use monitoring::{ActivityDelta, Counted, Disk, LogRow, Space, UnmatchedInvoice};
pub use reconcile::{
    Backlog, CheckCandidate, CheckResult, Comparison, LookupKind, LookupState, PendingLookup,
    ProgressKey, Run,
};

pub use engine::postgres_server::Durability;

use std::time::Duration;

use engine::connection::Connection;
use engine::postgres::PostgresStore;
use engine::sqlite::SqliteStore;

/// Rare things are counted up to this number; there may be more.
pub const COUNT_LIMIT: u32 = 10_000;

/// Shortest pause after a write of a batch command. A commit that takes less leaves no time for a
/// waiting process to try again.
const MIN_PAUSE: Duration = Duration::from_millis(5);
/// Longest pause. A write that took longer was waiting for others itself.
const MAX_PAUSE: Duration = Duration::from_secs(1);

/// A database. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Store(Engine);

#[derive(Clone, Debug)]
enum Engine {
    Sqlite(SqliteStore),
    Postgres(PostgresStore),
}

impl Store {
    /// Opens `sqlite://PATH`, creating the file if it is missing, or `postgres://...`.
    ///
    /// Does not migrate.
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

    /// Opens an existing database. Creates no file.
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

    /// Checks whether [`Store::connect`] understands this URL.
    ///
    /// # Errors
    /// Returns the reason as text, without a password.
    pub fn check_url(url: &str) -> Result<(), String> {
        if url.starts_with("postgres://") || url.starts_with("postgresql://") {
            return url
                .parse::<sqlx::postgres::PgConnectOptions>()
                .map(drop)
                .map_err(|e| format!("invalid database URL: {e}"));
        }

        match url.strip_prefix("sqlite://") {
            Some("") => Err("missing file name: expected sqlite://PATH".to_owned()),
            Some(path) if path.starts_with(":memory:") || path.contains("mode=memory") => {
                Err("a database in memory loses everything: expected sqlite://PATH".to_owned())
            }
            Some(path) => engine::sqlite::file(path)
                .map(drop)
                .map_err(|e| format!("invalid database URL: {e}")),
            None => {
                Err("expected sqlite://PATH or postgres://USER:PASSWORD@HOST/DATABASE".to_owned())
            }
        }
    }

    /// Appends a batch in one transaction. Answers in the order of the batch.
    ///
    /// When it returns, the whole batch is durable, or nothing of it is stored. Repeating is
    /// harmless: a key that is already stored, or twice in the batch, is a duplicate.
    pub async fn append(&self, batch: &[NewEvent]) -> Result<Vec<Appended>, StoreError> {
        match &self.0 {
            Engine::Sqlite(store) => store.append(batch).await,
            Engine::Postgres(store) => store.append(batch).await,
        }
    }

    /// Returns the permission bits of the SQLite file if every user of the machine may read it.
    pub fn exposed_mode(&self) -> Option<u32> {
        match &self.0 {
            Engine::Sqlite(store) => store.exposed_mode(),
            Engine::Postgres(_) => None,
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

    /// Pauses a batch command after a write that took `worked`, so that a serving process can write.
    ///
    /// SQLite has one write lock and no queue for it: a waiting process tries again after 1 to
    /// 100 ms, and starves beside a process that takes the lock again at once. A pause as long as
    /// the work leaves half of the time to others. PostgreSQL locks rows, and needs no pause.
    pub async fn pause_after_write(&self, worked: Duration) {
        if matches!(self.0, Engine::Sqlite(_)) {
            tokio::time::sleep(worked.clamp(MIN_PAUSE, MAX_PAUSE)).await;
        }
    }

    /// Closes all connections. Everything that was answered is already on disk.
    pub async fn close(&self) {
        match &self.0 {
            Engine::Sqlite(store) => store.close().await,
            Engine::Postgres(store) => store.close().await,
        }
    }

    /// Checks out a connection for statements that read, or that each stand alone.
    async fn session(&self) -> Result<Connection, StoreError> {
        match &self.0 {
            Engine::Sqlite(store) => store.session().await,
            Engine::Postgres(store) => store.session().await,
        }
    }

    /// Begins a transaction whose statements each stand alone: nothing in it depends on what it
    /// read, so no concurrent transaction can disturb it.
    async fn writing(&self) -> Result<Connection, StoreError> {
        match &self.0 {
            Engine::Sqlite(store) => store.transaction().await,
            Engine::Postgres(store) => store.transaction().await,
        }
    }

    /// Begins a serializable transaction: it behaves as if it ran alone, or it fails with
    /// [`StoreErrorKind::Contended`].
    async fn transaction(&self) -> Result<Connection, StoreError> {
        match &self.0 {
            Engine::Sqlite(store) => store.transaction().await,
            Engine::Postgres(store) => store.serializable().await,
        }
    }
}
