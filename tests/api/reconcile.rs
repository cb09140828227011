//! Reconciliation against the fake Stripe: whatever webhooks are lost and whatever fails, the
//! histories end as if nothing had been lost, and the report says so.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Stdio;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};
use stripe_reconciler::clock::Clock;
use stripe_reconciler::store::Store;

use crate::seed::seed;
use testkit::each_database;
use testkit::stripe::story::{self, StoryInvoice};
use testkit::stripe::{
    self, BASIL, CLOVER, Call, DAY, Deliveries, ENDIVE, Endpoint, Event, Faults, HOUR, LIVE_KEY,
    Life, OLD, OTHER_KEY, Stripe, Terms, now_s,
};
use testkit::{
    CommandOutput, Database, Engine, Files, SECRET, Server, TestServer, binary, invoice_path, run,
};

/// Enough invoices for every kind of life with every gap in every version. A long run uses 5,000.
const INVOICES: usize = 180;
/// Fewer invoices for tests with faults, where calls are slower or repeated.
const INVOICES_WITH_FAULTS: usize = 45;
const KILLS: usize = 5;
/// Maximum time for a step that takes seconds, on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(60);
const A_MOMENT: Duration = Duration::from_millis(20);
const LISTS: [&str; 5] = [
    "agreeing",
    "healed",
    "differing",
    "unknownAtStripe",
    "unknownHere",
];

/// Runs `reconcile` on a database without a limit on calls.
fn reconcile(database_url: &str, stripe: &Stripe, arguments: &[&str]) -> CommandOutput {
    reconcile_as(LIVE_KEY, 1000, database_url, stripe, arguments)
}

/// Runs `reconcile` with this key and this rate limit.
fn reconcile_as(
    key: &str,
    rate: usize,
    database_url: &str,
    stripe: &Stripe,
    arguments: &[&str],
) -> CommandOutput {
    let environment = [
        ("DATABASE_URL", database_url),
        ("RUST_LOG", "warn"),
        ("STRIPE_API_RATE", &rate.to_string()),
        ("STRIPE_API_KEY", key),
        ("STRIPE_API_BASE", &stripe.base),
    ];
    run(&environment, &[&["reconcile"], arguments].concat(), b"")
}

/// Returns the report after asserting that its counts equal the lengths of its lists.
///
/// An invoice has exactly one verdict.
#[track_caller]
fn report(output: &CommandOutput) -> BTreeMap<&'static str, BTreeSet<String>> {
    let report = output.json();
    let ids = |name: &str| {
        let items = report[name]
            .as_array()
            .unwrap_or_else(|| panic!("{name} is no list in {report}"));
        assert_eq!(
            report["counts"][name],
            json!(items.len()),
            "{name} in {report}"
        );
        let ids: BTreeSet<String> = items
            .iter()
            .map(|item| item["stripeInvoiceId"].as_str().unwrap().to_owned())
            .collect();
        // An invoice with several differences appears once for each.
        assert!(
            ids.len() == items.len() || name == "differing",
            "an invoice stands twice under {name} in {report}"
        );
        ids
    };

    let lists: BTreeMap<&str, BTreeSet<String>> =
        LISTS.into_iter().map(|name| (name, ids(name))).collect();
    for name in ["agreeing", "unknownAtStripe", "unknownHere"] {
        let others = lists.iter().filter(|(other, _)| **other != name);
        assert!(
            others
                .flat_map(|(_, ids)| ids)
                .all(|id| !lists[name].contains(id)),
            "{name} and something else in {report}"
        );
    }

    lists
}

fn import(database_url: &str, invoices: &[StoryInvoice]) {
    let lines: Vec<String> = invoices
        .iter()
        .map(|invoice| invoice.document().to_string())
        .collect();
    let arguments = ["invoices", "import", "--tenant", "acme", "-"];
    run(
        &[("DATABASE_URL", database_url)],
        &arguments,
        lines.join("\n").as_bytes(),
    )
    .with_code(0);
}

/// Returns `status.states` of each invoice as text, by its Stripe id.
fn histories(database_url: &str) -> BTreeMap<String, String> {
    let listed = run(
        &[("DATABASE_URL", database_url)],
        &["invoices", "list", "--tenant", "acme", "--json"],
        b"",
    )
    .with_code(0);
    let history = |invoice: Value| {
        (
            invoice["status"]["stripeInvoiceId"]
                .as_str()
                .unwrap()
                .to_owned(),
            invoice["status"]["states"].to_string(),
        )
    };

    listed.json_lines().into_iter().map(history).collect()
}

