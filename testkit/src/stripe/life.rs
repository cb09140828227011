//! An invoice's life at Stripe. Each method is something that happens: it changes the objects, and makes the events that Stripe makes
//! of it, several of them in the same second.

use serde_json::{Value, json};

use super::objects::{
    Charge, CreditNote, Decline, Dispute, Invoice, InvoicePayment, Object, PaymentIntent, Refund,
};
use super::{Event, Stripe};

pub const HOUR: i64 = 3600;
pub const DAY: i64 = 86_400;

/// What is agreed before it begins.
#[derive(Clone, Debug)]
pub struct Terms {
    /// None: the owner of the key.
    pub account: Option<&'static str>,
    pub livemode: bool,
    pub due: i64,
    pub currency: &'static str,
    pub sent: bool,
    /// When the draft is made, in Unix seconds.
    pub start: i64,
    /// The version of the account: in it, events are listed.
    pub listed: &'static str,
    /// The version of the webhook endpoint: in it, events are delivered.
    pub delivered: &'static str,
    /// What the merchant writes into the PaymentIntent; else Stripe writes the invoice's id.
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
    /// Unix seconds.
    pub t: i64,
    pub invoice: Invoice,
    intent: Option<PaymentIntent>,
    charge: Option<Charge>,
    dispute: Option<Dispute>,
    charges: usize,
    parts: usize,
    refunds: usize,
    silenced: Vec<&'static str>,
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
    /// A draft. Stripe fails to make events whose type begins so.
    pub fn begin(stripe: &Stripe, terms: Terms, silenced: &[&'static str]) -> Life {
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
        let t = terms.start;
        let (intent, charge, dispute, silenced) = (None, None, None, silenced.to_vec());
        let stripe = stripe.clone();
        let mut life = Life {
            stripe,
            terms,
            t,
            invoice,
            intent,
            charge,
            dispute,
            charges: 0,
            parts: 0,
            refunds: 0,
            silenced,
        };
        life.tell_invoice("invoice.created", None);
        life
    }

    pub fn id(&self) -> &str {
        &self.invoice.id
    }

    pub fn later(&mut self, seconds: i64) -> &mut Life {
        self.t += seconds;
        self
    }

    /// From now on, Stripe fails to make events whose type begins so.
    pub fn silence(&mut self, prefixes: &[&'static str]) -> &mut Life {
        self.silenced = prefixes.to_vec();
        self
    }

    pub fn finalized(&mut self) -> &mut Life {
        self.invoice.status = "open";
        self.invoice.finalized_at = Some(self.t);
        self.invoice.next_attempt = (!self.terms.sent).then_some(self.t + HOUR);
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
                created: self.t,
                latest_charge: None,
                error: None,
                cancellation_reason: None,
            };
            self.invoice.intent = Some(intent.id.clone());
            self.intent = Some(intent);
            self.tell_intent("payment_intent.created");
            self.put_payment(0, None);
        }
        self.tell_invoice(
            "invoice.updated",
            Some(json!({"status": "draft", "number": null, "effective_at": null})),
        );
        self.tell_invoice("invoice.finalized", None)
    }

