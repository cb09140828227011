//! Reads the event log in the background and adds it to the stored totals.
//!
//! The log is read once, in the order of receipt, one bounded step at a time. The totals are stored
//! (`store/monitoring`). So they survive restarts, are the same for all replicas, and need only a
//! few lookups to read, even if the log is long.

use serde::Deserialize;

use super::delivery_gap;
use super::last_seen::{LastSeen, Mode};
use super::snapshot::COUNTED_PERIOD_MS;
use crate::domain::stripe::event::EventKey;
use crate::store::{
    ActivityDelta, EventFilter, LogRow, PackedBody, ProgressKey, Source, Store, StoreError,
};

/// Largest numbers of rows read in one query and in one step.
const PAGE_ROWS: u32 = 100;
/// Bytes of observations that the scanner reads of the newest events.
const NEWEST_BYTES: usize = 1024 * 1024;
const STEP_ROWS: usize = 10_000;
/// Longest delay between receipt and commit. The scanner re-reads this window on every scan.
const COMMIT_DELAY_MS: i64 = 15_000;
const HOUR_MS: i64 = 3_600_000;

/// A section of the log that was read.
pub struct ScanStep {
    pub delta: ActivityDelta,
    /// `true` if more rows follow in the log.
    pub is_more: bool,
    saved_until_ms: Option<i64>,
    /// Time up to which the log was read. `None` if it had no rows to read.
    until_ms: Option<i64>,
}

/// Reads one step of the log and saves its activity. Returns `true` if more rows follow in the log.
///
/// # Errors
/// Returns an error if the database cannot be read or written.
pub async fn scan(store: &Store, now_ms: i64) -> Result<bool, StoreError> {
    let step = scan_page(store, now_ms).await?;
    save_step(store, &step, now_ms).await?;
    Ok(step.is_more)
}

/// Reads one step of the log without saving it.
///
/// # Errors
/// Returns an error if the database cannot be read.
pub async fn scan_page(store: &Store, now_ms: i64) -> Result<ScanStep, StoreError> {
    let saved_until_ms = store.progress(&ProgressKey::LogScan).await?;
    // Progress in the future was saved under a skewed clock.
    let from_ms = saved_until_ms
        .unwrap_or_default()
        .clamp(now_ms - COUNTED_PERIOD_MS, now_ms - COMMIT_DELAY_MS);

    let mut activity = Activity::default();
    let (mut last, mut row_count) = (None, 0);
    let is_more = loop {
        let page = store.log_rows(from_ms, last, now_ms, PAGE_ROWS).await?;
        for row in &page {
            activity.add_row(row);
        }
        row_count += page.len();
        last = page.last().map(|row| (row.received_ms, row.key)).or(last);

        if page.len() < PAGE_ROWS as usize {
            break false;
        }
        if row_count >= STEP_ROWS {
            break true;
        }
    };
    if is_more {
        activity.add_newest(store).await?;
    }
    activity.warn_about_damage();

    let until_ms = last.map(|(last_ms, _)| {
        // The last millisecond may have more rows.
        let done_ms = if is_more {
            (last_ms - 1).max(from_ms + 1)
        } else {
            last_ms
        };
        done_ms.min(now_ms - COMMIT_DELAY_MS)
    });
    Ok(ScanStep {
        delta: activity.delta,
        is_more,
        saved_until_ms,
        until_ms,
    })
}

/// Saves the activity of a step and its progress.
///
/// # Errors
/// Returns an error if the database cannot be written.
pub async fn save_step(store: &Store, step: &ScanStep, now_ms: i64) -> Result<(), StoreError> {
    let Some(until_ms) = step.until_ms else {
        return Ok(());
    };

    save_activity(store, &step.delta, now_ms).await?;
    if step.saved_until_ms != Some(until_ms) {
        store.set_progress(&ProgressKey::LogScan, until_ms).await?;
    }
    Ok(())
}

