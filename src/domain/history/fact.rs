//! Which facts one telling tells: the table of `README.md`, section "What becomes of an event", row by row.
//!
//! A fact can be told by an event's *type* (the claim), by the *snapshot* of the invoice inside (the evidence), or by both.
//! Only one telling is looked at here. What several tellings of one invoice make together is `history`.

use crate::domain::stripe::event::{Event, Observation};
use crate::domain::stripe::object::{Invoice, Object};

/// A fact about an invoice that can be told by the invoice's own events.
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

/// The facts that are told once, and of which snapshots are evidence.
pub const SHOWN_BY_SNAPSHOTS: [InvoiceFact; 4] = [
    InvoiceFact::Finalized,
    InvoiceFact::WrittenOff,
    InvoiceFact::Voided,
    InvoiceFact::Paid,
];

/// The types that tell facts by themselves: what a webhook endpoint should send.
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

/// Does this event tell anything about a payment: new or not, linked or not? Decides `recorded` against `no_payment_fact`.
pub fn asserts_fact(event: &Event) -> bool {
    let kind = event
        .event_type
        .strip_prefix("v1.")
        .unwrap_or(&event.event_type);
    is_about_returned_money(kind) || event.telling.as_ref().is_some_and(tells)
}

/// Money returned or contested: always worth an entry, whatever the object says.
fn is_about_returned_money(kind: &str) -> bool {
    kind == "charge.refunded"
        || kind == "charge.refund.updated"
        || ["refund.", "credit_note.", "charge.dispute."]
            .iter()
            .any(|prefix| kind.starts_with(prefix))
}

fn tells(telling: &Observation) -> bool {
    match (&telling.object, telling.kind.as_str()) {
        (Object::Invoice(invoice), _) => {
            by_type(telling, invoice).is_some()
                || SHOWN_BY_SNAPSHOTS
                    .into_iter()
                    .any(|fact| by_snapshot(telling, invoice, fact))
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

/// What the type of an invoice's event claims, where its condition on the snapshot holds. A thin event has no snapshot:
/// its type is taken at its word.
pub fn by_type(telling: &Observation, invoice: &Invoice) -> Option<InvoiceFact> {
    let (fact, holds) = match telling.kind.as_str() {
        "invoice.finalized" => (InvoiceFact::Finalized, invoice.is_owed()),
        "invoice.updated" => (
            InvoiceFact::Finalized,
            !telling.thin
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
    (holds || (telling.thin && telling.kind != "invoice.updated")).then_some(fact)
}

/// What the invoice inside shows, whatever the event's type says.
pub fn by_snapshot(telling: &Observation, invoice: &Invoice, fact: InvoiceFact) -> bool {
    if telling.thin || contradicts(telling, invoice) {
        return false;
    }
    let Some(status) = invoice.status.as_deref() else {
        // Before 2018-11-08 there was no `status`, and all that a snapshot tells is `paid`.
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
        _ => false,
    }
}

/// Placeholder events contradict themselves (`invoice.payment_failed` around a paid invoice). Then the type is the claim, and
/// of the snapshot only its links, its attempt count and its charge are believed.
pub fn contradicts(telling: &Observation, invoice: &Invoice) -> bool {
    match telling.kind.as_str() {
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

    /// What `invoice.finalized` needs to see, in shapes with and without `status`.
    fn is_owed(&self) -> bool {
        match self.status {
            Some(_) => self.is_open(),
            None => self.paid != Some(true) && self.amount_due.is_some_and(|due| due > 0),
        }
    }

    pub fn is_paid(&self) -> bool {
        match self.status.as_deref() {
            Some(status) => status == "paid",
            None => self.paid == Some(true),
        }
    }
}

impl crate::domain::stripe::object::PaymentIntent {
    /// How much of a bank transfer has arrived, in minor units.
    pub fn funded(&self) -> Option<i64> {
        let arrived = |remaining| self.amount.and_then(|amount| amount.checked_sub(remaining));
        self.bank_transfer_remaining
            .and_then(arrived)
            .or(self.amount_received)
    }
}
