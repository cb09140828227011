//! Deliveries as Stripe makes them: several at a time, some of them twice, each repeated until it
//! is acknowledged.
//!
//! The answers are recorded and compared with the log: no acknowledged event is missing, and no
//! event is stored twice.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stripe_reconciler::clock::Clock;
use stripe_reconciler::http_client::HttpClient;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::http::{client, try_send};
use super::server::{SECRET, TestServer, signature};

/// Concurrent connections.
const CONNECTIONS: usize = 6;
/// Pause of a connection between two events.
///
/// Two cores can carry this load together with the other tests.
const PACE: Duration = Duration::from_millis(3);
/// Pause before an unacknowledged delivery is repeated.
const RETRY_DELAY: Duration = Duration::from_millis(40);
/// Maximum time until an event is acknowledged, whatever is stopped or killed meanwhile.
const TIMEOUT: Duration = Duration::from_secs(40);
/// Every n-th event is delivered twice at the same time, to two servers if there are two.
const DUPLICATED_EVERY: usize = 4;

/// Number of stored invoices, more than any test here delivers events for.
const INVOICES: usize = 600;
/// Number of invoices whose events are interleaved.
const INTERLEAVED: usize = 6;
/// Number of events per invoice.
const EVENTS_PER_INVOICE: usize = 8;

/// Returns the n-th event. The events of [`AT_ONCE`] invoices are interleaved.
pub fn event(n: usize) -> Value {
    let (invoice, step) = (
        INTERLEAVED * (n / (INTERLEAVED * EVENTS_PER_INVOICE)) + n % INTERLEAVED,
        (n / INTERLEAVED) % EVENTS_PER_INVOICE,
    );
    let (kind, object) = match step {
        EVENTS_PER_INVOICE.. => unreachable!("a remainder"),
        7 => ("invoice.paid", invoice_object(invoice, "paid", 5000, step)),
        step => match step % 4 {
            0 => (
                "payment_intent.processing",
                json!({"id": format!("pi_{invoice}_{step}"), "object": "payment_intent",
                "invoice": format!("in_{invoice}"), "amount": 5000, "currency": "eur"}),
            ),
            1 => (
                "charge.failed",
                json!({"id": format!("ch_{invoice}_{step}"), "object": "charge",
                "invoice": format!("in_{invoice}"), "amount": 5000, "currency": "eur", "failure_code": "card_declined"}),
            ),
            2 => (
                "invoice.payment_failed",
                invoice_object(invoice, "open", 0, step),
            ),
            _ => (
                "customer.updated",
                json!({"id": format!("cus_{invoice}"), "object": "customer"}),
            ),
        },
    };

    json!({"id": event_id(n), "object": "event", "type": kind, "created": 1_769_850_000 + 100 * step, "livemode": true,
        "data": {"object": object}})
}

fn invoice_object(invoice: usize, status: &str, paid: i64, step: usize) -> Value {
    json!({"id": format!("in_{invoice}"), "object": "invoice", "status": status, "currency": "eur", "amount_due": 5000,
        "amount_paid": paid, "amount_remaining": 5000 - paid, "attempt_count": step})
}

fn event_id(n: usize) -> String {
    format!("evt_{n}")
}

/// Answer to a delivery.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Answered {
    /// Outcome of a first delivery.
    New(String),
    Duplicate,
    /// 503 or no answer from this server. The event may or may not be stored.
    Refused(String),
}

impl Answered {
    fn is_refused(&self) -> bool {
        matches!(self, Answered::Refused(_))
    }
}

pub struct Load {
    shared: Arc<Shared>,
    connections: Vec<JoinHandle<()>>,
}

struct Shared {
    /// Addresses that deliveries go to, in turn.
    bases: RwLock<Vec<String>>,
    next: AtomicUsize,
    is_stopping: AtomicBool,
    answers: Mutex<BTreeMap<usize, Vec<Answered>>>,
    acknowledged: watch::Sender<BTreeSet<String>>,
}

/// All deliveries with their answers.
pub struct Delivered(BTreeMap<usize, Vec<Answered>>);

impl Load {
    /// Stores the invoices and starts delivering.
    pub fn start(server: &TestServer) -> Load {
        import(server);
        let shared = Arc::new(Shared {
            bases: RwLock::new(vec![server.process.base.clone()]),
            next: AtomicUsize::new(0),
            is_stopping: AtomicBool::new(false),
            answers: Mutex::default(),
            acknowledged: watch::Sender::new(BTreeSet::new()),
        });
        let connections = (0..CONNECTIONS)
            .map(|_| tokio::spawn(shared.clone().deliver_on()))
            .collect();

        Load {
            shared,
            connections,
        }
    }

    /// Sends later deliveries to these addresses.
    pub fn redirect_to(&self, bases: &[&str]) {
        *self.shared.bases.write().unwrap() = bases.iter().map(|base| (*base).to_owned()).collect();
    }

    /// Returns the ids of the events acknowledged so far.
    pub fn acknowledged(&self) -> BTreeSet<String> {
        self.shared.acknowledged.borrow().clone()
    }

    /// Waits until this many more events are acknowledged.
    pub async fn acknowledge(&self, more: usize) {
        let mut acknowledged = self.shared.acknowledged.subscribe();
        let enough = acknowledged.borrow().len() + more;
        let waited =
            tokio::time::timeout(TIMEOUT, acknowledged.wait_for(|all| all.len() >= enough)).await;
        waited
            .unwrap_or_else(|_| panic!("{more} more are not acknowledged within {TIMEOUT:?}"))
            .unwrap();
    }

