//! Vital signs: what the log comes to, for whoever watches over the service. `/metrics` and `doctor` read the same.
//!
//! No delivery pays for it. The log is read once more, in the order of receipt, a bounded step at a time, and what it adds is kept
//! beside it (`store/monitor`): so what was seen survives restarts, is the same for all replicas, and costs a few look-ups to read,
//! however long the log is.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::rejections::Rejections;
use super::signing_secrets::{last_used, note_configured};
use crate::clock::Clock;
use crate::domain::stripe::event::Observation;
use crate::domain::stripe::signing_secrets::SecretName;
use crate::metrics::Metrics;
use crate::monitoring::delivery_gap;
use crate::store::{
    ActivityDelta, Backlog, CLOCKS_DIFFER_MS, COUNTED, Counted, EventFilter, LogRow, PackedBody,
    Run, Source, Space, Store, StoreError,
};

/// Names of moments. What follows is a label.
pub const DELIVERED: &str = "delivered";
pub const DELIVERED_IN_MODE: &str = "delivered ";
pub const SECRET: &str = "secret ";
pub const REFUSED: &str = "refused ";
pub const RECONCILING_FAILED: &str = "reconciling failed";
pub const RECONCILING_FAILED_BY: &str = "reconciling failed by ";
pub const EXAMINED: &str = "examined";

/// How far the log was read, Unix milliseconds: the name of a progress.
const READ_UNTIL: &str = "signs";
/// What was noted for later than that, a clock noted that was ahead: webhooks are taken while it is so by five minutes at most.
const AHEAD_MS: i64 = 6 * 60_000;
/// Rows read at a time, and in one step at most.
const PAGE: u32 = 100;
/// Bytes of observations that are read of the newest events.
const NEWEST_BYTES: usize = 1024 * 1024;
const STEP: usize = 10_000;
/// How long after its receipt a delivery may reach the log: so long it is read again.
const SETTLING_MS: i64 = 15_000;
/// Events of this long are looked at; what waits for longer is no longer counted.
const DAYS_30_MS: i64 = 30 * 24 * 3600 * 1000;
const HOUR_MS: i64 = 3_600_000;
/// Passes that are looked at: of about an hour.
const PASSES: u32 = 12;
/// How often a server reads on.
const READ_ON: Duration = Duration::from_secs(5);
/// Who looks again sooner is told what was seen just now: where looking takes long, it is done less often.
const FRESH: Duration = Duration::from_secs(1);
const SHARE: u32 = 20;
/// How long the database may take to answer at all, and to answer everything.
const PING_TIMEOUT: Duration = Duration::from_secs(1);
const TIMEOUT: Duration = Duration::from_secs(3);

/// What the database says. Times in Unix milliseconds.
#[derive(Clone, Debug, Default)]
pub struct HealthSnapshot {
    /// When things last happened, by the names above.
    pub moments: BTreeMap<String, i64>,
    pub awaited_invoices: usize,
    pub events_without_invoice: i64,
    pub oldest_without_invoice_ms: Option<i64>,
    pub unreadable: Counted,
    pub differing: Counted,
    pub backlog: Backlog,
    /// The passes against Stripe's API that ended last, the latest first.
    pub passes: Vec<FailedRun>,
    pub space: Space,
    /// So far the log was read.
    pub read_until_ms: Option<i64>,
}

#[derive(Clone, Debug)]
pub struct FailedRun {
    pub started_ms: i64,
    pub ended_ms: i64,
    pub report: Value,
}

impl HealthSnapshot {
    /// # Errors
    /// The database cannot be reached.
    pub async fn read(store: &Store, now_ms: i64) -> Result<HealthSnapshot, StoreError> {
        let awaited = store.awaited(COUNTED).await?;
        let runs = store.last_runs(PASSES, now_ms + CLOCKS_DIFFER_MS).await?;
        let progress = store.progress(READ_UNTIL).await?;
        let mut moments = store.moments().await?;
        moments.retain(|_, at_ms| *at_ms <= now_ms + AHEAD_MS);
        Ok(HealthSnapshot {
            moments,
            awaited_invoices: awaited.len(),
            events_without_invoice: awaited.iter().map(|awaited| awaited.events).sum(),
            oldest_without_invoice_ms: awaited.first().map(|awaited| awaited.received_ms),
            unreadable: store.count_unreadable(now_ms - DAYS_30_MS).await?,
            differing: store.count_differing().await?,
            backlog: store.backlog(now_ms).await?,
            passes: runs.iter().map(FailedRun::of).collect(),
            space: store.space().await?,
            read_until_ms: progress
                .into_iter()
                .find(|(name, _)| name == READ_UNTIL)
                .map(|(_, until_ms)| until_ms),
        })
    }

