//! The sentence that a person in finance reads: `paymentMsg`.
//!
//! A function of all that is known, so that what any sibling event tells is told. Amounts are `money`'s, and text that
//! comes from Stripe goes through `redact` first.

use super::fact::{InvoiceFact, by_snapshot, by_type, contradicts};
use super::failed_attempts::FailedAttempt;
use super::payment_links::PaymentLinks;
use super::{StoredObservation, TieBreak};
use crate::domain::money;
use crate::domain::redact::{clean, name};
use crate::domain::stripe::object::{Charge, CreditNote, Dispute, Invoice, Object, Reason, Refund};
use crate::domain::time::LAST_SECOND;

/// Those who tell a fact, earliest first, with the invoice that each shows.
type Sources<'t, 'a> = &'t [(&'a StoredObservation, &'a Invoice)];

/// What every message may need to know about the invoice.
pub struct InvoiceContext<'a, 'k> {
    pub invoice_id: &'a str,
    own: &'k [&'a StoredObservation],
    links: &'k PaymentLinks<'a>,
    number: Option<&'a str>,
    due_date: Option<i64>,
    revision: Option<&'a str>,
    is_test: bool,
    account: Option<&'a str>,
    amount_due: Option<i64>,
    amount_paid: Option<i64>,
}

impl<'a, 'k> InvoiceContext<'a, 'k> {
    /// `own`: all that belongs to the invoice, earliest first.
    pub fn gather(
        invoice_id: &'a str,
        own: &'k [&'a StoredObservation],
        links: &'k PaymentLinks<'a>,
    ) -> InvoiceContext<'a, 'k> {
        let snapshots: Vec<(&StoredObservation, &Invoice)> =
            own.iter().filter_map(|k| believed(k)).collect();
        let newest = || snapshots.iter().rev().map(|(_, i)| *i);
        let amount_due = newest().find_map(|i| i.amount_due);
        let is_paid = |k: &StoredObservation, i: &Invoice| {
            by_snapshot(&k.telling, i, InvoiceFact::Paid)
                || by_type(&k.telling, i) == Some(InvoiceFact::Paid)
        };
        let paid: Vec<&Invoice> = snapshots
            .iter()
            .filter(|(k, i)| is_paid(k, i))
            .map(|(_, i)| *i)
            .collect();
        let amount_paid = collected(&paid).or(amount_due);
        InvoiceContext {
            invoice_id,
            own,
            links,
            number: newest().find_map(|i| i.number.as_deref()),
            due_date: newest().find_map(|i| i.due_date),
            revision: newest()
                .find_map(|i| i.latest_revision.as_deref())
                .filter(|id| *id != invoice_id),
            is_test: own.iter().any(|k| k.telling.livemode == Some(false)),
            account: own.iter().find_map(|k| k.telling.account.as_deref()),
            amount_due,
            amount_paid,
        }
    }

    /// How much an InvoicePayment paid: the event that says so comes first, then whatever else tells.
    pub fn amount_of_payment(&self, id: &str) -> Option<i64> {
        let told = |by_claim: bool| {
            let sources = self
                .own
                .iter()
                .filter(move |k| (k.telling.kind == "invoice_payment.paid") == by_claim);
            sources.filter_map(|k| match &k.telling.object {
                Object::InvoicePayment(payment) if payment.id == id => payment.amount_paid,
                _ => None,
            })
        };
        told(true).next().or_else(|| told(false).next())
    }

    /// The amount of the payment that these are about: as they tell it, else as any part of the same payment does.
    fn payment_amount(&self, sources: &[&StoredObservation]) -> Option<i64> {
        let payment = |k: &StoredObservation| {
            k.telling
                .object
                .names()
                .iter()
                .find_map(|(id, _)| self.links.payment_of(id))
        };
        let payments: Vec<usize> = sources.iter().filter_map(|k| payment(k)).collect();
        let siblings = || {
            self.own
                .iter()
                .filter(|k| payment(k).is_some_and(|payment| payments.contains(&payment)))
        };
        sources
            .iter()
            .find_map(|k| amount(k))
            .or_else(|| siblings().find_map(|k| amount(k)))
    }

    fn invoice(&self) -> String {
        format!("invoice {}", name(self.number.unwrap_or(self.invoice_id)))
    }

    /// An amount in the currency that any of the tellers names, else anything known about the invoice.
    fn money(&self, minor_units: i64, sources: &[&StoredObservation]) -> String {
        let all = || sources.iter().chain(self.own).filter_map(|k| currency(k));
        let is_code = |c: &&str| c.len() == 3 && c.bytes().all(|b| b.is_ascii_alphabetic());
        let code = all().find(is_code).or_else(|| all().next()).map(clean);
        money::amount(minor_units, code.as_deref())
    }

    fn money_of_invoice(&self, minor_units: Option<i64>, sources: Sources) -> Option<String> {
        minor_units.map(|amount| self.money(amount, &observations(sources)))
    }

    /// `amount_due`, from the earliest that tells the fact, else from what else is known.
    fn due(&self, sources: Sources) -> Option<String> {
        let told = sources
            .iter()
            .filter_map(|(k, _)| believed(k))
            .find_map(|(_, i)| i.amount_due);
        self.money_of_invoice(told.or(self.amount_due), sources)
    }

    /// Closes a message with what stands in every one.
    fn close(&self, sentences: String) -> String {
        let mut message = sentences;
        if self.is_test {
            message.push_str(" Test mode.");
        }
        if let Some(account) = self.account {
            message.push_str(&format!(" Connected account {}.", clean(account)));
        }
        message
    }
}

