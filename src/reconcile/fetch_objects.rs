//! What thin events point to: the object is fetched, in the context that the event names, from the durable list of what remains
//! to be fetched. An event whose snapshot twin is known needs nothing.

use std::collections::BTreeMap;

use futures_util::StreamExt;
use futures_util::stream;
use serde_json::Value;
use serde_json::value::RawValue;

use super::link_payments;
use super::{ReconcileError, RunContext, WriteMode};
use crate::domain::stripe::event::{EventKey, Observation};
use crate::domain::stripe::object::Object;
use crate::store::{LookupKind, PendingLookup};
use crate::stripe_api::{Scope, StripeApi, StripeApiError};

/// Events that are looked at at a time.
const BATCH: u32 = 200;
/// Batches that one pass looks at: the rest waits for the next.
const BATCHES: usize = 500;
const AT_ONCE: usize = 8;
/// How often an object is asked for that Stripe says is not there.
const ATTEMPTS: i64 = 8;
const FIRST_WAIT_MS: i64 = 60_000;

/// True: there was something to fetch.
pub async fn run(pass: &mut RunContext<'_>) -> Result<bool, ReconcileError> {
    let mut found = false;
    for _ in 0..BATCHES {
        let batch = pass
            .tools
            .store
            .to_ask(LookupKind::Object, pass.tools.clock.now_ms(), BATCH)
            .await?;
        if batch.is_empty() {
            break;
        }
        found = true;
        fetch_all(pass, &batch).await?;
        if pass.plan.mode == WriteMode::DryRun {
            // Nothing is crossed off, so the next batch would be the same.
            break;
        }
    }
    Ok(found)
}

/// An object to fetch.
type Target = (String, Scope);
/// The events that point to it, and how often it was asked for.
type PointedBy = Vec<(EventKey, i64)>;
type Fetched = (
    Target,
    PointedBy,
    Result<Option<Box<RawValue>>, StripeApiError>,
);

async fn fetch(api: StripeApi, target: Target, events: PointedBy) -> Fetched {
    let answer = api.get(&target.0, &[], &target.1).await;
    (target, events, answer)
}

async fn fetch_all(
    pass: &mut RunContext<'_>,
    batch: &[PendingLookup],
) -> Result<(), ReconcileError> {
    let mut wanted: BTreeMap<Target, PointedBy> = BTreeMap::new();
    let mut done = Vec::new();
    for event in batch {
        match target(pass, event).await? {
            Some(target) => wanted
                .entry(target)
                .or_default()
                .push((event.key, event.attempts)),
            None => done.push((event.key, None, event.attempts)),
        }
    }
    let calls: Vec<_> = wanted
        .into_iter()
        .map(|(target, events)| fetch(pass.tools.api.clone(), target, events))
        .collect();
    let answers: Vec<_> = stream::iter(calls)
        .buffer_unordered(AT_ONCE)
        .collect()
        .await;
    let mut away = None;
    let mut objects = Vec::new();
    for ((path, scope), events, answer) in answers {
        match answer {
            Ok(Some(object)) => {
                objects.push((object, scope));
                done.extend(
                    events
                        .into_iter()
                        .map(|(key, attempts)| (key, None, attempts)),
                );
            }
            Ok(None) | Err(StripeApiError::Refused { .. }) => {
                let now_ms = pass.tools.clock.now_ms();
                tracing::warn!(
                    path,
                    "a thin event points to an object that Stripe does not show"
                );
                done.extend(
                    events
                        .into_iter()
                        .map(|(key, attempts)| again(key, attempts, now_ms)),
                );
            }
            Err(error) => away = Some(error),
        }
    }
    keep(pass, objects).await?;
    if pass.plan.mode == WriteMode::Save {
        pass.tools.store.mark_lookup(&done).await?;
    }
    away.map_or(Ok(()), |error| Err(error.into()))
}

/// Twice the wait each time, and never again after some.
fn again(key: EventKey, attempts: i64, now_ms: i64) -> (EventKey, Option<i64>, i64) {
    let attempts = attempts + 1;
    let due_ms = (attempts < ATTEMPTS).then(|| now_ms + (FIRST_WAIT_MS << attempts.min(12)));
    (key, due_ms, attempts)
}

