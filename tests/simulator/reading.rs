//! Invariants of reads: no wrong entry is shown, no shown entry disappears, and the evidence can
//! reproduce every earlier read.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use serde_json::{Value, json};

use super::invoice_lifecycle::{Fact, NEAR_S};
use super::ledger::identity;
use super::simulation::{KEY, Simulation, Stored, assert_is_error};
use testkit::{assert_is_invoice, invoice_path};

/// State and second of an entry.
pub type ShownEntry = (String, i64);

/// Record of all reads.
#[derive(Default)]
pub struct Reads {
    /// Entries of each invoice when it was last read.
    last: BTreeMap<String, Vec<ShownEntry>>,
    all: Vec<Read>,
}

struct Read {
    uid: String,
    /// Unix milliseconds by the program's clock.
    at_ms: i64,
    logged: BTreeSet<String>,
    states: Value,
}

impl Simulation {
    /// Reads an invoice. Returns `None` if it is not stored.
    pub fn read(&mut self, n: usize) -> Option<Value> {
        self.check_log();
        let uid = self.invoices[n].uid.clone();
        let replica = self.process().replica(n);
        let answer = self
            .process()
            .run(async { replica.get(&invoice_path(&uid), KEY).await });

        match (self.stored.get(&uid), answer.status.as_u16()) {
            (Some(_), 200) => {}
            (None | Some(Stored::Perhaps), 404) => {
                assert_is_error(&answer, "ResourceNotFound");
                self.trace_line(format!("{uid} is not there"));
                return None;
            }
            (stored, _) => panic!("{uid} ({stored:?}) is answered {answer:?}"),
        }

        let states =
            assert_is_invoice(std::str::from_utf8(&answer.body).unwrap())["status"]["states"]
                .clone();
        let shown = entries(&states);
        let description: Vec<String> = shown
            .iter()
            .map(|(state, at)| format!("{state} {at}"))
            .collect();
        self.trace_line(format!("{uid} is shown as [{}]", description.join(", ")));
        self.check_shown(n, &shown);
        self.reads.last.insert(uid.clone(), shown);
        let logged = self.ledger.logged().clone();

        self.reads.all.push(Read {
            uid,
            at_ms: self.clock.now_ms(),
            logged,
            states: states.clone(),
        });
        Some(states)
    }

    fn check_shown(&self, n: usize, shown: &[ShownEntry]) {
        let invoice = &self.invoices[n];
        let truth = invoice.truth();
        let paid = truth
            .iter()
            .find(|entry| entry.fact == Fact::Paid)
            .map(|entry| entry.at);

        for (state, at) in shown {
            let is_true = truth
                .iter()
                .chain(invoice.repeated())
                .any(|entry| entry.fact.state() == state && entry.at == *at);
            // A payment counts as partial until it is known to be complete; in thin events, an
            // invoice without an amount counts as finalized.
            let is_early =
                paid == Some(*at) && (state == "PaymentInProgress" || state == "PaymentPending");
            assert!(
                is_true || is_early,
                "{} was never {state} at {at}; the truth is {truth:?}",
                invoice.uid
            );
        }

        let stays = |state: &str, at: i64| {
            truth
                .iter()
                .filter(|entry| entry.fact.state() == state && entry.at == at)
                .any(|entry| match entry.fact {
                    // The failures between them distinguish these.
                    Fact::ActionRequired(_) | Fact::InFlight(_) => false,
                    // Entries close in time may be merged until all is known.
                    Fact::Failed => truth.iter().all(|e| {
                        e.fact != Fact::Failed || e.at == at || (e.at - at).abs() > NEAR_S
                    }),
                    _ => true,
                })
        };

        let before = self.reads.last.get(&invoice.uid).into_iter().flatten();
        let gone: Vec<_> = before
            .filter(|entry| !shown.contains(entry) && stays(&entry.0, entry.1))
            .collect();
        assert!(
            gone.is_empty(),
            "{}: no longer shown: {gone:?}; now {shown:?}",
            invoice.uid
        );
    }

    /// Asserts that the evidence as of each earlier read equals that read.
    ///
    /// If the clock jumped meanwhile, the program cannot know the order.
    pub fn check_reads(&self) {
        let log = self.process().durable().log;
        let received: Vec<(i64, String)> = log
            .iter()
            .map(|row| {
                (
                    row.logged.received_ms,
                    identity(row.body.as_deref().unwrap_or_default()),
                )
            })
            .collect();
        let replica = self.process().replica(0);

        for Read {
            uid,
            at_ms,
            logged,
            states,
        } in &self.reads.all
        {
            let by_then: BTreeSet<&String> = received
                .iter()
                .filter(|(ms, _)| ms <= at_ms)
                .map(|(_, identity)| identity)
                .collect();
            if by_then != logged.iter().collect() {
                continue;
            }
            let as_of = Timestamp::from_millisecond(*at_ms).unwrap();
            let path = format!("{}/evidence?asOf={as_of}", invoice_path(uid));
            let evidence = self
                .process()
                .run(replica.get(&path, KEY))
                .with_status(200)
                .json();
            let entry = |entry: &Value| {
                assert!(
                    !entry["proofs"].as_array().unwrap().is_empty(),
                    "{entry} has no proof"
                );
                let mut shown = json!({"state": entry["state"], "timestamp": entry["timestamp"]});
                if !entry["paymentMsg"].is_null() {
                    shown["paymentMsg"] = entry["paymentMsg"].clone();
                }
                shown
            };
            let then: Vec<Value> = evidence["entries"]
                .as_array()
                .unwrap()
                .iter()
                .map(entry)
                .collect();
            assert_eq!(&Value::from(then), states, "{uid} as of {as_of}");
        }
    }
}

/// Returns state and second of each entry.
pub fn entries(states: &Value) -> Vec<ShownEntry> {
    let entry = |state: &Value| {
        let time: Timestamp = state["timestamp"].as_str().unwrap().parse().unwrap();
        assert_eq!(time.as_millisecond() % 1000, 0, "{state}");
        (
            state["state"].as_str().unwrap().to_owned(),
            time.as_second(),
        )
    };

    states
        .as_array()
        .expect("states are always there")
        .iter()
        .map(entry)
        .collect()
}
