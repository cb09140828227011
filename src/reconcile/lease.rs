//! One process reconciles at a time, whichever database it is on: a lease that is renewed while its holder lives, and ends soon
//! after it died.

use std::time::Duration;

use tokio_util::sync::{CancellationToken, DropGuard};
use uuid::Uuid;

use crate::clock::Clock;
use crate::store::{CLOCKS_DIFFER_MS, Store, StoreError};

const NAME: &str = "reconcile";
/// How long a holder that died is believed to live.
const LASTS: Duration = Duration::from_secs(12);
const RENEWED: Duration = Duration::from_secs(3);
/// How often somebody who waits looks again.
const LOOK: Duration = Duration::from_millis(250);

/// Held until it is released, or dropped: then it ends by itself.
pub struct Lease {
    store: Store,
    holder: String,
    lost: CancellationToken,
    _renewing: DropGuard,
}

impl Lease {
    /// None: another process is at it.
    ///
    /// # Errors
    /// The database cannot be reached.
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

    /// Waits while another process is at it.
    ///
    /// # Errors
    /// The database cannot be reached.
    pub async fn take(store: &Store, clock: &Clock) -> Result<Lease, StoreError> {
        loop {
            if let Some(lease) = Lease::try_take(store, clock).await? {
                return Ok(lease);
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Waits until nobody is at it, without taking it: what changes nothing needs no more.
    ///
    /// # Errors
    /// The database cannot be reached.
    pub async fn wait_until_free(store: &Store, clock: &Clock) -> Result<(), StoreError> {
        let is_held = |expires_ms: i64| {
            let now_ms = clock.now_ms();
            now_ms < expires_ms
                && expires_ms <= now_ms + LASTS.as_millis() as i64 + CLOCKS_DIFFER_MS
        };
        while store
            .lease(NAME)
            .await?
            .is_some_and(|(_, expires_ms)| is_held(expires_ms))
        {
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    /// Returns when another process may have taken it.
    pub async fn lost(&self) {
        self.lost.cancelled().await;
    }

    /// Gives it back, so that nobody has to wait for its end.
    pub async fn release(self) {
        if let Err(error) = self.store.release_lease(NAME, &self.holder).await {
            tracing::warn!(%error, "the lease could not be given back: it ends by itself");
        }
    }
}

async fn take(store: &Store, clock: &Clock, holder: &str) -> Result<bool, StoreError> {
    let now_ms = clock.now_ms();
    store
        .take_lease(NAME, holder, now_ms, now_ms + LASTS.as_millis() as i64)
        .await
}

/// Another has it, or it could not be renewed until it ended: the holder must stop then.
async fn renew(
    store: Store,
    clock: Clock,
    holder: String,
    lost: CancellationToken,
    stop: CancellationToken,
) {
    let mut ends_ms = clock.now_ms() + LASTS.as_millis() as i64;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(RENEWED) => {}
        }
        let asked_ms = clock.now_ms();
        match take(&store, &clock, &holder).await {
            Ok(true) => ends_ms = asked_ms + LASTS.as_millis() as i64,
            Ok(false) => return lost.cancel(),
            Err(_) if clock.now_ms() >= ends_ms => return lost.cancel(),
            Err(error) => tracing::debug!(%error, "the lease could not be renewed yet"),
        }
    }
}
