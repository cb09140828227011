//! Recorded Stripe events sent to the real server: every payload, and every story in any order and
//! from any source.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use futures_util::StreamExt;
use futures_util::stream;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use serde_json::Value;

use crate::seed::seed;
use testkit::each_database;
use testkit::{TestServer, run};

/// Concurrent deliveries, as Stripe makes several.
const CONCURRENT: usize = 8;

/// Event types that assert nothing about a payment unless the invoice inside does.
const NO_PAYMENT_FACT: [&str; 13] = [
    "charge.captured",
    "charge.expired",
    "charge.succeeded",
    "charge.updated",
    "customer.updated",
    "invoice.created",
    "invoice.deleted",
    "invoice.upcoming",
    "invoiceitem.created",
    "payment_intent.amount_capturable_updated",
    "payment_intent.canceled",
    "payment_intent.created",
    "payment_intent.succeeded",
];

fn fixtures(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures")
        .join(path)
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn files_in(folder: &str) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(fixtures(folder))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    files
}

/// Returns the expected result of each story by its file name.
fn expected() -> BTreeMap<String, Value> {
    serde_json::from_str(&read(&fixtures("stories/expected.json"))).unwrap()
}

fn story_files() -> Vec<PathBuf> {
    let files: Vec<PathBuf> = expected()
        .keys()
        .map(|name| fixtures(&format!("stories/{name}.jsonl")))
        .collect();
    assert_eq!(
        files.len() + 1,
        files_in("stories").len(),
        "each file has its expectation"
    );
    files
}

/// Returns every delivery of every story in order of arrival.
fn deliveries() -> Vec<String> {
    let lines = |file: &PathBuf| read(file).lines().map(str::to_owned).collect::<Vec<_>>();
    let deliveries: Vec<String> = story_files().iter().flat_map(lines).collect();
    assert!(deliveries.len() > 350, "{}", deliveries.len());
    deliveries
}

fn import_invoices(server: &TestServer) {
    let file = fixtures("invoices.jsonl");
    server
        .run(&[
            "invoices",
            "import",
            "--tenant",
            "acme",
            file.to_str().unwrap(),
        ])
        .with_code(0);
}

/// Returns the histories by uid after comparing them with the expected results.
async fn histories(server: &TestServer, context: &str) -> BTreeMap<String, String> {
    let mut histories = BTreeMap::new();
    for (name, expected) in expected() {
        let uid = expected["invoice"].as_str().unwrap();
        let states = server.states(uid).await;
        let entries: Vec<[String; 3]> = states.as_array().unwrap().iter().map(entry).collect();
        assert_entries(&entries, &expected, &format!("{name}, {context}"));
        histories.insert(uid.to_owned(), states.to_string());
    }
    histories
}

fn entry(state: &Value) -> [String; 3] {
    ["state", "timestamp", "paymentMsg"]
        .map(|field| state[field].as_str().unwrap_or_default().to_owned())
}

/// Asserts state, time and parts of the message for each entry in `expected`.
#[track_caller]
fn assert_entries(entries: &[[String; 3]], expected: &Value, context: &str) {
    let expected: Vec<Vec<String>> = serde_json::from_value(expected["states"].clone()).unwrap();
    let shown = || format!("{context}\nexpected: {expected:#?}\nfound: {entries:#?}");
    assert_eq!(entries.len(), expected.len(), "{}", shown());
    for ([state, time, message], expected) in entries.iter().zip(&expected) {
        assert_eq!([state, time], [&expected[0], &expected[1]], "{}", shown());
        for part in &expected[2..] {
            assert!(message.contains(part), "{part:?} is missing: {}", shown());
        }
    }
}

/// Delivers events concurrently and counts the outcomes.
async fn deliver_all(
    server: &TestServer,
    deliveries: &[String],
    context: &str,
) -> BTreeMap<String, usize> {
    let answers = stream::iter(deliveries)
        .map(|body| server.deliver_bytes(body.as_bytes()))
        .buffer_unordered(CONCURRENT);
    let mut outcomes = BTreeMap::new();

    for answer in answers.collect::<Vec<_>>().await {
        assert_eq!(answer.status, 200, "{context}: {answer:?}");
        *outcomes
            .entry(answer.json()["outcome"].as_str().unwrap().to_owned())
            .or_default() += 1;
    }

    outcomes
}

/// Returns each delivery one to three times in random order.
fn shuffled(deliveries: &[String], random: &mut StdRng) -> Vec<String> {
    let mut shuffled: Vec<String> = Vec::new();
    for delivery in deliveries {
        shuffled.extend(std::iter::repeat_n(
            delivery.clone(),
            random.random_range(1..=3),
        ));
    }
    shuffled.shuffle(random);
    shuffled
}

