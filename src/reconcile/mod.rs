//! Runs against Stripe's API: find what no webhook delivered, and compare stored invoices.
//!
//! A run has these steps: `sync_events` reads Stripe's list of events, `fetch_objects` fetches the
//! objects of thin events, `link_payments` requests the invoices of payments, `compare_invoices`
//! compares invoice by invoice, `check_endpoints` checks the delivery of webhooks. All steps pass
//! their findings to `recorder`, which finds out whether a finding is new and changes a history.
//! All steps are repeatable: the next run repeats a killed one, and durable findings cost nothing
//! the second time.

mod check_endpoints;
mod compare_invoices;
mod fetch_objects;
mod judge_invoice;
mod lease;
mod link_payments;
mod recorder;
mod report;
mod sync_events;
mod worker;

use std::collections::HashSet;
use std::sync::Arc;

use serde_json::value::RawValue;
use tracing::Instrument;

use crate::clock::Clock;
use crate::domain::run_summary::RunErrorCause;
use crate::domain::stripe::event::Observation;
use crate::ingest::batch_writer::{AppendError, BatchWriter};
use crate::metrics::Metrics;
use crate::store::{PendingLookup, ProgressKey, Run, Store, StoreError};
use crate::stripe_api::{Scope, StripeApi, StripeApiError};

pub use check_endpoints::check_registered_endpoints;
pub use lease::Lease;
use recorder::Recorder;
pub use report::{ApiOnlyEvent, Differing, Healed, Report, UnknownHere};
pub use worker::work;

/// The services that a run uses. Cheap to clone.
#[derive(Clone)]
pub struct ReconcileContext {
    pub store: Store,
    pub inbox: BatchWriter,
    pub api: StripeApi,
    pub clock: Clock,
    pub metrics: Arc<Metrics>,
}

/// The invoices that a run compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Every stored invoice.
    All,
    /// Invoices that are due, and a sample of the settled ones.
    Due,
}

/// The choice between saving and only reporting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteMode {
    Save,
    DryRun,
}

/// The scope of a run.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub extent: Extent,
    pub mode: WriteMode,
    /// Seconds to look back in Stripe's lists, even if they were read before. `None` stands for the
    /// time since the last run.
    pub since_s: Option<i64>,
}

/// The reason why a run failed.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    #[error(transparent)]
    Stripe(#[from] StripeApiError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    BatchWriter(#[from] AppendError),
    #[error("reconcile lease lost: another process took it over")]
    LeaseLost,
}

impl ReconcileError {
    /// Returns the cause. Errors on which an operator acts in the same way have the same cause.
    fn cause(&self) -> RunErrorCause {
        match self {
            ReconcileError::Stripe(StripeApiError::Unauthorized(_)) => RunErrorCause::Key,
            ReconcileError::Stripe(
                StripeApiError::Refused { .. } | StripeApiError::Invalid { .. },
            ) => RunErrorCause::Denied,
            ReconcileError::Stripe(StripeApiError::Away(_)) => RunErrorCause::Unreachable,
            ReconcileError::Stripe(StripeApiError::Busy(_)) => RunErrorCause::RateLimited,
            ReconcileError::Store(_) | ReconcileError::BatchWriter(_) => RunErrorCause::Database,
            ReconcileError::LeaseLost => RunErrorCause::LeaseLost,
        }
    }
}

/// Age of the oldest events in Stripe's list.
const EVENT_RETENTION_S: i64 = 30 * 24 * 3600;
/// Longest delay between receipt and commit that the search for accounts allows for.
const MAX_COMMIT_DELAY_MS: i64 = 600_000;
/// Limit on the connected accounts that a run reads.
const MAX_ACCOUNTS: u32 = 1_000;

/// A run in progress.
struct RunContext<'t> {
    context: &'t ReconcileContext,
    plan: Plan,
    recorder: Recorder<'t>,
    report: Report,
    started_ms: i64,
    /// The known connected accounts.
    accounts: Vec<String>,
    /// PaymentIntents and charges that this run has looked up.
    looked_up: HashSet<String>,
}

/// Makes one run. The caller holds the [`Lease`], unless it is a dry run.
///
/// # Errors
/// Returns an error if Stripe or the database is unavailable. Earlier findings stay stored, and the
/// next run continues.
pub async fn run(context: &ReconcileContext, plan: Plan) -> Result<Report, ReconcileError> {
    let report = Report::new(context.clock.now_ms(), plan);
    let span = tracing::info_span!("run", run.id = report.id);
    run_steps(context, report).instrument(span).await
}

async fn run_steps(context: &ReconcileContext, report: Report) -> Result<Report, ReconcileError> {
    let calls_before = context.api.calls();
    let mut run = RunContext::new(context, report);
    run.accounts = context.store.known_accounts(MAX_ACCOUNTS).await?;

    run.find_accounts().await?;
    sync_events::sync_events(&mut run).await?;
    fetch_objects::fetch_objects(&mut run).await?;
    link_payments::link_payments(&mut run).await?;
    compare_invoices::compare_invoices(&mut run).await?;
    check_endpoints::check_endpoints(&mut run).await?;

    let mut report = run.into_report().await?;
    report.calls = context.api.calls() - calls_before;
    report.ended_ms = context.clock.now_ms();
    if report.plan.mode == WriteMode::Save {
        save_run(&context.store, &report).await?;
    }
    Ok(report)
}

