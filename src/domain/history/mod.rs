//! Computes the history of an invoice: turns all observations of it into its payment states.
//!
//! The history is a function of a *set*: the order, repetition and source of observations make no
//! difference. One fact is one entry. `invoice_observations` decides which observations count for
//! the invoice, `payment_links` which invoice a payment belongs to, `fact` what one observation
//! asserts, `failed_attempts` which observations are one failure, `builder` makes the entries, and
//! `message` writes their texts. This module sorts them and merges them with the states that were
//! imported with the stored invoice.
//!
//! Every step takes time in proportion to the number of observations (times its logarithm where
//! something is sorted): a stranger can cause thousands of them through a hosted payment page.

mod builder;
mod context;
mod disjoint_sets;
mod entry;
pub mod fact;
mod failed_attempts;
mod failed_tries;
pub mod invoice_observations;
mod message;
pub mod payment_links;
mod refunds_and_disputes;

use std::collections::{HashMap, HashSet};

pub use self::entry::Entry;
pub use super::stripe::event::{DamagedObservation, StoredObservation};

use self::builder::HistoryBuilder;
use self::context::InvoiceContext;
use self::entry::{PendingEntry, Phase};
use self::invoice_observations::InvoiceObservations;
use super::payment_state::{ImportedState, PaymentState};

/// Folds observations into the history of an invoice.
///
/// `known` may hold observations of other invoices, in any order, repeated.
pub fn fold(
    stripe_invoice_id: Option<&str>,
    imported: &[ImportedState],
    known: &[StoredObservation],
) -> Vec<Entry> {
    match stripe_invoice_id {
        Some(invoice_id) => {
            let observations = InvoiceObservations::select(invoice_id, known);
            fold_selected(invoice_id, imported, &observations)
        }
        None => imported.iter().map(imported_entry).collect(),
    }
}

/// Folds the observations that [`InvoiceObservations::select`] chose for this invoice.
pub fn fold_selected<'a>(
    invoice_id: &'a str,
    imported: &[ImportedState],
    observations: &InvoiceObservations<'a>,
) -> Vec<Entry> {
    let computed = computed_entries(invoice_id, imported, observations);
    let has_imported_paid = imported
        .iter()
        .any(|state| state.state == PaymentState::Paid);
    let imported_keys: HashSet<(PaymentState, i64)> = imported
        .iter()
        .map(|state| (state.state, state.timestamp_ms))
        .collect();

    let mut entries: Vec<Entry> = imported.iter().map(imported_entry).collect();
    let mut equal: HashMap<(PaymentState, i64, String), usize> = HashMap::new();
    for pending in computed {
        let is_closed = match pending.phase {
            Phase::Open | Phase::Voided => has_imported_paid,
            Phase::Paid | Phase::Information => false,
        };
        let timestamp_ms = pending.time * 1000;
        if is_closed || imported_keys.contains(&(pending.state, timestamp_ms)) {
            continue;
        }

        let proofs = pending.sources.iter().map(|stored| stored.key);
        let key = (pending.state, timestamp_ms, pending.message);
        if let Some(&at) = equal.get(&key) {
            entries[at].proofs.extend(proofs);
            continue;
        }
        entries.push(Entry {
            state: pending.state,
            timestamp_ms,
            message: Some(key.2.clone()),
            proofs: proofs.collect(),
        });
        equal.insert(key, entries.len() - 1);
    }
    entries
}

/// Returns whether Stripe's API may know why the latest attempt to collect this invoice failed.
pub fn lacks_reason(stripe_invoice_id: &str, known: &[StoredObservation]) -> bool {
    let observations = InvoiceObservations::select(stripe_invoice_id, known);
    failed_attempts::lacks_reason(observations.counted())
}

fn imported_entry(state: &ImportedState) -> Entry {
    Entry {
        state: state.state,
        timestamp_ms: state.timestamp_ms,
        message: state.message.clone(),
        proofs: Vec::new(),
    }
}

fn computed_entries<'a>(
    invoice_id: &'a str,
    imported: &[ImportedState],
    observations: &InvoiceObservations<'a>,
) -> Vec<PendingEntry<'a>> {
    let counted = observations.counted();
    let context = InvoiceContext::new(invoice_id, observations);
    let attempts = failed_attempts::failed_attempts(counted);
    let builder = HistoryBuilder::new(counted, observations.links(), &context, &attempts);
    let mut entries = builder.entries(&failed_attempts::limit(attempts));

    let paid_by_import = imported
        .iter()
        .filter(|state| state.state == PaymentState::Paid)
        .map(|state| state.timestamp_ms);
    let paid_by_stripe = entries
        .iter()
        .filter(|entry| entry.phase == Phase::Paid)
        .map(|entry| entry.time * 1000);
    if let Some(paid_ms) = paid_by_import.chain(paid_by_stripe).min() {
        entries.extend(refunds_and_disputes::entries(counted, paid_ms, &context));
    }

    entries.sort_by(|a, b| a.sort_key().cmp(&b.sort_key()));
    entries
}
