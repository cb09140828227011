//! Repeats one small story with a crash at each possible point: wherever the program waits, and in
//! the middle of a statement.

use stripe_reconciler::reconcile::{Extent, Plan, WriteMode};

use super::ending::{calm_down, check_truth, read_all};
use super::rounds::{ROUNDS, rounds};
use super::script::Script;
use super::simulation::{CONCURRENT, Simulation, Trace, quiet};
use super::work::{End, Work};
use testkit::Engine;
use testkit::stripe::Faults;

/// Number of crashes in a short run. A reconcile run has about 300 crash points.
const CRASHES: usize = 12;
const MAX_GAP: usize = 48;
/// Number of consecutive completed runs after which no crash point is left.
///
/// The number of waits varies slightly, because a database may answer before the program waits for
/// it.
const COMPLETED_IN_A_ROW: usize = 3;

/// Creates two invoices with most of their deliveries still queued.
fn story(engine: Engine) -> Simulation {
    let script = Script {
        seed: 7,
        invoices: 2,
        steps: Vec::new(),
        is_watched: false,
    };
    let mut simulation = Simulation::new(engine, &script, Trace::default());
    let mut random = quiet();
    for _ in 0..14 {
        simulation.live(&mut random);
    }

    simulation.store_invoice(0, End::Whole, &mut random);
    simulation
}

/// Crashes after this many waits. Returns whether the work completed before.
fn crash_after(engine: Engine, waits: usize, plan: Option<Plan>) -> bool {
    let mut simulation = story(engine);
    let mut random = quiet();
    let deliveries = simulation.delivery.take(&mut random, CONCURRENT);
    let done = simulation.run_concurrently(
        Work {
            deliveries,
            plan,
            end: End::Crash(waits),
            is_watched: false,
        },
        &mut random,
    );
    calm_down(&mut simulation, 1);
    let histories = read_all(&mut simulation);

    check_truth(&simulation, &histories);
    done.is_whole
}

fn crash_at_every_point(engine: Engine, plan: Option<Plan>) {
    let (mut waits, mut completed) = (0, 0);
    while completed < COMPLETED_IN_A_ROW {
        completed = if crash_after(engine, waits, plan) {
            completed + 1
        } else {
            0
        };
        waits += 1;
    }

    println!("{} moments", waits - COMPLETED_IN_A_ROW);
    assert!(waits > COMPLETED_IN_A_ROW, "it waits for the disk");
}

/// Crashes at every point in a long run and at some in a short one.
fn crash_at_points_of_a_run(engine: Engine) {
    let plan = Some(Plan {
        extent: Extent::All,
        mode: WriteMode::Save,
        since_s: None,
    });
    if rounds() > ROUNDS {
        return crash_at_every_point(engine, plan);
    }

    let mut waits = 0;
    for _ in 0..CRASHES {
        waits += rand::random_range(1..MAX_GAP);
        println!("after {waits} waits");
        waits = if crash_after(engine, waits, plan) {
            0
        } else {
            waits
        };
    }
}

/// Makes deliveries and a run without disturbance, and checks the database at every point where a
/// crash could happen.
fn watch_every_point(engine: Engine) {
    let mut simulation = story(engine);
    let mut random = quiet();
    let plan = Some(Plan {
        extent: Extent::All,
        mode: WriteMode::Save,
        since_s: None,
    });
    let deliveries = simulation.delivery.take(&mut random, CONCURRENT);

    simulation.run_concurrently(
        Work {
            deliveries,
            plan,
            end: End::Whole,
            is_watched: true,
        },
        &mut random,
    );
}

/// Does the same for the objects of thin events before Stripe lists their twins.
fn watch_every_point_of_fetching(engine: Engine) {
    let mut simulation = story(engine);
    let mut random = quiet();
    simulation.delivery.queued.clear();
    for event in simulation
        .stripe
        .events()
        .iter()
        .filter(|event| event.generated)
    {
        simulation.delivery.post_thin(event, &mut random);
    }
    simulation.deliver_the_rest();
    simulation.stripe.set_faults(Faults {
        lagging: 1.0,
        ..Faults::default()
    });
    let plan = Some(Plan {
        extent: Extent::Due,
        mode: WriteMode::Save,
        since_s: None,
    });

    simulation.run_concurrently(
        Work {
            deliveries: Vec::new(),
            plan,
            end: End::Whole,
            is_watched: true,
        },
        &mut random,
    );
    let is_fetched = simulation
        .ledger
        .logged()
        .iter()
        .any(|identity| identity.starts_with("fetched"));

    assert!(is_fetched, "there was something to fetch");
}

#[test]
fn database_is_consistent_throughout_a_run_in_sqlite() {
    watch_every_point(Engine::Sqlite);
}

#[test]
fn database_is_consistent_throughout_a_run_in_postgres() {
    watch_every_point(Engine::Postgres);
}

#[test]
fn lookup_ends_only_once_its_object_is_durable_in_sqlite() {
    watch_every_point_of_fetching(Engine::Sqlite);
}

#[test]
fn lookup_ends_only_once_its_object_is_durable_in_postgres() {
    watch_every_point_of_fetching(Engine::Postgres);
}

#[test]
fn crash_at_any_point_of_deliveries_loses_nothing_in_sqlite() {
    crash_at_every_point(Engine::Sqlite, None);
}

#[test]
fn crash_at_any_point_of_deliveries_loses_nothing_in_postgres() {
    crash_at_every_point(Engine::Postgres, None);
}

#[test]
fn next_run_repairs_a_crash_at_any_point_of_a_run_in_sqlite() {
    crash_at_points_of_a_run(Engine::Sqlite);
}

#[test]
fn next_run_repairs_a_crash_at_any_point_of_a_run_in_postgres() {
    crash_at_points_of_a_run(Engine::Postgres);
}
