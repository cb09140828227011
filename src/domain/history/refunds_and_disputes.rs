//! Money returned or contested after an invoice was paid: refunds, credit notes, disputes.
//!
//! Stripe's invoice stays `paid` through all of it, so these entries keep the state and say in their message what happened.

use std::collections::BTreeMap;

use super::message::{self, InvoiceContext};
use super::{PendingEntry, Phase, StoredObservation, TieBreak};
use crate::domain::payment_state::PaymentState;
use crate::domain::stripe::object::{Charge, CreditNote, Dispute, Object, Refund};

pub struct RefundsAndDisputes<'a, 'k> {
    /// The tellings that belong to the invoice, earliest first.
    pub own: &'k [&'a StoredObservation],
    /// The earliest Paid entry, Unix milliseconds.
    pub paid_ms: i64,
}

pub fn entries<'a>(
    returned: &RefundsAndDisputes<'a, '_>,
    facts: &InvoiceContext<'a, '_>,
) -> Vec<PendingEntry<'a>> {
    let mut drafts = refunds(returned, facts);
    drafts.extend(refunded_charges(returned, facts));
    drafts.extend(credit_notes(returned, facts));
    drafts.extend(disputes(returned, facts));
    drafts
}

/// Tellings of one object, earliest first.
type Sources<'a, T> = Vec<(&'a StoredObservation, &'a T)>;

fn by_id<'a, T>(
    own: &[&'a StoredObservation],
    pick: impl Fn(&'a StoredObservation) -> Option<(&'a str, &'a T)>,
) -> BTreeMap<&'a str, Sources<'a, T>> {
    let mut told: BTreeMap<&str, Sources<T>> = BTreeMap::new();
    for &known in own {
        if let Some((id, object)) = pick(known) {
            told.entry(id).or_default().push((known, object));
        }
    }
    told
}

fn known_refunds<'a>(
    returned: &RefundsAndDisputes<'a, '_>,
) -> BTreeMap<&'a str, Sources<'a, Refund>> {
    by_id(returned.own, |k| match &k.telling.object {
        Object::Refund(refund) if is_refund_event(&k.telling.kind) => Some((&*refund.id, refund)),
        _ => None,
    })
}

fn is_refund_event(kind: &str) -> bool {
    kind.starts_with("refund.") || kind == "charge.refund.updated"
}

fn refunds<'a>(
    returned: &RefundsAndDisputes<'a, '_>,
    facts: &InvoiceContext<'a, '_>,
) -> Vec<PendingEntry<'a>> {
    let mut drafts = Vec::new();
    for (id, told) in known_refunds(returned) {
        drafts.push(draft(
            TieBreak::Refunded,
            id,
            message::refunded(facts, &told),
            &told,
        ));
        let has_failed = |k: &StoredObservation, r: &Refund| {
            k.telling.kind == "refund.failed"
                || matches!(r.status.as_deref(), Some("failed" | "canceled"))
        };
        let failed: Sources<Refund> = told
            .iter()
            .copied()
            .filter(|(k, r)| has_failed(k, r))
            .collect();
        if !failed.is_empty() {
            drafts.push(draft(
                TieBreak::RefundFailed,
                id,
                message::refund_failed(facts, &told, &failed),
                &failed,
            ));
        }
    }
    drafts
}

/// A charge's running total, where the refunds behind it are not known one by one (before refunds had events).
fn refunded_charges<'a>(
    returned: &RefundsAndDisputes<'a, '_>,
    facts: &InvoiceContext<'a, '_>,
) -> Vec<PendingEntry<'a>> {
    let mut totals: BTreeMap<(&str, i64), Sources<Charge>> = BTreeMap::new();
    for &known in returned.own {
        if let (Object::Charge(charge), "charge.refunded") =
            (&known.telling.object, known.telling.kind.as_str())
            && let Some(amount) = charge.amount_refunded
        {
            totals
                .entry((&charge.id, amount))
                .or_default()
                .push((known, charge));
        }
    }
    let refunds = known_refunds(returned);
    let known_of = |charge: &str| -> i64 {
        let of_charge = refunds.values().filter(|told| {
            told.iter()
                .any(|(_, r)| r.charge.as_deref() == Some(charge))
        });
        of_charge
            .filter_map(|told| told.iter().find_map(|(_, r)| r.amount))
            .fold(0, i64::saturating_add)
    };
    let unexplained = totals
        .into_iter()
        .filter(|((charge, amount), _)| known_of(charge) < *amount);
    unexplained
        .map(|((charge, amount), told)| {
            draft(
                TieBreak::Refunded,
                charge,
                message::charge_refunded(facts, amount, &told),
                &told,
            )
        })
        .collect()
}

