//! Fetches the objects that thin events point to, in the context that the event names.
//!
//! The list of objects to fetch is durable. An event whose snapshot twin is known needs no fetch.

use std::collections::BTreeMap;

use futures_util::StreamExt;
use futures_util::stream;
use serde_json::Value;
use serde_json::value::RawValue;

use super::link_payments;
use super::recorder::as_stored;
use super::{ReconcileError, RunContext, WriteMode, parse_or_skip};
use crate::domain::stripe::object::Object;
use crate::store::{LookupKind, LookupState, PendingLookup};
use crate::stripe_api::{Scope, StripeApi, StripeApiError};

/// Events per batch.
const BATCH: u32 = 200;
/// Batches per run; the rest waits for the next run.
const MAX_BATCHES: usize = 500;
const MAX_CONCURRENT_CALLS: usize = 8;
/// Limit on the requests for an object that Stripe does not return.
const MAX_ATTEMPTS: i64 = 8;
/// Half of the delay after the first request that found nothing. The delay doubles each time.
const FIRST_RETRY_MS: i64 = 60_000;

/// Fetches all objects that are due. Returns `true` if any were due.
pub async fn fetch_objects(run: &mut RunContext<'_>) -> Result<bool, ReconcileError> {
    let mut found = false;
    for _ in 0..MAX_BATCHES {
        let now_ms = run.context.clock.now_ms();
        let batch = run
            .context
            .store
            .due_lookups(LookupKind::Object, now_ms, BATCH)
            .await?;
        if batch.is_empty() {
            break;
        }

        found = true;
        fetch_batch(run, &batch).await?;
        if run.plan.mode == WriteMode::DryRun {
            // A dry run marks nothing as done, so the next batch would be the same.
            break;
        }
    }
    Ok(found)
}

/// Path and scope of an object.
type Target = (String, Scope);

/// The answer for a target, with the events that point to it.
struct Fetched {
    target: Target,
    events: Vec<LookupState>,
    answer: Result<Option<Box<RawValue>>, StripeApiError>,
}

async fn fetch(api: StripeApi, target: Target, events: Vec<LookupState>) -> Fetched {
    let answer = api.get(&target.0, &[], &target.1).await;
    Fetched {
        target,
        events,
        answer,
    }
}

async fn fetch_batch(
    run: &mut RunContext<'_>,
    batch: &[PendingLookup],
) -> Result<(), ReconcileError> {
    let mut wanted: BTreeMap<Target, Vec<LookupState>> = BTreeMap::new();
    let mut marks = Vec::new();
    for event in batch {
        let state = LookupState {
            key: event.key,
            due_ms: None,
            attempts: event.attempts,
        };
        match target_of(run, event).await? {
            Some(target) => wanted.entry(target).or_default().push(state),
            None => marks.push(state),
        }
    }

    let calls: Vec<_> = wanted
        .into_iter()
        .map(|(target, events)| fetch(run.context.api.clone(), target, events))
        .collect();
    let answers: Vec<_> = stream::iter(calls)
        .buffer_unordered(MAX_CONCURRENT_CALLS)
        .collect()
        .await;

    let mut failure = None;
    let mut objects = Vec::new();
    for fetched in answers {
        let (path, scope) = fetched.target;
        match fetched.answer {
            Ok(Some(object)) => {
                objects.push((object, scope));
                marks.extend(fetched.events);
            }
            Ok(None) | Err(StripeApiError::Refused { .. }) => {
                tracing::warn!(
                    path,
                    "thin event points to an object that Stripe does not return"
                );
                let now_ms = run.context.clock.now_ms();
                marks.extend(
                    fetched
                        .events
                        .into_iter()
                        .map(|state| retry_later(state, now_ms)),
                );
            }
            Err(error) => failure = Some(error),
        }
    }

    // Record the fetched objects even if another call failed.
    record_objects(run, objects).await?;
    if run.plan.mode == WriteMode::Save {
        run.context.store.mark_lookup(&marks).await?;
    }
    failure.map_or(Ok(()), |error| Err(error.into()))
}