    /// Adds what was read, but could not be kept.
    pub fn add(&mut self, news: &ActivityDelta) {
        for (name, at_ms) in &news.moments {
            let known_ms = self.moments.entry(name.clone()).or_insert(*at_ms);
            *known_ms = (*at_ms).max(*known_ms);
        }
    }

    /// When this last happened; None: it is not known that it ever did.
    pub fn moment(&self, kind: &str, label: &str) -> Option<i64> {
        self.moments.get(&format!("{kind}{label}")).copied()
    }
}

impl FailedRun {
    fn of(run: &Run) -> FailedRun {
        let report = serde_json::from_str(run.report.get()).unwrap_or_default();
        FailedRun {
            started_ms: run.started_ms,
            ended_ms: run.ended_ms,
            report,
        }
    }

    /// How many items a list of its report has.
    pub fn count(&self, list: &str) -> i64 {
        self.report["counts"][list].as_i64().unwrap_or_default()
    }

    /// What it found about the webhook endpoint.
    pub fn endpoint_remarks(&self) -> Vec<String> {
        let remarks = self.report["endpointRemarks"]
            .as_array()
            .into_iter()
            .flatten();
        remarks
            .filter_map(Value::as_str)
            .map(str::to_owned)
            .collect()
    }
}

/// Reads on in the log, one step, and keeps what it adds. True: there is more.
///
/// # Errors
/// The database cannot be reached, or takes nothing.
pub async fn scan(store: &Store, now_ms: i64) -> Result<bool, StoreError> {
    let step = scan_page(store, now_ms).await?;
    keep_step(store, &step, now_ms).await?;
    Ok(step.is_more)
}

/// A part of the log that was read.
pub struct Step {
    pub news: ActivityDelta,
    pub is_more: bool,
    known_ms: Option<i64>,
    /// So far everything was read; None: there was nothing to read.
    until_ms: Option<i64>,
}

/// # Errors
/// The database cannot be reached.
pub async fn scan_page(store: &Store, now_ms: i64) -> Result<Step, StoreError> {
    let progress = store.progress(READ_UNTIL).await?;
    let known_ms = progress
        .into_iter()
        .find(|(name, _)| name == READ_UNTIL)
        .map(|(_, until_ms)| until_ms);
    // What is noted for later than now, a clock noted that was ahead.
    let from_ms = known_ms
        .unwrap_or_default()
        .clamp(now_ms - DAYS_30_MS, now_ms - SETTLING_MS);
    let (mut news, mut last, mut rows) = (ActivityDelta::default(), None, 0);
    let is_more = loop {
        let page = store.log_lines(from_ms, last, now_ms, PAGE).await?;
        page.iter().for_each(|line| note(line, &mut news));
        rows += page.len();
        last = page
            .last()
            .map(|line| (line.received_ms, line.key))
            .or(last);
        match page.len() < PAGE as usize {
            true => break false,
            false if rows >= STEP => break true,
            false => {}
        }
    };
    if is_more {
        // Whoever is far behind knows what came last all the same.
        let newest = store
            .observed_page(&EventFilter::default(), None, PAGE, NEWEST_BYTES)
            .await?;
        for (event, telling) in newest
            .events
            .iter()
            .filter(|(event, _)| event.source == Source::Webhook)
        {
            let livemode = telling
                .as_deref()
                .and_then(|telling| livemode(telling.as_bytes()));
            note_webhook(
                &mut news,
                event.received_ms,
                livemode,
                event.secret_label.as_deref(),
            );
        }
    }
    let until_ms = last.map(|(last_ms, _)| {
        // There may be more of the last millisecond.
        let done_ms = if is_more {
            (last_ms - 1).max(from_ms + 1)
        } else {
            last_ms
        };
        done_ms.min(now_ms - SETTLING_MS)
    });
    Ok(Step {
        news,
        is_more,
        known_ms,
        until_ms,
    })
}

/// # Errors
/// The database cannot be reached, or takes nothing.
pub async fn keep_step(store: &Store, step: &Step, now_ms: i64) -> Result<(), StoreError> {
    let Some(until_ms) = step.until_ms else {
        return Ok(());
    };
    keep(store, &step.news, now_ms).await?;
    if step.known_ms != Some(until_ms) {
        store.set_progress(READ_UNTIL, until_ms).await?;
    }
    Ok(())
}

/// Hours are forgotten as others are added: while nothing comes they stay, or after some weeks there would be no silence to see.
async fn keep(store: &Store, news: &ActivityDelta, now_ms: i64) -> Result<(), StoreError> {
    let first_hour = news
        .moments
        .get(DELIVERED)
        .map_or(i64::MIN, |delivered_ms| {
            delivery_gap::first_hour(*delivered_ms)
        });
    store
        .keep_news(news, now_ms, first_hour, now_ms - DAYS_30_MS)
        .await
}

