//! Stripe's objects: the state of each, and its rendering in each version of the API.
//!
//! The state has no version; a rendering has one. An event keeps the state of its moment and is
//! rendered for the endpoint's version when it is delivered, or for the account's version when it
//! is listed. A requested object is rendered for the requested version.

use serde_json::{Value, json};

/// Version in which payments name their invoice.
pub const OLD: &str = "2022-11-15";
/// Version in which payments name no invoice.
pub const BASIL: &str = "2025-03-31.basil";
/// Version in which PaymentIntents have an order reference that names the invoice.
pub const CLOVER: &str = "2025-11-17.clover";
/// Version in which invoices state the amount paid outside Stripe (since 2026-05-27).
pub const ENDIVE: &str = "2026-09-30.endive";

#[derive(Clone, Debug)]
pub enum Object {
    Invoice(Invoice),
    InvoicePayment(InvoicePayment),
    PaymentIntent(PaymentIntent),
    Charge(Charge),
    Refund(Refund),
    CreditNote(CreditNote),
    Dispute(Dispute),
}

#[derive(Clone, Debug)]
pub struct Invoice {
    pub id: String,
    pub number: String,
    pub currency: &'static str,
    pub livemode: bool,
    /// Whether the invoice is sent to the customer rather than charged automatically.
    pub sent: bool,
    pub status: &'static str,
    pub due: i64,
    pub paid: i64,
    pub paid_outside: i64,
    pub overpaid: i64,
    pub attempts: i64,
    pub attempted: bool,
    pub created: i64,
    pub due_date: Option<i64>,
    pub next_attempt: Option<i64>,
    pub finalized_at: Option<i64>,
    pub paid_at: Option<i64>,
    pub voided_at: Option<i64>,
    pub written_off_at: Option<i64>,
    pub intent: Option<String>,
    pub charge: Option<String>,
}

#[derive(Clone, Debug)]
pub struct InvoicePayment {
    pub id: String,
    pub invoice: String,
    pub intent: String,
    pub requested: i64,
    pub paid: Option<i64>,
    pub currency: &'static str,
    pub livemode: bool,
    pub created: i64,
    pub paid_at: Option<i64>,
}

#[derive(Clone, Debug)]
pub struct PaymentIntent {
    pub id: String,
    pub invoice: String,
    /// Order reference. It is the invoice's id unless the merchant sets it.
    pub order_reference: String,
    pub amount: i64,
    pub currency: &'static str,
    pub livemode: bool,
    pub status: &'static str,
    pub created: i64,
    pub latest_charge: Option<String>,
    pub error: Option<Decline>,
    pub cancellation_reason: Option<&'static str>,
}

/// Reason of a failed charge.
#[derive(Clone, Debug)]
pub struct Decline {
    pub charge: String,
    pub code: &'static str,
    pub decline_code: &'static str,
    pub message: &'static str,
}

#[derive(Clone, Debug)]
pub struct Charge {
    pub id: String,
    pub invoice: String,
    pub intent: String,
    pub amount: i64,
    pub refunded: i64,
    pub currency: &'static str,
    pub livemode: bool,
    pub status: &'static str,
    pub created: i64,
    pub failure: Option<Decline>,
}

#[derive(Clone, Debug)]
pub struct Refund {
    pub id: String,
    pub charge: String,
    pub intent: String,
    pub amount: i64,
    pub currency: &'static str,
    pub status: &'static str,
    pub created: i64,
}

#[derive(Clone, Debug)]
pub struct CreditNote {
    pub id: String,
    pub number: String,
    pub invoice: String,
    pub amount: i64,
    pub currency: &'static str,
    pub livemode: bool,
    pub created: i64,
}

#[derive(Clone, Debug)]
pub struct Dispute {
    pub id: String,
    pub charge: String,
    pub intent: String,
    pub amount: i64,
    pub currency: &'static str,
    pub livemode: bool,
    pub status: &'static str,
    pub created: i64,
}

impl Object {
    pub fn id(&self) -> &str {
        match self {
            Object::Invoice(o) => &o.id,
            Object::InvoicePayment(o) => &o.id,
            Object::PaymentIntent(o) => &o.id,
            Object::Charge(o) => &o.id,
            Object::Refund(o) => &o.id,
            Object::CreditNote(o) => &o.id,
            Object::Dispute(o) => &o.id,
        }
    }

    pub fn created(&self) -> i64 {
        match self {
            Object::Invoice(o) => o.created,
            Object::InvoicePayment(o) => o.created,
            Object::PaymentIntent(o) => o.created,
            Object::Charge(o) => o.created,
            Object::Refund(o) => o.created,
            Object::CreditNote(o) => o.created,
            Object::Dispute(o) => o.created,
        }
    }

