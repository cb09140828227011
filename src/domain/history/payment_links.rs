//! Links between payment objects and the invoices that they pay.
//!
//! Refunds, disputes, charges and PaymentIntents that name each other are one payment, no matter
//! which side names the other, over any number of hops. A payment belongs to the invoice that any
//! part of it names as its own; else to the invoice that names a part, or that an InvoicePayment
//! joins to one; else to the one in the PaymentIntent's order reference. Whether a linked
//! observation counts for an invoice is decided in `invoice_observations`.

use std::collections::{BTreeMap, HashMap};

use super::disjoint_sets::DisjointSets;
use crate::domain::stripe::event::Observation;
use crate::domain::stripe::object::Object;

/// Strength of a claim that a payment belongs to an invoice; the lowest wins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Ground {
    OwnInvoice,
    NamedByInvoice,
    OrderReference,
}

/// Links between the objects that a set of observations names.
pub struct PaymentLinks<'a> {
    /// Payment objects, joined to one set per payment.
    groups: Groups<'a>,
    /// Invoice of each payment.
    owners: HashMap<usize, &'a str>,
    /// Lowest PaymentIntent of each payment.
    intents: HashMap<usize, &'a str>,
    /// Invoice of each InvoicePayment and credit note.
    documents: BTreeMap<&'a str, &'a str>,
}

impl<'a> PaymentLinks<'a> {
    /// Reads the links of these observations; their order makes no difference.
    pub fn read(observations: impl Iterator<Item = &'a Observation> + Clone) -> PaymentLinks<'a> {
        let mut groups = Groups::default();
        let mut documents = BTreeMap::new();
        for observation in observations.clone() {
            join_parts(&observation.object, &mut groups, &mut documents);
        }
        groups.sets.flatten();

        let mut links = PaymentLinks {
            groups,
            owners: HashMap::new(),
            intents: HashMap::new(),
            documents,
        };
        links.find_owners(observations.clone());
        for observation in observations {
            if let Some(intent) = named_intent(&observation.object) {
                links.record_intent(intent);
            }
        }
        links
    }

    /// Returns the invoice that this object belongs to, or `None` if no link is known.
    pub fn invoice_of(&self, object: &'a Object) -> Option<&'a str> {
        let part = match object {
            Object::Invoice(invoice) => return Some(&invoice.id),
            Object::InvoicePayment(payment) => {
                return self.documents.get(payment.id.as_str()).copied();
            }
            Object::CreditNote(note) => return self.documents.get(note.id.as_str()).copied(),
            Object::PaymentIntent(part) => &part.id,
            Object::Charge(part) => &part.id,
            Object::Refund(part) => &part.id,
            Object::Dispute(part) => &part.id,
        };
        self.owners.get(&self.groups.find(part)?).copied()
    }

    /// Returns the number of the payment that this object is part of, valid for these links only.
    pub fn payment_of(&self, id: &str) -> Option<usize> {
        self.groups.find(id)
    }

    /// Returns the PaymentIntent of a charge, no matter which of the two names the other.
    pub fn intent_of(&self, charge_id: &str) -> Option<&'a str> {
        self.intents.get(&self.groups.find(charge_id)?).copied()
    }

    fn record_intent(&mut self, intent: &'a str) {
        if let Some(group) = self.groups.find(intent) {
            let lowest = self.intents.entry(group).or_insert(intent);
            *lowest = intent.min(*lowest);
        }
    }

    fn find_owners(&mut self, observations: impl Iterator<Item = &'a Observation>) {
        let mut best: HashMap<usize, (Ground, &'a str)> = HashMap::new();
        for observation in observations {
            for (part, ground, invoice) in claims(&observation.object, &self.documents) {
                let Some(group) = self.groups.find(part) else {
                    continue;
                };
                let claim = (ground, invoice);
                let known = best.entry(group).or_insert(claim);
                *known = claim.min(*known);
            }
        }

        self.owners = best
            .into_iter()
            .map(|(group, (_, invoice))| (group, invoice))
            .collect();
    }
}

fn named_intent(object: &Object) -> Option<&str> {
    match object {
        Object::PaymentIntent(intent) => Some(&intent.id),
        Object::Charge(part) => part.payment_intent.as_deref(),
        Object::Refund(part) => part.payment_intent.as_deref(),
        Object::Dispute(part) => part.payment_intent.as_deref(),
        Object::Invoice(_) | Object::InvoicePayment(_) | Object::CreditNote(_) => None,
    }
}

/// Joins the payment objects that one object names, and records the invoice of a document.
fn join_parts<'a>(
    object: &'a Object,
    groups: &mut Groups<'a>,
    documents: &mut BTreeMap<&'a str, &'a str>,
) {
    match object {
        Object::PaymentIntent(part) => {
            groups.join(&part.id, [&part.latest_charge, &part.error_charge]);
        }
        Object::Charge(part) => groups.join(&part.id, [&part.payment_intent, &None]),
        Object::Refund(part) => groups.join(&part.id, [&part.charge, &part.payment_intent]),
        Object::Dispute(part) => groups.join(&part.id, [&part.charge, &part.payment_intent]),
        Object::Invoice(invoice) => {
            for part in invoice.payments_named() {
                groups.add(part);
            }
            for id in invoice.invoice_payments.iter().flatten() {
                record_document(documents, id, &invoice.id);
            }
        }
        Object::InvoicePayment(payment) => {
            if let Some(invoice) = &payment.invoice {
                record_document(documents, &payment.id, invoice);
            }
            for part in payment.payment_intent.iter().chain(&payment.charge) {
                groups.add(part);
            }
        }
        Object::CreditNote(credit) => {
            if let Some(invoice) = &credit.invoice {
                record_document(documents, &credit.id, invoice);
            }
        }
    }
}

/// Records the invoice of a document; of several invoices the lowest id wins.
fn record_document<'a>(
    documents: &mut BTreeMap<&'a str, &'a str>,
    id: &'a str,
    invoice_id: &'a str,
) {
    let lowest = documents.entry(id).or_insert(invoice_id);
    *lowest = invoice_id.min(*lowest);
}

