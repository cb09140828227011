//! The places of a listener: one for each connection, and who gives way when there are too few.
//!
//! Whoever comes is let in. When all places are taken, the connection gives way that has waited longest for its peer: first
//! those between two requests, then those whose peer still owes the rest of a head or of a body, or does not take its answer. So
//! connections that are opened and left alone, or fed slowly, hold nobody out. A request that is being worked on never gives way.
//!
//! In the same way bodies share the memory for bodies. There are no shares by peer: behind a load balancer all is one peer.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

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

/// What a connection is about. Kept in an atomic beside the time since when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
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

/// All places of a listener; cheap to clone.
#[derive(Clone)]
pub struct Places(Arc<Shared>);

struct Shared {
    started: Instant,
    limit: usize,
    /// Bytes of bodies, of all connections that were not told to go.
    bodies: AtomicUsize,
    bodies_limit: usize,
    taken: Mutex<Taken>,
    freed: Notify,
}

#[derive(Default)]
struct Taken {
    next: u64,
    places: HashMap<u64, Arc<Place>>,
}

/// The place of one connection.
pub struct Place {
    /// Milliseconds since the listener started, and the phase in the lowest three bits.
    since_and_phase: AtomicU64,
    /// Bytes of the body that is being read or worked on.
    body: AtomicUsize,
    told_to_go: AtomicBool,
    told: Notify,
    shared: Arc<Shared>,
}

/// A place, as long as it is held.
pub struct Held {
    number: u64,
    pub place: Arc<Place>,
}

impl Places {
    pub fn new(limit: usize) -> Places {
        Places::with(limit, BODIES_LIMIT)
    }

    fn with(limit: usize, bodies_limit: usize) -> Places {
        let (bodies, taken, freed) = (AtomicUsize::new(0), Mutex::default(), Notify::new());
        Places(Arc::new(Shared { started: Instant::now(), limit, bodies, bodies_limit, taken, freed }))
    }

    /// A place for a newcomer. When all are taken, one is made free, or this waits until one is.
    pub async fn take(&self) -> Held {
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

    fn try_take(&self) -> Option<Held> {
        let mut taken = self.0.taken();
        if taken.places.len() >= self.0.limit {
            return None;
        }
        let place = Arc::new(Place {
            since_and_phase: AtomicU64::new(0),
            body: AtomicUsize::new(0),
            told_to_go: AtomicBool::new(false),
            told: Notify::new(),
            shared: self.0.clone(),
        });
        place.enter(Phase::Idle);
        let number = taken.next;
        taken.next += 1;
        taken.places.insert(number, place.clone());
        Some(Held { number, place })
    }

    /// Tells the connection to go that has waited longest for its peer.
    pub fn free_one(&self) {
        let taken = self.0.taken();
        let waiting = taken.places.values().filter(|place| place.is_waiting() && !place.is_told());
        if let Some(place) = waiting.min_by_key(|place| (place.phase() != Phase::Idle, place.since_ms())) {
            place.tell();
        }
    }

    /// Tells those to go whose time is over. To be called every second or so.
    pub fn end_overdue(&self) {
        let now_ms = self.0.now_ms();
        let limit_ms = |phase| match phase {
            Phase::Idle => Some(IDLE_TIMEOUT.as_millis() as u64),
            Phase::Head => Some(HEAD_TIMEOUT.as_millis() as u64),
            Phase::Stalled => Some(ANSWER_TIMEOUT.as_millis() as u64),
            Phase::Leaving => Some(LEAVE_TIMEOUT.as_millis() as u64),
            // Requests have a time limit of their own, bodies included.
            Phase::Body | Phase::Working => None,
        };
        let taken = self.0.taken();
        let is_overdue =
            |place: &Place| limit_ms(place.phase()).is_some_and(|limit_ms| now_ms.saturating_sub(place.since_ms()) > limit_ms);
        taken.places.values().filter(|place| is_overdue(place) && !place.is_told()).for_each(|place| place.tell());
    }

    /// Wakes every connection: see [`Place::told`].
    pub fn wake_all(&self) {
        self.0.taken().places.values().for_each(|place| place.told.notify_one());
    }
}

impl Shared {
    fn taken(&self) -> MutexGuard<'_, Taken> {
        // Nothing panics while it holds the lock, and the map would still be whole.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// Tells the longest-read of the larger bodies to go. A body within its share of the memory never has to.
    fn free_a_body(&self) {
        let share = self.bodies_limit / self.limit;
        let taken = self.taken();
        let reading = taken.places.values().filter(|place| place.phase() == Phase::Body && !place.is_told());
        let larger = reading.filter(|place| place.body.load(Ordering::Relaxed) > share);
        if let Some(place) = larger.min_by_key(|place| place.since_ms()) {
            place.tell();
        }
    }
}

/// What a connection reports of itself.
impl Place {
    /// Bytes came from the peer.
    pub fn heard(&self) {
        if matches!(self.phase(), Phase::Idle | Phase::Stalled) {
            self.enter(Phase::Head);
        }
    }

    /// The head of a request is there, and a body is to follow.
    pub fn reads_body(&self) {
        self.enter(Phase::Body);
    }

