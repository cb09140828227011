//! The tolerant reader: from authentic bytes to the envelope of an event and the few fields of its object that we need.
//!
//! The presence of fields decides, never `api_version`, so every shape since 2018-11-08 (and shapes not yet invented) goes
//! through the same lines. A field of an unexpected type counts as absent. What the fields *mean* is not decided here: that
//! is `fact` and `history`.

use serde::{Deserialize, Serialize};

/// Identity of one rendering of one event: what makes a second delivery a duplicate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EventKey(pub [u8; 16]);

/// What authentic bytes turned out to be.
#[derive(Clone, Debug, PartialEq)]
pub enum Reading {
    Event(Box<Event>),
    /// Kept, counted, listed for the operator: not JSON, or no event in it. `reason` says which, without payload content.
    Unreadable { key: EventKey, reason: String },
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
    pub telling: Option<Telling>,
}

/// What one event (or one object fetched from Stripe's API) tells. This is what the store keeps beside the bytes, and all
/// that a history is folded from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Telling {
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

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mention { pub object_id: String, pub is_invoice: bool }
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Object {}
fn is_false(b: &bool) -> bool { !*b }
pub fn read(_body: &[u8]) -> Reading { todo!() }
impl Telling { pub fn mentions(&self) -> Vec<Mention> { todo!() } }