/// Returns the histories after every event was generated and delivered.
fn undisturbed(
    server: &TestServer,
    stripe: &Stripe,
    invoices: &[StoryInvoice],
) -> BTreeMap<String, String> {
    replayed(server, stripe, invoices, Event::as_delivered)
}

fn replayed(
    server: &TestServer,
    stripe: &Stripe,
    invoices: &[StoryInvoice],
    rendered: impl Fn(&Event) -> Value,
) -> BTreeMap<String, String> {
    let database = server.empty_database();
    import(&database.url, invoices);
    let lines: Vec<String> = stripe
        .events()
        .iter()
        .map(|event| rendered(event).to_string())
        .collect();
    let (files, environment) = (Files::new(), [("DATABASE_URL", database.url.as_str())]);

    run(
        &environment,
        &["replay", &files.add("all.jsonl", lines.join("\n"))],
        b"",
    )
    .with_code(0);
    histories(&database.url)
}

#[track_caller]
fn assert_same(
    found: &BTreeMap<String, String>,
    expected: &BTreeMap<String, String>,
    stripe: &Stripe,
    context: &str,
) {
    assert_eq!(found.len(), expected.len(), "{context}");

    let differing: Vec<&String> = expected
        .keys()
        .filter(|id| found.get(*id) != expected.get(*id))
        .collect();
    let Some(first) = differing.first() else {
        return;
    };
    let events: Vec<String> = stripe
        .events()
        .iter()
        .filter(|event| event.as_delivered().to_string().contains(*first))
        .map(line)
        .collect();

    panic!(
        "{context}: {} of {} differ, such as {first}\nfound    {}\nexpected {}\n{}",
        differing.len(),
        expected.len(),
        found[*first],
        expected[*first],
        events.join("\n")
    );
}

fn line(event: &Event) -> String {
    format!(
        "{} {} {} {}",
        event.created,
        event.id,
        event.kind,
        if event.generated { "" } else { "(never made)" }
    )
}

/// Returns the histories that changed.
fn changed(
    before: &BTreeMap<String, String>,
    after: &BTreeMap<String, String>,
) -> BTreeSet<String> {
    after
        .keys()
        .filter(|id| before[*id] != after[*id])
        .cloned()
        .collect()
}

/// Asserts that no forbidden call was made and no answered call was repeated.
#[track_caller]
fn assert_mannered(stripe: &Stripe) {
    assert_eq!(stripe.violations(), [""; 0]);

    let mut answered: BTreeMap<String, usize> = BTreeMap::new();
    for call in stripe
        .calls()
        .into_iter()
        .filter(|call| call.status == Some(200))
    {
        *answered.entry(call.url).or_default() += 1;
    }
    answered.retain(|_, times| *times > 1);
    assert!(
        answered.is_empty(),
        "asked again without need: {answered:#?}"
    );
}

each_database! {
    async fn reconcile_heals_histories_after_lost_webhooks(server: TestServer) {
        let (stripe, seed) = (Stripe::start(), seed());
        let context = format!("seed {seed}");
        let invoices = story::play(&stripe, INVOICES);
        let expected = undisturbed(&server, &stripe, &invoices);
        assert_same(
            &replayed(&server, &stripe, &invoices, Event::as_listed),
            &expected,
            &stripe,
            "as listed",
        );
        for state in [
            "Paid",
            "PaymentPending",
            "PaymentInProgress",
            "PaymentFailed",
        ] {
            assert!(
                expected
                    .values()
                    .any(|states| states.contains(&format!("\"state\":\"{state}\""))),
                "{state}"
            );
        }
        let url = server.database.url.as_str();
        import(url, &invoices);
        stripe
            .deliver(&server.process.base, Deliveries::Dropping(1.0 / 3.0, seed))
            .await;
        let before = histories(url);

        let dry = reconcile(url, &stripe, &["--dry-run", "--json"]).with_code(3);
        assert_eq!(
            histories(url),
            before,
            "{context}: a dry run changes nothing"
        );
        stripe.clear_calls();
        let output = reconcile(url, &stripe, &["--json"]).with_code(3);
        let after = histories(url);
        assert_same(&after, &expected, &stripe, &context);
        assert_mannered(&stripe);
        let lists = report(&output);
        assert_eq!(lists["healed"], changed(&before, &after), "{context}");
        let of_stored = lists["agreeing"].len() + lists["healed"].len();
        assert_eq!(of_stored, invoices.len(), "{context}: {}", output.stdout);
        assert_eq!(
            report(&dry),
            lists,
            "{context}: a dry run says what a run would do"
        );

        let again = report(&reconcile(url, &stripe, &["--json"]).with_code(0));
        assert_eq!(
            (again["healed"].len(), again["differing"].len()),
            (0, 0),
            "{context}: {again:?}"
        );
        assert_eq!(histories(url), expected, "{context}");
    }
}

