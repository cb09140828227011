//! Acknowledged events survive SIGKILL under load, and no event is recorded twice.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};
use stripe_reconciler::clock::Clock;
use tokio::sync::mpsc;

use crate::seed::seed;
use testkit::each_database;
use testkit::{SECRET, Server, TestServer, client, invoice_path, signature, try_send};

const ROUNDS: usize = 5;
const CONNECTIONS: usize = 8;
const INVOICES: usize = 6;
/// Answers before a server is killed: enough in all rounds for a failed payment on each invoice.
const MIN_ANSWERS: usize = 20;

/// Returns the n-th event. The lives of the invoices follow one another.
fn event(n: usize) -> Value {
    let (invoice, step) = (n % INVOICES, n / INVOICES);
    let object = match step % 4 {
        0 => {
            json!({"id": format!("pi_{invoice}_{step}"), "object": "payment_intent", "invoice": format!("in_{invoice}"),
            "amount": 5000, "currency": "eur"})
        }
        1 => {
            json!({"id": format!("ch_{invoice}_{step}"), "object": "charge", "invoice": format!("in_{invoice}"),
            "amount": 5000, "currency": "eur", "failure_code": "card_declined"})
        }
        2 => {
            json!({"id": format!("in_{invoice}"), "object": "invoice", "status": "open", "currency": "eur", "amount_due": 5000,
            "amount_remaining": 5000, "attempt_count": step})
        }
        _ => json!({"id": format!("cus_{invoice}"), "object": "customer"}),
    };

    let kind = [
        "payment_intent.processing",
        "charge.failed",
        "invoice.payment_failed",
        "customer.updated",
    ][step % 4];
    json!({"id": format!("evt_{n}"), "object": "event", "type": kind, "created": 1_769_850_000 + 100 * step, "livemode": true,
        "data": {"object": object}})
}

/// Delivers new events over several connections until the server dies.
///
/// Returns the ids of those answered 2xx.
async fn load(base: &str, next: &AtomicUsize, answered: mpsc::UnboundedSender<()>) -> Vec<String> {
    let connections = (0..CONNECTIONS).map(|_| async {
        let (client, mut acknowledged) = (client(), Vec::new());
        loop {
            let event = event(next.fetch_add(1, Ordering::Relaxed));
            let body = event.to_string().into_bytes();
            let signature = signature(SECRET, Clock::system().now_s(), &body);
            let url = format!("{base}/webhooks/stripe");
            match try_send(
                &client,
                "POST",
                &url,
                &[("Stripe-Signature", &signature)],
                body,
            )
            .await
            {
                Ok(answer) => assert_eq!(answer.with_status(200).json()["received"], true),
                Err(_) => break acknowledged,
            }
            acknowledged.push(event["id"].as_str().unwrap().to_owned());
            // The receiver is dropped once enough answers have arrived.
            let _ = answered.send(());
        }
    });

    join_all(connections).await.concat()
}

/// Kills the server after this many answers and a random delay, so that the kill hits deliveries at
/// any stage.
async fn kill_after(
    server: &mut Server,
    answers: usize,
    delay: Duration,
    mut answered: mpsc::UnboundedReceiver<()>,
) {
    for _ in 0..answers {
        answered
            .recv()
            .await
            .expect("the server is there until it is killed");
    }
    tokio::time::sleep(delay).await;
    server.sigkill();
}

fn logged_ids(server: &TestServer) -> Vec<String> {
    let log = server
        .run(&["events", "list", "--limit", "100000", "--json"])
        .with_code(0)
        .json_lines();
    log.iter()
        .map(|event| event["id"].as_str().unwrap().to_owned())
        .collect()
}

each_database! {
    async fn sigkill_under_load_loses_no_acknowledged_event(server: TestServer) {
        let mut server = server;
        let seed = seed();
        let (mut random, next, mut acknowledged) = (
            StdRng::seed_from_u64(seed),
            AtomicUsize::new(0),
            BTreeSet::new(),
        );
        for invoice in 0..INVOICES {
            server
                .store(&format!("inv-{invoice}"), &format!("in_{invoice}"))
                .await
                .with_status(201);
        }
        for round in 0..ROUNDS {
            let context = format!("round {round}, seed {seed}");
            let (answers, delay) = (
                random.random_range(MIN_ANSWERS..120),
                Duration::from_micros(random.random_range(0..3000)),
            );
            let (answered, received) = mpsc::unbounded_channel();
            let base = server.process.base.clone();
            let (ids, ()) = tokio::join!(
                load(&base, &next, answered),
                kill_after(&mut server.process, answers, delay, received)
            );
            acknowledged.extend(ids);
            server.process = server.another_server();
            let log = logged_ids(&server);
            let kept: BTreeSet<String> = log.iter().cloned().collect();
            assert_eq!(kept.len(), log.len(), "{context}: an event is there twice");
            let lost: Vec<&String> = acknowledged.difference(&kept).collect();
            assert!(
                lost.is_empty(),
                "{context}: acknowledged and lost: {lost:?}"
            );
            assert!(kept.len() <= next.load(Ordering::Relaxed), "{context}");
        }
        assert!(
            acknowledged.len() >= ROUNDS * MIN_ANSWERS,
            "{acknowledged:?}"
        );

        let undisturbed = server.another().await;
        let exported = server.run(&["events", "export"]).with_code(0);
        let exported = exported.json_lines();
        assert_eq!(exported.len(), logged_ids(&server).len());
        for event in &exported {
            undisturbed.deliver(event).await.with_status(200);
        }
        for invoice in 0..INVOICES {
            let uid = format!("inv-{invoice}");
            undisturbed
                .store(&uid, &format!("in_{invoice}"))
                .await
                .with_status(201);
            let (states, expected) = (
                server.states(&uid).await.to_string(),
                undisturbed.states(&uid).await.to_string(),
            );
            assert!(
                expected.contains("PaymentFailed"),
                "{}: {expected}",
                invoice_path(&uid)
            );
            assert_eq!(states, expected, "seed {seed}");
        }
    }
}
