//! The state of one connection: its activity, the start of that activity, and requests to close; and
//! the state that all connections of a listener share.
//!
//! The connection's own task writes most of the state, and the limiter in `admission` reads it. All
//! fields are atomics, so neither waits for the other.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::Instant;

use futures_util::task::AtomicWaker;
use tokio::sync::Notify;

/// Age in milliseconds from which an unfinished request head counts as slow. A head fits into a few
/// packets, so an honest client sends it within two round trips.
const SLOW_HEAD_MS: u64 = 1000;
/// Number of bits that hold the [`Activity`], below the time of its start.
const ACTIVITY_BITS: u32 = 3;

/// The current activity of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    /// Connected; the peer has sent no byte yet.
    New,
    /// Between two requests.
    Idle,
    /// The head of a request is arriving.
    ReadingHead,
    /// The body of a request is arriving.
    ReadingBody,
    /// The request is complete, or nobody reads the rest of it. The peer waits for the server.
    Busy,
    /// The peer does not read its response.
    WriteBlocked,
    /// The response went out before the request body was complete.
    Lingering,
}

/// An instruction of the server to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseRequest {
    /// Stay open.
    Nothing,
    /// Answer the requests that have arrived, then close.
    Close,
    /// Close now.
    Abort,
}

/// Eviction order: the connection with the lowest rank is closed first.
///
/// Compared in the order of the fields: trusted connections last, then by suspicion, then the one
/// that has waited longest for its peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct EvictionRank {
    is_trusted: bool,
    suspicion: Suspicion,
    since_ms: u64,
}

/// The suspicion that a waiting connection does harm, strongest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Suspicion {
    /// A request head that has been incomplete for longer than [`SLOW_HEAD_MS`].
    SlowHead,
    /// No request is in progress, so closing loses nothing.
    Unused,
    /// A request or response is in progress, and closing loses it.
    InProgress,
}

/// The state of one connection.
pub struct ConnectionState {
    /// Milliseconds since the listener started, and the [`Activity`] in the lowest bits.
    since_and_activity: AtomicU64,
    /// Bytes of the request body that are in memory.
    buffered_bytes: AtomicUsize,
    /// `true` if every byte that has arrived was read.
    is_input_drained: AtomicBool,
    /// A [`CloseRequest`].
    close_request: AtomicU8,
    /// `true` once the connection carried a delivery with a valid signature.
    is_trusted: AtomicBool,
    /// `true` if the body in progress has to be dropped to free memory.
    is_body_shed: AtomicBool,
    /// `true` once a request head was complete on this connection.
    has_begun: AtomicBool,
    /// `true` if the first request head was complete only after the server started to stop.
    was_waiting_at_stop: AtomicBool,
    waker: AtomicWaker,
    shared: Arc<Shared>,
}

/// Reports from the connection itself.
/// State that all connections of a listener share.
pub struct Shared {
    pub(super) started: Instant,
    pub(super) limit: usize,
    /// Bytes of request bodies in memory, without those of shed bodies.
    pub(super) buffered_bytes: AtomicUsize,
    pub(super) body_budget: usize,
    pub(super) table: Mutex<ConnectionTable>,
    pub(super) released: Notify,
}

/// The open connections of a listener, by number.
#[derive(Default)]
pub struct ConnectionTable {
    pub(super) next_number: u64,
    pub(super) connections: HashMap<u64, Arc<ConnectionState>>,
}

impl ConnectionState {
    pub fn new(shared: Arc<Shared>) -> ConnectionState {
        let connection = ConnectionState {
            since_and_activity: AtomicU64::new(0),
            buffered_bytes: AtomicUsize::new(0),
            is_input_drained: AtomicBool::new(false),
            close_request: AtomicU8::new(CloseRequest::Nothing as u8),
            is_trusted: AtomicBool::new(false),
            is_body_shed: AtomicBool::new(false),
            has_begun: AtomicBool::new(false),
            was_waiting_at_stop: AtomicBool::new(false),
            waker: AtomicWaker::new(),
            shared,
        };

        connection.enter(Activity::New);
        connection
    }

