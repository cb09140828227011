//! Pages of stored invoices, limited in number and in bytes.

use super::engine::connection::{Connection, rows};
use super::invoice_reads;
use super::invoice_rows::{StoredInvoice, stored_invoice};
use super::{Store, StoreError};

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

impl Store {
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