/// Polls until the condition holds, with a limit.
async fn until<F: Future<Output = bool>>(what: &str, mut condition_holds: impl FnMut() -> F) {
    let deadline = Instant::now() + TIMEOUT;
    while !condition_holds().await {
        assert!(Instant::now() < deadline, "in vain: {what}");
        tokio::time::sleep(A_MOMENT).await;
    }
}

/// Creates a database that has the invoices and a share of the webhooks.
fn database_with_share(
    server: &TestServer,
    stripe: &Stripe,
    invoices: &[StoryInvoice],
    is_delivered: impl Fn(usize, &Event) -> bool,
) -> Database {
    let database = server.empty_database();
    import(&database.url, invoices);
    let events = stripe
        .events()
        .into_iter()
        .enumerate()
        .filter(|(n, event)| event.generated && is_delivered(*n, event));
    let lines: Vec<String> = events
        .map(|(_, event)| event.as_delivered().to_string())
        .collect();
    let files = Files::new();

    run(
        &[("DATABASE_URL", &database.url)],
        &["replay", &files.add("some.jsonl", lines.join("\n"))],
        b"",
    )
    .with_code(0);
    database
}

/// Kills a run some time after it made this many calls with its key.
///
/// Returns `false` if the run had ended before.
fn killed_after(
    database_url: &str,
    stripe: &Stripe,
    key: &str,
    calls: usize,
    delay: Duration,
) -> bool {
    let mut command = binary(&[
        ("DATABASE_URL", database_url),
        ("RUST_LOG", "off"),
        ("STRIPE_API_RATE", "1000"),
        ("STRIPE_API_KEY", key),
        ("STRIPE_API_BASE", &stripe.base),
    ]);
    let mut process = command
        .arg("reconcile")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let calls_made = || stripe.calls().iter().filter(|call| call.key == key).count();

    while calls_made() < calls && process.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(1));
    }

    std::thread::sleep(delay);
    let was_running = process.try_wait().unwrap().is_none();
    process.kill().unwrap();
    process.wait().unwrap();
    was_running
}

/// Asserts that no event is logged twice in any rendering.
fn assert_logged_once(database_url: &str) {
    let log = run(
        &[("DATABASE_URL", database_url)],
        &["events", "list", "--limit", "100000", "--json"],
        b"",
    )
    .with_code(0)
    .json_lines();
    let mut seen = BTreeSet::new();

    for event in log.iter().filter(|event| event["type"] != "fetched") {
        let identity = ["id", "type", "apiVersion"].map(|name| event[name].to_string());
        assert!(seen.insert(identity), "twice: {event}");
    }

    assert!(!seen.is_empty());
}

/// Returns terms in the currency of the stored invoices.
pub fn terms(start: i64, version: &'static str) -> Terms {
    Terms {
        currency: "usd",
        ..Terms::automatic(start, version)
    }
}

/// Returns the first seed from this one on for which one of the first ten calls fails. A run makes
/// more calls.
fn seed_with_faults(first: u64) -> u64 {
    let call_fails = |seed: &u64| (0..10).any(|call| Faults::all(*seed).hit(call));
    (0..)
        .map(|n| first.wrapping_add(n))
        .find(call_fails)
        .unwrap()
}

/// Asserts that the exit code is 3 exactly if the report lists something that differs, was healed or is unknown.
#[track_caller]
fn assert_code_fits_report(output: &CommandOutput, context: &str) {
    let lists = report(output);
    let differs = ["healed", "differing", "unknownAtStripe"]
        .iter()
        .any(|name| !lists[name].is_empty());
    assert_eq!(
        output.code,
        if differs { 3 } else { 0 },
        "{context}: {output:?}"
    );
}

fn story_invoice(uid: &str, life: &Life) -> StoryInvoice {
    StoryInvoice {
        uid: uid.to_owned(),
        stripe_id: life.id().to_owned(),
        due: life.invoice.due,
    }
}

/// Starts a server that reconciles with this fake and key.
fn start_reconciling_server(server: &TestServer, stripe: &Stripe, key: &str) -> Server {
    Server::start_with(&[
        ("DATABASE_URL", &server.database.url),
        ("STRIPE_WEBHOOK_SECRET", SECRET),
        ("STRIPE_API_KEY", key),
        ("STRIPE_API_BASE", &stripe.base),
        ("STRIPE_API_RATE", "1000"),
    ])
}

