//! How a round ends: the world is calm again, a pass is made, and what is shown then is what happened at Stripe; the same as if nothing
//! had been lost, and the same as from the log alone.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use stripe_reconciler::clock::Clock;
use stripe_reconciler::domain::stripe::event::EventKey;
use stripe_reconciler::ingest::{Delivery, ingest};
use stripe_reconciler::jobs::rebuild;
use stripe_reconciler::reconcile::{self, Extent, Plan, WriteMode};
use stripe_reconciler::store::Source;

use super::busy::End;
use super::process::{Process, Setup};
use super::reading::entries;
use super::script::Script;
use super::world::{KEY, Stored, Trace, World, database, make_key, quiet};
use testkit::stripe::DAY;
use testkit::{Engine, invoice_path};

/// `status.states` of each invoice, as they stand, by its uid.
pub type Histories = BTreeMap<String, String>;

/// A whole round on one engine. The histories that must be the same on every engine: which deliveries a crash took may differ.
pub fn round(engine: Engine, script: &Script, trace: Trace) -> Histories {
    let mut world = World::new(engine, script, trace);
    for step in &script.steps {
        world.step(*step);
    }
    calm_down(&mut world, script.seed);
    let histories = read_all(&mut world);
    check_truth(&world, &histories);
    check_log_alone(&world, &histories);
    check_undisturbed(&world, &histories);
    world.check_reads();
    check_rebuild(&world);
    alike(&world, histories)
}

/// Without those in which what is true is said more or less surely, by what was heard of it and how.
fn alike(world: &World, mut histories: Histories) -> Histories {
    for invoice in world
        .invoices
        .iter()
        .filter(|invoice| invoice.is_paid_outside())
    {
        histories.remove(&invoice.uid);
    }
    histories
}

/// Nothing is wrong any more; what was lost on the way is only at Stripe.
pub fn calm_down(world: &mut World, seed: u64) {
    world.configure(&mut quiet());
    world.set_clock_right();
    world.say("the world is calm again");
    let needs_account = world.invoices.iter().any(|invoice| invoice.is_connected());
    if !seed.is_multiple_of(2) || (needs_account && world.accounts_logged().is_empty()) {
        world.deliver_the_rest();
    }
    for n in 0..world.invoices.len() {
        world.store_invoice(n, End::Whole, &mut quiet());
    }
    // What the API lags behind, and whatever the program put off while its clock was wrong, is a matter of time.
    world.later(2 * DAY * 1000);
    if seed.is_multiple_of(3) && !world.has_lagged {
        let plan = Plan {
            extent: Extent::Due,
            mode: WriteMode::Save,
            since_s: None,
        };
        for _ in 0..3 {
            world.quiet_pass(plan);
            world.later(DAY * 500);
        }
    } else {
        check_healing(world);
    }
    let report = world.quiet_pass(Plan {
        extent: Extent::All,
        mode: WriteMode::Save,
        since_s: None,
    });
    assert!(
        !report.differs(),
        "a second pass right after: {}",
        report.to_json()
    );
    assert_eq!(
        report.agreeing.len(),
        world.invoices.len(),
        "{}",
        report.to_json()
    );
}

/// A pass says of all that it changes, and of nothing else, that it healed it.
fn check_healing(world: &mut World) {
    let before = read_all(world);
    let since_s = world.has_lagged.then_some(30 * DAY);
    let report = world.quiet_pass(Plan {
        extent: Extent::All,
        mode: WriteMode::Save,
        since_s,
    });
    world.later(60_000);
    let after = read_all(world);
    let changed: BTreeSet<&String> = after
        .keys()
        .filter(|uid| before[*uid] != after[*uid])
        .collect();
    let healed: BTreeSet<&String> = report
        .healed
        .iter()
        .map(|healed| &healed.invoice.invoice_uid)
        .collect();
    assert_eq!(healed, changed, "{}", report.to_json());
}

