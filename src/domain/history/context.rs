//! Data about an invoice that every message may need, looked up once for the whole history.

use std::collections::{BTreeSet, HashMap};

use super::fact::{InvoiceFact, by_snapshot, by_type, contradicts};
use super::invoice_observations::InvoiceObservations;
use super::payment_links::PaymentLinks;
use crate::domain::money;
use crate::domain::redact::{clean, name};
use crate::domain::stripe::event::StoredObservation;
use crate::domain::stripe::object::{Invoice, Object};

/// Observations of one fact, earliest first, with the invoice that each contains.
pub(super) type InvoiceSources<'t, 'a> = &'t [(&'a StoredObservation, &'a Invoice)];

/// Facts about the invoice as a whole, and indexes over its observations.
pub struct InvoiceContext<'a, 'k> {
    pub invoice_id: &'a str,
    pub(super) due_date: Option<i64>,
    pub(super) revision: Option<&'a str>,
    pub(super) amount_due: Option<i64>,
    /// Amount that was paid on the invoice, else `amount_due`.
    pub(super) amount_paid: Option<i64>,
    number: Option<&'a str>,
    is_test_mode: bool,
    account: Option<&'a str>,
    links: &'k PaymentLinks<'a>,
    /// The first currency code that an observation names, and the first text that one names.
    currency: [Option<&'a str>; 2],
    /// For each payment, the position of the first observation with an amount, and the amount.
    payment_amounts: HashMap<usize, (usize, i64)>,
    /// Amount of each InvoicePayment.
    part_amounts: HashMap<&'a str, i64>,
    /// For each charge, the observations of it and of the error that it caused, earliest first.
    by_charge: HashMap<&'a str, Vec<&'a StoredObservation>>,
}

impl<'a, 'k> InvoiceContext<'a, 'k> {
    /// Builds the context from the observations that count for the invoice.
    pub fn new(
        invoice_id: &'a str,
        observations: &'k InvoiceObservations<'a>,
    ) -> InvoiceContext<'a, 'k> {
        let (counted, links) = (observations.counted(), observations.links());
        let snapshots: Vec<(&StoredObservation, &Invoice)> = counted
            .iter()
            .filter_map(|stored| trusted_snapshot(stored))
            .collect();
        let newest = || snapshots.iter().rev().map(|(_, invoice)| *invoice);
        let amount_due = newest().find_map(|invoice| invoice.amount_due);
        let paid: Vec<&Invoice> = snapshots
            .iter()
            .filter(|(stored, invoice)| {
                by_snapshot(&stored.observation, invoice, InvoiceFact::Paid)
                    || by_type(&stored.observation, invoice) == Some(InvoiceFact::Paid)
            })
            .map(|(_, invoice)| *invoice)
            .collect();
        let currencies = || counted.iter().filter_map(|stored| currency(stored));

        InvoiceContext {
            invoice_id,
            due_date: newest().find_map(|invoice| invoice.due_date),
            revision: newest()
                .find_map(|invoice| invoice.latest_revision.as_deref())
                .filter(|id| *id != invoice_id),
            amount_due,
            amount_paid: collected(&paid).or(amount_due),
            number: newest().find_map(|invoice| invoice.number.as_deref()),
            is_test_mode: observations.is_test_mode(),
            account: observations.connected_account(),
            links,
            currency: [currencies().find(is_currency_code), currencies().next()],
            payment_amounts: payment_amounts(counted, links),
            part_amounts: part_amounts(counted),
            by_charge: by_charge(counted),
        }
    }

    /// Returns the amount of an InvoicePayment from `invoice_payment.paid`, else from any other
    /// observation.
    pub fn amount_of_payment(&self, id: &str) -> Option<i64> {
        self.part_amounts.get(id).copied()
    }

    /// Returns the observations of these charges and of the errors that they caused, in any order.
    pub(super) fn about_charges(&self, charges: &BTreeSet<&str>) -> Vec<&'a StoredObservation> {
        let known = charges
            .iter()
            .filter_map(|charge| self.by_charge.get(charge));
        known.flatten().copied().collect()
    }

    /// Returns the amount of a payment from its sources, else from any part of the payment.
    pub(super) fn payment_amount(&self, sources: &[&StoredObservation]) -> Option<i64> {
        let told = sources.iter().find_map(|stored| amount(stored));
        told.or_else(|| {
            let siblings = sources
                .iter()
                .filter_map(|stored| payment_of(stored, self.links))
                .filter_map(|payment| self.payment_amounts.get(&payment));
            siblings.min().map(|&(_, amount)| amount)
        })
    }

    /// Returns `invoice NUMBER`, with Stripe's id if no number is known.
    pub(super) fn invoice(&self) -> String {
        format!("invoice {}", name(self.number.unwrap_or(self.invoice_id)))
    }

    /// Formats an amount in the currency of any source, else of any observation of the invoice.
    pub(super) fn money(&self, minor_units: i64, sources: &[&StoredObservation]) -> String {
        let currencies = || sources.iter().filter_map(|stored| currency(stored));
        let [own_code, own_text] = self.currency;
        let code = currencies()
            .find(is_currency_code)
            .or(own_code)
            .or_else(|| currencies().next())
            .or(own_text)
            .map(clean);
        money::amount(minor_units, code.as_deref())
    }

