//! Stores and replaces invoice documents, and finds the holders of Stripe invoices.
//!
//! `invoice_lists` pages through them, and `invoice_reads` reads one with its observations.

use std::time::Duration;

use serde_json::{Value, json};

use super::engine::connection::{Connection, execute, rows};
use super::invoice_reads::{self, Reader};
use super::invoice_rows::{InvoiceRow, StoredInvoice, stored_invoice};
use super::{Engine, Store, StoreError, StoreErrorKind};

/// An invoice to store. Fields as in [`StoredInvoice`].
#[derive(Clone, Debug)]
pub struct NewInvoice {
    pub tenant_uid: String,
    pub invoice_uid: String,
    pub stripe_invoice_id: Option<String>,
    pub document: String,
    pub imported_states: String,
}

/// The result of storing an invoice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    Created,
    Replaced,
    /// Another invoice holds this Stripe invoice.
    StripeInvoiceTaken,
    /// This invoice holds another Stripe invoice, which never changes.
    StripeInvoiceFixed,
    /// The caller's condition on the stored invoice does not hold.
    PreconditionFailed,
}

/// A condition on the invoice that is stored now, or on its absence.
pub type Precondition<'p> = dyn Fn(Option<&StoredInvoice>) -> bool + Send + Sync + 'p;

/// Attempts to run a transaction that conflicts with others.
const ATTEMPTS: u32 = 8;

const BY_NAME: &str = "
    select tenant_uid, invoice_uid, stripe_invoice_id, document, imported_states, stored_ms, revision
    from invoices where tenant_uid = $1 and invoice_uid = $2";
/// Selects the invoices that hold these Stripe invoices. `$1` is a JSON array of Stripe invoice
/// ids.
const HOLDERS_IN_SQLITE: &str = "
    select tenant_uid, invoice_uid, stripe_invoice_id from invoices
    where stripe_invoice_id in (select value from json_each($1))";
const HOLDERS_IN_POSTGRES: &str = r#"
    select tenant_uid, invoice_uid, stripe_invoice_id from jsonb_array_elements_text($1::jsonb) as ids
    cross join lateral (
        select * from invoices where stripe_invoice_id = ids.value collate "C" offset 0) as holder"#;
const HOLDER: &str =
    "select tenant_uid, invoice_uid, stripe_invoice_id from invoices where stripe_invoice_id = $1";
const INSERT: &str = "
    insert into invoices (tenant_uid, invoice_uid, stripe_invoice_id, document, imported_states, stored_ms, revision)
    values ($1, $2, $3, $4, $5, $6, 1)";
const NO_LONGER_UNMATCHED: &str = "delete from awaited where stripe_invoice_id = $1";
const UPDATE: &str = "
    update invoices set document = $3, stripe_invoice_id = coalesce($4, stripe_invoice_id), revision = revision + $5
    where tenant_uid = $1 and invoice_uid = $2";

impl Store {
    /// Stores or replaces an invoice, if `precondition` holds for the one that is stored now.
    ///
    /// A replacement keeps the Stripe invoice and the states that came with the first version.
    pub async fn put_invoice(
        &self,
        new: &NewInvoice,
        now_ms: i64,
        precondition: &Precondition<'_>,
    ) -> Result<Put, StoreError> {
        let answers = self
            .put_with_retries(std::slice::from_ref(new), now_ms, Some(precondition))
            .await?;
        Ok(answers[0])
    }

    /// Stores many invoices in one transaction and returns one result for each, in their order. A
    /// rejected invoice does not affect the others.
    pub async fn put_invoices(
        &self,
        batch: &[NewInvoice],
        now_ms: i64,
    ) -> Result<Vec<Put>, StoreError> {
        self.put_with_retries(batch, now_ms, None).await
    }

    /// Repeats the transaction while others conflict with it.
    async fn put_with_retries(
        &self,
        batch: &[NewInvoice],
        now_ms: i64,
        precondition: Option<&Precondition<'_>>,
    ) -> Result<Vec<Put>, StoreError> {
        let mut attempt = 1;

        loop {
            match self.put_once(batch, now_ms, precondition).await {
                Err(error) if error.kind() == StoreErrorKind::Contended && attempt < ATTEMPTS => {
                    // Random, so that two transactions that collided do not collide again.
                    let pause = Duration::from_millis(rand::random_range(0..10 << attempt));
                    tokio::time::sleep(pause).await;
                    attempt += 1;
                }
                ended => return ended,
            }
        }
    }