/// Saves activity, and deletes old hours only when new ones are added.
///
/// While no webhook is received the hours stay, because otherwise no gap could be detected after
/// some weeks.
pub(super) async fn save_activity(
    store: &Store,
    delta: &ActivityDelta,
    now_ms: i64,
) -> Result<(), StoreError> {
    let first_hour = delta
        .last_seen
        .get(&LastSeen::Delivery.to_string())
        .map_or(i64::MIN, |delivered_ms| {
            delivery_gap::first_hour(*delivered_ms)
        });

    store
        .save_activity(delta, now_ms, first_hour, now_ms - COUNTED_PERIOD_MS)
        .await
}

/// Collects the activity of log rows.
#[derive(Default)]
struct Activity {
    delta: ActivityDelta,
    damaged: usize,
    first_damaged: Option<EventKey>,
}

impl Activity {
    fn add_row(&mut self, row: &LogRow) {
        let observation = match row.parse_observation() {
            Some(Ok(stored)) => Some(stored.observation),
            Some(Err(_)) => {
                self.damaged += 1;
                self.first_damaged.get_or_insert(row.key);
                None
            }
            None => None,
        };

        let named = observation
            .iter()
            .flat_map(super::super::domain::stripe::event::Observation::mentions)
            .filter(|mention| mention.is_invoice);
        for mention in named {
            let first_ms = self
                .delta
                .named_invoices
                .entry(mention.object_id)
                .or_insert(row.received_ms);
            *first_ms = row.received_ms.min(*first_ms);
        }

        if row.source != Source::Webhook {
            return;
        }
        let livemode = observation
            .and_then(|observation| observation.livemode)
            .or_else(|| livemode(&row.body.as_ref().and_then(PackedBody::unpack)?));
        add_webhook(
            &mut self.delta,
            row.received_ms,
            livemode,
            row.secret_label.as_deref(),
        );
    }

    /// Adds the newest page of the log, so that a scanner that is far behind still knows the latest
    /// times.
    async fn add_newest(&mut self, store: &Store) -> Result<(), StoreError> {
        let newest = store
            .observed_page(&EventFilter::default(), None, PAGE_ROWS, NEWEST_BYTES)
            .await?;

        for (event, observation) in &newest.events {
            if event.source != Source::Webhook {
                continue;
            }
            let livemode = observation
                .as_deref()
                .and_then(|json| livemode(json.as_bytes()));
            add_webhook(
                &mut self.delta,
                event.received_ms,
                livemode,
                event.secret_label.as_deref(),
            );
        }
        Ok(())
    }

    /// Logs one warning per scan, however many rows are damaged.
    fn warn_about_damage(&self) {
        if let Some(key) = self.first_damaged {
            tracing::warn!(
                count = self.damaged,
                first_event.key = hex::encode(key.0),
                "skipped damaged observations, run `rebuild`"
            );
        }
    }
}

/// Adds an accepted webhook.
pub(super) fn add_webhook(
    delta: &mut ActivityDelta,
    received_ms: i64,
    livemode: Option<bool>,
    secret_label: Option<&str>,
) {
    delta.hours.insert(received_ms.div_euclid(HOUR_MS));

    let mode = livemode.map(|livemode| LastSeen::DeliveryInMode(Mode::from_livemode(livemode)));
    let secret = secret_label.map(|label| LastSeen::SecretUsed(label.to_owned()));
    for what in [Some(LastSeen::Delivery), mode, secret]
        .into_iter()
        .flatten()
    {
        let at_ms = delta
            .last_seen
            .entry(what.to_string())
            .or_insert(received_ms);
        *at_ms = received_ms.max(*at_ms);
    }
}

/// Reads `livemode` from an event or a stored observation.
pub(super) fn livemode(json: &[u8]) -> Option<bool> {
    #[derive(Deserialize)]
    struct Envelope {
        livemode: Option<bool>,
    }

    serde_json::from_slice::<Envelope>(json).ok()?.livemode
}
