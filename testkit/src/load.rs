//! Deliveries as Stripe makes them: several at a time, some of them twice, and each again until it is acknowledged.
//!
//! What was answered is kept, and held against the log: nothing that was acknowledged is lost, and nothing is there twice.

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

/// Deliveries under way at a time.
const CONNECTIONS: usize = 6;
/// Before a connection delivers the next event: no more load than two cores carry beside all other tests.
const PACE: Duration = Duration::from_millis(3);
/// Before a delivery that was not acknowledged is made again.
const AGAIN: Duration = Duration::from_millis(40);
/// How long one event may take until it is acknowledged, whatever is stopped or killed meanwhile.
const TIMEOUT: Duration = Duration::from_secs(40);
/// Every so many-th event is delivered twice at the same time, to two servers where there are two.
const TWICE: usize = 4;

/// More than any test here delivers events of.
const INVOICES: usize = 600;
/// Invoices whose events come mixed.
const AT_ONCE: usize = 6;
/// Events that an invoice lives through.
const LIFE: usize = 8;

/// The nth event: of invoices each with a life of its own, a few of them at a time.
pub fn event(n: usize) -> Value {
    let (invoice, step) = (
        AT_ONCE * (n / (AT_ONCE * LIFE)) + n % AT_ONCE,
        (n / AT_ONCE) % LIFE,
    );
    let (kind, object) = match step {
        LIFE.. => unreachable!("a remainder"),
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

/// What a delivery was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Heard {
    /// The outcome of a first delivery.
    New(String),
    Duplicate,
    /// 503, or no answer at all, from this server: it may be kept or not.
    Nothing(String),
}

impl Heard {
    fn is_nothing(&self) -> bool {
        matches!(self, Heard::Nothing(_))
    }
}

pub struct Load {
    shared: Arc<Shared>,
    connections: Vec<JoinHandle<()>>,
}

struct Shared {
    /// Where to, in turn.
    bases: RwLock<Vec<String>>,
    next: AtomicUsize,
    is_stopping: AtomicBool,
    heard: Mutex<BTreeMap<usize, Vec<Heard>>>,
    acknowledged: watch::Sender<BTreeSet<String>>,
}

/// All that was delivered, and answered, to its end.
pub struct Told(BTreeMap<usize, Vec<Heard>>);

impl Load {
    /// Stores the invoices that it is about, and begins.
    pub fn start(server: &TestServer) -> Load {
        import(server);
        let shared = Arc::new(Shared {
            bases: RwLock::new(vec![server.process.base.clone()]),
            next: AtomicUsize::new(0),
            is_stopping: AtomicBool::new(false),
            heard: Mutex::default(),
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

    /// Where deliveries go from now on.
    pub fn aim_at(&self, bases: &[&str]) {
        *self.shared.bases.write().unwrap() = bases.iter().map(|base| (*base).to_owned()).collect();
    }

    /// The ids of what was answered 2xx until now.
    pub fn acknowledged(&self) -> BTreeSet<String> {
        self.shared.acknowledged.borrow().clone()
    }

    /// Returns when so many more events were acknowledged.
    pub async fn acknowledge(&self, more: usize) {
        let mut acknowledged = self.shared.acknowledged.subscribe();
        let enough = acknowledged.borrow().len() + more;
        let waited =
            tokio::time::timeout(TIMEOUT, acknowledged.wait_for(|all| all.len() >= enough)).await;
        waited
            .unwrap_or_else(|_| panic!("{more} more are not acknowledged within {TIMEOUT:?}"))
            .unwrap();
    }

    /// Begins nothing new, and returns when all is acknowledged.
    pub async fn finish(self) -> Told {
        self.shared.is_stopping.store(true, Ordering::Relaxed);
        for connection in self.connections {
            connection.await.unwrap();
        }
        let mut heard = self.shared.heard.lock().unwrap();
        assert!(
            heard.len() < INVOICES * LIFE,
            "{} events: too few invoices are stored for them",
            heard.len()
        );
        Told(std::mem::take(&mut heard))
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
            if n.is_multiple_of(TWICE) {
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

    async fn until_acknowledged(&self, client: &HttpClient, n: usize, mut turn: usize, body: &str) {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let base = {
                let bases = self.bases.read().unwrap();
                bases[turn % bases.len()].clone()
            };
            let heard = deliver(client, &base, body).await;
            self.heard
                .lock()
                .unwrap()
                .entry(n)
                .or_default()
                .push(heard.clone());
            if !heard.is_nothing() {
                self.acknowledged
                    .send_if_modified(|acknowledged| acknowledged.insert(event_id(n)));
                return;
            }
            assert!(
                Instant::now() < deadline,
                "event {n} is not acknowledged within {TIMEOUT:?}"
            );
            tokio::time::sleep(AGAIN).await;
            turn += 1;
        }
    }
}

async fn deliver(client: &HttpClient, base: &str, body: &str) -> Heard {
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
            Heard::Nothing(base.to_owned())
        }
        Ok(answer) => match answer.with_status(200).json()["outcome"].as_str().unwrap() {
            "duplicate" => Heard::Duplicate,
            outcome => Heard::New(outcome.to_owned()),
        },
        Err(_) => Heard::Nothing(base.to_owned()),
    }
}

impl Told {
    /// Events that were delivered.
    pub fn events(&self) -> usize {
        self.0.len()
    }

    /// The servers that answered 503 or not at all.
    pub fn refused_by(&self) -> BTreeSet<String> {
        let refused_by = |heard: &Heard| match heard {
            Heard::Nothing(base) => Some(base.clone()),
            Heard::New(_) | Heard::Duplicate => None,
        };
        self.0.values().flatten().filter_map(refused_by).collect()
    }

    /// Whether every event is in the log once, and was answered as new once: to nobody, only where an answer was lost.
    pub fn check_log(&self, log: &[String], told: &str) {
        let kept: BTreeSet<String> = log.iter().cloned().collect();
        assert_eq!(kept.len(), log.len(), "{told}: an event is there twice");
        let delivered: BTreeSet<String> = self.0.keys().map(|n| event_id(*n)).collect();
        assert_eq!(
            kept, delivered,
            "{told}: what was acknowledged and what is kept are the same"
        );
        for (n, heard) in &self.0 {
            let new: Vec<&Heard> = heard
                .iter()
                .filter(|heard| matches!(heard, Heard::New(_)))
                .collect();
            let is_right = match new[..] {
                [] => heard.iter().any(Heard::is_nothing),
                [Heard::New(outcome)] => {
                    outcome
                        == if event(*n)["type"] == "customer.updated" {
                            "no_payment_fact"
                        } else {
                            "recorded"
                        }
                }
                _ => false,
            };
            assert!(is_right, "{told}: event {n} was answered {heard:?}");
        }
    }

    /// Whether the histories are what they are where nothing was ever in the way.
    pub async fn check_histories(&self, histories: &BTreeMap<String, String>, told: &str) {
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
            "{told}: expected {other:?}"
        );
    }
}