each_database! {
    async fn failing_and_lagging_stripe_only_delays_reconcile(server: TestServer) {
        let (stripe, seed) = (Stripe::start(), seed_with_faults(seed()));
        let context = format!("seed {seed}");
        let invoices = story::play(&stripe, INVOICES_WITH_FAULTS);
        let expected = undisturbed(&server, &stripe, &invoices);
        let database = database_with_share(&server, &stripe, &invoices, |n, _| {
            !(n as u64 ^ seed).is_multiple_of(3)
        });
        stripe.set_faults(Faults {
            lagging: 0.2,
            ..Faults::all(seed)
        });
        let output = reconcile(&database.url, &stripe, &["--json"]);
        assert_code_fits_report(&output, &context);
        assert_mannered(&stripe);
        let with_faults = stripe
            .calls()
            .iter()
            .filter(|call| call.status != Some(200))
            .count();
        assert!(with_faults > 0, "{context}: all calls went well");

        // Only a run over the full range finds events that are listed late. For some seeds no event
        // is listed late, and this run finds nothing.
        stripe.set_faults(Faults::all(seed.wrapping_add(1)));
        stripe.clear_calls();
        let before = histories(&database.url);
        let output = reconcile(&database.url, &stripe, &["--json", "--since", "30d"]);
        let after = histories(&database.url);
        assert_code_fits_report(&output, &context);
        assert_same(&after, &expected, &stripe, &context);
        assert_mannered(&stripe);
        let unreported: Vec<_> = changed(&before, &after)
            .difference(&report(&output)["healed"])
            .cloned()
            .collect();
        assert!(unreported.is_empty(), "{context}: {unreported:?} changed");

        stripe.set_faults(Faults::default());
        reconcile(&database.url, &stripe, &[]).with_code(0);
        assert_logged_once(&database.url);
    }

    async fn next_run_finds_events_listed_minutes_late(server: TestServer) {
        let stripe = Stripe::start();
        let lives: Vec<Life> = (0..8)
            .map(|n| {
                let mut life = stripe.draft(terms(now_s() - HOUR, CLOVER));
                life.later(HOUR - 600)
                    .finalized()
                    .later(30 * n)
                    .declined("expired_card", None);
                life
            })
            .collect();
        let invoices: Vec<StoryInvoice> = lives
            .iter()
            .enumerate()
            .map(|(n, life)| story_invoice(&format!("inv-{n}"), life))
            .collect();

        import(&server.database.url, &invoices);
        for (seed, lagging) in [(1, 0.7), (2, 0.5), (3, 0.0)] {
            stripe.set_faults(Faults {
                seed,
                lagging,
                ..Faults::default()
            });
            reconcile(&server.database.url, &stripe, &[]).with_code(3);
        }

        assert_same(
            &histories(&server.database.url),
            &undisturbed(&server, &stripe, &invoices),
            &stripe,
            "after all",
        );

        reconcile(&server.database.url, &stripe, &[]).with_code(0);
    }

    async fn progress_from_skewed_clock_is_ignored(server: TestServer) {
        let clock = Clock::fixed((now_s() - 3 * HOUR) * 1000);
        let (stripe, store) = (
            Stripe::start_at(clock.clone()),
            Store::connect(&server.database.url).await.unwrap(),
        );
        let mut life = stripe.draft(terms(now_s() - 4 * HOUR, CLOVER));
        life.finalized();
        let passes = async |count: usize| {
            let process = start_reconciling_server(&server, &stripe, LIVE_KEY);
            until("a pass has ended", || async {
                store.last_runs(9, i64::MAX).await.unwrap().len() == count
            })
            .await;
            drop(process);
        };

        passes(1).await;
        // Three hours pass at Stripe but not here: our clock was that far ahead.
        clock.set(now_s() * 1000);
        let before = stripe.events().len();
        life.later(2 * HOUR).declined("expired_card", None);
        passes(2).await;
        let happened = stripe.events().split_off(before);
        let ids: BTreeSet<&str> = happened
            .iter()
            .filter(|event| event.generated)
            .map(|event| event.id.as_str())
            .collect();
        let logged = store
            .known_ids(&ids.iter().copied().collect::<Vec<_>>())
            .await
            .unwrap();

        assert_eq!(
            logged.iter().map(String::as_str).collect::<BTreeSet<_>>(),
            ids
        );

        store.close().await;
    }

    async fn next_run_completes_a_killed_run(server: TestServer) {
        let (stripe, seed) = (Stripe::start(), seed());
        let mut random = StdRng::seed_from_u64(seed);
        let invoices = story::play(&stripe, INVOICES_WITH_FAULTS);
        let expected = undisturbed(&server, &stripe, &invoices);
        let with_share = || database_with_share(&server, &stripe, &invoices, |n, _| n % 3 == 0);
        let whole = with_share();
        reconcile(&whole.url, &stripe, &[]).with_code(3);
        assert_same(&histories(&whole.url), &expected, &stripe, "not killed");
        let calls = stripe.calls().len();
        // At random moments a run may have ended. One that waits for an answer has not.
        stripe.hold();
        assert!(killed_after(
            &with_share().url,
            &stripe,
            "rk_live_fake_held",
            1,
            Duration::ZERO
        ));
        stripe.release();

        let round = |round: usize, after: usize, delay: Duration| {
            let (database, key) = (with_share(), format!("rk_live_fake_{round}"));
            killed_after(&database.url, &stripe, &key, after, delay);
            let output = reconcile(&database.url, &stripe, &["--json"]);
            let context = format!(
                "seed {seed}, killed after {after} of {calls} calls and {delay:?}: {output:?}"
            );
            assert!([0, 3].contains(&output.code), "{context}");
            assert_same(&histories(&database.url), &expected, &stripe, &context);
            assert_logged_once(&database.url);
            reconcile(&database.url, &stripe, &[]).with_code(0);
        };

        // Run all at once, because each waits until the lease of the killed run expires.
        std::thread::scope(|scope| {
            for number in 0..KILLS {
                let (after, delay) = (
                    random.random_range(1..=calls),
                    Duration::from_micros(random.random_range(0..20_000)),
                );
                let round = &round;
                scope.spawn(move || round(number, after, delay));
            }
        });
    }

    async fn thin_event_is_acknowledged_and_its_object_fetched(server: TestServer) {
        let stripe = Stripe::start();
        let process = start_reconciling_server(&server, &stripe, LIVE_KEY);
        let begun = || async {
            stripe
                .calls()
                .iter()
                .any(|call| call.endpoint == "/v1/events")
        };
        until("the first pass", begun).await;
        // No event is listed, so the object must be fetched.
        let mut life = stripe.draft(Terms {
            account: Some(story::CONNECTED),
            ..terms(now_s() - DAY, ENDIVE)
        });
        life.later(HOUR)
            .omit_events(&[""])
            .finalized()
            .later(2)
            .paid_by_card();
        server.store("thin", life.id()).await.with_status(201);
        let twins = |kind: &str| {
            stripe
                .events()
                .into_iter()
                .find(|event| event.kind == kind)
                .unwrap()
        };
        stripe.hold();
        for kind in ["invoice.finalized", "invoice.paid"] {
            stripe::deliver_one(&process.base, &twins(kind).as_thin()).await;
        }
        assert_eq!(
            server.history("thin").await.len(),
            2,
            "their types are claims already"
        );
        stripe.release();
        let is_fetched = || async {
            server
                .states("thin")
                .await
                .to_string()
                .contains("50.00 USD paid")
        };
        until("the amount is known", is_fetched).await;
        let fetches: Vec<Call> = stripe
            .calls()
            .into_iter()
            .filter(|call| call.endpoint == "/v1/invoices/*")
            .collect();
        assert!(
            fetches
                .iter()
                .all(|call| call.url.ends_with(story::CONNECTED)),
            "{fetches:#?}"
        );

        // The snapshot twins only add the account.
        let invoice = [story_invoice("thin", &life)];
        let expected = undisturbed(&server, &stripe, &invoice);
        for event in stripe.events() {
            stripe::deliver_one(&process.base, &event.as_delivered()).await;
        }
        assert_eq!(server.states("thin").await.to_string(), expected[life.id()]);
        stripe::deliver_one(&process.base, &twins("invoice.payment_succeeded").as_thin()).await;
        assert_eq!(server.states("thin").await.to_string(), expected[life.id()]);
        assert_eq!(stripe.violations(), [""; 0]);
    }
}

