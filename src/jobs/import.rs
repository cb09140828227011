//! Imports invoice documents from files. Valid documents are stored; each invalid one is reported
//! with its position.

use std::path::Path;
use std::time::Instant;

use serde_json::Value;

use super::json_reader::{self, Document};
use super::{InvalidDocument, ProgressSink};
use crate::clock::Clock;
use crate::domain::invoice::schema::InvalidField;
use crate::queries::invoices::new_invoice;
use crate::store::{NewInvoice, Put, Store, StoreError};

/// Invoices per transaction. On SQLite a delivery waits for the transaction: fifty invoices take
/// about 20 ms.
const BATCH: usize = 50;

/// Number of documents by result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ImportCounts {
    pub created: u64,
    pub replaced: u64,
    pub invalid: u64,
}

impl ImportCounts {
    fn total(self) -> u64 {
        self.created + self.replaced + self.invalid
    }
}

/// Imports the invoices of one tenant.
pub struct Importer<'i, P> {
    pub store: &'i Store,
    pub tenant_uid: &'i str,
    pub clock: &'i Clock,
    pub sink: &'i mut P,
    pub counts: ImportCounts,
}

/// An invoice to be stored, and the line on which it begins.
type Pending = (usize, NewInvoice);

impl<P: ProgressSink> Importer<'_, P> {
    /// Imports one file (`-` for standard input) and adds to the counts.
    ///
    /// # Errors
    /// Returns an error if the store is unavailable. Invoices stored before stay stored.
    pub async fn import_file(&mut self, path: &Path) -> Result<(), StoreError> {
        let mut documents = json_reader::stream(path);
        let mut batch: Vec<Pending> = Vec::with_capacity(BATCH);

        while let Some(document) = documents.recv().await {
            match document {
                Ok(Document { line, text }) => match parse(self.tenant_uid, text) {
                    Ok(invoice) => batch.push((line, invoice)),
                    Err(fields) => self.report(path, line, &fields),
                },
                Err(error) => {
                    self.report(path, 0, &whole_document(format!("cannot be read: {error}")));
                }
            }
            if batch.len() == BATCH {
                self.store_batch(path, &mut batch).await?;
            }
        }

        self.store_batch(path, &mut batch).await
    }

    /// Stores and empties the batch in one transaction, then pauses so that deliveries can write.
    async fn store_batch(
        &mut self,
        path: &Path,
        batch: &mut Vec<Pending>,
    ) -> Result<(), StoreError> {
        if batch.is_empty() {
            return Ok(());
        }
        let (lines, invoices): (Vec<usize>, Vec<NewInvoice>) = batch.drain(..).unzip();
        let started = Instant::now();
        let results = self
            .store
            .put_invoices(&invoices, self.clock.now_ms())
            .await?;
        let worked = started.elapsed();

        for (line, put) in lines.into_iter().zip(results) {
            match put {
                Put::Created => self.counts.created += 1,
                Put::Replaced => self.counts.replaced += 1,
                Put::StripeInvoiceTaken | Put::PreconditionFailed => {
                    self.report(
                        path,
                        line,
                        &stripe_invoice("belongs to another stored invoice"),
                    );
                }
                Put::StripeInvoiceFixed => {
                    let reason = "differs from the Stripe invoice of the stored invoice";
                    self.report(path, line, &stripe_invoice(reason));
                }
            }
        }
        self.sink.progress(self.counts.total());
        self.store.pause_after_write(worked).await;
        Ok(())
    }

    fn report(&mut self, file: &Path, line: usize, fields: &[InvalidField]) {
        self.counts.invalid += 1;
        self.sink.invalid(InvalidDocument {
            file: file.to_owned(),
            line,
            reasons: fields.iter().map(describe).collect(),
        });
    }
}

fn describe(field: &InvalidField) -> String {
    if field.pointer.is_empty() {
        return field.reason.clone();
    }
    format!("{}: {}", field.pointer, field.reason)
}

fn parse(tenant_uid: &str, text: Result<String, String>) -> Result<NewInvoice, Vec<InvalidField>> {
    let text = text.map_err(whole_document)?;
    let document: Value = serde_json::from_str(&text)
        .map_err(|error| whole_document(format!("is not JSON: {error}")))?;
    new_invoice(tenant_uid, None, document)
}

fn whole_document(reason: String) -> Vec<InvalidField> {
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
