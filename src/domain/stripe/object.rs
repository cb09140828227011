//! The objects of Stripe's that say something about an invoice's payment, cut down to the fields that facts, links and
//! messages need. One struct per object; every field is optional, because every one of them is missing in some API version.
//!
//! Ids may stand as strings or as expanded objects; `null` and a value of another type count as absent.

use serde::{Deserialize, Serialize};
use serde_json::Value;

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

/// Declares a struct whose fields are all optional and left out of the stored JSON when absent.
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
        /// Until basil (2025-03-31).
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
        /// `next_payment_attempt` stands there as null: no further attempt is planned.
        no_next_attempt: bool,
        collection_method: String,
        currency: String,
        created: i64,
        due_date: i64,
        finalized_at: i64,
        paid_at: i64,
        voided_at: i64,
        marked_uncollectible_at: i64,
        /// Under a test clock: object times are simulated.
        test_clock: bool,
        charge: String,
        payment_intent: String,
        /// PaymentIntents and charges that `payments.data` names.
        payments: Vec<String>,
        /// The InvoicePayments there.
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
        /// `last_payment_error` is there, with or without a charge.
        error: Reason,
        error_charge: String,
        bank_transfer_remaining: i64,
        /// Only when it looks like an invoice id.
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

/// Why a payment failed, as Stripe says it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Reason {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

impl Object {
    /// Reads a full object. Its own `object` field says what it is; without one, the event's type does.
    /// None: no object that we read, or one without an id (`invoice.upcoming`).
    pub fn read(kind: &str, json: &Value, previous: Option<&Value>) -> Option<Object> {
        let id = id_at(json, "id")?;
        let name = text(json, "object");
        Some(match name.as_deref().unwrap_or(object_of(kind)) {
            "invoice" => Object::Invoice(Box::new(invoice(id, json, previous))),
            "invoice_payment" => Object::InvoicePayment(invoice_payment(id, json)),
            "payment_intent" => Object::PaymentIntent(payment_intent(id, json)),
            "charge" => Object::Charge(charge(id, json)),
            "refund" => Object::Refund(refund(id, json)),
            "credit_note" => Object::CreditNote(credit_note(id, json)),
            "dispute" => Object::Dispute(dispute(id, json)),
            _ => return None,
        })
    }

    /// The object that a thin event points to: its id is all that is known of it.
    pub fn named(kind: &str, related: &Value) -> Option<Object> {
        let id = id_at(related, "id")?;
        Some(match object_of(kind) {
            "invoice" => Object::Invoice(Box::new(Invoice {
                id,
                ..Default::default()
            })),
            "invoice_payment" => Object::InvoicePayment(InvoicePayment {
                id,
                ..Default::default()
            }),
            "payment_intent" => Object::PaymentIntent(PaymentIntent {
                id,
                ..Default::default()
            }),
            "charge" => Object::Charge(Charge {
                id,
                ..Default::default()
            }),
            "refund" => Object::Refund(Refund {
                id,
                ..Default::default()
            }),
            "credit_note" => Object::CreditNote(CreditNote {
                id,
                ..Default::default()
            }),
            "dispute" => Object::Dispute(Dispute {
                id,
                ..Default::default()
            }),
            _ => return None,
        })
    }

