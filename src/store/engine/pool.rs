//! Pool of open connections, for either engine.
//!
//! sqlx's own pool pings every connection that is returned: one round trip to the server, or to
//! SQLite's thread, after each read and each batch. Meanwhile nobody else can use the connection.
//! This pool reuses a connection without a ping if its last user reported success, and closes it
//! otherwise. The caller decides how to open and check a connection.

use std::collections::VecDeque;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use crate::store::StoreError;

/// Longest wait for an orderly close. A silent server does not delay a shutdown further.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// A future that opens one connection.
pub(in crate::store) type Opening<C> =
    Pin<Box<dyn Future<Output = Result<C, StoreError>> + Send + 'static>>;

type Open<C> = Box<dyn Fn() -> Opening<C> + Send + Sync>;

/// A connection that a pool can hold.
pub(in crate::store) trait Poolable: Send + 'static {
    /// Closes the connection in an orderly way.
    fn close(self) -> impl Future<Output = ()> + Send;
}

pub(in crate::store) struct Pool<C: Poolable> {
    open: Open<C>,
    limits: Limits,
    permits: Arc<Semaphore>,
    /// Idle connections, in the order of their last use.
    idle: Mutex<VecDeque<OpenConnection<C>>>,
    is_closed: AtomicBool,
}

/// Limits of a pool. `None` means unlimited.
#[derive(Clone, Copy, Debug)]
pub(in crate::store) struct Limits {
    pub max_connections: u32,
    /// Longest wait for a free connection, or for the permission to open one.
    pub acquire_timeout: Duration,
    pub open_timeout: Duration,
    pub max_lifetime: Option<Duration>,
    pub max_idle: Option<Duration>,
}

/// Reasons why [`Pool::acquire`] returns no connection.
#[derive(Debug)]
pub(in crate::store) enum AcquireError {
    /// No connection became free in time.
    TimedOut,
    /// No connection was opened in time.
    OpenTimedOut,
    Closed,
    Open(StoreError),
}

struct OpenConnection<C> {
    connection: C,
    opened: Instant,
    last_used: Instant,
}

/// A checked-out connection. On drop it is closed, unless [`Pooled::set_reusable`] was called.
pub(in crate::store) struct Pooled<C: Poolable> {
    /// The connection. `None` only after the drop.
    taken: Option<OpenConnection<C>>,
    /// Time without a statement before this checkout. `None` for a new connection.
    idle_for: Option<Duration>,
    is_reusable: bool,
    pool: Arc<Pool<C>>,
    /// Released after the connection is returned; [`Pool::close`] relies on that order.
    _permit: OwnedSemaphorePermit,
}

impl<C> OpenConnection<C> {
    fn new(connection: C) -> OpenConnection<C> {
        let now = Instant::now();
        OpenConnection {
            connection,
            opened: now,
            last_used: now,
        }
    }
}

impl Limits {
    fn allow<C>(&self, taken: &OpenConnection<C>) -> bool {
        self.max_lifetime
            .is_none_or(|max| taken.opened.elapsed() < max)
            && self
                .max_idle
                .is_none_or(|max| taken.last_used.elapsed() < max)
    }
}

impl<C: Poolable> Pool<C> {
    pub(in crate::store) fn new(
        limits: Limits,
        open: impl Fn() -> Opening<C> + Send + Sync + 'static,
    ) -> Arc<Pool<C>> {
        let pool = Arc::new(Pool {
            open: Box::new(open),
            limits,
            permits: Arc::new(Semaphore::new(limits.max_connections as usize)),
            idle: Mutex::default(),
            is_closed: AtomicBool::new(false),
        });

        if let Some(max_idle) = limits.max_idle {
            tokio::spawn(close_expired_connections(
                Arc::downgrade(&pool),
                max_idle / 2,
            ));
        }
        pool
    }

    /// Checks out the idle connection that was used last, or opens one.
    ///
    /// A connection opened before `not_before` is closed instead. `not_before` is called when a
    /// connection is free, because it may change during the wait.
    pub(in crate::store) async fn acquire(
        self: &Arc<Self>,
        not_before: impl Fn() -> Option<Instant>,
    ) -> Result<Pooled<C>, AcquireError> {
        let waiting = self.permits.clone().acquire_owned();
        let permit = timeout(self.limits.acquire_timeout, waiting).await;
        let permit = permit.map_err(|_| AcquireError::TimedOut)?;
        let permit = permit.map_err(|_| AcquireError::Closed)?;
        if self.is_closed.load(Ordering::Acquire) {
            return Err(AcquireError::Closed);
        }

        let idle = self.take_idle(not_before());
        let idle_for = idle.as_ref().map(|taken| taken.last_used.elapsed());
        let taken = match idle {
            Some(taken) => taken,
            None => self.open().await?,
        };
        Ok(Pooled {
            taken: Some(taken),
            idle_for,
            is_reusable: false,
            pool: self.clone(),
            _permit: permit,
        })
    }