    /// Formats an amount that an invoice contains.
    pub(super) fn money_of_invoice(
        &self,
        minor_units: Option<i64>,
        sources: InvoiceSources,
    ) -> Option<String> {
        minor_units.map(|amount| {
            let observations: Vec<_> = sources.iter().map(|(stored, _)| *stored).collect();
            self.money(amount, &observations)
        })
    }

    /// Formats `amount_due` of the earliest source that has it, else of the newest snapshot.
    pub(super) fn due(&self, sources: InvoiceSources) -> Option<String> {
        let told = sources
            .iter()
            .filter_map(|(stored, _)| trusted_snapshot(stored))
            .find_map(|(_, invoice)| invoice.amount_due);
        self.money_of_invoice(told.or(self.amount_due), sources)
    }

    /// Appends the sentences that end every message.
    pub(super) fn close(&self, sentences: String) -> String {
        let mut message = sentences;
        if self.is_test_mode {
            message.push_str(" Test mode.");
        }
        if let Some(account) = self.account {
            message.push_str(&format!(" Connected account {}.", clean(account)));
        }
        message
    }
}

/// Returns the snapshot of an invoice, unless the event around it contradicts it.
pub(super) fn trusted_snapshot(
    stored: &StoredObservation,
) -> Option<(&StoredObservation, &Invoice)> {
    match &stored.observation.object {
        Object::Invoice(invoice) if !contradicts(&stored.observation, invoice) => {
            Some((stored, invoice))
        }
        _ => None,
    }
}

/// Returns the amount that was paid on an invoice, by its paid snapshots.
///
/// Before basil, `amount_paid` is 0 for an invoice that was paid outside Stripe.
pub(super) fn collected(paid: &[&Invoice]) -> Option<i64> {
    let amount = paid
        .iter()
        .find_map(|invoice| invoice.amount_paid.filter(|amount| *amount != 0));
    amount.or_else(|| paid.iter().find_map(|invoice| invoice.amount_due))
}

/// Returns the payment that an observation is about.
fn payment_of(stored: &StoredObservation, links: &PaymentLinks) -> Option<usize> {
    let names = stored.observation.object.names();
    names.iter().find_map(|(id, _)| links.payment_of(id))
}

fn payment_amounts(
    counted: &[&StoredObservation],
    links: &PaymentLinks,
) -> HashMap<usize, (usize, i64)> {
    let mut amounts = HashMap::new();
    for (position, stored) in counted.iter().enumerate() {
        if let (Some(amount), Some(payment)) = (amount(stored), payment_of(stored, links)) {
            amounts.entry(payment).or_insert((position, amount));
        }
    }
    amounts
}

fn part_amounts<'a>(counted: &[&'a StoredObservation]) -> HashMap<&'a str, i64> {
    let mut amounts = HashMap::new();
    for is_claim in [true, false] {
        for stored in counted {
            if let Object::InvoicePayment(payment) = &stored.observation.object
                && (stored.observation.kind == "invoice_payment.paid") == is_claim
                && let Some(amount) = payment.amount_paid
            {
                amounts.entry(payment.id.as_str()).or_insert(amount);
            }
        }
    }
    amounts
}

fn by_charge<'a>(
    counted: &[&'a StoredObservation],
) -> HashMap<&'a str, Vec<&'a StoredObservation>> {
    let mut by_charge: HashMap<&str, Vec<&StoredObservation>> = HashMap::new();
    for &stored in counted {
        let charge = match &stored.observation.object {
            Object::Charge(charge) => Some(charge.id.as_str()),
            Object::PaymentIntent(intent) => intent.error_charge.as_deref(),
            _ => None,
        };
        if let Some(charge) = charge {
            by_charge.entry(charge).or_default().push(stored);
        }
    }

    by_charge
}

/// Returns the amount of a PaymentIntent or a charge.
fn amount(stored: &StoredObservation) -> Option<i64> {
    match &stored.observation.object {
        Object::PaymentIntent(intent) => intent.amount,
        Object::Charge(charge) => charge.amount,
        _ => None,
    }
}

fn is_currency_code(text: &&str) -> bool {
    text.len() == 3 && text.bytes().all(|byte| byte.is_ascii_alphabetic())
}

fn currency(stored: &StoredObservation) -> Option<&str> {
    match &stored.observation.object {
        Object::Invoice(_) => {
            trusted_snapshot(stored).and_then(|(_, invoice)| invoice.currency.as_deref())
        }
        Object::InvoicePayment(o) => o.currency.as_deref(),
        Object::PaymentIntent(o) => o.currency.as_deref(),
        Object::Charge(o) => o.currency.as_deref(),
        Object::Refund(o) => o.currency.as_deref(),
        Object::CreditNote(o) => o.currency.as_deref(),
        Object::Dispute(o) => o.currency.as_deref(),
    }
}