    /// Records that no unread bytes are left from the peer.
    pub fn set_idle(&self) {
        self.is_input_drained.store(true, Ordering::Relaxed);
    }

    /// Records that bytes arrived from the peer.
    pub fn set_receiving(&self) {
        self.is_input_drained.store(false, Ordering::Relaxed);
        if matches!(
            self.activity(),
            Activity::New | Activity::Idle | Activity::WriteBlocked
        ) {
            self.enter(Activity::ReadingHead);
        }
    }

    /// Records that the head of a request is complete and a body follows.
    pub fn set_reading_body(&self) {
        self.is_body_shed.store(false, Ordering::Relaxed);
        self.enter(Activity::ReadingBody);
    }

    /// Counts bytes of a body that are now in memory.
    pub fn add_buffered(&self, bytes: usize) {
        self.buffered_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.shared.add_buffered(bytes);
    }

    /// Records that the request is complete.
    pub fn set_busy(&self) {
        self.enter(Activity::Busy);
    }

    /// Records that the request is done and its response is being sent.
    pub fn set_responded(&self) {
        self.release_buffered();
        self.enter(if self.is_reading_body() {
            Activity::Lingering
        } else {
            Activity::Idle
        });
    }

    /// Records that the peer does not read its response.
    pub fn set_write_blocked(&self) {
        if self.activity() == Activity::Idle {
            self.enter(Activity::WriteBlocked);
        }
    }

    /// Records that the connection carried a delivery with a valid signature.
    pub fn set_trusted(&self) {
        self.is_trusted.store(true, Ordering::Relaxed);
    }

    /// Records that a request head is complete. If it is the first one and the server is stopping,
    /// the connection was in the accept queue, or had just been accepted, when the stop began.
    pub fn begin_request(&self, is_stopping: bool) {
        let has_begun = self.has_begun.swap(true, Ordering::Relaxed);
        if !has_begun && is_stopping {
            self.was_waiting_at_stop.store(true, Ordering::Relaxed);
        }
    }
}

/// Requests to the connection, and its state for other tasks.
impl ConnectionState {
    /// Sets the task to wake when the connection receives an instruction.
    pub fn register_waker(&self, waker: &Waker) {
        self.waker.register(waker);
    }

    pub fn wake(&self) {
        self.waker.wake();
    }

    /// Returns the instruction that the connection has to follow now.
    pub fn close_request(&self) -> CloseRequest {
        match self.close_request.load(Ordering::Relaxed) {
            0 => CloseRequest::Nothing,
            1 if self.waits_for_peer() => CloseRequest::Abort,
            1 => CloseRequest::Close,
            _ => CloseRequest::Abort,
        }
    }

    pub fn request_close(&self) {
        self.close_request
            .store(CloseRequest::Close as u8, Ordering::Relaxed);
        self.waker.wake();
    }

    pub fn is_closing(&self) -> bool {
        self.close_request.load(Ordering::Relaxed) != CloseRequest::Nothing as u8
    }

    /// Drops the body in progress, so that its memory is free for others. The handler answers 503.
    pub fn shed_body(&self) {
        self.is_body_shed.store(true, Ordering::Relaxed);
        self.release_buffered();
        self.waker.wake();
    }

    pub fn is_body_shed(&self) -> bool {
        self.is_body_shed.load(Ordering::Relaxed)
    }

    /// Returns whether a request body is arriving. If the request times out now, the peer was too
    /// slow.
    pub fn is_reading_body(&self) -> bool {
        self.activity() == Activity::ReadingBody
    }

    /// Returns whether the peer may still be sending a body that nobody reads.
    pub fn is_lingering(&self) -> bool {
        self.activity() == Activity::Lingering
    }

    /// Returns whether the peer has not sent a byte yet and connected less than `grace_ms` ago.
    pub fn is_new_within(&self, grace_ms: u64) -> bool {
        self.activity() == Activity::New
            && self.shared.now_ms().saturating_sub(self.since_ms()) < grace_ms
    }

    pub fn is_trusted(&self) -> bool {
        self.is_trusted.load(Ordering::Relaxed)
    }

