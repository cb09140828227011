//! Derives everything again from the stored bytes, after an upgrade that reads payloads
//! differently.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::Instant;

use bytes::Bytes;

pub use super::WriteMode;
use crate::domain::stripe::event::{EventKey, Observation};
use crate::domain::stripe::object::Object;
use crate::ingest::{Delivery, prepare};
use crate::store::{NewEvent, Store, StoreError, StoredBody};

/// Events per page of the read.
const PAGE: u32 = 200;
/// Events per write transaction. On SQLite a delivery waits for the transaction.
const BATCH: usize = 25;
/// Text for an event that differs only in a missing link.
const MISSING_LINK: &str = ", with a missing link to an object that it names";

/// A difference in one event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RebuildDifference {
    /// Id of the event, or `None` if it was unreadable and still is.
    pub event_id: Option<String>,
    pub event_type: Option<String>,
    pub was: String,
    pub is: String,
}

/// The result of a rebuild.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RebuildReport {
    pub events: u64,
    /// Number of events whose bytes are pruned: their observations stay.
    pub pruned: u64,
    /// Differences by Stripe invoice. Events that name no invoice are under the empty id.
    pub differing: BTreeMap<String, Vec<RebuildDifference>>,
}

impl RebuildReport {
    /// Returns whether any event differs.
    pub fn differs(&self) -> bool {
        !self.differing.is_empty()
    }
}

/// Reads every stored event again. `progress` receives the number of events processed.
///
/// # Errors
/// Returns an error if the store is unavailable. Corrected events stay corrected, and the next
/// rebuild continues.
pub async fn rebuild(
    store: &Store,
    mode: WriteMode,
    mut progress: impl FnMut(u64),
) -> Result<RebuildReport, StoreError> {
    let mut report = RebuildReport::default();
    let mut after = None;
    loop {
        let page = store.stored_bodies(after, PAGE).await?;
        let Some(last) = page.last() else {
            return Ok(report);
        };
        after = Some((last.logged.received_ms, last.logged.key));

        let changed = compare_page(store, page, &mut report).await?;
        if mode == WriteMode::Save {
            save(store, &changed).await?;
        }
        progress(report.events);
    }
}

/// Reads the events of a page again, reports the differences, and returns the differing events with
/// their present keys.
async fn compare_page(
    store: &Store,
    page: Vec<StoredBody>,
    report: &mut RebuildReport,
) -> Result<Vec<(EventKey, NewEvent)>, StoreError> {
    let events = page.len();
    let read: Vec<(StoredBody, NewEvent)> = page
        .into_iter()
        .filter_map(|stored| read_again(&stored).map(|event| (stored, event)))
        .collect();
    report.events += events as u64;
    report.pruned += (events - read.len()) as u64;

    let again: Vec<&NewEvent> = read.iter().map(|(_, event)| event).collect();
    let unlinked: HashSet<EventKey> = store.unmentioned(&again).await?.into_iter().collect();
    let mut changed = Vec::new();
    for (stored, event) in read {
        if unlinked.contains(&event.key) || !is_same(&stored, &event) {
            record_difference(report, &stored, &event);
            changed.push((stored.logged.key, event));
        }
    }
    Ok(changed)
}

async fn save(store: &Store, changed: &[(EventKey, NewEvent)]) -> Result<(), StoreError> {
    for batch in changed.chunks(BATCH) {
        let started = Instant::now();
        store.replace_readings(batch).await?;
        store.pause_after_write(started.elapsed()).await;
    }
    Ok(())
}

/// Derives an event again from its stored bytes. Returns `None` if the bytes are pruned.
fn read_again(stored: &StoredBody) -> Option<NewEvent> {
    let logged = &stored.logged;
    Some(prepare(Delivery {
        body: Bytes::from(stored.body.clone()?),
        source: logged.source,
        secret_label: logged.secret_label.clone(),
        received_ms: logged.received_ms,
    }))
}

fn is_same(stored: &StoredBody, event: &NewEvent) -> bool {
    stored.logged.key == event.key
        && stored.observation == event.observation
        && stored.logged.outcome == event.outcome
}

/// Adds a difference to the report. If both readings are the same, a link to the event was missing.
fn record_difference(report: &mut RebuildReport, stored: &StoredBody, event: &NewEvent) {
    let logged = &stored.logged;
    let mut was = describe(logged.outcome.as_str(), stored.observation.as_deref());
    if is_same(stored, event) {
        was += MISSING_LINK;
    }
    let difference = RebuildDifference {
        event_id: event.id.clone().or_else(|| logged.id.clone()),
        event_type: event
            .event_type
            .clone()
            .or_else(|| logged.event_type.clone()),
        was,
        is: describe(event.outcome.as_str(), event.observation.as_deref()),
    };

    let mut invoices: BTreeSet<String> = [&stored.observation, &event.observation]
        .into_iter()
        .flat_map(|observation| invoice_ids(observation.as_deref()))
        .collect();
    if invoices.is_empty() {
        invoices.insert(String::new());
    }
    for invoice in invoices {
        let differences = report.differing.entry(invoice).or_default();
        differences.push(difference.clone());
    }
}

fn describe(outcome: &str, observation: Option<&str>) -> String {
    match observation {
        Some(observation) => format!("{outcome} {observation}"),
        None => outcome.to_owned(),
    }
}

/// Returns the Stripe invoices that an observation names.
fn invoice_ids(observation: Option<&str>) -> Vec<String> {
    let Some(observation) =
        observation.and_then(|text| serde_json::from_str::<Observation>(text).ok())
    else {
        return Vec::new();
    };

    match &observation.object {
        Object::Invoice(invoice) => vec![invoice.id.clone()],
        _ => observation
            .mentions()
            .into_iter()
            .filter(|link| link.is_invoice)
            .map(|link| link.object_id)
            .collect(),
    }
}
