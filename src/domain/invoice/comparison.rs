//! Comparison of a stored invoice with the invoice at Stripe: amount, currency, mode and state.
//!
//! A field is compared only if both sides have it. `reconcile` decides the meaning of a difference
//! and since when it exists.

use serde::Deserialize;
use serde_json::Value;

use crate::domain::history::{Entry, StoredObservation};
use crate::domain::money;
use crate::domain::payment_state::PaymentState;
use crate::domain::stripe::lenient::{Lenient, Nested};

/// One field with different values on both sides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldDifference {
    pub field: Field,
    pub ours: String,
    pub stripes: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    Amount,
    Currency,
    Mode,
    PaymentState,
}

impl Field {
    pub fn as_str(self) -> &'static str {
        match self {
            Field::Amount => "amount",
            Field::Currency => "currency",
            Field::Mode => "livemode",
            Field::PaymentState => "state",
        }
    }
}

/// The fields that are compared, of an invoice as Stripe's API returns it.
#[derive(Default, Deserialize)]
#[serde(default)]
struct StripeInvoice {
    id: Lenient<String>,
    amount_due: Lenient<i64>,
    currency: Lenient<String>,
    livemode: Lenient<bool>,
    status: Lenient<String>,
    total: Lenient<i64>,
    total_excluding_tax: Lenient<i64>,
}

impl StripeInvoice {
    fn read(stripes: &Value) -> StripeInvoice {
        Nested::deserialize(stripes)
            .ok()
            .and_then(|Nested(invoice)| invoice)
            .unwrap_or_default()
    }
}

/// Stripe's status of an invoice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StripeStatus {
    Draft,
    Open,
    Uncollectible,
    Void,
    Paid,
}

impl StripeStatus {
    /// Reads the status of an invoice as Stripe's API returns it. Returns `None` for an absent or
    /// unknown one.
    pub fn of(stripes: &Value) -> Option<StripeStatus> {
        StripeStatus::parse(StripeInvoice::read(stripes).status.0.as_deref()?)
    }

    fn parse(text: &str) -> Option<StripeStatus> {
        Some(match text {
            "draft" => StripeStatus::Draft,
            "open" => StripeStatus::Open,
            "uncollectible" => StripeStatus::Uncollectible,
            "void" => StripeStatus::Void,
            "paid" => StripeStatus::Paid,
            _ => return None,
        })
    }

    /// Returns whether the status is final at Stripe.
    pub fn is_settled(self) -> bool {
        matches!(self, StripeStatus::Paid | StripeStatus::Void)
    }

    fn as_str(self) -> &'static str {
        match self {
            StripeStatus::Draft => "draft",
            StripeStatus::Open => "open",
            StripeStatus::Uncollectible => "uncollectible",
            StripeStatus::Void => "void",
            StripeStatus::Paid => "paid",
        }
    }
}

/// Returns the differences between a stored document, with its observations and history, and
/// Stripe's invoice.
pub fn differences(
    document: &Value,
    known: &[StoredObservation],
    history: &[Entry],
    stripes: &Value,
) -> Vec<FieldDifference> {
    let stripes = StripeInvoice::read(stripes);
    let found = [
        currency(document, &stripes),
        amount(document, &stripes),
        mode(known, &stripes),
        state(history, &stripes),
    ];

    found.into_iter().flatten().collect()
}

fn currency(document: &Value, stripes: &StripeInvoice) -> Option<FieldDifference> {
    let (ours, theirs) = (unit(document)?, stripes.currency.0.as_deref()?);
    let differs = !ours.eq_ignore_ascii_case(theirs);

    differs.then(|| FieldDifference {
        field: Field::Currency,
        ours: ours.to_uppercase(),
        stripes: theirs.to_uppercase(),
    })
}

fn unit(document: &Value) -> Option<&str> {
    document
        .pointer("/spec/paymentUnit")?
        .as_str()
        .filter(|unit| !unit.is_empty())
}

/// Compares amounts. The stored amount may be what was billed or what was left to pay, with or
/// without tax: it differs only if it matches no such amount.
fn amount(document: &Value, stripes: &StripeInvoice) -> Option<FieldDifference> {
    let ours = document.pointer("/status/billableAmount")?.as_f64()?;
    let currency = stripes.currency.0.as_deref()?;
    if unit(document).is_some_and(|unit| !unit.eq_ignore_ascii_case(currency)) {
        return None;
    }

    let theirs = [
        &stripes.amount_due,
        &stripes.total,
        &stripes.total_excluding_tax,
    ];
    let mut theirs = theirs.into_iter().filter_map(|amount| amount.0).peekable();
    let shown = *theirs.peek()?;

    // Documents contain amounts as floats, so amounts are equal if they round to the same minor
    // unit.
    let (_, unit) = money::unit_of(currency);
    let ours_minor = (ours * unit as f64).round();
    if theirs.any(|theirs| (ours_minor - theirs as f64).abs() < 0.5) {
        return None;
    }

    Some(FieldDifference {
        field: Field::Amount,
        ours: if ours_minor.abs() < 9e15 {
            money::amount(ours_minor as i64, Some(currency))
        } else {
            ours.to_string()
        },
        stripes: money::amount(shown, Some(currency)),
    })
}

