//! Stripe's JSON: the envelope of an event, and the few fields of its object that observations
//! need.
//!
//! serde skips all other fields. Which fields are present decides how an object is read, never
//! `api_version`.

use serde::Deserialize;
use serde_json::Value;

use super::lenient::{FromJson, Id, Lenient, Nested, NullableTime, PlainId, UnixSeconds};
use super::object::{
    Charge, CreditNote, Dispute, Invoice, InvoicePayment, Object, PaymentIntent, Reason, Refund,
};

/// The envelope of a snapshot event, of a thin event, or of an object that Stripe's API returned.
#[derive(Default, Deserialize)]
#[serde(default)]
pub struct Envelope {
    pub id: Lenient<String>,
    pub object: Lenient<String>,
    #[serde(rename = "type")]
    pub event_type: Lenient<String>,
    pub created: Lenient<Created>,
    pub fetched_at: Lenient<UnixSeconds>,
    pub api_version: Lenient<String>,
    pub account: Lenient<Id>,
    pub livemode: Lenient<bool>,
    pub snapshot_event: Lenient<String>,
    pub data: Nested<Data>,
    /// The object that a thin event points to.
    pub related_object: Nested<ObjectFields>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
pub struct Data {
    pub object: Nested<ObjectFields>,
    pub previous_attributes: Nested<PreviousAttributes>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
pub struct PreviousAttributes {
    pub status: Lenient<String>,
}

/// Unix seconds. Snapshot events contain a number; thin events contain RFC 3339 with up to
/// nanoseconds, which is truncated to the second.
#[derive(Clone, Copy)]
pub struct Created(pub i64);

impl FromJson<'_> for Created {
    fn from_integer(seconds: i64) -> Option<Created> {
        UnixSeconds::from_integer(seconds).map(|UnixSeconds(s)| Created(s))
    }

