//! The store, which holds all SQL. A [`Store`] is opened by URL; every method is one statement or
//! one transaction.
//!
//! `events` is the log of deliveries, `invoices` the stored documents, `invoice_reads` the read of
//! an invoice in one round trip, `keys` the API keys, `reconcile` the state of reconciliation,
//! `monitoring` the totals for operators, `copy` moves everything to another database. Both engines
//! share the SQL text and run it through `engine/connection`. The engines differ in opening and
//! appending, see `engine/sqlite` and `engine/postgres`. `domain` decides what rows mean for a
//! payment.

mod copy;
mod engine;
mod error;
mod event_rows;
mod events;
mod invoice_lists;
mod invoice_reads;
mod invoice_rows;
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
pub use invoice_lists::{InvoiceCursor, InvoicePage};
pub use invoice_rows::{ObservationRow, StoredInvoice};
pub use invoices::{NewInvoice, Put};
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

/// Limit of counts of rare rows; there may be more.
pub const COUNT_LIMIT: u32 = 10_000;

/// Shortest pause after a write of a batch command. A shorter one leaves a waiting process no time
/// to retry.
const MIN_PAUSE: Duration = Duration::from_millis(5);
/// Longest pause. A write that took longer was itself waiting for other writers.
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
    /// [`StoreErrorKind::FileMissing`] if the file does not exist.
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
                Err("a database in memory is lost on exit: expected sqlite://PATH".to_owned())
            }
            Some(path) => engine::sqlite::file(path)
                .map(drop)
                .map_err(|e| format!("invalid database URL: {e}")),
            None => {
                Err("expected sqlite://PATH or postgres://USER:PASSWORD@HOST/DATABASE".to_owned())
            }
        }
    }

    /// Appends a batch in one transaction and returns results in the order of the batch.
    ///
    /// On return, either the whole batch is durable or no event of it is stored. Repeating the call
    /// is harmless: a key that is already stored, or that occurs twice in the batch, is a
    /// duplicate.
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
    /// SQLite is always safe, because this program makes its settings itself.
    pub fn durability(&self) -> Durability {
        match &self.0 {
            Engine::Sqlite(_) => Durability::SAFE,
            Engine::Postgres(store) => store.durability(),
        }
    }

    /// Pauses a batch command after a write that took `worked`, so that a serving process can
    /// write.
    ///
    /// SQLite has one write lock and no queue for it: a waiting process retries after 1 to 100 ms,
    /// and starves if another process retakes the lock at once. A pause as long as the work leaves
    /// half of the time to others. PostgreSQL locks rows, and needs no pause.
    pub async fn pause_after_write(&self, worked: Duration) {
        if matches!(self.0, Engine::Sqlite(_)) {
            tokio::time::sleep(worked.clamp(MIN_PAUSE, MAX_PAUSE)).await;
        }
    }

    /// Closes all connections. Every acknowledged write is already on disk.
    pub async fn close(&self) {
        match &self.0 {
            Engine::Sqlite(store) => store.close().await,
            Engine::Postgres(store) => store.close().await,
        }
    }

    /// Checks out a connection for statements that read or are independent of each other.
    async fn session(&self) -> Result<Connection, StoreError> {
        match &self.0 {
            Engine::Sqlite(store) => store.session().await,
            Engine::Postgres(store) => store.session().await,
        }
    }

    /// Begins a transaction of independent statements. No statement depends on an earlier read, so
    /// no concurrent transaction can disturb it.
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
