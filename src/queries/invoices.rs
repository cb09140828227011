//! Stored invoice documents and lists of them by state, for HTTP and the command line.

use serde_json::Value;

use super::folding::run_fold;
use crate::domain::history::{Entry, StoredObservation, fold};
use crate::domain::invoice::document;
use crate::domain::invoice::schema::{self, InvalidField};
use crate::domain::payment_state::{ImportedState, PaymentState};
use crate::store::{
    InvoiceCursor, InvoicePage, NewInvoice, ObservationRow, Store, StoreError, StoredInvoice,
};

/// Limit on the invoices that one page searches for a state. A visitor who looks for a rare state
/// pages through the invoices in steps of this size.
const MAX_SCANNED: usize = 5_000;
/// Limit on the bytes of documents and observations that one page reads.
const MAX_SCANNED_BYTES: usize = 64 * 1024 * 1024;
/// Bytes of documents after which a page ends. A document has at most 1 MiB, so a page has less
/// than 5 MiB of documents. A page has at least one item unless the list has ended.
const PAGE_BYTES: usize = 4 * 1024 * 1024;
/// Limit on the invoices that one statement reads.
const STEP: usize = 250;
/// Bytes of documents after which a step ends. A request holds these bytes and its response in
/// memory.
const STEP_BYTES: usize = 1024 * 1024;
/// Invoices whose observations the first statement of a page reads. Few, because the number of
/// observations of an invoice is not known before they are read.
const FIRST_CHUNK: usize = 4;
/// Limit on the invoices whose observations one statement reads.
const MAX_CHUNK: usize = 128;
/// Bytes of observations above which the next statement reads the observations of fewer invoices.
const CHUNK_BYTES: usize = 256 * 1024;

/// Validates a document. Its uid is the uid in the path, or the document's own if the path has
/// none.
///
/// # Errors
/// Returns all invalid fields, each with its JSON pointer.
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

/// Returns the uid of the invoice, empty if the document is too malformed to have one: validation
/// rejects such a document.
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
            return Err(fault("differs from the uid in the path".to_owned()));
        }
        (Some(uid), _) | (None, Some(Some(uid))) => uid,
    };

    schema::validate_uid(uid).map_err(fault)?;

    Ok(uid.to_owned())
}

/// Returns the history of a stored invoice. This takes long for thousands of observations, so
/// requests use [`with_history`].
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

/// Folds known observations into the history of a stored invoice, off the async threads if that
/// takes long. Also returns the observations.
///
/// # Errors
/// [`StoreErrorKind::DamagedRow`](crate::store::StoreErrorKind) if the stored text is damaged.
pub async fn fold_known(
    stored: &StoredInvoice,
    known: Vec<StoredObservation>,
) -> Result<(Vec<StoredObservation>, Vec<Entry>), StoreError> {
    let id = stored.stripe_invoice_id.clone();
    let imported = imported_states(stored)?;
    let folded = run_fold(known.len(), move || {
        let history = fold(id.as_deref(), &imported, &known);
        (known, history)
    });
    Ok(folded.await)
}

/// Returns an invoice with its history, folded off the async threads if that takes long.
///
/// # Errors
/// As [`history`].
pub async fn with_history(
    invoice: StoredInvoice,
) -> Result<(StoredInvoice, Vec<Entry>), StoreError> {
    run_fold(invoice.observations.len(), move || {
        history(&invoice).map(|history| (invoice, history))
    })
    .await
}

/// Returns the observations of a stored invoice.
///
/// # Errors
/// As [`parse_observations`].
pub fn known(stored: &StoredInvoice) -> Result<Vec<StoredObservation>, StoreError> {
    parse_observations(&stored.observations)
}

/// Parses observations that the store returned.
///
/// # Errors
/// [`StoreErrorKind::DamagedRow`](crate::store::StoreErrorKind) if the stored text is damaged.
pub fn parse_observations(stored: &[ObservationRow]) -> Result<Vec<StoredObservation>, StoreError> {
    stored
        .iter()
        .map(|row| {
            StoredObservation::parse(row.key, &row.json)
                .map_err(|damaged| StoreError::damaged(damaged.to_string()))
        })
        .collect()
}

