//! The rows of the event log: new events, stored events, and their columns.

use std::collections::HashSet;

use super::StoreError;
use crate::domain::stripe::event::{EventKey, Link};

/// The channel by which an event arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Webhook,
    Replay,
    Api,
}

/// The result of reading an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Recorded,
    NoPaymentFact,
    Unreadable,
}

impl Source {
    pub fn as_str(self) -> &'static str {
        match self {
            Source::Webhook => "webhook",
            Source::Replay => "replay",
            Source::Api => "api",
        }
    }

    pub(super) fn parse(text: &str) -> Result<Source, StoreError> {
        let all = [Source::Webhook, Source::Replay, Source::Api];
        all.into_iter()
            .find(|source| source.as_str() == text)
            .ok_or_else(|| StoreError::damaged(format!("unknown source of an event: `{text}`")))
    }
}

impl Outcome {
    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::Recorded => "recorded",
            Outcome::NoPaymentFact => "no_payment_fact",
            Outcome::Unreadable => "unreadable",
        }
    }

    /// Returns the outcome with this name, as flags and queries use it, or `None` for an unknown
    /// name.
    pub fn parse(text: &str) -> Option<Outcome> {
        [
            Outcome::Recorded,
            Outcome::NoPaymentFact,
            Outcome::Unreadable,
        ]
        .into_iter()
        .find(|outcome| outcome.as_str() == text)
    }
}

/// A delivered body, compressed with lz4 and preceded by its size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedBody(Vec<u8>);

impl PackedBody {
    pub fn pack(body: &[u8]) -> PackedBody {
        PackedBody(lz4_flex::compress_prepend_size(body))
    }

    /// Wraps the bytes of a stored body.
    pub(super) fn packed(bytes: Vec<u8>) -> PackedBody {
        PackedBody(bytes)
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Returns the bytes as they were delivered, or `None` if the stored body is damaged.
    pub fn unpack(&self) -> Option<Vec<u8>> {
        lz4_flex::decompress_size_prepended(&self.0).ok()
    }
}

/// One authentic event, ready to be appended.
#[derive(Clone, Debug)]
pub struct NewEvent {
    pub key: EventKey,
    /// Id of the event. `None` if the event is unreadable. The next four fields may also be missing
    /// in the event.
    pub id: Option<String>,
    pub event_type: Option<String>,
    pub api_version: Option<String>,
    pub object_id: Option<String>,
    /// Unix seconds.
    pub created_s: Option<i64>,
    /// Unix milliseconds.
    pub received_ms: i64,
    pub source: Source,
    pub secret_label: Option<String>,
    pub outcome: Outcome,
    pub unreadable_reason: Option<String>,
    /// An `Observation` as JSON.
    pub observation: Option<String>,
    pub mentions: Vec<Link>,
    pub body: PackedBody,
}

impl NewEvent {
    /// Returns the mentioned objects that are not invoices, as a JSON array, or `None` if the event
    /// mentions no other object. A history follows these links to further events.
    pub(super) fn linked(&self) -> Option<String> {
        let ids: Vec<&str> = self
            .mentions
            .iter()
            .filter(|mention| !mention.is_invoice)
            .map(|mention| mention.object_id.as_str())
            .collect();
        (!ids.is_empty()).then(|| serde_json::to_string(&ids).expect("strings always serialise"))
    }
}

/// The result of appending an event: new, or a duplicate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Appended {
    New,
    Duplicate,
}

/// A row of the log without its body. Fields as in [`NewEvent`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoggedEvent {
    pub key: EventKey,
    pub id: Option<String>,
    pub event_type: Option<String>,
    pub api_version: Option<String>,
    pub object_id: Option<String>,
    pub created_s: Option<i64>,
    pub received_ms: i64,
    pub source: Source,
    pub secret_label: Option<String>,
    pub outcome: Outcome,
    pub unreadable_reason: Option<String>,
}

/// A row of the log with everything that `rebuild` and `export` need.
#[derive(Clone, Debug)]
pub struct StoredBody {
    pub logged: LoggedEvent,
    pub observation: Option<String>,
    /// The packed body. `None` if it was pruned.
    pub body: Option<Vec<u8>>,
}