    /// Ids of the objects named, the object's own first; `true` for an invoice's.
    pub fn names(&self) -> Vec<(&str, bool)> {
        fn all<'a>(
            objects: &[Option<&'a String>],
            invoices: &[Option<&'a String>],
        ) -> Vec<(&'a str, bool)> {
            let named = |ids: &[Option<&'a String>], is_invoice| {
                ids.iter()
                    .flatten()
                    .map(|id| (id.as_str(), is_invoice))
                    .collect::<Vec<_>>()
            };
            [named(objects, false), named(invoices, true)].concat()
        }
        match self {
            Object::Invoice(o) => {
                let mut names = vec![(o.id.as_str(), true)];
                names.extend(
                    o.payments_named()
                        .chain(o.invoice_payments.iter().flatten().map(String::as_str))
                        .map(|id| (id, false)),
                );
                names
            }
            Object::InvoicePayment(o) => all(
                &[Some(&o.id), o.payment_intent.as_ref(), o.charge.as_ref()],
                &[o.invoice.as_ref()],
            ),
            Object::PaymentIntent(o) => all(
                &[
                    Some(&o.id),
                    o.latest_charge.as_ref(),
                    o.error_charge.as_ref(),
                ],
                &[o.invoice.as_ref(), o.order_reference.as_ref()],
            ),
            Object::Charge(o) => all(
                &[Some(&o.id), o.payment_intent.as_ref()],
                &[o.invoice.as_ref()],
            ),
            Object::Refund(o) => all(
                &[Some(&o.id), o.charge.as_ref(), o.payment_intent.as_ref()],
                &[o.invoice.as_ref()],
            ),
            Object::Dispute(o) => all(
                &[Some(&o.id), o.charge.as_ref(), o.payment_intent.as_ref()],
                &[o.invoice.as_ref()],
            ),
            Object::CreditNote(o) => all(&[Some(&o.id)], &[o.invoice.as_ref()]),
        }
    }
}

impl Invoice {
    /// PaymentIntents and charges that this invoice names as its own.
    pub fn payments_named(&self) -> impl Iterator<Item = &str> {
        self.payment_intent
            .iter()
            .chain(&self.charge)
            .chain(self.payments.iter().flatten())
            .map(String::as_str)
    }
}

/// `charge.dispute.created` is about a dispute, `charge.refund.updated` about a refund.
fn object_of(kind: &str) -> &str {
    match kind.split_once('.') {
        Some(("charge", rest)) if rest.starts_with("dispute.") => "dispute",
        Some(("charge", rest)) if rest.starts_with("refund.") => "refund",
        Some((object, _)) => object,
        None => kind,
    }
}

fn invoice(id: String, json: &Value, previous: Option<&Value>) -> Invoice {
    // Transition times stood on the invoice itself before 2019-03-14.
    let transitions = json.get("status_transitions").unwrap_or(&Value::Null);
    let transition = |name| time(transitions, name).or_else(|| time(json, name));
    let revised = json
        .get("from_invoice")
        .filter(|f| text(f, "action").as_deref() == Some("revision"));
    Invoice {
        id,
        number: text(json, "number"),
        status: text(json, "status"),
        paid: boolean(json, "paid"),
        amount_due: whole(json, "amount_due"),
        amount_paid: whole(json, "amount_paid"),
        amount_remaining: whole(json, "amount_remaining"),
        amount_overpaid: whole(json, "amount_overpaid"),
        amount_paid_off_stripe: whole(json, "amount_paid_off_stripe"),
        paid_out_of_band: boolean(json, "paid_out_of_band"),
        attempted: boolean(json, "attempted"),
        attempt_count: whole(json, "attempt_count"),
        next_payment_attempt: time(json, "next_payment_attempt"),
        no_next_attempt: json
            .get("next_payment_attempt")
            .filter(|v| v.is_null())
            .map(|_| true),
        collection_method: text(json, "collection_method").or_else(|| text(json, "billing")),
        currency: text(json, "currency"),
        created: time(json, "created").or_else(|| time(json, "date")),
        due_date: time(json, "due_date"),
        finalized_at: transition("finalized_at"),
        paid_at: transition("paid_at"),
        voided_at: transition("voided_at"),
        marked_uncollectible_at: transition("marked_uncollectible_at"),
        test_clock: id_of(json, "test_clock").map(|_| true),
        charge: id_of(json, "charge"),
        payment_intent: id_of(json, "payment_intent"),
        payments: payments(json),
        invoice_payments: invoice_payments(json),
        latest_revision: id_of(json, "latest_revision"),
        from_invoice: revised.and_then(|f| id_of(f, "invoice")),
        finalization_error: json.get("last_finalization_error").and_then(reason),
        previous_status: previous.and_then(|p| text(p, "status")),
    }
}

fn invoice_payments(json: &Value) -> Option<Vec<String>> {
    let ids: Vec<String> = json
        .pointer("/payments/data")?
        .as_array()?
        .iter()
        .filter_map(|p| id_at(p, "id"))
        .collect();
    (!ids.is_empty()).then_some(ids)
}

/// `payments` is a list of InvoicePayments, there only when expanded.
fn payments(json: &Value) -> Option<Vec<String>> {
    let named = json
        .pointer("/payments/data")?
        .as_array()?
        .iter()
        .filter_map(|p| p.get("payment"));
    let ids: Vec<String> = named
        .flat_map(|p| [id_of(p, "payment_intent"), id_of(p, "charge")])
        .flatten()
        .collect();
    (!ids.is_empty()).then_some(ids)
}

fn invoice_payment(id: String, json: &Value) -> InvoicePayment {
    let payment = json.get("payment").unwrap_or(&Value::Null);
    InvoicePayment {
        id,
        invoice: id_of(json, "invoice"),
        amount_paid: whole(json, "amount_paid"),
        currency: text(json, "currency"),
        payment_intent: id_of(payment, "payment_intent"),
        charge: id_of(payment, "charge"),
    }
}

fn payment_intent(id: String, json: &Value) -> PaymentIntent {
    let error = json.get("last_payment_error").filter(|e| e.is_object());
    PaymentIntent {
        id,
        invoice: id_of(json, "invoice"),
        amount: whole(json, "amount"),
        amount_received: whole(json, "amount_received"),
        currency: text(json, "currency"),
        latest_charge: id_of(json, "latest_charge"),
        error: error.map(|e| reason(e).unwrap_or_default()),
        error_charge: error.and_then(|e| id_of(e, "charge")),
        bank_transfer_remaining: json
            .pointer("/next_action/display_bank_transfer_instructions")
            .and_then(|b| whole(b, "amount_remaining")),
        order_reference: json
            .get("payment_details")
            .and_then(|d| id_at(d, "order_reference"))
            .filter(|r| is_invoice_id(r)),
    }
}

/// `^in_[A-Za-z0-9]+$`: merchants may set an order reference to anything.
fn is_invoice_id(reference: &str) -> bool {
    reference
        .strip_prefix("in_")
        .is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_alphanumeric()))
}

