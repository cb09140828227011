//! Updates the metrics of a running server from the database.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::last_seen::{LastSeen, Mode};
use super::log_scanner::{add_webhook, livemode, save_activity, scan};
use super::rejections::Rejections;
use super::signing_secrets::{last_used, record_configured};
use super::snapshot::HealthSnapshot;
use crate::clock::Clock;
use crate::domain::stripe::signing_secrets::SecretName;
use crate::metrics::Metrics;
use crate::store::{ActivityDelta, Backlog, Store, StoreError};

/// Time between two scans of the log.
const SCAN_INTERVAL: Duration = Duration::from_secs(5);
/// Minimum age of a snapshot before it is refreshed. Grows to 20 times the duration of the last
/// refresh, so a slow database is queried less often.
const MIN_AGE: Duration = Duration::from_secs(1);
const MIN_AGE_PER_DURATION: u32 = 20;
/// Time limits for a ping, and for all queries of a refresh.
const PING_TIMEOUT: Duration = Duration::from_secs(1);
const REFRESH_TIMEOUT: Duration = Duration::from_secs(3);

/// Monitors the database for one server and exports its state as metrics.
pub struct HealthMonitor {
    store: Store,
    metrics: Arc<Metrics>,
    clock: Clock,
    secrets: Vec<SecretName>,
    are_secrets_recorded: AtomicBool,
    started_ms: i64,
    /// Time until which the exported snapshot counts as fresh.
    fresh_until: tokio::sync::Mutex<Option<Instant>>,
    /// Repeated webhooks, which added no row to the log, until they are saved.
    repeated: Mutex<ActivityDelta>,
    rejections: Mutex<Rejections>,
}

impl HealthMonitor {
    pub fn new(
        store: Store,
        metrics: Arc<Metrics>,
        clock: Clock,
        secrets: Vec<SecretName>,
    ) -> HealthMonitor {
        for SecretName { label, .. } in &secrets {
            metrics
                .log
                .secret_last_used_timestamp_seconds
                .with_label_values(&[label])
                .set(0.0);
        }

        let started_ms = clock.now_ms();
        HealthMonitor {
            store,
            metrics,
            clock,
            secrets,
            are_secrets_recorded: AtomicBool::default(),
            started_ms,
            fresh_until: tokio::sync::Mutex::default(),
            repeated: Mutex::default(),
            rejections: Mutex::default(),
        }
    }

    /// Records a webhook that repeats a known event. The log does not show that it was received.
    pub fn record_repeated(&self, body: &[u8], received_ms: i64, secret_label: &str) {
        let livemode = livemode(body);
        add_webhook(
            &mut self.repeated(),
            received_ms,
            livemode,
            Some(secret_label),
        );
    }

    /// Updates the metrics from the database.
    ///
    /// Never fails: if the database is unavailable, the metrics report that and keep their other
    /// values. Concurrent callers wait for one refresh.
    pub async fn refresh(&self) {
        let mut fresh_until = self.fresh_until.lock().await;
        let started = Instant::now();
        let pinged = self.store.ping_within(PING_TIMEOUT).await;
        let was_up = self.metrics.database.up.get() == 1;
        self.metrics.database.up.set(i64::from(pinged.is_ok()));

        for (setting, is_off) in self.store.durability().is_off() {
            let gauge = &self.metrics.database.unsafe_setting;
            gauge.with_label_values(&[setting]).set(i64::from(is_off));
        }

        if let Err(error) = pinged {
            if was_up {
                tracing::error!(%error, "database unavailable, run `stripe-reconciler doctor`");
            }
            return;
        }
        if fresh_until.is_some_and(|until| started < until) {
            return;
        }

        match tokio::time::timeout(REFRESH_TIMEOUT, self.load_snapshot()).await {
            Ok(Ok(snapshot)) => self.export(&snapshot),
            Ok(Err(error)) => {
                tracing::warn!(%error, "database metrics are stale: refresh failed");
            }
            Err(_) => tracing::warn!("database metrics are stale: refresh timed out"),
        }
        *fresh_until = Some(Instant::now() + MIN_AGE.max(MIN_AGE_PER_DURATION * started.elapsed()));
    }

    /// Scans the log until `stopping` is cancelled.
    pub async fn run(self: Arc<HealthMonitor>, stopping: CancellationToken) {
        // Record the secrets first, because they sign every delivery from now on.
        let mut done = self.record_secrets().await;
        loop {
            if let Err(error) = done {
                tracing::debug!(%error, "log scan failed");
            }
            tokio::select! {
                () = stopping.cancelled() => return,
                () = tokio::time::sleep(SCAN_INTERVAL) => {}
            }
            done = self.flush().await;
        }
    }

    async fn load_snapshot(&self) -> Result<HealthSnapshot, StoreError> {
        if let Err(error) = self.flush().await {
            // A database on a full disk can still be read.
            tracing::debug!(%error, "log scan failed");
        }
        HealthSnapshot::load(&self.store, self.clock.now_ms()).await
    }

