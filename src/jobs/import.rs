//! Invoice documents from files into the store: the valid ones are stored, each faulty one is reported with its place.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::json_reader;
use crate::clock::Clock;
use crate::domain::invoice::schema::InvalidField;
use crate::queries::invoices::new_invoice;
use crate::store::{NewInvoice, Put, Store, StoreError};

/// Invoices that share a transaction.
const BATCH: usize = 500;

/// Where a document stands that was not stored, and what is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    pub file: PathBuf,
    /// 0: the file as a whole.
    pub line: usize,
    pub faults: Vec<InvalidField>,
}

/// How many documents met which end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ImportCounts {
    pub created: u64,
    pub replaced: u64,
    pub refused: u64,
}

/// Gets to know what happens meanwhile.
pub trait ProgressSink {
    fn refused(&mut self, refused: Refused);
    /// Counts of all files so far.
    fn progress(&mut self, counts: ImportCounts);
}

/// Imports one file (`-`: standard input), adding to `counts`.
///
/// # Errors
/// The store cannot be reached; what was stored before stays stored.
pub async fn file(
    store: &Store,
    tenant_uid: &str,
    path: &Path,
    clock: &Clock,
    watcher: &mut impl ProgressSink,
    counts: &mut ImportCounts,
) -> Result<(), StoreError> {
    let mut documents = json_reader::stream(path);
    let mut batch: Vec<(usize, NewInvoice)> = Vec::with_capacity(BATCH);
    let refuse =
        |line: usize, faults: Vec<InvalidField>, watcher: &mut _, counts: &mut ImportCounts| {
            counts.refused += 1;
            ProgressSink::refused(
                watcher,
                Refused {
                    file: path.to_owned(),
                    line,
                    faults,
                },
            );
        };
    loop {
        let document = documents.recv().await;
        let ended = document.is_none();
        match document {
            Some(Ok(document)) => match parse(tenant_uid, document.text) {
                Ok(invoice) => batch.push((document.line, invoice)),
                Err(faults) => refuse(document.line, faults, watcher, counts),
            },
            Some(Err(error)) => refuse(
                0,
                whole(format!("cannot be read: {error}")),
                watcher,
                counts,
            ),
            None => {}
        }
        if batch.len() == BATCH || (ended && !batch.is_empty()) {
            let (lines, invoices): (Vec<usize>, Vec<NewInvoice>) = batch.drain(..).unzip();
            for (line, put) in lines
                .into_iter()
                .zip(store.put_invoices(&invoices, clock.now_ms()).await?)
            {
                match put {
                    Put::Created => counts.created += 1,
                    Put::Replaced => counts.replaced += 1,
                    Put::StripeInvoiceTaken | Put::PreconditionFailed => refuse(
                        line,
                        stripe_invoice("is held by another invoice"),
                        watcher,
                        counts,
                    ),
                    Put::StripeInvoiceFixed => refuse(
                        line,
                        stripe_invoice("differs from the one that this invoice holds"),
                        watcher,
                        counts,
                    ),
                }
            }
            watcher.progress(*counts);
        }
        if ended {
            return Ok(());
        }
    }
}

fn parse(tenant_uid: &str, text: Result<String, String>) -> Result<NewInvoice, Vec<InvalidField>> {
    let document: Value = serde_json::from_str(&text.map_err(whole)?)
        .map_err(|e| whole(format!("is not JSON: {e}")))?;
    new_invoice(tenant_uid, None, document)
}

fn whole(reason: String) -> Vec<InvalidField> {
    vec![InvalidField {
        pointer: String::new(),
        reason,
    }]
}

fn stripe_invoice(reason: &str) -> Vec<InvalidField> {
    vec![InvalidField {
        pointer: "/status/stripeInvoiceId".to_owned(),
        reason: reason.to_owned(),
    }]
}