/// Compares modes. Only events in which Stripe names the invoice count, because anybody can refer
/// to it from another mode.
fn mode(known: &[StoredObservation], stripes: &StripeInvoice) -> Option<FieldDifference> {
    let theirs = stripes.livemode.0?;
    let id = stripes.id.0.as_deref()?;
    known.iter().find(|stored| {
        let observation = &stored.observation;
        let is_own = observation.object.named_invoice() == Some(id);
        let differs = observation.livemode.is_some_and(|ours| ours != theirs);
        is_own && !observation.fetched && differs
    })?;

    Some(FieldDifference {
        field: Field::Mode,
        ours: mode_name(!theirs).to_owned(),
        stripes: mode_name(theirs).to_owned(),
    })
}

fn mode_name(live: bool) -> &'static str {
    if live { "live mode" } else { "test mode" }
}

fn state(history: &[Entry], stripes: &StripeInvoice) -> Option<FieldDifference> {
    let ours = history.last().map(|entry| entry.state);
    let status = StripeStatus::parse(stripes.status.0.as_deref()?)?;

    let agrees = match status {
        StripeStatus::Paid => ours == Some(PaymentState::Paid),
        StripeStatus::Void => ours.is_some() && ours != Some(PaymentState::Paid),
        StripeStatus::Draft | StripeStatus::Open | StripeStatus::Uncollectible => {
            ours != Some(PaymentState::Paid)
        }
    };

    (!agrees).then(|| FieldDifference {
        field: Field::PaymentState,
        ours: ours.map_or("no state", PaymentState::as_str).to_owned(),
        stripes: status.as_str().to_owned(),
    })
}

/// Returns whether two histories have the same states and times. Their messages may differ.
pub fn same_facts(a: &[Entry], b: &[Entry]) -> bool {
    let facts = |entries: &[Entry]| {
        entries
            .iter()
            .map(|e| (e.state, e.timestamp_ms))
            .collect::<Vec<_>>()
    };
    facts(a) == facts(b)
}

/// Returns whether two histories look the same to a reader.
pub fn same_entries(a: &[Entry], b: &[Entry]) -> bool {
    let shown = |e: &Entry| (e.state, e.timestamp_ms, e.message.clone());
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| shown(a) == shown(b))
}

const MINUTE_MS: i64 = 60_000;
const DAY_MS: i64 = 24 * 60 * MINUTE_MS;

/// Returns the time of the next comparison of an invoice that is not settled. A young invoice is
/// compared often, an old one once a day.
pub fn next_check_ms(created_s: i64, now_ms: i64) -> i64 {
    let age_ms = now_ms.saturating_sub(created_s.saturating_mul(1000));
    now_ms + (age_ms / 8).clamp(10 * MINUTE_MS, DAY_MS)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn entry(state: PaymentState) -> Entry {
        Entry {
            state,
            timestamp_ms: 1,
            message: None,
            proofs: Vec::new(),
        }
    }

    fn fields(
        document: Value,
        history: &[Entry],
        stripes: Value,
    ) -> Vec<(&'static str, String, String)> {
        let found = differences(&document, &[], history, &stripes);
        found
            .into_iter()
            .map(|d| (d.field.as_str(), d.ours, d.stripes))
            .collect()
    }

    #[test]
    fn amounts_are_compared_to_minor_unit_if_both_sides_have_them() {
        let document = |amount: f64| json!({"spec": {"paymentUnit": "usd"}, "status": {"billableAmount": amount}});
        let stripes =
            json!({"currency": "usd", "amount_due": 123_450, "total": 133_450, "status": "open"});
        assert_eq!(fields(document(1234.5), &[], stripes.clone()), []);
        assert_eq!(
            fields(document(1_234.500_000_000_1), &[], stripes.clone()),
            []
        );
        assert_eq!(fields(document(1334.5), &[], stripes.clone()), []);
        assert_eq!(
            fields(document(1234.51), &[], stripes.clone()),
            [("amount", "1234.51 USD".to_owned(), "1234.50 USD".to_owned())]
        );
        assert_eq!(fields(json!({}), &[], stripes), []);
        let euros = json!({"currency": "eur", "amount_due": 1});

        assert_eq!(
            fields(document(1234.5), &[], euros),
            [("currency", "USD".to_owned(), "EUR".to_owned())]
        );
    }

    #[test]
    fn state_agrees_with_status_at_stripe() {
        let agrees = |state: Option<PaymentState>, status: &str| {
            let history: Vec<Entry> = state.map(entry).into_iter().collect();
            fields(json!({}), &history, json!({"status": status})).is_empty()
        };

        assert!(agrees(Some(PaymentState::Paid), "paid"));
        assert!(!agrees(Some(PaymentState::PaymentPending), "paid"));
        assert!(!agrees(None, "paid"));
        assert!(agrees(None, "draft"));
        assert!(agrees(Some(PaymentState::PaymentFailed), "open"));
        assert!(!agrees(Some(PaymentState::Paid), "open"));
        assert!(agrees(Some(PaymentState::PaymentFailed), "void"));
        assert!(!agrees(None, "void"));

        assert!(agrees(Some(PaymentState::Paid), "a future status"));
    }

    #[test]
    fn checks_back_off_with_age() {
        let now_ms = 100 * DAY_MS;
        let wait = |age_ms: i64| next_check_ms((now_ms - age_ms) / 1000, now_ms) - now_ms;
        assert_eq!(wait(0), 10 * MINUTE_MS);
        assert_eq!(wait(-DAY_MS), 10 * MINUTE_MS);
        assert_eq!(wait(DAY_MS), DAY_MS / 8);
        assert_eq!(wait(90 * DAY_MS), DAY_MS);
    }
}