fn note(line: &LogRow, news: &mut ActivityDelta) {
    let telling = line
        .telling
        .as_deref()
        .and_then(|text| serde_json::from_str::<Observation>(text).ok());
    let named = telling
        .iter()
        .flat_map(Observation::mentions)
        .filter(|mention| mention.is_invoice);
    for mention in named {
        let first_ms = news
            .named
            .entry(mention.object_id)
            .or_insert(line.received_ms);
        *first_ms = line.received_ms.min(*first_ms);
    }
    if line.source != Source::Webhook {
        return;
    }
    let of_body = || {
        line.body
            .as_ref()
            .and_then(PackedBody::unpack)
            .and_then(|body| livemode(&body))
    };
    let livemode = telling
        .and_then(|telling| telling.livemode)
        .or_else(of_body);
    note_webhook(
        news,
        line.received_ms,
        livemode,
        line.secret_label.as_deref(),
    );
}

fn note_webhook(
    news: &mut ActivityDelta,
    received_ms: i64,
    livemode: Option<bool>,
    secret_label: Option<&str>,
) {
    news.hours.insert(received_ms.div_euclid(HOUR_MS));
    let mode =
        livemode.map(|live| format!("{DELIVERED_IN_MODE}{}", if live { "live" } else { "test" }));
    let secret = secret_label.map(|label| format!("{SECRET}{label}"));
    for name in [Some(DELIVERED.to_owned()), mode, secret]
        .into_iter()
        .flatten()
    {
        let at_ms = news.moments.entry(name).or_insert(received_ms);
        *at_ms = received_ms.max(*at_ms);
    }
}

fn livemode(body: &[u8]) -> Option<bool> {
    #[derive(Deserialize)]
    struct Envelope {
        livemode: Option<bool>,
    }
    serde_json::from_slice::<Envelope>(body).ok()?.livemode
}

