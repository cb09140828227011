//! Finds problems and their remedies from the database and, with a key, from Stripe's API.
//!
//! Writes only monitoring data and does not migrate. The rules are in `checks`, `database`,
//! `signing` and `stripe`. The caller, the command `doctor` or a page, prints the result.

mod checks;
mod database;
mod format;
mod signing;
mod stripe;

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use serde::{Serialize, Serializer};

use crate::clock::Clock;
use crate::domain::run_summary::EndpointIssue;
use crate::domain::stripe::signing_secrets::SecretName;
use crate::monitoring::delivery_gap;
use crate::monitoring::last_seen::{LastSeen, stored_times};
use crate::monitoring::log_scanner::{save_step, scan_page};
use crate::monitoring::missed_webhooks::first_missed;
use crate::monitoring::snapshot::HealthSnapshot;
use crate::reconcile::check_registered_endpoints;
use crate::store::{ActivityDelta, Durability, Store, StoreError, StoreErrorClass};
use crate::stripe_api::{StripeApi, StripeApiError};

/// The subjects of an examination.
pub struct DoctorInput {
    /// The store, or the reason why it could not be opened.
    pub store: Result<Store, StoreError>,
    /// Client of Stripe's API. Without it, the findings of the last runs are the only data about
    /// Stripe.
    pub api: Option<StripeApi>,
    /// `true` if this process has an API key for reconciliation.
    pub reconciles: bool,
    /// The configured signing secrets; `None` if they are unknown.
    pub secrets: Option<Vec<SecretName>>,
    pub clock: Clock,
}

/// The result of a check, from best to worst.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckStatus {
    Ok,
    /// The check lacks information.
    Unknown,
    /// An operator should act today.
    Warning,
    /// An operator should act now.
    Failing,
}

/// One of the checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckId {
    Database,
    Disk,
    Clock,
    Deliveries,
    Signatures,
    Secrets,
    Unmatched,
    Unreadable,
    Endpoint,
    Reconciliation,
    Drift,
}

impl CheckId {
    /// Returns the name, which scripts rely on.
    pub fn as_str(self) -> &'static str {
        match self {
            CheckId::Database => "database",
            CheckId::Disk => "disk",
            CheckId::Clock => "clock",
            CheckId::Deliveries => "deliveries",
            CheckId::Signatures => "signatures",
            CheckId::Secrets => "secrets",
            CheckId::Unmatched => "unmatched",
            CheckId::Unreadable => "unreadable",
            CheckId::Endpoint => "endpoint",
            CheckId::Reconciliation => "reconciliation",
            CheckId::Drift => "drift",
        }
    }
}

impl fmt::Display for CheckId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl Serialize for CheckId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// The result of one check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    #[serde(rename = "name")]
    pub id: CheckId,
    pub state: CheckStatus,
    /// The finding, as sentences.
    pub finding: String,
    /// Instructions for the operator. The JSON output calls them `cure`, which scripts rely on.
    #[serde(rename = "cure")]
    pub remedy: Option<String>,
}

/// Time limit for the database, and for Stripe.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Largest number of steps of the log to read.
const MAX_STEPS: usize = 20;

/// Makes all checks. The first is always [`CheckId::Database`].
///
/// If the database cannot be read, only the checks that do not need it are made.
pub async fn examine(input: &DoctorInput) -> Vec<Check> {
    let observed = tokio::time::timeout(TIMEOUT, observe(input))
        .await
        .unwrap_or_else(|_| Err(StoreError::unresponsive()));
    let endpoint_issues = match &input.api {
        Some(api) => Some(ask_stripe(api).await),
        None => None,
    };

    let now_ms = input.clock.now_ms();
    let stripe_ahead_ms = input
        .api
        .as_ref()
        .and_then(StripeApi::answered_s)
        .map(|stripe_s| stripe_s * 1000 - now_ms);
    let observed = match observed {
        Ok(observed) => observed,
        Err(error) => {
            return vec![
                database::unreadable(&error),
                checks::clock(None, stripe_ahead_ms),
                stripe::endpoint(endpoint_issues.as_ref(), &[], now_ms),
            ];
        }
    };

    let snapshot = &observed.snapshot;
    vec![
        database::readable(
            snapshot,
            observed.write_error.as_ref(),
            observed.has_keys,
            observed.durability,
            observed.exposed_mode,
        ),
        database::disk(&snapshot.space),
        checks::clock(observed.database_ahead_ms, stripe_ahead_ms),
        checks::deliveries(snapshot, &observed.hours, observed.missed_ms, now_ms),
        signing::signatures(snapshot, now_ms),
        signing::secrets(snapshot, input.secrets.as_deref(), now_ms),
        checks::unmatched(snapshot, observed.is_scanned, now_ms),
        checks::unreadable(snapshot),
        stripe::endpoint(endpoint_issues.as_ref(), &snapshot.runs, now_ms),
        stripe::reconciliation(snapshot, input.reconciles, now_ms),
        stripe::drift(snapshot),
    ]
}

