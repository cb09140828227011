//! The evidence for an invoice's history: each entry with the events that prove it, and the time of
//! the last agreement with Stripe. `why`, HTTP and the page of an invoice show it.
//!
//! For a time in the past, only the events that were received by then count, as this version of the
//! program reads them. Receipt times never change: `rebuild` keeps them. The Stripe invoice of a
//! stored invoice counts at any time; its imported states count from the time at which the invoice
//! was first stored.

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

/// Limit on the proofs that one entry lists: the earliest. An invoice can have 100,000 of them.
const MAX_PROOFS_OF_ENTRY: usize = 100;
/// Limit on the proofs listed for all entries together: those of the latest entries.
const MAX_PROOFS: usize = 2_000;
/// Limit on the listed objects that are not fetched yet.
const MAX_MISSING: usize = 200;

/// The evidence for the history of one invoice. Times are in Unix milliseconds.
#[derive(Clone, Debug)]
pub struct Evidence {
    pub tenant_uid: String,
    pub invoice_uid: String,
    pub stripe_invoice_id: Option<String>,
    /// The end of the period whose events count; `None` if all events count.
    pub as_of_ms: Option<i64>,
    /// Time at which the invoice was first stored.
    pub stored_ms: i64,
    /// Time at which Stripe's API last agreed. Earlier agreements are not stored.
    pub confirmed_ms: Option<i64>,
    /// Time since which Stripe's API differs.
    pub differs_since_ms: Option<i64>,
    /// Time at which the latest event about this invoice was received.
    pub last_event_ms: Option<i64>,
    pub missing: Vec<Missing>,
    pub at_stripe: AtStripe,
    /// The entries in the order of the history.
    pub entries: Vec<Proven>,
}

/// The newest values of the invoice's own fields at Stripe.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AtStripe {
    pub number: Option<String>,
    pub currency: Option<String>,
    /// Minor units of the currency.
    pub amount_due: Option<i64>,
    /// Minor units of the currency.
    pub amount_paid: Option<i64>,
    /// Unix seconds of the due date.
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
    /// `true` if the entry came with the stored invoice, so that no event proves it.
    pub is_imported: bool,
    /// The earliest proofs, at most [`MAX_PROOFS_OF_ENTRY`], earliest first.
    pub proofs: Vec<LoggedEvent>,
    /// Number of proofs that are not listed.
    pub more_proofs: usize,
}

impl Proven {
    /// Returns the number of proofs, including those that are not listed.
    pub fn proof_count(&self) -> usize {
        self.proofs.len() + self.more_proofs
    }
}

/// An object that is not fetched from Stripe's API yet, or that the API does not have.
#[derive(Clone, Debug)]
pub struct Missing {
    /// The event that points to the object.
    pub event: Option<LoggedEvent>,
    /// A sentence for a person in finance.
    pub message: String,
}

/// Parses a time in RFC 3339 with an offset into Unix milliseconds. A future time is treated as
/// now.
///
/// # Errors
/// Returns the expected form as text.
pub fn as_of(text: &str, now_ms: i64) -> Result<i64, String> {
    parse_time(text).map(|ms| ms.min(now_ms))
}

/// Returns the evidence for an invoice, or `None` if this tenant has no such invoice.
///
/// # Errors
/// Returns an error if the database cannot be read.
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
/// It reads log rows only for the listed proofs and events, and only the receipt times of all
/// others.
///
/// # Errors
/// Returns an error if the database cannot be read.
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

/// The history of an invoice, and other results of the same observations.
#[derive(Default)]
struct Folded {
    entries: Vec<Entry>,
    /// Keys of the observations that count for the invoice.
    counted: HashSet<EventKey>,
    /// Ids of the events that count.
    counted_ids: HashSet<String>,
    at_stripe: AtStripe,
    /// `true` if no event has the reason of the latest failed attempt.
    lacks_reason: bool,
}

fn fold_with_selection(
    stripe_invoice_id: Option<&str>,
    imported: &[ImportedState],
    known: &[StoredObservation],
) -> Folded {
    // No observation counts for an invoice that names no Stripe invoice.
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

/// Returns the receipt time of the latest event that counts, or of its thin twin.
fn last_event_ms(
    known: &[StoredObservation],
    folded: &Folded,
    received: &ReceiptTimes,
) -> Option<i64> {
    known
        .iter()
        .filter(|stored| {
            let twin = stored.observation.snapshot_event.as_deref();
            folded.counted.contains(&stored.key)
                || twin.is_some_and(|id| folded.counted_ids.contains(id))
        })
        .filter(|stored| !stored.observation.fetched)
        .filter_map(|stored| received.get(&stored.key).copied())
        .max()
}

/// Unix milliseconds of the receipt of each event.
type ReceiptTimes = HashMap<EventKey, i64>;

/// Returns the proofs to list for each entry. The latest entries come first if there are too many.
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

/// Returns the thin events whose details may be missing, and a line for those beyond
/// [`MAX_MISSING`].
///
/// A thin event whose snapshot twin is known does not count, so the result has no such event.
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

/// Returns the times at which each object was fetched from Stripe's API.
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

/// Returns, for each field, the value from the newest observation that has it.
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
        let object = object_name(&observation.observation.object);
        let announced = format!(
            "Stripe announced {} without its details",
            observation.observation.kind
        );
        let is_fetched = fetched_ms
            .iter()
            .any(|ms| (event.received_ms..=until_ms).contains(ms));

        let message = match lookup.due_ms {
            None if is_fetched => continue,
            Some(_) => format!("{announced}: {object} is still to be fetched from Stripe's API"),
            None if fetched_ms.iter().any(|ms| *ms > until_ms) => {
                format!("{announced}: {object} was fetched from Stripe's API later")
            }
            None if fetched_ms.is_empty() && lookup.attempts > 0 => {
                format!(
                    "{announced}: {object} was requested from Stripe's API {} times and not found",
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

/// Returns a line for a failed attempt without a reason, if the reason will be fetched.
fn unexplained(folded: &Folded, comparison: &Comparison) -> Option<Missing> {
    let is_missing = comparison.check_due_ms.is_some() && folded.lacks_reason;
    let message = "No event says why the latest attempt failed: \
                   the reason is still to be fetched from Stripe's API";

    is_missing.then(|| Missing {
        event: None,
        message: message.to_owned(),
    })
}

fn object_name(object: &Object) -> &'static str {
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
        let mut json = json!({
            "state": self.state.as_str(),
            "timestamp": timestamp(self.timestamp_ms),
            "paymentMsg": self.message,
            "imported": self.is_imported,
            "proofs": self.proofs.iter().map(proof_json).collect::<Vec<_>>(),
        });
        if self.more_proofs > 0 {
            json["moreProofs"] = self.more_proofs.into();
        }

        json
    }
}

fn proof_json(event: &LoggedEvent) -> Value {
    json!({
        "id": event.id,
        "type": event.event_type,
        "createdAt": event.created_s.map(|s| timestamp(s.saturating_mul(1000))),
        "receivedAt": timestamp(event.received_ms),
        "source": event.source.as_str(),
        "secretLabel": event.secret_label,
    })
}
