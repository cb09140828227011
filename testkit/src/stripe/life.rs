//! The life of an invoice at Stripe.
//!
//! Each method is something that happens: it changes the objects and generates the events that
//! Stripe would, several of them in the same second.

use serde_json::{Value, json};

use super::objects::{
    Charge, CreditNote, Decline, Dispute, Invoice, InvoicePayment, Object, PaymentIntent, Refund,
};
use super::{Event, Stripe};

pub const HOUR: i64 = 3600;
pub const DAY: i64 = 86_400;

/// Terms of an invoice, fixed before its life begins.
#[derive(Clone, Debug)]
pub struct Terms {
    /// Connected account. `None` is the owner of the key.
    pub account: Option<&'static str>,
    pub livemode: bool,
    pub due: i64,
    pub currency: &'static str,
    pub sent: bool,
    /// Unix seconds at which the draft is created.
    pub start: i64,
    /// API version of the account, used for listed events.
    pub listed: &'static str,
    /// API version of the webhook endpoint, used for delivered events.
    pub delivered: &'static str,
    /// Order reference that the merchant writes into the PaymentIntent.
    ///
    /// By default Stripe writes the invoice's id.
    pub order_reference: Option<&'static str>,
}

impl Terms {
    /// The terms of a live invoice of 50 EUR that Stripe charges automatically.
    pub fn automatic(start: i64, version: &'static str) -> Terms {
        Terms {
            account: None,
            livemode: true,
            due: 5000,
            currency: "eur",
            sent: false,
            start,
            listed: version,
            delivered: version,
            order_reference: None,
        }
    }
}

pub struct Life {
    stripe: Stripe,
    terms: Terms,
    /// Current time of this life in Unix seconds.
    pub now_s: i64,
    pub invoice: Invoice,
    intent: Option<PaymentIntent>,
    charge: Option<Charge>,
    dispute: Option<Dispute>,
    charges: usize,
    parts: usize,
    refunds: usize,
    omitted: Vec<&'static str>,
}

fn decline(reason: &str, charge: &str) -> Decline {
    let (code, decline_code, message) = match reason {
        "insufficient_funds" => (
            "card_declined",
            "insufficient_funds",
            "Your card has insufficient funds.",
        ),
        "expired_card" => ("expired_card", "expired_card", "Your card has expired."),
        "returned" => (
            "payment_method_provider_decline",
            "insufficient_funds",
            "The bank returned the debit: insufficient funds.",
        ),
        _ => (
            "card_declined",
            "generic_decline",
            "Your card was declined.",
        ),
    };

    Decline {
        charge: charge.to_owned(),
        code,
        decline_code,
        message,
    }
}

