//! A pass against Stripe's API: find what no webhook told, and show where we agree with Stripe.
//!
//! The steps in their order: `catch_up` reads Stripe's list of events, `fetching` what thin events point to, `linking` asks which
//! invoice a payment belongs to, `checking` compares invoice by invoice, `endpoints` looks at how deliveries come. All that
//! they find goes through `keeping`, which knows whether anything is new, and whose history changes. Everything is repeatable:
//! a pass that was killed is made again, and what is durable already costs nothing.

mod check_endpoints;
mod compare_invoices;
mod fetch_objects;
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
use crate::ingest::batch_writer::{AppendError, BatchWriter};
use crate::metrics::Metrics;
use crate::store::{Run, Store, StoreError};
use crate::stripe_api::{Scope, StripeApi, StripeApiError};

pub use check_endpoints::{NOT_LOOKED_AT, look_at_endpoints};
pub use lease::Lease;
use recorder::Recorder;
pub use report::{ApiOnlyEvent, Differing, Healed, Report, UnknownHere};
pub use worker::work;

/// What a pass works with; cheap to clone.
#[derive(Clone)]
pub struct ReconcileContext {
    pub store: Store,
    pub inbox: BatchWriter,
    pub api: StripeApi,
    pub clock: Clock,
    pub metrics: Arc<Metrics>,
}

/// What a pass looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Every stored invoice.
    All,
    /// Those whose time has come, and a sample of the settled ones.
    Due,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteMode {
    Save,
    DryRun,
}

#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub extent: Extent,
    pub mode: WriteMode,
    /// Look at Stripe's events and invoices of this long, in seconds, whatever is known of them. None: from where the last pass
    /// ended.
    pub since_s: Option<i64>,
}

#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    #[error(transparent)]
    Stripe(#[from] StripeApiError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    BatchWriter(#[from] AppendError),
    #[error("another process took over: this one was away for too long")]
    LeaseLost,
}

impl ReconcileError {
    /// What is to be looked at, in a word.
    fn cause(&self) -> &'static str {
        match self {
            ReconcileError::Stripe(StripeApiError::Unauthorized(_)) => "key",
            ReconcileError::Stripe(StripeApiError::Refused { .. }) => "refused",
            ReconcileError::Stripe(StripeApiError::Away(_)) => "away",
            ReconcileError::Stripe(StripeApiError::Busy(_)) => "busy",
            ReconcileError::Store(_) | ReconcileError::BatchWriter(_) => "database",
            ReconcileError::LeaseLost => "lease",
        }
    }
}

/// How far back Stripe's list of events reaches.
const EVENTS_KEPT_S: i64 = 30 * 24 * 3600;

/// A pass under way.
struct RunContext<'t> {
    tools: &'t ReconcileContext,
    plan: Plan,
    keeper: Recorder<'t>,
    report: Report,
    started_ms: i64,
    /// Connected accounts that are known.
    accounts: Vec<String>,
    /// PaymentIntents and charges that were asked about in this pass.
    asked: HashSet<String>,
}

/// Makes one pass, under a lease that the caller holds.
///
/// # Errors
/// Stripe or the database cannot be reached; what was found before is kept, and the next pass goes on.
pub async fn run(tools: &ReconcileContext, plan: Plan) -> Result<Report, ReconcileError> {
    let report = Report::new(tools.clock.now_ms(), plan);
    let span = tracing::info_span!("pass", pass.id = report.id);
    all_steps(tools, report).instrument(span).await
}

async fn all_steps(tools: &ReconcileContext, report: Report) -> Result<Report, ReconcileError> {
    let (plan, started_ms, calls_before) = (report.plan, report.started_ms, tools.api.calls());
    let (keeper, accounts) = (
        Recorder::new(tools, plan.mode),
        known_accounts(&tools.store).await?,
    );
    let mut pass = RunContext {
        tools,
        plan,
        keeper,
        report,
        started_ms,
        accounts,
        asked: HashSet::new(),
    };
    pass.find_accounts().await?;
    sync_events::run(&mut pass).await?;
    fetch_objects::run(&mut pass).await?;
    link_payments::run(&mut pass).await?;
    compare_invoices::run(&mut pass).await?;
    check_endpoints::run(&mut pass).await?;
    let mut report = pass.close().await?;
    report.calls = tools.api.calls() - calls_before;
    report.ended_ms = tools.clock.now_ms();
    if plan.mode == WriteMode::Save {
        keep(&tools.store, &report).await?;
    }
    Ok(report)
}

