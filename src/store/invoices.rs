//! The stored invoices: stored, replaced, listed. How one is read together with what is told about it is in `histories`.

use std::time::Duration;

use serde_json::{Value, json};

use super::engine::connection::{Connection, execute, rows};
use super::invoice_reads::{self, Reader};
use super::{Engine, Store, StoreError, StoreErrorClass};
use crate::domain::stripe::event::EventKey;

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
    pub observations: Vec<ObservationRow>,
}

/// What an event tells, as it is kept: read when a history is folded, and not before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObservationRow {
    pub key: EventKey,
    /// A `Observation` as JSON.
    pub json: String,
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

/// What must hold for what is stored now.
pub type Precondition<'p> = dyn Fn(Option<&StoredInvoice>) -> bool + Send + Sync + 'p;

/// The last invoice of a page: the next page begins after it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvoiceCursor {
    pub stored_ms: i64,
    pub tenant_uid: String,
    pub invoice_uid: String,
}

/// How often a transaction is tried that others contend with.
const ATTEMPTS: u32 = 8;

/// What comes after a row, newest first; `$filter`: which of it, and how it is in order.
macro_rules! page {
    ($filter:literal) => {
        concat!(
            "select tenant_uid, invoice_uid, stripe_invoice_id, document, imported_states, stored_ms, revision from invoices
             where stored_ms <= $1 and (stored_ms < $1 or (tenant_uid, invoice_uid) > ($2, $3)) ",
            $filter,
            " limit $4"
        )
    };
}
const PAGE: &str = page!("order by stored_ms desc, tenant_uid, invoice_uid");
const PAGE_OF_TENANT: &str = page!("and tenant_uid = $5 order by stored_ms desc, invoice_uid");
/// One at most: in statements of their own, or engines may not see that they need not read all.
const PAGE_OF_STRIPE_INVOICE: &str = page!("and stripe_invoice_id = $5");
const PAGE_OF_TENANT_AND_STRIPE_INVOICE: &str =
    page!("and tenant_uid = $5 and stripe_invoice_id = $6");
/// Whose uid begins so. What a uid may hold ends before `$2`.
const BY_UID: &str = "
    select tenant_uid, invoice_uid, stripe_invoice_id, document, imported_states, stored_ms, revision from invoices
    where invoice_uid >= $1 and invoice_uid < $2 order by invoice_uid, tenant_uid limit $3";
const BY_UID_OF_TENANT: &str = "
    select tenant_uid, invoice_uid, stripe_invoice_id, document, imported_states, stored_ms, revision from invoices
    where tenant_uid = $4 and invoice_uid >= $1 and invoice_uid < $2 order by invoice_uid limit $3";
pub(super) type InvoiceRow = (String, String, Option<String>, String, String, i64, i64);

/// Those of a JSON array of Stripe's ids.
const HOLDERS_IN_SQLITE: &str = "
    select tenant_uid, invoice_uid, stripe_invoice_id from invoices where stripe_invoice_id in (select value from json_each($1))";
const HOLDERS_IN_POSTGRES: &str = r#"
    select tenant_uid, invoice_uid, stripe_invoice_id from jsonb_array_elements_text($1::jsonb) as ids
    cross join lateral (select * from invoices where stripe_invoice_id = ids.value collate "C" offset 0) as holder"#;
const HOLDER: &str =
    "select tenant_uid, invoice_uid, stripe_invoice_id from invoices where stripe_invoice_id = $1";
const INSERT: &str = "
    insert into invoices (tenant_uid, invoice_uid, stripe_invoice_id, document, imported_states, stored_ms, revision)
    values ($1, $2, $3, $4, $5, $6, 1)";
const NO_LONGER_AWAITED: &str = "delete from awaited where stripe_invoice_id = $1";
const UPDATE: &str = "
    update invoices set document = $3, stripe_invoice_id = coalesce($4, stripe_invoice_id), revision = revision + $5
    where tenant_uid = $1 and invoice_uid = $2";

impl Store {
    /// Stores or replaces an invoice, if `precondition` holds for what is stored now. A replacement keeps the Stripe invoice
    /// and the states that came with the first storing.
    pub async fn put_invoice(
        &self,
        new: &NewInvoice,
        now_ms: i64,
        precondition: &Precondition<'_>,
    ) -> Result<Put, StoreError> {
        let answers = self
            .put_uncontended(std::slice::from_ref(new), now_ms, precondition)
            .await?;
        Ok(answers[0])
    }

    /// Stores many invoices in one transaction; answers in their order. One that is refused does not hinder the others.
    pub async fn put_invoices(
        &self,
        batch: &[NewInvoice],
        now_ms: i64,
    ) -> Result<Vec<Put>, StoreError> {
        self.put_uncontended(batch, now_ms, &|_| true).await
    }

