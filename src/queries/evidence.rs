//! The evidence for an invoice's history: each entry with the events that prove it, and how fresh all of it is. What `why`
//! prints, what HTTP answers and what the page shows.
//!
//! As of a moment in the past, what was received by then counts, as this version of the program reads it: received times never
//! change, and `rebuild` keeps them. The Stripe invoice that an invoice holds counts at any time; the states that came with it,
//! since it was first stored.

use std::collections::{HashMap, HashSet};

use serde_json::{Value, json};

use super::folding::run_fold;
use super::invoices::{imported_states, parse_observations};
use crate::domain::history::invoice_observations::InvoiceObservations;
use crate::domain::history::{Entry, StoredObservation, fold, fold_selected, lacks_reason};
use crate::domain::payment_state::{ImportedState, PaymentState};
use crate::domain::stripe::event::EventKey;
use crate::domain::stripe::object::Object;
use crate::domain::time::{parse_time, timestamp};
use crate::store::{Comparison, LoggedEvent, LookupState, Store, StoreError, StoredInvoice};

/// Most proofs that one entry lists: the earliest. An invoice can have 100,000 of them.
const MAX_PROOFS_OF_ENTRY: usize = 100;
/// Most proofs listed in all: those of the latest entries.
const MAX_PROOFS: usize = 2_000;
/// Most unfetched objects listed.
const MAX_MISSING: usize = 200;

/// Times in Unix milliseconds.
#[derive(Clone, Debug)]
pub struct Evidence {
    pub tenant_uid: String,
    pub invoice_uid: String,
    pub stripe_invoice_id: Option<String>,
    /// What was received later is left out; None: all counts.
    pub as_of_ms: Option<i64>,
    /// When the invoice was first stored.
    pub stored_ms: i64,
    /// When Stripe's API last agreed. Earlier agreements are not kept.
    pub confirmed_ms: Option<i64>,
    /// Since when Stripe's API says something else.
    pub differs_since_ms: Option<i64>,
    /// When the latest event about this invoice was received.
    pub last_event_ms: Option<i64>,
    pub missing: Vec<Missing>,
    pub at_stripe: AtStripe,
    /// In the order of the history.
    pub entries: Vec<Proven>,
}

/// What Stripe last said of the invoice itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AtStripe {
    pub number: Option<String>,
    pub currency: Option<String>,
    /// In minor units, as the next.
    pub amount_due: Option<i64>,
    pub amount_paid: Option<i64>,
    /// Unix seconds.
    pub due_s: Option<i64>,
    pub livemode: Option<bool>,
    /// The connected account.
    pub account: Option<String>,
}

/// An entry of the history, with its proofs.
#[derive(Clone, Debug)]
pub struct Proven {
    pub state: PaymentState,
    pub timestamp_ms: i64,
    pub message: Option<String>,
    /// It came with the stored invoice; no event proves it.
    pub is_imported: bool,
    /// The earliest first; not more than [`MAX_PROOFS_OF_ENTRY`].
    pub proofs: Vec<LoggedEvent>,
    /// Proofs that are not listed.
    pub more_proofs: usize,
}

impl Proven {
    /// Number of proofs, listed or not.
    pub fn proof_count(&self) -> usize {
        self.proofs.len() + self.more_proofs
    }
}

/// What Stripe's API has still to be asked for.
#[derive(Clone, Debug)]
pub struct Missing {
    /// The event that points to it.
    pub event: Option<LoggedEvent>,
    /// In words for a person in finance.
    pub message: String,
}

/// The moment that a question names: RFC 3339 with an offset. One to come is now.
///
/// # Errors
/// In words, what it must be.
pub fn as_of(text: &str, now_ms: i64) -> Result<i64, String> {
    parse_time(text).map(|ms| ms.min(now_ms))
}

/// None: this tenant has no such invoice.
pub async fn gather(
    store: &Store,
    tenant_uid: &str,
    invoice_uid: &str,
    as_of_ms: Option<i64>,
) -> Result<Option<Evidence>, StoreError> {
    match store.invoice(tenant_uid, invoice_uid).await? {
        Some(invoice) => of(store, invoice, as_of_ms).await.map(Some),
        None => Ok(None),
    }
}