/// Where the object is that a thin event points to; None: there is nothing to fetch for it.
async fn target(
    pass: &RunContext<'_>,
    event: &PendingLookup,
) -> Result<Option<Target>, ReconcileError> {
    let telling = event
        .telling
        .as_deref()
        .and_then(|text| serde_json::from_str::<Observation>(text).ok());
    let Some(telling) = telling.filter(|telling| telling.thin) else {
        return Ok(None);
    };
    if let Some(twin) = telling.snapshot_event.as_deref()
        && !pass.tools.store.known_ids(&[twin]).await?.is_empty()
    {
        return Ok(None);
    }
    let body: Value = event
        .body
        .as_deref()
        .and_then(|body| serde_json::from_slice(body).ok())
        .unwrap_or_default();
    let scope = match body["context"].as_str().filter(|context| is_plain(context)) {
        Some(context) => Scope::Context(context.to_owned()),
        None => Scope::Own,
    };
    let named = body
        .pointer("/related_object/url")
        .and_then(Value::as_str)
        .filter(|path| is_path(path));
    Ok(named
        .map(str::to_owned)
        .or_else(|| path_of(&telling.object))
        .map(|path| (path, scope)))
}

/// The event says where, but not what else we ask: a path of Stripe's API and nothing more.
fn is_path(path: &str) -> bool {
    (path.starts_with("/v1/") || path.starts_with("/v2/")) && !path.contains("..") && is_plain(path)
}

fn is_plain(text: &str) -> bool {
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
    is_plain(id).then(|| format!("/v1/{list}/{id}"))
}

async fn keep(
    pass: &mut RunContext<'_>,
    objects: Vec<(Box<RawValue>, Scope)>,
) -> Result<(), ReconcileError> {
    let mut events = Vec::with_capacity(objects.len());
    let mut payments = Vec::new();
    for (object, scope) in objects {
        let Ok(object) = serde_json::from_str::<Value>(object.get()) else {
            continue;
        };
        let event = pass.keeper.read_object(&object, account_of(&scope));
        let telling = event
            .telling
            .as_deref()
            .and_then(|text| serde_json::from_str::<Observation>(text).ok());
        payments.extend(telling.map(|telling| (telling.object, scope)));
        events.push(event);
    }
    pass.keeper.keep(events).await?;
    for (object, scope) in payments {
        link_payments::link(pass, &object, &scope).await?;
    }
    Ok(())
}

/// The connected account that a scope names: `acct_1` alone, or at the end of a path of contexts.
pub(super) fn account_of(scope: &Scope) -> Option<&str> {
    match scope {
        Scope::Own => None,
        Scope::Account(account) => Some(account),
        Scope::Context(context) => context
            .rsplit('/')
            .next()
            .filter(|last| last.starts_with("acct_")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_path_of_stripes_api_is_asked_for() {
        assert!(is_path("/v1/invoices/in_1"));
        for wrong in [
            "https://evil.example/v1/x",
            "/v3/x",
            "/v1/../x",
            "/v1/x?expand=y",
            "//evil/v1/",
            "/v1/a b",
        ] {
            assert!(!is_path(wrong), "{wrong}");
        }
    }

    #[test]
    fn a_context_names_its_account() {
        assert_eq!(
            account_of(&Scope::Context("acct_1".to_owned())),
            Some("acct_1")
        );
        assert_eq!(
            account_of(&Scope::Context("org_1/acct_2".to_owned())),
            Some("acct_2")
        );
        assert_eq!(account_of(&Scope::Context("org_1".to_owned())), None);
    }

    #[test]
    fn waits_grow_and_end() {
        let key = EventKey([0; EventKey::LENGTH]);
        assert_eq!(again(key, 0, 0), (key, Some(120_000), 1));
        assert_eq!(again(key, 1, 0), (key, Some(240_000), 2));
        assert_eq!(again(key, ATTEMPTS - 1, 0), (key, None, ATTEMPTS));
    }
}