/// The snapshot of an invoice, unless the event around it contradicts it.
fn believed(known: &StoredObservation) -> Option<(&StoredObservation, &Invoice)> {
    match &known.telling.object {
        Object::Invoice(invoice) if !contradicts(&known.telling, invoice) => Some((known, invoice)),
        _ => None,
    }
}

/// What a paid invoice brought, by its paid snapshots: before basil, `amount_paid` is 0 for what was paid outside Stripe.
fn collected(paid: &[&Invoice]) -> Option<i64> {
    let amount = paid
        .iter()
        .find_map(|i| i.amount_paid.filter(|amount| *amount != 0));
    amount.or_else(|| paid.iter().find_map(|i| i.amount_due))
}

/// What a PaymentIntent or a charge is over.
fn amount(known: &StoredObservation) -> Option<i64> {
    match &known.telling.object {
        Object::PaymentIntent(intent) => intent.amount,
        Object::Charge(charge) => charge.amount,
        _ => None,
    }
}

fn currency(known: &StoredObservation) -> Option<&str> {
    match &known.telling.object {
        Object::Invoice(_) => believed(known).and_then(|(_, i)| i.currency.as_deref()),
        Object::InvoicePayment(o) => o.currency.as_deref(),
        Object::PaymentIntent(o) => o.currency.as_deref(),
        Object::Charge(o) => o.currency.as_deref(),
        Object::Refund(o) => o.currency.as_deref(),
        Object::CreditNote(o) => o.currency.as_deref(),
        Object::Dispute(o) => o.currency.as_deref(),
    }
}

fn over(amount: Option<String>) -> String {
    amount
        .map(|amount| format!(" over {amount}"))
        .unwrap_or_default()
}

fn due_on(facts: &InvoiceContext) -> Option<String> {
    facts.due_date.map(moment)
}

pub fn finalized(facts: &InvoiceContext, sources: Sources) -> String {
    let due = due_on(facts)
        .map(|due| format!(", due {due}"))
        .unwrap_or_default();
    facts.close(format!(
        "{} was finalized and waits for payment{due}.",
        capital(&facts.invoice(), &over(facts.due(sources)))
    ))
}

pub fn attempt_required(facts: &InvoiceContext, sources: Sources) -> String {
    let invoice = capital(&facts.invoice(), &over(facts.due(sources)));
    facts.close(format!("{invoice} must be collected outside Stripe: its payment method is one that Stripe cannot charge."))
}

pub fn overdue(facts: &InvoiceContext, sources: Sources) -> String {
    let due = due_on(facts)
        .map(|due| format!("; it was due {due}"))
        .unwrap_or_default();
    facts.close(format!(
        "{} is overdue{due}.",
        capital(&facts.invoice(), &over(facts.due(sources)))
    ))
}

pub fn written_off(facts: &InvoiceContext, sources: Sources) -> String {
    facts.close(format!(
        "{} was written off as uncollectible.",
        capital(&facts.invoice(), &over(facts.due(sources)))
    ))
}

pub fn voided(facts: &InvoiceContext, sources: Sources) -> String {
    let revision = facts
        .revision
        .map(|id| format!(" It was replaced by revision {}.", clean(id)))
        .unwrap_or_default();
    let invoice = capital(&facts.invoice(), &over(facts.due(sources)));
    facts.close(format!(
        "{invoice} was voided, so nothing is owed.{revision}"
    ))
}

