//! Turns the bytes of a delivery into a durable row: parse, derive the observation, append.
//! Webhook, replay and reconciliation all use it.

pub mod batch_writer;

use bytes::Bytes;
use tracing::{Instrument, field};

use crate::domain::history::fact;
use crate::domain::stripe::event::{self, Event, Link, Reading};
use crate::ingest::batch_writer::{AppendError, BatchWriter};
use crate::store::{self, Appended, NewEvent, PackedBody, Source};

/// Largest number of objects by which an event can be found. Stripe lists at most 100 objects in a
/// page, and an event holds one page of each list; the largest real events name some twenty. A
/// history follows every link, so an event that names more would make each of its reads slower.
const MAX_LINKS: usize = 1_000;

/// Bytes that come from Stripe, as proved by their signature (webhook), the operator (replay) or
/// TLS (API).
#[derive(Clone, Debug)]
pub struct Delivery {
    pub body: Bytes,
    pub source: Source,
    /// Label of the signing secret that matched, never the secret itself.
    pub secret_label: Option<String>,
    pub received_ms: i64,
}

/// The outcome of an acknowledged delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Recorded,
    Duplicate,
    NoPaymentFact,
    Unreadable,
}

impl Outcome {
    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::Recorded => "recorded",
            Outcome::Duplicate => "duplicate",
            Outcome::NoPaymentFact => "no_payment_fact",
            Outcome::Unreadable => "unreadable",
        }
    }
}

/// Turns a delivery into a row. Parses, hashes and compresses before the queue, so that the single
/// writer only writes.
pub fn prepare(delivery: Delivery) -> NewEvent {
    let body = PackedBody::pack(&delivery.body);
    let Delivery {
        source,
        secret_label,
        received_ms,
        ..
    } = delivery;

    match event::read(&delivery.body) {
        Reading::Unreadable { key, reason } => NewEvent {
            key,
            id: None,
            event_type: None,
            api_version: None,
            object_id: None,
            created_s: None,
            received_ms,
            source,
            secret_label,
            outcome: store::Outcome::Unreadable,
            unreadable_reason: Some(reason),
            observation: None,
            mentions: Vec::new(),
            body,
        },
        Reading::Event(event) => NewEvent {
            key: event.key,
            outcome: if fact::asserts_fact(&event) {
                store::Outcome::Recorded
            } else {
                store::Outcome::NoPaymentFact
            },
            mentions: links(&event),
            observation: event.observation.as_ref().map(|t| {
                serde_json::to_string(t).expect("strings, numbers and booleans always serialise")
            }),
            id: Some(event.id),
            event_type: Some(event.event_type),
            api_version: event.api_version,
            object_id: event.object_id,
            created_s: Some(event.created),
            received_ms,
            source,
            secret_label,
            unreadable_reason: None,
            body,
        },
    }
}

/// Returns the objects that an event names, up to [`MAX_LINKS`]. Drops and logs the others.
fn links(event: &Event) -> Vec<Link> {
    let mut links = event
        .observation
        .as_ref()
        .map(super::domain::stripe::event::Observation::mentions)
        .unwrap_or_default();
    if links.len() > MAX_LINKS {
        tracing::warn!(
            event.id = event.id,
            links = links.len(),
            dropped = links.len() - MAX_LINKS,
            "event names too many objects, dropped the rest"
        );
        links.truncate(MAX_LINKS);
    }

    links
}

/// Stores a delivery and returns when the row is durable.
///
/// # Errors
/// Returns an error if the queue is full or closed, or the store is unavailable. The caller must
/// not acknowledge the delivery; Stripe redelivers it.
pub async fn ingest(inbox: &BatchWriter, delivery: Delivery) -> Result<Outcome, AppendError> {
    let event =
        tracing::debug_span!("read", bytes = delivery.body.len()).in_scope(|| prepare(delivery));
    keep(inbox, event).await
}

/// Stores a row that the caller has prepared and inspected; otherwise the same as [`ingest`].
pub async fn keep(inbox: &BatchWriter, event: NewEvent) -> Result<Outcome, AppendError> {
    let outcome = match event.outcome {
        store::Outcome::Recorded => Outcome::Recorded,
        store::Outcome::NoPaymentFact => Outcome::NoPaymentFact,
        store::Outcome::Unreadable => Outcome::Unreadable,
    };
    // The writer records the batch.
    let span = tracing::debug_span!(
        "keep",
        event.id = event.id.as_deref(),
        event.type = event.event_type.as_deref(),
        batch.id = field::Empty
    );
    let keeping = async {
        let outcome = match inbox.append(event).await? {
            Appended::New => outcome,
            Appended::Duplicate => Outcome::Duplicate,
        };
        tracing::debug!(outcome = outcome.as_str(), "durable");
        Ok(outcome)
    };

    keeping.instrument(span).await
}