each_database! {
    async fn every_recorded_payload_gets_its_outcome(server: TestServer) {
        let mut kinds = Vec::new();
        for file in files_in("events")
            .iter()
            .flat_map(|folder| std::fs::read_dir(folder).unwrap())
        {
            let file = file.unwrap().path();
            let body = read(&file);
            let event: Value = serde_json::from_str(&body).unwrap();
            let kind = event["type"].as_str().unwrap().to_owned();
            let expected = if NO_PAYMENT_FACT.contains(&&*kind) {
                "no_payment_fact"
            } else {
                "recorded"
            };
            let answer = server
                .deliver_bytes(body.as_bytes())
                .await
                .with_status(200)
                .json();
            assert_eq!(answer["outcome"], expected, "{}", file.display());
            kinds.push(kind);
        }

        assert!(kinds.len() > 130, "{}", kinds.len());
        assert!(
            NO_PAYMENT_FACT
                .iter()
                .all(|kind| kinds.iter().any(|k| k == kind)),
            "the table has a type without a payload"
        );
    }

    async fn story_result_is_independent_of_order_and_source(server: TestServer) {
        let deliveries = deliveries();
        import_invoices(&server);
        for body in &deliveries {
            server.deliver_bytes(body.as_bytes()).await.with_status(200);
        }
        let in_order = histories(&server, "in order of arrival").await;

        let (seed, other) = (seed(), server.another().await);
        let context = format!("shuffled with seed {seed}");
        let mut random = StdRng::seed_from_u64(seed);
        let shuffled = shuffled(&deliveries, &mut random);
        let (before, after) = shuffled.split_at(random.random_range(0..shuffled.len()));
        let mut outcomes = deliver_all(&other, before, &context).await;
        import_invoices(&other);
        for (outcome, count) in deliver_all(&other, after, &context).await {
            *outcomes.entry(outcome).or_default() += count;
        }
        assert_eq!(histories(&other, &context).await, in_order, "{context}");
        let log = other
            .run(&["events", "list", "--limit", "10000", "--json"])
            .with_code(0)
            .json_lines();
        let kept = |outcome: &str| {
            log.iter()
                .filter(|event| event["outcome"] == outcome)
                .count()
        };
        let (recorded, no_fact, again) = (
            kept("recorded"),
            kept("no_payment_fact"),
            shuffled.len() - log.len(),
        );
        let expected = [
            ("recorded", recorded),
            ("no_payment_fact", no_fact),
            ("duplicate", again),
        ];
        assert_eq!(
            outcomes,
            expected
                .map(|(outcome, count)| (outcome.to_owned(), count))
                .into(),
            "{context}"
        );

        let replayed = server.another().await;
        let files: Vec<String> = story_files()
            .iter()
            .map(|file| file.to_str().unwrap().to_owned())
            .collect();
        let arguments: Vec<&str> = ["replay", "--json"]
            .into_iter()
            .chain(files.iter().map(String::as_str))
            .collect();
        let counts = replayed.run(&arguments).with_code(0).json();
        import_invoices(&replayed);
        assert_eq!(histories(&replayed, "replayed").await, in_order);
        assert_eq!(
            (&counts["recorded"], &counts["refused"]),
            (&recorded.into(), &0.into()),
            "{counts}"
        );
    }
}

#[test]
fn demo_prints_the_results_of_its_stories() {
    let shown = run(&[], &["demo"], b"").with_code(0).stdout;
    let expected = expected();
    let mut samples = 0;
    for sample in shown.split("\n\n").filter(|part| part.starts_with("inv-")) {
        let (title, rows) = sample.split_once('\n').unwrap_or((sample, ""));
        let uid = title.split(' ').next().unwrap();
        let (name, expected) = expected
            .iter()
            .find(|(_, story)| story["invoice"] == uid)
            .unwrap();
        let entries: Vec<[String; 3]> = rows
            .lines()
            .filter(|row| !row.trim().is_empty())
            .map(row)
            .collect();
        assert_entries(&entries, expected, &format!("{name} in\n{shown}"));
        samples += 1;
    }

    assert!(
        samples >= 12 && shown.contains(&format!("{samples} invoices stored")),
        "{shown}"
    );
}

/// Splits a line `TIME  STATE  MESSAGE`.
fn row(line: &str) -> [String; 3] {
    let (time, rest) = line.trim().split_once("  ").unwrap();
    let (state, message) = rest.split_once("  ").unwrap();
    [state.to_owned(), time.to_owned(), message.trim().to_owned()]
}