    /// Tries again while others are faster.
    async fn put_uncontended(
        &self,
        batch: &[NewInvoice],
        now_ms: i64,
        precondition: &Precondition<'_>,
    ) -> Result<Vec<Put>, StoreError> {
        let mut attempt = 1;
        loop {
            match self.put_once(batch, now_ms, precondition).await {
                Err(error) if error.class() == StoreErrorClass::Contended && attempt < ATTEMPTS => {
                    // Those who collided must not meet again.
                    tokio::time::sleep(Duration::from_millis(rand::random_range(0..10 << attempt)))
                        .await;
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
        precondition: &Precondition<'_>,
    ) -> Result<Vec<Put>, StoreError> {
        let mut session = self.transaction().await?;
        let mut answers = Vec::with_capacity(batch.len());
        for new in batch {
            let (stored, _) =
                invoice_reads::read(&mut session, &new.tenant_uid, &new.invoice_uid, Reader::Us)
                    .await?;
            answers.push(match precondition(stored.as_ref()) {
                true => write(&mut session, new, stored, now_ms).await?,
                false => Put::PreconditionFailed,
            });
        }
        session.commit().await?;
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
        let start = InvoiceCursor {
            stored_ms: i64::MAX,
            tenant_uid: String::new(),
            invoice_uid: String::new(),
        };
        let InvoiceCursor {
            stored_ms,
            tenant_uid: last_tenant,
            invoice_uid: last_uid,
        } = after.unwrap_or(&start);
        let limit = i64::from(limit);
        let mut session = self.session().await?;
        let found = match (tenant_uid, stripe_invoice_id) {
            (None, None) => rows!(
                session,
                fetch_all,
                InvoiceRow,
                PAGE,
                stored_ms,
                last_tenant,
                last_uid,
                limit
            ),
            (Some(tenant), None) => {
                rows!(
                    session,
                    fetch_all,
                    InvoiceRow,
                    PAGE_OF_TENANT,
                    stored_ms,
                    last_tenant,
                    last_uid,
                    limit,
                    tenant
                )
            }
            (None, Some(id)) => {
                rows!(
                    session,
                    fetch_all,
                    InvoiceRow,
                    PAGE_OF_STRIPE_INVOICE,
                    stored_ms,
                    last_tenant,
                    last_uid,
                    limit,
                    id
                )
            }
            (Some(tenant), Some(id)) => {
                let sql = PAGE_OF_TENANT_AND_STRIPE_INVOICE;
                rows!(
                    session,
                    fetch_all,
                    InvoiceRow,
                    sql,
                    stored_ms,
                    last_tenant,
                    last_uid,
                    limit,
                    tenant,
                    id
                )
            }
        }?;
        let mut invoices: Vec<StoredInvoice> = found.into_iter().map(stored_invoice).collect();
        invoice_reads::tell(&mut session, &mut invoices).await?;
        session.done().await?;
        Ok(invoices)
    }

    /// The invoices whose uid begins so, by uid, then tenant; of one tenant or of all.
    pub async fn invoices_by_uid(
        &self,
        tenant_uid: Option<&str>,
        start: &str,
        limit: u32,
    ) -> Result<Vec<StoredInvoice>, StoreError> {
        let (end, limit) = (format!("{start}{}", char::MAX), i64::from(limit));
        let mut session = self.session().await?;
        let found = match tenant_uid {
            Some(tenant) => rows!(
                session,
                fetch_all,
                InvoiceRow,
                BY_UID_OF_TENANT,
                start,
                end.as_str(),
                limit,
                tenant
            ),
            None => rows!(
                session,
                fetch_all,
                InvoiceRow,
                BY_UID,
                start,
                end.as_str(),
                limit
            ),
        }?;
        let mut invoices: Vec<StoredInvoice> = found.into_iter().map(stored_invoice).collect();
        invoice_reads::tell(&mut session, &mut invoices).await?;
        session.done().await?;
        Ok(invoices)
    }

    /// Who holds these Stripe invoices, each named once: tenant, invoice, Stripe invoice.
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
    let observations = Vec::new();
    StoredInvoice {
        tenant_uid,
        invoice_uid,
        stripe_invoice_id,
        document,
        imported_states,
        stored_ms,
        revision,
        observations,
    }
}

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
        let holder = rows!(
            session,
            fetch_optional,
            (String, String, String),
            HOLDER,
            id
        )?;
        if holder.is_some_and(|(tenant, uid, _)| (&tenant, &uid) != (tenant_uid, invoice_uid)) {
            return Ok(Put::StripeInvoiceTaken);
        }
        execute!(session, NO_LONGER_AWAITED, id)?;
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
    let is_other = document != stored.document;
    if is_other || stripe_invoice_id.is_some() {
        execute!(
            session,
            UPDATE,
            tenant_uid,
            invoice_uid,
            document.as_str(),
            stripe_invoice_id,
            i64::from(is_other)
        )?;
    }
    Ok(Put::Replaced)
}

/// A document that leaves its Stripe invoice out keeps the one it has.
fn with_stripe_invoice(document: &str, id: &str) -> Result<String, StoreError> {
    let unfit = |e: &dyn std::fmt::Display| {
        StoreError::damaged(format!("the document of an invoice cannot be read: {e}"))
    };
    let mut document: Value = serde_json::from_str(document).map_err(|e| unfit(&e))?;
    let fields = document
        .as_object_mut()
        .ok_or_else(|| unfit(&"it is no object"))?;
    match fields
        .entry("status")
        .or_insert_with(|| json!({}))
        .as_object_mut()
    {
        Some(status) => status.insert("stripeInvoiceId".to_owned(), id.into()),
        None => return Err(unfit(&"its status is no object")),
    };
    Ok(document.to_string())
}

#[cfg(test)]
mod tests {
    use sqlx::AssertSqlSafe;

    use super::*;

    #[tokio::test]
    async fn sqlite_finds_an_invoice_and_pages_of_them_by_index_however_many_there_are() {
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
            assert!(
                matches!(&plan[..], [(.., step)] if step.contains(sought)),
                "{sql}: {plan:#?}"
            );
        }
    }
}
