//! Reconciles while the server runs. Webhooks never wait for the worker.
//!
//! A run starts with the server, every five minutes, and as soon as Stripe and the database
//! recover. The worker fetches the objects of thin events soon after their receipt.

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    Extent, Lease, Plan, ReconcileContext, ReconcileError, Report, WriteMode, run, run_fetching,
};
use crate::domain::run_summary::RunErrorCause;
use crate::monitoring::last_seen::{LastSeen, stored_times};
use crate::store::LookupKind;

/// Time between two runs.
const RUN_INTERVAL: Duration = Duration::from_secs(300);
/// Delay after the first failed run; doubles up to [`RUN_INTERVAL`].
const FIRST_RETRY: Duration = Duration::from_secs(5);
/// Time between two checks for objects to fetch.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// Reconciles until `stopping` is cancelled.
pub async fn work(context: ReconcileContext, stopping: CancellationToken) {
    tokio::select! {
        () = stopping.cancelled() => {}
        () = work_forever(context) => {}
    }
}

async fn work_forever(context: ReconcileContext) {
    let mut next_run = Instant::now();
    let mut retry = FIRST_RETRY;
    loop {
        let worked = if Instant::now() >= next_run {
            reconcile(&context).await
        } else {
            fetch_due(&context).await
        };
        let calls = &context.metrics.reconcile.api_calls;
        calls.inc_by(context.api.calls().saturating_sub(calls.get()));

        match worked {
            Ok(WorkDone::Run) => (next_run, retry) = (Instant::now() + RUN_INTERVAL, FIRST_RETRY),
            // Another replica holds the lease. Check again soon, because that replica may die.
            Ok(WorkDone::Elsewhere) => next_run = next_run.max(Instant::now() + FIRST_RETRY),
            Ok(WorkDone::Fetching) => {}
            Err(error) => {
                tracing::warn!(
                    %error,
                    retry_s = retry.as_secs(),
                    "reconciling with Stripe failed"
                );
                record_failure(&context, error.cause()).await;
                tokio::time::sleep(retry).await;
                (next_run, retry) = (Instant::now(), (retry * 2).min(RUN_INTERVAL));
            }
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// The work of one iteration. `Elsewhere` means that another process holds the lease.
enum WorkDone {
    Run,
    Fetching,
    Elsewhere,
}

async fn reconcile(context: &ReconcileContext) -> Result<WorkDone, ReconcileError> {
    let Some(lease) = Lease::try_take(&context.store, &context.clock).await? else {
        return Ok(WorkDone::Elsewhere);
    };
    let plan = Plan {
        extent: Extent::Due,
        mode: WriteMode::Save,
        since_s: None,
    };
    let report = lease.run(run(context, plan)).await?;
    count(context, &report);
    log(&report);
    Ok(WorkDone::Run)
}

async fn fetch_due(context: &ReconcileContext) -> Result<WorkDone, ReconcileError> {
    let due = context
        .store
        .due_lookups(LookupKind::Object, context.clock.now_ms(), 1)
        .await?;
    if due.is_empty() {
        return Ok(WorkDone::Fetching);
    }
    let Some(lease) = Lease::try_take(&context.store, &context.clock).await? else {
        return Ok(WorkDone::Elsewhere);
    };
    lease.run(run_fetching(context)).await?;
    Ok(WorkDone::Fetching)
}

/// Stores the time of a failed run for `doctor`, which may run on another machine.
async fn record_failure(context: &ReconcileContext, cause: RunErrorCause) {
    let runs = &context.metrics.reconcile.runs;
    runs.with_label_values(&["failed"]).inc();

    let now_ms = context.clock.now_ms();
    let times = stored_times([
        (LastSeen::RunFailed, now_ms),
        (LastSeen::RunFailedBy(cause), now_ms),
    ]);
    if let Err(error) = context.store.record_last_seen(&times, now_ms).await {
        tracing::debug!(%error, "failed to record a failed run");
    }
}

fn count(context: &ReconcileContext, report: &Report) {
    let metrics = &context.metrics.reconcile;
    let result = if report.differs() {
        "differs"
    } else {
        "agrees"
    };
    metrics.runs.with_label_values(&[result]).inc();
    metrics.healed.inc_by(report.healed.len() as u64);
}

fn log(report: &Report) {
    let duration_ms = report.ended_ms - report.started_ms;
    let counts = report.counts();

    if report.differs() {
        tracing::warn!(
            run.id = report.id,
            duration_ms,
            calls = counts.calls,
            agreeing = counts.agreeing,
            healed = counts.healed,
            differing = counts.differing,
            unknown_at_stripe = counts.unknown_at_stripe,
            unknown_here = counts.unknown_here,
            api_only = counts.api_only_events,
            "reconciled with Stripe, found differences, see `reconcile --list`"
        );
    } else {
        tracing::info!(
            run.id = report.id,
            duration_ms,
            calls = counts.calls,
            agreeing = counts.agreeing,
            unknown_here = counts.unknown_here,
            api_only = counts.api_only_events,
            "reconciled with Stripe"
        );
    }
}
