//! The tolerant reader: from authentic bytes to the envelope of an event and the few fields of its object that we need.
//!
//! The presence of fields decides, never `api_version`, so every shape since 2018-11-08 (and shapes not yet invented) goes
//! through the same lines. A field of an unexpected type counts as absent. What the fields *mean* is not decided here: that
//! is `fact` and `history`. What the objects look like is in `object`.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::json;
use super::object::{Object, boolean, id_of, text, whole};
use crate::domain::time::LAST_SECOND;

/// Identity of one rendering of one event: what makes a second delivery a duplicate.
///
/// Sixteen bytes of a hash, and before them sixteen bytes of the event's id as it stands. Stripe's ids begin with their time, so
/// keys that are made at the same time lie side by side in an index, however long the log; and an id is found by its prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EventKey(pub [u8; EventKey::LENGTH]);

impl EventKey {
    pub const LENGTH: usize = 32;
    const PREFIX: usize = 16;

    /// The first and the last key that an event with this id may have.
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

    /// Parts are preceded by their length, so no two lists of parts give the same bytes.
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

/// What authentic bytes turned out to be.
#[derive(Clone, Debug, PartialEq)]
pub enum Reading {
    Event(Box<Event>),
    /// Kept, counted, listed for the operator: not JSON, or no event in it. `reason` says which, without payload content.
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
    /// As received, with the `v1.` of thin events.
    pub event_type: String,
    pub api_version: Option<String>,
    /// `data.object.id` (thin: `related_object.id`).
    pub object_id: Option<String>,
    /// Unix seconds.
    pub created: i64,
    /// None when the object is of no kind that we read.
    pub telling: Option<Observation>,
}

/// What one event (or one object fetched from Stripe's API) tells. This is what the store keeps beside the bytes, and all
/// that a history is folded from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Observation {
    /// The event's id.
    pub id: String,
    /// The event's type, without the `v1.` of thin events; empty for a fetched object.
    #[serde(rename = "type")]
    pub kind: String,
    /// Unix seconds; thin events are cut to the second.
    pub created: i64,
    /// A thin event: its type is the claim, `object` holds only an id.
    #[serde(default, skip_serializing_if = "is_false")]
    pub thin: bool,
    /// Thin: the id of the snapshot event that tells the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot_event: Option<String>,
    /// Not an event: the object as Stripe's API returned it.
    #[serde(default, skip_serializing_if = "is_false")]
    pub fetched: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub livemode: Option<bool>,
    /// The connected account.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub account: Option<String>,
    pub object: Object,
}

/// An object that a telling names: what a history is gathered by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub object_id: String,
    pub is_invoice: bool,
}

/// Reads any body that Stripe may deliver. Never fails: what is no event is `Unreadable`.
pub fn read(body: &[u8]) -> Reading {
    let unreadable = |reason: String| Reading::Unreadable {
        key: EventKey::new("", &[b"unreadable", body]),
        reason,
    };
    let json = match json::parse(body) {
        Ok(json) => json,
        Err(error) => return unreadable(not_json(&error)),
    };
    let is_fetched = text(&json, "object").as_deref() == Some(FETCHED);
    match if is_fetched {
        fetched(&json, body)
    } else {
        event(&json)
    } {
        Ok(event) => Reading::Event(Box::new(event)),
        Err(reason) => unreadable(reason.to_owned()),
    }
}

/// serde_json's own message may quote the payload; position and category do not.
fn not_json(error: &serde_json::Error) -> String {
    let what = if error.is_eof() {
        "ends in the middle"
    } else {
        "is not JSON"
    };
    format!(
        "the body {what} (line {}, column {})",
        error.line(),
        error.column()
    )
}