    async fn put_once(
        &self,
        batch: &[NewInvoice],
        now_ms: i64,
        precondition: Option<&Precondition<'_>>,
    ) -> Result<Vec<Put>, StoreError> {
        let mut session = self.transaction().await?;
        let mut answers = Vec::with_capacity(batch.len());
        for new in batch {
            let (tenant_uid, invoice_uid) = (&new.tenant_uid, &new.invoice_uid);
            // Only a precondition needs the observations, and reading them takes the longest.
            let stored = match precondition {
                Some(_) => {
                    invoice_reads::read(&mut session, tenant_uid, invoice_uid, Reader::Internal)
                        .await?
                        .0
                }
                None => rows!(
                    session,
                    fetch_optional,
                    InvoiceRow,
                    BY_NAME,
                    tenant_uid,
                    invoice_uid
                )?
                .map(stored_invoice),
            };
            if precondition.is_some_and(|holds| !holds(stored.as_ref())) {
                answers.push(Put::PreconditionFailed);
            } else {
                answers.push(write(&mut session, new, stored, now_ms).await?);
            }
        }

        session.commit().await?;

        Ok(answers)
    }

    /// Returns tenant, invoice and Stripe invoice of each stored invoice that holds one of these
    /// Stripe invoices. `stripe_invoice_ids` must not contain an id twice.
    pub async fn holders(
        &self,
        stripe_invoice_ids: &[String],
    ) -> Result<Vec<(String, String, String)>, StoreError> {
        let sql = match &self.0 {
            Engine::Sqlite(_) => HOLDERS_IN_SQLITE,
            Engine::Postgres(_) => HOLDERS_IN_POSTGRES,
        };
        let ids = serde_json::to_string(stripe_invoice_ids).expect("strings always serialise");
        let mut session = self.session().await?;
        let holders = rows!(
            session,
            fetch_all,
            (String, String, String),
            sql,
            ids.as_str()
        )?;
        session.done().await?;

        Ok(holders)
    }
}

/// Inserts or replaces one invoice within a transaction.
async fn write(
    session: &mut Connection,
    new: &NewInvoice,
    stored: Option<StoredInvoice>,
    now_ms: i64,
) -> Result<Put, StoreError> {
    let NewInvoice {
        tenant_uid,
        invoice_uid,
        stripe_invoice_id,
        document,
        imported_states,
    } = new;

    if let Some(id) = stripe_invoice_id {
        let kept = stored.as_ref().and_then(|s| s.stripe_invoice_id.as_ref());
        if kept.is_some_and(|kept| kept != id) {
            return Ok(Put::StripeInvoiceFixed);
        }
        type Holder = (String, String, String);
        let holder = rows!(session, fetch_optional, Holder, HOLDER, id)?;
        if holder.is_some_and(|(tenant, uid, _)| (&tenant, &uid) != (tenant_uid, invoice_uid)) {
            return Ok(Put::StripeInvoiceTaken);
        }
        execute!(session, NO_LONGER_UNMATCHED, id)?;
    }

    let Some(stored) = stored else {
        execute!(
            session,
            INSERT,
            tenant_uid,
            invoice_uid,
            stripe_invoice_id,
            document,
            imported_states,
            now_ms
        )?;
        return Ok(Put::Created);
    };

    let document = match (stripe_invoice_id, &stored.stripe_invoice_id) {
        (None, Some(kept)) => with_stripe_invoice(document, kept)?,
        _ => document.clone(),
    };
    let is_changed = document != stored.document;
    if is_changed || stripe_invoice_id.is_some() {
        execute!(
            session,
            UPDATE,
            tenant_uid,
            invoice_uid,
            document.as_str(),
            stripe_invoice_id,
            i64::from(is_changed)
        )?;
    }
    Ok(Put::Replaced)
}

/// Adds the stored Stripe invoice to a document that leaves it out.
fn with_stripe_invoice(document: &str, id: &str) -> Result<String, StoreError> {
    let damaged = |reason: &dyn std::fmt::Display| {
        StoreError::damaged(format!("the document of an invoice is damaged: {reason}"))
    };
    let mut document: Value = serde_json::from_str(document).map_err(|e| damaged(&e))?;
    let fields = document
        .as_object_mut()
        .ok_or_else(|| damaged(&"it is not an object"))?;

    let status = fields.entry("status").or_insert_with(|| json!({}));
    match status.as_object_mut() {
        Some(status) => status.insert("stripeInvoiceId".to_owned(), id.into()),
        None => return Err(damaged(&"its status is not an object")),
    };
    Ok(document.to_string())
}
