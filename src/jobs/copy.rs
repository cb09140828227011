//! Carries everything to another database, and compares all histories at the end.
//!
//! No note is kept of how far it has come: both databases are read side by side, by primary key, and what differs is written
//! over. So a run that was killed is simply begun again, and a later run also carries what has changed or gone since: payloads
//! that were forgotten, readings that were rebuilt, keys that were revoked.

use crate::queries::invoices::render;
use crate::store::{
    CopyPage, CopyTarget, InvoiceCursor, Row, Store, StoreError, StoredInvoice, Table, Value,
};

/// Invoices whose histories are read at a time.
const INVOICES: u32 = 100;
/// Differing invoices that are named in a report.
pub const NAMED: usize = 1_000;

#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Nothing was written.
    #[error("{0}")]
    Refused(String),
    #[error(
        "another copy into this database has begun, or a command that writes to it: this one stops"
    )]
    Superseded,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CopyReport {
    pub tables: Vec<(&'static str, Carried)>,
    /// Invoices whose answers were compared.
    pub compared: u64,
    /// Those whose answers are not the same; named up to [`NAMED`].
    pub differing: u64,
    pub named: Vec<Differing>,
}

/// What became of the rows of a table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Carried {
    /// That the source holds.
    pub rows: u64,
    pub new: u64,
    pub changed: u64,
    /// The source no longer holds them.
    pub removed: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Differing {
    pub tenant_uid: String,
    pub invoice_uid: String,
    pub stripe_invoice_id: Option<String>,
    pub how: Mismatch,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mismatch {
    NotInCopy,
    OnlyInCopy,
    AnswersOtherwise,
}

/// A copy under way.
pub struct Copying<'s> {
    source: &'s Store,
    target: &'s Store,
    run: i64,
    report: CopyReport,
}

impl<'s> Copying<'s> {
    /// Makes the target a copy of the source, if nothing is lost by it.
    ///
    /// # Errors
    /// [`CopyError::Refused`] says why not.
    pub async fn begin(source: &'s Store, target: &'s Store) -> Result<Copying<'s>, CopyError> {
        let refused = |reason: &str| Err(CopyError::Refused(reason.to_owned()));
        if !source.holds_rows().await? {
            return refused(
                "DATABASE_URL names a database that holds nothing: is it the one to copy from?",
            );
        }
        let (id, run) = (
            source.copy_id(rand::random_range(1..i64::MAX)).await?,
            rand::random_range(1..i64::MAX),
        );
        match target.begin_copy(id, run).await? {
            CopyTarget::Ready => Ok(Copying {
                source,
                target,
                run,
                report: CopyReport::default(),
            }),
            CopyTarget::InUse => refused(
                "the database to copy to is in use: a command other than copy has written to it, and what it wrote would be lost. \
                 Copy to an empty database",
            ),
            CopyTarget::HoldsOther(table) => refused(&format!(
                "the database to copy to is not empty: its table {table} holds rows that no copy brought, and they would be lost. \
                 Copy to an empty database"
            )),
            CopyTarget::CopyOfAnother => refused(
                "the database to copy to holds a copy of another database, which would be lost. Copy to an empty database, or give \
                 the DATABASE_URL that it is a copy of",
            ),
        }
    }

    /// Carries all tables. `progress` gets the name of a table, and how many of its rows are done.
    ///
    /// # Errors
    /// A database cannot be reached, or another process writes to the target: what was carried stays, and the next run goes on.
    pub async fn carry(
        &mut self,
        mut progress: impl FnMut(&'static str, u64),
    ) -> Result<(), CopyError> {
        for table in Table::ALL {
            let mut carried = Carried::default();
            let mut after: Option<Vec<Value>> = None;
            loop {
                let (here, there) = tokio::try_join!(
                    self.source.rows_after(table, after.as_deref()),
                    self.target.rows_after(table, after.as_deref())
                )?;
                let (pairs, next) = side_by_side(
                    (here.rows, here.is_last),
                    (there.rows, there.is_last),
                    |row| row.key().to_vec(),
                );
                self.carry_page(table, pairs, &mut carried).await?;
                progress(table.name, carried.rows);
                if next.is_none() {
                    break;
                }
                after = next;
            }
            self.report.tables.push((table.name, carried));
        }
        Ok(())
    }

    async fn carry_page(
        &self,
        table: Table,
        pairs: Vec<Pair<Row>>,
        carried: &mut Carried,
    ) -> Result<(), CopyError> {
        // Rows that follow one another are read and written together.
        let (mut stretches, mut gone) = (vec![Vec::new()], Vec::new());
        for pair in pairs {
            carried.rows += u64::from(pair.0.is_some());
            match pair {
                (Some(here), Some(there)) if here == there => stretches.push(Vec::new()),
                (Some(here), there) => {
                    *(if there.is_some() {
                        &mut carried.changed
                    } else {
                        &mut carried.new
                    }) += 1;
                    stretches
                        .last_mut()
                        .expect("there is one from the start")
                        .push(here);
                }
                (None, Some(there)) => gone.push(there),
                (None, None) => {}
            }
        }
        carried.removed += gone.len() as u64;
        if !gone.is_empty() {
            self.write(table, &[], &gone).await?;
        }
        if !table.has_payload() {
            let changed = stretches.concat();
            return if changed.is_empty() {
                Ok(())
            } else {
                self.write(table, &changed, &[]).await
            };
        }
        for stretch in stretches {
            self.carry_whole(table, &stretch).await?;
        }
        Ok(())
    }

    /// Reads rows once more, with their payloads, and writes them, as many at a time as fit into a page.
    async fn carry_whole(&self, table: Table, stretch: &[Row]) -> Result<(), CopyError> {
        let mut left = stretch;
        while let [first, .., last] | [first @ last] = left {
            let CopyPage { rows, is_last } = self
                .source
                .rows_between(table, first.key(), last.key())
                .await?;
            // Where nothing is left of them, they went away meanwhile.
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

    async fn write(&self, table: Table, rows: &[Row], gone: &[Row]) -> Result<(), CopyError> {
        match self.target.apply(self.run, table, rows, gone).await? {
            true => Ok(()),
            false => Err(CopyError::Superseded),
        }
    }

    /// Compares what both databases answer about every invoice. `progress` gets the number of invoices done.
    ///
    /// # Errors
    /// A database cannot be reached.
    pub async fn compare(mut self, mut progress: impl FnMut(u64)) -> Result<CopyReport, CopyError> {
        let mut after: Option<InvoiceCursor> = None;
        loop {
            let (here, there) = tokio::try_join!(
                self.source
                    .invoices_page(None, None, after.as_ref(), INVOICES),
                self.target
                    .invoices_page(None, None, after.as_ref(), INVOICES)
            )?;
            let (here_ends, there_ends) = (
                here.len() < INVOICES as usize,
                there.len() < INVOICES as usize,
            );
            let newest_first = |i: &StoredInvoice| {
                (
                    std::cmp::Reverse(i.stored_ms),
                    i.tenant_uid.clone(),
                    i.invoice_uid.clone(),
                )
            };
            let (pairs, next) = side_by_side((here, here_ends), (there, there_ends), newest_first);
            for pair in pairs {
                self.report.compared += 1;
                if let Some(differing) = difference(pair) {
                    self.report.differing += 1;
                    self.report.named.push(differing);
                    self.report.named.truncate(NAMED);
                }
            }
            progress(self.report.compared);
            let Some((std::cmp::Reverse(stored_ms), tenant_uid, invoice_uid)) = next else {
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

fn difference(pair: Pair<StoredInvoice>) -> Option<Differing> {
    let differs = |of: StoredInvoice, how| {
        let StoredInvoice {
            tenant_uid,
            invoice_uid,
            stripe_invoice_id,
            ..
        } = of;
        Some(Differing {
            tenant_uid,
            invoice_uid,
            stripe_invoice_id,
            how,
        })
    };
    match pair {
        (Some(here), Some(there)) if answer(&here) == answer(&there) => None,
        (Some(here), Some(_)) => differs(here, Mismatch::AnswersOtherwise),
        (Some(here), None) => differs(here, Mismatch::NotInCopy),
        (None, Some(there)) => differs(there, Mismatch::OnlyInCopy),
        (None, None) => None,
    }
}

/// As HTTP gives it. What is damaged is as damaged in the copy.
fn answer(invoice: &StoredInvoice) -> Result<String, String> {
    render(invoice)
        .map(|document| document.to_string())
        .map_err(|error| error.to_string())
}

/// What stands on either side under one key.
type Pair<T> = (Option<T>, Option<T>);

/// Two pages in the same order, side by side, as far as both reach (true: nothing follows on that side); and the key after which to
/// go on. None: that was all.
fn side_by_side<T, K: Ord>(
    here: (Vec<T>, bool),
    there: (Vec<T>, bool),
    key: impl Fn(&T) -> K,
) -> (Vec<Pair<T>>, Option<K>) {
    let reach = |(rows, is_last): &(Vec<T>, bool)| {
        if *is_last {
            None
        } else {
            rows.last().map(&key)
        }
    };
    let end = [reach(&here), reach(&there)].into_iter().flatten().min();
    let is_within = |row: &T| end.as_ref().is_none_or(|end| key(row) <= *end);
    let (mut here, mut there) = (
        here.0.into_iter().peekable(),
        there.0.into_iter().peekable(),
    );
    let mut pairs = Vec::new();
    loop {
        let (left, right) = (
            here.peek().filter(|row| is_within(row)),
            there.peek().filter(|row| is_within(row)),
        );
        let order = match (left, right) {
            (None, None) => return (pairs, end),
            (Some(_), None) => std::cmp::Ordering::Less,
            (None, Some(_)) => std::cmp::Ordering::Greater,
            (Some(left), Some(right)) => key(left).cmp(&key(right)),
        };
        pairs.push(match order {
            std::cmp::Ordering::Less => (here.next(), None),
            std::cmp::Ordering::Equal => (here.next(), there.next()),
            std::cmp::Ordering::Greater => (None, there.next()),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::side_by_side;

    #[test]
    fn pages_are_laid_side_by_side_as_far_as_both_reach() {
        let lay = |here: (&[i32], bool), there: (&[i32], bool)| {
            side_by_side(
                (here.0.to_vec(), here.1),
                (there.0.to_vec(), there.1),
                |n| *n,
            )
        };
        let (pairs, next) = lay((&[1, 2, 4], false), (&[2, 3, 5], true));
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
        let (pairs, next) = lay((&[1, 2], false), (&[1, 3, 4], false));
        assert_eq!(
            (pairs, next),
            (vec![(Some(1), Some(1)), (Some(2), None)], Some(2))
        );
        let (pairs, next) = lay((&[7], true), (&[], true));
        assert_eq!((pairs, next), (vec![(Some(7), None)], None));
        assert_eq!(lay((&[], true), (&[], true)), (vec![], None));
    }
}