pub fn read_all(world: &mut World) -> Histories {
    let mut histories = Histories::new();
    for n in 0..world.invoices.len() {
        let states = world.read(n).expect("all are stored");
        histories.insert(world.invoices[n].uid.clone(), states.to_string());
    }
    assert!(world.stored.values().all(|stored| *stored == Stored::Yes));
    histories
}

pub fn check_truth(world: &World, histories: &Histories) {
    for invoice in &world.invoices {
        let truth: Vec<(String, i64)> = invoice
            .truth()
            .iter()
            .map(|entry| (entry.fact.state().to_owned(), entry.at))
            .collect();
        let states = &histories[&invoice.uid];
        let shown = entries(&serde_json::from_str(states).unwrap());
        assert_eq!(
            shown,
            truth,
            "{} is shown as {states}, and the truth is {:#?}",
            invoice.uid,
            invoice.truth()
        );
    }
}

/// The log alone, in the order of its keys, into an empty database: the same, byte for byte.
fn check_log_alone(world: &World, histories: &Histories) {
    let mut log: Vec<(EventKey, Vec<u8>)> = world
        .process()
        .durable()
        .log
        .into_iter()
        .map(|row| (row.logged.key, row.body.expect("nothing is pruned")))
        .collect();
    log.sort();
    let bodies = log.into_iter().map(|(_, body)| body).collect();
    assert_eq!(
        &replayed(world, bodies, false),
        histories,
        "what the log tells alone is not what is shown"
    );
}

/// Every event as Stripe delivers it, and a pass: the same, byte for byte.
fn check_undisturbed(world: &World, histories: &Histories) {
    let generated = world
        .stripe
        .events()
        .into_iter()
        .filter(|event| event.generated);
    let bodies = generated
        .map(|event| event.as_delivered().to_string().into_bytes())
        .collect();
    let undisturbed = replayed(world, bodies, true);
    assert_eq!(
        alike(world, histories.clone()),
        alike(world, undisturbed),
        "shown, and in an undisturbed run"
    );
}

/// What comes of these events and nothing else.
fn replayed(world: &World, bodies: Vec<Vec<u8>>, and_a_pass: bool) -> Histories {
    let database = database(Engine::Sqlite);
    let setup = Setup {
        database_url: &database.url,
        clock: &Clock::fixed(world.now_s() * 1000),
        secrets: "whsec_none",
        stripe_base: &world.stripe.base,
        replicas: 1,
    };
    let process = Process::start(&setup);
    let replica = process.replica(0);
    let histories = process.run(async {
        make_key(&replica.store).await;
        for body in bodies {
            let delivery = Delivery {
                body: body.into(),
                source: Source::Replay,
                secret_label: None,
                received_ms: 0,
            };
            ingest(&replica.inbox, delivery).await.unwrap();
        }
        let mut histories = Histories::new();
        for invoice in &world.invoices {
            replica
                .put(&invoice_path(&invoice.uid), KEY, &invoice.document())
                .await
                .with_status(201);
        }
        if and_a_pass {
            let plan = Plan {
                extent: Extent::All,
                mode: WriteMode::Save,
                since_s: None,
            };
            reconcile::run(&replica.tools(), plan).await.unwrap();
        }
        for invoice in &world.invoices {
            let stored: Value = replica
                .get(&invoice_path(&invoice.uid), KEY)
                .await
                .with_status(200)
                .json();
            histories.insert(invoice.uid.clone(), stored["status"]["states"].to_string());
        }
        histories
    });
    drop(replica);
    process.stop();
    histories
}

/// What is stored beside the bytes is what the bytes say.
fn check_rebuild(world: &World) {
    let replica = world.process().replica(0);
    let report = world
        .process()
        .run(rebuild::rebuild(
            &replica.store,
            rebuild::WriteMode::DryRun,
            |_| {},
        ))
        .unwrap();
    assert!(!report.differs(), "{report:#?}");
}