impl Life {
    /// Creates a draft. Stripe fails to generate events whose type begins with one of `silenced`.
    pub fn begin(stripe: &Stripe, terms: Terms, omitted: &[&'static str]) -> Life {
        let serial = stripe.next_serial();
        let invoice = Invoice {
            id: format!("in_1F{serial:06}"),
            number: format!("ACME-{serial:04}"),
            currency: terms.currency,
            livemode: terms.livemode,
            sent: terms.sent,
            status: "draft",
            due: terms.due,
            paid: 0,
            paid_outside: 0,
            overpaid: 0,
            attempts: 0,
            attempted: false,
            created: terms.start,
            due_date: terms.sent.then_some(terms.start + 9 * DAY),
            next_attempt: None,
            finalized_at: None,
            paid_at: None,
            voided_at: None,
            written_off_at: None,
            intent: None,
            charge: None,
        };

        let now_s = terms.start;
        let (intent, charge, dispute, omitted) = (None, None, None, omitted.to_vec());
        let stripe = stripe.clone();
        let mut life = Life {
            stripe,
            terms,
            now_s,
            invoice,
            intent,
            charge,
            dispute,
            charges: 0,
            parts: 0,
            refunds: 0,
            omitted,
        };

        life.emit_invoice("invoice.created", None);
        life
    }

    pub fn id(&self) -> &str {
        &self.invoice.id
    }

    pub fn later(&mut self, seconds: i64) -> &mut Life {
        self.now_s += seconds;
        self
    }

    /// Makes Stripe fail to generate events whose type begins with one of these, from now on.
    pub fn omit_events(&mut self, prefixes: &[&'static str]) -> &mut Life {
        self.omitted = prefixes.to_vec();
        self
    }

    pub fn finalized(&mut self) -> &mut Life {
        self.invoice.status = "open";
        self.invoice.finalized_at = Some(self.now_s);
        self.invoice.next_attempt = (!self.terms.sent).then_some(self.now_s + HOUR);
        if self.terms.due > 0 {
            let invoice = &self.invoice;
            let intent = PaymentIntent {
                id: invoice.id.replace("in_1", "pi_3"),
                invoice: invoice.id.clone(),
                order_reference: self.terms.order_reference.unwrap_or(&invoice.id).to_owned(),
                amount: invoice.due,
                currency: invoice.currency,
                livemode: invoice.livemode,
                status: "requires_payment_method",
                created: self.now_s,
                latest_charge: None,
                error: None,
                cancellation_reason: None,
            };
            self.invoice.intent = Some(intent.id.clone());
            self.intent = Some(intent);
            self.emit_intent("payment_intent.created");
            self.put_payment(0, None);
        }

        self.emit_invoice(
            "invoice.updated",
            Some(json!({"status": "draft", "number": null, "effective_at": null})),
        );
        self.emit_invoice("invoice.finalized", None)
    }

    /// Fails a scheduled attempt.
    pub fn declined(&mut self, reason: &str, next_in: Option<i64>) -> &mut Life {
        self.charge_made("failed");
        self.failed(reason, next_in)
    }

    fn failed(&mut self, reason: &str, next_in: Option<i64>) -> &mut Life {
        let charge = self.charge.as_mut().expect("a charge was made");
        charge.status = "failed";
        charge.failure = Some(decline(reason, &charge.id));
        let intent = self.intent.as_mut().expect("it is finalized");
        intent.status = "requires_payment_method";
        intent.error.clone_from(&charge.failure);
        let before =
            json!({"attempt_count": self.invoice.attempts, "attempted": self.invoice.attempted});
        self.invoice.attempts += 1;
        self.invoice.attempted = true;
        self.invoice.next_attempt = next_in.map(|seconds| self.now_s + seconds);
        self.emit_charge("charge.failed");
        self.emit_intent("payment_intent.payment_failed");
        self.emit_invoice("invoice.updated", Some(before));

        self.emit_invoice("invoice.payment_failed", None)
    }

    /// Requires 3D Secure.
    pub fn action_required(&mut self) -> &mut Life {
        self.confirmed("requires_action");
        self.emit_intent("payment_intent.requires_action");
        self.emit_invoice("invoice.payment_action_required", None)
    }

    /// Submits a bank debit.
    pub fn processing(&mut self) -> &mut Life {
        self.charge_made("pending");
        self.confirmed("processing");
        self.emit_intent("payment_intent.processing");
        self.emit_charge("charge.pending")
    }

    /// Returns a bank debit unpaid.
    pub fn debit_returned(&mut self) -> &mut Life {
        self.failed("returned", None)
    }

    pub fn paid_by_card(&mut self) -> &mut Life {
        if self
            .charge
            .as_ref()
            .is_none_or(|charge| charge.status != "pending")
        {
            self.charge_made("succeeded");
        }
        self.charge.as_mut().expect("a charge was made").status = "succeeded";
        self.confirmed("succeeded");
        let before = json!({"amount_paid": self.invoice.paid, "attempted": self.invoice.attempted, "status": self.invoice.status});
        self.invoice.attempts += 1;
        self.settle();
        self.emit_charge("charge.succeeded");
        self.emit_intent("payment_intent.succeeded");
        self.emit_invoice("invoice.updated", Some(before));
        self.emit_invoice("invoice.paid", None);
        self.emit_invoice("invoice.payment_succeeded", None);
        let payment = self.put_payment(0, Some(self.invoice.due));

        if self.terms.delivered >= "2025-05-28" {
            self.tell("invoice_payment.paid", payment, None);
        }

        self
    }

    pub fn paid_outside(&mut self) -> &mut Life {
        self.cancel_intent("requested_by_customer");
        let before = json!({"amount_paid": self.invoice.paid, "status": self.invoice.status});
        let attempted = self.invoice.attempted;
        self.invoice.paid_outside = self.invoice.due - self.invoice.paid;
        self.settle();
        self.invoice.attempted = attempted;
        self.emit_intent("payment_intent.canceled");
        self.emit_invoice("invoice.updated", Some(before));
        self.emit_invoice("invoice.paid", None)
    }

    /// Pays one of several parts. The last one completes the payment.
    pub fn pay_part(&mut self, amount: i64) -> &mut Life {
        self.parts += 1;
        let before = self.invoice.paid;
        let is_last = before + amount == self.invoice.due;
        self.invoice.paid += amount;
        if is_last {
            self.settle();
        }

        let payment = self.put_payment(self.parts, Some(amount));
        self.tell("invoice_payment.paid", payment, None);
        self.emit_invoice("invoice.updated", Some(json!({"amount_paid": before})));
        if is_last {
            self.emit_invoice("invoice.paid", None);
            self.emit_invoice("invoice.payment_succeeded", None);
        }

        self
    }

    /// Finalizes and pays an invoice of 0 at once.
    pub fn paid_at_zero(&mut self) -> &mut Life {
        self.invoice.finalized_at = Some(self.now_s);
        self.settle();
        self.emit_invoice("invoice.finalized", None);
        self.emit_invoice("invoice.paid", None);
        self.emit_invoice("invoice.payment_succeeded", None)
    }

    pub fn voided(&mut self) -> &mut Life {
        self.cancel_intent("void_invoice");
        let before = json!({"status": self.invoice.status});
        self.invoice.status = "void";
        (self.invoice.voided_at, self.invoice.next_attempt) = (Some(self.now_s), None);
        self.emit_intent("payment_intent.canceled");
        self.emit_invoice("invoice.updated", Some(before));
        self.emit_invoice("invoice.voided", None)
    }

    pub fn written_off(&mut self) -> &mut Life {
        let before = json!({"status": self.invoice.status});
        self.invoice.status = "uncollectible";
        self.invoice.written_off_at = Some(self.now_s);
        self.emit_invoice("invoice.updated", Some(before));
        self.emit_invoice("invoice.marked_uncollectible", None)
    }

    pub fn overdue(&mut self) -> &mut Life {
        self.emit_invoice("invoice.overdue", None)
    }

    pub fn refunded(&mut self, amount: i64) -> &mut Life {
        self.refunds += 1;
        let charge = self.charge.as_mut().expect("it was paid by card");
        charge.refunded += amount;
        let refund = Object::Refund(Refund {
            id: format!("{}r{}", charge.id.replace("ch_", "re_"), self.refunds),
            charge: charge.id.clone(),
            intent: charge.intent.clone(),
            amount,
            currency: charge.currency,
            status: "succeeded",
            created: self.now_s,
        });
        let before = json!({"amount_refunded": charge.refunded - amount});
        let charge = Object::Charge(charge.clone());

        self.tell("refund.created", refund.clone(), None);
        self.tell("charge.refunded", charge, Some(before));
        self.tell("charge.refund.updated", refund, None)
    }

    pub fn credited(&mut self, amount: i64) -> &mut Life {
        let note = CreditNote {
            id: self.invoice.id.replace("in_", "cn_"),
            number: format!("{}-CN-01", self.invoice.number),
            invoice: self.invoice.id.clone(),
            amount,
            currency: self.invoice.currency,
            livemode: self.invoice.livemode,
            created: self.now_s,
        };
        self.tell("credit_note.created", Object::CreditNote(note), None)
    }

    pub fn disputed(&mut self) -> &mut Life {
        let charge = self.charge.as_ref().expect("it was paid by card");
        let dispute = Dispute {
            id: charge.id.replace("ch_3", "du_1"),
            charge: charge.id.clone(),
            intent: charge.intent.clone(),
            amount: charge.amount,
            currency: charge.currency,
            livemode: charge.livemode,
            status: "needs_response",
            created: self.now_s,
        };

        self.dispute = Some(dispute);
        self.emit_dispute("charge.dispute.created");
        self.emit_dispute("charge.dispute.funds_withdrawn")
    }

    pub fn dispute_won(&mut self) -> &mut Life {
        self.dispute.as_mut().expect("it is disputed").status = "won";
        self.emit_dispute("charge.dispute.funds_reinstated");
        self.emit_dispute("charge.dispute.closed")
    }

    fn settle(&mut self) {
        let invoice = &mut self.invoice;
        (invoice.status, invoice.paid, invoice.attempted) = ("paid", invoice.due, true);
        (invoice.paid_at, invoice.next_attempt) = (Some(self.now_s), None);
    }

    fn charge_made(&mut self, status: &'static str) {
        self.charges += 1;
        let intent = self.intent.as_mut().expect("it is finalized");
        let id = format!("{}c{}", intent.id.replace("pi_", "ch_"), self.charges);
        intent.latest_charge = Some(id.clone());
        self.invoice.charge = Some(id.clone());

        self.charge = Some(Charge {
            id,
            invoice: self.invoice.id.clone(),
            intent: intent.id.clone(),
            amount: intent.amount,
            refunded: 0,
            currency: intent.currency,
            livemode: intent.livemode,
            status,
            created: self.now_s,
            failure: None,
        });
    }

    /// Sets the status and clears the error of the previous confirmation.
    fn confirmed(&mut self, status: &'static str) {
        let intent = self.intent.as_mut().expect("it is finalized");
        (intent.status, intent.error) = (status, None);
    }

    fn cancel_intent(&mut self, reason: &'static str) {
        if let Some(intent) = &mut self.intent {
            (intent.status, intent.cancellation_reason) = ("canceled", Some(reason));
        }
    }

    /// Creates the object that links the invoice with its PaymentIntent in every version.
    fn put_payment(&mut self, pay_part: usize, paid: Option<i64>) -> Object {
        let suffix = if pay_part == 0 {
            String::new()
        } else {
            format!("p{pay_part}")
        };
        let payment = Object::InvoicePayment(InvoicePayment {
            id: format!("{}{suffix}", self.invoice.id.replace("in_", "inpay_")),
            invoice: self.invoice.id.clone(),
            intent: self.intent.as_ref().expect("it is finalized").id.clone(),
            requested: self.invoice.due,
            paid,
            currency: self.invoice.currency,
            livemode: self.invoice.livemode,
            created: self.invoice.finalized_at.expect("it is finalized"),
            paid_at: paid.map(|_| self.now_s),
        });

        self.stripe.put(payment.clone(), &self.terms);
        payment
    }

    fn emit_invoice(&mut self, kind: &'static str, previous: Option<Value>) -> &mut Life {
        self.tell(kind, Object::Invoice(self.invoice.clone()), previous)
    }

    fn emit_intent(&mut self, kind: &'static str) -> &mut Life {
        match self.intent.clone() {
            Some(intent) => self.tell(kind, Object::PaymentIntent(intent), None),
            None => self,
        }
    }

    fn emit_charge(&mut self, kind: &'static str) -> &mut Life {
        let charge = self.charge.clone().expect("a charge was made");
        self.tell(kind, Object::Charge(charge), None)
    }

    fn emit_dispute(&mut self, kind: &'static str) -> &mut Life {
        let dispute = self.dispute.clone().expect("it is disputed");
        self.tell(kind, Object::Dispute(dispute), None)
    }

    fn tell(&mut self, kind: &'static str, object: Object, previous: Option<Value>) -> &mut Life {
        self.stripe.put(object.clone(), &self.terms);
        let generated = !self.omitted.iter().any(|prefix| kind.starts_with(prefix));
        self.stripe.emit(Event {
            id: String::new(),
            order: 0,
            kind,
            created: self.now_s,
            account: self.terms.account,
            livemode: self.terms.livemode,
            listed: self.terms.listed,
            delivered: self.terms.delivered,
            object,
            previous,
            generated,
        });

        self
    }
}