    /// Stops delivering new events and waits until all events are acknowledged.
    pub async fn finish(self) -> Delivered {
        self.shared.is_stopping.store(true, Ordering::Relaxed);
        for connection in self.connections {
            connection.await.unwrap();
        }

        let mut answers = self.shared.answers.lock().unwrap();
        assert!(
            answers.len() < INVOICES * EVENTS_PER_INVOICE,
            "{} events: too few invoices are stored for them",
            answers.len()
        );

        Delivered(std::mem::take(&mut answers))
    }
}

fn import(server: &TestServer) {
    let document = |n| json!({"metadata": {"uid": format!("inv-{n}")}, "status": {"stripeInvoiceId": format!("in_{n}")}});
    let lines: Vec<String> = (0..INVOICES).map(|n| document(n).to_string()).collect();
    server
        .run_with_input(
            &["invoices", "import", "--tenant", "acme", "-"],
            lines.join("\n").as_bytes(),
        )
        .with_code(0);
}

impl Shared {
    async fn deliver_on(self: Arc<Shared>) {
        let client = client();
        while !self.is_stopping.load(Ordering::Relaxed) {
            let n = self.next.fetch_add(1, Ordering::Relaxed);
            let body = event(n).to_string();
            if n.is_multiple_of(DUPLICATED_EVERY) {
                tokio::join!(
                    self.until_acknowledged(&client, n, n, &body),
                    self.until_acknowledged(&client, n, n + 1, &body)
                );
            } else {
                self.until_acknowledged(&client, n, n, &body).await;
            }
            tokio::time::sleep(PACE).await;
        }
    }

    async fn until_acknowledged(
        &self,
        client: &HttpClient,
        n: usize,
        mut server: usize,
        body: &str,
    ) {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let base = {
                let bases = self.bases.read().unwrap();
                bases[server % bases.len()].clone()
            };
            let answers = deliver(client, &base, body).await;
            self.answers
                .lock()
                .unwrap()
                .entry(n)
                .or_default()
                .push(answers.clone());
            if !answers.is_refused() {
                self.acknowledged
                    .send_if_modified(|acknowledged| acknowledged.insert(event_id(n)));
                return;
            }
            assert!(
                Instant::now() < deadline,
                "event {n} is not acknowledged within {TIMEOUT:?}"
            );
            tokio::time::sleep(RETRY_DELAY).await;
            server += 1;
        }
    }
}

async fn deliver(client: &HttpClient, base: &str, body: &str) -> Answered {
    let signature = signature(SECRET, Clock::system().now_s(), body.as_bytes());
    let url = format!("{base}/webhooks/stripe");
    match try_send(
        client,
        "POST",
        &url,
        &[("Stripe-Signature", &signature)],
        body.as_bytes().to_vec(),
    )
    .await
    {
        Ok(answer) if answer.status == 503 => {
            assert!(!answer.header("retry-after").is_empty(), "{answer:?}");
            Answered::Refused(base.to_owned())
        }
        Ok(answer) => match answer.with_status(200).json()["outcome"].as_str().unwrap() {
            "duplicate" => Answered::Duplicate,
            outcome => Answered::New(outcome.to_owned()),
        },
        Err(_) => Answered::Refused(base.to_owned()),
    }
}

impl Delivered {
    /// Returns the number of delivered events.
    pub fn events(&self) -> usize {
        self.0.len()
    }

    /// Returns the servers that answered 503 or not at all.
    pub fn refused_by(&self) -> BTreeSet<String> {
        let refused_by = |answers: &Answered| match answers {
            Answered::Refused(base) => Some(base.clone()),
            Answered::New(_) | Answered::Duplicate => None,
        };
        self.0.values().flatten().filter_map(refused_by).collect()
    }

    /// Asserts that each event is logged once and was answered as new once.
    ///
    /// It may never have been answered as new if an answer was lost.
    pub fn check_log(&self, log: &[String], context: &str) {
        let kept: BTreeSet<String> = log.iter().cloned().collect();
        assert_eq!(kept.len(), log.len(), "{context}: an event is there twice");

        let delivered: BTreeSet<String> = self.0.keys().map(|n| event_id(*n)).collect();
        assert_eq!(
            kept, delivered,
            "{context}: what was acknowledged and what is kept are the same"
        );

        for (n, answers) in &self.0 {
            let new: Vec<&Answered> = answers
                .iter()
                .filter(|answers| matches!(answers, Answered::New(_)))
                .collect();
            let is_right = match new[..] {
                [] => answers.iter().any(Answered::is_refused),
                [Answered::New(outcome)] => {
                    outcome
                        == if event(*n)["type"] == "customer.updated" {
                            "no_payment_fact"
                        } else {
                            "recorded"
                        }
                }
                _ => false,
            };
            assert!(is_right, "{context}: event {n} was answered {answers:?}");
        }
    }

    /// Asserts that the histories equal those of an undisturbed server.
    pub async fn check_histories(&self, histories: &BTreeMap<String, String>, context: &str) {
        let undisturbed = TestServer::start(super::database::Engine::Sqlite).await;
        import(&undisturbed);
        let events: Vec<String> = self.0.keys().map(|n| event(*n).to_string()).collect();
        undisturbed
            .run_with_input(&["replay", "-"], events.join("\n").as_bytes())
            .with_code(0);
        let expected = undisturbed.all_histories();

        assert!(
            expected
                .values()
                .any(|states| states.contains("PaymentFailed")),
            "{expected:?}"
        );

        let other: Vec<_> = expected
            .iter()
            .filter(|(uid, states)| histories.get(*uid) != Some(*states))
            .take(3)
            .collect();
        assert!(
            other.is_empty() && expected.len() == histories.len(),
            "{context}: expected {other:?}"
        );
    }
}
