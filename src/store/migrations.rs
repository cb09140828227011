//! The embedded migrations: applies them, and checks which of them a database has.

use std::cmp::Ordering;
use std::time::Duration;

use sqlx::migrate::{Migrate, Migration, MigrationType, Migrator};
use sqlx::{Connection as _, SqlSafeStr};

use super::engine::connection::rows;
use super::{Engine, Store, StoreError, StoreErrorKind};

/// Version, name, and the SQL for SQLite and PostgreSQL. Never edit an applied migration.
pub(super) const MIGRATIONS: [(i64, &str, [&str; 2]); 4] = [
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
/// Advisory lock that serialises migrations. The number is arbitrary but must never change.
/// `client_min_messages` hides "table already exists" notices.
const MIGRATION_LOCK: &str =
    "set local client_min_messages = warning; select pg_advisory_xact_lock(7305821964)";

const LATEST: &str = "select coalesce(max(version), 0) from _sqlx_migrations";

impl Store {
    /// Applies the embedded migrations and returns the names of those applied now.
    ///
    /// Several processes may call it at the same time.
    ///
    /// # Errors
    /// [`StoreErrorKind::SchemaNewer`] if a newer version of this program migrated the database.
    pub async fn migrate(&self) -> Result<Vec<&'static str>, StoreError> {
        if self.ping().await.is_ok() {
            return Ok(Vec::new());
        }

        // sqlx takes no lock on SQLite. On PostgreSQL its lock belongs to a session, which a pooler
        // does not keep. A transaction is a lock on both; sqlx's own transactions become savepoints
        // inside it.
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

    /// Checks that the database can be reached and has exactly the migrations this version needs.
    ///
    /// # Errors
    /// [`StoreErrorKind::NotMigrated`], [`StoreErrorKind::SchemaOlder`] or
    /// [`StoreErrorKind::SchemaNewer`]; another kind if the database cannot be reached.
    pub async fn ping(&self) -> Result<(), StoreError> {
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

    /// Returns the result of [`Store::ping`], or [`StoreErrorKind::Unresponsive`] after `limit`.
    ///
    /// # Errors
    /// The same as for [`Store::ping`].
    pub async fn ping_within(&self, limit: Duration) -> Result<(), StoreError> {
        tokio::time::timeout(limit, self.ping())
            .await
            .unwrap_or_else(|_| Err(StoreError::unresponsive()))
    }
}

/// Applies the missing migrations; `engine` is the index of the SQL text.
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

    // sqlx's lock would belong to the session. The transaction already holds our lock.
    migrator.set_locking(false);
    connection.ensure_migrations_table(MIGRATIONS_TABLE).await?;
    let before = connection.list_applied_migrations(MIGRATIONS_TABLE).await?;
    migrator.run_direct(None, connection, false).await?;

    Ok(MIGRATIONS
        .iter()
        .filter(|(version, ..)| before.iter().all(|applied| applied.version != *version))
        .map(|(_, name, _)| *name)
        .collect())
}
