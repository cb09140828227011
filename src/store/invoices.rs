//! Stores, replaces and lists invoice documents.
//!
//! `invoice_reads` reads an invoice together with its observations.

use std::time::Duration;

use serde_json::{Value, json};

use super::engine::connection::{Connection, execute, rows};
use super::invoice_reads::{self, Reader};
use super::{Engine, Store, StoreError, StoreErrorKind};
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

/// The position of an invoice in the list: the next page begins after it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvoiceCursor {
    pub stored_ms: i64,
    pub tenant_uid: String,
    pub invoice_uid: String,
}

/// Invoices without their observations, limited in number and in bytes.
#[derive(Clone, Debug)]
pub struct InvoicePage {
    pub invoices: Vec<StoredInvoice>,
    /// `true` if more invoices may follow.
    pub has_more: bool,
}

/// Attempts to run a transaction that conflicts with others.
const ATTEMPTS: u32 = 8;

/// Selects the rows that `$rows` finds, in this order, up to the document that reaches `$bytes`, at
/// least one. `octet_length` reads the length without the document.
macro_rules! documents {
    ($rows:expr, $order:literal, $bytes:literal) => {
        concat!(
            "with page as (
                 select tenant_uid, invoice_uid, stored_ms, octet_length(document) as bytes from invoices ",
            $rows,
            "), counted as (
                 select tenant_uid as tenant, invoice_uid as invoice, count(*) over () as found,
                        sum(bytes) over (order by ",
            $order,
            ") - bytes as bytes_before from page
             )
             select found, tenant_uid, invoice_uid, stripe_invoice_id, document, imported_states, stored_ms, revision
             from counted cross join invoices
             where tenant_uid = tenant and invoice_uid = invoice and bytes_before < ",
            $bytes,
            " order by ",
            $order
        )
    };
}
/// Selects the invoices after a position, newest first.
macro_rules! page {
    ($filter:literal) => {
        documents!(
            concat!(
                "where stored_ms <= $1 and (stored_ms < $1 or (tenant_uid, invoice_uid) > ($2, $3)) ",
                $filter,
                " limit $4"
            ),
            "stored_ms desc, tenant_uid, invoice_uid",
            "$5"
        )
    };
}
const PAGE: &str = page!("order by stored_ms desc, tenant_uid, invoice_uid");
const PAGE_OF_TENANT: &str = page!("and tenant_uid = $6 order by stored_ms desc, invoice_uid");
/// Selects at most one row. It is a separate statement, because planners may otherwise read all
/// invoices.
const PAGE_OF_STRIPE_INVOICE: &str = page!("and stripe_invoice_id = $6");
/// Finds the invoice in the index alone, and reads its row only if it belongs to the tenant, so
/// reading another tenant's invoice takes no longer than reading a missing one.
const PAGE_OF_TENANT_AND_STRIPE_INVOICE: &str = page!(
    "and tenant_uid = $6 and invoice_uid =
         (select invoice_uid from invoices where stripe_invoice_id = $7 and tenant_uid = $6)"
);
const BY_NAME: &str = "
    select tenant_uid, invoice_uid, stripe_invoice_id, document, imported_states, stored_ms, revision
    from invoices where tenant_uid = $1 and invoice_uid = $2";