/// Returns terms of a merchant on basil with an own order reference: no payment leads to its
/// invoice.
fn unlinked_terms(start: i64) -> Terms {
    Terms {
        order_reference: Some("PO-4711"),
        ..terms(start, BASIL)
    }
}

async fn deliver_all(server: &TestServer, stripe: &Stripe) {
    stripe.deliver(&server.process.base, Deliveries::All).await;
}

each_database! {
    async fn payments_without_invoice_are_linked_through_api(server: TestServer) {
        let stripe = Stripe::start();
        let mut life = stripe.draft(unlinked_terms(now_s() - 5 * DAY));
        life.later(HOUR)
            .finalized()
            .later(HOUR)
            .declined("insufficient_funds", Some(DAY))
            .later(DAY)
            .processing()
            .later(DAY)
            .paid_by_card();
        life.later(DAY).refunded(1000).later(HOUR).disputed();
        server.store("linked", life.id()).await.with_status(201);
        deliver_all(&server, &stripe).await;
        let before = server.states("linked").await.to_string();

        assert!(
            !before.contains("insufficient_funds")
                && !before.contains("PaymentInProgress")
                && !before.contains("10.00 USD of"),
            "{before}"
        );

        let output = reconcile(&server.database.url, &stripe, &["--json"]).with_code(3);
        assert_eq!(
            report(&output)["healed"],
            BTreeSet::from([life.id().to_owned()])
        );

        let states = server.states("linked").await;
        let words = [
            "50.00 USD",
            "insufficient_funds",
            "50.00 USD",
            "50.00 USD paid",
            "Refunded 10.00 USD of 50.00 USD",
            "disputed",
            "withdrew",
        ];
        let entries: Vec<&str> = states
            .as_array()
            .unwrap()
            .iter()
            .map(|state| state["paymentMsg"].as_str().unwrap())
            .collect();

        assert_eq!(entries.len(), words.len(), "{states:#}");

        for (entry, word) in entries.iter().zip(words) {
            assert!(entry.contains(word), "{word} is missing in {entry}");
        }

        assert_mannered(&stripe);

        // A linked payment is not looked up again.
        stripe.clear_calls();
        reconcile(&server.database.url, &stripe, &[]).with_code(0);
        let asked: Vec<Call> = stripe
            .calls()
            .into_iter()
            .filter(|call| call.endpoint == "/v1/invoice_payments")
            .collect();
        assert!(asked.is_empty(), "{asked:#?}");
    }

    async fn missing_decline_reason_comes_from_payment_intent(server: TestServer) {
        for (uid, version) in [("old", OLD), ("basil", BASIL), ("clover", CLOVER)] {
            let stripe = Stripe::start();
            let mut life = stripe.draft(terms(now_s() - 5 * DAY, version));
            life.later(HOUR)
                .finalized()
                .later(HOUR)
                .omit_events(&["charge.", "payment_intent."])
                .declined("insufficient_funds", Some(3 * DAY));
            let database =
                database_with_share(&server, &stripe, &[story_invoice(uid, &life)], |_, _| true);
            let before = &histories(&database.url)[life.id()];
            assert!(
                before.contains("attempt 1") && !before.contains("insufficient_funds"),
                "{uid}: {before}"
            );
            reconcile(&database.url, &stripe, &[]).with_code(3);
            // In basil, even the complete events would not link the payment.
            let in_clover = |event: &Event| event.render(CLOVER);
            let expected =
                &replayed(&server, &stripe, &[story_invoice(uid, &life)], in_clover)[life.id()];
            assert_eq!(&histories(&database.url)[life.id()], expected, "{uid}");
            reconcile(&database.url, &stripe, &[]).with_code(0);
        }
    }

    async fn differences_and_one_sided_invoices_are_reported(server: TestServer) {
        let stripe = Stripe::start();
        let start = now_s() - 5 * DAY;
        let paid = |terms: Terms| {
            let mut life = stripe.draft(terms);
            life.later(HOUR).finalized().later(2).paid_by_card();
            life.invoice.id
        };
        let [agreeing, amount, unknown_here] = [(); 3].map(|()| paid(terms(start, CLOVER)));
        let currency = paid(Terms {
            currency: "eur",
            ..terms(start, CLOVER)
        });
        let of_test_mode = paid(Terms {
            livemode: false,
            ..terms(start, CLOVER)
        });

        let document = |id: &str, amount: f64| json!({"spec": {"paymentUnit": "usd"}, "status": {"billableAmount": amount, "stripeInvoiceId": id}});
        let rows = [
            ("agreeing", &*agreeing, 50.0),
            ("amount", &amount, 49.99),
            ("currency", &currency, 50.0),
            ("mode", &of_test_mode, 50.0),
            ("none", "in_1None", 50.0),
        ];

        for (uid, id, amount) in rows {
            server
                .put(&invoice_path(uid), &document(id, amount))
                .await
                .with_status(201);
        }

        deliver_all(&server, &stripe).await;
        let url = &server.database.url;
        for attempt in ["first", "again"] {
            let output = reconcile(url, &stripe, &["--json"]).with_code(3);
            let lists = report(&output);
            let expected = |ids: &[&String]| {
                ids.iter()
                    .map(|id| (*id).clone())
                    .collect::<BTreeSet<String>>()
            };
            assert_eq!(
                lists["agreeing"],
                expected(&[&agreeing]),
                "{attempt}: {}",
                output.stdout
            );
            assert_eq!(
                lists["differing"],
                expected(&[&amount, &currency]),
                "{attempt}: {}",
                output.stdout
            );
            assert_eq!(
                lists["unknownAtStripe"],
                expected(&[&of_test_mode, &"in_1None".to_owned()]),
                "{attempt}: {}",
                output.stdout
            );
            assert_eq!(
                lists["unknownHere"],
                expected(&[&unknown_here]),
                "{attempt}: {}",
                output.stdout
            );
            assert!(
                output.stdout.contains("49.99 USD")
                    && output.stdout.contains("50.00 USD")
                    && output.stdout.contains("EUR"),
                "{}",
                output.stdout
            );
        }

        let for_a_person = reconcile(url, &stripe, &[]).with_code(3).stdout;
        for word in [
            &*amount,
            "49.99 USD",
            "50.00 USD",
            &currency,
            "EUR",
            "in_1None",
            &unknown_here,
        ] {
            assert!(
                for_a_person.contains(word),
                "{word} is missing in\n{for_a_person}"
            );
        }

        // After the correction, all invoices agree except the one-sided ones.
        for (uid, id, amount) in [("amount", &amount, 50.0)] {
            server
                .put(&invoice_path(uid), &document(id, amount))
                .await
                .with_status(200);
        }

        let lists = report(&reconcile(url, &stripe, &["--json"]));
        assert_eq!(
            (lists["differing"].len(), lists["agreeing"].len()),
            (1, 2),
            "{lists:?}"
        );
    }

    async fn disabled_or_incomplete_webhook_endpoint_is_reported(server: TestServer) {
        let stripe = Stripe::start();
        let ours = format!("{}/webhooks/stripe", server.process.base);
        let findings = |endpoint: Endpoint| {
            stripe.register(endpoint);
            let output = reconcile(&server.database.url, &stripe, &[]);
            assert!([0, 3].contains(&output.code), "{output:?}");
            let json = reconcile(&server.database.url, &stripe, &["--json"]).stdout;
            (format!("{}{}", output.stdout, output.stderr), json)
        };
        let (text, json) = findings(Endpoint::enabled(&ours));

        assert!(
            !text.contains("disabled")
                && !text.contains("we_1Fake0")
                && !json.contains("we_1Fake0"),
            "{text}\n{json}"
        );

        let (text, json) = findings(Endpoint {
            status: "disabled",
            ..Endpoint::enabled(&ours)
        });
        assert!(
            text.contains("we_1Fake1") && text.contains("disabled") && json.contains("disabled"),
            "{text}\n{json}"
        );

        let some = Endpoint {
            enabled_events: vec!["invoice.paid", "charge.failed"],
            ..Endpoint::enabled(&ours)
        };
        let (text, json) = findings(some);

        for lacking in [
            "invoice.payment_failed",
            "payment_intent.payment_failed",
            "invoice.voided",
        ] {
            assert!(
                text.contains(lacking) && json.contains(lacking),
                "{lacking}: {text}\n{json}"
            );
        }

        assert_eq!(stripe.violations(), [""; 0]);
    }

    async fn api_calls_respect_rate_limit_and_share_connections(server: TestServer) {
        const RATE: usize = 10;

        let stripe = Stripe::start();
        let lives: Vec<Life> = (0..3 * RATE as i64)
            .map(|n| {
                let mut life = stripe.draft(unlinked_terms(now_s() - 10 * DAY + n));
                life.later(HOUR)
                    .finalized()
                    .later(HOUR)
                    .declined("expired_card", None);
                life
            })
            .collect();
        let invoices: Vec<StoryInvoice> = lives
            .iter()
            .enumerate()
            .map(|(n, life)| story_invoice(&format!("inv-{n}"), life))
            .collect();

        let database = database_with_share(&server, &stripe, &invoices, |_, _| true);
        reconcile_as(LIVE_KEY, RATE, &database.url, &stripe, &[]).with_code(3);
        assert!(
            histories(&database.url)
                .values()
                .all(|states| states.contains("expired_card"))
        );

        let mut times: BTreeMap<String, Vec<i64>> = BTreeMap::new();
        for call in stripe.calls() {
            times
                .entry(call.endpoint.trim_end_matches("/*").to_owned())
                .or_default()
                .push(call.at_ms);
        }

        assert!(times["/v1/invoice_payments"].len() > RATE, "{times:?}");

        for (endpoint, times) in times {
            let is_within = times
                .windows(RATE + 1)
                .all(|calls| calls[RATE] - calls[0] >= 1000);
            assert!(
                is_within,
                "more than {RATE} calls of {endpoint} in a second: {times:?}"
            );
        }

        assert!(
            stripe.connections() <= RATE,
            "{} connections",
            stripe.connections()
        );
        assert_mannered(&stripe);
    }

    async fn second_reconcile_waits_for_the_first(server: TestServer) {
        let stripe = Stripe::start();
        let invoices = story::play(&stripe, INVOICES_WITH_FAULTS);
        import(&server.database.url, &invoices);
        stripe
            .deliver(&server.process.base, Deliveries::Dropping(0.5, 7))
            .await;

        // Slow enough for the two runs to overlap.
        stripe.set_faults(Faults {
            slow: 1.0,
            ..Faults::default()
        });
        let _server = start_reconciling_server(&server, &stripe, LIVE_KEY);
        let has_calls = || async { !stripe.calls().is_empty() };
        until("the first pass of the server", has_calls).await;
        let output = reconcile_as(OTHER_KEY, 1000, &server.database.url, &stripe, &[]);

        assert!([0, 3].contains(&output.code), "{output:?}");
        assert_turns(&stripe, 2);

        reconcile_as(OTHER_KEY, 1000, &server.database.url, &stripe, &[]).with_code(0);
    }

    async fn second_replica_takes_over_lease_after_crash(server: TestServer) {
        let stripe = Stripe::start();
        let invoices = story::play(&stripe, INVOICES_WITH_FAULTS);
        import(&server.database.url, &invoices);
        let mut first = start_reconciling_server(&server, &stripe, LIVE_KEY);

        until("the first pass of the first", || async {
            !stripe.calls().is_empty()
        })
        .await;

        // The server dies in the middle of its run.
        stripe.hold();
        let _second = start_reconciling_server(&server, &stripe, OTHER_KEY);
        first.sigkill();
        stripe.release();
        until("the second takes over", || async {
            stripe.calls().iter().any(|call| call.key == OTHER_KEY)
        })
        .await;

        assert_turns(&stripe, 2);

        let expected = undisturbed(&server, &stripe, &invoices);
        let own = |id: &String| {
            stripe
                .events()
                .iter()
                .any(|event| event.account.is_none() && event.object_id() == id)
        };

        until("it completes what was begun", || async {
            let found = histories(&server.database.url);
            expected
                .iter()
                .filter(|(id, _)| own(id))
                .all(|(id, states)| &found[id] == states)
        })
        .await;
    }
}

