//! The places of a listener: one for each connection, and who gives way when there are too few.
//!
//! Whoever comes is let in. When all places are taken, the connection gives way that has waited longest for its peer: first
//! those between two requests, then those whose peer still owes the rest of a head or of a body, or does not take its answer. So
//! connections that are opened and left alone, or fed slowly, hold nobody out. A request that is being worked on never gives way,
//! nor does one whose bytes have come and were not read yet: then it is we who are slow.
//!
//! In the same way bodies share the memory for bodies. There are no shares by peer: behind a load balancer all is one peer.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::connection::{Activity, CloseRequest, ConnectionState};

/// Bodies in memory at a time, in bytes, of all connections together.
const BODIES_LIMIT: usize = 64 * 1024 * 1024;
/// How long a connection may stand between two requests. Longer than the minute for which load balancers keep theirs: the
/// side that sends requests had better be the one that closes.
const IDLE_TIMEOUT: Duration = Duration::from_secs(75);
/// How long a head may take from its first byte.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a peer may take over an answer that did not fit on the way to it at once.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a peer may go on sending what nobody reads, so that it sees its answer.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(2);
/// How soon somebody else is asked to give way when nobody has.
const ASK_AGAIN: Duration = Duration::from_millis(50);

/// All places of a listener; cheap to clone.
#[derive(Clone)]
pub struct ConnectionLimiter(Arc<Shared>);

/// What all places have in common.
pub struct Shared {
    started: Instant,
    limit: usize,
    /// Bytes of bodies, of all connections that were not told to go.
    bodies: AtomicUsize,
    bodies_limit: usize,
    taken: Mutex<ConnectionTable>,
    freed: Notify,
}

#[derive(Default)]
struct ConnectionTable {
    next: u64,
    places: HashMap<u64, Arc<ConnectionState>>,
}

/// A place, as long as it is held.
pub struct Permit {
    number: u64,
    pub place: Arc<ConnectionState>,
    shared: Arc<Shared>,
}

impl ConnectionLimiter {
    pub fn new(limit: usize) -> ConnectionLimiter {
        ConnectionLimiter::with(limit, BODIES_LIMIT)
    }

    fn with(limit: usize, bodies_limit: usize) -> ConnectionLimiter {
        let (bodies, taken, freed) = (AtomicUsize::new(0), Mutex::default(), Notify::new());
        ConnectionLimiter(Arc::new(Shared {
            started: Instant::now(),
            limit,
            bodies,
            bodies_limit,
            taken,
            freed,
        }))
    }

    /// A place for a newcomer. When all are taken, one is made free, or this waits until one is.
    pub async fn take(&self) -> Permit {
        loop {
            let freed = self.0.freed.notified();
            if let Some(held) = self.try_take() {
                return held;
            }
            self.free_one();
            // All may be working, and whoever was asked may have begun to.
            let _ = tokio::time::timeout(ASK_AGAIN, freed).await;
        }
    }

    fn try_take(&self) -> Option<Permit> {
        let mut taken = self.0.taken();
        if taken.places.len() >= self.0.limit {
            return None;
        }
        let place = Arc::new(ConnectionState::new(self.0.clone()));
        let number = taken.next;
        taken.next += 1;
        taken.places.insert(number, place.clone());
        Some(Permit {
            number,
            place,
            shared: self.0.clone(),
        })
    }

    /// Asks the connection to end that has waited longest for its peer.
    pub fn free_one(&self) {
        let taken = self.0.taken();
        let waiting = taken
            .places
            .values()
            .filter(|place| place.phase() != Activity::Working && !place.is_asked());
        if let Some(place) =
            waiting.min_by_key(|place| (place.phase() != Activity::Idle, place.since_ms()))
        {
            place.ask(CloseRequest::Close);
        }
    }

    /// Asks those to end whose time is over. To be called every second or so.
    pub fn end_overdue(&self) {
        let now_ms = self.0.now_ms();
        let limit_ms = |phase| match phase {
            Activity::Idle => Some(IDLE_TIMEOUT.as_millis() as u64),
            Activity::Head => Some(HEAD_TIMEOUT.as_millis() as u64),
            Activity::Stalled => Some(ANSWER_TIMEOUT.as_millis() as u64),
            Activity::Leaving => Some(LEAVE_TIMEOUT.as_millis() as u64),
            // Requests have a time limit of their own, bodies included.
            Activity::Body | Activity::Working => None,
        };
        let taken = self.0.taken();
        let is_overdue = |place: &ConnectionState| {
            limit_ms(place.phase())
                .is_some_and(|limit_ms| now_ms.saturating_sub(place.since_ms()) > limit_ms)
        };
        taken
            .places
            .values()
            .filter(|place| is_overdue(place) && !place.is_asked())
            .for_each(|place| place.ask(CloseRequest::Close));
    }

    /// Wakes every connection, to look about.
    pub fn wake_all(&self) {
        self.0
            .taken()
            .places
            .values()
            .for_each(|place| place.wake());
    }
}

