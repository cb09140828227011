//! What is wrong, and what to do, in words: from what the database says, and from Stripe's API where there is a key. Printing is for
//! whoever asks: the command `doctor`, or a page.
//!
//! Nothing is put right here, and nothing is migrated. What is judged how stands in `checks`, `database` and `signing`.

mod checks;
mod database;
mod format;
mod signing;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::Serialize;

use super::monitoring::missed_webhooks::first_missed;
use super::monitoring::monitor::{self, DELIVERED, EXAMINED, HealthSnapshot};
use super::reconcile::look_at_endpoints;
use crate::clock::Clock;
use crate::domain::stripe::signing_secrets::SecretName;
use crate::monitoring::delivery_gap;
use crate::store::{ActivityDelta, Durability, Store, StoreError, StoreErrorClass};
use crate::stripe_api::{StripeApi, StripeApiError};

/// What is looked at.
pub struct DoctorInput {
    /// Or why it could not be opened.
    pub store: Result<Store, StoreError>,
    /// None: only what the last passes said is known of Stripe.
    pub api: Option<StripeApi>,
    /// There is a key for reconciliation here.
    pub reconciles: bool,
    /// The configured signing secrets; None: they are not known.
    pub secrets: Option<Vec<SecretName>>,
    pub clock: Clock,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckStatus {
    Ok,
    /// It cannot be told.
    Unknown,
    /// Somebody should look at it, today.
    Warning,
    /// Somebody should look at it now.
    Failing,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    pub name: &'static str,
    pub state: CheckStatus,
    /// What was found, in words.
    pub finding: String,
    /// What to do about it. `cure` is the name in the JSON output, which scripts rely on.
    #[serde(rename = "cure")]
    pub remedy: Option<String>,
}

/// How long the database, and Stripe, may take.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Steps that are read on in the log at most.
const STEPS: usize = 20;

/// Looks at everything, and says of each thing how it is. The first is always `database`.
pub async fn examine(patient: &DoctorInput) -> Vec<Check> {
    let looked = tokio::time::timeout(TIMEOUT, look(patient)).await;
    let seen = looked.unwrap_or_else(|_| Err(StoreError::unresponsive()));
    let endpoints = match &patient.api {
        Some(api) => Some(ask(api).await),
        None => None,
    };
    let now_ms = patient.clock.now_ms();
    let stripe_ahead_ms = patient
        .api
        .as_ref()
        .and_then(StripeApi::answered_s)
        .map(|stripe_s| stripe_s * 1000 - now_ms);
    let about_stripe = |passes| checks::endpoint(endpoints.as_ref(), passes, now_ms);
    let seen = match seen {
        Ok(seen) => seen,
        Err(error) => {
            return vec![
                database::away(&error),
                checks::clock(None, stripe_ahead_ms),
                about_stripe(&[]),
            ];
        }
    };
    let snapshot = &seen.snapshot;
    vec![
        database::reached(
            snapshot,
            seen.refused.as_ref(),
            seen.has_keys,
            seen.durability,
        ),
        database::disk(&snapshot.space),
        checks::clock(seen.database_ahead_ms, stripe_ahead_ms),
        checks::deliveries(snapshot, &seen.hours, seen.missed_ms, now_ms),
        signing::signatures(snapshot, now_ms),
        signing::secrets(snapshot, patient.secrets.as_deref(), now_ms),
        checks::unmatched(snapshot, seen.is_read, now_ms),
        checks::unreadable(snapshot),
        about_stripe(&snapshot.passes),
        checks::reconciliation(snapshot, patient.reconciles, now_ms),
        checks::drift(snapshot),
    ]
}

/// The worst of these.
pub fn overall(checks: &[Check]) -> CheckStatus {
    checks
        .iter()
        .map(|check| check.state)
        .max()
        .unwrap_or(CheckStatus::Ok)
}

struct Seen {
    snapshot: HealthSnapshot,
    /// In which webhooks came.
    hours: BTreeSet<i64>,
    /// When Stripe made the first event that no webhook brought since.
    missed_ms: Option<i64>,
    has_keys: bool,
    durability: Durability,
    database_ahead_ms: Option<i64>,
    /// The log was read to its end.
    is_read: bool,
    /// Why the database takes nothing.
    refused: Option<StoreError>,
}

async fn look(patient: &DoctorInput) -> Result<Seen, StoreError> {
    let store = patient.store.as_ref().map_err(Clone::clone)?;
    store.ping().await?;
    let now_ms = patient.clock.now_ms();
    let database_ahead_ms = store
        .time_ms()
        .await?
        .map(|time_ms| time_ms - patient.clock.now_ms());
    // A disk that is full can still be read.
    let mut refused = store
        .note_moments(&BTreeMap::from([(EXAMINED.to_owned(), now_ms)]), now_ms)
        .await
        .err();
    if let Some(error) = refused.take_if(|error| error.class() == StoreErrorClass::Away) {
        return Err(error);
    }
    let (mut read, mut is_read) = (ActivityDelta::default(), false);
    for _ in 0..STEPS {
        let step = monitor::scan_page(store, now_ms).await?;
        if refused.is_none() {
            refused = monitor::keep_step(store, &step, now_ms).await.err();
        }
        is_read = !step.is_more && refused.is_none();
        read = step.news;
        if !step.is_more || refused.is_some() {
            break;
        }
    }
    let mut snapshot = HealthSnapshot::read(store, now_ms).await?;
    let mut hours = store
        .delivery_hours(delivery_gap::first_hour(
            snapshot.moment(DELIVERED, "").unwrap_or_default(),
        ))
        .await?;
    snapshot.add(&read);
    hours.extend(read.hours);
    let missed_ms = match snapshot.moment(DELIVERED, "") {
        Some(last_ms) => first_missed(store, last_ms, now_ms).await?,
        None => None,
    };
    let has_keys = !store.keys().await?.is_empty();
    Ok(Seen {
        snapshot,
        hours,
        missed_ms,
        has_keys,
        durability: store.durability(),
        database_ahead_ms,
        is_read,
        refused,
    })
}

async fn ask(api: &StripeApi) -> Result<Vec<String>, StripeApiError> {
    let answered = tokio::time::timeout(TIMEOUT, look_at_endpoints(api)).await;
    answered.unwrap_or_else(|_| {
        Err(StripeApiError::Away(format!(
            "no answer within {} s",
            TIMEOUT.as_secs()
        )))
    })
}