/// Conditions on the rows to list. All conditions that are set must hold.
#[derive(Clone, Debug, Default)]
pub struct EventFilter {
    pub event_type: Option<String>,
    /// A Stripe invoice that the event names.
    pub stripe_invoice_id: Option<String>,
    pub outcome: Option<Outcome>,
}

/// The columns of a [`LoggedEvent`].
macro_rules! logged_columns {
    () => {
        "key, id, event_type, api_version, object_id, created_s, received_ms, source, secret_label, outcome, \
         unreadable_reason"
    };
}
pub(super) use logged_columns;

type Text = Option<String>;
pub(super) type LoggedRow = (
    Vec<u8>,
    Text,
    Text,
    Text,
    Text,
    Option<i64>,
    i64,
    String,
    Text,
    String,
    Text,
);
/// A [`LoggedRow`], its observation, and the number of rows found before the byte limit applied.
pub(super) type ObservedRow = (
    Vec<u8>,
    Text,
    Text,
    Text,
    Text,
    Option<i64>,
    i64,
    String,
    Text,
    String,
    Text,
    Text,
    i64,
);
pub(super) type BodyRow = (
    Vec<u8>,
    Text,
    Text,
    Text,
    Text,
    Option<i64>,
    i64,
    String,
    Text,
    String,
    Text,
    Text,
    Option<Vec<u8>>,
);

pub(super) fn event_key(bytes: Vec<u8>) -> Result<EventKey, StoreError> {
    let key = bytes
        .try_into()
        .map_err(|_| StoreError::damaged("the key of an event is damaged"))?;
    Ok(EventKey(key))
}

pub(super) fn logged(row: LoggedRow) -> Result<LoggedEvent, StoreError> {
    let (
        key,
        id,
        event_type,
        api_version,
        object_id,
        created_s,
        received_ms,
        source,
        secret_label,
        outcome,
        unreadable_reason,
    ) = row;

    Ok(LoggedEvent {
        key: event_key(key)?,
        id,
        event_type,
        api_version,
        object_id,
        created_s,
        received_ms,
        source: Source::parse(&source)?,
        secret_label,
        outcome: Outcome::parse(&outcome).ok_or_else(|| {
            StoreError::damaged(format!("unknown outcome of an event: `{outcome}`"))
        })?,
        unreadable_reason,
    })
}

/// Returns the event and the JSON of its observation.
pub(super) fn observed(row: ObservedRow) -> Result<(LoggedEvent, Option<String>), StoreError> {
    let (a, b, c, d, e, f, g, h, i, j, k, observation, _) = row;
    Ok((logged((a, b, c, d, e, f, g, h, i, j, k))?, observation))
}

pub(super) fn stored_body(row: BodyRow) -> Result<StoredBody, StoreError> {
    let (a, b, c, d, e, f, g, h, i, j, k, observation, packed) = row;
    let logged = logged((a, b, c, d, e, f, g, h, i, j, k))?;
    let body = packed
        .map(|packed| {
            PackedBody(packed).unpack().ok_or_else(|| {
                let key = hex::encode(logged.key.0);
                StoreError::damaged(format!("the body of event {key} is damaged"))
            })
        })
        .transpose()?;

    Ok(StoredBody {
        logged,
        observation,
        body,
    })
}

/// Returns the first event of each key, sorted by key.
///
/// The other events are duplicates and are not stored. Because of the order, neighbours share pages
/// of an index, and the batches of several replicas lock rows in the same order.
pub(super) fn firsts(batch: &[NewEvent]) -> Vec<&NewEvent> {
    let mut keys = HashSet::with_capacity(batch.len());
    let mut firsts: Vec<&NewEvent> = batch
        .iter()
        .filter(|event| keys.insert(event.key))
        .collect();
    firsts.sort_unstable_by_key(|event| event.key);
    firsts
}

/// Returns the result for each event of a batch. `is_new` is called in the order of the batch and
/// must return `true` once per new key: a second event with the same key is a duplicate.
pub(super) fn answers(
    batch: &[NewEvent],
    mut is_new: impl FnMut(&EventKey) -> bool,
) -> Vec<Appended> {
    batch
        .iter()
        .map(|event| {
            if is_new(&event.key) {
                Appended::New
            } else {
                Appended::Duplicate
            }
        })
        .collect()
}
