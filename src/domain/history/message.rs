//! Builds `paymentMsg`, the sentences that a person in finance reads.
//!
//! A message is a function of all observations, so it includes details of any sibling event.
//! `money` formats the amounts, and `redact` cleans every text that comes from Stripe.

use std::collections::BTreeSet;

use super::context::{InvoiceContext, InvoiceSources, collected, trusted_snapshot};
use super::entry::{TieBreak, in_order};
use super::failed_attempts::{FailedAttempt, LISTED_AT_EACH_END};
use crate::domain::money;
use crate::domain::redact::{clean, name};
use crate::domain::stripe::event::StoredObservation;
use crate::domain::stripe::object::{Charge, CreditNote, Dispute, Invoice, Object, Reason, Refund};
use crate::domain::time::LAST_SECOND;

/// Observations of one object, earliest first, with the object that each contains.
type ObjectSources<'t, 'a, T> = &'t [(&'a StoredObservation, &'a T)];

pub fn finalized(context: &InvoiceContext, sources: InvoiceSources) -> String {
    let due_date = context
        .due_date
        .map(|due| format!(", due {}", minute(due)))
        .unwrap_or_default();
    context.close(format!(
        "{} was finalized and waits for payment{due_date}.",
        invoice_over_due(context, sources)
    ))
}

pub fn attempt_required(context: &InvoiceContext, sources: InvoiceSources) -> String {
    context.close(format!(
        "{} must be collected outside Stripe: its payment method is one that Stripe cannot charge.",
        invoice_over_due(context, sources)
    ))
}

pub fn overdue(context: &InvoiceContext, sources: InvoiceSources) -> String {
    let due_date = context
        .due_date
        .map(|due| format!("; it was due {}", minute(due)))
        .unwrap_or_default();
    context.close(format!(
        "{} is overdue{due_date}.",
        invoice_over_due(context, sources)
    ))
}

pub fn written_off(context: &InvoiceContext, sources: InvoiceSources) -> String {
    context.close(format!(
        "{} was written off as uncollectible.",
        invoice_over_due(context, sources)
    ))
}

pub fn voided(context: &InvoiceContext, sources: InvoiceSources) -> String {
    let revision = context
        .revision
        .map(|id| format!(" It was replaced by revision {}.", clean(id)))
        .unwrap_or_default();
    context.close(format!(
        "{} was voided, so nothing is owed.{revision}",
        invoice_over_due(context, sources)
    ))
}

pub fn paid(context: &InvoiceContext, sources: InvoiceSources, was_written_off: bool) -> String {
    let shown: Vec<&Invoice> = sources
        .iter()
        .filter_map(|(stored, _)| trusted_snapshot(stored))
        .map(|(_, invoice)| invoice)
        .collect();
    let amount = collected(&shown).or(context.amount_paid);
    let money = context.money_of_invoice(amount, sources);
    let mut text = match (amount, money) {
        (Some(0), Some(money)) => format!(
            "{} is settled: nothing to collect ({money}).",
            capitalized(&context.invoice())
        ),
        (_, Some(money)) => format!("{money} paid for {}.", context.invoice()),
        (_, None) => format!("{} is paid.", capitalized(&context.invoice())),
    };

    text.push_str(outside_stripe(&shown));
    let overpaid = shown
        .iter()
        .find_map(|invoice| invoice.amount_overpaid.filter(|amount| *amount > 0));
    if let Some(amount) = context.money_of_invoice(overpaid, sources) {
        text.push_str(&format!(" It was overpaid by {amount}."));
    }
    if was_written_off {
        text.push_str(" It was paid after being written off.");
    }
    context.close(text)
}

/// Returns the sentence about a payment outside Stripe, or an empty text for a payment inside.
fn outside_stripe(shown: &[&Invoice]) -> &'static str {
    let is_outside = shown.iter().any(|invoice| {
        invoice.paid_out_of_band == Some(true)
            || invoice
                .amount_paid_off_stripe
                .is_some_and(|amount| amount > 0)
    });
    if is_outside {
        return " It was paid outside Stripe.";
    }

    // Newer API versions have neither field. There, an amount without an attempt to collect it is
    // the sign.
    let has_neither_field = shown.iter().all(|invoice| {
        invoice.paid_out_of_band.is_none() && invoice.amount_paid_off_stripe.is_none()
    });
    let came_without_attempt = shown.iter().any(|invoice| {
        invoice.attempted == Some(false) && invoice.amount_paid.is_some_and(|amount| amount > 0)
    });
    if has_neither_field && came_without_attempt {
        " It was apparently paid outside Stripe."
    } else {
        ""
    }
}