fn charge(id: String, json: &Value) -> Charge {
    Charge {
        id,
        invoice: id_of(json, "invoice"),
        payment_intent: id_of(json, "payment_intent"),
        amount: whole(json, "amount"),
        amount_refunded: whole(json, "amount_refunded"),
        currency: text(json, "currency"),
        failure_code: text(json, "failure_code"),
        failure_message: text(json, "failure_message"),
        outcome_reason: json.get("outcome").and_then(|o| text(o, "reason")),
    }
}

fn refund(id: String, json: &Value) -> Refund {
    Refund {
        id,
        invoice: id_of(json, "invoice"),
        charge: id_of(json, "charge"),
        payment_intent: id_of(json, "payment_intent"),
        amount: whole(json, "amount"),
        currency: text(json, "currency"),
        status: text(json, "status"),
        failure_reason: text(json, "failure_reason"),
    }
}

fn credit_note(id: String, json: &Value) -> CreditNote {
    CreditNote {
        id,
        invoice: id_of(json, "invoice"),
        number: text(json, "number"),
        amount: whole(json, "amount"),
        currency: text(json, "currency"),
        status: text(json, "status"),
        note_type: text(json, "type"),
        post_payment_amount: whole(json, "post_payment_amount"),
        created: time(json, "created"),
    }
}

fn dispute(id: String, json: &Value) -> Dispute {
    Dispute {
        id,
        invoice: id_of(json, "invoice"),
        charge: id_of(json, "charge"),
        payment_intent: id_of(json, "payment_intent"),
        amount: whole(json, "amount"),
        currency: text(json, "currency"),
        status: text(json, "status"),
        reason: text(json, "reason"),
    }
}

/// The most telling code that an error object has, and its message.
fn reason(error: &Value) -> Option<Reason> {
    let code = text(error, "decline_code").or_else(|| text(error, "code"));
    let message = text(error, "message");
    (code.is_some() || message.is_some()).then_some(Reason { code, message })
}

/// A non-empty string. One with a NUL counts as absent: no id or text of Stripe's has one, and PostgreSQL cannot store it.
pub(in crate::domain) fn text(json: &Value, name: &str) -> Option<String> {
    json.get(name)?
        .as_str()
        .filter(|s| !s.is_empty() && !s.contains('\0'))
        .map(str::to_owned)
}

/// Bytes of an id at most. Stripe's have no more; a longer one counts as absent, and no index of PostgreSQL's would take it.
const LONGEST_ID: usize = 255;

fn id_at(json: &Value, name: &str) -> Option<String> {
    text(json, name).filter(|id| id.len() <= LONGEST_ID)
}

/// `"x": "id"`, or expanded: `"x": {"id": "id", ...}`.
pub(in crate::domain) fn id_of(json: &Value, name: &str) -> Option<String> {
    match json.get(name)? {
        object @ Value::Object(_) => id_at(object, "id"),
        _ => id_at(json, name),
    }
}

pub(in crate::domain) fn boolean(json: &Value, name: &str) -> Option<bool> {
    json.get(name)?.as_bool()
}

/// A whole number; `2500.0` is one.
pub(in crate::domain) fn whole(json: &Value, name: &str) -> Option<i64> {
    let number = json.get(name)?.as_number()?;
    let exact = |f: f64| (f.fract() == 0.0 && f.abs() < 9e15).then_some(f as i64);
    number
        .as_i64()
        .or_else(|| number.as_f64().filter(|_| !number.is_u64()).and_then(exact))
}

/// A time within the years that can be shown.
fn time(json: &Value, name: &str) -> Option<i64> {
    whole(json, name).filter(|s| (0..=crate::domain::time::LAST_SECOND).contains(s))
}
