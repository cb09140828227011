//! Received events, in pages and one by one, for the `events` command, HTTP and the pages.

use std::collections::HashSet;

use serde::Serialize;
use serde_json::value::RawValue;

use crate::domain::stripe::event::{EventKey, Observation};
use crate::domain::time::timestamp;
use crate::store::{EventFilter, LoggedEvent, Outcome, Store, StoreError, StoredBody};

/// Events per statement in a search for unmatched events.
const BATCH: u32 = 1_000;
/// Bytes of observations after which such a statement ends.
const BATCH_BYTES: usize = 1024 * 1024;
/// Limit on the events that one page of unmatched events scans.
const MAX_SCANNED: usize = 50_000;
/// Limit on the renderings of one page. Stripe's own ids have a few; many test payloads may share
/// an id.
const MAX_RENDERINGS: usize = 100;
/// Bytes of bodies after which a page ends.
const MAX_BYTES: usize = 4 * 1024 * 1024;

/// A filter by outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutcomeFilter {
    Any,
    Is(Outcome),
    /// Events whose invoice is not stored.
    Unmatched,
}

impl OutcomeFilter {
    /// Parses `unmatched` or the name of an outcome.
    ///
    /// # Errors
    /// Returns the accepted values as text that completes a sentence about the parameter.
    pub fn parse(text: &str) -> Result<OutcomeFilter, String> {
        match (text, Outcome::parse(text)) {
            ("unmatched", _) => Ok(OutcomeFilter::Unmatched),
            (_, Some(outcome)) => Ok(OutcomeFilter::Is(outcome)),
            _ => Err("must be one of recorded, no_payment_fact, unreadable, unmatched".to_owned()),
        }
    }
}

/// A request for a page. All given conditions must hold.
pub struct PageRequest {
    pub event_type: Option<String>,
    /// The Stripe invoice that the event names.
    pub stripe_invoice_id: Option<String>,
    pub outcome: OutcomeFilter,
    pub limit: usize,
    pub after: Option<Cursor>,
}

/// A page of events.
pub struct Page {
    pub events: Vec<LoggedEvent>,
    /// The position at which the next page begins, or `None` after the last page.
    pub next: Option<Cursor>,
}

/// The end of a page, as text that is opaque to clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor(i64, EventKey);

impl Cursor {
    /// Returns the text for clients.
    pub fn to_text(self) -> String {
        hex::encode([&self.0.to_be_bytes()[..], &self.1.0].concat())
    }

    /// Parses the text of [`Cursor::to_text`]. Returns `None` for any other text.
    pub fn parse(text: &str) -> Option<Cursor> {
        let bytes = hex::decode(text).ok()?;
        let (received_ms, key) = bytes.split_first_chunk()?;
        Some(Cursor(
            i64::from_be_bytes(*received_ms),
            EventKey(key.try_into().ok()?),
        ))
    }

    fn at(event: &LoggedEvent) -> Cursor {
        Cursor(event.received_ms, event.key)
    }
}

/// Returns a page of events, latest receipt first.
///
/// A page of unmatched events may be shorter than its limit although more follow. Each request
/// checks again which invoices are stored, so the number of events that one request scans is
/// bounded.
///
/// # Errors
/// Returns an error if the database cannot be read.
pub async fn page(store: &Store, request: &PageRequest) -> Result<Page, StoreError> {
    let filter = EventFilter {
        event_type: request.event_type.clone(),
        stripe_invoice_id: request.stripe_invoice_id.clone(),
        outcome: match request.outcome {
            OutcomeFilter::Is(outcome) => Some(outcome),
            OutcomeFilter::Any | OutcomeFilter::Unmatched => None,
        },
    };
    if request.outcome == OutcomeFilter::Unmatched {
        return unmatched_page(store, request, &filter).await;
    }

    let after = request.after.map(|Cursor(ms, key)| (ms, key));
    let limit = request.limit;
    let mut events = store.events_page(&filter, after, limit as u32 + 1).await?;
    let has_more = events.len() > limit;
    events.truncate(limit);
    let next = events.last().map(Cursor::at).filter(|_| has_more);
    Ok(Page { events, next })
}

async fn unmatched_page(
    store: &Store,
    request: &PageRequest,
    filter: &EventFilter,
) -> Result<Page, StoreError> {
    let mut found = Vec::new();
    let mut scanned = 0;
    let mut after = request.after;

    loop {
        let position = after.map(|Cursor(ms, key)| (ms, key));
        let step = store
            .observed_page(filter, position, BATCH, BATCH_BYTES)
            .await?;
        scanned += step.events.len();
        let is_unmatched = unmatched(store, &step.events).await?;
        for ((event, _), is_unmatched) in step.events.into_iter().zip(is_unmatched) {
            if found.len() == request.limit {
                return Ok(Page {
                    events: found,
                    next: after,
                });
            }
            after = Some(Cursor::at(&event));
            if is_unmatched {
                found.push(event);
            }
        }
        if !step.has_more || scanned >= MAX_SCANNED {
            return Ok(Page {
                events: found,
                next: after.filter(|_| step.has_more),
            });
        }
    }
}

