//! Checks of reading authentic bytes and of the history folded from them.
//!
//! An input is a sequence of bodies: JSON values one after another, as in a story of the fixtures.
//! Bytes after the last JSON value form one more body.

use std::collections::HashSet;

use serde_json::value::RawValue;
use serde_json::{Map, Value, json};
use stripe_reconciler::domain::history::fact::asserts_fact;
use stripe_reconciler::domain::history::{Entry, StoredObservation, fold, lacks_reason};
use stripe_reconciler::domain::invoice::comparison::differences;
use stripe_reconciler::domain::invoice::document::{render, validate};
use stripe_reconciler::domain::payment_state::{ImportedState, PaymentState};
use stripe_reconciler::domain::stripe::event::{
    self, Event, EventKey, FETCHED, Observation, Reading,
};
use stripe_reconciler::domain::time::LAST_SECOND;

use super::message::assert_is_safe;

/// Limits on the bodies and invoices checked per input.
const BODIES: usize = 32;
const INVOICES: usize = 4;
/// Maximum length of a Stripe id in bytes. An index of PostgreSQL accepts 2,704 bytes.
const LONGEST_ID: usize = 255;

pub fn check(input: &[u8]) {
    let mut known: Vec<StoredObservation> = Vec::new();
    for body in bodies(input) {
        let reading = event::read(body);
        assert_eq!(event::read(body), reading, "the same bytes tell the same");
        check_meaning(body, &reading);
        match reading {
            Reading::Unreadable { reason, .. } => {
                assert!(reason.is_ascii() && reason.len() < 100, "{reason}")
            }
            Reading::Event(event) => {
                check_event(&event);
                // As in the store: a known event adds nothing.
                let is_new = known.iter().all(|k| k.key != event.key);
                known.extend(event.observation.filter(|_| is_new).map(|observation| {
                    StoredObservation {
                        key: event.key,
                        observation,
                    }
                }));
            }
        }
    }

    let mut invoices: Vec<String> = Vec::new();
    for mention in known
        .iter()
        .flat_map(|k| k.observation.mentions())
        .filter(|mention| mention.is_invoice)
    {
        if !invoices.contains(&mention.object_id) {
            invoices.push(mention.object_id);
        }
    }
    for invoice in invoices.iter().take(INVOICES) {
        check_history(invoice, &known);
    }
}

fn bodies(input: &[u8]) -> Vec<&[u8]> {
    let mut values = serde_json::Deserializer::from_slice(input).into_iter::<&RawValue>();
    let mut bodies: Vec<&[u8]> = Vec::new();
    while bodies.len() < BODIES {
        match values.next() {
            Some(Ok(value)) => bodies.push(value.get().as_bytes()),
            Some(Err(_)) => {
                bodies.push(&input[values.byte_offset().min(input.len())..]);
                break;
            }
            None => break,
        }
    }

    bodies
}

/// Checks that field order, white space and unknown fields make no difference.
fn check_meaning(body: &[u8], reading: &Reading) {
    // serde_json reads a field of this name as a separate document.
    let has_raw_value_name = body.windows(11).any(|window| window == b"$serde_json");
    let Ok(value) = serde_json::from_slice::<Value>(body) else {
        return;
    };
    let is_fetched = value.get("object").and_then(Value::as_str) == Some(FETCHED);
    if has_raw_value_name {
        return;
    }

    let plain = event::read(value.to_string().as_bytes());
    // An object that the API returned is identified by its bytes.
    if !is_fetched {
        assert_eq!(
            without_key_of_unreadable(&plain),
            without_key_of_unreadable(reading)
        );
    }

    let reordered = event::read(reordered(&value).to_string().as_bytes());
    assert_eq!(without_key(&reordered), without_key(&plain));

    if let (Reading::Event(reordered), Reading::Event(plain), false) =
        (reordered, plain, is_fetched)
    {
        assert_eq!(reordered.key, plain.key);
    }
}

const NO_KEY: EventKey = EventKey([0; EventKey::LENGTH]);

fn without_key(reading: &Reading) -> Reading {
    let mut reading = reading.clone();
    match &mut reading {
        Reading::Event(event) => event.key = NO_KEY,
        Reading::Unreadable { key, .. } => *key = NO_KEY,
    }
    reading
}

fn without_key_of_unreadable(reading: &Reading) -> Reading {
    if matches!(reading, Reading::Event(_)) {
        reading.clone()
    } else {
        without_key(reading)
    }
}

/// Returns the value with its fields in reverse order and two unknown fields in every object.
fn reordered(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let mut reordered = Map::new();
            reordered.insert(
                "a_field_of_tomorrow".to_owned(),
                json!({"id": "in_tomorrow", "status": ["paid", null]}),
            );
            reordered.extend(
                fields
                    .iter()
                    .rev()
                    .map(|(name, field)| (name.clone(), self::reordered(field))),
            );
            reordered.insert("Status".to_owned(), "paid".into());
            reordered.into()
        }
        Value::Array(items) => items.iter().map(self::reordered).collect(),
        other => other.clone(),
    }
}