    /// Returns the value of the field `object`. With an `s` it is the name in URLs.
    pub fn name(&self) -> &'static str {
        match self {
            Object::Invoice(_) => "invoice",
            Object::InvoicePayment(_) => "invoice_payment",
            Object::PaymentIntent(_) => "payment_intent",
            Object::Charge(_) => "charge",
            Object::Refund(_) => "refund",
            Object::CreditNote(_) => "credit_note",
            Object::Dispute(_) => "dispute",
        }
    }

    pub fn render(&self, version: &str) -> Value {
        match self {
            Object::Invoice(o) => invoice(o, version),
            Object::InvoicePayment(o) => invoice_payment(o),
            Object::PaymentIntent(o) => payment_intent(o, version),
            Object::Charge(o) => charge(o, version),
            Object::Refund(o) => refund(o),
            Object::CreditNote(o) => credit_note(o, version),
            Object::Dispute(o) => dispute(o),
        }
    }
}

/// Returns whether payments and invoices no longer name each other, as since basil.
fn is_new(version: &str) -> bool {
    version >= "2025-03-31"
}

fn add(object: &mut Value, fields: Value) {
    let (Value::Object(object), Value::Object(fields)) = (object, fields) else {
        unreachable!("both are objects")
    };
    object.extend(fields);
}

fn invoice(o: &Invoice, version: &str) -> Value {
    let remaining = if o.status == "paid" {
        0
    } else {
        o.due - o.paid
    };
    let collection = if o.sent {
        "send_invoice"
    } else {
        "charge_automatically"
    };
    let line = json!({"id": o.id.replace("in_", "il_"), "object": "line_item", "amount": o.due, "currency": o.currency, "description": "Core hours",
        "invoice": o.id, "livemode": o.livemode, "period": {"start": o.created - 86_400, "end": o.created}, "quantity": 1});
    let mut shown = json!({
        "id": o.id, "object": "invoice", "account_country": "US", "account_name": "Cluster Billing Inc", "amount_due": o.due, "amount_paid": o.paid,
        "amount_remaining": remaining, "amount_shipping": 0, "application": null, "attempt_count": o.attempts, "attempted": o.attempted,
        "auto_advance": o.status == "open", "billing_reason": "manual", "collection_method": collection, "created": o.created,
        "currency": o.currency, "customer": "cus_Fake", "customer_email": "billing@example.com", "customer_name": "Acme Clusters",
        "default_payment_method": null, "description": null, "discounts": [], "due_date": o.due_date, "effective_at": o.finalized_at,
        "ending_balance": o.finalized_at.map(|_| 0), "from_invoice": null, "hosted_invoice_url": "https://invoice.stripe.com/i/acct_1Fake/live_x?s=ap",
        "last_finalization_error": null, "latest_revision": null,
    });

    add(
        &mut shown,
        json!({
            "lines": {"object": "list", "data": [line], "has_more": false, "total_count": 1, "url": format!("/v1/invoices/{}/lines", o.id)},
            "livemode": o.livemode, "metadata": {}, "next_payment_attempt": o.next_attempt, "number": o.finalized_at.map(|_| &o.number),
            "on_behalf_of": null, "period_end": o.created, "period_start": o.created - 86_400, "post_payment_credit_notes_amount": 0,
            "pre_payment_credit_notes_amount": 0, "starting_balance": 0, "status": o.status,
            "status_transitions": {"finalized_at": o.finalized_at, "marked_uncollectible_at": o.written_off_at, "paid_at": o.paid_at,
                "voided_at": o.voided_at},
            "subtotal": o.due, "test_clock": null, "total": o.due, "webhooks_delivered_at": o.created,
        }),
    );
    if is_new(version) {
        add(
            &mut shown,
            json!({"amount_overpaid": o.overpaid, "confirmation_secret": null, "parent": null, "total_taxes": []}),
        );
        if version >= "2026-05-27" {
            add(
                &mut shown,
                json!({"amount_paid_off_stripe": o.paid_outside}),
            );
        }
    } else {
        let outside = o.paid_outside > 0;
        add(
            &mut shown,
            json!({"charge": o.charge, "paid": o.status == "paid", "paid_out_of_band": outside, "payment_intent": o.intent,
            "quote": null, "subscription": null, "tax": null}),
        );
        if outside {
            add(&mut shown, json!({"amount_paid": o.paid - o.paid_outside}));
        }
    }

    shown
}

fn invoice_payment(o: &InvoicePayment) -> Value {
    let status = if o.paid.is_some() { "paid" } else { "open" };
    json!({"id": o.id, "object": "invoice_payment", "amount_paid": o.paid, "amount_requested": o.requested, "created": o.created,
        "currency": o.currency, "invoice": o.invoice, "is_default": true, "livemode": o.livemode,
        "payment": {"payment_intent": o.intent, "type": "payment_intent"}, "status": status,
        "status_transitions": {"canceled_at": null, "paid_at": o.paid_at}})
}

