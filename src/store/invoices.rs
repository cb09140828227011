//! The stored invoices, each read together with all that is told about it.

use std::collections::HashMap;
use std::time::Duration;

use serde_json::{Value, json};

use super::events::{TellingRow, known};
use super::session::{Connection, Session, execute, rows};
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

/// What is told of an invoice: what mentions it, or an object (other than an invoice) that is named together with one that was
/// reached, over any number of hops. More than belongs to the invoice may be among it.
///
/// The invoice comes in a row of its own, then a row for each telling: one statement, one snapshot of the database.
macro_rules! invoice_and_tellings {
    ($linked:literal) => {
        concat!(
            "with recursive
             this as (select * from invoices where tenant_uid = $1 and invoice_uid = $2),
             reached (object_id) as (
                 select stripe_invoice_id from this where stripe_invoice_id is not null
                 union
                 select link.value from reached join mentions on mentions.object_id = reached.object_id
                 join events on events.key = mentions.event_key cross join ",
            $linked,
            " as link
             )
             select stripe_invoice_id, document, imported_states, stored_ms, revision, null as key, null as telling from this
             union all
             select null, null, null, null, null, key, telling from events
             where telling is not null and key in (select event_key from mentions join reached using (object_id))"
        )
    };
}
type InvoiceOrTellingRow =
    (Option<String>, Option<String>, Option<String>, Option<i64>, Option<i64>, Option<Vec<u8>>, Option<String>);

const PAGE: &str = "
    select tenant_uid, invoice_uid, stripe_invoice_id, document, imported_states, stored_ms, revision from invoices
    where ($1 is null or stripe_invoice_id = $1)
      and (stored_ms < $2 or (stored_ms = $2 and (tenant_uid, invoice_uid) > ($3, $4)))
    order by stored_ms desc, tenant_uid, invoice_uid limit $5";
const PAGE_OF_TENANT: &str = "
    select tenant_uid, invoice_uid, stripe_invoice_id, document, imported_states, stored_ms, revision from invoices
    where ($1 is null or stripe_invoice_id = $1)
      and (stored_ms < $2 or (stored_ms = $2 and (tenant_uid, invoice_uid) > ($3, $4))) and tenant_uid = $6
    order by stored_ms desc, invoice_uid limit $5";
type InvoiceRow = (String, String, Option<String>, String, String, i64, i64);

/// The same for several Stripe invoices: `$1` is a JSON array of their ids.
macro_rules! tellings_of_each {
    ($ids:literal, $linked:literal) => {
        concat!(
            "with recursive reached (root, object_id) as (
                 select ids.value, ids.value from ",
            $ids,
            " as ids
                 union
                 select reached.root, link.value from reached join mentions on mentions.object_id = reached.object_id
                 join events on events.key = mentions.event_key cross join ",
            $linked,
            " as link
             ), told (root, event_key) as (select distinct root, event_key from mentions join reached using (object_id))
             select root, key, telling from told join events on key = event_key where telling is not null"
        )
    };
}

/// The statements that take JSON apart, which each engine does in its own words.
struct Words {
    invoice_and_tellings: &'static str,
    tellings_of_each: &'static str,
}

const SQLITE: Words = Words {
    invoice_and_tellings: invoice_and_tellings!("json_each(events.linked)"),
    tellings_of_each: tellings_of_each!("json_each($1)", "json_each(events.linked)"),
};
const POSTGRES: Words = Words {
    invoice_and_tellings: invoice_and_tellings!(
        r#"lateral (select value collate "C" from jsonb_array_elements_text(events.linked::jsonb))"#
    ),
    tellings_of_each: tellings_of_each!(
        r#"(select value collate "C" from jsonb_array_elements_text($1::jsonb))"#,
        r#"lateral (select value collate "C" from jsonb_array_elements_text(events.linked::jsonb))"#
    ),
};

impl Words {
    fn of(session: &Session) -> &'static Words {
        match session.connection {
            Connection::Sqlite(_) => &SQLITE,
            Connection::Postgres(_) => &POSTGRES,
        }
    }
}

const HOLDER: &str = "select tenant_uid, invoice_uid, stripe_invoice_id from invoices where stripe_invoice_id = $1";
const INSERT: &str = "
    insert into invoices (tenant_uid, invoice_uid, stripe_invoice_id, document, imported_states, stored_ms, revision)
    values ($1, $2, $3, $4, $5, $6, 1)";
const UPDATE: &str = "
    update invoices set document = $3, stripe_invoice_id = coalesce($4, stripe_invoice_id), revision = revision + $5
    where tenant_uid = $1 and invoice_uid = $2";

impl Store {
    /// The invoice and what is told about it.
    pub async fn invoice(&self, tenant_uid: &str, invoice_uid: &str) -> Result<Option<StoredInvoice>, StoreError> {
        let mut session = self.session().await?;
        let invoice = read(&mut session, tenant_uid, invoice_uid).await?;
        session.done().await?;
        Ok(invoice)
    }

    /// Stores or replaces an invoice, if `precondition` holds for what is stored now. A replacement keeps the Stripe invoice
    /// and the states that came with the first storing.
    pub async fn put_invoice(&self, new: &NewInvoice, now_ms: i64, precondition: &Precondition<'_>) -> Result<Put, StoreError> {
        let answers = self.put_uncontended(std::slice::from_ref(new), now_ms, precondition).await?;
        Ok(answers[0])
    }