    async fn open(&self) -> Result<OpenConnection<C>, AcquireError> {
        let opened = timeout(self.limits.open_timeout, (self.open)()).await;
        let connection = opened.map_err(|_| AcquireError::OpenTimedOut)?;
        Ok(OpenConnection::new(connection.map_err(AcquireError::Open)?))
    }

    /// Drops all idle connections, because all of them may be dead.
    pub(in crate::store) fn drop_idle(&self) {
        self.idle().clear();
    }

    /// Closes all connections once those in use are returned.
    pub(in crate::store) async fn close(&self) {
        self.is_closed.store(true, Ordering::Release);
        let all = self.permits.acquire_many(self.limits.max_connections).await;

        let idle = std::mem::take(&mut *self.idle());
        for taken in idle {
            close(taken.connection).await;
        }
        self.permits.close();
        drop(all);
    }

    fn idle(&self) -> MutexGuard<'_, VecDeque<OpenConnection<C>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the connection that was used last, because its caches at the server are the warmest.
    fn take_idle(&self, not_before: Option<Instant>) -> Option<OpenConnection<C>> {
        let mut idle = self.idle();
        idle.retain(|taken| {
            self.limits.allow(taken)
                && not_before.is_none_or(|not_before| taken.opened >= not_before)
        });
        idle.pop_back()
    }

    fn take_expired(&self) -> Vec<C> {
        let mut idle = self.idle();
        let (allowed, expired): (VecDeque<_>, VecDeque<_>) =
            idle.drain(..).partition(|taken| self.limits.allow(taken));
        *idle = allowed;
        expired.into_iter().map(|taken| taken.connection).collect()
    }
}

/// Closes expired connections for as long as the pool exists, even if no caller acquires one.
async fn close_expired_connections<C: Poolable>(pool: Weak<Pool<C>>, period: Duration) {
    loop {
        tokio::time::sleep(period).await;
        let Some(expired) = pool.upgrade().map(|pool| pool.take_expired()) else {
            return;
        };
        for connection in expired {
            close(connection).await;
        }
    }
}

async fn close(connection: impl Poolable) {
    // If the server does not answer in time, the connection is dropped without an orderly close.
    let _ = timeout(CLOSE_TIMEOUT, connection.close()).await;
}

impl<C: Poolable> fmt::Debug for Pool<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

impl<C: Poolable> Pooled<C> {
    /// Declares that the last statement succeeded, so the next user gets the connection without a
    /// ping.
    pub(in crate::store) fn set_reusable(&mut self) {
        self.is_reusable = true;
    }

    /// Replaces the connection by a new one, without waiting for other users of the pool.
    pub(in crate::store) async fn reopen(&mut self) -> Result<(), AcquireError> {
        self.taken = Some(self.pool.open().await?);
        self.idle_for = None;
        Ok(())
    }

    /// Returns the time without a statement before this checkout, or `None` for a new connection.
    pub(in crate::store) fn idle_for(&self) -> Option<Duration> {
        self.idle_for
    }
}

impl<C: Poolable> Drop for Pooled<C> {
    fn drop(&mut self) {
        if self.is_reusable {
            self.pool
                .idle()
                .extend(self.taken.take().map(|taken| OpenConnection {
                    last_used: Instant::now(),
                    ..taken
                }));
        }
    }
}

impl<C: Poolable> Deref for Pooled<C> {
    type Target = C;

    fn deref(&self) -> &C {
        let taken = self.taken.as_ref();
        &taken.expect("only the drop takes it").connection
    }
}

impl<C: Poolable> DerefMut for Pooled<C> {
    fn deref_mut(&mut self) -> &mut C {
        let taken = self.taken.as_mut();
        &mut taken.expect("only the drop takes it").connection
    }
}

#[cfg(test)]
mod tests {
    use sqlx::sqlite::SqliteConnectOptions;
    use sqlx::{ConnectOptions, SqliteConnection};
    use tempfile::TempDir;

    use super::*;

    impl Poolable for SqliteConnection {
        async fn close(self) {
            sqlx::Connection::close(self).await.unwrap();
        }
    }

    const LIMITS: Limits = Limits {
        max_connections: 1,
        acquire_timeout: Duration::from_secs(5),
        open_timeout: Duration::from_secs(5),
        max_lifetime: None,
        max_idle: None,
    };

