//! Rows of stored invoices and of their observations, as the statements of the other files read them.

use crate::domain::stripe::event::EventKey;

/// A stored invoice and its observations.
#[derive(Clone, Debug)]
pub struct StoredInvoice {
    pub tenant_uid: String,
    pub invoice_uid: String,
    pub stripe_invoice_id: Option<String>,
    /// The normalised `v1Invoice` as JSON, without `status.states`.
    pub document: String,
    /// The states that came with the first version of the document: a JSON array of
    /// `ImportedState`.
    pub imported_states: String,
    /// Unix milliseconds of the first time the invoice was stored.
    pub stored_ms: i64,
    /// Version number that grows whenever the document changes.
    pub revision: i64,
    /// Observations of the invoice. Empty if it was read without them.
    pub observations: Vec<ObservationRow>,
}

/// An observation as stored. It is parsed only when a history is folded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObservationRow {
    pub key: EventKey,
    /// An `Observation` as JSON.
    pub json: String,
}

/// The columns of an invoice, in the order of the statements.
pub(super) type InvoiceRow = (String, String, Option<String>, String, String, i64, i64);

pub(super) fn stored_invoice(row: InvoiceRow) -> StoredInvoice {
    let (
        tenant_uid,
        invoice_uid,
        stripe_invoice_id,
        document,
        imported_states,
        stored_ms,
        revision,
    ) = row;

    StoredInvoice {
        tenant_uid,
        invoice_uid,
        stripe_invoice_id,
        document,
        imported_states,
        stored_ms,
        revision,
        observations: Vec::new(),
    }
}
