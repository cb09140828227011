//! What is wrong, and what to do, in words: from what the database says, and from Stripe's API where there is a key. Printing is for
//! whoever asks: the command `doctor`, or a page.
//!
//! Nothing is put right here, and nothing is migrated. What is judged how stands in `checks`.

mod checks;

use std::collections::BTreeSet;
use std::time::Duration;

use serde::Serialize;

use super::reconcile::look_at_endpoints;
use super::signs::{DELIVERED, Vitals, read_on};
use crate::clock::Clock;
use crate::domain::silence;
use crate::store::{Store, StoreError};
use crate::stripe_api::{StripeApi, StripeApiError};

/// What is looked at.
pub struct Patient {
    /// Or why it could not be opened.
    pub store: Result<Store, StoreError>,
    /// None: only what the last passes said is known of Stripe.
    pub api: Option<StripeApi>,
    /// There is a key for reconciliation here.
    pub reconciles: bool,
    /// The labels of the configured signing secrets; None: they are not known.
    pub secret_labels: Option<Vec<String>>,
    pub clock: Clock,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
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
    pub state: State,
    /// What was found, in words.
    pub finding: String,
    /// What to do about it.
    pub cure: Option<String>,
}

/// How long the database, and Stripe, may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Steps that are read on in the log at most.
const STEPS: usize = 20;

/// Looks at everything, and says of each thing how it is. The first is always `database`.
pub async fn examine(patient: &Patient) -> Vec<Check> {
    let looked = tokio::time::timeout(PATIENCE, look(patient)).await;
    let seen = looked.unwrap_or_else(|_| Err(StoreError::Unavailable("it does not answer".to_owned())));
    let endpoints = match &patient.api {
        Some(api) => Some(ask(api).await),
        None => None,
    };
    let now_ms = patient.clock.now_ms();
    let stripe_ahead_ms = patient.api.as_ref().and_then(StripeApi::answered_s).map(|stripe_s| stripe_s * 1000 - now_ms);
    let about_stripe = |passes| checks::endpoint(endpoints.as_ref(), passes, now_ms);
    let seen = match seen {
        Ok(seen) => seen,
        Err(error) => {
            return vec![checks::database_away(&error), checks::clock(None, stripe_ahead_ms), about_stripe(&[])];
        }
    };
    let vitals = &seen.vitals;
    vec![
        checks::database(vitals),
        checks::disk(&vitals.space),
        checks::clock(seen.database_ahead_ms, stripe_ahead_ms),
        checks::deliveries(vitals, &seen.hours, now_ms),
        checks::signatures(vitals, now_ms),
        checks::secrets(vitals, patient.secret_labels.as_deref(), now_ms),
        checks::unmatched(vitals, now_ms),
        checks::unreadable(vitals),
        about_stripe(&vitals.passes),
        checks::reconciliation(vitals, patient.reconciles, now_ms),
        checks::drift(vitals),
    ]
}

/// The worst of these.
pub fn worst(checks: &[Check]) -> State {
    checks.iter().map(|check| check.state).max().unwrap_or(State::Ok)
}

struct Seen {
    vitals: Vitals,
    /// In which webhooks came.
    hours: BTreeSet<i64>,
    database_ahead_ms: Option<i64>,
}

async fn look(patient: &Patient) -> Result<Seen, StoreError> {
    let store = patient.store.as_ref().map_err(Clone::clone)?;
    store.ping().await?;
    let database_ahead_ms = store.time_ms().await?.map(|time_ms| time_ms - patient.clock.now_ms());
    for _ in 0..STEPS {
        match read_on(store, patient.clock.now_ms()).await {
            Ok(true) => {}
            Ok(false) => break,
            Err(error) => {
                // A disk that is full can still be read.
                tracing::debug!(%error, "the log could not be read on");
                break;
            }
        }
    }
    let vitals = Vitals::read(store, patient.clock.now_ms()).await?;
    let last_ms = vitals.moment(DELIVERED, "").unwrap_or_default();
    let hours = store.delivery_hours(silence::first_hour(last_ms)).await?;
    Ok(Seen { vitals, hours, database_ahead_ms })
}

async fn ask(api: &StripeApi) -> Result<Vec<String>, StripeApiError> {
    let answered = tokio::time::timeout(PATIENCE, look_at_endpoints(api)).await;
    answered.unwrap_or_else(|_| Err(StripeApiError::Away(format!("no answer within {} s", PATIENCE.as_secs()))))
}
