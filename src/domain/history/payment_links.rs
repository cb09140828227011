//! Which invoice a payment belongs to.
//!
//! Refunds, disputes, charges and PaymentIntents that name each other are one payment, whichever side names the other, over
//! any number of hops. A payment belongs to the invoice that any part of it names as its own; else to the invoice that
//! names a part, or that an InvoicePayment joins to one; else to the one in the PaymentIntent's order reference.

use std::collections::{BTreeMap, HashMap};

use crate::domain::stripe::event::Observation;
use crate::domain::stripe::object::Object;

/// How good the reason is to believe that a payment belongs to an invoice: the lowest wins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Ground {
    OwnInvoice,
    NamedByInvoice,
    OrderReference,
}

/// What is known of the objects that a set of tellings names.
pub struct PaymentLinks<'a> {
    /// Payment objects joined: each id points to its group.
    groups: Groups<'a>,
    /// The invoice that each group belongs to.
    owners: HashMap<usize, &'a str>,
    /// The lowest PaymentIntent of each group.
    intents: HashMap<usize, &'a str>,
    /// The invoice of each InvoicePayment and credit note.
    documents: BTreeMap<&'a str, &'a str>,
}

impl<'a> PaymentLinks<'a> {
    pub fn read(observations: impl Iterator<Item = &'a Observation> + Clone) -> PaymentLinks<'a> {
        let mut groups = Groups::default();
        let mut documents = BTreeMap::new();
        for telling in observations.clone() {
            join_parts(&telling.object, &mut groups, &mut documents);
        }
        let mut links = PaymentLinks {
            groups,
            owners: HashMap::new(),
            intents: HashMap::new(),
            documents,
        };
        links.find_owners(observations.clone());
        for telling in observations {
            if let Object::PaymentIntent(intent) = &telling.object {
                links.note_intent(&intent.id);
            } else if let Some(intent) = named_intent(&telling.object) {
                links.note_intent(intent);
            }
        }
        links
    }

    /// The invoice that this object belongs to, as far as is known.
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

    /// The payment that this object is part of, as a number that holds for these links only.
    pub fn payment_of(&self, id: &str) -> Option<usize> {
        self.groups.find(id)
    }

    /// The PaymentIntent that a charge was made by, whichever side told.
    pub fn intent_of(&self, charge_id: &str) -> Option<&'a str> {
        self.intents.get(&self.groups.find(charge_id)?).copied()
    }

    fn note_intent(&mut self, intent: &'a str) {
        if let Some(group) = self.groups.find(intent) {
            let lowest = self.intents.entry(group).or_insert(intent);
            *lowest = intent.min(*lowest);
        }
    }

    fn find_owners(&mut self, observations: impl Iterator<Item = &'a Observation>) {
        let mut best: HashMap<usize, (Ground, &'a str)> = HashMap::new();
        for telling in observations {
            for (part, ground, invoice) in claims(&telling.object, &self.documents) {
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
        Object::Charge(part) => part.payment_intent.as_deref(),
        Object::Refund(part) => part.payment_intent.as_deref(),
        Object::Dispute(part) => part.payment_intent.as_deref(),
        _ => None,
    }
}

fn join_parts<'a>(
    object: &'a Object,
    groups: &mut Groups<'a>,
    documents: &mut BTreeMap<&'a str, &'a str>,
) {
    let mut note = |id: &'a str, invoice: &'a str| {
        let lowest = documents.entry(id).or_insert(invoice);
        *lowest = invoice.min(*lowest);
    };
    match object {
        Object::PaymentIntent(part) => {
            groups.join(&part.id, [&part.latest_charge, &part.error_charge])
        }
        Object::Charge(part) => groups.join(&part.id, [&part.payment_intent, &None]),
        Object::Refund(part) => groups.join(&part.id, [&part.charge, &part.payment_intent]),
        Object::Dispute(part) => groups.join(&part.id, [&part.charge, &part.payment_intent]),
        Object::Invoice(invoice) => {
            invoice.payments_named().for_each(|part| groups.add(part));
            invoice
                .invoice_payments
                .iter()
                .flatten()
                .for_each(|id| note(id, &invoice.id));
        }
        Object::InvoicePayment(payment) => {
            payment
                .invoice
                .iter()
                .for_each(|invoice| note(&payment.id, invoice));
            payment
                .payment_intent
                .iter()
                .chain(&payment.charge)
                .for_each(|part| groups.add(part));
        }
        Object::CreditNote(credit) => credit
            .invoice
            .iter()
            .for_each(|invoice| note(&credit.id, invoice)),
    }
}

/// Which invoices an object claims for which parts of a payment, and on what ground.
fn claims<'a>(
    object: &'a Object,
    documents: &BTreeMap<&'a str, &'a str>,
) -> Vec<(&'a str, Ground, &'a str)> {
    let own = |id: &'a str, invoice: &'a Option<String>| {
        invoice
            .as_deref()
            .map(|invoice| (id, Ground::OwnInvoice, invoice))
    };
    match object {
        Object::PaymentIntent(part) => {
            let reference = part
                .order_reference
                .as_deref()
                .map(|invoice| (part.id.as_str(), Ground::OrderReference, invoice));
            own(&part.id, &part.invoice)
                .into_iter()
                .chain(reference)
                .collect()
        }
        Object::Charge(part) => own(&part.id, &part.invoice).into_iter().collect(),
        Object::Refund(part) => own(&part.id, &part.invoice).into_iter().collect(),
        Object::Dispute(part) => own(&part.id, &part.invoice).into_iter().collect(),
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

/// Union-find over ids.
#[derive(Default)]
struct Groups<'a> {
    index: HashMap<&'a str, usize>,
    parent: Vec<usize>,
}

impl<'a> Groups<'a> {
    fn add(&mut self, id: &'a str) {
        self.index_of(id);
    }

    fn index_of(&mut self, id: &'a str) -> usize {
        let next = self.parent.len();
        let index = *self.index.entry(id).or_insert(next);
        if index == next {
            self.parent.push(next);
        }
        index
    }

    fn join(&mut self, id: &'a str, others: [&'a Option<String>; 2]) {
        let a = self.index_of(id);
        for other in others.into_iter().flatten() {
            let b = self.index_of(other);
            let (a, b) = (self.root(a), self.root(b));
            self.parent[a.max(b)] = a.min(b);
        }
    }

    fn find(&self, id: &str) -> Option<usize> {
        self.index.get(id).map(|&index| self.root(index))
    }

    fn root(&self, mut index: usize) -> usize {
        while self.parent[index] != index {
            index = self.parent[index];
        }
        index
    }
}