/// Returns the evidence for an invoice that was read with its observations.
///
/// Log rows are read only for the proofs and events that are listed; of all others, only the time of
/// receipt is.
pub async fn of(
    store: &Store,
    mut invoice: StoredInvoice,
    as_of_ms: Option<i64>,
) -> Result<Evidence, StoreError> {
    let comparison = store
        .comparison(&invoice.tenant_uid, &invoice.invoice_uid)
        .await?
        .unwrap_or_default();
    let until_ms = as_of_ms.unwrap_or(i64::MAX);
    let rows = std::mem::take(&mut invoice.observations);
    let all = run_fold(rows.len(), move || parse_observations(&rows)).await?;

    let keys: Vec<EventKey> = all.iter().map(|observation| observation.key).collect();
    let received: ReceiptTimes = store.received_times(&keys).await?.into_iter().collect();
    let (known, later): (Vec<StoredObservation>, Vec<StoredObservation>) = all
        .into_iter()
        .filter(|observation| received.contains_key(&observation.key))
        .partition(|observation| received[&observation.key] <= until_ms);

    let imported = if invoice.stored_ms <= until_ms {
        imported_states(&invoice)?
    } else {
        Vec::new()
    };
    let stripe_invoice_id = invoice.stripe_invoice_id.clone();
    let (known, folded) = run_fold(known.len(), move || {
        let folded = fold_with_selection(stripe_invoice_id.as_deref(), &imported, &known);
        (known, folded)
    })
    .await;
    let (thin, more_thin) = thin_events(&known, &folded);

    let listed = listed_proofs(&folded.entries);
    let mut keys: Vec<EventKey> = listed.iter().flatten().copied().collect();
    keys.extend(thin.iter().map(|observation| observation.key));
    let events = log_rows(store, keys).await?;
    let lookups = lookups(store, &thin).await?;
    let fetched = fetch_times(known.iter().chain(&later), &received);

    let mut missing = unfetched(&thin, &fetched, &events, &lookups, until_ms);
    missing.extend(more_thin);
    missing.extend(unexplained(&folded, &comparison));
    let last_event_ms = last_event_ms(&known, &folded, &received);
    Ok(Evidence {
        as_of_ms,
        stored_ms: invoice.stored_ms,
        confirmed_ms: comparison.confirmed_ms.filter(|ms| *ms <= until_ms),
        differs_since_ms: comparison.differs_since_ms.filter(|ms| *ms <= until_ms),
        last_event_ms,
        missing,
        at_stripe: folded.at_stripe,
        entries: proven(folded.entries, listed, &events),
        tenant_uid: invoice.tenant_uid,
        invoice_uid: invoice.invoice_uid,
        stripe_invoice_id: invoice.stripe_invoice_id,
    })
}

/// The history of an invoice, and what the fold knows beside it.
#[derive(Default)]
struct Folded {
    entries: Vec<Entry>,
    /// Keys of the observations that count for the invoice.
    counted: HashSet<EventKey>,
    /// Ids of the events that count.
    counted_ids: HashSet<String>,
    at_stripe: AtStripe,
    /// Whether no event says why the latest attempt failed.
    lacks_reason: bool,
}

fn fold_with_selection(
    stripe_invoice_id: Option<&str>,
    imported: &[ImportedState],
    known: &[StoredObservation],
) -> Folded {
    // Without a Stripe invoice, no observation counts.
    let Some(id) = stripe_invoice_id else {
        return Folded {
            entries: fold(None, imported, &[]),
            ..Folded::default()
        };
    };

    let observations = InvoiceObservations::select(id, known);
    let counted = observations.counted();
    Folded {
        entries: fold_selected(id, imported, &observations),
        counted: counted.iter().map(|stored| stored.key).collect(),
        counted_ids: counted
            .iter()
            .map(|stored| stored.observation.id.clone())
            .collect(),
        at_stripe: at_stripe(&observations),
        lacks_reason: lacks_reason(id, known),
    }
}

/// Returns when the latest event that counts was received, or a thin twin of one.
fn last_event_ms(
    known: &[StoredObservation],
    folded: &Folded,
    received: &ReceiptTimes,
) -> Option<i64> {
    let is_twin = |stored: &StoredObservation| {
        let twin = stored.observation.snapshot_event.as_deref();
        twin.is_some_and(|id| folded.counted_ids.contains(id))
    };

    known
        .iter()
        .filter(|stored| folded.counted.contains(&stored.key) || is_twin(stored))
        .filter(|stored| !stored.observation.fetched)
        .filter_map(|stored| received.get(&stored.key).copied())
        .max()
}

