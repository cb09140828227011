//! The tolerant reader, which turns authentic bytes into an event and its observation.
//!
//! The presence of fields decides, never `api_version`, so every shape since 2018-11-08 (and every
//! future shape) takes the same code path. A field of an unexpected type counts as absent.
//! `payload` has the JSON, `object` the result. `history/fact` and `history` decide the meaning of
//! the fields.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::lenient::UnixSeconds;
use super::object::Object;
use super::payload::{self, Created, Envelope};

/// Identity of one rendering of one event. A delivery with a known key is a duplicate.
///
/// The first sixteen bytes come from the event's id, the other sixteen from a hash. Stripe's ids
/// begin with their time, so keys made at the same time are neighbours in an index, however long
/// the log; and a prefix search finds an id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EventKey(pub [u8; EventKey::LENGTH]);

impl EventKey {
    /// Length of a key in bytes.
    pub const LENGTH: usize = 32;
    const PREFIX: usize = 16;

    /// Returns the first and the last key that an event with this id may have.
    pub fn range(id: &str) -> (EventKey, EventKey) {
        let (mut first, mut last) = ([0; EventKey::LENGTH], [255; EventKey::LENGTH]);
        let start = id
            .strip_prefix("evt_")
            .unwrap_or(id)
            .bytes()
            .chain(std::iter::repeat(0));
        for (at, byte) in start.take(EventKey::PREFIX).enumerate() {
            (first[at], last[at]) = (byte, byte);
        }
        (EventKey(first), EventKey(last))
    }

    /// Hashes the parts. Each is preceded by its length, so no two lists of parts give the same
    /// bytes.
    fn new(id: &str, parts: &[&[u8]]) -> EventKey {
        let (EventKey(mut key), _) = EventKey::range(id);
        let hash = &mut key[EventKey::PREFIX..];
        let mut sha256 = Sha256::new();
        for part in parts {
            sha256.update((part.len() as u64).to_be_bytes());
            sha256.update(part);
        }
        hash.copy_from_slice(&sha256.finalize()[..hash.len()]);
        EventKey(key)
    }
}

/// The result of reading authentic bytes.
#[derive(Clone, Debug, PartialEq)]
pub enum Reading {
    Event(Box<Event>),
    /// Not JSON, or not an event: stored, counted, and listed for the operator. `reason` names the
    /// problem without payload content.
    Unreadable {
        key: EventKey,
        reason: String,
    },
}

/// The envelope of a snapshot or thin event.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    pub key: EventKey,
    pub id: String,
    /// The type as received, with the `v1.` of thin events.
    pub event_type: String,
    pub api_version: Option<String>,
    /// `data.object.id` (thin: `related_object.id`).
    pub object_id: Option<String>,
    /// Unix seconds.
    pub created: i64,
    /// The observation of the event. `None` if this program does not read objects of this kind.
    pub observation: Option<Observation>,
}

/// The assertion of one event, or of one object fetched from Stripe's API. The store keeps it next
/// to the bytes, and histories are folded from observations alone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Observation {
    /// The event's id.
    pub id: String,
    /// The event's type, without the `v1.` of thin events; empty for a fetched object.
    #[serde(rename = "type")]
    pub kind: String,
    /// Unix seconds; thin events are truncated to the second.
    pub created: i64,
    /// `true` for a thin event. Its type is the claim, and `object` holds only an id.
    #[serde(default, skip_serializing_if = "is_false")]
    pub thin: bool,
    /// Id of the snapshot event about the same change, if this is a thin event.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot_event: Option<String>,
    /// `true` for an object that Stripe's API returned, which is not an event.
    #[serde(default, skip_serializing_if = "is_false")]
    pub fetched: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub livemode: Option<bool>,
    /// The connected account; `None` for the own account.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub account: Option<String>,
    pub object: Object,
}

/// An observation with the key of the stored event that it was read from.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredObservation {
    pub key: EventKey,
    pub observation: Observation,
}

/// A stored observation that cannot be read. `rebuild` repairs it from the stored bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the observation of event {} cannot be read, run `rebuild`: {reason}", hex::encode(key.0))]
pub struct DamagedObservation {
    pub key: EventKey,
    pub reason: String,
}

impl StoredObservation {
    /// Parses a stored observation. This is the only parser.
    ///
    /// # Errors
    /// Returns [`DamagedObservation`] if the text is not an observation. A read of one invoice
    /// fails with this error; a scan skips the row, counts it and logs one warning.
    pub fn parse(key: EventKey, json: &str) -> Result<StoredObservation, DamagedObservation> {
        match serde_json::from_str(json) {
            Ok(observation) => Ok(StoredObservation { key, observation }),
            Err(error) => Err(DamagedObservation {
                key,
                reason: error.to_string(),
            }),
        }
    }
}

/// An object that an observation names. Histories are collected along these links.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub object_id: String,
    pub is_invoice: bool,
}

/// Reads any body that Stripe may deliver. Never fails: a body without an event is
/// [`Reading::Unreadable`].
pub fn read(body: &[u8]) -> Reading {
    let result = match payload::parse(body) {
        Ok(Some(envelope)) if envelope.object.0.as_deref() == Some(FETCHED) => {
            read_fetched(envelope, body).map_err(str::to_owned)
        }
        Ok(Some(envelope)) => read_event(envelope).map_err(str::to_owned),
        Ok(None) => Err("the body is JSON, but not an object".to_owned()),
        Err(error) => Err(describe_json_error(&error)),
    };

    match result {
        Ok(event) => Reading::Event(Box::new(event)),
        Err(reason) => Reading::Unreadable {
            key: EventKey::new("", &[b"unreadable", body]),
            reason,
        },
    }
}

