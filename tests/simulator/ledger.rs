//! Invariants of the log: it has every acknowledged body byte for byte, nothing that Stripe did not
//! send, and no duplicates.

use std::cell::LazyCell;
use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use stripe_reconciler::domain::stripe::event::EventKey;
use stripe_reconciler::store::{Source, StoredBody};

use testkit::Answer;
use testkit::stripe::{Event, Stripe};

/// Knowledge about the deliveries by their identity.
#[derive(Default)]
pub struct Ledger {
    /// Authentic bodies that were delivered, with the labels of their secrets.
    sent: BTreeMap<String, Sent>,
    /// Deliveries answered 2xx.
    acknowledged: BTreeSet<String>,
    /// Checked rows of the log with their identities.
    rows: BTreeMap<EventKey, String>,
    /// Identities in the log when it was last read.
    logged: BTreeSet<String>,
    /// Deliveries without an answer that the running program may still write.
    unanswered: BTreeSet<String>,
}

#[derive(Default)]
struct Sent {
    bodies: BTreeSet<Vec<u8>>,
    labels: BTreeSet<String>,
}

/// Returns the identity by which the contract recognises a delivery: id, type, version and object,
/// or the bytes.
pub fn identity(body: &[u8]) -> String {
    let json: Value = serde_json::from_slice(body).unwrap_or_default();
    let text = |pointer: &str| json.pointer(pointer).and_then(Value::as_str);
    if json["object"] == "fetched" {
        return format!(
            "fetched for {} {}",
            text("/account").unwrap_or("us"),
            json["data"]["object"]
        );
    }

    let is_thin = json["object"] == "v2.core.event";
    let has_time = json["created"].as_i64().is_some_and(|created| created >= 0) || is_thin;
    let object = if is_thin {
        "/related_object/id"
    } else {
        "/data/object/id"
    };

    match (text("/id"), text("/type")) {
        (Some(id), Some(kind)) if has_time && (is_thin || json["data"]["object"].is_object()) => {
            format!(
                "{id} {kind} {} {}",
                text("/api_version").unwrap_or(""),
                text(object).unwrap_or("")
            )
        }
        _ => format!("unreadable {}", String::from_utf8_lossy(body)),
    }
}

impl Ledger {
    /// Records an authentic body that is about to be delivered.
    pub fn record_sent(&mut self, identity: &str, body: &[u8], labels: &[String]) {
        let sent = self.sent.entry(identity.to_owned()).or_default();
        sent.bodies.insert(body.to_vec());
        sent.labels.extend(labels.iter().cloned());
    }

    /// Returns the identities in the log when it was last read.
    pub fn logged(&self) -> &BTreeSet<String> {
        &self.logged
    }

    /// Records that the program has ended and that the log was read since.
    pub fn record_end(&mut self) {
        self.unanswered.clear();
    }

    /// Checks the answers of concurrent deliveries, each with its identity.
    ///
    /// If `alone` is set, no other source could have brought the same events.
    pub fn check_answers(&mut self, answered: &[(String, Option<Answer>)], alone: bool) {
        let mut firsts: BTreeMap<&str, (usize, bool)> = BTreeMap::new();
        for (identity, answer) in answered {
            let (new, unanswered) = firsts.entry(identity).or_default();
            let Some(answer) = answer else {
                *unanswered = true;
                continue;
            };
            let outcome = outcome(answer);
            let is_unreadable = identity.starts_with("unreadable");
            match outcome.as_str() {
                "duplicate" => {}
                "unreadable" if is_unreadable => *new += 1,
                "recorded" | "no_payment_fact" if !is_unreadable => *new += 1,
                _ => panic!("{identity} is answered as {outcome}"),
            }
            self.acknowledged.insert(identity.clone());
        }

        for (identity, (new, unanswered)) in firsts {
            let was_logged = self.logged.contains(identity);
            assert!(
                new <= usize::from(!was_logged),
                "{identity} was new {new} times, and {was_logged} that it was known"
            );
            let must_be_new =
                !was_logged && !unanswered && !self.unanswered.contains(identity) && alone;
            assert!(
                new == 1 || !must_be_new,
                "{identity} is answered as a duplicate, and nobody had brought it before"
            );
            if unanswered {
                self.unanswered.insert(identity.to_owned());
            }
        }
    }

    /// Checks the log against the deliveries and Stripe's events. Rows never change.
    pub fn check(&mut self, log: &[StoredBody], stripe: &Stripe) {
        let events = LazyCell::new(|| stripe.events());
        for row in log {
            if !self.rows.contains_key(&row.logged.key) {
                let identity = self.check_row(row, stripe, &events);
                self.rows.insert(row.logged.key, identity);
            }
        }

        let mut logged = BTreeSet::new();
        for identity in log.iter().map(|row| &self.rows[&row.logged.key]) {
            assert!(
                logged.insert(identity.clone()),
                "twice in the log: {identity}"
            );
        }

        let lost: Vec<&String> = self.acknowledged.difference(&logged).collect();
        assert!(lost.is_empty(), "acknowledged and lost: {lost:#?}");

        let gone: Vec<&String> = self.logged.difference(&logged).collect();
        assert!(gone.is_empty(), "no longer in the log: {gone:#?}");

        self.logged = logged;
    }

    /// Returns the identity of a row after checking it.
    fn check_row(&self, row: &StoredBody, stripe: &Stripe, events: &[Event]) -> String {
        let body = row.body.as_ref().expect("nothing is pruned");
        let identity = identity(body);
        match row.logged.source {
            Source::Webhook => {
                let sent = self
                    .sent
                    .get(&identity)
                    .unwrap_or_else(|| panic!("in the log, and never sent: {identity}"));
                assert!(
                    sent.bodies.contains(body),
                    "other bytes than were delivered: {identity}"
                );
                let label = row.logged.secret_label.as_deref().unwrap_or_default();
                assert!(
                    sent.labels.contains(label),
                    "signed with {label}, says the log: {identity}"
                );
            }
            Source::Api if identity.starts_with("fetched") => {
                let id = row.logged.object_id.as_deref().unwrap_or_default();
                assert!(stripe.has(id), "Stripe has no such object: {identity}");
            }
            Source::Api => {
                let body: Value = serde_json::from_slice(body).unwrap();
                let event = events.iter().find(|event| {
                    event.generated && row.logged.id.as_deref() == Some(event.id.as_str())
                });
                assert_eq!(
                    Some(body),
                    event.map(Event::as_listed),
                    "not as Stripe lists it: {identity}"
                );
            }
            Source::Replay => panic!("nobody replayed anything: {identity}"),
        }

        identity
    }
}

/// Returns the outcome in a 2xx answer, which has exactly one form.
fn outcome(answer: &Answer) -> String {
    let body: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
    let outcome = body["outcome"].as_str().unwrap_or_default().to_owned();
    assert_eq!(
        body,
        serde_json::json!({"received": true, "outcome": outcome}),
        "{answer:?}"
    );
    outcome
}