fn event(json: &Value) -> Result<Event, &'static str> {
    if !json.is_object() {
        return Err("the body is JSON, but not an object");
    }
    let id = text(json, "id").ok_or("no event: `id` is not a string")?;
    let event_type = text(json, "type").ok_or("no event: `type` is not a string")?;
    let thin = text(json, "object").as_deref() == Some("v2.core.event");
    let created = created(json)
        .filter(|s| (0..=LAST_SECOND).contains(s))
        .ok_or("no event: `created` is no time")?;
    let (object, kind) = if thin {
        (json.get("related_object"), short(&event_type))
    } else {
        (json.pointer("/data/object"), &*event_type)
    };
    if !thin && !object.is_some_and(Value::is_object) {
        return Err("no event: `data.object` is not an object");
    }
    let object_id = object.and_then(|o| text(o, "id"));
    let api_version = text(json, "api_version");
    let read = match object {
        Some(related) if thin => Object::named(kind, related),
        Some(object) => Object::read(kind, object, json.pointer("/data/previous_attributes")),
        None => None,
    };
    let telling = read.map(|object| Observation {
        id: id.clone(),
        kind: kind.to_owned(),
        created,
        thin,
        snapshot_event: thin.then(|| text(json, "snapshot_event")).flatten(),
        fetched: false,
        livemode: boolean(json, "livemode"),
        account: if thin { None } else { id_of(json, "account") },
        object,
    });
    let part = |s: &Option<String>| s.clone().unwrap_or_default();
    let (version, object) = (part(&api_version), part(&object_id));
    let key = EventKey::new(
        &id,
        &[
            b"event",
            id.as_bytes(),
            event_type.as_bytes(),
            version.as_bytes(),
            object.as_bytes(),
        ],
    );
    Ok(Event {
        key,
        id,
        event_type,
        api_version,
        object_id,
        created,
        telling,
    })
}

/// What `object` says in the envelope of our own around an object that Stripe's API returned, and the type that it is listed by.
pub const FETCHED: &str = "fetched";

/// The envelope around an object that Stripe's API returned: what the log keeps, and what `export` and `replay` carry.
pub fn envelope(object: &Value, fetched_s: i64, account: Option<&str>) -> Value {
    let mut envelope = json!({"object": FETCHED, "fetched_at": fetched_s});
    if let Some(account) = account {
        envelope["account"] = account.into();
    }
    if let Some(livemode) = boolean(object, "livemode") {
        envelope["livemode"] = livemode.into();
    }
    envelope["data"] = json!({"object": object});
    envelope
}

/// Its key is the object as it stands, whenever it was fetched: an object that has not changed adds nothing.
fn fetched(json: &Value, body: &[u8]) -> Result<Event, &'static str> {
    let object = json
        .pointer("/data/object")
        .filter(|o| o.is_object())
        .ok_or("fetched: `data.object` is not an object")?;
    let id = text(object, "id").ok_or("fetched: `data.object.id` is not a string")?;
    let created = whole(json, "fetched_at")
        .filter(|s| (0..=LAST_SECOND).contains(s))
        .ok_or("fetched: `fetched_at` is no time")?;
    let telling = Object::read("", object, None).map(|object| Observation {
        id: id.clone(),
        kind: String::new(),
        created,
        thin: false,
        snapshot_event: None,
        fetched: true,
        livemode: boolean(json, "livemode"),
        account: id_of(json, "account"),
        object,
    });
    let account = id_of(json, "account").unwrap_or_default();
    let content = content(body).ok_or("fetched: `data.object` cannot be read")?;
    let key = EventKey::new(
        &id,
        &[
            FETCHED.as_bytes(),
            account.as_bytes(),
            id.as_bytes(),
            content.get().as_bytes(),
        ],
    );
    let object_id = Some(id.clone());
    Ok(Event {
        key,
        id,
        event_type: FETCHED.to_owned(),
        api_version: None,
        object_id,
        created,
        telling,
    })
}

/// The fetched object as it stands, with the fields that nothing here reads yet: the key stays when a later version reads more.
fn content(envelope: &[u8]) -> Option<Box<RawValue>> {
    #[derive(Deserialize)]
    struct Envelope {
        data: Data,
    }
    #[derive(Deserialize)]
    struct Data {
        object: Box<RawValue>,
    }
    serde_json::from_slice::<Envelope>(envelope)
        .ok()
        .map(|envelope| envelope.data.object)
}

/// Snapshot events carry Unix seconds, thin ones RFC 3339 with up to nanoseconds, cut to the second here.
fn created(json: &Value) -> Option<i64> {
    match json.get("created")? {
        Value::String(s) => s
            .parse::<jiff::Timestamp>()
            .ok()
            .map(|t| t.as_nanosecond().div_euclid(1_000_000_000) as i64),
        _ => whole(json, "created"),
    }
}

/// `v1.invoice.paid` is read as `invoice.paid`.
fn short(event_type: &str) -> &str {
    event_type.strip_prefix("v1.").unwrap_or(event_type)
}

impl Observation {
    /// Every object that this telling names, itself included; no object twice.
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
