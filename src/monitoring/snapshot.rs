//! The state of the service in the database at one time.

use super::last_seen::{LastSeen, LastSeenTimes};
use crate::clock::MAX_SKEW_MS;
use crate::domain::run_summary::RunSummary;
use crate::store::{
    ActivityDelta, Backlog, COUNT_LIMIT, Counted, ProgressKey, Run, Space, Store, StoreError,
};

/// Ignore times further in the future than this: a skewed clock wrote them. (Deliveries are
/// rejected beyond five minutes of skew.)
const FUTURE_LIMIT_MS: i64 = 6 * 60_000;
/// Number of runs that are read, about the last hour of `serve`.
const MAX_RUNS: u32 = 12;
/// Period in which unreadable and unmatched events are counted. Older ones no longer count.
pub(super) const COUNTED_PERIOD_MS: i64 = 30 * 24 * 3600 * 1000;

/// Totals of the database. Times in Unix milliseconds.
#[derive(Clone, Debug, Default)]
pub struct HealthSnapshot {
    pub last_seen: LastSeenTimes,
    /// Stripe invoices that events name and that are not stored.
    pub unmatched_invoices: usize,
    pub unmatched_events: i64,
    pub oldest_unmatched_ms: Option<i64>,
    pub unreadable: Counted,
    pub differing: Counted,
    pub backlog: Backlog,
    /// The reconcile runs that started last, the latest first.
    pub runs: Vec<PastRun>,
    pub space: Space,
    /// Time up to which the log was scanned; `None` before the first scan.
    pub scanned_until_ms: Option<i64>,
}

/// A reconcile run that ended. Times in Unix milliseconds.
#[derive(Clone, Debug, Default)]
pub struct PastRun {
    pub started_ms: i64,
    pub ended_ms: i64,
    pub summary: RunSummary,
}

impl HealthSnapshot {
    /// Reads the totals from the database.
    ///
    /// # Errors
    /// Returns an error if the database cannot be read.
    pub async fn load(store: &Store, now_ms: i64) -> Result<HealthSnapshot, StoreError> {
        let unmatched = store.unmatched_invoices(COUNT_LIMIT).await?;
        let runs = store.last_runs(MAX_RUNS, now_ms + MAX_SKEW_MS).await?;
        let mut last_seen = LastSeenTimes::from_stored(store.last_seen().await?);
        last_seen.drop_later_than(now_ms + FUTURE_LIMIT_MS);

        Ok(HealthSnapshot {
            last_seen,
            unmatched_invoices: unmatched.len(),
            unmatched_events: unmatched.iter().map(|invoice| invoice.events).sum(),
            oldest_unmatched_ms: unmatched.first().map(|invoice| invoice.received_ms),
            unreadable: store.count_unreadable(now_ms - COUNTED_PERIOD_MS).await?,
            differing: store.count_differing().await?,
            backlog: store.backlog(now_ms).await?,
            runs: runs.iter().map(PastRun::from_stored).collect(),
            space: store.space().await?,
            scanned_until_ms: store.progress(&ProgressKey::LogScan).await?,
        })
    }

    /// Adds activity that was scanned but could not be saved.
    pub fn add(&mut self, delta: &ActivityDelta) {
        self.last_seen.merge(&delta.last_seen);
    }

    /// Returns the last time of this event, or `None` if no time is stored.
    pub fn last_seen(&self, what: &LastSeen) -> Option<i64> {
        self.last_seen.get(what)
    }
}

impl PastRun {
    fn from_stored(run: &Run) -> PastRun {
        PastRun {
            started_ms: run.started_ms,
            ended_ms: run.ended_ms,
            // A report that cannot be parsed contributes no counts, but the run still counts as
            // ended.
            summary: serde_json::from_str(run.report.get()).unwrap_or_default(),
        }
    }
}
