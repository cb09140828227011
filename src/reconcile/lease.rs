//! The lease under which one process reconciles at a time, on either database engine.
//!
//! The holder renews the lease while it runs. The lease expires soon after the holder has died.

use std::time::Duration;

use tokio_util::sync::{CancellationToken, DropGuard};
use uuid::Uuid;

use super::ReconcileError;
use crate::clock::{Clock, MAX_SKEW_MS};
use crate::store::{Store, StoreError};

const NAME: &str = "reconcile";
/// Duration of a lease after its last renewal. Other processes wait this long if the holder dies.
const DURATION: Duration = Duration::from_secs(12);
const RENEWAL_INTERVAL: Duration = Duration::from_secs(3);
/// Time between two attempts of a waiting process.
const POLL_INTERVAL: Duration = Duration::from_millis(250);

/// A lease that is held until it is released. If it is dropped instead, it expires.
pub struct Lease {
    store: Store,
    holder: String,
    lost: CancellationToken,
    _renewing: DropGuard,
}

impl Lease {
    /// Takes the lease. Returns `None` if another process holds it.
    ///
    /// # Errors
    /// Returns an error if the database cannot be written.
    pub async fn try_take(store: &Store, clock: &Clock) -> Result<Option<Lease>, StoreError> {
        let holder = Uuid::now_v7().to_string();
        if !take(store, clock, &holder).await? {
            return Ok(None);
        }

        let (lost, stop) = (CancellationToken::new(), CancellationToken::new());
        tokio::spawn(renew(
            store.clone(),
            clock.clone(),
            holder.clone(),
            lost.clone(),
            stop.clone(),
        ));
        Ok(Some(Lease {
            store: store.clone(),
            holder,
            lost,
            _renewing: stop.drop_guard(),
        }))
    }

    /// Takes the lease, and waits while another process holds it.
    ///
    /// # Errors
    /// Returns an error if the database cannot be written.
    pub async fn take(store: &Store, clock: &Clock) -> Result<Lease, StoreError> {
        loop {
            if let Some(lease) = Lease::try_take(store, clock).await? {
                return Ok(lease);
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// Waits until the lease is free without taking it. Enough for a dry run, which writes nothing.
    ///
    /// # Errors
    /// Returns an error if the database cannot be read.
    pub async fn wait_until_free(store: &Store, clock: &Clock) -> Result<(), StoreError> {
        loop {
            let lease = store.lease(NAME).await?;
            let now_ms = clock.now_ms();
            // A lease that expires implausibly late was taken under a skewed clock.
            let latest_ms = now_ms + DURATION.as_millis() as i64 + MAX_SKEW_MS;
            let is_held =
                lease.is_some_and(|(_, expires_ms)| now_ms < expires_ms && expires_ms <= latest_ms);
            if !is_held {
                return Ok(());
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// Runs `work` under the lease and releases it, whether the work succeeds or fails.
    ///
    /// # Errors
    /// Returns the error of `work`, or [`ReconcileError::LeaseLost`] if another process may have
    /// taken the lease meanwhile: then `work` is dropped.
    pub async fn run<T>(
        self,
        work: impl Future<Output = Result<T, ReconcileError>>,
    ) -> Result<T, ReconcileError> {
        let ended = tokio::select! {
            ended = work => ended,
            () = self.lost() => Err(ReconcileError::LeaseLost),
        };
        self.release().await;
        ended
    }

    /// Returns when another process may have taken the lease.
    pub async fn lost(&self) {
        self.lost.cancelled().await;
    }

    /// Releases the lease, so that no process has to wait until it expires.
    pub async fn release(self) {
        if let Err(error) = self.store.release_lease(NAME, &self.holder).await {
            tracing::warn!(%error, "failed to release lease; it will expire");
        }
    }
}

/// Takes or renews the lease. Returns `false` if another process holds it.
async fn take(store: &Store, clock: &Clock, holder: &str) -> Result<bool, StoreError> {
    let now_ms = clock.now_ms();
    store
        .take_lease(NAME, holder, now_ms, now_ms + DURATION.as_millis() as i64)
        .await
}

/// Renews the lease until `stop`. Cancels `lost` if another process has it, or if it could not be
/// renewed before it expired: then the holder must stop.
async fn renew(
    store: Store,
    clock: Clock,
    holder: String,
    lost: CancellationToken,
    stop: CancellationToken,
) {
    let mut expires_ms = clock.now_ms() + DURATION.as_millis() as i64;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(RENEWAL_INTERVAL) => {}
        }

        let started_ms = clock.now_ms();
        match take(&store, &clock, &holder).await {
            Ok(true) => expires_ms = started_ms + DURATION.as_millis() as i64,
            Ok(false) => return lost.cancel(),
            Err(_) if clock.now_ms() >= expires_ms => return lost.cancel(),
            Err(error) => tracing::debug!(%error, "failed to renew lease, will retry"),
        }
    }
}
