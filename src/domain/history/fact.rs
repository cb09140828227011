//! The facts that one observation asserts. They follow the table in `docs/payment-states.md`, row
//! by row.
//!
//! An event's *type* (the claim), the *snapshot* of the invoice inside (the evidence), or both can
//! assert a fact. This file looks at one observation at a time; `builder` combines several.

use crate::domain::stripe::event::{Event, Observation};
use crate::domain::stripe::object::{Invoice, Object, PaymentIntent};

/// A fact about an invoice that the invoice's own events can assert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InvoiceFact {
    Finalized,
    AttemptRequired,
    ActionRequired,
    Overdue,
    AttemptFailed,
    FinalizationFailed,
    WrittenOff,
    Voided,
    Paid,
}

/// Facts that snapshots prove. Each occurs once in a history.
pub const SHOWN_BY_SNAPSHOTS: [InvoiceFact; 4] = [
    InvoiceFact::Finalized,
    InvoiceFact::WrittenOff,
    InvoiceFact::Voided,
    InvoiceFact::Paid,
];

/// Event types that assert facts by themselves. A webhook endpoint should send all of them.
pub const PAYMENT_EVENT_TYPES: [&str; 32] = [
    "invoice.finalized",
    "invoice.updated",
    "invoice.paid",
    "invoice.payment_succeeded",
    "invoice.overpaid",
    "invoice.payment_attempt_required",
    "invoice.payment_action_required",
    "invoice.overdue",
    "invoice.payment_failed",
    "invoice.finalization_failed",
    "invoice.marked_uncollectible",
    "invoice.voided",
    "invoice_payment.paid",
    "payment_intent.requires_action",
    "payment_intent.processing",
    "payment_intent.partially_funded",
    "payment_intent.payment_failed",
    "charge.pending",
    "charge.failed",
    "charge.refunded",
    "charge.refund.updated",
    "refund.created",
    "refund.updated",
    "refund.failed",
    "credit_note.created",
    "credit_note.updated",
    "credit_note.voided",
    "charge.dispute.created",
    "charge.dispute.updated",
    "charge.dispute.closed",
    "charge.dispute.funds_withdrawn",
    "charge.dispute.funds_reinstated",
];

/// Returns whether an event asserts anything about a payment, new or not, linked or not.
///
/// Decides between the outcomes `recorded` and `no_payment_fact`.
pub fn asserts_fact(event: &Event) -> bool {
    let kind = event
        .event_type
        .strip_prefix("v1.")
        .unwrap_or(&event.event_type);
    is_about_returned_money(kind) || event.observation.as_ref().is_some_and(asserts)
}

/// Returns whether money is returned or contested, which asserts a fact regardless of the object.
fn is_about_returned_money(kind: &str) -> bool {
    kind == "charge.refunded"
        || kind == "charge.refund.updated"
        || ["refund.", "credit_note.", "charge.dispute."]
            .iter()
            .any(|prefix| kind.starts_with(prefix))
}

fn asserts(observation: &Observation) -> bool {
    match (&observation.object, observation.kind.as_str()) {
        (Object::Invoice(invoice), _) => {
            by_type(observation, invoice).is_some()
                || SHOWN_BY_SNAPSHOTS
                    .into_iter()
                    .any(|fact| by_snapshot(observation, invoice, fact))
        }
        (Object::PaymentIntent(intent), "payment_intent.partially_funded") => {
            intent.funded().is_some()
        }
        (
            Object::PaymentIntent(_),
            "payment_intent.requires_action"
            | "payment_intent.processing"
            | "payment_intent.payment_failed",
        ) => true,
        (Object::Charge(_), "charge.pending" | "charge.failed") => true,
        (Object::InvoicePayment(_), "invoice_payment.paid") => true,
        _ => false,
    }
}

