//! Which invoice a payment belongs to, where its events do not say; and why an attempt failed, where no event told.
//!
//! Since API version 2025-03-31 neither PaymentIntents nor charges name their invoice: `/v1/invoice_payments` joins them.

use serde_json::Value;
use serde_json::value::RawValue;

use super::fetch_objects::account_of;
use super::{ReconcileError, RunContext, WriteMode};
use crate::domain::history::payment_links::PaymentLinks;
use crate::domain::stripe::event::{EventKey, Observation};
use crate::domain::stripe::object::Object;
use crate::queries::invoices::parse_observations;
use crate::store::{LookupKind, NewEvent, PendingLookup};
use crate::stripe_api::{Query, Scope, StripeApiError, StripePage};

/// Events that are looked at at a time, of each kind.
const BATCH: u32 = 200;
/// Batches that one pass looks at: the rest waits for the next.
const BATCHES: usize = 500;
/// How long Stripe may take until an InvoicePayment shows.
const YOUNG_S: i64 = 600;
const AGAIN_MS: i64 = 15 * 60_000;

pub async fn run(pass: &mut RunContext<'_>) -> Result<(), ReconcileError> {
    for _ in 0..BATCHES {
        let batch = pass
            .tools
            .store
            .to_ask(LookupKind::Invoice, pass.tools.clock.now_ms(), BATCH)
            .await?;
        let mut done = Vec::with_capacity(batch.len());
        for event in &batch {
            done.push(look_at(pass, event).await?);
        }
        if pass.plan.mode == WriteMode::DryRun || batch.is_empty() {
            // A dry run crosses nothing off, so the next batch would be the same.
            break;
        }
        pass.tools.store.mark_lookup(&done).await?;
    }
    Ok(())
}

async fn look_at(
    pass: &mut RunContext<'_>,
    event: &PendingLookup,
) -> Result<(EventKey, Option<i64>, i64), ReconcileError> {
    let done = (event.key, None, event.attempts);
    let telling = event
        .telling
        .as_deref()
        .and_then(|text| serde_json::from_str::<Observation>(text).ok());
    let Some(telling) = telling.filter(|_| !says_whose(event)) else {
        return Ok(done);
    };
    let scope = telling.account.clone().map_or(Scope::Own, Scope::Account);
    let is_linked = link(pass, &telling.object, &scope).await?;
    let is_young = pass.tools.clock.now_s() - telling.created < YOUNG_S;
    if !is_linked && is_young && event.attempts == 0 {
        return Ok((event.key, Some(pass.tools.clock.now_ms() + AGAIN_MS), 1));
    }
    Ok(done)
}

/// Until basil a payment has a field for its invoice: when that is null, the payment is for none.
fn says_whose(event: &PendingLookup) -> bool {
    let body: Option<Value> = event
        .body
        .as_deref()
        .and_then(|body| serde_json::from_slice(body).ok());
    let object = body.as_ref().and_then(|body| body.pointer("/data/object"));
    object.is_some_and(|object| object.get("invoice").is_some())
}

/// Asks Stripe whose payment this is, unless it is known. True: it is known now.
pub(super) async fn link(
    pass: &mut RunContext<'_>,
    object: &Object,
    scope: &Scope,
) -> Result<bool, ReconcileError> {
    let Some((id, named_intent)) = part(object) else {
        return Ok(true);
    };
    let known = parse_observations(&pass.tools.store.observations_for(&[id.to_owned()]).await?)?;
    let links = PaymentLinks::read(known.iter().map(|k| &k.telling));
    if links.invoice_of(object).is_some() {
        return Ok(true);
    }
    let charge = charge_of(object);
    let intent = named_intent
        .or_else(|| charge.and_then(|charge| links.intent_of(charge)))
        .map(str::to_owned);
    let (intent, mut found) = match (intent, charge) {
        (Some(intent), _) => (Some(intent), Vec::new()),
        (None, Some(charge)) => intent_of_charge(pass, charge, scope).await?,
        (None, None) => (None, Vec::new()),
    };
    let asked = match (&intent, charge) {
        (Some(intent), _) => ("payment_intent", intent.as_str()),
        (None, Some(charge)) => ("charge", charge),
        (None, None) => return Ok(false),
    };
    if !pass.asked.insert(asked.1.to_owned()) {
        return Ok(false);
    }
    let query = [
        ("payment[type]", asked.0),
        (&*format!("payment[{}]", asked.0), asked.1),
    ];
    let payments = list(pass, &query, scope).await?;
    let is_linked = !payments.data.is_empty();
    found.extend(
        payments
            .data
            .iter()
            .flat_map(|payment| read(pass, payment, scope)),
    );
    pass.keeper.keep(found).await?;
    Ok(is_linked)
}