pub fn paid(facts: &InvoiceContext, sources: Sources, was_written_off: bool) -> String {
    let shown: Vec<&Invoice> = sources
        .iter()
        .filter_map(|(k, _)| believed(k))
        .map(|(_, i)| i)
        .collect();
    let amount = collected(&shown).or(facts.amount_paid);
    let money = facts.money_of_invoice(amount, sources);
    let mut text = match (amount, money) {
        (Some(0), Some(money)) => format!(
            "{} is settled: nothing to collect ({money}).",
            capital(&facts.invoice(), "")
        ),
        (_, Some(money)) => format!("{money} paid for {}.", facts.invoice()),
        (_, None) => format!("{} is paid.", capital(&facts.invoice(), "")),
    };
    if shown.iter().any(|i| {
        i.paid_out_of_band == Some(true)
            || i.amount_paid_off_stripe.is_some_and(|amount| amount > 0)
    }) {
        text.push_str(" It was paid outside Stripe.");
    } else if shown
        .iter()
        .all(|i| i.paid_out_of_band.is_none() && i.amount_paid_off_stripe.is_none())
        && shown
            .iter()
            .any(|i| i.attempted == Some(false) && i.amount_paid.is_some_and(|amount| amount > 0))
    {
        text.push_str(" It was apparently paid outside Stripe.");
    }
    let overpaid = shown
        .iter()
        .find_map(|i| i.amount_overpaid.filter(|amount| *amount > 0));
    if let Some(amount) = facts.money_of_invoice(overpaid, sources) {
        text.push_str(&format!(" It was overpaid by {amount}."));
    }
    if was_written_off {
        text.push_str(" It was paid after being written off.");
    }
    facts.close(text)
}

pub fn finalization_failed(facts: &InvoiceContext, sources: Sources) -> String {
    let reason = sources
        .iter()
        .filter_map(|(k, _)| believed(k))
        .find_map(|(_, i)| i.finalization_error.as_ref());
    let invoice = format!("{}{}", facts.invoice(), over(facts.due(sources)));
    facts.close(format!(
        "Stripe could not finalize {invoice}{}",
        because(reason)
    ))
}

pub fn action_required(facts: &InvoiceContext, sources: &[&StoredObservation]) -> String {
    let snapshots = || sources.iter().filter_map(|k| believed(k)).map(|(_, i)| i);
    let remaining = snapshots().find_map(|i| i.amount_remaining);
    let due = || snapshots().find_map(|i| i.amount_due).or(facts.amount_due);
    let amount = remaining
        .or_else(|| facts.payment_amount(sources))
        .or_else(due);
    let money = amount
        .map(|amount| format!(" of {}", facts.money(amount, sources)))
        .unwrap_or_default();
    facts.close(format!(
        "Payment{money} for {} needs the customer to act, for example to authenticate (3D Secure).",
        facts.invoice()
    ))
}

pub fn in_flight(facts: &InvoiceContext, sources: &[&StoredObservation]) -> String {
    let amount = facts.payment_amount(sources);
    let money = amount
        .map(|amount| format!(" of {}", facts.money(amount, sources)))
        .unwrap_or_default();
    facts.close(format!(
        "Payment{money} for {} is in progress: submitted, and not yet confirmed by the bank.",
        facts.invoice()
    ))
}

pub fn partly_funded(
    facts: &InvoiceContext,
    funded: i64,
    sources: &[&StoredObservation],
) -> String {
    let arrived = facts.money(funded, sources);
    let total = facts
        .payment_amount(sources)
        .map(|amount| format!(" of {}", facts.money(amount, sources)))
        .unwrap_or_default();
    facts.close(format!(
        "{arrived}{total} has arrived by bank transfer for {}; the rest is outstanding.",
        facts.invoice()
    ))
}

pub fn part_paid(
    facts: &InvoiceContext,
    amount: Option<i64>,
    sources: &[&StoredObservation],
) -> String {
    let money = amount
        .map(|amount| format!(" of {}", facts.money(amount, sources)))
        .unwrap_or_default();
    facts.close(format!(
        "Part payment{money} received for {}.",
        facts.invoice()
    ))
}