    /// Returns whether the server kept the first request of this connection waiting until the stop.
    pub fn was_waiting_at_stop(&self) -> bool {
        self.was_waiting_at_stop.load(Ordering::Relaxed)
    }

    /// Returns the position in the eviction order, or `None` if the connection must not be evicted:
    /// either the server still owes it a response, or it is already closing.
    pub fn eviction_rank(&self, now_ms: u64) -> Option<EvictionRank> {
        let since_ms = self.since_ms();
        let suspicion = match self.activity() {
            _ if self.is_closing() => return None,
            Activity::Busy => return None,
            Activity::ReadingHead if now_ms.saturating_sub(since_ms) > SLOW_HEAD_MS => {
                Suspicion::SlowHead
            }
            Activity::New | Activity::Idle => Suspicion::Unused,
            Activity::ReadingHead
            | Activity::ReadingBody
            | Activity::WriteBlocked
            | Activity::Lingering => Suspicion::InProgress,
        };

        Some(EvictionRank {
            is_trusted: self.is_trusted(),
            suspicion,
            since_ms,
        })
    }

    /// Returns when the current activity began, in milliseconds since the listener started.
    pub fn since_ms(&self) -> u64 {
        self.since_and_activity.load(Ordering::Relaxed) >> ACTIVITY_BITS
    }

    pub fn activity(&self) -> Activity {
        match self.since_and_activity.load(Ordering::Relaxed) & ((1 << ACTIVITY_BITS) - 1) {
            0 => Activity::New,
            1 => Activity::Idle,
            2 => Activity::ReadingHead,
            3 => Activity::ReadingBody,
            4 => Activity::Busy,
            5 => Activity::WriteBlocked,
            _ => Activity::Lingering,
        }
    }

    pub fn buffered_bytes(&self) -> usize {
        self.buffered_bytes.load(Ordering::Relaxed)
    }

    pub fn release_buffered(&self) {
        let bytes = self.buffered_bytes.swap(0, Ordering::Relaxed);
        self.shared.release_buffered(bytes);
    }

    fn waits_for_peer(&self) -> bool {
        match self.activity() {
            Activity::Busy => false,
            Activity::WriteBlocked => true,
            // If bytes have arrived that the server has not read, the server is the slow side.
            Activity::New
            | Activity::Idle
            | Activity::ReadingHead
            | Activity::ReadingBody
            | Activity::Lingering => self.is_input_drained.load(Ordering::Relaxed),
        }
    }

    fn enter(&self, activity: Activity) {
        let since = self.shared.now_ms() << ACTIVITY_BITS;
        self.since_and_activity
            .store(since | activity as u64, Ordering::Relaxed);
    }

    #[cfg(test)]
    pub fn make_older_ms(&self, by_ms: u64) {
        self.since_and_activity
            .fetch_sub(by_ms << ACTIVITY_BITS, Ordering::Relaxed);
    }
}

impl Shared {
    pub(super) fn table(&self) -> MutexGuard<'_, ConnectionTable> {
        // No code panics while it holds the lock, and the map would stay valid if it did.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Milliseconds since the listener started.
    pub fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Counts bytes of a body. If the budget is exceeded, sheds a body.
    pub fn add_buffered(&self, bytes: usize) {
        let before = self.buffered_bytes.fetch_add(bytes, Ordering::Relaxed);
        if before + bytes > self.body_budget {
            self.shed_one_body();
        }
    }

    /// Releases bytes of a body that are no longer in memory.
    pub fn release_buffered(&self, bytes: usize) {
        self.buffered_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Sheds the oldest body that is larger than its share of the budget, untrusted peers first.
    /// Its request is answered 503. A body within its share is never shed.
    fn shed_one_body(&self) {
        let share = self.body_budget / self.limit;
        let table = self.table();
        let larger = table.connections.values().filter(|connection| {
            connection.is_reading_body()
                && !connection.is_body_shed()
                && connection.buffered_bytes() > share
        });

        if let Some(connection) =
            larger.min_by_key(|connection| (connection.is_trusted(), connection.since_ms()))
        {
            connection.shed_body();
        }
    }
}