fn credit_notes<'a>(
    returned: &RefundsAndDisputes<'a, '_>,
    facts: &InvoiceContext<'a, '_>,
) -> Vec<PendingEntry<'a>> {
    let notes = by_id(returned.own, |k| match &k.telling.object {
        Object::CreditNote(note) if k.telling.kind.starts_with("credit_note.") => {
            Some((&*note.id, note))
        }
        _ => None,
    });
    let mut drafts = Vec::new();
    for (id, told) in notes {
        if !is_post_payment(&told, returned.paid_ms) {
            continue;
        }
        drafts.push(draft(
            TieBreak::CreditNote,
            id,
            message::credit_note(facts, &told),
            &told,
        ));
        let is_void = |k: &StoredObservation, n: &CreditNote| {
            k.telling.kind == "credit_note.voided" || n.status.as_deref() == Some("void")
        };
        let voided: Sources<CreditNote> = told
            .iter()
            .copied()
            .filter(|(k, n)| is_void(k, n))
            .collect();
        if !voided.is_empty() {
            drafts.push(draft(
                TieBreak::CreditNoteVoided,
                id,
                message::credit_note_voided(facts, &told),
                &voided,
            ));
        }
    }
    drafts
}

/// A credit note made before payment lowers what is owed, and returns no money.
fn is_post_payment(told: &Sources<CreditNote>, paid_ms: i64) -> bool {
    let says_so = |n: &CreditNote| {
        matches!(n.note_type.as_deref(), Some("post_payment" | "mixed"))
            || n.post_payment_amount.is_some_and(|amount| amount > 0)
    };
    if told
        .iter()
        .any(|(_, n)| n.note_type.is_some() || n.post_payment_amount.is_some())
    {
        return told.iter().any(|(_, n)| says_so(n));
    }
    let made = told.iter().filter_map(|(_, n)| n.created).min();
    let told_at = told.iter().map(|(k, _)| k.telling.created).min();
    made.or(told_at)
        .is_some_and(|second| second * 1000 >= paid_ms)
}

fn disputes<'a>(
    returned: &RefundsAndDisputes<'a, '_>,
    facts: &InvoiceContext<'a, '_>,
) -> Vec<PendingEntry<'a>> {
    let kinds: [(TieBreak, &[&str]); 4] = [
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
    let all = by_id(returned.own, |k| match &k.telling.object {
        Object::Dispute(dispute) => Some((&*dispute.id, dispute)),
        _ => None,
    });
    let mut drafts = Vec::new();
    for (id, told) in &all {
        for (rank, types) in kinds {
            let of_kind: Sources<Dispute> = told
                .iter()
                .copied()
                .filter(|(k, _)| types.contains(&k.telling.kind.as_str()))
                .collect();
            if !of_kind.is_empty() {
                drafts.push(draft(
                    rank,
                    id,
                    message::dispute(facts, rank, told, &of_kind),
                    &of_kind,
                ));
            }
        }
    }
    drafts
}

fn draft<'a, T>(
    rank: TieBreak,
    object_id: &'a str,
    message: String,
    told: &Sources<'a, T>,
) -> PendingEntry<'a> {
    let sources: Vec<&StoredObservation> = told.iter().map(|(k, _)| *k).collect();
    let time = sources
        .iter()
        .map(|k| k.telling.created)
        .min()
        .unwrap_or_default();
    PendingEntry {
        stage: Phase::Information,
        time,
        rank,
        number: 0,
        object_id,
        state: PaymentState::Paid,
        message,
        sources,
    }
}
