//! Reconciliation, against a Stripe of our own: whatever no webhook told, and whatever stands in the way, the histories come out as if
//! nothing had been lost; and the report says so.

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
use testkit::stripe::story::{self, Stored};
use testkit::stripe::{
    self, BASIL, CLOVER, Call, DAY, Deliveries, ENDIVE, Endpoint, Event, HOUR, LIVE_KEY, Life, OLD,
    OTHER_KEY, Stripe, Terms, Troubles, now_s,
};
use testkit::{
    CommandOutput, Database, Engine, Files, SECRET, Server, TestServer, binary, invoice_path, run,
};

/// Enough for every kind of life with every gap, in every version. For a long run: 5,000.
const INVOICES: usize = 180;
/// Each call costs more there, or each is made more often.
const INVOICES_IN_TROUBLE: usize = 45;
const KILLS: usize = 5;
/// All of it takes seconds; this is for a machine that has much else to do.
const TIMEOUT: Duration = Duration::from_secs(60);
const A_MOMENT: Duration = Duration::from_millis(20);
const LISTS: [&str; 5] = [
    "agreeing",
    "healed",
    "differing",
    "unknownAtStripe",
    "unknownHere",
];

/// Runs `reconcile` on a database, as fast as it can.
fn reconcile(database_url: &str, stripe: &Stripe, arguments: &[&str]) -> CommandOutput {
    reconcile_as(LIVE_KEY, 1000, database_url, stripe, arguments)
}

/// With this key, and so many calls a second.
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

/// The report, whose numbers are those of its lists. An invoice that agrees or that one side does not know is nothing else.
#[track_caller]
fn report(ran: &CommandOutput) -> BTreeMap<&'static str, BTreeSet<String>> {
    let report = ran.json();
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
        // One that differs in several things is told once for each.
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

