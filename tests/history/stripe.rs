//! Small payloads in two shapes of Stripe's API, with only the fields that matter to a test. Full-size ones are in `fixtures/`.

use serde_json::{Value, json};
use stripe_reconciler::domain::history::{Entry, StoredObservation, fold};
use stripe_reconciler::domain::stripe::event::{self, Reading};

pub const INVOICE: &str = "in_1Q";
pub const INTENT: &str = "pi_1Q";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// 2022-11-15: payments name their invoice.
    Old,
    /// 2025-11-17.clover: they do not, and the order reference does.
    New,
}

pub fn event(id: &str, event_type: &str, created: i64, object: Value) -> Value {
    json!({"id": id, "object": "event", "type": event_type, "created": created, "livemode": true, "data": {"object": object}})
}

pub fn thin(
    id: &str,
    event_type: &str,
    created: &str,
    related: &str,
    snapshot: Option<&str>,
) -> Value {
    json!({"id": id, "object": "v2.core.event", "type": event_type, "created": created, "livemode": true,
        "snapshot_event": snapshot, "related_object": {"id": related, "type": "x", "url": "/v1/x"}})
}

/// An invoice over 50.00 EUR.
pub fn invoice(shape: Shape, status: &str) -> Value {
    let mut invoice = json!({"id": INVOICE, "object": "invoice", "number": "INV-0001", "status": status, "currency": "eur",
        "amount_due": 5000, "amount_paid": 0, "amount_remaining": 5000, "attempted": true, "attempt_count": 0, "status_transitions": {}});
    if status == "paid" {
        invoice["amount_paid"] = json!(5000);
        invoice["amount_remaining"] = json!(0);
    }
    if shape == Shape::Old {
        invoice["paid"] = json!(status == "paid");
        invoice["payment_intent"] = json!(INTENT);
    }
    invoice
}

pub fn intent(shape: Shape, status: &str) -> Value {
    let mut intent = json!({"id": INTENT, "object": "payment_intent", "status": status, "amount": 5000, "currency": "eur"});
    match shape {
        Shape::Old => intent["invoice"] = json!(INVOICE),
        Shape::New => intent["payment_details"] = json!({"order_reference": INVOICE}),
    }
    intent
}

pub fn charge(shape: Shape, id: &str, status: &str) -> Value {
    let mut charge = json!({"id": id, "object": "charge", "status": status, "amount": 5000, "currency": "eur", "payment_intent": INTENT});
    if shape == Shape::Old {
        charge["invoice"] = json!(INVOICE);
    }
    charge
}

/// The object with some fields set.
pub fn with(mut object: Value, fields: Value) -> Value {
    for (name, value) in fields.as_object().expect("fields are an object") {
        object[name] = value.clone();
    }
    object
}

/// What the store would keep of these events: what tells nothing is left out.
pub fn known(events: &[Value]) -> Vec<StoredObservation> {
    let read = events
        .iter()
        .filter_map(|json| match event::read(json.to_string().as_bytes()) {
            Reading::Event(event) => event.observation.map(|observation| StoredObservation {
                key: event.key,
                observation,
            }),
            Reading::Unreadable { reason, .. } => panic!("{reason}: {json}"),
        });
    read.collect()
}

pub fn history(events: &[Value]) -> Vec<Entry> {
    fold(Some(INVOICE), &[], &known(events))
}

/// `Paid 100 message` a line: what a test compares.
pub fn told(events: &[Value]) -> Vec<String> {
    let line = |e: &Entry| {
        format!(
            "{:?} {} {}",
            e.state,
            e.timestamp_ms / 1000,
            e.message.as_deref().unwrap_or_default()
        )
    };
    history(events).iter().map(line).collect()
}

/// States and seconds only.
pub fn states(events: &[Value]) -> Vec<String> {
    history(events)
        .iter()
        .map(|e| format!("{:?} {}", e.state, e.timestamp_ms / 1000))
        .collect()
}
