//! Copies everything to another database, and compares all histories at the end.
//!
//! No progress is saved: both databases are read in parallel, by primary key, and differing rows
//! are overwritten. So a killed copy is simply started again, and a later copy also applies later
//! changes and deletions: pruned payloads, rebuilt observations, revoked keys.

use std::cmp::{Ordering, Reverse};

use crate::queries::invoices::render;
use crate::store::{
    CopyPage, CopyTarget, InvoiceCursor, Row, Store, StoreError, StoredInvoice, Table, Value,
};

/// Invoices per page of the comparison of histories.
const INVOICES: u32 = 100;
/// Limit on the differing invoices that a report names.
pub const MAX_NAMED: usize = 1_000;

/// The reason why a copy stopped.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The target holds rows that a copy would overwrite, or the source is empty. The copy wrote
    /// nothing.
    #[error("{0}")]
    TargetInUse(String),
    #[error("another copy into this database has begun, or another command has written to it")]
    Superseded,
}

/// The result of a copy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CopyReport {
    pub tables: Vec<(&'static str, TableCounts)>,
    /// Number of invoices whose documents were compared.
    pub compared: u64,
    /// Number of invoices whose documents differ.
    pub differing: u64,
    /// The first [`MAX_NAMED`] differing invoices.
    pub named: Vec<Differing>,
}

/// Rows of a table by what the copy did with them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableCounts {
    /// Number of rows in the source.
    pub rows: u64,
    pub new: u64,
    pub changed: u64,
    /// Number of rows that were removed because the source no longer has them.
    pub removed: u64,
}

/// An invoice whose document differs between source and target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Differing {
    pub tenant_uid: String,
    pub invoice_uid: String,
    pub stripe_invoice_id: Option<String>,
    pub how: Mismatch,
}

/// The way in which an invoice differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mismatch {
    NotInCopy,
    OnlyInCopy,
    AnswersOtherwise,
}

/// A copy in progress.
pub struct Copying<'s> {
    source: &'s Store,
    target: &'s Store,
    run: i64,
    report: CopyReport,
}

impl<'s> Copying<'s> {
    /// Claims the target for this copy, if no row of the target is lost by it.
    ///
    /// # Errors
    /// Returns [`CopyError::TargetInUse`] with the reason.
    pub async fn begin(source: &'s Store, target: &'s Store) -> Result<Copying<'s>, CopyError> {
        let in_use = |reason: &str| Err(CopyError::TargetInUse(reason.to_owned()));
        if !source.holds_rows().await? {
            return in_use("DATABASE_URL names an empty database: is it the one to copy from?");
        }
        let id = source.copy_id(rand::random_range(1..i64::MAX)).await?;
        let run = rand::random_range(1..i64::MAX);

