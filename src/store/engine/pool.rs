//! Connections that are kept ready. sqlx opens and closes them; one that has done its work waits here for what comes next.
//!
//! sqlx asks every connection that is given back whether it still lives: a round trip to the server, or to SQLite's thread, after
//! each read and each batch, and a connection that nobody else can use meanwhile.

use std::collections::VecDeque;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use sqlx::Database;
use sqlx::pool::PoolConnection;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

#[derive(Debug)]
pub(in crate::store) struct Pool<DB: Database> {
    source: sqlx::Pool<DB>,
    /// As many as `source` has connections: who holds one waits for none but what `source` is just opening or closing.
    places: Arc<Semaphore>,
    /// In the order in which they became ready. They are held to the same limits as sqlx's: how long one may live, and rest.
    ready: Mutex<VecDeque<CheckedOut<DB>>>,
}

/// A connection of sqlx's pool, when it was asked for, and when it was last used.
#[derive(Debug)]
struct CheckedOut<DB: Database> {
    at: Instant,
    used: Instant,
    connection: PoolConnection<DB>,
}

/// A connection in use. When it is dropped, sqlx takes it back and asks it, unless one of the methods said better.
pub(in crate::store) struct Pooled<DB: Database> {
    /// None only after the drop.
    taken: Option<CheckedOut<DB>>,
    is_ready: bool,
    pool: Arc<Pool<DB>>,
    _place: OwnedSemaphorePermit,
}

impl<DB: Database> Pool<DB> {
    pub(in crate::store) fn new(source: sqlx::Pool<DB>) -> Arc<Pool<DB>> {
        let places = Arc::new(Semaphore::new(
            source.options().get_max_connections() as usize
        ));
        Arc::new(Pool {
            source,
            places,
            ready: Mutex::default(),
        })
    }

    /// `not_before`, asked when it is handed out: what was opened earlier leads nowhere, and is closed.
    ///
    /// # Errors
    /// As sqlx's pool.
    pub(in crate::store) async fn acquire(
        self: &Arc<Self>,
        not_before: impl Fn() -> Option<Instant>,
    ) -> Result<Pooled<DB>, sqlx::Error> {
        let acquired = async {
            let place = self
                .places
                .clone()
                .acquire_owned()
                .await
                .map_err(|_| sqlx::Error::PoolClosed)?;
            let taken = match self.take_ready(not_before()) {
                Some(taken) => taken,
                None => CheckedOut {
                    at: Instant::now(),
                    connection: self.source.acquire().await?,
                    used: Instant::now(),
                },
            };
            Ok(Pooled {
                taken: Some(taken),
                is_ready: false,
                pool: self.clone(),
                _place: place,
            })
        };
        let in_time = timeout(self.source.options().get_acquire_timeout(), acquired).await;
        in_time.map_err(|_| sqlx::Error::PoolTimedOut)?
    }

    pub(in crate::store) async fn close(&self) {
        {
            let mut ready = self.ready();
            self.places.close();
            // To be asked whether they live, they would hold their place as long as a server is silent.
            ready
                .iter_mut()
                .for_each(|taken| taken.connection.close_on_drop());
            ready.clear();
        }
        self.source.close().await;
    }

    fn ready(&self) -> MutexGuard<'_, VecDeque<CheckedOut<DB>>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The one that was used last: the server has most of what it needs at hand.
    fn take_ready(&self, not_before: Option<Instant>) -> Option<CheckedOut<DB>> {
        let (life, rest) = (
            self.source.options().get_max_lifetime(),
            self.source.options().get_idle_timeout(),
        );
        let is_good = |taken: &CheckedOut<DB>| {
            not_before.is_none_or(|not_before| taken.at >= not_before)
                && life.is_none_or(|life| taken.at.elapsed() < life)
                && rest.is_none_or(|rest| taken.used.elapsed() < rest)
        };
        let mut ready = self.ready();
        ready.retain_mut(|taken| {
            let is_good = is_good(taken);
            if !is_good {
                taken.connection.close_on_drop();
            }
            is_good
        });
        ready.pop_back()
    }
}

impl<DB: Database> Pooled<DB> {
    /// It has done all that it was asked: it can be used at once.
    pub(in crate::store) fn set_ready(&mut self) {
        self.is_ready = true;
    }

    /// Nobody knows what it is doing: it is to be closed.
    pub(in crate::store) fn close_on_drop(&mut self) {
        if let Some(taken) = &mut self.taken {
            taken.connection.close_on_drop();
        }
    }
}

impl<DB: Database> Drop for Pooled<DB> {
    fn drop(&mut self) {
        if !self.is_ready {
            return;
        }
        let mut ready = self.pool.ready();
        if !self.pool.places.is_closed() {
            ready.extend(self.taken.take().map(|taken| CheckedOut {
                used: Instant::now(),
                ..taken
            }));
        }
    }
}

