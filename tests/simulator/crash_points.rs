//! The same small story again and again, with a crash at one moment after the other: wherever the program waits for the world, and in
//! the middle of what it was told.

use stripe_reconciler::reconcile::{Extent, Plan, WriteMode};

use super::busy::{Busy, End};
use super::ending::{calm_down, check_truth, read_all};
use super::rounds::{ROUNDS, rounds};
use super::script::Script;
use super::world::{AT_ONCE, Trace, World, quiet};
use testkit::Engine;
use testkit::stripe::Troubles;

/// Moments of a pass at which it crashes in a short run: a pass has some 300.
const MOMENTS: usize = 12;
const APART: usize = 48;
/// The story has come to its end so often in a row: there are no more moments. How often it waits is not quite the same each time,
/// since a database may answer before anybody waits for it.
const OVER: usize = 3;

/// Two invoices, much of whose lives is still under way to the program.
fn story(engine: Engine) -> World {
    let script = Script {
        seed: 7,
        invoices: 2,
        steps: Vec::new(),
        is_watched: false,
    };
    let mut world = World::new(engine, &script, Trace::default());
    let mut random = quiet();
    for _ in 0..14 {
        world.live(&mut random);
    }
    world.store_invoice(0, End::Whole, &mut random);
    world
}

/// True: it was over before that.
fn crash_after(engine: Engine, waits: usize, plan: Option<Plan>) -> bool {
    let mut world = story(engine);
    let mut random = quiet();
    let parcels = world.delivery.take(&mut random, AT_ONCE);
    let done = world.make_busy(
        Busy {
            parcels,
            plan,
            end: End::Crash(waits),
            is_watched: false,
        },
        &mut random,
    );
    calm_down(&mut world, 1);
    let histories = read_all(&mut world);
    check_truth(&world, &histories);
    done.is_whole
}

fn crash_at_every_moment(engine: Engine, plan: Option<Plan>) {
    let (mut waits, mut over) = (0, 0);
    while over < OVER {
        over = if crash_after(engine, waits, plan) {
            over + 1
        } else {
            0
        };
        waits += 1;
    }
    println!("{} moments", waits - OVER);
    assert!(waits > OVER, "it waits for the disk");
}

/// At all moments in a long run, at some in a short one.
fn crash_at_moments_of_a_pass(engine: Engine) {
    let plan = Some(Plan {
        extent: Extent::All,
        mode: WriteMode::Save,
        since_s: None,
    });
    if rounds() > ROUNDS {
        return crash_at_every_moment(engine, plan);
    }
    let mut waits = 0;
    for _ in 0..MOMENTS {
        waits += rand::random_range(1..APART);
        println!("after {waits} waits");
        waits = if crash_after(engine, waits, plan) {
            0
        } else {
            waits
        };
    }
}

/// Deliveries, and a pass beside them, which nothing disturbs; at every moment, what is durable is what a crash would leave.
fn watch_every_moment(engine: Engine) {
    let mut world = story(engine);
    let mut random = quiet();
    let plan = Some(Plan {
        extent: Extent::All,
        mode: WriteMode::Save,
        since_s: None,
    });
    let parcels = world.delivery.take(&mut random, AT_ONCE);
    world.make_busy(
        Busy {
            parcels,
            plan,
            end: End::Whole,
            is_watched: true,
        },
        &mut random,
    );
}

/// The same of what thin events point to, before Stripe lists their twins.
fn watch_every_moment_of_fetching(engine: Engine) {
    let mut world = story(engine);
    let mut random = quiet();
    world.delivery.under_way.clear();
    for event in world.stripe.events().iter().filter(|event| event.generated) {
        world.delivery.post_thin(event, &mut random);
    }
    world.deliver_the_rest();
    world.stripe.trouble(Troubles {
        lagging: 1.0,
        ..Troubles::default()
    });
    let plan = Some(Plan {
        extent: Extent::Due,
        mode: WriteMode::Save,
        since_s: None,
    });
    world.make_busy(
        Busy {
            parcels: Vec::new(),
            plan,
            end: End::Whole,
            is_watched: true,
        },
        &mut random,
    );
    let is_fetched = world
        .ledger
        .logged()
        .iter()
        .any(|identity| identity.starts_with("fetched"));
    assert!(is_fetched, "there was something to fetch");
}

#[test]
fn at_every_moment_of_a_pass_what_is_durable_is_whole_in_sqlite() {
    watch_every_moment(Engine::Sqlite);
}

#[test]
fn at_every_moment_of_a_pass_what_is_durable_is_whole_in_postgres() {
    watch_every_moment(Engine::Postgres);
}

#[test]
fn a_thin_event_is_crossed_off_when_its_object_is_durable_in_sqlite() {
    watch_every_moment_of_fetching(Engine::Sqlite);
}

#[test]
fn a_thin_event_is_crossed_off_when_its_object_is_durable_in_postgres() {
    watch_every_moment_of_fetching(Engine::Postgres);
}

#[test]
fn a_crash_at_every_moment_of_deliveries_loses_nothing_in_sqlite() {
    crash_at_every_moment(Engine::Sqlite, None);
}

#[test]
fn a_crash_at_every_moment_of_deliveries_loses_nothing_in_postgres() {
    crash_at_every_moment(Engine::Postgres, None);
}

#[test]
fn a_crash_at_a_moment_of_a_pass_is_made_good_by_the_next_one_in_sqlite() {
    crash_at_moments_of_a_pass(Engine::Sqlite);
}

#[test]
fn a_crash_at_a_moment_of_a_pass_is_made_good_by_the_next_one_in_postgres() {
    crash_at_moments_of_a_pass(Engine::Postgres);
}