/// `own`: all tellings of the invoice, where siblings may know the reason.
pub fn attempt_failed(
    facts: &InvoiceContext,
    attempt: &FailedAttempt,
    own: &[&StoredObservation],
) -> String {
    let told: Vec<&StoredObservation> = attempt
        .sources
        .iter()
        .chain(attempt.tries.iter().flat_map(|t| &t.sources))
        .copied()
        .collect();
    let charges: Vec<&str> = attempt
        .charges
        .iter()
        .copied()
        .chain(attempt.tries.iter().filter_map(|t| t.charge))
        .collect();
    let payments: Vec<&StoredObservation> = own
        .iter()
        .copied()
        .filter(|k| is_about(k, &charges) || told.iter().any(|t| t.key == k.key))
        .collect();
    let snapshots = || {
        attempt
            .sources
            .iter()
            .filter_map(|k| believed(k))
            .map(|(_, i)| i)
    };
    let remaining = snapshots().find_map(|i| i.amount_remaining);
    let due = || snapshots().find_map(|i| i.amount_due).or(facts.amount_due);
    let amount = remaining
        .or_else(|| facts.payment_amount(&payments))
        .or_else(due);
    let money = amount
        .map(|amount| format!(" of {}", facts.money(amount, &told)))
        .unwrap_or_default();
    let number = attempt
        .number
        .filter(|n| *n > 0)
        .map(|n| format!(" (attempt {n})"))
        .unwrap_or_default();
    let reason = failure_reason(&payments);
    let next = snapshots().find_map(|i| match (i.next_payment_attempt, i.no_next_attempt) {
        (Some(next), _) => Some(format!(" Next attempt: {}.", moment(next))),
        (None, Some(true)) => Some(" No further attempt will be made.".to_owned()),
        (None, _) => None,
    });
    let text = format!(
        "Payment{money} for {} failed{number}{}{}",
        facts.invoice(),
        because(reason.as_ref()),
        next.unwrap_or_default()
    );
    facts.close(text)
}

/// Tells of one of these charges, or of the error of one.
fn is_about(known: &StoredObservation, charges: &[&str]) -> bool {
    match &known.telling.object {
        Object::Charge(charge) => charges.contains(&charge.id.as_str()),
        Object::PaymentIntent(intent) => intent
            .error_charge
            .as_deref()
            .is_some_and(|id| charges.contains(&id)),
        _ => false,
    }
}

/// The PaymentIntent's word before the charge's; each first the more exact code.
fn failure_reason(payments: &[&StoredObservation]) -> Option<Reason> {
    let errors = || {
        payments.iter().filter_map(|k| match &k.telling.object {
            Object::PaymentIntent(intent) => intent.error.as_ref(),
            _ => None,
        })
    };
    let charges = || {
        payments.iter().filter_map(|k| match &k.telling.object {
            Object::Charge(charge) => Some(charge),
            _ => None,
        })
    };
    let code = errors()
        .find_map(|e| e.code.clone())
        .or_else(|| charges().find_map(|c| c.outcome_reason.clone()));
    let code = code.or_else(|| charges().find_map(|c| c.failure_code.clone()));
    let message = errors()
        .find_map(|e| e.message.clone())
        .or_else(|| charges().find_map(|c| c.failure_message.clone()));
    (code.is_some() || message.is_some()).then_some(Reason { code, message })
}

fn out_of(facts: &InvoiceContext, sources: &[&StoredObservation]) -> String {
    let paid = facts.amount_paid.filter(|paid| *paid != 0);
    paid.map(|paid| format!(" of {}", facts.money(paid, sources)))
        .unwrap_or_default()
}

/// The tellings, without what they show.
fn observations<'a, T>(told: &[(&'a StoredObservation, &T)]) -> Vec<&'a StoredObservation> {
    told.iter().map(|(k, _)| *k).collect()
}

pub fn refunded(facts: &InvoiceContext, told: &[(&StoredObservation, &Refund)]) -> String {
    let sources = observations(told);
    let amount = told
        .iter()
        .find_map(|(_, r)| r.amount)
        .map(|amount| facts.money(amount, &sources));
    facts.close(match amount {
        Some(amount) => format!(
            "Refunded {amount}{} for {}.",
            out_of(facts, &sources),
            facts.invoice()
        ),
        None => format!("A refund was made for {}.", facts.invoice()),
    })
}