        match target.begin_copy(id, run).await? {
            CopyTarget::Ready => Ok(Copying {
                source,
                target,
                run,
                report: CopyReport::default(),
            }),
            CopyTarget::InUse => in_use(
                "the database to copy to is in use: a command other than copy has written to it, \
                 and a copy would overwrite those rows. Copy to an empty database",
            ),
            CopyTarget::HoldsOther(table) => in_use(&format!(
                "the database to copy to is not empty: a copy would overwrite the rows of its \
                 table {table}. Copy to an empty database"
            )),
            CopyTarget::CopyOfAnother => in_use(
                "the database to copy to holds a copy of another database, which would be lost. \
                 Copy to an empty database, or set DATABASE_URL to that other database",
            ),
        }
    }

    /// Copies all tables. `progress` receives the name of a table and the number of rows processed.
    ///
    /// # Errors
    /// Returns an error if a database is unavailable, or another process writes to the target.
    /// Copied rows stay, and the next copy continues.
    pub async fn copy_tables(
        &mut self,
        mut progress: impl FnMut(&'static str, u64),
    ) -> Result<(), CopyError> {
        for table in Table::ALL {
            let mut counts = TableCounts::default();
            let mut after: Option<Vec<Value>> = None;
            loop {
                let (source, target) = tokio::try_join!(
                    self.source.rows_after(table, after.as_deref()),
                    self.target.rows_after(table, after.as_deref())
                )?;
                let (pairs, next) = align(
                    (source.rows, source.is_last),
                    (target.rows, target.is_last),
                    |row| row.key().to_vec(),
                );
                self.apply_page(table, pairs, &mut counts).await?;
                progress(table.name, counts.rows);
                if next.is_none() {
                    break;
                }
                after = next;
            }
            self.report.tables.push((table.name, counts));
        }

        Ok(())
    }

    async fn apply_page(
        &self,
        table: Table,
        pairs: Vec<Pair<Row>>,
        counts: &mut TableCounts,
    ) -> Result<(), CopyError> {
        // Consecutive differing rows form a run, which is read and written together.
        let (mut runs, mut deleted) = (vec![Vec::new()], Vec::new());
        for pair in pairs {
            counts.rows += u64::from(pair.0.is_some());
            match pair {
                (Some(source), Some(target)) if source == target => runs.push(Vec::new()),
                (Some(source), target) => {
                    *if target.is_some() {
                        &mut counts.changed
                    } else {
                        &mut counts.new
                    } += 1;
                    let run = runs.last_mut();
                    run.expect("the list starts with one run").push(source);
                }
                (None, Some(target)) => deleted.push(target),
                (None, None) => {}
            }
        }
        counts.removed += deleted.len() as u64;

        if !deleted.is_empty() {
            self.write(table, &[], &deleted).await?;
        }

        if table.has_payload() {
            for run in runs {
                self.apply_payloads(table, &run).await?;
            }
            return Ok(());
        }
        let changed = runs.concat();
        if !changed.is_empty() {
            self.write(table, &changed, &[]).await?;
        }
        Ok(())
    }

    /// Reads rows again with their payloads and writes them, a page at a time.
    async fn apply_payloads(&self, table: Table, run: &[Row]) -> Result<(), CopyError> {
        let mut left = run;
        while let [first, .., last] | [first @ last] = left {
            let CopyPage { rows, is_last } = self
                .source
                .rows_between(table, first.key(), last.key())
                .await?;
            // The page is empty if the rows were deleted meanwhile.
            let Some(end) = rows.last().map(|row| row.key().to_vec()) else {
                break;
            };
            self.write(table, &rows, &[]).await?;
            if is_last {
                break;
            }
            left = &left[left.partition_point(|row| *row.key() <= end[..])..];
        }

        Ok(())
    }

    async fn write(&self, table: Table, rows: &[Row], deleted: &[Row]) -> Result<(), CopyError> {
        if self.target.apply(self.run, table, rows, deleted).await? {
            Ok(())
        } else {
            Err(CopyError::Superseded)
        }
    }

    /// Compares the documents of all invoices in both databases. `progress` receives the number of
    /// invoices compared.
    ///
    /// # Errors
    /// Returns an error if a database is unavailable.
    pub async fn compare(mut self, mut progress: impl FnMut(u64)) -> Result<CopyReport, CopyError> {
        let mut after: Option<InvoiceCursor> = None;
        loop {
            let read = |store: &'s Store| {
                let after = after.clone();
                async move {
                    store
                        .invoices_page(None, None, after.as_ref(), INVOICES)
                        .await
                }
            };
            let (source, target) = tokio::try_join!(read(self.source), read(self.target))?;
            let is_last = |page: &[StoredInvoice]| page.len() < INVOICES as usize;
            let is_last = [is_last(&source), is_last(&target)];

            let (pairs, next) = align((source, is_last[0]), (target, is_last[1]), newest_first);
            for differing in pairs.into_iter().map(difference) {
                self.report.compared += 1;
                if let Some(differing) = differing {
                    self.report.differing += 1;
                    self.report.named.push(differing);
                    self.report.named.truncate(MAX_NAMED);
                }
            }
            progress(self.report.compared);

            let Some((Reverse(stored_ms), tenant_uid, invoice_uid)) = next else {
                return Ok(self.report);
            };
            after = Some(InvoiceCursor {
                stored_ms,
                tenant_uid,
                invoice_uid,
            });
        }
    }
}