impl<DB: Database> Drop for Pool<DB> {
    fn drop(&mut self) {
        // To be given back to sqlx they would need a runtime, and that may have ended before.
        for taken in self.ready().drain(..) {
            drop(taken.connection.detach());
        }
    }
}

impl<DB: Database> Deref for Pooled<DB> {
    type Target = DB::Connection;

    fn deref(&self) -> &DB::Connection {
        &self
            .taken
            .as_ref()
            .expect("it is taken out only in the drop")
            .connection
    }
}

impl<DB: Database> DerefMut for Pooled<DB> {
    fn deref_mut(&mut self) -> &mut DB::Connection {
        &mut self
            .taken
            .as_mut()
            .expect("it is taken out only in the drop")
            .connection
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use sqlx::Sqlite;
    use sqlx::sqlite::{SqliteConnectOptions, SqlitePoolOptions};
    use tempfile::TempDir;

    use super::*;

    /// Of one connection.
    fn pool(folder: &TempDir) -> Arc<Pool<Sqlite>> {
        pool_with(SqlitePoolOptions::new(), folder)
    }

    fn pool_with(limits: SqlitePoolOptions, folder: &TempDir) -> Arc<Pool<Sqlite>> {
        let options = SqliteConnectOptions::new()
            .filename(folder.path().join("test.db"))
            .create_if_missing(true);
        Pool::new(limits.max_connections(1).connect_lazy_with(options))
    }

    /// What only the same connection knows.
    async fn mark(connection: &mut Pooled<Sqlite>) {
        sqlx::raw_sql("create temp table marked (x)")
            .execute(&mut **connection)
            .await
            .unwrap();
    }

    async fn is_marked(connection: &mut Pooled<Sqlite>) -> bool {
        sqlx::raw_sql("select 1 from marked")
            .execute(&mut **connection)
            .await
            .is_ok()
    }

    #[tokio::test]
    async fn who_waits_is_handed_the_connection_that_is_ready() {
        let folder = tempfile::tempdir().unwrap();
        let pool = pool(&folder);
        let mut first = pool.acquire(|| None).await.unwrap();
        mark(&mut first).await;
        first.set_ready();
        let (mut second, ()) =
            tokio::join!(async { pool.acquire(|| None).await.unwrap() }, async {
                drop(first)
            });
        assert!(is_marked(&mut second).await && pool.ready().is_empty());
        second.set_ready();
        drop(second);
        assert_eq!(pool.ready().len(), 1, "and waits here");
    }

    #[tokio::test]
    async fn one_that_is_not_said_to_be_ready_goes_through_sqlx() {
        let folder = tempfile::tempdir().unwrap();
        let pool = pool(&folder);
        let mut first = pool.acquire(|| None).await.unwrap();
        mark(&mut first).await;
        drop(first);
        assert!(pool.ready().is_empty());
        let mut second = pool.acquire(|| None).await.unwrap();
        assert!(is_marked(&mut second).await, "sqlx found it whole");
        second.close_on_drop();
        drop(second);
        assert!(!is_marked(&mut pool.acquire(|| None).await.unwrap()).await);
    }

    #[tokio::test]
    async fn one_that_was_opened_too_early_is_closed_however_ready_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let pool = pool(&folder);
        let mut first = pool.acquire(|| None).await.unwrap();
        mark(&mut first).await;
        first.set_ready();
        drop(first);
        assert!(!is_marked(&mut pool.acquire(|| Some(Instant::now())).await.unwrap()).await);
    }

    #[tokio::test]
    async fn one_that_has_lived_or_rested_too_long_is_closed_however_ready_it_is() {
        let limits = [
            SqlitePoolOptions::new().max_lifetime(Duration::ZERO),
            SqlitePoolOptions::new().idle_timeout(Duration::ZERO),
        ];
        for limits in limits {
            let folder = tempfile::tempdir().unwrap();
            let pool = pool_with(limits, &folder);
            let mut first = pool.acquire(|| None).await.unwrap();
            mark(&mut first).await;
            first.set_ready();
            drop(first);
            assert_eq!(pool.ready().len(), 1);
            assert!(!is_marked(&mut pool.acquire(|| None).await.unwrap()).await);
        }
    }

    #[test]
    fn a_pool_may_outlive_its_runtime() {
        let folder = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let pool = runtime.block_on(async {
            let pool = pool(&folder);
            pool.acquire(|| None).await.unwrap().set_ready();
            pool
        });
        drop(runtime);
        assert_eq!(pool.ready().len(), 1);
        drop(pool);
    }

    #[tokio::test]
    async fn a_closed_pool_keeps_nothing_and_gives_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let pool = pool(&folder);
        let mut used = pool.acquire(|| None).await.unwrap();
        let closing = pool.close();
        used.set_ready();
        tokio::join!(closing, async { drop(used) });
        assert!(pool.ready().is_empty());
        assert!(matches!(
            pool.acquire(|| None).await,
            Err(sqlx::Error::PoolClosed)
        ));
    }
}
