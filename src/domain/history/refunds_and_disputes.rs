//! Money returned or contested after an invoice was paid: refunds, credit notes, disputes.
//!
//! Stripe's invoice stays `paid` throughout, so these entries keep the state and their messages
//! describe the event.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::context::InvoiceContext;
use super::entry::{PendingEntry, Phase, TieBreak, earliest_second};
use super::message;
use crate::domain::payment_state::PaymentState;
use crate::domain::stripe::event::StoredObservation;
use crate::domain::stripe::object::{Charge, CreditNote, Dispute, Object, Refund};

/// The steps of a dispute, each with the event types that prove it.
const DISPUTE_STEPS: [(TieBreak, &[&str]); 4] = [
    (
        TieBreak::DisputeOpened,
        &["charge.dispute.created", "charge.dispute.updated"],
    ),
    (
        TieBreak::FundsWithdrawn,
        &["charge.dispute.funds_withdrawn"],
    ),
    (
        TieBreak::FundsReinstated,
        &["charge.dispute.funds_reinstated"],
    ),
    (TieBreak::DisputeClosed, &["charge.dispute.closed"]),
];

/// Observations of one object, earliest first, with the object that each contains.
type ObjectSources<'a, T> = Vec<(&'a StoredObservation, &'a T)>;

/// Returns the entries of an invoice that was paid at `paid_ms`, in Unix milliseconds.
pub fn entries<'a>(
    counted: &[&'a StoredObservation],
    paid_ms: i64,
    context: &InvoiceContext<'a, '_>,
) -> Vec<PendingEntry<'a>> {
    let known_refunds = by_id(counted, |stored| match &stored.observation.object {
        Object::Refund(refund) if is_refund_event(&stored.observation.kind) => {
            Some((&*refund.id, refund))
        }
        _ => None,
    });

    let mut entries = refunded_charges(counted, &known_refunds, context);
    entries.extend(refunds(known_refunds, context));
    entries.extend(credit_notes(counted, paid_ms, context));
    entries.extend(disputes(counted, context));
    entries
}

fn by_id<'a, T>(
    counted: &[&'a StoredObservation],
    pick: impl Fn(&'a StoredObservation) -> Option<(&'a str, &'a T)>,
) -> BTreeMap<&'a str, ObjectSources<'a, T>> {
    let mut objects: BTreeMap<&str, ObjectSources<T>> = BTreeMap::new();
    for &stored in counted {
        if let Some((id, object)) = pick(stored) {
            objects.entry(id).or_default().push((stored, object));
        }
    }
    objects
}

fn is_refund_event(kind: &str) -> bool {
    kind.starts_with("refund.") || kind == "charge.refund.updated"
}

fn refunds<'a>(
    known_refunds: BTreeMap<&'a str, ObjectSources<'a, Refund>>,
    context: &InvoiceContext<'a, '_>,
) -> Vec<PendingEntry<'a>> {
    let mut entries = Vec::new();
    for (id, sources) in known_refunds {
        let message = message::refunded(context, &sources);
        entries.push(entry(TieBreak::Refunded, id, message, &sources));

        let failed: ObjectSources<Refund> = sources
            .iter()
            .copied()
            .filter(|(stored, refund)| {
                stored.observation.kind == "refund.failed"
                    || matches!(refund.status.as_deref(), Some("failed" | "canceled"))
            })
            .collect();
        if !failed.is_empty() {
            let message = message::refund_failed(context, &sources, &failed);
            entries.push(entry(TieBreak::RefundFailed, id, message, &failed));
        }
    }
    entries
}

/// Returns a charge's running totals that the known refunds do not add up to.
///
/// Before refunds had events of their own, `charge.refunded` was the only event about them.
fn refunded_charges<'a>(
    counted: &[&'a StoredObservation],
    known_refunds: &BTreeMap<&'a str, ObjectSources<'a, Refund>>,
    context: &InvoiceContext<'a, '_>,
) -> Vec<PendingEntry<'a>> {
    let mut totals: BTreeMap<(&str, i64), ObjectSources<Charge>> = BTreeMap::new();
    for &stored in counted {
        if let (Object::Charge(charge), "charge.refunded") =
            (&stored.observation.object, stored.observation.kind.as_str())
            && let Some(amount) = charge.amount_refunded
        {
            let sources = totals.entry((&charge.id, amount)).or_default();
            sources.push((stored, charge));
        }
    }
    let explained = refunded_by_charge(known_refunds);

    let mut entries = Vec::new();
    for ((charge, amount), sources) in totals {
        if explained.get(charge).copied().unwrap_or(0) < amount {
            let message = message::charge_refunded(context, amount, &sources);
            entries.push(entry(TieBreak::Refunded, charge, message, &sources));
        }
    }
    entries
}