/// Fetches the objects of thin events soon after their receipt. Returns `true` if any were due.
async fn run_fetching(context: &ReconcileContext) -> Result<bool, ReconcileError> {
    let plan = Plan {
        extent: Extent::Due,
        mode: WriteMode::Save,
        since_s: None,
    };
    let report = Report::new(context.clock.now_ms(), plan);
    fetch_objects::fetch_objects(&mut RunContext::new(context, report)).await
}

impl<'t> RunContext<'t> {
    fn new(context: &'t ReconcileContext, report: Report) -> RunContext<'t> {
        RunContext {
            context,
            plan: report.plan,
            recorder: Recorder::new(context, report.plan.mode),
            started_ms: report.started_ms,
            report,
            accounts: Vec::new(),
            looked_up: HashSet::new(),
        }
    }

    /// Returns the account of the key, and the connected accounts that events named.
    fn scopes(&self) -> Vec<Scope> {
        let connected = self.accounts.iter().cloned().map(Scope::Account);
        std::iter::once(Scope::Own).chain(connected).collect()
    }

    /// Adds the connected accounts that events named since the last run.
    async fn find_accounts(&mut self) -> Result<(), ReconcileError> {
        let searched_ms = saved_unless_future(
            self.progress(&ProgressKey::AccountSearch).await?,
            self.started_ms,
            MAX_COMMIT_DELAY_MS,
        )
        .unwrap_or_default();
        let since_ms = searched_ms - MAX_COMMIT_DELAY_MS;
        for account in self.context.store.accounts_since(since_ms).await? {
            self.add_account(&account).await?;
        }

        self.set_progress(&ProgressKey::AccountSearch, self.started_ms)
            .await?;

        Ok(())
    }

    /// Adds a connected account, unless it is known or there are too many.
    async fn add_account(&mut self, account: &str) -> Result<(), StoreError> {
        let is_known = self.accounts.iter().any(|known| known == account);
        if is_known || self.accounts.len() >= MAX_ACCOUNTS as usize {
            return Ok(());
        }

        self.accounts.push(account.to_owned());
        let key = ProgressKey::Account(account.to_owned());
        self.set_progress(&key, self.started_ms).await
    }

    /// Returns the latest Unix second that has passed on our clock and on Stripe's. If ours is
    /// ahead, Stripe can still create events in seconds for which a list was empty.
    fn safe_upper_bound_s(&self) -> i64 {
        let now_s = self.context.clock.now_s();
        self.context
            .api
            .answered_s()
            .map_or(now_s, |at_stripe_s| now_s.min(at_stripe_s))
    }

    /// Saves progress, unless this is a dry run.
    async fn set_progress(&self, key: &ProgressKey, value: i64) -> Result<(), StoreError> {
        match self.plan.mode {
            WriteMode::Save => self.context.store.set_progress(key, value).await,
            WriteMode::DryRun => Ok(()),
        }
    }

    async fn progress(&self, key: &ProgressKey) -> Result<Option<i64>, StoreError> {
        self.context.store.progress(key).await
    }

    /// Completes the report.
    async fn into_report(mut self) -> Result<Report, ReconcileError> {
        self.report.healed = self.recorder.healed().await?;
        self.report.api_only_events = std::mem::take(&mut self.recorder.api_only);
        self.report.sort();
        Ok(self.report)
    }
}

/// Returns the saved progress, or `None` if it lies further in the future than the overlap. A
/// skewed clock saved it, so later events may not have been read.
fn saved_unless_future(saved: Option<i64>, now: i64, overlap: i64) -> Option<i64> {
    saved.filter(|saved| *saved <= now.saturating_add(overlap))
}

/// Parses the observation of an event. Skips a damaged one with a warning: `rebuild` repairs it.
fn parse_or_skip(event: &PendingLookup) -> Option<Observation> {
    match event.parse_observation()? {
        Ok(stored) => Some(stored.observation),
        Err(error) => {
            tracing::warn!(%error, "skipped a damaged observation");
            None
        }
    }
}

async fn save_run(store: &Store, report: &Report) -> Result<(), StoreError> {
    let text = report.shortened().to_json().to_string();
    let run = Run {
        id: report.id.clone(),
        started_ms: report.started_ms,
        ended_ms: report.ended_ms,
        report: RawValue::from_string(text).expect("a JSON value serialises to valid JSON"),
    };
    store.save_run(&run).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_from_skewed_clock_is_ignored() {
        assert_eq!(saved_unless_future(Some(100), 1000, 60), Some(100));
        assert_eq!(
            saved_unless_future(Some(1060), 1000, 60),
            Some(1060),
            "the overlap is read again anyway"
        );
        assert_eq!(saved_unless_future(Some(1061), 1000, 60), None);
        assert_eq!(saved_unless_future(None, 1000, 60), None);
    }
}
