//! Webhooks that should have come and did not: what Stripe's API told of since the last one came.
//!
//! The log is asked, not the reports of the passes: it also knows what those found that failed half way, for as long as nothing comes.

use crate::domain::history::fact::PAYMENT_EVENT_TYPES;
use crate::domain::stripe::event::Observation;
use crate::store::{Source, Store, StoreError};

/// While webhooks come, each that is late is on its way.
const SHORTEST_SILENCE_MS: i64 = 3600 * 1000;
/// How long a webhook may take longer than Stripe's list.
const ON_ITS_WAY_MS: i64 = 10 * 60 * 1000;
/// Lines of the log read at a time, and how often. Mostly the first decide: what was fetched or replayed meanwhile is passed over.
const LINES: u32 = 1_000;
const PAGES: usize = 10;

/// Whether an endpoint that sends all that it should sends events of this type: of others, Stripe's API alone may tell.
pub fn should_be_sent(event_type: &str) -> bool {
    PAYMENT_EVENT_TYPES.contains(&event_type.strip_prefix("v1.").unwrap_or(event_type))
}

/// Whether a webhook should have brought by now what Stripe made then. Unix milliseconds; `last_ms`: when the last webhook came.
pub fn is_due(created_ms: i64, last_ms: i64, now_ms: i64) -> bool {
    now_ms - last_ms > SHORTEST_SILENCE_MS
        && (last_ms + 1..now_ms - ON_ITS_WAY_MS).contains(&created_ms)
}

/// When Stripe made the first event that is missed, Unix milliseconds.
///
/// # Errors
/// The database cannot be reached.
pub async fn first_missed(
    store: &Store,
    last_ms: i64,
    now_ms: i64,
) -> Result<Option<i64>, StoreError> {
    if now_ms - last_ms <= SHORTEST_SILENCE_MS {
        return Ok(None);
    }
    let mut last = None;
    for _ in 0..PAGES {
        let page = store.log_lines(last_ms, last, now_ms, LINES).await?;
        let observations = page
            .iter()
            .filter(|line| line.source == Source::Api)
            .filter_map(|line| line.telling.as_deref());
        let events = observations
            .filter_map(|text| serde_json::from_str::<Observation>(text).ok())
            .filter(|event| !event.fetched);
        let mut created_ms = events
            .filter(|event| should_be_sent(&event.kind))
            .map(|event| event.created.saturating_mul(1000));
        if let Some(first_ms) = created_ms.find(|created_ms| is_due(*created_ms, last_ms, now_ms)) {
            return Ok(Some(first_ms));
        }
        last = page.last().map(|line| (line.received_ms, line.key));
        if page.len() < LINES as usize {
            break;
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_webhook_is_due_ten_minutes_after_its_event_in_a_silence_of_an_hour() {
        const MINUTE_MS: i64 = 60_000;
        let now_ms = 1_000 * MINUTE_MS;
        let due = |created_ago: i64, last_ago: i64| {
            is_due(now_ms - created_ago, now_ms - last_ago, now_ms)
        };
        let (hour, ten) = (60 * MINUTE_MS, 10 * MINUTE_MS);
        assert!(due(ten + 1, hour + 1));
        assert!(!due(ten, hour + 1), "it may be on its way");
        assert!(!due(ten + 1, hour), "the silence is short");
        assert!(
            due(hour, hour + 1) && !due(hour + 1, hour + 1),
            "what was made before is told by then"
        );
    }
}