    fn from_text(text: &str) -> Option<Created> {
        let time: jiff::Timestamp = text.parse().ok()?;
        let seconds = time.as_nanosecond().div_euclid(1_000_000_000);

        Created::from_integer(i64::try_from(seconds).ok()?)
    }
}

/// Parses a body. Returns `None` if it is JSON, but not an object.
///
/// # Errors
/// Returns an error for invalid JSON or UTF-8 at any position.
pub fn parse(body: &[u8]) -> Result<Option<Envelope>, serde_json::Error> {
    let Ok(text) = std::str::from_utf8(body) else {
        // Skipped fields are not checked for UTF-8. The strict parser finds the position.
        return serde_json::from_slice::<Value>(body).map(|_| None);
    };

    // A derived struct rejects a repeated field, while JSON parsers commonly let the last one win.
    // Such a body is rewritten with its last fields and parsed again.
    parse_envelope(text).or_else(|_| {
        let value: Value = serde_json::from_str(text)?;
        parse_envelope(&value.to_string())
    })
}

fn parse_envelope(text: &str) -> Result<Option<Envelope>, serde_json::Error> {
    let Nested(envelope) = serde_json::from_str(text)?;
    Ok(envelope)
}

/// The fields of an object of any kind. The kinds share their names and types, and an event names
/// its kind only after its object: one struct for all of them reads a body in one pass.
#[derive(Default, Deserialize)]
#[serde(default)]
pub struct ObjectFields {
    pub id: Lenient<String>,
    object: Lenient<String>,
    #[serde(rename = "type")]
    credit_note_type: Lenient<String>,
    amount: Lenient<i64>,
    amount_due: Lenient<i64>,
    amount_overpaid: Lenient<i64>,
    amount_paid: Lenient<i64>,
    amount_paid_off_stripe: Lenient<i64>,
    amount_received: Lenient<i64>,
    amount_refunded: Lenient<i64>,
    amount_remaining: Lenient<i64>,
    attempt_count: Lenient<i64>,
    attempted: Lenient<bool>,
    billing: Lenient<String>,
    charge: Lenient<Id>,
    collection_method: Lenient<String>,
    created: Lenient<UnixSeconds>,
    currency: Lenient<String>,
    date: Lenient<UnixSeconds>,
    due_date: Lenient<UnixSeconds>,
    failure_code: Lenient<String>,
    failure_message: Lenient<String>,
    failure_reason: Lenient<String>,
    from_invoice: Nested<FromInvoice>,
    invoice: Lenient<Id>,
    last_finalization_error: Nested<ErrorFields>,
    last_payment_error: Nested<ErrorFields>,
    latest_charge: Lenient<Id>,
    latest_revision: Lenient<Id>,
    next_action: Nested<NextAction>,
    next_payment_attempt: Lenient<NullableTime>,
    number: Lenient<String>,
    outcome: Nested<Outcome>,
    paid: Lenient<bool>,
    paid_out_of_band: Lenient<bool>,
    payment: Nested<Payment>,
    payment_details: Nested<PaymentDetails>,
    payment_intent: Lenient<Id>,
    payments: Nested<Payments>,
    post_payment_amount: Lenient<i64>,
    reason: Lenient<String>,
    status: Lenient<String>,
    status_transitions: Nested<Transitions>,
    test_clock: Lenient<Id>,
    // Before 2019-03-14, transition times were fields of the invoice itself.
    finalized_at: Lenient<UnixSeconds>,
    marked_uncollectible_at: Lenient<UnixSeconds>,
    paid_at: Lenient<UnixSeconds>,
    voided_at: Lenient<UnixSeconds>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Transitions {
    finalized_at: Lenient<UnixSeconds>,
    marked_uncollectible_at: Lenient<UnixSeconds>,
    paid_at: Lenient<UnixSeconds>,
    voided_at: Lenient<UnixSeconds>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct FromInvoice {
    action: Lenient<String>,
    invoice: Lenient<Id>,
}

/// The fields of both of Stripe's error objects, for a payment and for a finalization.
#[derive(Default, Deserialize)]
#[serde(default)]
struct ErrorFields {
    charge: Lenient<Id>,
    code: Lenient<String>,
    decline_code: Lenient<String>,
    message: Lenient<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct NextAction {
    display_bank_transfer_instructions: Nested<BankTransfer>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct BankTransfer {
    amount_remaining: Lenient<i64>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Outcome {
    reason: Lenient<String>,
}

/// The payment that an InvoicePayment joins to its invoice.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Payment {
    charge: Lenient<Id>,
    payment_intent: Lenient<Id>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct PaymentDetails {
    order_reference: Lenient<PlainId>,
}

/// The list of InvoicePayments, present only if it was expanded.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Payments {
    data: Lenient<Vec<Nested<InvoicePaymentFields>>>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct InvoicePaymentFields {
    id: Lenient<PlainId>,
    payment: Nested<Payment>,
}

impl ObjectFields {
    /// Converts the fields of a full object. Its `object` field names its kind; without this field,
    /// the event's type does.
    ///
    /// Returns `None` for an object of another kind, and for one without an id
    /// (`invoice.upcoming`).
    pub fn into_object(self, event_type: &str, previous_status: Option<String>) -> Option<Object> {
        let id = self.valid_id()?;
        let kind = self.object.0.as_deref().unwrap_or(kind_of(event_type));

        Some(match kind {
            "invoice" => Object::Invoice(Box::new(self.into_invoice(id, previous_status))),
            "invoice_payment" => Object::InvoicePayment(self.into_invoice_payment(id)),
            "payment_intent" => Object::PaymentIntent(self.into_payment_intent(id)),
            "charge" => Object::Charge(self.into_charge(id)),
            "refund" => Object::Refund(self.into_refund(id)),
            "credit_note" => Object::CreditNote(self.into_credit_note(id)),
            "dispute" => Object::Dispute(self.into_dispute(id)),
            _ => return None,
        })
    }

    /// Returns the object that a thin event points to, with its id only.
    pub fn into_related_object(self, event_type: &str) -> Option<Object> {
        let id = self.valid_id()?;
        let fields = ObjectFields {
            id: Lenient(Some(id)),
            ..ObjectFields::default()
        };

        fields.into_object(event_type, None)
    }

    fn valid_id(&self) -> Option<String> {
        let id = self.id.0.as_deref()?;
        PlainId::from_text(id).map(|PlainId(id)| id)
    }

    fn into_invoice(self, id: String, previous_status: Option<String>) -> Invoice {
        let payments = self.payments.0.and_then(|payments| payments.data.0);
        let payments: Vec<InvoicePaymentFields> = payments
            .into_iter()
            .flatten()
            .filter_map(|Nested(payment)| payment)
            .collect();

        let transitions = self.status_transitions.0.unwrap_or_default();
        let seconds = |first: Lenient<UnixSeconds>, second: Lenient<UnixSeconds>| {
            first.0.or(second.0).map(|UnixSeconds(at)| at)
        };
        let next_attempt = self.next_payment_attempt.0.unwrap_or_default();

        Invoice {
            id,
            number: self.number.0,
            status: self.status.0,
            paid: self.paid.0,
            amount_due: self.amount_due.0,
            amount_paid: self.amount_paid.0,
            amount_remaining: self.amount_remaining.0,
            amount_overpaid: self.amount_overpaid.0,
            amount_paid_off_stripe: self.amount_paid_off_stripe.0,
            paid_out_of_band: self.paid_out_of_band.0,
            attempted: self.attempted.0,
            attempt_count: self.attempt_count.0,
            next_payment_attempt: next_attempt.at(),
            no_next_attempt: (next_attempt == NullableTime::Null).then_some(true),
            collection_method: self.collection_method.0.or(self.billing.0),
            currency: self.currency.0,
            created: seconds(self.created, self.date),
            due_date: seconds(self.due_date, Lenient(None)),
            finalized_at: seconds(transitions.finalized_at, self.finalized_at),
            paid_at: seconds(transitions.paid_at, self.paid_at),
            voided_at: seconds(transitions.voided_at, self.voided_at),
            marked_uncollectible_at: seconds(
                transitions.marked_uncollectible_at,
                self.marked_uncollectible_at,
            ),
            test_clock: self.test_clock.0.map(|_| true),
            charge: self.charge.into_text(),
            payment_intent: self.payment_intent.into_text(),
            payments: payments_named(&payments),
            invoice_payments: invoice_payment_ids(&payments),
            latest_revision: self.latest_revision.into_text(),
            from_invoice: self.from_invoice.0.and_then(FromInvoice::into_revised),
            finalization_error: self.last_finalization_error.0.and_then(ErrorFields::reason),
            previous_status,
        }
    }

    fn into_invoice_payment(self, id: String) -> InvoicePayment {
        let payment = self.payment.0.unwrap_or_default();

        InvoicePayment {
            id,
            invoice: self.invoice.into_text(),
            amount_paid: self.amount_paid.0,
            currency: self.currency.0,
            payment_intent: payment.payment_intent.into_text(),
            charge: payment.charge.into_text(),
        }
    }

    fn into_payment_intent(self, id: String) -> PaymentIntent {
        let error = self.last_payment_error.0;
        let error_charge = error
            .as_ref()
            .and_then(|error| error.charge.clone().into_text());
        let next_action = self.next_action.0.unwrap_or_default();
        let bank_transfer = next_action.display_bank_transfer_instructions.0;
        let details = self.payment_details.0.unwrap_or_default();

        PaymentIntent {
            id,
            invoice: self.invoice.into_text(),
            amount: self.amount.0,
            amount_received: self.amount_received.0,
            currency: self.currency.0,
            latest_charge: self.latest_charge.into_text(),
            error: error.map(|error| error.reason().unwrap_or_default()),
            error_charge,
            bank_transfer_remaining: bank_transfer.and_then(|transfer| transfer.amount_remaining.0),
            order_reference: details
                .order_reference
                .0
                .map(|PlainId(reference)| reference)
                .filter(|reference| is_invoice_id(reference)),
        }
    }

    fn into_charge(self, id: String) -> Charge {
        Charge {
            id,
            invoice: self.invoice.into_text(),
            payment_intent: self.payment_intent.into_text(),
            amount: self.amount.0,
            amount_refunded: self.amount_refunded.0,
            currency: self.currency.0,
            failure_code: self.failure_code.0,
            failure_message: self.failure_message.0,
            outcome_reason: self.outcome.0.and_then(|outcome| outcome.reason.0),
        }
    }

    fn into_refund(self, id: String) -> Refund {
        Refund {
            id,
            invoice: self.invoice.into_text(),
            charge: self.charge.into_text(),
            payment_intent: self.payment_intent.into_text(),
            amount: self.amount.0,
            currency: self.currency.0,
            status: self.status.0,
            failure_reason: self.failure_reason.0,
        }
    }

    fn into_credit_note(self, id: String) -> CreditNote {
        CreditNote {
            id,
            invoice: self.invoice.into_text(),
            number: self.number.0,
            amount: self.amount.0,
            currency: self.currency.0,
            status: self.status.0,
            note_type: self.credit_note_type.0,
            post_payment_amount: self.post_payment_amount.0,
            created: self.created.0.map(|UnixSeconds(at)| at),
        }
    }

    fn into_dispute(self, id: String) -> Dispute {
        Dispute {
            id,
            invoice: self.invoice.into_text(),
            charge: self.charge.into_text(),
            payment_intent: self.payment_intent.into_text(),
            amount: self.amount.0,
            currency: self.currency.0,
            status: self.status.0,
            reason: self.reason.0,
        }
    }
}

impl FromInvoice {
    /// Returns the invoice that this one revises.
    fn into_revised(self) -> Option<String> {
        let is_revision = self.action.0.as_deref() == Some("revision");
        is_revision.then(|| self.invoice.into_text()).flatten()
    }
}

impl ErrorFields {
    /// Returns the most specific code of the error, and its message.
    fn reason(self) -> Option<Reason> {
        let code = self.decline_code.0.or(self.code.0);
        let message = self.message.0;

        (code.is_some() || message.is_some()).then_some(Reason { code, message })
    }
}

/// Returns the kind of object that a type is about, such as a dispute for `charge.dispute.created`
/// and a refund for `charge.refund.updated`.
fn kind_of(event_type: &str) -> &str {
    match event_type.split_once('.') {
        Some(("charge", rest)) if rest.starts_with("dispute.") => "dispute",
        Some(("charge", rest)) if rest.starts_with("refund.") => "refund",
        Some((object, _)) => object,
        None => event_type,
    }
}

/// Returns the PaymentIntents and charges of an invoice's payments.
fn payments_named(payments: &[InvoicePaymentFields]) -> Option<Vec<String>> {
    let ids: Vec<String> = payments
        .iter()
        .filter_map(|payment| payment.payment.0.as_ref())
        .flat_map(|payment| [&payment.payment_intent, &payment.charge])
        .filter_map(|id| id.clone().into_text())
        .collect();

    (!ids.is_empty()).then_some(ids)
}

fn invoice_payment_ids(payments: &[InvoicePaymentFields]) -> Option<Vec<String>> {
    let ids: Vec<String> = payments
        .iter()
        .filter_map(|payment| payment.id.0.as_ref())
        .map(|PlainId(id)| id.clone())
        .collect();

    (!ids.is_empty()).then_some(ids)
}

/// Returns whether the text matches `^in_[A-Za-z0-9]+$`. Merchants may set an order reference to
/// any text.
fn is_invoice_id(reference: &str) -> bool {
    reference
        .strip_prefix("in_")
        .is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_alphanumeric()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_of_repeated_fields_wins() {
        let body = br#"{"id": "x", "data": {"object": {"paid": true, "paid": false}}, "id": "y"}"#;
        let envelope = parse(body).unwrap().unwrap();
        assert_eq!(envelope.id.0.as_deref(), Some("y"));

        let object = envelope.data.0.and_then(|data| data.object.0).unwrap();
        assert_eq!(object.paid.0, Some(false));
    }

    #[test]
    fn invalid_json_is_an_error_in_skipped_fields_too() {
        for body in [
            &b"{\"lines\": [1,}"[..],
            b"{\"lines\": \"\xff\"}",
            b"{\"lines\": 01}",
            b"{} x",
            b"",
            b"{\"id\": \"\n\"}",
        ] {
            assert!(parse(body).is_err(), "{:?}", String::from_utf8_lossy(body));
        }
    }

    #[test]
    fn json_that_is_not_an_object_has_no_envelope() {
        for body in [&b"[]"[..], b"[{\"id\": \"x\"}]", b"1", b"\"x\"", b"null"] {
            assert!(
                parse(body).unwrap().is_none(),
                "{:?}",
                String::from_utf8_lossy(body)
            );
        }
    }
}