/// Returns the states that came with a stored invoice.
///
/// # Errors
/// [`StoreErrorKind::DamagedRow`](crate::store::StoreErrorKind) if the stored text is damaged.
pub fn imported_states(stored: &StoredInvoice) -> Result<Vec<ImportedState>, StoreError> {
    serde_json::from_str(&stored.imported_states).map_err(|e| damaged(stored, e))
}

/// Returns the document with its payment states.
///
/// # Errors
/// As [`history`].
pub fn render(stored: &StoredInvoice) -> Result<Value, StoreError> {
    render_with(stored, &history(stored)?)
}

/// Returns the document with the states of a folded history.
///
/// # Errors
/// [`StoreErrorKind::DamagedRow`](crate::store::StoreErrorKind) if the stored text is damaged.
pub fn render_with(stored: &StoredInvoice, history: &[Entry]) -> Result<Value, StoreError> {
    let document: Value = serde_json::from_str(&stored.document).map_err(|e| damaged(stored, e))?;
    Ok(document::render(&document, history))
}

fn damaged(stored: &StoredInvoice, error: serde_json::Error) -> StoreError {
    StoreError::damaged(format!(
        "invoice {} of {} is damaged: {error}",
        stored.invoice_uid, stored.tenant_uid
    ))
}

/// Filter of a list by the current state of its invoices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateFilter {
    Any,
    /// Invoices with an empty history.
    WithoutEntry,
    In(PaymentState),
}

impl StateFilter {
    /// Parses `none` or the name of a state.
    ///
    /// # Errors
    /// Returns the accepted values as a sentence.
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

/// The result of a search.
pub struct Found<Item> {
    pub items: Vec<Item>,
    /// `true` if more invoices match. A longer search text finds them.
    pub has_more: bool,
}

/// Finds invoices by their Stripe id, or by their uid or its beginning, of one tenant or of all.
/// `item` converts each invoice and its history.
pub async fn find<Item>(
    store: &Store,
    tenant_uid: Option<&str>,
    sought: &str,
    limit: usize,
    mut item: impl FnMut(&StoredInvoice, Vec<Entry>) -> Result<Item, StoreError>,
) -> Result<Found<Item>, StoreError> {
    let mut found = Found {
        items: Vec::new(),
        has_more: false,
    };
    if schema::validate_uid(sought).is_err() {
        return Ok(found);
    }

    let by_stripe_id = store
        .documents_page(tenant_uid, Some(sought), None, 1, STEP_BYTES)
        .await?;
    let mut by_uid = store
        .documents_by_uid(tenant_uid, sought, limit as u32 + 1, PAGE_BYTES)
        .await?;
    let first = by_stripe_id.invoices.first().map(Cursor::at);
    by_uid
        .invoices
        .retain(|invoice| Some(Cursor::at(invoice)) != first);
    let mut invoices = [by_stripe_id.invoices, by_uid.invoices].concat();
    found.has_more = invoices.len() > limit || by_uid.has_more;
    invoices.truncate(limit);

    let mut reader = HistoryReader::new(store, invoices);
    while let Some((invoice, history)) = reader.next().await? {
        found.items.push(item(&invoice, history)?);
    }
    Ok(found)
}

/// A request for a page of invoices. All conditions must hold.
pub struct PageRequest {
    /// The tenant, or `None` for all tenants.
    pub tenant_uid: Option<String>,
    pub stripe_invoice_id: Option<String>,
    pub state: StateFilter,
    pub limit: usize,
    pub after: Option<Cursor>,
}

/// A page of items made of invoices.
pub struct Page<Item> {
    pub items: Vec<Item>,
    /// The position at which the next page begins, or `None` after the last page.
    pub next: Option<Cursor>,
}

/// A position in the list of invoices. Its text is opaque to clients.
#[derive(PartialEq, Eq)]
pub struct Cursor(InvoiceCursor);

impl Cursor {
    /// Returns the text for clients.
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

    /// Parses the text of [`Cursor::to_text`]. Returns `None` for any other text.
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

