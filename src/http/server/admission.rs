//! Admits connections to a listener, up to a limit, and decides which one is evicted beyond it.
//!
//! Every newcomer is admitted. If the listener is full, it evicts one connection that waits for its
//! peer: see [`ConnectionState::eviction_rank`]. Idle or slow connections therefore cannot lock
//! other clients out. A connection is never evicted while the server works on its request, or while
//! bytes have arrived that the server has not read, because then the server is the slow side.
//!
//! Request bodies share one memory budget in the same way. Quotas by peer address would not help:
//! behind a load balancer, all connections come from one address.

use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::connection::{Activity, ConnectionState, Shared};

/// Memory for request bodies of all connections together, in bytes.
const BODY_BUDGET: usize = 64 * 1024 * 1024;
/// Longest time between two requests. Load balancers keep connections for a minute, and the side
/// that sends requests should be the one that closes.
const IDLE_TIMEOUT: Duration = Duration::from_secs(75);
/// Longest time for a request head, from its first byte.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest time for a peer to read a response that did not fit into the socket buffer.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest time for a peer to keep sending a body that nobody reads. The peer needs some time to
/// see its response.
const LINGER_TIMEOUT: Duration = Duration::from_secs(2);
/// Delay before another connection is evicted if the first one has not closed.
const RETRY_DELAY: Duration = Duration::from_millis(50);

/// The connections of one listener; cheap to clone.
#[derive(Clone)]
pub struct ConnectionLimiter(Arc<Shared>);

/// Permission for one connection to exist; dropping it admits another.
pub struct Permit {
    number: u64,
    pub connection: Arc<ConnectionState>,
    shared: Arc<Shared>,
}

impl ConnectionLimiter {
    pub fn new(limit: usize) -> ConnectionLimiter {
        ConnectionLimiter::with_body_budget(limit, BODY_BUDGET)
    }

    fn with_body_budget(limit: usize, body_budget: usize) -> ConnectionLimiter {
        ConnectionLimiter(Arc::new(Shared {
            started: Instant::now(),
            limit,
            buffered_bytes: AtomicUsize::new(0),
            body_budget,
            table: Mutex::default(),
            released: Notify::new(),
        }))
    }

    /// Admits a newcomer. If the listener is full, evicts a connection and waits until one closes.
    pub async fn acquire(&self) -> Permit {
        loop {
            let released = self.0.released.notified();
            if let Some(permit) = self.try_acquire() {
                return permit;
            }
            self.evict_one();

            // All connections may be busy, or the evicted one may have received a request
            // meanwhile.
            let _ = tokio::time::timeout(RETRY_DELAY, released).await;
        }
    }

    /// Admits a connection, or returns `None` if the listener is full.
    fn try_acquire(&self) -> Option<Permit> {
        let mut table = self.0.table();
        if table.connections.len() >= self.0.limit {
            return None;
        }

        let connection = Arc::new(ConnectionState::new(self.0.clone()));
        let number = table.next_number;
        table.next_number += 1;
        table.connections.insert(number, connection.clone());

        Some(Permit {
            number,
            connection,
            shared: self.0.clone(),
        })
    }

    /// Asks the connection with the lowest [`ConnectionState::eviction_rank`] to close.
    pub fn evict_one(&self) {
        let now_ms = self.0.now_ms();
        let table = self.0.table();
        let ranked = table
            .connections
            .values()
            .filter_map(|connection| Some((connection.eviction_rank(now_ms)?, connection)));

        if let Some((_, connection)) = ranked.min_by_key(|(rank, _)| *rank) {
            connection.request_close();
        }
    }

    /// Asks connections to close whose peer exceeded a timeout. Call it about once a second.
    pub fn close_overdue(&self) {
        let now_ms = self.0.now_ms();
        let table = self.0.table();
        let overdue = table.connections.values().filter(|connection| {
            let age_ms = now_ms.saturating_sub(connection.since_ms());
            timeout(connection.activity())
                .is_some_and(|timeout| u128::from(age_ms) > timeout.as_millis())
        });

        for connection in overdue.filter(|connection| !connection.is_closing()) {
            connection.request_close();
        }
    }

    /// Wakes the tasks of all connections, so that they notice the stop.
    pub fn wake_all(&self) {
        for connection in self.0.table().connections.values() {
            connection.wake();
        }
    }
}

/// Returns how long a peer may leave a connection in this activity. `None` while a request body
/// arrives or the server works: `middleware` limits the time of a request, its body included.
fn timeout(activity: Activity) -> Option<Duration> {
    match activity {
        Activity::New | Activity::Idle => Some(IDLE_TIMEOUT),
        Activity::ReadingHead => Some(HEAD_TIMEOUT),
        Activity::WriteBlocked => Some(WRITE_TIMEOUT),
        Activity::Lingering => Some(LINGER_TIMEOUT),
        Activity::ReadingBody | Activity::Busy => None,
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.connection.release_buffered();
        self.shared.table().connections.remove(&self.number);
        self.shared.released.notify_one();
    }
}

#[cfg(test)]
#[path = "admission_tests.rs"]
mod tests;