    /// A scheduled attempt fails.
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
        intent.error = charge.failure.clone();
        let before =
            json!({"attempt_count": self.invoice.attempts, "attempted": self.invoice.attempted});
        self.invoice.attempts += 1;
        self.invoice.attempted = true;
        self.invoice.next_attempt = next_in.map(|seconds| self.t + seconds);
        self.tell_charge("charge.failed");
        self.tell_intent("payment_intent.payment_failed");
        self.tell_invoice("invoice.updated", Some(before));
        self.tell_invoice("invoice.payment_failed", None)
    }

    /// 3D Secure.
    pub fn action_required(&mut self) -> &mut Life {
        self.confirmed("requires_action");
        self.tell_intent("payment_intent.requires_action");
        self.tell_invoice("invoice.payment_action_required", None)
    }

    /// A bank debit is submitted.
    pub fn processing(&mut self) -> &mut Life {
        self.charge_made("pending");
        self.confirmed("processing");
        self.tell_intent("payment_intent.processing");
        self.tell_charge("charge.pending")
    }

    /// A bank debit comes back.
    pub fn returned(&mut self) -> &mut Life {
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
        self.tell_charge("charge.succeeded");
        self.tell_intent("payment_intent.succeeded");
        self.tell_invoice("invoice.updated", Some(before));
        self.tell_invoice("invoice.paid", None);
        self.tell_invoice("invoice.payment_succeeded", None);
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
        self.tell_intent("payment_intent.canceled");
        self.tell_invoice("invoice.updated", Some(before));
        self.tell_invoice("invoice.paid", None)
    }

    /// One payment of several; the last one settles it.
    pub fn part(&mut self, amount: i64) -> &mut Life {
        self.parts += 1;
        let before = self.invoice.paid;
        let is_last = before + amount == self.invoice.due;
        self.invoice.paid += amount;
        if is_last {
            self.settle();
        }
        let payment = self.put_payment(self.parts, Some(amount));
        self.tell("invoice_payment.paid", payment, None);
        self.tell_invoice("invoice.updated", Some(json!({"amount_paid": before})));
        if is_last {
            self.tell_invoice("invoice.paid", None);
            self.tell_invoice("invoice.payment_succeeded", None);
        }
        self
    }

    /// Nothing to collect: final and paid at once.
    pub fn paid_at_zero(&mut self) -> &mut Life {
        self.invoice.finalized_at = Some(self.t);
        self.settle();
        self.tell_invoice("invoice.finalized", None);
        self.tell_invoice("invoice.paid", None);
        self.tell_invoice("invoice.payment_succeeded", None)
    }

    pub fn voided(&mut self) -> &mut Life {
        self.cancel_intent("void_invoice");
        let before = json!({"status": self.invoice.status});
        self.invoice.status = "void";
        (self.invoice.voided_at, self.invoice.next_attempt) = (Some(self.t), None);
        self.tell_intent("payment_intent.canceled");
        self.tell_invoice("invoice.updated", Some(before));
        self.tell_invoice("invoice.voided", None)
    }

    pub fn written_off(&mut self) -> &mut Life {
        let before = json!({"status": self.invoice.status});
        self.invoice.status = "uncollectible";
        self.invoice.written_off_at = Some(self.t);
        self.tell_invoice("invoice.updated", Some(before));
        self.tell_invoice("invoice.marked_uncollectible", None)
    }

    pub fn overdue(&mut self) -> &mut Life {
        self.tell_invoice("invoice.overdue", None)
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
            created: self.t,
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
            created: self.t,
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
            created: self.t,
        };
        self.dispute = Some(dispute);
        self.tell_dispute("charge.dispute.created");
        self.tell_dispute("charge.dispute.funds_withdrawn")
    }

    pub fn dispute_won(&mut self) -> &mut Life {
        self.dispute.as_mut().expect("it is disputed").status = "won";
        self.tell_dispute("charge.dispute.funds_reinstated");
        self.tell_dispute("charge.dispute.closed")
    }

    fn settle(&mut self) {
        let invoice = &mut self.invoice;
        (invoice.status, invoice.paid, invoice.attempted) = ("paid", invoice.due, true);
        (invoice.paid_at, invoice.next_attempt) = (Some(self.t), None);
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
            created: self.t,
            failure: None,
        });
    }

    /// The error of the confirmation before is forgotten.
    fn confirmed(&mut self, status: &'static str) {
        let intent = self.intent.as_mut().expect("it is finalized");
        (intent.status, intent.error) = (status, None);
    }

    fn cancel_intent(&mut self, reason: &'static str) {
        if let Some(intent) = &mut self.intent {
            (intent.status, intent.cancellation_reason) = ("canceled", Some(reason));
        }
    }

    /// What joins the invoice and its PaymentIntent, whatever the version.
    fn put_payment(&mut self, part: usize, paid: Option<i64>) -> Object {
        let suffix = if part == 0 {
            String::new()
        } else {
            format!("p{part}")
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
            paid_at: paid.map(|_| self.t),
        });
        self.stripe.put(payment.clone(), &self.terms);
        payment
    }

    fn tell_invoice(&mut self, kind: &'static str, previous: Option<Value>) -> &mut Life {
        self.tell(kind, Object::Invoice(self.invoice.clone()), previous)
    }

    fn tell_intent(&mut self, kind: &'static str) -> &mut Life {
        match self.intent.clone() {
            Some(intent) => self.tell(kind, Object::PaymentIntent(intent), None),
            None => self,
        }
    }

    fn tell_charge(&mut self, kind: &'static str) -> &mut Life {
        let charge = self.charge.clone().expect("a charge was made");
        self.tell(kind, Object::Charge(charge), None)
    }

    fn tell_dispute(&mut self, kind: &'static str) -> &mut Life {
        let dispute = self.dispute.clone().expect("it is disputed");
        self.tell(kind, Object::Dispute(dispute), None)
    }

    fn tell(&mut self, kind: &'static str, object: Object, previous: Option<Value>) -> &mut Life {
        self.stripe.put(object.clone(), &self.terms);
        let generated = !self.silenced.iter().any(|prefix| kind.starts_with(prefix));
        self.stripe.emit(Event {
            id: String::new(),
            order: 0,
            kind,
            created: self.t,
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