/// The id of a part of a payment, and the PaymentIntent that it is or names.
fn part(object: &Object) -> Option<(&str, Option<&str>)> {
    match object {
        Object::PaymentIntent(o) => Some((&o.id, Some(&o.id))),
        Object::Charge(o) => Some((&o.id, o.payment_intent.as_deref())),
        Object::Refund(o) => Some((&o.id, o.payment_intent.as_deref())),
        Object::Dispute(o) => Some((&o.id, o.payment_intent.as_deref())),
        Object::Invoice(_) | Object::InvoicePayment(_) | Object::CreditNote(_) => None,
    }
}

fn charge_of(object: &Object) -> Option<&str> {
    match object {
        Object::Charge(o) => Some(&o.id),
        Object::Refund(o) => o.charge.as_deref(),
        Object::Dispute(o) => o.charge.as_deref(),
        _ => None,
    }
}

/// A refund may name only its charge, and the charge its PaymentIntent.
async fn intent_of_charge(
    pass: &mut RunContext<'_>,
    charge: &str,
    scope: &Scope,
) -> Result<(Option<String>, Vec<NewEvent>), ReconcileError> {
    let path = format!("/v1/charges/{charge}");
    if !pass.asked.insert(path.clone()) {
        return Ok((None, Vec::new()));
    }
    let found = pass.tools.api.get(&path, &[], scope).await?;
    let Some(found) = found.and_then(|raw| serde_json::from_str::<Value>(raw.get()).ok()) else {
        return Ok((None, Vec::new()));
    };
    let event = pass.keeper.read_object(&found, account_of(scope));
    let telling = event
        .telling
        .as_deref()
        .and_then(|text| serde_json::from_str::<Observation>(text).ok());
    let intent = match telling.map(|telling| telling.object) {
        Some(Object::Charge(charge)) => charge.payment_intent,
        _ => None,
    };
    Ok((intent, vec![event]))
}

/// Asks why the latest attempt to collect an invoice failed.
pub(super) async fn reason(
    pass: &mut RunContext<'_>,
    stripe_invoice_id: &str,
    scope: &Scope,
) -> Result<(), ReconcileError> {
    let query = [
        ("invoice", stripe_invoice_id),
        ("expand[]", "data.payment.payment_intent"),
    ];
    let payments = list(pass, &query, scope).await?;
    let found = payments
        .data
        .iter()
        .flat_map(|payment| read(pass, payment, scope))
        .collect();
    pass.keeper.keep(found).await
}

/// An account whose API has no InvoicePayments has none.
async fn list(
    pass: &RunContext<'_>,
    query: Query<'_>,
    scope: &Scope,
) -> Result<StripePage, ReconcileError> {
    match pass
        .tools
        .api
        .list("/v1/invoice_payments", query, scope)
        .await
    {
        Err(StripeApiError::Refused { status, reason, .. }) => {
            tracing::warn!(
                status,
                reason,
                "Stripe does not show which invoice payments belong to"
            );
            Ok(StripePage {
                data: Vec::new(),
                has_more: false,
            })
        }
        page => Ok(page?),
    }
}

/// An InvoicePayment, and the PaymentIntent that stands expanded in it, each as an object of its own: so the one does not
/// count as changed when the other does.
fn read(pass: &RunContext<'_>, payment: &RawValue, scope: &Scope) -> Vec<NewEvent> {
    let Ok(mut payment) = serde_json::from_str::<Value>(payment.get()) else {
        return Vec::new();
    };
    let account = account_of(scope);
    let mut found = Vec::new();
    if let Some(intent) = payment
        .pointer_mut("/payment/payment_intent")
        .filter(|intent| intent.is_object())
    {
        found.push(pass.keeper.read_object(intent, account));
        *intent = intent["id"].clone();
    }
    found.push(pass.keeper.read_object(&payment, account));
    found
}