pub fn finalization_failed(context: &InvoiceContext, sources: InvoiceSources) -> String {
    let reason = sources
        .iter()
        .filter_map(|(stored, _)| trusted_snapshot(stored))
        .find_map(|(_, invoice)| invoice.finalization_error.as_ref());
    context.close(format!(
        "Stripe could not finalize {}{}{}",
        context.invoice(),
        over(context.due(sources)),
        because(reason)
    ))
}

pub fn action_required(context: &InvoiceContext, sources: &[&StoredObservation]) -> String {
    let money = amount_to_pay(context, sources, sources, sources);
    context.close(format!(
        "Payment{money} for {} needs the customer to act, for example to authenticate (3D Secure).",
        context.invoice()
    ))
}

pub fn in_flight(context: &InvoiceContext, sources: &[&StoredObservation]) -> String {
    let money = of_money(context, context.payment_amount(sources), sources);
    context.close(format!(
        "Payment{money} for {} is in progress: submitted, and not yet confirmed by the bank.",
        context.invoice()
    ))
}

pub fn partly_funded(
    context: &InvoiceContext,
    funded: i64,
    sources: &[&StoredObservation],
) -> String {
    let arrived = context.money(funded, sources);
    let total = of_money(context, context.payment_amount(sources), sources);
    context.close(format!(
        "{arrived}{total} has arrived by bank transfer for {}; the rest is outstanding.",
        context.invoice()
    ))
}

pub fn part_paid(
    context: &InvoiceContext,
    amount: Option<i64>,
    sources: &[&StoredObservation],
) -> String {
    let money = of_money(context, amount, sources);
    context.close(format!(
        "Part payment{money} received for {}.",
        context.invoice()
    ))
}

pub fn attempt_failed(context: &InvoiceContext, attempt: &FailedAttempt) -> String {
    let sources: Vec<&StoredObservation> = attempt.all_sources().collect();
    // Siblings that are not a source of any attempt may also have the reason.
    let charges: BTreeSet<&str> = attempt.all_charges().collect();
    let about_charges = context.about_charges(&charges);
    let mut payments = in_order(sources.iter().copied().chain(about_charges).collect());
    payments.dedup_by_key(|stored| stored.key);

    let money = amount_to_pay(context, &attempt.sources, &payments, &sources);
    let number = attempt
        .number
        .filter(|number| *number > 0)
        .map(|number| format!(" (attempt {number})"))
        .unwrap_or_default();
    let reason = failure_reason(&payments);
    context.close(format!(
        "Payment{money} for {} failed{number}{}{}",
        context.invoice(),
        because(reason.as_ref()),
        next_attempt(attempt).unwrap_or_default()
    ))
}

/// Describes the attempts that share one entry, because there are too many to list one by one.
pub fn more_attempts(context: &InvoiceContext, attempts: &[FailedAttempt]) -> String {
    let count = attempts.len();
    let seconds = || attempts.iter().map(FailedAttempt::time);
    let first = seconds().min().map(minute).unwrap_or_default();
    let last = seconds().max().map(minute).unwrap_or_default();
    let when = if first == last {
        format!("at {first}")
    } else {
        format!("between {first} and {last}")
    };
    let noun = if count == 1 { "attempt" } else { "attempts" };

    context.close(format!(
        "Payment for {} failed too often to list: the first {LISTED_AT_EACH_END} and the last \
         {LISTED_AT_EACH_END} attempts have entries of their own, and {} more {noun} failed {when}.",
        context.invoice(),
        money::thousands(count),
    ))
}

