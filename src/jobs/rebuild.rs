//! Derives everything again from the stored bytes: after an upgrade that reads more, or reads better.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use bytes::Bytes;

use crate::domain::stripe::event::{EventKey, Observation};
use crate::domain::stripe::object::Object;
use crate::ingest::{Delivery, prepare};
use crate::store::{NewEvent, Store, StoreError, StoredBody};

/// Events read at a time.
const PAGE: u32 = 200;
/// Said of an event in which nothing else differs.
const NOT_FOUND: &str = ", and not found by all that it names";

/// What differs about one event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RebuildDifference {
    /// None: unreadable, then and now.
    pub event_id: Option<String>,
    pub event_type: Option<String>,
    pub was: String,
    pub is: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RebuildReport {
    pub events: u64,
    /// Their bytes are forgotten: what was read in them stays as it is.
    pub pruned: u64,
    /// By Stripe invoice; empty: it names none.
    pub differing: BTreeMap<String, Vec<RebuildDifference>>,
}

impl RebuildReport {
    pub fn differs(&self) -> bool {
        !self.differing.is_empty()
    }
}

/// Whether what differs is put right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteMode {
    Save,
    DryRun,
}

/// Reads every stored event again. `progress` gets the number of events done.
///
/// # Errors
/// The store cannot be reached; what was put right before stays right, and the next run goes on.
pub async fn run(
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
        let events = page.len();
        let read = |stored: StoredBody| read_again(&stored).map(|event| (stored, event));
        let read: Vec<(StoredBody, NewEvent)> = page.into_iter().filter_map(read).collect();
        report.events += events as u64;
        report.pruned += (events - read.len()) as u64;
        let again: Vec<&NewEvent> = read.iter().map(|(_, event)| event).collect();
        let unmentioned: HashSet<EventKey> = store.unmentioned(&again).await?.into_iter().collect();
        let mut changed = Vec::new();
        for (stored, event) in read {
            let is_found = !unmentioned.contains(&event.key);
            if !is_found || !is_same(&stored, &event) {
                note(&mut report, &stored, &event);
                changed.push((stored.logged.key, event));
            }
        }
        if mode == WriteMode::Save && !changed.is_empty() {
            store.replace_readings(&changed).await?;
        }
        progress(report.events);
    }
}

fn read_again(stored: &StoredBody) -> Option<NewEvent> {
    let logged = &stored.logged;
    let body = Bytes::from(stored.body.clone()?);
    let (source, secret_label) = (logged.source, logged.secret_label.clone());
    Some(prepare(Delivery {
        body,
        source,
        secret_label,
        received_ms: logged.received_ms,
    }))
}

fn is_same(stored: &StoredBody, event: &NewEvent) -> bool {
    stored.logged.key == event.key
        && stored.telling == event.telling
        && stored.logged.outcome == event.outcome
}

/// Where nothing was read otherwise, the event was not found by all that it mentions.
fn note(report: &mut RebuildReport, stored: &StoredBody, event: &NewEvent) {
    let difference = RebuildDifference {
        event_id: event.id.clone().or_else(|| stored.logged.id.clone()),
        event_type: event
            .event_type
            .clone()
            .or_else(|| stored.logged.event_type.clone()),
        was: describe(stored.logged.outcome.as_str(), &stored.telling)
            + if is_same(stored, event) {
                NOT_FOUND
            } else {
                ""
            },
        is: describe(event.outcome.as_str(), &event.telling),
    };
    let invoices: BTreeSet<String> = [&stored.telling, &event.telling]
        .into_iter()
        .flat_map(invoice_ids)
        .collect();
    for invoice in if invoices.is_empty() {
        BTreeSet::from([String::new()])
    } else {
        invoices
    } {
        report
            .differing
            .entry(invoice)
            .or_default()
            .push(difference.clone());
    }
}

fn describe(outcome: &str, telling: &Option<String>) -> String {
    match telling {
        Some(telling) => format!("{outcome} {telling}"),
        None => outcome.to_owned(),
    }
}

fn invoice_ids(telling: &Option<String>) -> Vec<String> {
    let telling = telling
        .as_deref()
        .and_then(|text| serde_json::from_str::<Observation>(text).ok());
    let Some(telling) = telling else {
        return Vec::new();
    };
    match &telling.object {
        Object::Invoice(invoice) => vec![invoice.id.clone()],
        _ => telling
            .mentions()
            .into_iter()
            .filter(|m| m.is_invoice)
            .map(|m| m.object_id)
            .collect(),
    }
}