    /// Saves the state that only this process has, and scans one step of the log.
    async fn flush(&self) -> Result<(), StoreError> {
        let now_ms = self.clock.now_ms();
        let rejected = self.rejections().pending(&self.metrics, now_ms);
        self.record_secrets().await?;

        let mut delta = self.repeated().clone();
        for rejection in &rejected {
            let what = LastSeen::Rejected(rejection.reason);
            delta.last_seen.insert(what.to_string(), rejection.at_ms);
        }
        if delta != ActivityDelta::default() {
            save_activity(&self.store, &delta, now_ms).await?;
            self.rejections().mark_saved(&rejected);
            self.drop_saved(&delta);
        }

        scan(&self.store, now_ms).await.map(drop)
    }

    /// Removes repeated webhooks that were saved. More may have been added meanwhile.
    fn drop_saved(&self, saved: &ActivityDelta) {
        let mut repeated = self.repeated();
        repeated
            .last_seen
            .retain(|key, at_ms| saved.last_seen.get(key) != Some(at_ms));
        repeated.hours.retain(|hour| !saved.hours.contains(hour));
    }

    async fn record_secrets(&self) -> Result<(), StoreError> {
        if !self.are_secrets_recorded.load(Ordering::Relaxed) {
            record_configured(&self.store, &self.secrets, self.clock.now_ms()).await?;
            self.are_secrets_recorded.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    fn repeated(&self) -> MutexGuard<'_, ActivityDelta> {
        // The value is valid after a panic, because it holds independent times.
        self.repeated.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn rejections(&self) -> MutexGuard<'_, Rejections> {
        // The value is valid after a panic, because it holds independent counts and times.
        self.rejections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a snapshot into the metrics.
    fn export(&self, snapshot: &HealthSnapshot) {
        let now_ms = self.clock.now_ms();
        self.export_database(snapshot, now_ms);
        self.export_log(snapshot, now_ms);
        self.export_runs(snapshot, now_ms);
    }

    fn export_database(&self, snapshot: &HealthSnapshot, now_ms: i64) {
        let metrics = &self.metrics.database;
        let space = snapshot.space;

        metrics.looked_timestamp_seconds.set(seconds(Some(now_ms)));
        metrics.size_bytes.set(space.database as f64);
        metrics.wal_bytes.set(space.wal.unwrap_or_default() as f64);
        metrics
            .disk_free_bytes
            .set(space.disk.map_or(0, |disk| disk.free) as f64);
        metrics
            .disk_size_bytes
            .set(space.disk.map_or(0, |disk| disk.size) as f64);
    }

    fn export_log(&self, snapshot: &HealthSnapshot, now_ms: i64) {
        let metrics = &self.metrics.log;

        metrics
            .events_without_invoice
            .set(snapshot.unmatched_events);
        metrics
            .oldest_without_invoice_age_seconds
            .set(age_seconds(snapshot.oldest_unmatched_ms, now_ms));
        metrics.unreadable_events.set(snapshot.unreadable.count);
        for mode in Mode::ALL {
            let delivered_ms = snapshot.last_seen(&LastSeen::DeliveryInMode(mode));
            metrics
                .last_delivery_timestamp_seconds
                .with_label_values(&[mode.as_str()])
                .set(seconds(delivered_ms));
        }
        for secret in &self.secrets {
            metrics
                .secret_last_used_timestamp_seconds
                .with_label_values(&[&secret.label])
                .set(seconds(last_used(snapshot, secret)));
        }
    }

    fn export_runs(&self, snapshot: &HealthSnapshot, now_ms: i64) {
        let metrics = &self.metrics.reconcile;

        metrics.differing.set(snapshot.differing.count);
        let Backlog {
            objects,
            links,
            checks,
        } = snapshot.backlog;
        for (kind, count) in [("objects", objects), ("links", links), ("checks", checks)] {
            metrics.backlog.with_label_values(&[kind]).set(count);
        }

        let last = snapshot.runs.first();
        let ended_ms = last.map(|run| run.ended_ms);
        metrics
            .last_success_timestamp_seconds
            .set(seconds(ended_ms));
        metrics
            .last_success_age_seconds
            .set(age_seconds(ended_ms.or(Some(self.started_ms)), now_ms));
        if let Some(run) = last {
            let counts = run.summary.counts;
            metrics
                .last_duration_seconds
                .set(seconds(Some(run.ended_ms - run.started_ms)));
            metrics.unknown_at_stripe.set(counts.unknown_at_stripe);
            metrics.unknown_here.set(counts.unknown_here);
            metrics.endpoint_remarks.set(counts.endpoint_remarks);
        }
    }
}

fn seconds(ms: Option<i64>) -> f64 {
    ms.unwrap_or_default() as f64 / 1000.0
}

fn age_seconds(since_ms: Option<i64>, now_ms: i64) -> f64 {
    since_ms.map_or(0.0, |since_ms| seconds(Some((now_ms - since_ms).max(0))))
}