/// Unix milliseconds of the receipt of each event.
type ReceiptTimes = HashMap<EventKey, i64>;

/// Returns the proofs to list of each entry, of the latest entries first.
fn listed_proofs(entries: &[Entry]) -> Vec<Vec<EventKey>> {
    let mut left = MAX_PROOFS;
    let mut listed: Vec<Vec<EventKey>> = entries
        .iter()
        .rev()
        .map(|entry| {
            let count = entry.proofs.len().min(MAX_PROOFS_OF_ENTRY).min(left);
            left -= count;
            entry.proofs[..count].to_vec()
        })
        .collect();
    listed.reverse();
    listed
}

fn proven(
    entries: Vec<Entry>,
    listed: Vec<Vec<EventKey>>,
    events: &HashMap<EventKey, LoggedEvent>,
) -> Vec<Proven> {
    entries
        .into_iter()
        .zip(listed)
        .map(|(entry, listed)| Proven {
            state: entry.state,
            timestamp_ms: entry.timestamp_ms,
            message: entry.message,
            is_imported: entry.proofs.is_empty(),
            more_proofs: entry.proofs.len() - listed.len(),
            proofs: listed
                .iter()
                .filter_map(|key| events.get(key))
                .cloned()
                .collect(),
        })
        .collect()
}

async fn log_rows(
    store: &Store,
    mut keys: Vec<EventKey>,
) -> Result<HashMap<EventKey, LoggedEvent>, StoreError> {
    keys.sort_unstable();
    keys.dedup();
    let events = store.events_by_keys(&keys).await?;
    Ok(events.into_iter().map(|event| (event.key, event)).collect())
}

async fn lookups(
    store: &Store,
    thin: &[&StoredObservation],
) -> Result<HashMap<EventKey, LookupState>, StoreError> {
    let keys: Vec<EventKey> = thin.iter().map(|observation| observation.key).collect();
    let lookups = store.lookup_states(&keys).await?;
    Ok(lookups
        .into_iter()
        .map(|lookup| (lookup.key, lookup))
        .collect())
}

/// Returns the thin events whose details may be missing, and a line for those beyond [`MAX_MISSING`].
///
/// A thin event whose snapshot twin is known does not count, so none of them has one.
fn thin_events<'o>(
    known: &'o [StoredObservation],
    folded: &Folded,
) -> (Vec<&'o StoredObservation>, Option<Missing>) {
    let mut thin: Vec<&StoredObservation> = known
        .iter()
        .filter(|stored| stored.observation.thin && folded.counted.contains(&stored.key))
        .collect();

    let more = thin.len().saturating_sub(MAX_MISSING);
    thin.truncate(MAX_MISSING);
    let line = (more > 0).then(|| Missing {
        event: None,
        message: format!("{more} more announcements without details are not listed"),
    });
    (thin, line)
}

/// Returns when each object was fetched from Stripe's API.
fn fetch_times<'o>(
    observations: impl Iterator<Item = &'o StoredObservation>,
    received: &ReceiptTimes,
) -> HashMap<&'o str, Vec<i64>> {
    let mut times: HashMap<&str, Vec<i64>> = HashMap::new();
    for observation in observations.filter(|observation| observation.observation.fetched) {
        if let Some(received_ms) = received.get(&observation.key) {
            let id = observation.observation.id.as_str();
            times.entry(id).or_default().push(*received_ms);
        }
    }
    times
}

/// What the newest that says it says.
fn at_stripe(observations: &InvoiceObservations) -> AtStripe {
    let invoices = || {
        let newest_first = observations.counted().iter().rev();
        newest_first
            .filter(|stored| !stored.observation.thin)
            .filter_map(|stored| match &stored.observation.object {
                Object::Invoice(invoice) => Some(invoice),
                _ => None,
            })
    };

    AtStripe {
        number: invoices().find_map(|invoice| invoice.number.clone()),
        currency: invoices().find_map(|invoice| invoice.currency.clone()),
        amount_due: invoices().find_map(|invoice| invoice.amount_due),
        amount_paid: invoices().find_map(|invoice| invoice.amount_paid),
        due_s: invoices().find_map(|invoice| invoice.due_date),
        livemode: observations.livemode(),
        account: observations.connected_account().map(str::to_owned),
    }
}

