//! Storing invoice documents, and listing them with the state they are in: what HTTP and the command line share.

use serde_json::Value;

use crate::domain::history::{Entry, StoredObservation, fold};
use crate::domain::invoice::document::{self};
use crate::domain::invoice::schema;
use crate::domain::invoice::schema::InvalidField;
use crate::domain::payment_state::{ImportedState, PaymentState};
use crate::store::{InvoiceCursor, NewInvoice, ObservationRow, Store, StoreError, StoredInvoice};

/// Invoices that one page looks through at most, while it seeks those in a state. A person who seeks a rare one clicks through
/// what there is in such steps.
const SCANNED: usize = 5_000;
/// Invoices read at a time.
const READ: u32 = 250;

/// A valid document, ready to be stored. Its uid is the path's, where there is one, else the document's own.
///
/// # Errors
/// Every fault, with its place.
pub fn new_invoice(
    tenant_uid: &str,
    uid: Option<&str>,
    document: Value,
) -> Result<NewInvoice, Vec<InvalidField>> {
    let named = invoice_uid(uid, &document);
    let validated = document::validate(document);
    let (invoice_uid, valid) = match (named, validated) {
        (Ok(invoice_uid), Ok(valid)) => (invoice_uid, valid),
        (named, validated) => {
            return Err([
                validated.err().unwrap_or_default(),
                named.err().into_iter().collect(),
            ]
            .concat());
        }
    };
    let imported_states =
        serde_json::to_string(&valid.imported_states).expect("states always serialise");
    Ok(NewInvoice {
        tenant_uid: tenant_uid.to_owned(),
        invoice_uid,
        stripe_invoice_id: valid.stripe_invoice_id,
        document: valid.document.to_string(),
        imported_states,
    })
}

/// The name of the invoice. Empty where the document has not the form to say it: validation refuses that.
fn invoice_uid(uid: Option<&str>, document: &Value) -> Result<String, InvalidField> {
    let own = document
        .pointer("/metadata/uid")
        .filter(|own| !own.is_null());
    let fault = |reason: String| InvalidField {
        pointer: "/metadata/uid".to_owned(),
        reason,
    };
    let uid = match (uid, own.map(Value::as_str)) {
        (_, Some(None)) => return Ok(String::new()),
        (None, None) if !document.is_object() => return Ok(String::new()),
        (None, None) => return Err(fault("is required: it names the invoice".to_owned())),
        (Some(uid), Some(Some(own))) if uid != own => {
            return Err(fault("is not the uid in the path".to_owned()));
        }
        (Some(uid), _) | (None, Some(Some(uid))) => uid,
    };
    schema::validate_uid(uid).map_err(fault)?;
    Ok(uid.to_owned())
}

/// The history of a stored invoice.
///
/// # Errors
/// [`StoreErrorKind::DamagedRow`](crate::store::StoreErrorKind) if the stored text is damaged.
pub fn history(stored: &StoredInvoice) -> Result<Vec<Entry>, StoreError> {
    Ok(fold(
        stored.stripe_invoice_id.as_deref(),
        &imported_states(stored)?,
        &known(stored)?,
    ))
}

/// All that is told about a stored invoice.
///
/// # Errors
/// As [`parse_observations`].
pub fn known(stored: &StoredInvoice) -> Result<Vec<StoredObservation>, StoreError> {
    parse_observations(&stored.observations)
}

/// What was read in events, out of the store.
///
/// # Errors
/// [`StoreErrorKind::DamagedRow`](crate::store::StoreErrorKind) if the stored text is damaged.
pub fn parse_observations(stored: &[ObservationRow]) -> Result<Vec<StoredObservation>, StoreError> {
    let read = |told: &ObservationRow| match serde_json::from_str(&told.json) {
        Ok(telling) => Ok(StoredObservation {
            key: told.key,
            telling,
        }),
        Err(e) => Err(StoreError::damaged(format!(
            "what event {} tells cannot be read, run `rebuild`: {e}",
            hex::encode(told.key.0)
        ))),
    };
    stored.iter().map(read).collect()
}

/// The states that came with a stored invoice.
///
/// # Errors
/// [`StoreErrorKind::DamagedRow`](crate::store::StoreErrorKind) if the stored text is damaged.
pub fn imported_states(stored: &StoredInvoice) -> Result<Vec<ImportedState>, StoreError> {
    serde_json::from_str(&stored.imported_states).map_err(|e| damaged(stored, e))
}

/// The document with its payment states.
///
/// # Errors
/// As [`history`].
pub fn render(stored: &StoredInvoice) -> Result<Value, StoreError> {
    let document: Value = serde_json::from_str(&stored.document).map_err(|e| damaged(stored, e))?;
    Ok(document::render(&document, &history(stored)?))
}

fn damaged(stored: &StoredInvoice, error: serde_json::Error) -> StoreError {
    StoreError::damaged(format!(
        "invoice {} of {} is damaged: {error}",
        stored.invoice_uid, stored.tenant_uid
    ))
}

/// Which invoices a list shows, by the state they are in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateFilter {
    Any,
    /// Nothing has happened yet.
    WithoutEntry,
    In(PaymentState),
}

