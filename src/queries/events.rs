//! What was received, in pages and one by one: what `events` prints, what HTTP answers and what the page shows.

use std::collections::HashSet;

use serde::Serialize;
use serde_json::value::RawValue;

use crate::domain::stripe::event::{EventKey, Observation};
use crate::domain::time::timestamp;
use crate::store::{EventFilter, LoggedEvent, Outcome, Store, StoreError, StoredBody};

/// Events read at a time, while those are sought whose invoice nobody stored.
const READ: u32 = 1_000;
/// Events that one page looks through at most for them.
const SCANNED: usize = 50_000;
/// Renderings in one page at most. Stripe's own ids have a few; those of test payloads may be shared by many events.
const RENDERINGS: usize = 100;
/// A page ends after so many bytes of bodies.
const BYTES: usize = 4 * 1024 * 1024;

/// Which events a list shows, by what became of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutcomeFilter {
    Any,
    Is(Outcome),
    /// It names an invoice, and none that it names is stored.
    Unmatched,
}

impl OutcomeFilter {
    /// `unmatched`, or the name of an outcome.
    ///
    /// # Errors
    /// In words, what it may be.
    pub fn parse(text: &str) -> Result<OutcomeFilter, String> {
        match (text, Outcome::parse(text)) {
            ("unmatched", _) => Ok(OutcomeFilter::Unmatched),
            (_, Some(outcome)) => Ok(OutcomeFilter::Is(outcome)),
            _ => Err("must be one of recorded, no_payment_fact, unreadable, unmatched".to_owned()),
        }
    }
}

/// All that is given must hold.
pub struct PageRequest {
    pub event_type: Option<String>,
    /// The event names this Stripe invoice.
    pub stripe_invoice_id: Option<String>,
    pub outcome: OutcomeFilter,
    pub limit: usize,
    pub after: Option<Cursor>,
}

pub struct Page {
    pub events: Vec<LoggedEvent>,
    /// Where the next page begins; None: this was the last.
    pub next: Option<Cursor>,
}

/// Where a page ended, as text that says nothing to a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor(i64, EventKey);

impl Cursor {
    pub fn to_text(self) -> String {
        hex::encode([&self.0.to_be_bytes()[..], &self.1.0].concat())
    }

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

/// A page of events, the latest received first. It may be shorter than its limit although more follow: which invoices are not
/// stored is found out, not kept, so what one request looks through is bounded.
pub async fn page(store: &Store, request: &PageRequest) -> Result<Page, StoreError> {
    let filter = EventFilter {
        event_type: request.event_type.clone(),
        stripe_invoice_id: request.stripe_invoice_id.clone(),
        outcome: match request.outcome {
            OutcomeFilter::Is(outcome) => Some(outcome),
            OutcomeFilter::Any | OutcomeFilter::Unmatched => None,
        },
    };
    let read = if request.outcome == OutcomeFilter::Unmatched {
        READ
    } else {
        request.limit as u32 + 1
    };
    let mut found = Vec::new();
    let mut scanned = 0;
    let mut after = request.after;
    loop {
        let batch = store
            .told_page(
                &filter,
                after.map(|Cursor(received_ms, key)| (received_ms, key)),
                read,
            )
            .await?;
        let is_last = batch.len() < read as usize;
        scanned += batch.len();
        let shown = match request.outcome {
            OutcomeFilter::Unmatched => unmatched(store, &batch).await?,
            _ => vec![true; batch.len()],
        };
        for ((event, _), is_shown) in batch.into_iter().zip(shown) {
            if found.len() == request.limit {
                return Ok(Page {
                    events: found,
                    next: after,
                });
            }
            after = Some(Cursor::at(&event));
            if is_shown {
                found.push(event);
            }
        }
        if is_last || scanned >= SCANNED {
            return Ok(Page {
                events: found,
                next: after.filter(|_| !is_last),
            });
        }
    }
}

/// Which of these events name an invoice, but none that is stored.
async fn unmatched(
    store: &Store,
    batch: &[(LoggedEvent, Option<String>)],
) -> Result<Vec<bool>, StoreError> {
    let named: Vec<Vec<String>> = batch
        .iter()
        .map(|(_, telling)| invoice_ids(telling.as_deref()))
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

fn invoice_ids(telling: Option<&str>) -> Vec<String> {
    // One that another version wrote names none until `rebuild`.
    let Some(telling) = telling.and_then(|text| serde_json::from_str::<Observation>(text).ok())
    else {
        return Vec::new();
    };
    telling
        .mentions()
        .into_iter()
        .filter(|mention| mention.is_invoice)
        .map(|mention| mention.object_id)
        .collect()
}

pub struct Renderings {
    pub renderings: Vec<StoredBody>,
    /// Where the next page begins; None: this was the last.
    pub next: Option<Cursor>,
}

/// All renderings of an event, oldest receipt first, by its id; or the one that has this key, in hexadecimal digits: by it what
/// is unreadable and has no id can be looked at. More than [`RENDERINGS`] or [`BYTES`] come in pages.
pub async fn renderings(
    store: &Store,
    id: &str,
    after: Option<Cursor>,
) -> Result<Renderings, StoreError> {
    let after_row = after.map(|Cursor(received_ms, key)| (received_ms, key));
    let listed = store
        .events_by_id(id, after_row, RENDERINGS as u32 + 1)
        .await?;
    if listed.is_empty() && after.is_none() {
        return Ok(Renderings {
            renderings: by_key(store, id).await?.into_iter().collect(),
            next: None,
        });
    }
    let (mut renderings, mut bytes, mut last) = (Vec::new(), 0, None);
    for event in &listed {
        if renderings.len() == RENDERINGS || bytes >= BYTES {
            return Ok(Renderings {
                renderings,
                next: last,
            });
        }
        last = Some(Cursor::at(event));
        // One at a time: each may have a mebibyte. One that `rebuild` has just replaced comes back under its new key.
        let stored = store.event_by_key(&event.key).await?;
        bytes += stored
            .as_ref()
            .and_then(|stored| stored.body.as_ref())
            .map_or(0, Vec::len);
        renderings.extend(stored);
    }
    Ok(Renderings {
        renderings,
        next: None,
    })
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

/// A received event as JSON, and its body as far as JSON can carry it.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Shown {
    #[serde(flatten)]
    pub event: Listed,
    pub body_form: &'static str,
    pub body: Body,
}

#[derive(Serialize)]
#[serde(untagged)]
pub enum Body {
    /// As it was received, to the byte.
    Json(Box<RawValue>),
    Text(String),
    Pruned,
}

/// The body is JSON where it is JSON, else text where it is UTF-8, else hexadecimal digits; `bodyForm` says which.
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
    fn a_cursor_is_read_as_it_was_given_out_and_nothing_else_is() {
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