    /// Stores many invoices in one transaction; answers in their order. One that is refused does not hinder the others.
    pub async fn put_invoices(&self, batch: &[NewInvoice], now_ms: i64) -> Result<Vec<Put>, StoreError> {
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
                Err(StoreError::Contended(_)) if attempt < ATTEMPTS => {
                    // Those who collided must not meet again.
                    tokio::time::sleep(Duration::from_millis(rand::random_range(0..10 << attempt))).await;
                    attempt += 1;
                }
                ended => return ended,
            }
        }
    }

    async fn put_once(&self, batch: &[NewInvoice], now_ms: i64, precondition: &Precondition<'_>) -> Result<Vec<Put>, StoreError> {
        let mut session = self.transaction().await?;
        let mut answers = Vec::with_capacity(batch.len());
        for new in batch {
            let stored = read(&mut session, &new.tenant_uid, &new.invoice_uid).await?;
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
        let start = InvoiceCursor { stored_ms: i64::MAX, tenant_uid: String::new(), invoice_uid: String::new() };
        let InvoiceCursor { stored_ms, tenant_uid: last_tenant, invoice_uid: last_uid } = after.unwrap_or(&start);
        let limit = i64::from(limit);
        let mut session = self.session().await?;
        let found = match tenant_uid {
            Some(tenant) => {
                rows!(
                    session,
                    fetch_all,
                    InvoiceRow,
                    PAGE_OF_TENANT,
                    stripe_invoice_id,
                    stored_ms,
                    last_tenant,
                    last_uid,
                    limit,
                    tenant
                )
            }
            None => rows!(session, fetch_all, InvoiceRow, PAGE, stripe_invoice_id, stored_ms, last_tenant, last_uid, limit),
        }?;
        let mut invoices: Vec<StoredInvoice> = found.into_iter().map(stored_invoice).collect();
        let ids: Vec<&String> = invoices.iter().filter_map(|invoice| invoice.stripe_invoice_id.as_ref()).collect();
        let ids = serde_json::to_string(&ids).expect("strings always serialise");
        let sql = Words::of(&session).tellings_of_each;
        let told = rows!(session, fetch_all, (String, Vec<u8>, String), sql, ids)?;
        session.done().await?;
        let mut tellings: HashMap<String, Vec<Known>> = HashMap::new();
        for (stripe_invoice_id, key, telling) in told {
            tellings.entry(stripe_invoice_id).or_default().push(known((key, telling))?);
        }
        for invoice in &mut invoices {
            invoice.tellings = invoice.stripe_invoice_id.as_ref().and_then(|id| tellings.remove(id)).unwrap_or_default();
        }
        Ok(invoices)
    }

    /// Who holds these Stripe invoices: tenant, invoice, Stripe invoice.
    pub async fn holders(&self, stripe_invoice_ids: &[String]) -> Result<Vec<(String, String, String)>, StoreError> {
        let mut holders = Vec::new();
        let mut session = self.session().await?;
        for id in stripe_invoice_ids {
            holders.extend(rows!(session, fetch_optional, (String, String, String), HOLDER, id)?);
        }
        session.done().await?;
        Ok(holders)
    }
}

async fn read(session: &mut Session, tenant_uid: &str, invoice_uid: &str) -> Result<Option<StoredInvoice>, StoreError> {
    let sql = Words::of(session).invoice_and_tellings;
    let found = rows!(session, fetch_all, InvoiceOrTellingRow, sql, tenant_uid, invoice_uid)?;
    let mut invoice = None;
    let mut tellings: Vec<Known> = Vec::with_capacity(found.len());
    for row in found {
        match row {
            (stripe_invoice_id, Some(document), Some(imported_states), Some(stored_ms), Some(revision), ..) => {
                let (tenant_uid, invoice_uid) = (tenant_uid.to_owned(), invoice_uid.to_owned());
                let row = (tenant_uid, invoice_uid, stripe_invoice_id, document, imported_states, stored_ms, revision);
                invoice = Some(stored_invoice(row));
            }
            (.., Some(key), Some(telling)) => tellings.push(known((key, telling) as TellingRow)?),
            _ => return Err(StoreError::Refused("an invoice came without its document".to_owned())),
        }
    }
    Ok(invoice.map(|invoice| StoredInvoice { tellings, ..invoice }))
}

fn stored_invoice(row: InvoiceRow) -> StoredInvoice {
    let (tenant_uid, invoice_uid, stripe_invoice_id, document, imported_states, stored_ms, revision) = row;
    let tellings = Vec::new();
    StoredInvoice { tenant_uid, invoice_uid, stripe_invoice_id, document, imported_states, stored_ms, revision, tellings }
}

async fn write(session: &mut Session, new: &NewInvoice, stored: Option<StoredInvoice>, now_ms: i64) -> Result<Put, StoreError> {
    let NewInvoice { tenant_uid, invoice_uid, stripe_invoice_id, document, imported_states } = new;
    if let Some(id) = stripe_invoice_id {
        let kept = stored.as_ref().and_then(|s| s.stripe_invoice_id.as_ref());
        if kept.is_some_and(|kept| kept != id) {
            return Ok(Put::StripeInvoiceFixed);
        }
        let holder = rows!(session, fetch_optional, (String, String, String), HOLDER, id)?;
        if holder.is_some_and(|(tenant, uid, _)| (&tenant, &uid) != (tenant_uid, invoice_uid)) {
            return Ok(Put::StripeInvoiceTaken);
        }
    }
    let Some(stored) = stored else {
        execute!(session, INSERT, tenant_uid, invoice_uid, stripe_invoice_id, document, imported_states, now_ms)?;
        return Ok(Put::Created);
    };
    let document = match (stripe_invoice_id, &stored.stripe_invoice_id) {
        (None, Some(kept)) => with_stripe_invoice(document, kept)?,
        _ => document.clone(),
    };
    let is_other = document != stored.document;
    if is_other || stripe_invoice_id.is_some() {
        execute!(session, UPDATE, tenant_uid, invoice_uid, document, stripe_invoice_id, i64::from(is_other))?;
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