/// Returns, for each event, whether it names invoices of which no one is stored.
async fn unmatched(
    store: &Store,
    batch: &[(LoggedEvent, Option<String>)],
) -> Result<Vec<bool>, StoreError> {
    let named: Vec<Vec<String>> = batch
        .iter()
        .map(|(_, observation)| invoice_ids(observation.as_deref()))
        .collect();

    let ids: HashSet<&String> = named.iter().flatten().collect();
    let ids: Vec<String> = ids.into_iter().cloned().collect();
    let held: HashSet<String> = store
        .holders(&ids)
        .await?
        .into_iter()
        .map(|(_, _, id)| id)
        .collect();

    Ok(named
        .iter()
        .map(|ids| !ids.is_empty() && !ids.iter().any(|id| held.contains(id)))
        .collect())
}

fn invoice_ids(observation: Option<&str>) -> Vec<String> {
    // An observation that another version wrote names no invoice until `rebuild`.
    let Some(observation) =
        observation.and_then(|text| serde_json::from_str::<Observation>(text).ok())
    else {
        return Vec::new();
    };
    observation
        .mentions()
        .into_iter()
        .filter(|mention| mention.is_invoice)
        .map(|mention| mention.object_id)
        .collect()
}

/// A page of items made of the renderings of an event.
pub struct Renderings<Item> {
    pub items: Vec<Item>,
    /// The position at which the next page begins, or `None` after the last page.
    pub next: Option<Cursor>,
}

/// Returns all renderings of an event by its id, oldest receipt first. `item` converts each.
///
/// Unreadable events have no id: `id` may also be a key in hexadecimal digits, which one rendering
/// has.
///
/// A page ends after [`MAX_RENDERINGS`] or [`MAX_BYTES`].
pub async fn renderings<Item>(
    store: &Store,
    id: &str,
    after: Option<Cursor>,
    mut item: impl FnMut(StoredBody) -> Item,
) -> Result<Renderings<Item>, StoreError> {
    let after_row = after.map(|Cursor(received_ms, key)| (received_ms, key));
    let listed = store
        .events_by_id(id, after_row, MAX_RENDERINGS as u32 + 1)
        .await?;
    if listed.is_empty() && after.is_none() {
        let items = by_key(store, id).await?.map(item).into_iter().collect();
        return Ok(Renderings { items, next: None });
    }

    let (mut items, mut bytes, mut last) = (Vec::new(), 0, None);
    for event in &listed {
        if items.len() == MAX_RENDERINGS || bytes >= MAX_BYTES {
            return Ok(Renderings { items, next: last });
        }

        last = Some(Cursor::at(event));
        // Bodies are read one at a time because each may have 1 MiB. If `rebuild` has just replaced
        // an event, the next request finds it under its new key.
        if let Some(stored) = store.event_by_key(&event.key).await? {
            bytes += stored.body.as_ref().map_or(0, Vec::len);
            items.push(item(stored));
        }
    }
    Ok(Renderings { items, next: None })
}

async fn by_key(store: &Store, text: &str) -> Result<Option<StoredBody>, StoreError> {
    match hex::decode(text)
        .ok()
        .and_then(|bytes| bytes.try_into().ok())
    {
        Some(key) => store.event_by_key(&EventKey(key)).await,
        None => Ok(None),
    }
}

/// A received event as JSON, without its body.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Listed {
    key: String,
    id: Option<String>,
    #[serde(rename = "type")]
    event_type: Option<String>,
    api_version: Option<String>,
    object_id: Option<String>,
    created_at: Option<String>,
    received_at: String,
    source: &'static str,
    secret_label: Option<String>,
    outcome: &'static str,
    unreadable_reason: Option<String>,
}

/// Converts an event for JSON.
pub fn listed(event: &LoggedEvent) -> Listed {
    let event = event.clone();
    Listed {
        key: hex::encode(event.key.0),
        id: event.id,
        event_type: event.event_type,
        api_version: event.api_version,
        object_id: event.object_id,
        created_at: event.created_s.map(|s| timestamp(s.saturating_mul(1000))),
        received_at: timestamp(event.received_ms),
        source: event.source.as_str(),
        secret_label: event.secret_label,
        outcome: event.outcome.as_str(),
        unreadable_reason: event.unreadable_reason,
    }
}

/// A received event as JSON, with its body in one of three forms.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Shown {
    #[serde(flatten)]
    pub event: Listed,
    pub body_form: &'static str,
    pub body: Body,
}

/// The body of an event.
#[derive(Serialize)]
#[serde(untagged)]
pub enum Body {
    /// The received bytes, unchanged.
    Json(Box<RawValue>),
    Text(String),
    Pruned,
}

/// Converts an event with its body: JSON if it is JSON, else text if it is UTF-8, else hexadecimal
/// digits. `bodyForm` names the form.
pub fn show(stored: StoredBody) -> Shown {
    let event = listed(&stored.logged);
    let (body_form, body) = match stored.body.map(String::from_utf8) {
        None => ("pruned", Body::Pruned),
        Some(Err(error)) => ("hex", Body::Text(hex::encode(error.into_bytes()))),
        Some(Ok(text)) => match serde_json::from_str::<Box<RawValue>>(&text) {
            Ok(json) => ("json", Body::Json(json)),
            Err(_) => ("text", Body::Text(text)),
        },
    };

    Shown {
        event,
        body_form,
        body,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cursor_parses_only_its_own_text() {
        let cursor = Cursor(1_769_850_900_123, EventKey([7; EventKey::LENGTH]));
        assert_eq!(Cursor::parse(&cursor.to_text()), Some(cursor));
        let text = cursor.to_text();

        for wrong in [
            "",
            "x",
            &text[2..],
            &text[..text.len() - 2],
            &format!("{text}00"),
            &format!("{text}é"),
        ] {
            assert_eq!(Cursor::parse(wrong), None, "{wrong}");
        }
    }
}
