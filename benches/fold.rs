//! Folding and reading an invoice with very many failed tries: `cargo bench -- --fold`.
//!
//! Each try is a `charge.failed` and a `payment_intent.payment_failed`, a second apart, as card
//! testing through a hosted page makes them. Every tenth try also has an `invoice.payment_failed`.
//! Growth is the time per observation in comparison with the row above; linear is 1.00.

use std::io::Write;
use std::process::Stdio;
use std::time::Instant;

use serde_json::{Value, json};
use stripe_reconciler::domain::history::{StoredObservation, fold};
use stripe_reconciler::domain::stripe::event::{self, Reading};

use crate::load::closed_loop;
use crate::process::{Served, product};
use crate::{deliveries, reference};

const INVOICE: &str = "in_1Fold";
const START_S: i64 = 1_770_000_000;
/// Numbers of tries. About 2.1 observations come of each.
const TRIES: [usize; 4] = [500, 5_000, 10_000, 50_000];
/// Folds of one size; the fastest counts, because other work on the machine only delays.
const REPEATS: usize = 5;

/// Prints how long folds take, and how long reads take in these empty databases.
pub async fn run(urls: &[String]) {
    println!("   tries  observations   fold ms  us/observation  growth");
    let mut before: Option<f64> = None;
    for tries in TRIES {
        let known = observations(tries);
        let fold_ms = fastest_ms(|| fold(Some(INVOICE), &[], &known).len());
        let each_us = fold_ms * 1e3 / known.len() as f64;
        let growth = before.map_or(1.0, |before| each_us / before);
        println!(
            "{tries:>8}  {:>12}  {fold_ms:>8.2}  {each_us:>14.2}  {growth:>5.2}x",
            known.len()
        );
        before = Some(each_us);
    }

    println!("\n   tries  read p50 ms  read p99 ms  /healthz p99 ms while one client reads");
    for (url, tries) in urls.iter().zip(TRIES) {
        read(url, tries).await;
    }
}

/// Reads the invoice through the server, alone and while another client asks `/healthz`.
async fn read(url: &str, tries: usize) {
    replay(url, tries);
    let (key, path) = store(url);
    let server = Served::product(url);
    reference::settle(url).await;

    let headers = format!("apikey: {key}\r\n");
    let reads = deliveries::reads(&path, &headers, 30);
    let alone = closed_loop(&server.authority, 1, &reads).await;
    assert_eq!(alone.not_2xx, 0, "every read is answered");
    let pings = deliveries::reads("/healthz", "", 500);
    let (_, beside) = tokio::join!(
        closed_loop(&server.authority, 1, &reads),
        closed_loop(&server.authority, 1, &pings)
    );
    println!(
        "{tries:>8}  {:>11.1}  {:>11.1}  {:>15.2}",
        alone.quantile_ms(0.5),
        alone.quantile_ms(0.99),
        beside.quantile_ms(0.99)
    );
}

fn fastest_ms<T>(work: impl Fn() -> T) -> f64 {
    let times = (0..REPEATS).map(|_| {
        let begun = Instant::now();
        std::hint::black_box(work());
        begun.elapsed().as_secs_f64() * 1e3
    });
    times.fold(f64::INFINITY, f64::min)
}

fn observations(tries: usize) -> Vec<StoredObservation> {
    let read = events(tries).map(|event| match event::read(event.to_string().as_bytes()) {
        Reading::Event(event) => StoredObservation {
            key: event.key,
            observation: event.observation.expect("every event is about a payment"),
        },
        Reading::Unreadable { reason, .. } => panic!("{reason}"),
    });
    read.collect()
}

fn events(tries: usize) -> impl Iterator<Item = Value> {
    let finalized = json!({"status": "open", "amount_remaining": 5000, "amount_due": 5000});
    let first = event("f0", "invoice.finalized", 0, "invoice", INVOICE, finalized);
    std::iter::once(first).chain((0..tries).flat_map(try_events))
}

fn try_events(number: usize) -> Vec<Value> {
    let second = 60 + number as i64;
    let charge = format!("ch_{number:06}");
    let error = json!({"decline_code": "do_not_honor", "message": "Declined.", "charge": charge});
    let failed_charge = json!({"payment_intent": "pi_1Fold", "failure_code": "card_declined"});
    let failed_intent = json!({
        "last_payment_error": error, "payment_details": {"order_reference": INVOICE},
    });
    let mut events = vec![
        event(
            &format!("c{number:06}"),
            "charge.failed",
            second,
            "charge",
            &charge,
            failed_charge,
        ),
        event(
            &format!("p{number:06}"),
            "payment_intent.payment_failed",
            second,
            "payment_intent",
            "pi_1Fold",
            failed_intent,
        ),
    ];

    if number.is_multiple_of(10) {
        let open = json!({"status": "open", "attempt_count": 1 + number / 10});
        let id = format!("i{number:06}");
        let failed = event(
            &id,
            "invoice.payment_failed",
            second,
            "invoice",
            INVOICE,
            open,
        );
        events.push(failed);
    }

    events
}

fn event(
    id: &str,
    event_type: &str,
    second: i64,
    kind: &str,
    object_id: &str,
    mut object: Value,
) -> Value {
    object["id"] = object_id.into();
    object["object"] = kind.into();
    object["amount"] = 5000.into();
    object["currency"] = "eur".into();
    json!({
        "id": format!("evt_{id}"), "object": "event", "type": event_type,
        "created": START_S + second, "livemode": true, "data": {"object": object},
    })
}

fn replay(url: &str, tries: usize) {
    let mut replay = product(url)
        .args(["replay", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("it runs");
    let mut lines = std::io::BufWriter::new(replay.stdin.take().expect("piped"));
    for event in events(tries) {
        writeln!(lines, "{event}").expect("it takes a line");
    }

    drop(lines);
    assert!(replay.wait().expect("it ends").success());
}

/// Stores the invoice. Returns a key that reads it, and its path.
fn store(url: &str) -> (String, String) {
    let run = |arguments: &[&str], input: &str| {
        let mut command = product(url)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("it runs");
        let mut stdin = command.stdin.take().expect("piped");
        stdin.write_all(input.as_bytes()).expect("it takes input");
        drop(stdin);
        let output = command.wait_with_output().expect("it ends");
        assert!(output.status.success());
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    };

    let invoice = json!({"metadata": {"uid": "inv-1"}, "status": {"stripeInvoiceId": INVOICE}});
    run(
        &["invoices", "import", "--tenant", "acme", "-"],
        &invoice.to_string(),
    );
    let key = run(&["keys", "create", "--tenant", "acme"], "");
    (key, "/v1/tenants/acme/invoices/inv-1".to_owned())
}