/// Prefix search: `$2` is an upper bound above every uid that starts with `$1`.
const BY_UID: &str = documents!(
    "where invoice_uid >= $1 and invoice_uid < $2 order by invoice_uid, tenant_uid limit $3",
    "invoice_uid, tenant_uid",
    "$4"
);
const BY_UID_OF_TENANT: &str = documents!(
    "where tenant_uid = $5 and invoice_uid >= $1 and invoice_uid < $2 order by invoice_uid limit $3",
    "invoice_uid, tenant_uid",
    "$4"
);
pub(super) type InvoiceRow = (String, String, Option<String>, String, String, i64, i64);
/// Number of rows found before the byte limit applied, followed by an [`InvoiceRow`].
type PageRow = (
    i64,
    String,
    String,
    Option<String>,
    String,
    String,
    i64,
    i64,
);

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

    /// Returns a page of invoices with their observations, newest first by the time they were first
    /// stored, then by tenant and uid, for one tenant or for all.
    ///
    /// Documents and observations are unlimited in bytes: callers that answer a request use
    /// [`Store::documents_page`] and [`Store::add_observations`].
    pub async fn invoices_page(
        &self,
        tenant_uid: Option<&str>,
        stripe_invoice_id: Option<&str>,
        after: Option<&InvoiceCursor>,
        limit: u32,
    ) -> Result<Vec<StoredInvoice>, StoreError> {
        let mut session = self.session().await?;
        let filter = (tenant_uid, stripe_invoice_id);
        let mut page = documents_page(&mut session, filter, after, limit, i64::MAX).await?;
        invoice_reads::add_observations(&mut session, &mut page.invoices).await?;
        session.done().await?;
        Ok(page.invoices)
    }

    /// Returns a page of invoices without their observations, in the order of
    /// [`Store::invoices_page`]. The page ends with the document that reaches `max_bytes`.
    pub async fn documents_page(
        &self,
        tenant_uid: Option<&str>,
        stripe_invoice_id: Option<&str>,
        after: Option<&InvoiceCursor>,
        limit: u32,
        max_bytes: usize,
    ) -> Result<InvoicePage, StoreError> {
        let mut session = self.session().await?;
        let filter = (tenant_uid, stripe_invoice_id);
        let page = documents_page(&mut session, filter, after, limit, as_bound(max_bytes)).await?;
        session.done().await?;
        Ok(page)
    }

    /// Returns the invoices whose uid starts with `start`, by uid, then tenant, without their
    /// observations, for one tenant or for all. The page ends with the document that reaches
    /// `max_bytes`.
    pub async fn documents_by_uid(
        &self,
        tenant_uid: Option<&str>,
        start: &str,
        limit: u32,
        max_bytes: usize,
    ) -> Result<InvoicePage, StoreError> {
        let end = format!("{start}{}", char::MAX);
        let (rows_limit, bytes) = (i64::from(limit), as_bound(max_bytes));
        let mut session = self.session().await?;
        let found = match tenant_uid {
            Some(tenant) => {
                let sql = BY_UID_OF_TENANT;
                rows!(
                    session,
                    fetch_all,
                    PageRow,
                    sql,
                    start,
                    end.as_str(),
                    rows_limit,
                    bytes,
                    tenant
                )
            }
            None => rows!(
                session,
                fetch_all,
                PageRow,
                BY_UID,
                start,
                end.as_str(),
                rows_limit,
                bytes
            ),
        }?;
        session.done().await?;

        Ok(invoice_page(found, limit))
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

fn as_bound(bytes: usize) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

async fn documents_page(
    session: &mut Connection,
    filter: (Option<&str>, Option<&str>),
    after: Option<&InvoiceCursor>,
    limit: u32,
    bytes: i64,
) -> Result<InvoicePage, StoreError> {
    let (stored_ms, tenant, uid) = match after {
        Some(after) => (after.stored_ms, &*after.tenant_uid, &*after.invoice_uid),
        None => (i64::MAX, "", ""),
    };
    let rows = i64::from(limit);

    let found = match filter {
        (None, None) => {
            rows!(
                session, fetch_all, PageRow, PAGE, stored_ms, tenant, uid, rows, bytes
            )
        }
        (Some(of), None) => {
            let sql = PAGE_OF_TENANT;
            rows!(
                session, fetch_all, PageRow, sql, stored_ms, tenant, uid, rows, bytes, of
            )
        }
        (None, Some(id)) => {
            let sql = PAGE_OF_STRIPE_INVOICE;
            rows!(
                session, fetch_all, PageRow, sql, stored_ms, tenant, uid, rows, bytes, id
            )
        }
        (Some(of), Some(id)) => {
            let sql = PAGE_OF_TENANT_AND_STRIPE_INVOICE;
            rows!(
                session, fetch_all, PageRow, sql, stored_ms, tenant, uid, rows, bytes, of, id
            )
        }
    }?;
    Ok(invoice_page(found, limit))
}

fn invoice_page(rows: Vec<PageRow>, limit: u32) -> InvoicePage {
    let found = rows.first().map_or(0, |(found, ..)| *found);
    let is_cut = found > rows.len() as i64;
    let invoices = rows
        .into_iter()
        .map(|(_, a, b, c, d, e, f, g)| stored_invoice((a, b, c, d, e, f, g)));
    InvoicePage {
        invoices: invoices.collect(),
        has_more: is_cut || found == i64::from(limit),
    }
}

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

#[cfg(test)]
mod tests {
    use sqlx::AssertSqlSafe;

    use super::*;

    #[tokio::test]
    async fn sqlite_pages_invoices_by_index() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::connect(&format!("sqlite://{}/test.db", folder.path().display()))
            .await
            .unwrap();
        store.migrate().await.unwrap();
        let mut session = store.session().await.unwrap();
        let by_stripe_id = "stripe_invoice_id=?";

        for (sql, sought) in [
            (PAGE, "invoices_by_storing (stored_ms<?)"),
            (
                PAGE_OF_TENANT,
                "invoices_of_tenant_by_storing (tenant_uid=? AND stored_ms<?)",
            ),
            (PAGE_OF_STRIPE_INVOICE, by_stripe_id),
            (PAGE_OF_TENANT_AND_STRIPE_INVOICE, by_stripe_id),
            (BY_UID, "invoice_uid>? AND invoice_uid<?"),
            (
                BY_UID_OF_TENANT,
                "tenant_uid=? AND invoice_uid>? AND invoice_uid<?",
            ),
        ] {
            let plan = rows!(
                session,
                fetch_all,
                (i64, i64, i64, String),
                AssertSqlSafe(format!("explain query plan {sql}"))
            )
            .unwrap();
            let steps: Vec<&str> = plan.iter().map(|(.., step)| &**step).collect();
            assert!(
                steps.iter().any(|step| step.contains(sought))
                    && !steps.contains(&"SCAN invoices")
                    && steps.contains(
                        &"SEARCH invoices USING PRIMARY KEY (tenant_uid=? AND invoice_uid=?)"
                    ),
                "{sql}: {steps:#?}"
            );
        }
    }
}