fn payment_intent(o: &PaymentIntent, version: &str) -> Value {
    let error = o.error.as_ref().map(|e| {
        json!({"advice_code": "try_again_later", "charge": e.charge, "code": e.code, "decline_code": e.decline_code,
            "doc_url": format!("https://stripe.com/docs/error-codes/{}", e.code), "message": e.message, "type": "card_error"})
    });
    let received = if o.status == "succeeded" { o.amount } else { 0 };
    let mut shown = json!({
        "id": o.id, "object": "payment_intent", "amount": o.amount, "amount_capturable": 0, "amount_received": received,
        "canceled_at": o.cancellation_reason.map(|_| o.created), "cancellation_reason": o.cancellation_reason, "capture_method": "automatic",
        "client_secret": format!("{}_secret_Fake", o.id), "confirmation_method": "automatic", "created": o.created, "currency": o.currency,
        "customer": "cus_Fake", "description": "Payment for Invoice", "last_payment_error": error, "latest_charge": o.latest_charge,
        "livemode": o.livemode, "metadata": {}, "next_action": null, "payment_method_types": ["card", "us_bank_account"], "status": o.status,
    });

    if !is_new(version) {
        add(&mut shown, json!({"invoice": o.invoice}));
    } else if version >= "2025-10-29" {
        add(
            &mut shown,
            json!({"payment_details": {"customer_reference": null, "order_reference": o.order_reference}}),
        );
    }

    shown
}

fn charge(o: &Charge, version: &str) -> Value {
    let succeeded = o.status == "succeeded";
    let failure = o.failure.as_ref();
    let outcome = match failure {
        Some(failure) => {
            json!({"advice_code": "try_again_later", "network_status": "declined_by_network", "reason": failure.decline_code,
            "risk_level": "normal", "seller_message": "The bank did not return any further details.", "type": "issuer_declined"})
        }
        None => {
            json!({"network_status": "approved_by_network", "reason": null, "risk_level": "normal",
            "seller_message": "Payment complete.", "type": "authorized"})
        }
    };
    let mut shown = json!({
        "id": o.id, "object": "charge", "amount": o.amount, "amount_captured": if succeeded { o.amount } else { 0 },
        "amount_refunded": o.refunded, "captured": succeeded, "created": o.created, "currency": o.currency, "customer": "cus_Fake",
        "description": "Payment for Invoice", "disputed": false, "failure_code": failure.map(|f| f.code),
        "failure_message": failure.map(|f| f.message), "livemode": o.livemode, "metadata": {}, "outcome": outcome, "paid": succeeded,
        "payment_intent": o.intent, "payment_method": "pm_1Fake", "refunded": o.refunded == o.amount, "status": o.status,
    });

    if !is_new(version) {
        add(&mut shown, json!({"invoice": o.invoice}));
    }

    shown
}

fn refund(o: &Refund) -> Value {
    json!({"id": o.id, "object": "refund", "amount": o.amount, "balance_transaction": "txn_3Fake", "charge": o.charge, "created": o.created,
        "currency": o.currency, "failure_reason": null, "metadata": {}, "payment_intent": o.intent, "reason": "requested_by_customer",
        "status": o.status})
}

fn credit_note(o: &CreditNote, version: &str) -> Value {
    let mut shown = json!({
        "id": o.id, "object": "credit_note", "amount": o.amount, "created": o.created, "currency": o.currency, "customer": "cus_Fake",
        "invoice": o.invoice, "lines": {"object": "list", "data": [], "has_more": false, "url": format!("/v1/credit_notes/{}/lines", o.id)},
        "livemode": o.livemode, "memo": null, "metadata": {}, "number": o.number, "out_of_band_amount": o.amount,
        "post_payment_amount": o.amount, "pre_payment_amount": 0, "reason": "order_change", "status": "issued", "subtotal": o.amount,
        "total": o.amount, "type": "post_payment", "voided_at": null,
    });
    add(
        &mut shown,
        if is_new(version) {
            json!({"refunds": []})
        } else {
            json!({"refund": null})
        },
    );

    shown
}

fn dispute(o: &Dispute) -> Value {
    json!({"id": o.id, "object": "dispute", "amount": o.amount, "balance_transactions": [], "charge": o.charge, "created": o.created,
        "currency": o.currency, "evidence": {}, "is_charge_refundable": false, "livemode": o.livemode, "metadata": {},
        "network_reason_code": "10.4", "payment_intent": o.intent, "reason": "fraudulent", "status": o.status})
}