/// Only what thin events point to, soon after they arrived. True: there was something.
async fn run_fetching(tools: &ReconcileContext) -> Result<bool, ReconcileError> {
    let plan = Plan {
        extent: Extent::Due,
        mode: WriteMode::Save,
        since_s: None,
    };
    let started_ms = tools.clock.now_ms();
    let (keeper, report) = (
        Recorder::new(tools, plan.mode),
        Report::new(started_ms, plan),
    );
    let mut pass = RunContext {
        tools,
        plan,
        keeper,
        report,
        started_ms,
        accounts: Vec::new(),
        asked: HashSet::new(),
    };
    fetch_objects::run(&mut pass).await
}

impl RunContext<'_> {
    /// The account of the key, and the connected ones that events named.
    fn scopes(&self) -> Vec<Scope> {
        let connected = self.accounts.iter().cloned().map(Scope::Account);
        std::iter::once(Scope::Own).chain(connected).collect()
    }

    /// The connected accounts that events named since the last pass.
    async fn find_accounts(&mut self) -> Result<(), ReconcileError> {
        let seen_ms = believed(
            self.progress(ACCOUNTS_SEEN).await?,
            self.started_ms,
            LATE_MS,
        )
        .unwrap_or_default();
        for account in self.tools.store.accounts_since(seen_ms - LATE_MS).await? {
            self.note_account(&account).await?;
        }
        self.set_progress(ACCOUNTS_SEEN, self.started_ms).await?;
        Ok(())
    }

    async fn note_account(&mut self, account: &str) -> Result<(), StoreError> {
        if self.accounts.iter().any(|known| known == account) || self.accounts.len() >= MAX_ACCOUNTS
        {
            return Ok(());
        }
        self.accounts.push(account.to_owned());
        self.set_progress(&format!("{ACCOUNT}{account}"), self.started_ms)
            .await
    }

    /// The time in seconds that has come by our clock and by Stripe's: what a list did not show when ours was ahead can still happen.
    fn safe_upper_bound_s(&self) -> i64 {
        let now_s = self.tools.clock.now_s();
        self.tools
            .api
            .answered_s()
            .map_or(now_s, |at_stripe| now_s.min(at_stripe))
    }

    async fn set_progress(&self, name: &str, value: i64) -> Result<(), StoreError> {
        match self.plan.mode {
            WriteMode::Save => self.tools.store.set_progress(name, value).await,
            WriteMode::DryRun => Ok(()),
        }
    }

    async fn progress(&self, name: &str) -> Result<Option<i64>, StoreError> {
        let found = self.tools.store.progress(name).await?;
        Ok(found
            .into_iter()
            .find(|(found, _)| found == name)
            .map(|(_, value)| value))
    }

    async fn close(mut self) -> Result<Report, ReconcileError> {
        self.report.healed = self.keeper.healed().await?;
        self.report.api_only_events = std::mem::take(&mut self.keeper.api_only);
        self.report.put_in_order();
        Ok(self.report)
    }
}

/// How far the work had come, unless that is a time that has not come yet, by more than is looked at again anyway: the clock was
/// ahead when it was noted, and what happened since may not have been seen.
fn believed(noted: Option<i64>, now: i64, overlap: i64) -> Option<i64> {
    noted.filter(|noted| *noted <= now.saturating_add(overlap))
}

/// Names of progress that begin so name connected accounts.
const ACCOUNT: &str = "account ";
const ACCOUNTS_SEEN: &str = "accounts seen";
/// How long after its receipt an event may reach the log.
const LATE_MS: i64 = 600_000;
/// Connected accounts that a pass goes through at most.
const MAX_ACCOUNTS: usize = 1_000;

async fn known_accounts(store: &Store) -> Result<Vec<String>, StoreError> {
    let found = store.progress(ACCOUNT).await?;
    Ok(found
        .iter()
        .filter_map(|(name, _)| name.strip_prefix(ACCOUNT))
        .map(str::to_owned)
        .take(MAX_ACCOUNTS)
        .collect())
}

async fn keep(store: &Store, report: &Report) -> Result<(), StoreError> {
    let text = report.shortened().to_json().to_string();
    let report_json = RawValue::from_string(text)
        .map_err(|e| StoreError::damaged(format!("a report is no JSON: {e}")))?;
    let id = report.id.clone();
    store
        .keep_run(&Run {
            id,
            started_ms: report.started_ms,
            ended_ms: report.ended_ms,
            report: report_json,
        })
        .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_clock_that_was_ahead_noted_is_not_believed() {
        assert_eq!(believed(Some(100), 1000, 60), Some(100));
        assert_eq!(
            believed(Some(1060), 1000, 60),
            Some(1060),
            "it is looked at again anyway"
        );
        assert_eq!(believed(Some(1061), 1000, 60), None);
        assert_eq!(believed(None, 1000, 60), None);
    }
}