fn next_attempt(attempt: &FailedAttempt) -> Option<String> {
    snapshots(&attempt.sources).find_map(|invoice| {
        match (invoice.next_payment_attempt, invoice.no_next_attempt) {
            (Some(next), _) => Some(format!(" Next attempt: {}.", minute(next))),
            (None, Some(true)) => Some(" No further attempt will be made.".to_owned()),
            (None, _) => None,
        }
    })
}

/// Returns the reason of a failure. Prefers the PaymentIntent's to the charge's, and exact codes.
fn failure_reason(payments: &[&StoredObservation]) -> Option<Reason> {
    let errors = || {
        payments
            .iter()
            .filter_map(|stored| match &stored.observation.object {
                Object::PaymentIntent(intent) => intent.error.as_ref(),
                _ => None,
            })
    };
    let charges = || {
        payments
            .iter()
            .filter_map(|stored| match &stored.observation.object {
                Object::Charge(charge) => Some(charge),
                _ => None,
            })
    };

    let code = errors()
        .find_map(|error| error.code.clone())
        .or_else(|| charges().find_map(|charge| charge.outcome_reason.clone()))
        .or_else(|| charges().find_map(|charge| charge.failure_code.clone()));
    let message = errors()
        .find_map(|error| error.message.clone())
        .or_else(|| charges().find_map(|charge| charge.failure_message.clone()));
    (code.is_some() || message.is_some()).then_some(Reason { code, message })
}

pub fn refunded(context: &InvoiceContext, observed: ObjectSources<Refund>) -> String {
    let sources = observations(observed);
    let amount = observed.iter().find_map(|(_, refund)| refund.amount);
    context.close(match amount {
        Some(amount) => format!(
            "Refunded {}{} for {}.",
            context.money(amount, &sources),
            of_paid_amount(context, &sources),
            context.invoice()
        ),
        None => format!("A refund was made for {}.", context.invoice()),
    })
}

/// Describes a failed refund. `failed` are the observations that report the failure.
pub fn refund_failed(
    context: &InvoiceContext,
    observed: ObjectSources<Refund>,
    failed: ObjectSources<Refund>,
) -> String {
    let sources = observations(observed);
    let amount = observed.iter().find_map(|(_, refund)| refund.amount);
    let of_how_much = amount
        .map(|amount| {
            let money = context.money(amount, &sources);
            format!(" of {money}{}", of_paid_amount(context, &sources))
        })
        .unwrap_or_default();
    let is_canceled = failed.iter().all(|(stored, refund)| {
        refund.status.as_deref() == Some("canceled") && stored.observation.kind != "refund.failed"
    });
    let outcome = if is_canceled {
        "was canceled"
    } else {
        "failed"
    };
    let code = observed
        .iter()
        .find_map(|(_, refund)| refund.failure_reason.clone());
    let reason = code.map(|code| Reason {
        code: Some(code),
        message: None,
    });

    context.close(format!(
        "The refund{of_how_much} for {} {outcome}{}",
        context.invoice(),
        because(reason.as_ref())
    ))
}

pub fn charge_refunded(
    context: &InvoiceContext,
    amount: i64,
    observed: ObjectSources<Charge>,
) -> String {
    let sources = observations(observed);
    context.close(format!(
        "Refunded {}{} for {}.",
        context.money(amount, &sources),
        of_paid_amount(context, &sources),
        context.invoice()
    ))
}

pub fn credit_note(context: &InvoiceContext, observed: ObjectSources<CreditNote>) -> String {
    let note = credit_note_for_invoice(context, observed);
    context.close(format!("{note} was issued after payment."))
}

pub fn credit_note_voided(context: &InvoiceContext, observed: ObjectSources<CreditNote>) -> String {
    let note = credit_note_for_invoice(context, observed);
    context.close(format!("{note} was voided."))
}

fn credit_note_for_invoice(
    context: &InvoiceContext,
    observed: ObjectSources<CreditNote>,
) -> String {
    let sources = observations(observed);
    let number = observed
        .iter()
        .find_map(|(_, note)| note.number.as_deref())
        .map(|number| format!(" {}", name(number)))
        .unwrap_or_default();
    let amount = observed
        .iter()
        .find_map(|(_, note)| note.amount)
        .map(|amount| context.money(amount, &sources));

    format!(
        "Credit note{number}{} for {}",
        over(amount),
        context.invoice()
    )
}