    /// Returns the time at which the last invoice of the page was stored, in Unix milliseconds.
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

/// Returns a page of invoices, newest first. `item` converts each invoice and its history. The
/// invoice itself is dropped at once, so a page holds one document at a time, and its items.
///
/// A page may be shorter than its limit although more follow. It ends after [`PAGE_BYTES`] of
/// documents, because documents can be large. It searches a bounded number of invoices, because
/// states are folded on each read and not stored.
pub async fn page<Item>(
    store: &Store,
    request: &PageRequest,
    mut item: impl FnMut(&StoredInvoice, Vec<Entry>) -> Result<Item, StoreError>,
) -> Result<Page<Item>, StoreError> {
    let mut items = Vec::new();
    let (mut bytes, mut scanned, mut scanned_bytes) = (0, 0, 0);
    let mut after = request.after.as_ref().map(|cursor| cursor.0.clone());
    loop {
        let step = next_step(store, request, after.as_ref(), items.len()).await?;
        let mut reader = HistoryReader::new(store, step.invoices);
        while let Some((invoice, history)) = reader.next().await? {
            let is_full = items.len() == request.limit || bytes >= PAGE_BYTES;
            if is_full || scanned == MAX_SCANNED || scanned_bytes >= MAX_SCANNED_BYTES {
                let next = after.map(Cursor);
                return Ok(Page { items, next });
            }

            after = Some(Cursor::at(&invoice).0);
            scanned += 1;
            scanned_bytes += invoice.document.len() + observed_bytes(&invoice);
            if request.state.shows(&history) {
                bytes += invoice.document.len();
                items.push(item(&invoice, history)?);
            }
        }
        if !step.has_more {
            return Ok(Page { items, next: None });
        }
    }
}

/// Reads the next invoices of a page: one more than fits, to know whether more follow.
async fn next_step(
    store: &Store,
    request: &PageRequest,
    after: Option<&InvoiceCursor>,
    items: usize,
) -> Result<InvoicePage, StoreError> {
    let room = if request.state == StateFilter::Any {
        request.limit - items + 1
    } else {
        STEP
    };

    store
        .documents_page(
            request.tenant_uid.as_deref(),
            request.stripe_invoice_id.as_deref(),
            after,
            room.min(STEP) as u32,
            STEP_BYTES,
        )
        .await
}

fn observed_bytes(invoice: &StoredInvoice) -> usize {
    invoice.observations.iter().map(|row| row.json.len()).sum()
}

/// Folds the histories of invoices one by one, and reads the observations of a few invoices ahead.
struct HistoryReader<'s> {
    store: &'s Store,
    /// Invoices whose observations are not read yet.
    pending: std::vec::IntoIter<StoredInvoice>,
    /// Invoices whose observations are read.
    ready: std::vec::IntoIter<StoredInvoice>,
    /// Invoices whose observations the next statement reads.
    chunk: usize,
}

impl HistoryReader<'_> {
    fn new(store: &Store, invoices: Vec<StoredInvoice>) -> HistoryReader<'_> {
        HistoryReader {
            store,
            pending: invoices.into_iter(),
            ready: Vec::new().into_iter(),
            chunk: FIRST_CHUNK,
        }
    }

    async fn next(&mut self) -> Result<Option<(StoredInvoice, Vec<Entry>)>, StoreError> {
        if self.ready.len() == 0 {
            self.read_chunk().await?;
        }
        let Some(invoice) = self.ready.next() else {
            return Ok(None);
        };
        with_history(invoice).await.map(Some)
    }

    async fn read_chunk(&mut self) -> Result<(), StoreError> {
        let mut chunk: Vec<_> = self.pending.by_ref().take(self.chunk).collect();
        if !chunk.is_empty() {
            self.store.add_observations(&mut chunk).await?;
            let bytes: usize = chunk.iter().map(observed_bytes).sum();
            self.chunk = if bytes > CHUNK_BYTES {
                (self.chunk / 4).max(1)
            } else {
                (self.chunk * 2).min(MAX_CHUNK)
            };
        }
        self.ready = chunk.into_iter();
        Ok(())
    }
}
