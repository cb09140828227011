//! Stripe's objects that concern an invoice's payment, reduced to the fields that facts, links and
//! messages need.
//!
//! One struct per object. Every field is optional, because each is missing in some API version.
//! `payload` reads them from Stripe's JSON; their own JSON form is what the store keeps.

use serde::{Deserialize, Serialize};

/// An object at Stripe, reduced to the fields that matter to a payment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "object", rename_all = "snake_case")]
pub enum Object {
    Invoice(Box<Invoice>),
    InvoicePayment(InvoicePayment),
    PaymentIntent(PaymentIntent),
    Charge(Charge),
    Refund(Refund),
    CreditNote(CreditNote),
    Dispute(Dispute),
}

/// Declares a struct whose fields are all optional, and absent from the stored JSON when they are
/// `None`.
macro_rules! sparse {
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
        #[serde(default)]
        pub struct $name {
            pub id: String,
            $($(#[$field_doc])* #[serde(skip_serializing_if = "Option::is_none")] pub $field: Option<$type>,)*
        }
    };
}

sparse! {
    /// Amounts in minor units, times in Unix seconds.
    Invoice {
        number: String,
        status: String,
        /// Present in API versions before 2025-03-31.basil.
        paid: bool,
        amount_due: i64,
        amount_paid: i64,
        amount_remaining: i64,
        amount_overpaid: i64,
        amount_paid_off_stripe: i64,
        paid_out_of_band: bool,
        attempted: bool,
        attempt_count: i64,
        next_payment_attempt: i64,
        /// `true` if `next_payment_attempt` is present as null, so no further attempt is planned.
        no_next_attempt: bool,
        collection_method: String,
        currency: String,
        created: i64,
        due_date: i64,
        finalized_at: i64,
        paid_at: i64,
        voided_at: i64,
        marked_uncollectible_at: i64,
        /// The test clock, if any. Under it, the times of the object are simulated.
        test_clock: bool,
        charge: String,
        payment_intent: String,
        /// PaymentIntents and charges of `payments.data`.
        payments: Vec<String>,
        /// Ids of `payments.data`.
        invoice_payments: Vec<String>,
        latest_revision: String,
        from_invoice: String,
        finalization_error: Reason,
        previous_status: String,
    }
}

sparse! {
    InvoicePayment {
        invoice: String,
        amount_paid: i64,
        currency: String,
        payment_intent: String,
        charge: String,
    }
}

sparse! {
    PaymentIntent {
        invoice: String,
        amount: i64,
        amount_received: i64,
        currency: String,
        latest_charge: String,
        /// `last_payment_error`, with or without a charge.
        error: Reason,
        error_charge: String,
        bank_transfer_remaining: i64,
        /// Present only if it looks like an invoice id.
        order_reference: String,
    }
}

sparse! {
    Charge {
        invoice: String,
        payment_intent: String,
        amount: i64,
        amount_refunded: i64,
        currency: String,
        failure_code: String,
        failure_message: String,
        outcome_reason: String,
    }
}

sparse! {
    Refund {
        invoice: String,
        charge: String,
        payment_intent: String,
        amount: i64,
        currency: String,
        status: String,
        failure_reason: String,
    }
}

sparse! {
    CreditNote {
        invoice: String,
        number: String,
        amount: i64,
        currency: String,
        status: String,
        note_type: String,
        post_payment_amount: i64,
        created: i64,
    }
}

sparse! {
    Dispute {
        invoice: String,
        charge: String,
        payment_intent: String,
        amount: i64,
        currency: String,
        status: String,
        reason: String,
    }
}

/// Stripe's reason for a failed payment or finalization.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Reason {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

impl Object {
    /// Returns the ids of all objects that this one names, its own first; `true` marks the id of an
    /// invoice.
    pub fn names(&self) -> Vec<(&str, bool)> {
        match self {
            Object::Invoice(o) => {
                let invoice_payments = o.invoice_payments.iter().flatten().map(String::as_str);
                let payments = o.payments_named().chain(invoice_payments);
                let own = std::iter::once((o.id.as_str(), true));
                own.chain(payments.map(|id| (id, false))).collect()
            }
            Object::InvoicePayment(o) => with_kind(
                [Some(&o.id), o.payment_intent.as_ref(), o.charge.as_ref()],
                [&o.invoice],
            ),
            Object::PaymentIntent(o) => with_kind(
                [
                    Some(&o.id),
                    o.latest_charge.as_ref(),
                    o.error_charge.as_ref(),
                ],
                [&o.invoice, &o.order_reference],
            ),
            Object::Charge(o) => with_kind([Some(&o.id), o.payment_intent.as_ref()], [&o.invoice]),
            Object::Refund(o) => with_kind(
                [Some(&o.id), o.charge.as_ref(), o.payment_intent.as_ref()],
                [&o.invoice],
            ),
            Object::Dispute(o) => with_kind(
                [Some(&o.id), o.charge.as_ref(), o.payment_intent.as_ref()],
                [&o.invoice],
            ),
            Object::CreditNote(o) => with_kind([Some(&o.id)], [&o.invoice]),
        }
    }
}

fn with_kind<'a, const N: usize, const M: usize>(
    objects: [Option<&'a String>; N],
    invoices: [&'a Option<String>; M],
) -> Vec<(&'a str, bool)> {
    let objects = objects.into_iter().flatten().map(|id| (id.as_str(), false));
    let invoices = invoices.into_iter().flatten().map(|id| (id.as_str(), true));

    objects.chain(invoices).collect()
}

impl Object {
    /// Returns the invoice that Stripe itself names in this object; an invoice names itself.
    ///
    /// `order_reference` does not count, because any merchant can set it to any text.
    pub fn named_invoice(&self) -> Option<&str> {
        match self {
            Object::Invoice(o) => Some(&o.id),
            Object::InvoicePayment(o) => o.invoice.as_deref(),
            Object::PaymentIntent(o) => o.invoice.as_deref(),
            Object::Charge(o) => o.invoice.as_deref(),
            Object::Refund(o) => o.invoice.as_deref(),
            Object::CreditNote(o) => o.invoice.as_deref(),
            Object::Dispute(o) => o.invoice.as_deref(),
        }
    }
}

impl Invoice {
    /// Returns the PaymentIntents and charges that this invoice names as its own.
    pub fn payments_named(&self) -> impl Iterator<Item = &str> {
        self.payment_intent
            .iter()
            .chain(&self.charge)
            .chain(self.payments.iter().flatten())
            .map(String::as_str)
    }
}
