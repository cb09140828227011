//! The place of one connection: what it is about, since when, and what it is asked to do. The connection writes, the others read;
//! nothing is locked.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::task::Waker;

use futures_util::task::AtomicWaker;

use super::admission::Shared;

/// What a connection is about. Kept in an atomic beside the time since when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    /// Between two requests, or before the first.
    Idle,
    Head,
    Body,
    /// The request is there in whole, or nobody reads the rest of it: the peer waits for us.
    Working,
    /// The peer does not take its answer.
    Stalled,
    /// It was answered before its body was read to its end.
    Leaving,
}

/// What others want of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseRequest {
    Nothing,
    /// To end as soon as it has answered what has come.
    Close,
    /// To go now.
    Abort,
}

/// The place of one connection.
pub struct ConnectionState {
    /// Milliseconds since the listener started, and the phase in the lowest three bits.
    since_and_phase: AtomicU64,
    /// Bytes of the body that is being read or worked on.
    body: AtomicUsize,
    /// Nothing more has come than what was read.
    set_idle: AtomicBool,
    /// An [`CloseRequest`].
    asked: AtomicU8,
    waker: AtomicWaker,
    shared: Arc<Shared>,
}

/// What a connection reports of itself.
impl ConnectionState {
    pub fn new(shared: Arc<Shared>) -> ConnectionState {
        let place = ConnectionState {
            since_and_phase: AtomicU64::new(0),
            body: AtomicUsize::new(0),
            set_idle: AtomicBool::new(false),
            asked: AtomicU8::new(CloseRequest::Nothing as u8),
            waker: AtomicWaker::new(),
            shared,
        };
        place.enter(Activity::Idle);
        place
    }

    /// No bytes are there from the peer.
    pub fn set_idle(&self) {
        self.set_idle.store(true, Ordering::Relaxed);
    }

    /// Bytes came from the peer.
    pub fn heard(&self) {
        self.set_idle.store(false, Ordering::Relaxed);
        if matches!(self.phase(), Activity::Idle | Activity::Stalled) {
            self.enter(Activity::Head);
        }
    }

    /// The head of a request is there, and a body is to follow.
    pub fn reads_body(&self) {
        self.enter(Activity::Body);
    }

    /// Takes memory for a part of a body.
    pub fn holds(&self, bytes: usize) {
        self.body.fetch_add(bytes, Ordering::Relaxed);
        self.shared.holds(bytes);
    }

    /// The request is there in whole.
    pub fn works(&self) {
        self.enter(Activity::Working);
    }

    /// The request is done with, its body too; the answer goes out.
    pub fn answers(&self) {
        self.forget_body();
        self.enter(if self.is_reading_body() {
            Activity::Leaving
        } else {
            Activity::Idle
        });
    }

    /// The peer does not take what it is sent.
    pub fn stalls(&self) {
        if self.phase() == Activity::Idle {
            self.enter(Activity::Stalled);
        }
    }
}

/// What it is asked, and what others see of it.
impl ConnectionState {
    /// Who is to be woken when the connection is asked something.
    pub fn wakes(&self, waker: &Waker) {
        self.waker.register(waker);
    }

    /// What it is asked to do now.
    pub fn asked(&self) -> CloseRequest {
        match self.asked.load(Ordering::Relaxed) {
            0 => CloseRequest::Nothing,
            1 if self.waits_for_peer() => CloseRequest::Abort,
            1 => CloseRequest::Close,
            _ => CloseRequest::Abort,
        }
    }

    /// A body is under way: it has not come in time when the time is over.
    pub fn is_reading_body(&self) -> bool {
        self.phase() == Activity::Body
    }

    /// The peer may still be sending.
    pub fn is_leaving(&self) -> bool {
        self.phase() == Activity::Leaving
    }

    pub fn ask(&self, asked: CloseRequest) {
        self.asked.store(asked as u8, Ordering::Relaxed);
        self.waker.wake();
    }

    pub fn is_asked(&self) -> bool {
        self.asked.load(Ordering::Relaxed) != CloseRequest::Nothing as u8
    }

    fn waits_for_peer(&self) -> bool {
        match self.phase() {
            Activity::Working => false,
            Activity::Stalled => true,
            Activity::Idle | Activity::Head | Activity::Body | Activity::Leaving => {
                self.set_idle.load(Ordering::Relaxed)
            }
        }
    }

    pub fn forget_body(&self) {
        self.shared.forgets(self.body.swap(0, Ordering::Relaxed));
    }

    fn enter(&self, phase: Activity) {
        self.since_and_phase
            .store(self.shared.now_ms() << 3 | phase as u64, Ordering::Relaxed);
    }

    pub fn since_ms(&self) -> u64 {
        self.since_and_phase.load(Ordering::Relaxed) >> 3
    }

    pub fn phase(&self) -> Activity {
        match self.since_and_phase.load(Ordering::Relaxed) & 7 {
            0 => Activity::Idle,
            1 => Activity::Head,
            2 => Activity::Body,
            3 => Activity::Working,
            4 => Activity::Stalled,
            _ => Activity::Leaving,
        }
    }

    pub fn body_bytes(&self) -> usize {
        self.body.load(Ordering::Relaxed)
    }

    pub fn wake(&self) {
        self.waker.wake();
    }

    #[cfg(test)]
    pub fn make_older(&self, by_s: u64) {
        self.since_and_phase
            .fetch_sub((by_s * 1000) << 3, Ordering::Relaxed);
    }
}
