//! Finds the invoice of a payment if its events do not name it, and the reason of a failed attempt
//! if no event has it.
//!
//! Since API version 2025-03-31 neither PaymentIntents nor charges name their invoice:
//! `/v1/invoice_payments` joins them.

use serde_json::Value;
use serde_json::value::RawValue;

use super::recorder::as_stored;
use super::{ReconcileError, RunContext, WriteMode, parse_or_skip};
use crate::domain::history::payment_links::PaymentLinks;
use crate::domain::stripe::object::Object;
use crate::queries::invoices::parse_observations;
use crate::store::{LookupKind, LookupState, NewEvent, PendingLookup};
use crate::stripe_api::{Query, Scope, StripeApiError, StripePage};

/// Events per batch, of each event family.
const BATCH: u32 = 200;
/// Batches per run; the rest waits for the next run.
const MAX_BATCHES: usize = 500;
/// Longest delay until Stripe shows an InvoicePayment.
const MAX_DELAY_S: i64 = 600;
/// Delay before the second request for an InvoicePayment that Stripe did not show.
const RETRY_MS: i64 = 15 * 60_000;

/// Requests the invoices of all payments that are due.
pub async fn link_payments(run: &mut RunContext<'_>) -> Result<(), ReconcileError> {
    for _ in 0..MAX_BATCHES {
        let now_ms = run.context.clock.now_ms();
        let batch = run
            .context
            .store
            .due_lookups(LookupKind::Invoice, now_ms, BATCH)
            .await?;
        let mut marks = Vec::with_capacity(batch.len());
        for event in &batch {
            marks.push(look_up(run, event).await?);
        }

        if run.plan.mode == WriteMode::DryRun || batch.is_empty() {
            // A dry run marks nothing as done, so the next batch would be the same.
            break;
        }
        run.context.store.mark_lookup(&marks).await?;
    }
    Ok(())
}

/// Requests the invoice of one event, and returns the time of the next request, if any.
async fn look_up(
    run: &mut RunContext<'_>,
    event: &PendingLookup,
) -> Result<LookupState, ReconcileError> {
    let done = LookupState {
        key: event.key,
        due_ms: None,
        attempts: event.attempts,
    };
    let Some(observation) = parse_or_skip(event).filter(|_| !has_invoice_field(event)) else {
        return Ok(done);
    };

    let scope = observation
        .account
        .clone()
        .map_or(Scope::Own, Scope::Account);
    let is_linked = link_payment(run, &observation.object, &scope).await?;
    let is_young = run.context.clock.now_s() - observation.created < MAX_DELAY_S;
    if !is_linked && is_young && event.attempts == 0 {
        return Ok(LookupState {
            due_ms: Some(run.context.clock.now_ms() + RETRY_MS),
            attempts: 1,
            ..done
        });
    }
    Ok(done)
}

/// Returns whether the object has a field for its invoice, as before API version `basil`. If that
/// field is null, the payment belongs to no invoice.
fn has_invoice_field(event: &PendingLookup) -> bool {
    let body: Option<Value> = event
        .body
        .as_deref()
        .and_then(|body| serde_json::from_slice(body).ok());
    let object = body.as_ref().and_then(|body| body.pointer("/data/object"));
    object.is_some_and(|object| object.get("invoice").is_some())
}

/// Requests the invoice of a payment, unless it is known. Returns `true` if it is known now.
pub(super) async fn link_payment(
    run: &mut RunContext<'_>,
    object: &Object,
    scope: &Scope,
) -> Result<bool, ReconcileError> {
    let Some((id, named_intent)) = payment_part(object) else {
        return Ok(true);
    };
    let rows = run.context.store.observations_for(&[id.to_owned()]).await?;
    let observations = parse_observations(&rows)?;
    let links = PaymentLinks::read(observations.iter().map(|stored| &stored.observation));
    if links.invoice_of(object).is_some() {
        return Ok(true);
    }

    let charge = charge_of(object);
    let known_intent = named_intent
        .or_else(|| charge.and_then(|charge| links.intent_of(charge)))
        .map(str::to_owned);
    let (intent, mut found) = match (known_intent, charge) {
        (Some(intent), _) => (Some(intent), Vec::new()),
        (None, Some(charge)) => intent_of_charge(run, charge, scope).await?,
        (None, None) => (None, Vec::new()),
    };
    let (kind, id) = match (&intent, charge) {
        (Some(intent), _) => ("payment_intent", intent.as_str()),
        (None, Some(charge)) => ("charge", charge),
        (None, None) => return Ok(false),
    };
    if !run.looked_up.insert(id.to_owned()) {
        return Ok(false);
    }

    let query = [("payment[type]", kind), (&*format!("payment[{kind}]"), id)];
    let payments = list_invoice_payments(run, &query, scope).await?;
    let is_linked = !payments.data.is_empty();
    found.extend(
        payments
            .data
            .iter()
            .flat_map(|payment| prepare_payment(run, payment, scope)),
    );
    run.recorder.record(found).await?;
    Ok(is_linked)
}

