//! The stored invoices, each read together with all that is told about it.

use serde_json::{Value, json};
use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqliteConnection};

use super::events::known;
use super::{Store, StoreError};
use crate::domain::history::Known;

/// An invoice as stored, and what is told about it.
#[derive(Clone, Debug)]
pub struct StoredInvoice {
    pub tenant_uid: String,
    pub invoice_uid: String,
    pub stripe_invoice_id: Option<String>,
    /// The normalised `v1Invoice` as JSON, without `status.states`.
    pub document: String,
    /// The states that came with its first storing: a JSON array of `ImportedState`.
    pub imported_states: String,
    /// When it was first stored, Unix milliseconds.
    pub stored_ms: i64,
    /// Grows when the document changes.
    pub revision: i64,
    pub tellings: Vec<Known>,
}

/// An invoice to be stored. Fields as in [`StoredInvoice`].
#[derive(Clone, Debug)]
pub struct NewInvoice {
    pub tenant_uid: String,
    pub invoice_uid: String,
    pub stripe_invoice_id: Option<String>,
    pub document: String,
    pub imported_states: String,
}

/// What became of an invoice that was to be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    Created,
    Replaced,
    /// Another invoice holds that Stripe invoice.
    StripeInvoiceTaken,
    /// This invoice holds another Stripe invoice, and that never changes.
    StripeInvoiceFixed,
    /// The caller's condition on what is stored does not hold.
    PreconditionFailed,
}

/// The last invoice of a page: the next page begins after it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvoiceCursor {
    pub stored_ms: i64,
    pub tenant_uid: String,
    pub invoice_uid: String,
}

/// The invoice in a row of its own, then one row for each telling: one statement, one snapshot of the database.
const INVOICE_AND_TELLINGS: &str = "
    with recursive
    this as (select * from invoices where tenant_uid = $1 and invoice_uid = $2),
    reached (object_id) as (
        select stripe_invoice_id from this where stripe_invoice_id is not null
        union
        select further.object_id from reached
        join mentions as here on here.object_id = reached.object_id
        join mentions as further on further.event_key = here.event_key and not further.is_invoice
    )
    select stripe_invoice_id, document, imported_states, stored_ms, revision, null as key, null as telling from this
    union all
    select null, null, null, null, null, key, telling from events
    where telling is not null and key in (select event_key from mentions join reached using (object_id))";

impl Store {
    /// The invoice and what is told about it.
    pub async fn invoice(&self, tenant_uid: &str, invoice_uid: &str) -> Result<Option<StoredInvoice>, StoreError> {
        let mut connection = self.read.acquire().await?;
        read_invoice(&mut connection, tenant_uid, invoice_uid).await
    }

    /// Stores or replaces an invoice, if `precondition` holds for what is stored now. A replacement keeps the Stripe invoice
    /// and the states that came with the first storing.
    pub async fn put_invoice(
        &self,
        new: &NewInvoice,
        now_ms: i64,
        precondition: impl Fn(Option<&StoredInvoice>) -> bool + Send,
    ) -> Result<Put, StoreError> {
        let mut transaction = self.begin().await?;
        let stored = read_invoice(&mut transaction, &new.tenant_uid, &new.invoice_uid).await?;
        if !precondition(stored.as_ref()) {
            return Ok(Put::PreconditionFailed);
        }
        let put = write_invoice(&mut transaction, new, stored, now_ms).await?;
        transaction.commit().await?;
        Ok(put)
    }

    /// Stores many invoices in one transaction; answers in their order. One that is refused does not hinder the others.
    pub async fn put_invoices(&self, batch: &[NewInvoice], now_ms: i64) -> Result<Vec<Put>, StoreError> {
        let mut transaction = self.begin().await?;
        let mut answers = Vec::with_capacity(batch.len());
        for new in batch {
            let stored = read_invoice(&mut transaction, &new.tenant_uid, &new.invoice_uid).await?;
            answers.push(write_invoice(&mut transaction, new, stored, now_ms).await?);
        }
        transaction.commit().await?;
        Ok(answers)
    }

    /// A page of invoices, newest first by first storing, then by tenant and uid; of one tenant or of all.
    pub async fn invoices_page(
        &self,
        tenant_uid: Option<&str>,
        stripe_invoice_id: Option<&str>,
        after: Option<&InvoiceCursor>,
        limit: u32,
    ) -> Result<Vec<StoredInvoice>, StoreError> {
        let start = InvoiceCursor { stored_ms: i64::MAX, tenant_uid: String::new(), invoice_uid: String::new() };
        let after = after.unwrap_or(&start);
        let rows = sqlx::query(match tenant_uid {
            Some(_) => {
                "select * from invoices
                 where tenant_uid = $1 and ($2 is null or stripe_invoice_id = $2)
                   and (stored_ms < $3 or (stored_ms = $3 and (tenant_uid, invoice_uid) > ($4, $5)))
                 order by stored_ms desc, invoice_uid limit $6"
            }
            None => {
                "select * from invoices
                 where $1 is null and ($2 is null or stripe_invoice_id = $2)
                   and (stored_ms < $3 or (stored_ms = $3 and (tenant_uid, invoice_uid) > ($4, $5)))
                 order by stored_ms desc, tenant_uid, invoice_uid limit $6"
            }
        })
        .bind(tenant_uid)
        .bind(stripe_invoice_id)
        .bind(after.stored_ms)
        .bind(&after.tenant_uid)
        .bind(&after.invoice_uid)
        .bind(limit)
        .fetch_all(&self.read)
        .await?;
        let mut invoices = Vec::with_capacity(rows.len());
        for row in &rows {
            let mut invoice = stored_invoice(row, row.try_get("tenant_uid")?, row.try_get("invoice_uid")?)?;
            if let Some(stripe_invoice_id) = &invoice.stripe_invoice_id {
                invoice.tellings = self.tellings(stripe_invoice_id).await?;
            }
            invoices.push(invoice);
        }
        Ok(invoices)
    }