/// Returns the fact that an event's type claims, if the snapshot meets its condition.
///
/// A thin event has no snapshot, so its type alone decides.
pub fn by_type(observation: &Observation, invoice: &Invoice) -> Option<InvoiceFact> {
    let (fact, holds) = match observation.kind.as_str() {
        "invoice.finalized" => (InvoiceFact::Finalized, invoice.is_owed()),
        "invoice.updated" => (
            InvoiceFact::Finalized,
            !observation.thin
                && invoice.previous_status.as_deref() == Some("draft")
                && invoice.is_open(),
        ),
        "invoice.paid" | "invoice.payment_succeeded" | "invoice.overpaid" => {
            (InvoiceFact::Paid, invoice.is_paid())
        }
        "invoice.payment_attempt_required" => (InvoiceFact::AttemptRequired, true),
        "invoice.payment_action_required" => (InvoiceFact::ActionRequired, true),
        "invoice.overdue" => (InvoiceFact::Overdue, true),
        "invoice.payment_failed" => (InvoiceFact::AttemptFailed, true),
        "invoice.finalization_failed" => (InvoiceFact::FinalizationFailed, true),
        "invoice.marked_uncollectible" => (InvoiceFact::WrittenOff, true),
        "invoice.voided" => (InvoiceFact::Voided, true),
        _ => return None,
    };

    (holds || (observation.thin && observation.kind != "invoice.updated")).then_some(fact)
}

/// Returns whether the invoice inside shows a fact, regardless of the event's type.
pub fn by_snapshot(observation: &Observation, invoice: &Invoice, fact: InvoiceFact) -> bool {
    if observation.thin || contradicts(observation, invoice) {
        return false;
    }

    let Some(status) = invoice.status.as_deref() else {
        // Before 2018-11-08 there was no `status`; such a snapshot only shows `paid`.
        return fact == InvoiceFact::Paid && invoice.paid == Some(true);
    };

    match fact {
        InvoiceFact::Finalized => match status {
            "open" => invoice.is_open(),
            "paid" | "void" | "uncollectible" => {
                invoice.finalized_at.is_some() && invoice.amount_due.is_some_and(|due| due > 0)
            }
            _ => false,
        },
        InvoiceFact::WrittenOff => {
            status == "uncollectible" || invoice.marked_uncollectible_at.is_some()
        }
        InvoiceFact::Voided => status == "void",
        InvoiceFact::Paid => status == "paid",
        InvoiceFact::AttemptRequired
        | InvoiceFact::ActionRequired
        | InvoiceFact::Overdue
        | InvoiceFact::AttemptFailed
        | InvoiceFact::FinalizationFailed => false,
    }
}

/// Returns whether the type of an event and its snapshot disagree.
///
/// Placeholder events do (`invoice.payment_failed` around a paid invoice). Then the type is the
/// claim, and only the links, the attempt count and the charge of the snapshot count.
pub fn contradicts(observation: &Observation, invoice: &Invoice) -> bool {
    match observation.kind.as_str() {
        "invoice.payment_failed"
        | "invoice.payment_action_required"
        | "invoice.payment_attempt_required"
        | "invoice.overdue"
        | "invoice.finalization_failed"
        | "invoice.marked_uncollectible" => {
            invoice.is_paid() || invoice.status.as_deref() == Some("void")
        }
        "invoice.voided" => invoice.is_paid(),
        _ => false,
    }
}

impl Invoice {
    fn is_open(&self) -> bool {
        self.status.as_deref() == Some("open")
            && self.amount_remaining.is_some_and(|remaining| remaining > 0)
    }

    /// Returns whether `invoice.finalized` holds, in shapes with and without `status`.
    fn is_owed(&self) -> bool {
        match self.status {
            Some(_) => self.is_open(),
            None => self.paid != Some(true) && self.amount_due.is_some_and(|due| due > 0),
        }
    }

    /// Returns whether the invoice is paid, in shapes with and without `status`.
    pub fn is_paid(&self) -> bool {
        match self.status.as_deref() {
            Some(status) => status == "paid",
            None => self.paid == Some(true),
        }
    }
}

impl PaymentIntent {
    /// Returns the part of a bank transfer that has arrived, in minor units.
    pub fn funded(&self) -> Option<i64> {
        self.bank_transfer_remaining
            .and_then(|remaining| self.amount?.checked_sub(remaining))
            .or(self.amount_received)
    }
}