/// The order in which pages of invoices are read.
type InvoiceOrder = (Reverse<i64>, String, String);

fn newest_first(invoice: &StoredInvoice) -> InvoiceOrder {
    (
        Reverse(invoice.stored_ms),
        invoice.tenant_uid.clone(),
        invoice.invoice_uid.clone(),
    )
}

/// Compares the documents of a pair. Returns `None` if they are the same.
fn difference(pair: Pair<StoredInvoice>) -> Option<Differing> {
    let (invoice, how) = match pair {
        (Some(source), Some(target)) if document(&source) == document(&target) => return None,
        (Some(source), Some(_)) => (source, Mismatch::AnswersOtherwise),
        (Some(source), None) => (source, Mismatch::NotInCopy),
        (None, Some(target)) => (target, Mismatch::OnlyInCopy),
        (None, None) => return None,
    };

    Some(Differing {
        tenant_uid: invoice.tenant_uid,
        invoice_uid: invoice.invoice_uid,
        stripe_invoice_id: invoice.stripe_invoice_id,
        how,
    })
}

/// Returns the document that HTTP returns. A damaged invoice must have the same damage in the copy,
/// so the error counts as its document.
fn document(invoice: &StoredInvoice) -> Result<String, String> {
    render(invoice)
        .map(|document| document.to_string())
        .map_err(|error| error.to_string())
}

/// The rows of source and target under one key.
type Pair<T> = (Option<T>, Option<T>);

/// Pairs two pages of the same order by key, up to the end of the shorter page. A page consists of
/// its rows and a flag, which is `true` for the last page. Also returns the key after which to
/// continue, or `None` if both pages are the last.
fn align<T, K: Ord>(
    source: (Vec<T>, bool),
    target: (Vec<T>, bool),
    key: impl Fn(&T) -> K,
) -> (Vec<Pair<T>>, Option<K>) {
    let reach = |(rows, is_last): &(Vec<T>, bool)| {
        if *is_last {
            None
        } else {
            rows.last().map(&key)
        }
    };
    let end = [reach(&source), reach(&target)].into_iter().flatten().min();
    let is_within = |row: &T| end.as_ref().is_none_or(|end| key(row) <= *end);
    let (mut source, mut target) = (
        source.0.into_iter().peekable(),
        target.0.into_iter().peekable(),
    );

    let mut pairs = Vec::new();
    loop {
        let (left, right) = (
            source.peek().filter(|row| is_within(row)),
            target.peek().filter(|row| is_within(row)),
        );
        let order = match (left, right) {
            (None, None) => return (pairs, end),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some(left), Some(right)) => key(left).cmp(&key(right)),
        };
        pairs.push(match order {
            Ordering::Less => (source.next(), None),
            Ordering::Equal => (source.next(), target.next()),
            Ordering::Greater => (None, target.next()),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::align;

    #[test]
    fn pages_align_up_to_end_of_shorter_page() {
        let aligned = |here: (&[i32], bool), there: (&[i32], bool)| {
            align(
                (here.0.to_vec(), here.1),
                (there.0.to_vec(), there.1),
                |n| *n,
            )
        };
        let (pairs, next) = aligned((&[1, 2, 4], false), (&[2, 3, 5], true));
        assert_eq!(
            (pairs, next),
            (
                vec![
                    (Some(1), None),
                    (Some(2), Some(2)),
                    (None, Some(3)),
                    (Some(4), None)
                ],
                Some(4)
            )
        );
        let (pairs, next) = aligned((&[1, 2], false), (&[1, 3, 4], false));
        assert_eq!(
            (pairs, next),
            (vec![(Some(1), Some(1)), (Some(2), None)], Some(2))
        );
        let (pairs, next) = aligned((&[7], true), (&[], true));
        assert_eq!((pairs, next), (vec![(Some(7), None)], None));

        assert_eq!(aligned((&[], true), (&[], true)), (vec![], None));
    }
}