/// Returns the id of a part of a payment, and the PaymentIntent that it is or names.
fn payment_part(object: &Object) -> Option<(&str, Option<&str>)> {
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
        Object::Invoice(_)
        | Object::InvoicePayment(_)
        | Object::PaymentIntent(_)
        | Object::CreditNote(_) => None,
    }
}

/// Requests a charge to find its PaymentIntent, because a refund may name only its charge.
async fn intent_of_charge(
    run: &mut RunContext<'_>,
    charge: &str,
    scope: &Scope,
) -> Result<(Option<String>, Vec<NewEvent>), ReconcileError> {
    let path = format!("/v1/charges/{charge}");
    if !run.looked_up.insert(path.clone()) {
        return Ok((None, Vec::new()));
    }
    let found = run.context.api.get(&path, &[], scope).await?;
    let Some(found) = found.and_then(|raw| serde_json::from_str::<Value>(raw.get()).ok()) else {
        return Ok((None, Vec::new()));
    };

    let event = run.recorder.prepare_object(&found, scope.account());
    let intent = match as_stored(&event)?.map(|stored| stored.observation.object) {
        Some(Object::Charge(charge)) => charge.payment_intent,
        _ => None,
    };
    Ok((intent, vec![event]))
}

/// Requests the payments of an invoice, which have the reason of the last failed attempt.
pub(super) async fn fetch_reason(
    run: &mut RunContext<'_>,
    stripe_invoice_id: &str,
    scope: &Scope,
) -> Result<(), ReconcileError> {
    let query = [
        ("invoice", stripe_invoice_id),
        ("expand[]", "data.payment.payment_intent"),
    ];
    let payments = list_invoice_payments(run, &query, scope).await?;
    let found = payments
        .data
        .iter()
        .flat_map(|payment| prepare_payment(run, payment, scope))
        .collect();

    run.recorder.record(found).await
}

/// Lists InvoicePayments. The list is empty if the account's API version does not have them.
async fn list_invoice_payments(
    run: &RunContext<'_>,
    query: Query<'_>,
    scope: &Scope,
) -> Result<StripePage, ReconcileError> {
    let listed = run
        .context
        .api
        .list("/v1/invoice_payments", query, scope)
        .await;
    match listed {
        Err(StripeApiError::Refused { status, reason, .. }) => {
            tracing::warn!(status, reason, "Stripe denied the list of invoice payments");
            Ok(StripePage {
                data: Vec::new(),
                has_more: false,
            })
        }
        page => Ok(page?),
    }
}

/// Prepares an InvoicePayment and the PaymentIntent that is expanded in it as two objects, so that
/// neither counts as changed when only the other has changed.
fn prepare_payment(run: &RunContext<'_>, payment: &RawValue, scope: &Scope) -> Vec<NewEvent> {
    let Ok(mut payment) = serde_json::from_str::<Value>(payment.get()) else {
        return Vec::new();
    };

    let account = scope.account();
    let mut found = Vec::new();
    let intent = payment
        .pointer_mut("/payment/payment_intent")
        .filter(|intent| intent.is_object());
    if let Some(intent) = intent {
        found.push(run.recorder.prepare_object(intent, account));
        *intent = intent["id"].clone();
    }

    found.push(run.recorder.prepare_object(&payment, account));

    found
}