    /// Takes memory for a part of a body.
    pub fn holds(&self, bytes: usize) {
        self.body.fetch_add(bytes, Ordering::Relaxed);
        let before = self.shared.bodies.fetch_add(bytes, Ordering::Relaxed);
        if before + bytes > self.shared.bodies_limit {
            self.shared.free_a_body();
        }
    }

    /// The request is there in whole.
    pub fn works(&self) {
        self.enter(Phase::Working);
    }

    /// The request is done with, its body too; the answer goes out.
    pub fn answers(&self) {
        self.forget_body();
        self.enter(if self.is_reading_body() { Phase::Leaving } else { Phase::Idle });
    }

    /// The peer does not take what it is sent.
    pub fn stalls(&self) {
        if self.phase() == Phase::Idle {
            self.enter(Phase::Stalled);
        }
    }
}

impl Place {
    /// Returns when the connection was told to go, or when all were woken.
    pub async fn told(&self) {
        self.told.notified().await;
    }

    /// Whether it was told to go, and still waits for its peer: then it ends at once. Otherwise a request came in time.
    pub fn has_to_go(&self) -> bool {
        self.told_to_go.swap(false, Ordering::Relaxed) && self.is_waiting()
    }

    /// A body is under way: it has not come in time when the time is over.
    pub fn is_reading_body(&self) -> bool {
        self.phase() == Phase::Body
    }

    /// The peer may still be sending.
    pub fn is_leaving(&self) -> bool {
        self.phase() == Phase::Leaving
    }

    fn tell(&self) {
        self.told_to_go.store(true, Ordering::Relaxed);
        self.forget_body();
        self.told.notify_one();
    }

    fn is_told(&self) -> bool {
        self.told_to_go.load(Ordering::Relaxed)
    }

    fn is_waiting(&self) -> bool {
        self.phase() != Phase::Working
    }

    fn forget_body(&self) {
        self.shared.bodies.fetch_sub(self.body.swap(0, Ordering::Relaxed), Ordering::Relaxed);
    }

    fn enter(&self, phase: Phase) {
        self.since_and_phase.store(self.shared.now_ms() << 3 | phase as u64, Ordering::Relaxed);
    }

    fn since_ms(&self) -> u64 {
        self.since_and_phase.load(Ordering::Relaxed) >> 3
    }

    fn phase(&self) -> Phase {
        match self.since_and_phase.load(Ordering::Relaxed) & 7 {
            0 => Phase::Idle,
            1 => Phase::Head,
            2 => Phase::Body,
            3 => Phase::Working,
            4 => Phase::Stalled,
            _ => Phase::Leaving,
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.place.forget_body();
        self.place.shared.taken().places.remove(&self.number);
        self.place.shared.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Later by the clock of the places.
    fn wait() {
        std::thread::sleep(Duration::from_millis(2));
    }

    fn taken<const N: usize>(places: &Places) -> [Held; N] {
        std::array::from_fn(|_| {
            wait();
            places.try_take().unwrap()
        })
    }

    #[test]
    fn the_longest_idle_goes_first_then_who_owes_something_longest_and_never_who_is_worked_for() {
        let places = Places::with(5, 100);
        let held: [Held; 5] = taken(&places);
        assert!(places.try_take().is_none());
        let [works, reads_head, reads_body, stalls, _idle] = &held;
        works.place.works();
        reads_body.place.reads_body();
        wait();
        reads_head.place.heard();
        wait();
        stalls.place.stalls();
        let mut order = Vec::new();
        for _ in 0..6 {
            places.free_one();
            order.extend(held.iter().position(|held| held.place.is_told()));
            held.iter().filter(|held| held.place.has_to_go()).for_each(|held| held.place.works());
        }
        assert_eq!(order, [4, 2, 1, 3]);
    }

    #[test]
    fn a_request_that_came_in_time_is_worked_on() {
        let places = Places::with(1, 100);
        let [held] = taken(&places);
        places.free_one();
        held.place.works();
        assert!(!held.place.has_to_go());
        held.place.answers();
        assert!(!held.place.has_to_go(), "it is told once");
        drop(held);
        assert!(places.try_take().is_some());
    }

    #[test]
    fn when_bodies_are_too_many_the_longest_read_goes_but_none_within_its_share() {
        let places = Places::with(4, 100);
        let [works, small, first, second] = taken(&places);
        let told = |held: [&Held; 4]| held.map(|held| held.place.is_told());
        for held in [&works, &small, &first, &second] {
            held.place.reads_body();
            wait();
        }
        works.place.holds(30);
        works.place.works();
        small.place.holds(25);
        first.place.holds(26);
        assert_eq!(told([&works, &small, &first, &second]), [false; 4]);
        second.place.holds(30);
        assert_eq!(told([&works, &small, &first, &second]), [false, false, true, false]);
        assert_eq!(places.0.bodies.load(Ordering::Relaxed), 85, "what is to go counts no more");
        second.place.holds(20);
        assert_eq!(told([&works, &small, &first, &second]), [false, false, true, true]);
        works.place.holds(100);
        assert_eq!(told([&works, &small, &first, &second]), [false, false, true, true], "there is nobody else to ask");
        drop((works, small, first, second));
        assert_eq!(places.0.bodies.load(Ordering::Relaxed), 0);
    }
}