impl Shared {
    fn taken(&self) -> MutexGuard<'_, ConnectionTable> {
        // Nothing panics while it holds the lock, and the map would still be whole.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Milliseconds since the listener started.
    pub fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// Counts bytes of a body; when they are too many, one has to go.
    pub fn holds(&self, bytes: usize) {
        let before = self.bodies.fetch_add(bytes, Ordering::Relaxed);
        if before + bytes > self.bodies_limit {
            self.free_a_body();
        }
    }

    pub fn forgets(&self, bytes: usize) {
        self.bodies.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Asks the longest-read of the larger bodies to go. A body within its share of the memory never has to.
    fn free_a_body(&self) {
        let share = self.bodies_limit / self.limit;
        let taken = self.taken();
        let reading = taken.places.values().filter(|place| {
            place.phase() == Activity::Body && place.asked() != CloseRequest::Abort
        });
        let larger = reading.filter(|place| place.body_bytes() > share);
        if let Some(place) = larger.min_by_key(|place| place.since_ms()) {
            place.forget_body();
            place.ask(CloseRequest::Abort);
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.place.forget_body();
        self.shared.taken().places.remove(&self.number);
        self.shared.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Later by the clock of the places.
    fn wait() {
        std::thread::sleep(Duration::from_millis(2));
    }

    /// Places that are taken one after the other, and whose peers are silent.
    fn taken<const N: usize>(places: &ConnectionLimiter) -> [Permit; N] {
        std::array::from_fn(|_| {
            wait();
            let held = places.try_take().unwrap();
            held.place.set_idle();
            held
        })
    }

    #[test]
    fn the_longest_idle_goes_first_then_who_owes_something_longest_and_never_who_is_worked_for() {
        let places = ConnectionLimiter::with(5, 100);
        let held: [Permit; 5] = taken(&places);
        assert!(places.try_take().is_none());
        let [works, reads_head, reads_body, stalls, _idle] = &held;
        works.place.works();
        reads_body.place.reads_body();
        wait();
        reads_head.place.heard();
        reads_head.place.set_idle();
        wait();
        stalls.place.stalls();
        let mut order = Vec::new();
        for _ in 0..6 {
            places.free_one();
            order.extend(
                (0..5)
                    .filter(|n| held[*n].place.asked() == CloseRequest::Abort && !order.contains(n))
                    .collect::<Vec<_>>(),
            );
        }
        assert_eq!(order, [4, 2, 1, 3]);
        assert_eq!(works.place.asked(), CloseRequest::Nothing);
    }

    #[test]
    fn what_came_in_time_is_answered_first() {
        let places = ConnectionLimiter::with(1, 100);
        let [held] = taken(&places);
        places.free_one();
        held.place.heard();
        assert_eq!(
            held.place.asked(),
            CloseRequest::Close,
            "its bytes are there: it is not the peer who is slow"
        );
        held.place.works();
        held.place.set_idle();
        assert_eq!(held.place.asked(), CloseRequest::Close);
        held.place.answers();
        assert_eq!(held.place.asked(), CloseRequest::Abort);
        drop(held);
        assert!(places.try_take().is_some());
    }

    #[test]
    fn when_bodies_are_too_many_the_longest_read_goes_but_none_within_its_share() {
        let places = ConnectionLimiter::with(4, 100);
        let [works, small, first, second] = taken(&places);
        let gone = || {
            [&works, &small, &first, &second].map(|held| held.place.asked() == CloseRequest::Abort)
        };
        for held in [&works, &small, &first, &second] {
            held.place.reads_body();
            held.place.heard();
            wait();
        }
        works.place.holds(30);
        works.place.works();
        small.place.holds(25);
        first.place.holds(26);
        assert_eq!(gone(), [false; 4]);
        second.place.holds(30);
        assert_eq!(gone(), [false, false, true, false]);
        assert_eq!(
            places.0.bodies.load(Ordering::Relaxed),
            85,
            "what is to go counts no more"
        );
        second.place.holds(20);
        assert_eq!(gone(), [false, false, true, true]);
        works.place.holds(100);
        assert_eq!(
            gone(),
            [false, false, true, true],
            "there is nobody else to ask"
        );
        drop((works, small, first, second));
        assert_eq!(places.0.bodies.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn each_phase_has_its_time() {
        let mut places = ConnectionLimiter::with(10, 100);
        let age = Duration::from_secs(100);
        Arc::get_mut(&mut places.0).unwrap().started = Instant::now().checked_sub(age).unwrap();
        let [idle, head, body, works, stalled, leaving] = taken(&places);
        head.place.heard();
        body.place.reads_body();
        works.place.works();
        stalled.place.stalls();
        leaving.place.reads_body();
        leaving.place.answers();
        let all = [&idle, &head, &body, &works, &stalled, &leaving];
        let asked = |later_s: u64| {
            all.iter().for_each(|held| held.place.make_older(later_s));
            places.end_overdue();
            all.map(|held| held.place.is_asked())
        };
        assert_eq!(asked(1), [false; 6]);
        assert_eq!(asked(2), [false, false, false, false, false, true]);
        assert_eq!(asked(8), [false, true, false, false, false, true]);
        assert_eq!(asked(50), [false, true, false, false, true, true]);
        assert_eq!(asked(15), [true, true, false, false, true, true]);
    }
}
