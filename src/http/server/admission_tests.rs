//! Tests of the eviction order, the timeouts and the body budget.

use std::sync::atomic::Ordering;

use super::super::connection::CloseRequest;
use super::*;

/// Age of the limiter in these tests, so that connections can be made older than it.
const AGE: Duration = Duration::from_secs(1000);

fn limiter(limit: usize, body_budget: usize) -> ConnectionLimiter {
    let mut limiter = ConnectionLimiter::with_body_budget(limit, body_budget);
    let shared = Arc::get_mut(&mut limiter.0).unwrap();
    shared.started = Instant::now().checked_sub(AGE).unwrap();
    limiter
}

/// Opens connections whose peers are silent.
fn connect<const N: usize>(limiter: &ConnectionLimiter) -> [Permit; N] {
    std::array::from_fn(|_| {
        let permit = limiter.try_acquire().unwrap();
        permit.connection.set_idle();
        permit
    })
}

/// Spaces the connections 10 ms apart. The first one becomes the oldest.
fn space_out(permits: &[&Permit]) {
    for (position, permit) in permits.iter().rev().enumerate() {
        permit.connection.make_older_ms(10 * position as u64);
    }
}

/// Returns the positions of the connections in the order of their eviction. Busy ones are absent.
fn eviction_order(limiter: &ConnectionLimiter, permits: &[&Permit]) -> Vec<usize> {
    let mut order = Vec::new();
    for _ in 0..=permits.len() {
        limiter.evict_one();
        let evicted = (0..permits.len())
            .filter(|n| permits[*n].connection.close_request() == CloseRequest::Abort);
        let new: Vec<usize> = evicted.filter(|n| !order.contains(n)).collect();
        order.extend(new);
    }
    order
}

#[test]
fn eviction_prefers_idle_then_slowest_never_busy() {
    let limiter = limiter(6, 100);
    let permits: [Permit; 6] = connect(&limiter);
    assert!(limiter.try_acquire().is_none());

    let [busy, body, head, blocked, new, idle] = &permits;
    busy.connection.set_busy();
    body.connection.set_reading_body();
    head.connection.set_receiving();
    head.connection.set_idle();
    blocked.connection.set_responded();
    blocked.connection.set_write_blocked();
    idle.connection.set_responded();
    let all: Vec<&Permit> = permits.iter().collect();
    space_out(&all);

    assert_eq!(eviction_order(&limiter, &all), [4, 5, 1, 2, 3]);
    assert_eq!(new.connection.close_request(), CloseRequest::Abort);
    assert_eq!(busy.connection.close_request(), CloseRequest::Nothing);
}

#[test]
fn slow_head_is_evicted_first_and_trusted_last() {
    let limiter = limiter(6, 100);
    let permits: [Permit; 6] = connect(&limiter);
    let [trusted_idle, trusted_head, idle, young_head, slow, slower] = &permits;
    for head in [trusted_head, young_head, slow, slower] {
        head.connection.set_receiving();
        head.connection.set_idle();
    }
    for trusted in [trusted_idle, trusted_head] {
        trusted.connection.set_trusted();
    }
    trusted_idle.connection.make_older_ms(60_000);
    trusted_head.connection.make_older_ms(9_000);
    idle.connection.make_older_ms(50_000);
    young_head.connection.make_older_ms(900);
    slow.connection.make_older_ms(1_100);
    slower.connection.make_older_ms(1_200);

    let all: Vec<&Permit> = permits.iter().collect();
    assert_eq!(eviction_order(&limiter, &all), [5, 4, 2, 3, 1, 0]);
}

#[test]
fn buffered_request_is_answered_before_close() {
    let limiter = limiter(1, 100);
    let [permit] = connect(&limiter);
    limiter.evict_one();
    permit.connection.set_receiving();
    assert_eq!(
        permit.connection.close_request(),
        CloseRequest::Close,
        "its request has arrived, so the peer is not the slow side"
    );

    permit.connection.set_busy();
    permit.connection.set_idle();
    assert_eq!(permit.connection.close_request(), CloseRequest::Close);

    permit.connection.set_responded();
    assert_eq!(permit.connection.close_request(), CloseRequest::Abort);
    drop(permit);
    assert!(limiter.try_acquire().is_some());
}

#[test]
fn oldest_body_above_share_is_shed() {
    let limiter = limiter(4, 100);
    let [busy, small, first, second] = connect(&limiter);
    let all = [&busy, &small, &first, &second];
    let shed = || all.map(|permit| permit.connection.is_body_shed());
    for permit in all {
        permit.connection.set_reading_body();
        permit.connection.set_receiving();
    }
    space_out(&all);

    busy.connection.add_buffered(30);
    busy.connection.set_busy();
    small.connection.add_buffered(25);
    first.connection.add_buffered(26);
    assert_eq!(shed(), [false; 4]);

    second.connection.add_buffered(30);
    assert_eq!(shed(), [false, false, true, false]);
    assert_eq!(
        first.connection.close_request(),
        CloseRequest::Nothing,
        "a request whose body is shed is answered, not reset"
    );
    assert_eq!(
        limiter.0.buffered_bytes.load(Ordering::Relaxed),
        85,
        "a shed body no longer counts"
    );

    second.connection.add_buffered(20);
    assert_eq!(shed(), [false, false, true, true]);
    busy.connection.add_buffered(100);
    assert_eq!(
        shed(),
        [false, false, true, true],
        "no other body exceeds its share"
    );

    first.connection.set_responded();
    first.connection.set_reading_body();
    assert!(
        !first.connection.is_body_shed(),
        "the next body is not shed yet"
    );

    drop((busy, small, first, second));
    assert_eq!(limiter.0.buffered_bytes.load(Ordering::Relaxed), 0);
}

#[test]
fn body_of_trusted_connection_is_shed_last() {
    let limiter = limiter(2, 100);
    let [trusted, other] = connect(&limiter);
    trusted.connection.set_trusted();
    for permit in [&trusted, &other] {
        permit.connection.set_reading_body();
    }
    space_out(&[&trusted, &other]);

    trusted.connection.add_buffered(60);
    other.connection.add_buffered(60);
    assert!(other.connection.is_body_shed() && !trusted.connection.is_body_shed());
}

#[test]
fn each_activity_has_its_timeout() {
    let limiter = limiter(10, 100);
    let [new, head, body, busy, blocked, lingering] = connect(&limiter);
    head.connection.set_receiving();
    body.connection.set_reading_body();
    busy.connection.set_busy();
    blocked.connection.set_responded();
    blocked.connection.set_write_blocked();
    lingering.connection.set_reading_body();
    lingering.connection.set_responded();

    let all = [&new, &head, &body, &busy, &blocked, &lingering];
    let closing = |later_s: u64| {
        for permit in all {
            permit.connection.make_older_ms(later_s * 1000);
        }
        limiter.close_overdue();
        all.map(|permit| permit.connection.is_closing())
    };
    assert_eq!(closing(1), [false; 6]);
    assert_eq!(closing(2), [false, false, false, false, false, true]);
    assert_eq!(closing(8), [false, true, false, false, false, true]);
    assert_eq!(closing(50), [false, true, false, false, true, true]);
    assert_eq!(closing(15), [true, true, false, false, true, true]);
}