/// Returns the invoices that an object claims for parts of a payment, each with the strength of the
/// claim.
fn claims<'a>(
    object: &'a Object,
    documents: &BTreeMap<&'a str, &'a str>,
) -> Vec<(&'a str, Ground, &'a str)> {
    let own = |id: &'a str| {
        object
            .named_invoice()
            .map(|invoice| (id, Ground::OwnInvoice, invoice))
    };

    match object {
        Object::PaymentIntent(part) => {
            let reference = part
                .order_reference
                .as_deref()
                .map(|invoice| (part.id.as_str(), Ground::OrderReference, invoice));
            own(&part.id).into_iter().chain(reference).collect()
        }
        Object::Charge(part) => own(&part.id).into_iter().collect(),
        Object::Refund(part) => own(&part.id).into_iter().collect(),
        Object::Dispute(part) => own(&part.id).into_iter().collect(),
        Object::Invoice(invoice) => invoice
            .payments_named()
            .map(|part| (part, Ground::NamedByInvoice, invoice.id.as_str()))
            .collect(),
        Object::InvoicePayment(payment) => {
            let Some(&invoice) = documents.get(payment.id.as_str()) else {
                return Vec::new();
            };
            let parts = payment.payment_intent.iter().chain(&payment.charge);
            parts
                .map(|part| (part.as_str(), Ground::NamedByInvoice, invoice))
                .collect()
        }
        Object::CreditNote(_) => Vec::new(),
    }
}

/// Disjoint sets of object ids.
#[derive(Default)]
struct Groups<'a> {
    index: HashMap<&'a str, usize>,
    sets: DisjointSets,
}

impl<'a> Groups<'a> {
    fn add(&mut self, id: &'a str) -> usize {
        *self.index.entry(id).or_insert_with(|| self.sets.add())
    }

    fn join(&mut self, id: &'a str, others: [&'a Option<String>; 2]) {
        let index = self.add(id);
        for other in others.into_iter().flatten() {
            let other = self.add(other);
            self.sets.join(index, other);
        }
    }

    fn find(&self, id: &str) -> Option<usize> {
        self.index.get(id).map(|&index| self.sets.root(index))
    }
}