/// Returns the worst status of these checks.
pub fn overall(checks: &[Check]) -> CheckStatus {
    checks
        .iter()
        .map(|check| check.state)
        .max()
        .unwrap_or(CheckStatus::Ok)
}

/// The state of the database.
struct Observed {
    snapshot: HealthSnapshot,
    /// Hours since 1970 in which webhooks were received.
    hours: BTreeSet<i64>,
    /// Time when Stripe created the first event since then whose webhook is overdue.
    missed_ms: Option<i64>,
    has_keys: bool,
    durability: Durability,
    /// Permission bits of a SQLite file that every user of the machine may read.
    exposed_mode: Option<u32>,
    database_ahead_ms: Option<i64>,
    /// `true` if the log was read to its end.
    is_scanned: bool,
    /// Reason why the database rejects writes.
    write_error: Option<StoreError>,
}

async fn observe(input: &DoctorInput) -> Result<Observed, StoreError> {
    let store = input.store.as_ref().map_err(Clone::clone)?;
    store.ping().await?;

    let now_ms = input.clock.now_ms();
    let database_ahead_ms = store
        .time_ms()
        .await?
        .map(|time_ms| time_ms - input.clock.now_ms());
    // A database on a full disk rejects writes but can still be read.
    let run = stored_times([(LastSeen::DoctorRun, now_ms)]);
    let mut write_error = store.record_last_seen(&run, now_ms).await.err();
    if let Some(error) = write_error.take_if(|error| error.class() == StoreErrorClass::Away) {
        return Err(error);
    }
    let (delta, is_scanned) = scan_log(store, now_ms, &mut write_error).await?;

    let mut snapshot = HealthSnapshot::load(store, now_ms).await?;
    let stored_last_ms = snapshot.last_seen(&LastSeen::Delivery);
    let mut hours = store
        .delivery_hours(delivery_gap::first_hour(stored_last_ms.unwrap_or_default()))
        .await?;
    snapshot.add(&delta);
    hours.extend(delta.hours);
    let missed_ms = match snapshot.last_seen(&LastSeen::Delivery) {
        Some(last_ms) => first_missed(store, last_ms, now_ms).await?,
        None => None,
    };
    let has_keys = !store.keys().await?.is_empty();

    Ok(Observed {
        snapshot,
        hours,
        missed_ms,
        has_keys,
        durability: store.durability(),
        exposed_mode: store.exposed_mode(),
        database_ahead_ms,
        is_scanned,
        write_error,
    })
}

/// Scans the log, at most 20 steps, and saves each while the database accepts writes. Returns the
/// activity that the last step adds, and whether the whole log was read and saved.
async fn scan_log(
    store: &Store,
    now_ms: i64,
    write_error: &mut Option<StoreError>,
) -> Result<(ActivityDelta, bool), StoreError> {
    let (mut delta, mut is_scanned) = (ActivityDelta::default(), false);
    for _ in 0..MAX_STEPS {
        let step = scan_page(store, now_ms).await?;
        if write_error.is_none() {
            *write_error = save_step(store, &step, now_ms).await.err();
        }
        is_scanned = !step.is_more && write_error.is_none();
        delta = step.delta;
        if !step.is_more || write_error.is_some() {
            break;
        }
    }

    Ok((delta, is_scanned))
}

async fn ask_stripe(api: &StripeApi) -> Result<Vec<EndpointIssue>, StripeApiError> {
    tokio::time::timeout(TIMEOUT, check_registered_endpoints(api))
        .await
        .unwrap_or_else(|_| {
            Err(StripeApiError::Away(format!(
                "no answer within {} s",
                TIMEOUT.as_secs()
            )))
        })
}
