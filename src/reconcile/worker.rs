//! Reconciliation beside a running server: a pass at start, every few minutes, and as soon as Stripe and the database are back;
//! what thin events point to is fetched soon after they arrived. Webhooks never wait for any of it.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    Extent, Lease, Plan, ReconcileContext, ReconcileError, Report, WriteMode, run, run_fetching,
};
use crate::monitoring::monitor::{RECONCILING_FAILED, RECONCILING_FAILED_BY};
use crate::store::LookupKind;

/// Between two passes.
const INTERVAL: Duration = Duration::from_secs(300);
/// After one that failed, at first.
const FIRST_WAIT: Duration = Duration::from_secs(5);
/// How often the list of what is to be fetched is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Works until it is told to stop.
pub async fn work(tools: ReconcileContext, stopping: CancellationToken) {
    tokio::select! {
        () = stopping.cancelled() => {}
        () = go_on(tools) => {}
    }
}

async fn go_on(tools: ReconcileContext) {
    let mut next_pass = Instant::now();
    let mut wait = FIRST_WAIT;
    loop {
        let worked = if Instant::now() >= next_pass {
            pass(&tools).await
        } else {
            fetch(&tools).await
        };
        let counted = &tools.metrics.reconcile.api_calls;
        counted.inc_by(tools.api.calls().saturating_sub(counted.get()));
        match worked {
            Ok(WorkDone::RunContext) => (next_pass, wait) = (Instant::now() + INTERVAL, FIRST_WAIT),
            // Another replica is at it; it may also die.
            Ok(WorkDone::ElseWhere) => next_pass = next_pass.max(Instant::now() + FIRST_WAIT),
            Ok(WorkDone::Fetching) => {}
            Err(error) => {
                tracing::warn!(%error, retry_s = wait.as_secs(), "reconciling with Stripe failed");
                note_failure(&tools, error.cause()).await;
                tokio::time::sleep(wait).await;
                (next_pass, wait) = (Instant::now(), (wait * 2).min(INTERVAL));
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}

enum WorkDone {
    RunContext,
    Fetching,
    ElseWhere,
}

async fn pass(tools: &ReconcileContext) -> Result<WorkDone, ReconcileError> {
    let Some(lease) = Lease::try_take(&tools.store, &tools.clock).await? else {
        return Ok(WorkDone::ElseWhere);
    };
    let plan = Plan {
        extent: Extent::Due,
        mode: WriteMode::Save,
        since_s: None,
    };
    let ended = tokio::select! {
        ended = run(tools, plan) => ended,
        () = lease.lost() => Err(ReconcileError::LeaseLost),
    };
    lease.release().await;
    ended
        .map(|report| tell(tools, &report))
        .map(|()| WorkDone::RunContext)
}

async fn fetch(tools: &ReconcileContext) -> Result<WorkDone, ReconcileError> {
    if tools
        .store
        .to_ask(LookupKind::Object, tools.clock.now_ms(), 1)
        .await?
        .is_empty()
    {
        return Ok(WorkDone::Fetching);
    }
    let Some(lease) = Lease::try_take(&tools.store, &tools.clock).await? else {
        return Ok(WorkDone::ElseWhere);
    };
    let ended = tokio::select! {
        ended = run_fetching(tools) => ended,
        () = lease.lost() => Err(ReconcileError::LeaseLost),
    };
    lease.release().await;
    ended.map(|_| WorkDone::Fetching)
}

/// For `doctor`, which may be asked elsewhere.
async fn note_failure(tools: &ReconcileContext, cause: &str) {
    tools
        .metrics
        .reconcile
        .runs
        .with_label_values(&["failed"])
        .inc();
    let now_ms = tools.clock.now_ms();
    let moments = BTreeMap::from([
        (RECONCILING_FAILED.to_owned(), now_ms),
        (format!("{RECONCILING_FAILED_BY}{cause}"), now_ms),
    ]);
    if let Err(error) = tools.store.note_moments(&moments, now_ms).await {
        tracing::debug!(%error, "it could not be noted that reconciling failed");
    }
}

fn tell(tools: &ReconcileContext, report: &Report) {
    let counted = &tools.metrics.reconcile;
    counted
        .runs
        .with_label_values(&[if report.differs() {
            "differs"
        } else {
            "agrees"
        }])
        .inc();
    counted.healed.inc_by(report.healed.len() as u64);
    log(report);
}

fn log(report: &Report) {
    let duration_ms = report.ended_ms - report.started_ms;
    let (healed, differing) = (report.healed.len(), report.differing.len());
    let (unknown_at_stripe, unknown_here) =
        (report.unknown_at_stripe.len(), report.unknown_here.len());
    let (agreeing, api_only, calls) = (
        report.agreeing.len(),
        report.api_only_events.len(),
        report.calls,
    );
    if report.differs() {
        tracing::warn!(
            pass.id = report.id,
            duration_ms,
            calls,
            agreeing,
            healed,
            differing,
            unknown_at_stripe,
            unknown_here,
            api_only,
            "reconciled with Stripe: something was healed or differs, see `reconcile --list`"
        );
    } else {
        tracing::info!(
            pass.id = report.id,
            duration_ms,
            calls,
            agreeing,
            unknown_here,
            api_only,
            "reconciled with Stripe"
        );
    }
}