fn import(database_url: &str, invoices: &[Stored]) {
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

/// `status.states` of each invoice, as it stands, by the invoice's id at Stripe.
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

/// What the histories come to when every event is made and arrives.
fn undisturbed(
    server: &TestServer,
    stripe: &Stripe,
    invoices: &[Stored],
) -> BTreeMap<String, String> {
    replayed(server, stripe, invoices, Event::as_delivered)
}

fn replayed(
    server: &TestServer,
    stripe: &Stripe,
    invoices: &[Stored],
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
    told: &str,
) {
    assert_eq!(found.len(), expected.len(), "{told}");
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
        "{told}: {} of {} differ, such as {first}\nfound    {}\nexpected {}\n{}",
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

/// Which histories are not what they were.
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

/// Nothing was asked that a reader may not ask, and nothing that was answered was asked again.
#[track_caller]
fn assert_mannered(stripe: &Stripe) {
    assert_eq!(stripe.faults(), [""; 0]);
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
    async fn what_webhooks_lost_is_found_and_the_histories_are_those_of_an_undisturbed_run(server: TestServer) {
        let (stripe, seed) = (Stripe::start(), seed());
        let told = format!("seed {seed}");
        let invoices = story::tell(&stripe, INVOICES);
        let expected = undisturbed(&server, &stripe, &invoices);
        assert_same(&replayed(&server, &stripe, &invoices, Event::as_listed), &expected, &stripe, "as listed");
        for state in ["Paid", "PaymentPending", "PaymentInProgress", "PaymentFailed"] {
            assert!(expected.values().any(|states| states.contains(&format!("\"state\":\"{state}\""))), "{state}");
        }
        let url = server.database.url.as_str();
        import(url, &invoices);
        stripe.deliver(&server.process.base, Deliveries::Dropping(1.0 / 3.0, seed)).await;
        let before = histories(url);

        let dry = reconcile(url, &stripe, &["--dry-run", "--json"]).with_code(3);
        assert_eq!(histories(url), before, "{told}: a dry run changes nothing");
        stripe.forget_calls();
        let ran = reconcile(url, &stripe, &["--json"]).with_code(3);
        let after = histories(url);
        assert_same(&after, &expected, &stripe, &told);
        assert_mannered(&stripe);
        let lists = report(&ran);
        assert_eq!(lists["healed"], changed(&before, &after), "{told}");
        let of_stored = lists["agreeing"].len() + lists["healed"].len();
        assert_eq!(of_stored, invoices.len(), "{told}: {}", ran.stdout);
        assert_eq!(report(&dry), lists, "{told}: a dry run says what a run would do");

        let again = report(&reconcile(url, &stripe, &["--json"]).with_code(0));
        assert_eq!((again["healed"].len(), again["differing"].len()), (0, 0), "{told}: {again:?}");
        assert_eq!(histories(url), expected, "{told}");
    }
}

/// Waits until it is so, looking often; not for ever.
async fn until<F: Future<Output = bool>>(what: &str, mut is_so: impl FnMut() -> F) {
    let deadline = Instant::now() + TIMEOUT;
    while !is_so().await {
        assert!(Instant::now() < deadline, "in vain: {what}");
        tokio::time::sleep(A_MOMENT).await;
    }
}

/// A database that knows the invoices, and what a share of the webhooks told.
fn told_in_part(
    server: &TestServer,
    stripe: &Stripe,
    invoices: &[Stored],
    told: impl Fn(usize, &Event) -> bool,
) -> Database {
    let database = server.empty_database();
    import(&database.url, invoices);
    let events = stripe
        .events()
        .into_iter()
        .enumerate()
        .filter(|(n, event)| event.generated && told(*n, event));
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

/// A pass that is killed when Stripe has heard so many calls with its key, and a moment more. False: it had ended before.
fn killed_after(
    database_url: &str,
    stripe: &Stripe,
    key: &str,
    calls: usize,
    moment: Duration,
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
    let heard = || stripe.calls().iter().filter(|call| call.key == key).count();
    while heard() < calls && process.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(moment);
    let was_running = process.try_wait().unwrap().is_none();
    process.kill().unwrap();
    process.wait().unwrap();
    was_running
}

/// No event stands twice in the log, whatever the rendering.
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

/// Of the currency that stored invoices have here.
pub fn terms(start: i64, version: &'static str) -> Terms {
    Terms {
        currency: "usd",
        ..Terms::automatic(start, version)
    }
}

/// The first seed from this one on by which one of the first calls goes wrong. A run makes more.
fn seed_of_trouble(first: u64) -> u64 {
    let goes_wrong = |seed: &u64| (0..10).any(|call| Troubles::all(*seed).hit(call));
    (0..)
        .map(|n| first.wrapping_add(n))
        .find(goes_wrong)
        .unwrap()
}

/// The exit code is 3 exactly if the report lists something that differs, was healed or is unknown.
#[track_caller]
fn assert_code_fits_report(ran: &CommandOutput, told: &str) {
    let lists = report(ran);
    let differs = ["healed", "differing", "unknownAtStripe"]
        .iter()
        .any(|name| !lists[name].is_empty());
    assert_eq!(ran.code, if differs { 3 } else { 0 }, "{told}: {ran:?}");
}

fn stored(uid: &str, life: &Life) -> Stored {
    Stored {
        uid: uid.to_owned(),
        stripe_id: life.id().to_owned(),
        due: life.invoice.due,
    }
}

/// A server that asks this Stripe, with this key.
fn asking_server(server: &TestServer, stripe: &Stripe, key: &str) -> Server {
    Server::start_with(&[
        ("DATABASE_URL", &server.database.url),
        ("STRIPE_WEBHOOK_SECRET", SECRET),
        ("STRIPE_API_KEY", key),
        ("STRIPE_API_BASE", &stripe.base),
        ("STRIPE_API_RATE", "1000"),
    ])
}

each_database! {
    async fn a_busy_failing_and_lagging_stripe_only_delays_it(server: TestServer) {
        let (stripe, seed) = (Stripe::start(), seed_of_trouble(seed()));
        let told = format!("seed {seed}");
        let invoices = story::tell(&stripe, INVOICES_IN_TROUBLE);
        let expected = undisturbed(&server, &stripe, &invoices);
        let database = told_in_part(&server, &stripe, &invoices, |n, _| !(n as u64 ^ seed).is_multiple_of(3));
        stripe.trouble(Troubles { lagging: 0.2, ..Troubles::all(seed) });
        let ran = reconcile(&database.url, &stripe, &["--json"]);
        assert_code_fits_report(&ran, &told);
        assert_mannered(&stripe);
        let in_trouble = stripe.calls().iter().filter(|call| call.status != Some(200)).count();
        assert!(in_trouble > 0, "{told}: all calls went well");

        // Only a run that reads the whole list again finds what was listed late. For some seeds
        // nothing was: then this run has nothing to find.
        stripe.trouble(Troubles::all(seed.wrapping_add(1)));
        stripe.forget_calls();
        let before = histories(&database.url);
        let ran = reconcile(&database.url, &stripe, &["--json", "--since", "30d"]);
        let after = histories(&database.url);
        assert_code_fits_report(&ran, &told);
        assert_same(&after, &expected, &stripe, &told);
        assert_mannered(&stripe);
        let unreported: Vec<_> = changed(&before, &after).difference(&report(&ran)["healed"]).cloned().collect();
        assert!(unreported.is_empty(), "{told}: {unreported:?} changed");

        stripe.trouble(Troubles::default());
        reconcile(&database.url, &stripe, &[]).with_code(0);
        assert_logged_once(&database.url);
    }

    async fn what_is_listed_some_minutes_late_is_found_by_the_next_run(server: TestServer) {
        let stripe = Stripe::start();
        let lives: Vec<Life> = (0..8)
            .map(|n| {
                let mut life = stripe.draft(terms(now_s() - HOUR, CLOVER));
                life.later(HOUR - 600).finalized().later(30 * n).declined("expired_card", None);
                life
            })
            .collect();
        let invoices: Vec<Stored> = lives.iter().enumerate().map(|(n, life)| stored(&format!("inv-{n}"), life)).collect();
        import(&server.database.url, &invoices);
        for (seed, lagging) in [(1, 0.7), (2, 0.5), (3, 0.0)] {
            stripe.trouble(Troubles { seed, lagging, ..Troubles::default() });
            reconcile(&server.database.url, &stripe, &[]).with_code(3);
        }
        assert_same(&histories(&server.database.url), &undisturbed(&server, &stripe, &invoices), &stripe, "after all");
        reconcile(&server.database.url, &stripe, &[]).with_code(0);
    }

    async fn what_happened_while_our_clock_was_ahead_is_listed_by_the_next_pass(server: TestServer) {
        let clock = Clock::fixed((now_s() - 3 * HOUR) * 1000);
        let (stripe, store) = (Stripe::start_at(clock.clone()), Store::connect(&server.database.url).await.unwrap());
        let mut life = stripe.draft(terms(now_s() - 4 * HOUR, CLOVER));
        life.finalized();
        let passes = async |count: usize| {
            let process = asking_server(&server, &stripe, LIVE_KEY);
            until("a pass has ended", || async { store.last_runs(9, i64::MAX).await.unwrap().len() == count }).await;
            drop(process);
        };
        passes(1).await;
        // It is three hours later by Stripe's clock, and not by ours: that was as much ahead.
        clock.set(now_s() * 1000);
        let before = stripe.events().len();
        life.later(2 * HOUR).declined("expired_card", None);
        passes(2).await;
        let happened = stripe.events().split_off(before);
        let ids: BTreeSet<&str> = happened.iter().filter(|event| event.generated).map(|event| event.id.as_str()).collect();
        let logged = store.known_ids(&ids.iter().copied().collect::<Vec<_>>()).await.unwrap();
        assert_eq!(logged.iter().map(String::as_str).collect::<BTreeSet<_>>(), ids);
        store.close().await;
    }

    async fn killed_at_any_moment_the_next_run_completes_it(server: TestServer) {
        let (stripe, seed) = (Stripe::start(), seed());
        let mut random = StdRng::seed_from_u64(seed);
        let invoices = story::tell(&stripe, INVOICES_IN_TROUBLE);
        let expected = undisturbed(&server, &stripe, &invoices);
        let in_part = || told_in_part(&server, &stripe, &invoices, |n, _| n % 3 == 0);
        let whole = in_part();
        reconcile(&whole.url, &stripe, &[]).with_code(3);
        assert_same(&histories(&whole.url), &expected, &stripe, "not killed");
        let calls = stripe.calls().len();
        // At random moments a run may have ended. One that waits for an answer has not.
        stripe.hold();
        assert!(killed_after(&in_part().url, &stripe, "rk_live_fake_held", 1, Duration::ZERO));
        stripe.release();

        let round = |round: usize, after: usize, moment: Duration| {
            let (database, key) = (in_part(), format!("rk_live_fake_{round}"));
            killed_after(&database.url, &stripe, &key, after, moment);
            let ran = reconcile(&database.url, &stripe, &["--json"]);
            let told = format!("seed {seed}, killed after {after} of {calls} calls and {moment:?}: {ran:?}");
            assert!([0, 3].contains(&ran.code), "{told}");
            assert_same(&histories(&database.url), &expected, &stripe, &told);
            assert_logged_once(&database.url);
            reconcile(&database.url, &stripe, &[]).with_code(0);
        };
        // All at once, for each waits until the one that was killed is believed to be dead.
        std::thread::scope(|scope| {
            for number in 0..KILLS {
                let (after, moment) = (random.random_range(1..=calls), Duration::from_micros(random.random_range(0..20_000)));
                let round = &round;
                scope.spawn(move || round(number, after, moment));
            }
        });
    }

    async fn thin_events_are_answered_at_once_and_what_they_point_to_is_fetched(server: TestServer) {
        let stripe = Stripe::start();
        let process = asking_server(&server, &stripe, LIVE_KEY);
        let begun = || async { stripe.calls().iter().any(|call| call.endpoint == "/v1/events") };
        until("the first pass", begun).await;
        // Nothing is listed: who wants to know has to fetch.
        let mut life = stripe.draft(Terms { account: Some(story::CONNECTED), ..terms(now_s() - DAY, ENDIVE) });
        life.later(HOUR).silence(&[""]).finalized().later(2).paid_by_card();
        server.store("thin", life.id()).await.with_status(201);
        let twins = |kind: &str| stripe.events().into_iter().find(|event| event.kind == kind).unwrap();
        stripe.hold();
        for kind in ["invoice.finalized", "invoice.paid"] {
            stripe::deliver_one(&process.base, &twins(kind).as_thin()).await;
        }
        assert_eq!(server.history("thin").await.len(), 2, "their types are claims already");
        stripe.release();
        let is_fetched = || async { server.states("thin").await.to_string().contains("50.00 USD paid") };
        until("the amount is known", is_fetched).await;
        let fetches: Vec<Call> = stripe.calls().into_iter().filter(|call| call.endpoint == "/v1/invoices/*").collect();
        assert!(fetches.iter().all(|call| call.url.ends_with(story::CONNECTED)), "{fetches:#?}");

        // The snapshot twins, when they come, change nothing but that they name the account.
        let invoice = [stored("thin", &life)];
        let expected = undisturbed(&server, &stripe, &invoice);
        for event in stripe.events() {
            stripe::deliver_one(&process.base, &event.as_delivered()).await;
        }
        assert_eq!(server.states("thin").await.to_string(), expected[life.id()]);
        stripe::deliver_one(&process.base, &twins("invoice.payment_succeeded").as_thin()).await;
        assert_eq!(server.states("thin").await.to_string(), expected[life.id()]);
        assert_eq!(stripe.faults(), [""; 0]);
    }
}

/// A merchant on basil, whose PaymentIntents carry a reference of the merchant's own: no payment leads to its invoice.
fn unlinked(start: i64) -> Terms {
    Terms {
        order_reference: Some("PO-4711"),
        ..terms(start, BASIL)
    }
}

async fn deliver_all(server: &TestServer, stripe: &Stripe) {
    stripe.deliver(&server.process.base, Deliveries::All).await;
}

each_database! {
    async fn payments_that_name_no_invoice_are_linked_by_asking(server: TestServer) {
        let stripe = Stripe::start();
        let mut life = stripe.draft(unlinked(now_s() - 5 * DAY));
        life.later(HOUR).finalized().later(HOUR).declined("insufficient_funds", Some(DAY)).later(DAY).processing().later(DAY).paid_by_card();
        life.later(DAY).refunded(1000).later(HOUR).disputed();
        server.store("linked", life.id()).await.with_status(201);
        deliver_all(&server, &stripe).await;
        let before = server.states("linked").await.to_string();
        assert!(!before.contains("insufficient_funds") && !before.contains("PaymentInProgress") && !before.contains("10.00 USD of"), "{before}");
        let ran = reconcile(&server.database.url, &stripe, &["--json"]).with_code(3);
        assert_eq!(report(&ran)["healed"], BTreeSet::from([life.id().to_owned()]));
        let states = server.states("linked").await;
        let words = ["50.00 USD", "insufficient_funds", "50.00 USD", "50.00 USD paid", "Refunded 10.00 USD of 50.00 USD", "disputed", "withdrew"];
        let entries: Vec<&str> = states.as_array().unwrap().iter().map(|state| state["paymentMsg"].as_str().unwrap()).collect();
        assert_eq!(entries.len(), words.len(), "{states:#}");
        for (entry, word) in entries.iter().zip(words) {
            assert!(entry.contains(word), "{word} is missing in {entry}");
        }
        assert_mannered(&stripe);
        // What is linked is not asked for again.
        stripe.forget_calls();
        reconcile(&server.database.url, &stripe, &[]).with_code(0);
        let asked: Vec<Call> = stripe.calls().into_iter().filter(|call| call.endpoint == "/v1/invoice_payments").collect();
        assert!(asked.is_empty(), "{asked:#?}");
    }

    async fn a_failed_attempt_whose_reason_no_event_told_gets_it_from_the_payment_intent(server: TestServer) {
        for (uid, version) in [("old", OLD), ("basil", BASIL), ("clover", CLOVER)] {
            let stripe = Stripe::start();
            let mut life = stripe.draft(terms(now_s() - 5 * DAY, version));
            life.later(HOUR).finalized().later(HOUR).silence(&["charge.", "payment_intent."]).declined("insufficient_funds", Some(3 * DAY));
            let database = told_in_part(&server, &stripe, &[stored(uid, &life)], |_, _| true);
            let before = &histories(&database.url)[life.id()];
            assert!(before.contains("attempt 1") && !before.contains("insufficient_funds"), "{uid}: {before}");
            reconcile(&database.url, &stripe, &[]).with_code(3);
            // In basil, not even all the events would tell.
            let in_clover = |event: &Event| event.render(CLOVER);
            let expected = &replayed(&server, &stripe, &[stored(uid, &life)], in_clover)[life.id()];
            assert_eq!(&histories(&database.url)[life.id()], expected, "{uid}");
            reconcile(&database.url, &stripe, &[]).with_code(0);
        }
    }

    async fn what_differs_and_what_only_one_side_knows_is_reported(server: TestServer) {
        let stripe = Stripe::start();
        let start = now_s() - 5 * DAY;
        let paid = |terms: Terms| {
            let mut life = stripe.draft(terms);
            life.later(HOUR).finalized().later(2).paid_by_card();
            life.invoice.id
        };
        let [agreeing, amount, unknown_here] = [(); 3].map(|()| paid(terms(start, CLOVER)));
        let currency = paid(Terms { currency: "eur", ..terms(start, CLOVER) });
        let of_test_mode = paid(Terms { livemode: false, ..terms(start, CLOVER) });
        let document = |id: &str, amount: f64| json!({"spec": {"paymentUnit": "usd"}, "status": {"billableAmount": amount, "stripeInvoiceId": id}});
        let rows = [("agreeing", &*agreeing, 50.0), ("amount", &amount, 49.99), ("currency", &currency, 50.0), ("mode", &of_test_mode, 50.0), ("none", "in_1None", 50.0)];
        for (uid, id, amount) in rows {
            server.put(&invoice_path(uid), &document(id, amount)).await.with_status(201);
        }
        deliver_all(&server, &stripe).await;
        let url = &server.database.url;
        for attempt in ["first", "again"] {
            let ran = reconcile(url, &stripe, &["--json"]).with_code(3);
            let lists = report(&ran);
            let expected = |ids: &[&String]| ids.iter().map(|id| (*id).clone()).collect::<BTreeSet<String>>();
            assert_eq!(lists["agreeing"], expected(&[&agreeing]), "{attempt}: {}", ran.stdout);
            assert_eq!(lists["differing"], expected(&[&amount, &currency]), "{attempt}: {}", ran.stdout);
            assert_eq!(lists["unknownAtStripe"], expected(&[&of_test_mode, &"in_1None".to_owned()]), "{attempt}: {}", ran.stdout);
            assert_eq!(lists["unknownHere"], expected(&[&unknown_here]), "{attempt}: {}", ran.stdout);
            assert!(ran.stdout.contains("49.99 USD") && ran.stdout.contains("50.00 USD") && ran.stdout.contains("EUR"), "{}", ran.stdout);
        }
        let for_a_person = reconcile(url, &stripe, &[]).with_code(3).stdout;
        for word in [&*amount, "49.99 USD", "50.00 USD", &currency, "EUR", "in_1None", &unknown_here] {
            assert!(for_a_person.contains(word), "{word} is missing in\n{for_a_person}");
        }
        // Put right, all agree but the ones that only one side knows.
        for (uid, id, amount) in [("amount", &amount, 50.0)] {
            server.put(&invoice_path(uid), &document(id, amount)).await.with_status(200);
        }
        let lists = report(&reconcile(url, &stripe, &["--json"]));
        assert_eq!((lists["differing"].len(), lists["agreeing"].len()), (1, 2), "{lists:?}");
    }

    async fn a_webhook_endpoint_that_is_disabled_or_lacks_types_is_said(server: TestServer) {
        let stripe = Stripe::start();
        let ours = format!("{}/webhooks/stripe", server.process.base);
        let said = |endpoint: Endpoint| {
            stripe.register(endpoint);
            let ran = reconcile(&server.database.url, &stripe, &[]);
            assert!([0, 3].contains(&ran.code), "{ran:?}");
            let json = reconcile(&server.database.url, &stripe, &["--json"]).stdout;
            (format!("{}{}", ran.stdout, ran.stderr), json)
        };
        let (text, json) = said(Endpoint::enabled(&ours));
        assert!(!text.contains("disabled") && !text.contains("we_1Fake0") && !json.contains("we_1Fake0"), "{text}\n{json}");
        let (text, json) = said(Endpoint { status: "disabled", ..Endpoint::enabled(&ours) });
        assert!(text.contains("we_1Fake1") && text.contains("disabled") && json.contains("disabled"), "{text}\n{json}");
        let some = Endpoint { enabled_events: vec!["invoice.paid", "charge.failed"], ..Endpoint::enabled(&ours) };
        let (text, json) = said(some);
        for lacking in ["invoice.payment_failed", "payment_intent.payment_failed", "invoice.voided"] {
            assert!(text.contains(lacking) && json.contains(lacking), "{lacking}: {text}\n{json}");
        }
        assert_eq!(stripe.faults(), [""; 0]);
    }

    async fn calls_stay_within_the_budget_and_share_connections(server: TestServer) {
        const RATE: usize = 10;
        let stripe = Stripe::start();
        let lives: Vec<Life> = (0..3 * RATE as i64)
            .map(|n| {
                let mut life = stripe.draft(unlinked(now_s() - 10 * DAY + n));
                life.later(HOUR).finalized().later(HOUR).declined("expired_card", None);
                life
            })
            .collect();
        let invoices: Vec<Stored> = lives.iter().enumerate().map(|(n, life)| stored(&format!("inv-{n}"), life)).collect();
        let database = told_in_part(&server, &stripe, &invoices, |_, _| true);
        reconcile_as(LIVE_KEY, RATE, &database.url, &stripe, &[]).with_code(3);
        assert!(histories(&database.url).values().all(|states| states.contains("expired_card")));
        let mut times: BTreeMap<String, Vec<i64>> = BTreeMap::new();
        for call in stripe.calls() {
            times.entry(call.endpoint.trim_end_matches("/*").to_owned()).or_default().push(call.at_ms);
        }
        assert!(times["/v1/invoice_payments"].len() > RATE, "{times:?}");
        for (endpoint, times) in times {
            let is_within = times.windows(RATE + 1).all(|calls| calls[RATE] - calls[0] >= 1000);
            assert!(is_within, "more than {RATE} calls of {endpoint} in a second: {times:?}");
        }
        assert!(stripe.connections() <= RATE, "{} connections", stripe.connections());
        assert_mannered(&stripe);
    }

    async fn one_at_a_time_asks_and_the_other_waits(server: TestServer) {
        let stripe = Stripe::start();
        let invoices = story::tell(&stripe, INVOICES_IN_TROUBLE);
        import(&server.database.url, &invoices);
        stripe.deliver(&server.process.base, Deliveries::Dropping(0.5, 7)).await;
        // Long enough for the two to meet.
        stripe.trouble(Troubles { slow: 1.0, ..Troubles::default() });
        let _server = asking_server(&server, &stripe, LIVE_KEY);
        let is_under_way = || async { !stripe.calls().is_empty() };
        until("the first pass of the server", is_under_way).await;
let ran = reconcile_as(OTHER_KEY, 1000, &server.database.url, &stripe, &[]);
        assert!([0, 3].contains(&ran.code), "{ran:?}");
        assert_turns(&stripe, 2);
        reconcile_as(OTHER_KEY, 1000, &server.database.url, &stripe, &[]).with_code(0);
    }

    async fn of_two_replicas_one_reconciles_and_the_other_takes_over_when_it_dies(server: TestServer) {
        let stripe = Stripe::start();
        let invoices = story::tell(&stripe, INVOICES_IN_TROUBLE);
        import(&server.database.url, &invoices);
        let mut first = asking_server(&server, &stripe, LIVE_KEY);
        until("the first pass of the first", || async { !stripe.calls().is_empty() }).await;
        // It is in the middle of its pass when it dies.
        stripe.hold();
        let _second = asking_server(&server, &stripe, OTHER_KEY);
        first.sigkill();
        stripe.release();
        until("the second takes over", || async { stripe.calls().iter().any(|call| call.key == OTHER_KEY) }).await;
        assert_turns(&stripe, 2);
        let expected = undisturbed(&server, &stripe, &invoices);
        let own = |id: &String| stripe.events().iter().any(|event| event.account.is_none() && event.object_id() == id);
        until("it completes what was begun", || async {
            let found = histories(&server.database.url);
            expected.iter().filter(|(id, _)| own(id)).all(|(id, states)| &found[id] == states)
        })
        .await;
    }
}

/// Those with one key and those with another asked one after the other, so many turns in all.
#[track_caller]
fn assert_turns(stripe: &Stripe, turns: usize) {
    let mut keys: Vec<String> = stripe.calls().into_iter().map(|call| call.key).collect();
    keys.dedup();
    assert_eq!(keys.len(), turns, "{keys:?}");
}

#[tokio::test]
async fn without_a_key_or_with_a_wrong_one_or_without_stripe_it_says_so() {
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
    // Nothing listens on port 1.
    let away = run(
        &[url, key, ("STRIPE_API_BASE", "http://127.0.0.1:1")],
        &["reconcile"],
        b"",
    )
    .with_code(4);
    assert!(away.stderr.contains("Stripe"), "{}", away.stderr);
}