    /// Who holds these Stripe invoices: tenant, invoice, Stripe invoice.
    pub async fn holders(&self, stripe_invoice_ids: &[String]) -> Result<Vec<(String, String, String)>, StoreError> {
        let mut holders = Vec::new();
        for id in stripe_invoice_ids {
            let sql = "select tenant_uid, invoice_uid, stripe_invoice_id from invoices where stripe_invoice_id = $1";
            holders.extend(sqlx::query_as::<_, (String, String, String)>(sql).bind(id).fetch_optional(&self.read).await?);
        }
        Ok(holders)
    }
}

async fn read_invoice(
    connection: &mut SqliteConnection,
    tenant_uid: &str,
    invoice_uid: &str,
) -> Result<Option<StoredInvoice>, StoreError> {
    let rows = sqlx::query(INVOICE_AND_TELLINGS).bind(tenant_uid).bind(invoice_uid).fetch_all(connection).await?;
    let Some((first, tellings)) = rows.split_first() else { return Ok(None) };
    let mut invoice = stored_invoice(first, tenant_uid.to_owned(), invoice_uid.to_owned())?;
    invoice.tellings = tellings.iter().map(known).collect::<Result<_, _>>()?;
    Ok(Some(invoice))
}

fn stored_invoice(row: &SqliteRow, tenant_uid: String, invoice_uid: String) -> Result<StoredInvoice, StoreError> {
    Ok(StoredInvoice {
        tenant_uid,
        invoice_uid,
        stripe_invoice_id: row.try_get("stripe_invoice_id")?,
        document: row.try_get("document")?,
        imported_states: row.try_get("imported_states")?,
        stored_ms: row.try_get("stored_ms")?,
        revision: row.try_get("revision")?,
        tellings: Vec::new(),
    })
}

async fn write_invoice(
    connection: &mut SqliteConnection,
    new: &NewInvoice,
    stored: Option<StoredInvoice>,
    now_ms: i64,
) -> Result<Put, StoreError> {
    if let Some(id) = &new.stripe_invoice_id {
        let kept = stored.as_ref().and_then(|s| s.stripe_invoice_id.as_ref());
        if kept.is_some_and(|kept| kept != id) {
            return Ok(Put::StripeInvoiceFixed);
        }
        let sql = "select count(*) from invoices where stripe_invoice_id = $1 and not (tenant_uid = $2 and invoice_uid = $3)";
        let others: i64 =
            sqlx::query_scalar(sql).bind(id).bind(&new.tenant_uid).bind(&new.invoice_uid).fetch_one(&mut *connection).await?;
        if others > 0 {
            return Ok(Put::StripeInvoiceTaken);
        }
    }
    match stored {
        None => insert_invoice(connection, new, now_ms).await,
        Some(stored) => replace_invoice(connection, new, stored).await,
    }
}

async fn insert_invoice(connection: &mut SqliteConnection, new: &NewInvoice, now_ms: i64) -> Result<Put, StoreError> {
    sqlx::query(
        "insert into invoices (tenant_uid, invoice_uid, stripe_invoice_id, document, imported_states, stored_ms, revision)
         values ($1, $2, $3, $4, $5, $6, 1)",
    )
    .bind(&new.tenant_uid)
    .bind(&new.invoice_uid)
    .bind(&new.stripe_invoice_id)
    .bind(&new.document)
    .bind(&new.imported_states)
    .bind(now_ms)
    .execute(connection)
    .await?;
    Ok(Put::Created)
}

async fn replace_invoice(connection: &mut SqliteConnection, new: &NewInvoice, stored: StoredInvoice) -> Result<Put, StoreError> {
    let document = match (&new.stripe_invoice_id, &stored.stripe_invoice_id) {
        (None, Some(kept)) => with_stripe_invoice(&new.document, kept)?,
        _ => new.document.clone(),
    };
    if document != stored.document || new.stripe_invoice_id.is_some() {
        let changed = i64::from(document != stored.document);
        sqlx::query(
            "update invoices set document = $3, stripe_invoice_id = coalesce($4, stripe_invoice_id), revision = revision + $5
             where tenant_uid = $1 and invoice_uid = $2",
        )
        .bind(&new.tenant_uid)
        .bind(&new.invoice_uid)
        .bind(&document)
        .bind(&new.stripe_invoice_id)
        .bind(changed)
        .execute(connection)
        .await?;
    }
    Ok(Put::Replaced)
}

/// A document that leaves its Stripe invoice out keeps the one it has.
fn with_stripe_invoice(document: &str, id: &str) -> Result<String, StoreError> {
    let unfit = |e: &dyn std::fmt::Display| StoreError::Refused(format!("the document of an invoice cannot be read: {e}"));
    let mut document: Value = serde_json::from_str(document).map_err(|e| unfit(&e))?;
    let fields = document.as_object_mut().ok_or_else(|| unfit(&"it is no object"))?;
    match fields.entry("status").or_insert_with(|| json!({})).as_object_mut() {
        Some(status) => status.insert("stripeInvoiceId".to_owned(), id.into()),
        None => return Err(unfit(&"its status is no object")),
    };
    Ok(document.to_string())
}