impl StateFilter {
    /// `none` or the name of a state.
    ///
    /// # Errors
    /// In words, what it may be.
    pub fn parse(text: &str) -> Result<StateFilter, String> {
        match (text, PaymentState::parse(text)) {
            ("none", _) => Ok(StateFilter::WithoutEntry),
            (_, Some(state)) => Ok(StateFilter::In(state)),
            _ => Err(format!(
                "state must be none or one of {}",
                PaymentState::ALL.map(PaymentState::as_str).join(", ")
            )),
        }
    }

    fn shows(self, history: &[Entry]) -> bool {
        match self {
            StateFilter::Any => true,
            StateFilter::WithoutEntry => history.is_empty(),
            StateFilter::In(state) => history.last().is_some_and(|entry| entry.state == state),
        }
    }
}

/// What a search found.
pub struct Found {
    pub invoices: Vec<StoredInvoice>,
    /// More are there; who looks for them types more.
    pub has_more: bool,
}

/// The invoices that a person means: by Stripe's id, or by the uid or the beginning of it; of one tenant or of all.
pub async fn find(
    store: &Store,
    tenant_uid: Option<&str>,
    sought: &str,
    limit: usize,
) -> Result<Found, StoreError> {
    if schema::validate_uid(sought).is_err() {
        return Ok(Found {
            invoices: Vec::new(),
            has_more: false,
        });
    }
    let mut invoices = store
        .invoices_page(tenant_uid, Some(sought), None, 1)
        .await?;
    let by_uid = store
        .invoices_by_uid(tenant_uid, sought, limit as u32 + 1)
        .await?;
    let names = |invoice: &StoredInvoice| (invoice.tenant_uid.clone(), invoice.invoice_uid.clone());
    let by_stripe = invoices.first().map(names);
    invoices.extend(
        by_uid
            .into_iter()
            .filter(|invoice| Some(names(invoice)) != by_stripe),
    );
    let has_more = invoices.len() > limit;
    invoices.truncate(limit);
    Ok(Found { invoices, has_more })
}

pub struct PageRequest {
    /// None: all tenants.
    pub tenant_uid: Option<String>,
    pub stripe_invoice_id: Option<String>,
    pub state: StateFilter,
    pub limit: usize,
    pub after: Option<Cursor>,
}

pub struct Page {
    pub invoices: Vec<StoredInvoice>,
    /// Where the next page begins; None: this was the last.
    pub next: Option<Cursor>,
}

/// Where a page ended, as text that says nothing to a client.
pub struct Cursor(InvoiceCursor);

impl Cursor {
    pub fn to_text(&self) -> String {
        let InvoiceCursor {
            stored_ms,
            tenant_uid,
            invoice_uid,
        } = &self.0;
        hex::encode(
            serde_json::to_vec(&(stored_ms, tenant_uid, invoice_uid))
                .expect("numbers and strings always serialise"),
        )
    }

    pub fn parse(text: &str) -> Option<Cursor> {
        let (stored_ms, tenant_uid, invoice_uid): (i64, String, String) =
            serde_json::from_slice(&hex::decode(text).ok()?).ok()?;
        [&tenant_uid, &invoice_uid]
            .into_iter()
            .all(|uid| schema::validate_uid(uid).is_ok())
            .then_some(())?;
        Some(Cursor(InvoiceCursor {
            stored_ms,
            tenant_uid,
            invoice_uid,
        }))
    }

    /// When the last invoice of the page was stored.
    pub fn stored_ms(&self) -> i64 {
        self.0.stored_ms
    }

    fn at(invoice: &StoredInvoice) -> Cursor {
        Cursor(InvoiceCursor {
            stored_ms: invoice.stored_ms,
            tenant_uid: invoice.tenant_uid.clone(),
            invoice_uid: invoice.invoice_uid.clone(),
        })
    }
}

/// A page of invoices, newest first. It may be shorter than its limit although more follow: states are folded, not stored, so
/// what one request looks through is bounded.
pub async fn page(store: &Store, request: &PageRequest) -> Result<Page, StoreError> {
    let mut found = Vec::new();
    let mut scanned = 0;
    let mut after = request.after.as_ref().map(|cursor| cursor.0.clone());
    let read = if request.state == StateFilter::Any {
        request.limit as u32 + 1
    } else {
        READ
    };
    loop {
        let batch = store
            .invoices_page(
                request.tenant_uid.as_deref(),
                request.stripe_invoice_id.as_deref(),
                after.as_ref(),
                read,
            )
            .await?;
        let is_last = batch.len() < read as usize;
        scanned += batch.len();
        for invoice in batch {
            if found.len() == request.limit {
                let next = after.map(Cursor);
                return Ok(Page {
                    invoices: found,
                    next,
                });
            }
            after = Some(Cursor::at(&invoice).0);
            if request.state == StateFilter::Any || request.state.shows(&history(&invoice)?) {
                found.push(invoice);
            }
        }
        if is_last || scanned >= SCANNED {
            let next = if is_last { None } else { after.map(Cursor) };
            return Ok(Page {
                invoices: found,
                next,
            });
        }
    }
}