    fn pool(limits: Limits, folder: &TempDir) -> Arc<Pool<SqliteConnection>> {
        let options = SqliteConnectOptions::new()
            .filename(folder.path().join("test.db"))
            .create_if_missing(true);
        Pool::new(limits, move || {
            let options = options.clone();
            Box::pin(async move { Ok(options.connect().await?) })
        })
    }

    async fn acquire(pool: &Arc<Pool<SqliteConnection>>) -> Pooled<SqliteConnection> {
        pool.acquire(|| None).await.unwrap()
    }

    /// Leaves a mark that only this connection can read.
    async fn mark(connection: &mut Pooled<SqliteConnection>) {
        sqlx::raw_sql("create temp table marked (x)")
            .execute(&mut **connection)
            .await
            .unwrap();
    }

    async fn is_marked(connection: &mut Pooled<SqliteConnection>) -> bool {
        sqlx::raw_sql("select 1 from marked")
            .execute(&mut **connection)
            .await
            .is_ok()
    }

    /// Returns a pool with one idle connection that is marked.
    async fn pool_with_marked(limits: Limits, folder: &TempDir) -> Arc<Pool<SqliteConnection>> {
        let pool = pool(limits, folder);
        let mut first = acquire(&pool).await;
        assert_eq!(first.idle_for(), None, "it is new");
        mark(&mut first).await;
        first.set_reusable();
        drop(first);
        assert_eq!(pool.idle().len(), 1);
        pool
    }

    #[tokio::test]
    async fn waiting_caller_gets_returned_connection() {
        let folder = tempfile::tempdir().unwrap();
        let pool = pool(LIMITS, &folder);
        let mut first = acquire(&pool).await;
        mark(&mut first).await;
        first.set_reusable();
        let (mut second, ()) = tokio::join!(acquire(&pool), async { drop(first) });
        assert!(is_marked(&mut second).await && pool.idle().is_empty());
        assert!(second.idle_for().is_some());
        second.set_reusable();
        drop(second);
        assert_eq!(pool.idle().len(), 1);
    }

    #[tokio::test]
    async fn connection_without_reported_success_is_closed() {
        let folder = tempfile::tempdir().unwrap();
        let pool = pool_with_marked(LIMITS, &folder).await;
        drop(acquire(&pool).await);
        assert!(pool.idle().is_empty());
        assert!(!is_marked(&mut acquire(&pool).await).await);
    }

    #[tokio::test]
    async fn connection_opened_too_early_is_closed() {
        let folder = tempfile::tempdir().unwrap();
        let pool = pool_with_marked(LIMITS, &folder).await;
        let mut second = pool.acquire(|| Some(Instant::now())).await.unwrap();
        assert!(!is_marked(&mut second).await);
    }

    #[tokio::test]
    async fn dropped_idle_connection_is_not_reused() {
        let folder = tempfile::tempdir().unwrap();
        let pool = pool_with_marked(LIMITS, &folder).await;
        pool.drop_idle();
        assert!(!is_marked(&mut acquire(&pool).await).await);
    }

    #[tokio::test]
    async fn expired_or_idle_connection_is_closed() {
        let zero = Some(Duration::ZERO);

        for (max_lifetime, max_idle) in [(zero, None), (None, zero)] {
            let limits = Limits {
                max_lifetime,
                max_idle,
                ..LIMITS
            };
            let folder = tempfile::tempdir().unwrap();
            let pool = pool_with_marked(LIMITS, &folder).await;
            assert!(is_marked(&mut acquire(&pool).await).await, "without limits");
            let pool = pool_with_marked(limits, &folder).await;
            assert!(!is_marked(&mut acquire(&pool).await).await, "{limits:?}");
        }
    }

    #[tokio::test]
    async fn expired_idle_connection_is_closed_without_caller() {
        let folder = tempfile::tempdir().unwrap();
        let limits = Limits {
            max_idle: Some(Duration::from_millis(1)),
            ..LIMITS
        };
        let pool = pool_with_marked(limits, &folder).await;
        while !pool.idle().is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    #[test]
    fn pool_may_outlive_its_runtime() {
        let folder = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let pool = runtime.block_on(pool_with_marked(LIMITS, &folder));
        drop(runtime);
        assert_eq!(pool.idle().len(), 1);
        drop(pool);
    }

    #[tokio::test]
    async fn closed_pool_neither_keeps_nor_hands_out_connections() {
        let folder = tempfile::tempdir().unwrap();
        let pool = pool(LIMITS, &folder);
        let mut used = acquire(&pool).await;
        used.set_reusable();
        tokio::join!(pool.close(), async { drop(used) });
        assert!(pool.idle().is_empty());
        assert!(matches!(
            pool.acquire(|| None).await,
            Err(AcquireError::Closed)
        ));
    }
}