fn check_event(event: &Event) {
    assert!((0..=LAST_SECOND).contains(&event.created));

    let (first, last) = EventKey::range(&event.id);
    assert!(
        first <= event.key && event.key <= last,
        "it is found by its id"
    );
    asserts_fact(event);

    let Some(observation) = &event.observation else {
        return;
    };
    let kept = serde_json::to_string(observation).expect("a telling can be written");
    assert_eq!(
        &serde_json::from_str::<Observation>(&kept).expect("what was written can be read"),
        observation
    );
    assert!(!kept.contains("\\u0000"), "PostgreSQL takes no NUL: {kept}");

    let mut named = HashSet::new();
    for mention in observation.mentions() {
        let id = mention.object_id;
        assert!(
            (1..=LONGEST_ID).contains(&id.len()),
            "an id of {} bytes",
            id.len()
        );
        assert!(named.insert(id), "no object is named twice");
    }
}

fn check_history(invoice: &str, known: &[StoredObservation]) {
    let history = fold(Some(invoice), &[], known);
    lacks_reason(invoice, known);
    for other in orders(known) {
        assert_eq!(
            fold(Some(invoice), &[], &other),
            history,
            "the order and repetitions make no difference"
        );
    }

    check_entries(&history, known);
    check_growth(invoice, known, &history);
    check_imported(invoice, known, &history);
    let rendered = render(&json!({}), &history);
    let stripes = json!({"status": "paid", "currency": "usd", "amount_due": 1, "livemode": true});
    differences(&rendered, known, &history, &stripes);
}

fn orders(known: &[StoredObservation]) -> [Vec<StoredObservation>; 4] {
    let mut reversed = known.to_vec();
    reversed.reverse();
    let mut turned = known.to_vec();
    turned.rotate_left(known.len() / 3);
    let (even, odd): (Vec<_>, Vec<_>) = known
        .iter()
        .cloned()
        .enumerate()
        .partition(|(at, _)| at % 2 == 0);
    let shuffled = odd
        .into_iter()
        .rev()
        .chain(even)
        .map(|(_, known)| known)
        .collect();

    let doubled = known.iter().chain(reversed.iter()).cloned().collect();
    [reversed, turned, shuffled, doubled]
}

fn check_entries(history: &[Entry], known: &[StoredObservation]) {
    let mut seen = HashSet::new();
    let mut is_paid = false;
    for entry in history {
        assert!(
            seen.insert((entry.state.as_str(), entry.timestamp_ms, &entry.message)),
            "no entry stands twice: {entry:?}"
        );
        assert!(
            !is_paid || entry.state == PaymentState::Paid,
            "nothing leads out of Paid: {history:?}"
        );
        is_paid = entry.state == PaymentState::Paid;
        assert!(
            (0..=LAST_SECOND * 1000).contains(&entry.timestamp_ms),
            "{entry:?}"
        );
        assert_is_safe(
            entry
                .message
                .as_deref()
                .expect("what events tell has a message"),
        );
        assert!(
            !entry.proofs.is_empty()
                && entry
                    .proofs
                    .iter()
                    .all(|key| known.iter().any(|k| k.key == *key)),
            "{entry:?}"
        );
    }

    // Only before Paid: entries that follow from a payment come after it, whatever their time.
    let times: Vec<i64> = history
        .iter()
        .filter(|e| e.state == PaymentState::PaymentPending)
        .map(|e| e.timestamp_ms)
        .collect();
    assert!(times.is_sorted(), "{history:?}");
}

/// Checks that further observations never remove a payment.
fn check_growth(invoice: &str, known: &[StoredObservation], history: &[Entry]) {
    // The snapshot that a thin event names replaces it and may contradict it.
    if known.iter().any(|k| k.observation.snapshot_event.is_some()) {
        return;
    }

    let is_paid = |history: &[Entry]| {
        history
            .last()
            .is_some_and(|entry| entry.state == PaymentState::Paid)
    };
    for upto in [known.len() / 2, known.len().saturating_sub(1)] {
        assert!(
            !is_paid(&fold(Some(invoice), &[], &known[..upto])) || is_paid(history),
            "{history:?}"
        );
    }
}

/// Checks that a rendered history comes first and unchanged when it is imported elsewhere.
fn check_imported(invoice: &str, known: &[StoredObservation], history: &[Entry]) {
    let Ok(valid) = validate(render(&json!({}), history)) else {
        let kinds: HashSet<_> = history
            .iter()
            .map(|e| (e.state.as_str(), e.timestamp_ms))
            .collect();
        assert!(
            kinds.len() < history.len(),
            "only two of a state and a time cannot be stored: {history:?}"
        );
        return;
    };
    let state = |entry: &Entry| (entry.state, entry.timestamp_ms, entry.message.clone());
    let imported = |state: &ImportedState| (state.state, state.timestamp_ms, state.message.clone());
    let shown: Vec<_> = history.iter().map(state).collect();

    assert_eq!(
        valid
            .imported_states
            .iter()
            .map(imported)
            .collect::<Vec<_>>(),
        shown
    );

    let again = fold(Some(invoice), &valid.imported_states, known);
    assert_eq!(
        again.iter().map(state).collect::<Vec<_>>(),
        shown,
        "nothing is told twice"
    );
}