pub fn refund_failed(
    facts: &InvoiceContext,
    told: &[(&StoredObservation, &Refund)],
    failed: &[(&StoredObservation, &Refund)],
) -> String {
    let sources = observations(told);
    let amount = told
        .iter()
        .find_map(|(_, r)| r.amount)
        .map(|amount| facts.money(amount, &sources));
    let of_how_much = amount
        .map(|amount| format!(" of {amount}{}", out_of(facts, &sources)))
        .unwrap_or_default();
    let canceled = failed
        .iter()
        .all(|(k, r)| r.status.as_deref() == Some("canceled") && k.telling.kind != "refund.failed");
    let what = if canceled { "was canceled" } else { "failed" };
    let code = told.iter().find_map(|(_, r)| r.failure_reason.clone());
    let reason = code.map(|code| Reason {
        code: Some(code),
        message: None,
    });
    facts.close(format!(
        "The refund{of_how_much} for {} {what}{}",
        facts.invoice(),
        because(reason.as_ref())
    ))
}

pub fn charge_refunded(
    facts: &InvoiceContext,
    amount: i64,
    told: &[(&StoredObservation, &Charge)],
) -> String {
    let sources = observations(told);
    let amount = facts.money(amount, &sources);
    facts.close(format!(
        "Refunded {amount}{} for {}.",
        out_of(facts, &sources),
        facts.invoice()
    ))
}

fn note(facts: &InvoiceContext, told: &[(&StoredObservation, &CreditNote)]) -> String {
    let sources = observations(told);
    let number = told
        .iter()
        .find_map(|(_, n)| n.number.as_deref())
        .map(|n| format!(" {}", name(n)))
        .unwrap_or_default();
    let amount = told
        .iter()
        .find_map(|(_, n)| n.amount)
        .map(|amount| facts.money(amount, &sources));
    format!("redit note{number}{} for {}", over(amount), facts.invoice())
}

pub fn credit_note(facts: &InvoiceContext, told: &[(&StoredObservation, &CreditNote)]) -> String {
    facts.close(format!("C{} was issued after payment.", note(facts, told)))
}

pub fn credit_note_voided(
    facts: &InvoiceContext,
    told: &[(&StoredObservation, &CreditNote)],
) -> String {
    facts.close(format!("C{} was voided.", note(facts, told)))
}

/// `told`: all that is known of the dispute; `of_kind`: what tells this step of it.
pub fn dispute(
    facts: &InvoiceContext,
    step: TieBreak,
    told: &[(&StoredObservation, &Dispute)],
    of_kind: &[(&StoredObservation, &Dispute)],
) -> String {
    let sources = observations(told);
    let amount = of_kind
        .iter()
        .chain(told)
        .find_map(|(_, d)| d.amount)
        .map(|amount| facts.money(amount, &sources));
    let of_how_much = amount
        .map(|amount| format!(" of {amount}"))
        .unwrap_or_default();
    let invoice = facts.invoice();
    let reason = || {
        told.iter()
            .find_map(|(_, d)| d.reason.as_deref())
            .map(|r| format!(": {}", clean(r)))
            .unwrap_or_default()
    };
    let result = || {
        of_kind
            .iter()
            .find_map(|(_, d)| d.status.as_deref())
            .map(|s| format!(": {}", clean(s)))
            .unwrap_or_default()
    };
    facts.close(match step {
        TieBreak::FundsWithdrawn => {
            format!("Disputed: Stripe withdrew the disputed payment{of_how_much} for {invoice}.")
        }
        TieBreak::FundsReinstated => {
            format!("Disputed: Stripe returned the disputed payment{of_how_much} for {invoice}.")
        }
        TieBreak::DisputeClosed => format!(
            "The dispute over the payment{of_how_much} for {invoice} was closed{}.",
            result()
        ),
        _ => format!(
            "The payment{of_how_much} for {invoice} is disputed{}.",
            reason()
        ),
    })
}

/// `: code: text.`, or just the full stop.
fn because(reason: Option<&Reason>) -> String {
    let Some(reason) = reason else {
        return ".".to_owned();
    };
    let parts: Vec<String> = [&reason.code, &reason.message]
        .into_iter()
        .flatten()
        .map(|part| clean(part))
        .collect();
    let text = parts.join(": ");
    let stop = if text.ends_with(['.', '!', '?']) {
        ""
    } else {
        "."
    };
    format!(": {text}{stop}")
}

fn capital(invoice: &str, rest: &str) -> String {
    format!("I{}{rest}", invoice.strip_prefix('i').unwrap_or(invoice))
}

/// `2026-02-03 09:15 UTC`.
fn moment(second: i64) -> String {
    let time = jiff::Timestamp::from_second(second.clamp(0, LAST_SECOND)).unwrap_or_default();
    jiff::fmt::strtime::format("%Y-%m-%d %H:%M UTC", time).unwrap_or_else(|_| time.to_string())
}