/// Describes a JSON error by position and category. serde_json's own message may quote the payload.
fn describe_json_error(error: &serde_json::Error) -> String {
    let problem = if error.is_eof() {
        "ends in the middle"
    } else {
        "is not JSON"
    };

    format!(
        "the body {problem} (line {}, column {})",
        error.line(),
        error.column()
    )
}

fn read_event(envelope: Envelope) -> Result<Event, &'static str> {
    let id = envelope.id.0.ok_or("no event: `id` is not a string")?;
    let event_type = envelope
        .event_type
        .0
        .ok_or("no event: `type` is not a string")?;
    let Created(created) = envelope
        .created
        .0
        .ok_or("no event: `created` is not a time")?;
    let thin = envelope.object.0.as_deref() == Some("v2.core.event");

    let kind = short(&event_type);
    let data = envelope.data.0.unwrap_or_default();
    let (object_id, object) = if thin {
        let related = envelope.related_object.0.unwrap_or_default();
        (related.id.0.clone(), related.into_related_object(kind))
    } else {
        let fields = data
            .object
            .0
            .ok_or("no event: `data.object` is not an object")?;
        let previous_status = data
            .previous_attributes
            .and_then(|previous| previous.status.0.clone());
        (
            fields.id.0.clone(),
            fields.into_object(kind, previous_status),
        )
    };

    let observation = object.map(|object| Observation {
        id: id.clone(),
        kind: kind.to_owned(),
        created,
        thin,
        snapshot_event: envelope.snapshot_event.0.filter(|_| thin),
        fetched: false,
        livemode: envelope.livemode.0,
        account: envelope.account.into_text().filter(|_| !thin),
        object,
    });

    let api_version = envelope.api_version.0;
    let key = EventKey::new(
        &id,
        &[
            b"event",
            id.as_bytes(),
            event_type.as_bytes(),
            api_version.as_deref().unwrap_or_default().as_bytes(),
            object_id.as_deref().unwrap_or_default().as_bytes(),
        ],
    );

    Ok(Event {
        key,
        id,
        event_type,
        api_version,
        object_id,
        created,
        observation,
    })
}

/// Value of `object` in our own envelope around an object that Stripe's API returned, and the type
/// under which it is listed.
pub const FETCHED: &str = "fetched";

/// Wraps an object that Stripe's API returned in the envelope that the event log stores and that
/// `export` and `replay` transfer.
pub fn envelope(object: &Value, fetched_s: i64, account: Option<&str>) -> Value {
    let mut envelope = json!({"object": FETCHED, "fetched_at": fetched_s});
    if let Some(account) = account {
        envelope["account"] = account.into();
    }
    if let Some(livemode @ Value::Bool(_)) = object.get("livemode") {
        envelope["livemode"] = livemode.clone();
    }
    envelope["data"] = json!({"object": object});

    envelope
}

/// Reads an [`envelope`]. Its key is derived from the object's bytes, not from the time of the
/// fetch, so an unchanged object adds no event.
fn read_fetched(envelope: Envelope, body: &[u8]) -> Result<Event, &'static str> {
    let fields = envelope
        .data
        .0
        .and_then(|data| data.object.0)
        .ok_or("fetched: `data.object` is not an object")?;
    let id = fields
        .id
        .0
        .clone()
        .ok_or("fetched: `data.object.id` is not a string")?;
    let UnixSeconds(created) = envelope
        .fetched_at
        .0
        .ok_or("fetched: `fetched_at` is not a time")?;

    let account = envelope.account.into_text();
    let content = content(body).ok_or("fetched: `data.object` cannot be read")?;
    let key = EventKey::new(
        &id,
        &[
            FETCHED.as_bytes(),
            account.as_deref().unwrap_or_default().as_bytes(),
            id.as_bytes(),
            content.get().as_bytes(),
        ],
    );

    let observation = fields.into_object("", None).map(|object| Observation {
        id: id.clone(),
        kind: String::new(),
        created,
        thin: false,
        snapshot_event: None,
        fetched: true,
        livemode: envelope.livemode.0,
        account,
        object,
    });

    Ok(Event {
        key,
        object_id: Some(id.clone()),
        id,
        event_type: FETCHED.to_owned(),
        api_version: None,
        created,
        observation,
    })
}

/// Returns the bytes of the fetched object, including the fields that this version does not read,
/// so the key stays the same when a later version reads more.
fn content(envelope: &[u8]) -> Option<Box<RawValue>> {
    #[derive(Deserialize)]
    struct Envelope {
        data: Data,
    }
    #[derive(Deserialize)]
    struct Data {
        object: Box<RawValue>,
    }

    let envelope: Envelope = serde_json::from_slice(envelope).ok()?;
    Some(envelope.data.object)
}

/// Returns the type without the `v1.` of thin events, such as `invoice.paid` for `v1.invoice.paid`.
fn short(event_type: &str) -> &str {
    event_type.strip_prefix("v1.").unwrap_or(event_type)
}

impl Observation {
    /// Returns every object that this observation names, its own included, each once.
    pub fn mentions(&self) -> Vec<Link> {
        let mut named = HashSet::new();
        let names = self
            .object
            .names()
            .into_iter()
            .filter(|(object_id, _)| named.insert(*object_id));
        names
            .map(|(object_id, is_invoice)| Link {
                object_id: object_id.to_owned(),
                is_invoice,
            })
            .collect()
    }
}

fn is_false(b: &bool) -> bool {
    !*b
}