/// Returns the sum of the known refunds of each charge.
fn refunded_by_charge<'a>(
    known_refunds: &BTreeMap<&'a str, ObjectSources<'a, Refund>>,
) -> HashMap<&'a str, i64> {
    let mut sums: HashMap<&str, i64> = HashMap::new();
    for sources in known_refunds.values() {
        let amount = sources.iter().find_map(|(_, refund)| refund.amount);
        let charges: BTreeSet<&str> = sources
            .iter()
            .filter_map(|(_, refund)| refund.charge.as_deref())
            .collect();
        for charge in charges {
            let sum = sums.entry(charge).or_default();
            *sum = sum.saturating_add(amount.unwrap_or(0));
        }
    }

    sums
}

fn credit_notes<'a>(
    counted: &[&'a StoredObservation],
    paid_ms: i64,
    context: &InvoiceContext<'a, '_>,
) -> Vec<PendingEntry<'a>> {
    let notes = by_id(counted, |stored| match &stored.observation.object {
        Object::CreditNote(note) if stored.observation.kind.starts_with("credit_note.") => {
            Some((&*note.id, note))
        }
        _ => None,
    });

    let mut entries = Vec::new();
    for (id, sources) in notes {
        if !is_post_payment(&sources, paid_ms) {
            continue;
        }
        let message = message::credit_note(context, &sources);
        entries.push(entry(TieBreak::CreditNote, id, message, &sources));

        let voided: ObjectSources<CreditNote> = sources
            .iter()
            .copied()
            .filter(|(stored, note)| {
                stored.observation.kind == "credit_note.voided"
                    || note.status.as_deref() == Some("void")
            })
            .collect();
        if !voided.is_empty() {
            let message = message::credit_note_voided(context, &sources);
            entries.push(entry(TieBreak::CreditNoteVoided, id, message, &voided));
        }
    }
    entries
}

/// Returns whether a credit note was issued after payment.
///
/// A credit note that was issued before payment lowers the amount owed and returns no money.
fn is_post_payment(sources: &[(&StoredObservation, &CreditNote)], paid_ms: i64) -> bool {
    let has_field = sources
        .iter()
        .any(|(_, note)| note.note_type.is_some() || note.post_payment_amount.is_some());
    if has_field {
        return sources.iter().any(|(_, note)| {
            matches!(note.note_type.as_deref(), Some("post_payment" | "mixed"))
                || note.post_payment_amount.is_some_and(|amount| amount > 0)
        });
    }

    let created = sources.iter().filter_map(|(_, note)| note.created).min();
    let received = sources
        .iter()
        .map(|(stored, _)| stored.observation.created)
        .min();
    created
        .or(received)
        .is_some_and(|second| second * 1000 >= paid_ms)
}

fn disputes<'a>(
    counted: &[&'a StoredObservation],
    context: &InvoiceContext<'a, '_>,
) -> Vec<PendingEntry<'a>> {
    let disputes = by_id(counted, |stored| match &stored.observation.object {
        Object::Dispute(dispute) => Some((&*dispute.id, dispute)),
        _ => None,
    });

    let mut entries = Vec::new();
    for (id, sources) in &disputes {
        for (step, types) in DISPUTE_STEPS {
            let of_step: ObjectSources<Dispute> = sources
                .iter()
                .copied()
                .filter(|(stored, _)| types.contains(&stored.observation.kind.as_str()))
                .collect();
            if !of_step.is_empty() {
                let message = message::dispute(context, step, sources, &of_step);
                entries.push(entry(step, id, message, &of_step));
            }
        }
    }
    entries
}

/// Returns an entry that keeps the state, at the earliest `created` of its sources.
fn entry<'a, T>(
    tie_break: TieBreak,
    object_id: &'a str,
    message: String,
    sources: &[(&'a StoredObservation, &T)],
) -> PendingEntry<'a> {
    let sources: Vec<&StoredObservation> = sources.iter().map(|(stored, _)| *stored).collect();

    PendingEntry {
        phase: Phase::Information,
        time: earliest_second(&sources),
        tie_break,
        number: 0,
        object_id,
        state: PaymentState::Paid,
        message,
        sources,
    }
}