/// Asserts that calls with the two keys alternate in this many turns.
#[track_caller]
fn assert_turns(stripe: &Stripe, turns: usize) {
    let mut keys: Vec<String> = stripe.calls().into_iter().map(|call| call.key).collect();
    keys.dedup();
    assert_eq!(keys.len(), turns, "{keys:?}");
}

#[tokio::test]
async fn reconcile_reports_missing_or_wrong_key_and_outage() {
    let server = TestServer::start(Engine::Sqlite).await;
    let stripe = Stripe::start();
    let url = ("DATABASE_URL", server.database.url.as_str());
    let none = run(&[url], &["reconcile"], b"").with_code(2);

    assert!(none.stderr.contains("STRIPE_API_KEY"), "{}", none.stderr);

    let wrong = run(
        &[
            url,
            ("STRIPE_API_KEY", "sk_live_wrong_1234567890"),
            ("STRIPE_API_BASE", &stripe.base),
        ],
        &["reconcile"],
        b"",
    )
    .with_code(2);
    assert!(
        wrong.stderr.contains("STRIPE_API_KEY") && !wrong.stderr.contains("wrong_1234567890"),
        "{}",
        wrong.stderr
    );

    let [key, _] = stripe.settings();
    // No process listens on port 1.
    let away = run(
        &[url, key, ("STRIPE_API_BASE", "http://127.0.0.1:1")],
        &["reconcile"],
        b"",
    )
    .with_code(4);
    assert!(away.stderr.contains("Stripe"), "{}", away.stderr);
}
