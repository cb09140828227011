//! Detects overdue webhooks: events that Stripe's API returned since the last webhook was received.
//!
//! Reads the log, not the reports of the runs. While no webhook is received, the log also keeps the
//! findings of runs that failed half way.

use crate::domain::history::fact::PAYMENT_EVENT_TYPES;
use crate::store::{Source, Store, StoreError};

/// Shortest gap that counts. While webhooks are received, a late one may still be in transit.
const MIN_GAP_MS: i64 = 3600 * 1000;
/// Longest delay of a webhook behind Stripe's list.
const MAX_DELAY_MS: i64 = 10 * 60 * 1000;
/// Log rows per page, and number of pages. The first rows usually decide; more are needed if many
/// events were fetched or replayed since the last webhook.
const PAGE_ROWS: u32 = 1_000;
const MAX_PAGES: usize = 10;

/// Returns whether a complete webhook endpoint sends events of this type. Other types may only be
/// known from Stripe's API.
pub fn should_be_sent(event_type: &str) -> bool {
    PAYMENT_EVENT_TYPES.contains(&event_type.strip_prefix("v1.").unwrap_or(event_type))
}

/// Returns whether a webhook for an event created at `created_ms` is overdue. `last_ms` is the
/// receipt time of the last webhook. Times in Unix milliseconds.
pub fn is_due(created_ms: i64, last_ms: i64, now_ms: i64) -> bool {
    now_ms - last_ms > MIN_GAP_MS && (last_ms + 1..now_ms - MAX_DELAY_MS).contains(&created_ms)
}

/// Returns the time when Stripe created the first event whose webhook is overdue, in Unix
/// milliseconds.
///
/// # Errors
/// Returns an error if the database cannot be read.
pub async fn first_missed(
    store: &Store,
    last_ms: i64,
    now_ms: i64,
) -> Result<Option<i64>, StoreError> {
    if now_ms - last_ms <= MIN_GAP_MS {
        return Ok(None);
    }

    let (mut last, mut damaged) = (None, 0_usize);
    let mut missed_ms = None;
    for _ in 0..MAX_PAGES {
        let page = store.log_rows(last_ms, last, now_ms, PAGE_ROWS).await?;
        for row in page.iter().filter(|row| row.source == Source::Api) {
            let Some(parsed) = row.parse_observation() else {
                continue;
            };
            let Ok(stored) = parsed else {
                damaged += 1;
                continue;
            };
            let event = stored.observation;
            let created_ms = event.created.saturating_mul(1000);
            if !event.fetched && should_be_sent(&event.kind) && is_due(created_ms, last_ms, now_ms)
            {
                missed_ms = Some(created_ms);
                break;
            }
        }

        last = page.last().map(|row| (row.received_ms, row.key));
        if missed_ms.is_some() || page.len() < PAGE_ROWS as usize {
            break;
        }
    }

    if damaged > 0 {
        tracing::warn!(
            count = damaged,
            "skipped damaged observations, run `rebuild`"
        );
    }
    Ok(missed_ms)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn webhook_is_overdue_after_ten_minutes_in_hour_long_gap() {
        const MINUTE_MS: i64 = 60_000;
        let now_ms = 1_000 * MINUTE_MS;
        let due = |created_ago: i64, last_ago: i64| {
            is_due(now_ms - created_ago, now_ms - last_ago, now_ms)
        };
        let (hour, ten) = (60 * MINUTE_MS, 10 * MINUTE_MS);
        assert!(due(ten + 1, hour + 1));
        assert!(!due(ten, hour + 1), "the webhook may still arrive");
        assert!(!due(ten + 1, hour), "the gap is too short");

        assert!(
            due(hour, hour + 1) && !due(hour + 1, hour + 1),
            "an event from before the last webhook is not missed"
        );
    }
}
