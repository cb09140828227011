//! End of a round: faults stop, a run is made, and the histories equal what happened at Stripe,
//! what an undisturbed program shows, and what the log alone produces.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use stripe_reconciler::clock::Clock;
use stripe_reconciler::domain::stripe::event::EventKey;
use stripe_reconciler::ingest::{Delivery, ingest};
use stripe_reconciler::jobs::rebuild;
use stripe_reconciler::reconcile::{self, Extent, Plan, WriteMode};
use stripe_reconciler::store::Source;

use super::process::{Process, Setup};
use super::reading::entries;
use super::script::Script;
use super::simulation::{KEY, Simulation, Stored, Trace, database, make_key, quiet};
use super::work::End;
use testkit::stripe::DAY;
use testkit::{Engine, invoice_path};

/// `status.states` of each invoice as text, by uid.
pub type Histories = BTreeMap<String, String>;

/// Plays a round on one engine.
///
/// Returns the histories that must be equal on both engines: which deliveries a crash loses may
/// differ.
pub fn round(engine: Engine, script: &Script, trace: Trace) -> Histories {
    let mut simulation = Simulation::new(engine, script, trace);
    for step in &script.steps {
        simulation.step(*step);
    }

    calm_down(&mut simulation, script.seed);
    let histories = read_all(&mut simulation);
    check_truth(&simulation, &histories);
    check_log_alone(&simulation, &histories);
    check_undisturbed(&simulation, &histories);
    simulation.check_reads();
    check_rebuild(&simulation);
    alike(&simulation, histories)
}

/// Returns the histories without those whose certainty depends on which observations arrived.
fn alike(simulation: &Simulation, mut histories: Histories) -> Histories {
    for invoice in simulation
        .invoices
        .iter()
        .filter(|invoice| invoice.is_paid_outside())
    {
        histories.remove(&invoice.uid);
    }
    histories
}

/// Stops all faults. Lost deliveries remain available at Stripe only.
pub fn calm_down(simulation: &mut Simulation, seed: u64) {
    simulation.configure(&mut quiet());
    simulation.set_clock_right();
    simulation.trace_line("the world is calm again");
    let needs_account = simulation
        .invoices
        .iter()
        .any(super::invoice_lifecycle::Invoice::is_connected);
    if !seed.is_multiple_of(2) || (needs_account && simulation.accounts_logged().is_empty()) {
        simulation.deliver_the_rest();
    }

    for n in 0..simulation.invoices.len() {
        simulation.store_invoice(n, End::Whole, &mut quiet());
    }

    // Enough time for the API to catch up and for work that a skewed clock postponed.
    simulation.later(2 * DAY * 1000);
    if seed.is_multiple_of(3) && !simulation.has_lagged {
        let plan = Plan {
            extent: Extent::Due,
            mode: WriteMode::Save,
            since_s: None,
        };
        for _ in 0..3 {
            simulation.quiet_run(plan);
            simulation.later(DAY * 500);
        }
    } else {
        check_healing(simulation);
    }

    let report = simulation.quiet_run(Plan {
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
        simulation.invoices.len(),
        "{}",
        report.to_json()
    );
}

/// Asserts that a run reports exactly the changes that it makes as healed.
fn check_healing(simulation: &mut Simulation) {
    let before = read_all(simulation);
    let since_s = simulation.has_lagged.then_some(30 * DAY);
    let report = simulation.quiet_run(Plan {
        extent: Extent::All,
        mode: WriteMode::Save,
        since_s,
    });
    simulation.later(60_000);
    let after = read_all(simulation);
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

pub fn read_all(simulation: &mut Simulation) -> Histories {
    let mut histories = Histories::new();
    for n in 0..simulation.invoices.len() {
        let states = simulation.read(n).expect("all are stored");
        histories.insert(simulation.invoices[n].uid.clone(), states.to_string());
    }

    assert!(
        simulation
            .stored
            .values()
            .all(|stored| *stored == Stored::Yes)
    );

    histories
}

pub fn check_truth(simulation: &Simulation, histories: &Histories) {
    for invoice in &simulation.invoices {
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

/// Asserts that the log alone, replayed in key order into an empty database, gives the same
/// histories byte for byte.
fn check_log_alone(simulation: &Simulation, histories: &Histories) {
    let mut log: Vec<(EventKey, Vec<u8>)> = simulation
        .process()
        .durable()
        .log
        .into_iter()
        .map(|row| (row.logged.key, row.body.expect("nothing is pruned")))
        .collect();

    log.sort();
    let bodies = log.into_iter().map(|(_, body)| body).collect();
    assert_eq!(
        &replayed(simulation, bodies, false),
        histories,
        "what the log tells alone is not what is shown"
    );
}

/// Asserts that all events as delivered and one run give the same histories byte for byte.
fn check_undisturbed(simulation: &Simulation, histories: &Histories) {
    let generated = simulation
        .stripe
        .events()
        .into_iter()
        .filter(|event| event.generated);

    let bodies = generated
        .map(|event| event.as_delivered().to_string().into_bytes())
        .collect();
    let undisturbed = replayed(simulation, bodies, true);
    assert_eq!(
        alike(simulation, histories.clone()),
        alike(simulation, undisturbed),
        "shown, and in an undisturbed run"
    );
}

/// Returns the histories of exactly these events.
fn replayed(simulation: &Simulation, bodies: Vec<Vec<u8>>, and_a_pass: bool) -> Histories {
    let database = database(Engine::Sqlite);
    let setup = Setup {
        database_url: &database.url,
        clock: &Clock::fixed(simulation.now_s() * 1000),
        secrets: "whsec_none",
        stripe_base: &simulation.stripe.base,
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
        for invoice in &simulation.invoices {
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
        for invoice in &simulation.invoices {
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

/// Asserts that the stored observations equal those read from the bodies.
fn check_rebuild(simulation: &Simulation) {
    let replica = simulation.process().replica(0);
    let report = simulation
        .process()
        .run(rebuild::rebuild(
            &replica.store,
            rebuild::WriteMode::DryRun,
            |_| {},
        ))
        .unwrap();
    assert!(!report.differs(), "{report:#?}");
}