/// Describes one step of a dispute. `observed` has all observations of it, `of_step` those of this
/// step.
pub fn dispute(
    context: &InvoiceContext,
    step: TieBreak,
    observed: ObjectSources<Dispute>,
    of_step: ObjectSources<Dispute>,
) -> String {
    let sources = observations(observed);
    let amount = of_step
        .iter()
        .chain(observed)
        .find_map(|(_, dispute)| dispute.amount);
    let of_how_much = of_money(context, amount, &sources);
    let invoice = context.invoice();
    let reason = observed
        .iter()
        .find_map(|(_, dispute)| dispute.reason.as_deref());
    let result = of_step
        .iter()
        .find_map(|(_, dispute)| dispute.status.as_deref());
    let after_colon = |text: Option<&str>| {
        text.map(|text| format!(": {}", clean(text)))
            .unwrap_or_default()
    };

    context.close(match step {
        TieBreak::FundsWithdrawn => {
            format!("Disputed: Stripe withdrew the disputed payment{of_how_much} for {invoice}.")
        }
        TieBreak::FundsReinstated => {
            format!("Disputed: Stripe returned the disputed payment{of_how_much} for {invoice}.")
        }
        TieBreak::DisputeClosed => format!(
            "The dispute over the payment{of_how_much} for {invoice} was closed{}.",
            after_colon(result)
        ),
        _ => format!(
            "The payment{of_how_much} for {invoice} is disputed{}.",
            after_colon(reason)
        ),
    })
}

/// Formats the amount to be paid: the remaining amount, else the payment's, else the amount due.
fn amount_to_pay(
    context: &InvoiceContext,
    invoice_sources: &[&StoredObservation],
    payments: &[&StoredObservation],
    currency_sources: &[&StoredObservation],
) -> String {
    let amount = snapshots(invoice_sources)
        .find_map(|invoice| invoice.amount_remaining)
        .or_else(|| context.payment_amount(payments))
        .or_else(|| snapshots(invoice_sources).find_map(|invoice| invoice.amount_due))
        .or(context.amount_due);
    of_money(context, amount, currency_sources)
}

fn snapshots<'a>(sources: &[&'a StoredObservation]) -> impl Iterator<Item = &'a Invoice> {
    sources
        .iter()
        .filter_map(|stored| trusted_snapshot(stored))
        .map(|(_, invoice)| invoice)
}

fn of_money(
    context: &InvoiceContext,
    amount: Option<i64>,
    sources: &[&StoredObservation],
) -> String {
    amount
        .map(|amount| format!(" of {}", context.money(amount, sources)))
        .unwrap_or_default()
}

fn of_paid_amount(context: &InvoiceContext, sources: &[&StoredObservation]) -> String {
    let paid = context.amount_paid.filter(|paid| *paid != 0);
    of_money(context, paid, sources)
}

fn observations<'a, T>(observed: ObjectSources<'_, 'a, T>) -> Vec<&'a StoredObservation> {
    observed.iter().map(|(stored, _)| *stored).collect()
}

fn over(amount: Option<String>) -> String {
    amount
        .map(|amount| format!(" over {amount}"))
        .unwrap_or_default()
}

/// Returns `Invoice NUMBER over AMOUNT`, for the beginning of a sentence.
fn invoice_over_due(context: &InvoiceContext, sources: InvoiceSources) -> String {
    let amount = over(context.due(sources));
    format!("{}{amount}", capitalized(&context.invoice()))
}

fn capitalized(invoice: &str) -> String {
    format!("I{}", invoice.strip_prefix('i').unwrap_or(invoice))
}

/// Returns `: code: text.`, or just the full stop.
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

/// Returns a time as `2026-02-03 09:15 UTC`.
fn minute(second: i64) -> String {
    let time = jiff::Timestamp::from_second(second.clamp(0, LAST_SECOND)).unwrap_or_default();
    jiff::fmt::strtime::format("%Y-%m-%d %H:%M UTC", time).unwrap_or_else(|_| time.to_string())
}