/// Schedules the next request. The delay doubles, and ends after [`MAX_ATTEMPTS`].
fn retry_later(state: LookupState, now_ms: i64) -> LookupState {
    let attempts = state.attempts + 1;
    LookupState {
        due_ms: (attempts < MAX_ATTEMPTS).then(|| now_ms + (FIRST_RETRY_MS << attempts.min(12))),
        attempts,
        ..state
    }
}

/// Returns the path and scope of a thin event's object, or `None` if there is nothing to fetch.
async fn target_of(
    run: &RunContext<'_>,
    event: &PendingLookup,
) -> Result<Option<Target>, ReconcileError> {
    let observation = parse_or_skip(event);
    let Some(observation) = observation.filter(|observation| observation.thin) else {
        return Ok(None);
    };
    if let Some(twin) = observation.snapshot_event.as_deref()
        && !run.context.store.known_ids(&[twin]).await?.is_empty()
    {
        return Ok(None);
    }

    let body: Value = event
        .body
        .as_deref()
        .and_then(|body| serde_json::from_slice(body).ok())
        .unwrap_or_default();
    let context = body["context"]
        .as_str()
        .filter(|text| has_plain_letters(text));
    let scope = context.map_or(Scope::Own, |context| Scope::Context(context.to_owned()));
    let path = body
        .pointer("/related_object/url")
        .and_then(Value::as_str)
        .filter(|path| is_api_path(path))
        .map(str::to_owned)
        .or_else(|| path_of(&observation.object));
    Ok(path.map(|path| (path, scope)))
}

/// Returns whether this is a plain path of Stripe's API. The event names the path, but must not
/// change anything else about the request.
fn is_api_path(path: &str) -> bool {
    (path.starts_with("/v1/") || path.starts_with("/v2/"))
        && !path.contains("..")
        && has_plain_letters(path)
}

fn has_plain_letters(text: &str) -> bool {
    text.bytes()
        .all(|b| b.is_ascii_alphanumeric() || b"_-./".contains(&b))
}

fn path_of(object: &Object) -> Option<String> {
    let (list, id) = match object {
        Object::Invoice(o) => ("invoices", &o.id),
        Object::InvoicePayment(o) => ("invoice_payments", &o.id),
        Object::PaymentIntent(o) => ("payment_intents", &o.id),
        Object::Charge(o) => ("charges", &o.id),
        Object::Refund(o) => ("refunds", &o.id),
        Object::CreditNote(o) => ("credit_notes", &o.id),
        Object::Dispute(o) => ("disputes", &o.id),
    };
    has_plain_letters(id).then(|| format!("/v1/{list}/{id}"))
}

/// Records objects, and requests the invoices of the payments among them.
async fn record_objects(
    run: &mut RunContext<'_>,
    objects: Vec<(Box<RawValue>, Scope)>,
) -> Result<(), ReconcileError> {
    let mut events = Vec::with_capacity(objects.len());
    let mut observed = Vec::new();
    for (object, scope) in objects {
        let Ok(object) = serde_json::from_str::<Value>(object.get()) else {
            continue;
        };
        let event = run.recorder.prepare_object(&object, scope.account());
        observed.extend(as_stored(&event)?.map(|stored| (stored.observation.object, scope)));
        events.push(event);
    }

    run.recorder.record(events).await?;
    for (object, scope) in observed {
        link_payments::link_payment(run, &object, &scope).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::stripe::event::EventKey;

    #[test]
    fn only_plain_api_paths_are_requested() {
        assert!(is_api_path("/v1/invoices/in_1"));
        for wrong in [
            "https://evil.example/v1/x",
            "/v3/x",
            "/v1/../x",
            "/v1/x?expand=y",
            "//evil/v1/",
            "/v1/a b",
        ] {
            assert!(!is_api_path(wrong), "{wrong}");
        }
    }

    #[test]
    fn retry_delay_doubles_and_ends() {
        let state = |due_ms, attempts| LookupState {
            key: EventKey([0; EventKey::LENGTH]),
            due_ms,
            attempts,
        };
        assert_eq!(retry_later(state(None, 0), 0), state(Some(120_000), 1));
        assert_eq!(retry_later(state(None, 1), 0), state(Some(240_000), 2));
        assert_eq!(
            retry_later(state(None, MAX_ATTEMPTS - 1), 0),
            state(None, MAX_ATTEMPTS)
        );
    }
}