/// Looks for one running server, and shows what it sees in its metrics.
pub struct HealthMonitor {
    store: Store,
    metrics: Arc<Metrics>,
    clock: Clock,
    secrets: Vec<SecretName>,
    are_secrets_noted: AtomicBool,
    started_ms: i64,
    /// Until then, what was seen is fresh.
    fresh_until: tokio::sync::Mutex<Option<Instant>>,
    /// Webhooks that added nothing to the log.
    repeated: Mutex<ActivityDelta>,
    refusals: Mutex<Rejections>,
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
        let (are_secrets_noted, fresh_until, repeated, refusals) = Default::default();
        HealthMonitor {
            store,
            metrics,
            clock,
            secrets,
            are_secrets_noted,
            started_ms,
            fresh_until,
            repeated,
            refusals,
        }
    }

    /// A webhook that brings what is known is not in the log: it does not say that it came.
    pub fn note_repeated(&self, body: &[u8], received_ms: i64, secret_label: &str) {
        let livemode = livemode(body);
        note_webhook(
            &mut self.repeated(),
            received_ms,
            livemode,
            Some(secret_label),
        );
    }

    /// Brings the metrics up to date with the database. Never fails: where the database is away, the metrics say that, and keep the
    /// rest as it was.
    pub async fn look(&self) {
        // Who comes while another looks waits for what that one sees.
        let mut fresh_until = self.fresh_until.lock().await;
        let started = Instant::now();
        let pinged = self.store.ping_within(PING_TIMEOUT).await;
        let (was_up, reached) = (self.metrics.database.up.get() == 1, pinged.is_ok());
        self.metrics.database.up.set(i64::from(reached));
        for (setting, is_off) in self.store.durability().is_off() {
            let gauge = &self.metrics.database.unsafe_setting;
            gauge.with_label_values(&[setting]).set(i64::from(is_off));
        }
        match pinged {
            Err(error) if was_up => {
                tracing::error!(%error, "the database cannot be used: `stripe-reconciler doctor` says what to do")
            }
            _ => {}
        }
        if !reached || fresh_until.is_some_and(|until| started < until) {
            return;
        }
        match tokio::time::timeout(TIMEOUT, self.see()).await {
            Ok(Ok(snapshot)) => self.show(&snapshot),
            Ok(Err(error)) => {
                tracing::warn!(%error, "what metrics say of the database is old: it could not be looked at")
            }
            Err(_) => tracing::warn!(
                "what metrics say of the database is old: it took too long to look at"
            ),
        }
        *fresh_until = Some(Instant::now() + FRESH.max(SHARE * started.elapsed()));
    }

    /// Reads on in the log until it is told to stop.
    pub async fn run(self: Arc<HealthMonitor>, stopping: CancellationToken) {
        // At once: what comes from now on is signed with these.
        let mut done = self.note_secrets().await;
        loop {
            if let Err(error) = done {
                tracing::debug!(%error, "the log could not be read on");
            }
            tokio::select! {
                () = stopping.cancelled() => return,
                () = tokio::time::sleep(READ_ON) => {}
            }
            done = self.read().await;
        }
    }

    async fn see(&self) -> Result<HealthSnapshot, StoreError> {
        if let Err(error) = self.read().await {
            // A disk that is full can still be read.
            tracing::debug!(%error, "the log could not be read on");
        }
        HealthSnapshot::read(&self.store, self.clock.now_ms()).await
    }

    async fn read(&self) -> Result<(), StoreError> {
        let now_ms = self.clock.now_ms();
        let refused = self.refusals().look(&self.metrics, now_ms);
        self.note_secrets().await?;
        let mut news = self.repeated().clone();
        news.moments.extend(
            refused
                .iter()
                .map(|(reason, (_, at_ms))| (format!("{REFUSED}{reason}"), *at_ms)),
        );
        if news != ActivityDelta::default() {
            keep(&self.store, &news, now_ms).await?;
            self.refusals().noted(&refused);
            // Only now, and only what was kept: more may have come meanwhile.
            let mut repeated = self.repeated();
            repeated
                .moments
                .retain(|name, at_ms| news.moments.get(name) != Some(at_ms));
            repeated.hours.retain(|hour| !news.hours.contains(hour));
        }
        scan(&self.store, now_ms).await.map(drop)
    }

    async fn note_secrets(&self) -> Result<(), StoreError> {
        if !self.are_secrets_noted.load(Ordering::Relaxed) {
            note_configured(&self.store, &self.secrets, self.clock.now_ms()).await?;
            self.are_secrets_noted.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    fn repeated(&self) -> MutexGuard<'_, ActivityDelta> {
        // Times, whatever happened.
        self.repeated.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn refusals(&self) -> MutexGuard<'_, Rejections> {
        // Counts and times, whatever happened.
        self.refusals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn show(&self, snapshot: &HealthSnapshot) {
        let now_ms = self.clock.now_ms();
        let seconds = |ms: Option<i64>| ms.unwrap_or_default() as f64 / 1000.0;
        let age = |since_ms: Option<i64>| {
            since_ms.map_or(0.0, |since_ms| seconds(Some((now_ms - since_ms).max(0))))
        };
        let Metrics {
            database,
            log,
            reconcile,
            ..
        } = &*self.metrics;
        database.looked_timestamp_seconds.set(seconds(Some(now_ms)));
        database.size_bytes.set(snapshot.space.database as f64);
        database
            .wal_bytes
            .set(snapshot.space.log.unwrap_or_default() as f64);
        database
            .disk_free_bytes
            .set(snapshot.space.disk.map_or(0, |disk| disk.free) as f64);
        database
            .disk_size_bytes
            .set(snapshot.space.disk.map_or(0, |disk| disk.size) as f64);
        log.events_without_invoice
            .set(snapshot.events_without_invoice);
        log.oldest_without_invoice_age_seconds
            .set(age(snapshot.oldest_without_invoice_ms));
        log.unreadable_events.set(snapshot.unreadable.count);
        for mode in ["live", "test"] {
            let delivered = seconds(snapshot.moment(DELIVERED_IN_MODE, mode));
            log.last_delivery_timestamp_seconds
                .with_label_values(&[mode])
                .set(delivered);
        }
        for secret in &self.secrets {
            let used = seconds(last_used(snapshot, secret));
            log.secret_last_used_timestamp_seconds
                .with_label_values(&[&secret.label])
                .set(used);
        }
        reconcile.differing.set(snapshot.differing.count);
        let Backlog {
            objects,
            links,
            checks,
        } = snapshot.backlog;
        for (kind, count) in [("objects", objects), ("links", links), ("checks", checks)] {
            reconcile.backlog.with_label_values(&[kind]).set(count);
        }
        let ended_ms = snapshot.passes.first().map(|pass| pass.ended_ms);
        reconcile
            .last_success_timestamp_seconds
            .set(seconds(ended_ms));
        reconcile
            .last_success_age_seconds
            .set(age(ended_ms.or(Some(self.started_ms))));
        if let Some(pass) = snapshot.passes.first() {
            reconcile
                .last_duration_seconds
                .set(seconds(Some(pass.ended_ms - pass.started_ms)));
            reconcile
                .unknown_at_stripe
                .set(pass.count("unknownAtStripe"));
            reconcile.unknown_here.set(pass.count("unknownHere"));
            reconcile
                .endpoint_remarks
                .set(pass.count("endpointRemarks"));
        }
    }
}