/// Returns the objects of thin events that are not fetched yet. An object that was fetched after
/// `until_ms` was missing then.
fn unfetched(
    thin: &[&StoredObservation],
    fetched: &HashMap<&str, Vec<i64>>,
    events: &HashMap<EventKey, LoggedEvent>,
    lookups: &HashMap<EventKey, LookupState>,
    until_ms: i64,
) -> Vec<Missing> {
    let mut missing = Vec::new();
    for observation in thin {
        let (Some(lookup), Some(event)) =
            (lookups.get(&observation.key), events.get(&observation.key))
        else {
            continue;
        };
        let id = event.object_id.as_deref().unwrap_or_default();
        let fetched_ms = fetched.get(id).map_or(&[][..], Vec::as_slice);
        let what = name_of(&observation.observation.object);
        let announced = format!(
            "Stripe announced {} without its details",
            observation.observation.kind
        );
        let is_fetched = fetched_ms
            .iter()
            .any(|ms| (event.received_ms..=until_ms).contains(ms));

        let message = match lookup.due_ms {
            None if is_fetched => continue,
            Some(_) => format!("{announced}: {what} is still to be fetched from Stripe's API"),
            None if fetched_ms.iter().any(|ms| *ms > until_ms) => {
                format!("{announced}: {what} was fetched from Stripe's API later")
            }
            None if fetched_ms.is_empty() && lookup.attempts > 0 => {
                format!(
                    "{announced}: Stripe's API was asked for {what} {} times and does not show it",
                    lookup.attempts
                )
            }
            None => continue,
        };
        missing.push(Missing {
            event: Some(event.clone()),
            message,
        });
    }
    missing
}

/// The reason of the latest failure, where no event told it and Stripe's API will be asked.
fn unexplained(folded: &Folded, comparison: &Comparison) -> Option<Missing> {
    let is_missing = comparison.check_due_ms.is_some() && folded.lacks_reason;
    let message = "No event told why the latest attempt failed: \
                   the reason is still to be fetched from Stripe's API";

    is_missing.then(|| Missing {
        event: None,
        message: message.to_owned(),
    })
}

fn name_of(object: &Object) -> &'static str {
    match object {
        Object::Invoice(_) => "the invoice",
        Object::InvoicePayment(_) | Object::PaymentIntent(_) => "the payment",
        Object::Charge(_) => "the charge",
        Object::Refund(_) => "the refund",
        Object::CreditNote(_) => "the credit note",
        Object::Dispute(_) => "the dispute",
    }
}

impl Evidence {
    pub fn to_json(&self) -> Value {
        let time = |ms: Option<i64>| ms.map(timestamp);
        json!({
            "tenantUid": self.tenant_uid,
            "invoiceUid": self.invoice_uid,
            "stripeInvoiceId": self.stripe_invoice_id,
            "asOf": time(self.as_of_ms),
            "storedAt": timestamp(self.stored_ms),
            "confirmedAt": time(self.confirmed_ms),
            "differsSince": time(self.differs_since_ms),
            "lastEventAt": time(self.last_event_ms),
            "missing": self.missing.iter().map(Missing::to_json).collect::<Vec<_>>(),
            "entries": self.entries.iter().map(Proven::to_json).collect::<Vec<_>>(),
        })
    }
}

impl Missing {
    fn to_json(&self) -> Value {
        let event = self.event.as_ref();
        json!({
            "eventId": event.and_then(|event| event.id.as_deref()),
            "eventType": event.and_then(|event| event.event_type.as_deref()),
            "objectId": event.and_then(|event| event.object_id.as_deref()),
            "message": self.message,
        })
    }
}

impl Proven {
    fn to_json(&self) -> Value {
        let proof = |event: &LoggedEvent| {
            json!({
                "id": event.id,
                "type": event.event_type,
                "createdAt": event.created_s.map(|s| timestamp(s.saturating_mul(1000))),
                "receivedAt": timestamp(event.received_ms),
                "source": event.source.as_str(),
                "secretLabel": event.secret_label,
            })
        };
        let mut json = json!({
            "state": self.state.as_str(),
            "timestamp": timestamp(self.timestamp_ms),
            "paymentMsg": self.message,
            "imported": self.is_imported,
            "proofs": self.proofs.iter().map(proof).collect::<Vec<_>>(),
        });
        if self.more_proofs > 0 {
            json["moreProofs"] = self.more_proofs.into();
        }

        json
    }
}
