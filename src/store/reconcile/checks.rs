//! Comparisons of stored invoices with Stripe's: their times and results, and when each is due
//! again.

use crate::store::engine::connection::{execute, rows};
use crate::store::{Store, StoreError};

/// The last comparison of a stored invoice with Stripe's. Times in Unix milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Comparison {
    /// Next comparison. `None` for a settled invoice, which is only compared as part of a sample.
    pub check_due_ms: Option<i64>,
    /// Time when Stripe's API last agreed.
    pub confirmed_ms: Option<i64>,
    pub differs_since_ms: Option<i64>,
}

/// A stored invoice that can be compared with Stripe's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckCandidate {
    pub tenant_uid: String,
    pub invoice_uid: String,
    pub stripe_invoice_id: String,
    /// Unix milliseconds; `None` if it does not differ.
    pub differs_since_ms: Option<i64>,
}

/// Result of comparing one invoice. Times in Unix milliseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckResult {
    pub stripe_invoice_id: String,
    pub checked_ms: i64,
    /// Next comparison. `None` for a settled invoice.
    pub check_due_ms: Option<i64>,
    pub differs_since_ms: Option<i64>,
    pub agrees: bool,
}

const AFTER: &str = "
    select tenant_uid, invoice_uid, stripe_invoice_id, differs_since_ms from invoices
    where stripe_invoice_id > $1 order by stripe_invoice_id limit $2";
const DUE: &str = "
    select tenant_uid, invoice_uid, stripe_invoice_id, differs_since_ms from invoices
    where check_due_ms is not null and check_due_ms <= $1 and stripe_invoice_id is not null
        and stored_ms <= $3
    order by check_due_ms limit $2";
pub(super) const COUNT_DUE: &str = "
    select count(*) from (
        select 1 from invoices
        where check_due_ms is not null and check_due_ms <= $1 and stripe_invoice_id is not null
        limit $2
    ) as counted";
const SAMPLE: &str = "
    select tenant_uid, invoice_uid, stripe_invoice_id, differs_since_ms from invoices
    where check_due_ms is null and stripe_invoice_id is not null and checked_ms <= $1
    order by checked_ms limit $2";
const BY_STRIPE_INVOICE: &str = "
    select tenant_uid, invoice_uid, stripe_invoice_id, differs_since_ms from invoices
    where stripe_invoice_id = $1";
const COMPARISON: &str = "
    select check_due_ms, confirmed_ms, differs_since_ms from invoices
    where tenant_uid = $1 and invoice_uid = $2";
const SAVE_RESULT: &str = "
    update invoices set checked_ms = $2, check_due_ms = $3, differs_since_ms = $4,
                        confirmed_ms = case when $5 then $2 else confirmed_ms end
    where stripe_invoice_id = $1";

/// Columns of a check: due, confirmed, differs since.
type ComparisonRow = (Option<i64>, Option<i64>, Option<i64>);
/// Columns of an invoice to compare: tenant, invoice, Stripe invoice, differs since.
type CandidateRow = (String, String, String, Option<i64>);

impl Store {
    /// Returns a page of the invoices that name a Stripe invoice, ordered by its id, after this id.
    pub async fn check_candidates_after(
        &self,
        after: &str,
        limit: u32,
    ) -> Result<Vec<CheckCandidate>, StoreError> {
        let mut session = self.session().await?;
        let found = rows!(
            session,
            fetch_all,
            CandidateRow,
            AFTER,
            after,
            i64::from(limit)
        )?;
        session.done().await?;

        Ok(found.into_iter().map(candidate).collect())
    }

    /// Returns unsettled invoices that are due to be compared, the longest due first. Leaves out
    /// those stored later than `stored_before_ms`.
    pub async fn due_check_candidates(
        &self,
        now_ms: i64,
        stored_before_ms: i64,
        limit: u32,
    ) -> Result<Vec<CheckCandidate>, StoreError> {
        let mut session = self.session().await?;
        let found = rows!(
            session,
            fetch_all,
            CandidateRow,
            DUE,
            now_ms,
            i64::from(limit),
            stored_before_ms
        )?;
        session.done().await?;

        Ok(found.into_iter().map(candidate).collect())
    }

    /// Returns settled invoices that were last compared before this time, the longest ago first.
    pub async fn sampled_check_candidates(
        &self,
        before_ms: i64,
        limit: u32,
    ) -> Result<Vec<CheckCandidate>, StoreError> {
        let mut session = self.session().await?;
        let found = rows!(
            session,
            fetch_all,
            CandidateRow,
            SAMPLE,
            before_ms,
            i64::from(limit)
        )?;
        session.done().await?;

        Ok(found.into_iter().map(candidate).collect())
    }

    /// Returns the invoices that name these Stripe invoices.
    pub async fn check_candidates(
        &self,
        stripe_invoice_ids: &[&str],
    ) -> Result<Vec<CheckCandidate>, StoreError> {
        let mut found = Vec::new();
        let mut session = self.session().await?;
        for &id in stripe_invoice_ids {
            found.extend(rows!(
                session,
                fetch_optional,
                CandidateRow,
                BY_STRIPE_INVOICE,
                id
            )?);
        }
        session.done().await?;

        Ok(found.into_iter().map(candidate).collect())
    }

    /// Returns the last comparison of an invoice. Returns `None` for an unknown invoice.
    pub async fn comparison(
        &self,
        tenant_uid: &str,
        invoice_uid: &str,
    ) -> Result<Option<Comparison>, StoreError> {
        let mut session = self.session().await?;
        let found = rows!(
            session,
            fetch_optional,
            ComparisonRow,
            COMPARISON,
            tenant_uid,
            invoice_uid
        )?;
        session.done().await?;

        Ok(found.map(
            |(check_due_ms, confirmed_ms, differs_since_ms)| Comparison {
                check_due_ms,
                confirmed_ms,
                differs_since_ms,
            },
        ))
    }

    /// Saves the results of comparing these invoices.
    pub async fn save_check_results(&self, results: &[CheckResult]) -> Result<(), StoreError> {
        let mut session = self.writing().await?;
        for result in results {
            execute!(
                session,
                SAVE_RESULT,
                &result.stripe_invoice_id,
                result.checked_ms,
                result.check_due_ms,
                result.differs_since_ms,
                result.agrees
            )?;
        }

        session.commit().await
    }
}

fn candidate(
    (tenant_uid, invoice_uid, stripe_invoice_id, differs_since_ms): CandidateRow,
) -> CheckCandidate {
    CheckCandidate {
        tenant_uid,
        invoice_uid,
        stripe_invoice_id,
        differs_since_ms,
    }
}
