//! Formats the parts of findings: statuses, times, sizes and numbers.

use super::{Check, CheckId, CheckStatus};
use crate::domain::time::timestamp;

pub const SECOND_MS: i64 = 1_000;
pub const MINUTE_MS: i64 = 60 * SECOND_MS;
pub const HOUR_MS: i64 = 60 * MINUTE_MS;
pub const DAY_MS: i64 = 24 * HOUR_MS;

/// Returns `1 event`, `2 events`.
pub fn count(number: i64, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

pub fn ok(id: CheckId, finding: impl Into<String>) -> Check {
    Check {
        id,
        state: CheckStatus::Ok,
        finding: finding.into(),
        remedy: None,
    }
}

pub fn unknown(id: CheckId, finding: impl Into<String>, remedy: impl Into<String>) -> Check {
    with_remedy(id, CheckStatus::Unknown, finding, remedy)
}

pub fn warning(id: CheckId, finding: impl Into<String>, remedy: impl Into<String>) -> Check {
    with_remedy(id, CheckStatus::Warning, finding, remedy)
}

pub fn failing(id: CheckId, finding: impl Into<String>, remedy: impl Into<String>) -> Check {
    with_remedy(id, CheckStatus::Failing, finding, remedy)
}

pub fn with_remedy(
    id: CheckId,
    state: CheckStatus,
    finding: impl Into<String>,
    remedy: impl Into<String>,
) -> Check {
    Check {
        id,
        state,
        finding: finding.into(),
        remedy: Some(remedy.into()),
    }
}

/// Makes a sentence by adding a capital letter in front and a full stop at the end.
pub fn sentence(text: &str) -> String {
    let mut letters = text.trim_end_matches('.').chars();
    let first: String = letters
        .next()
        .map(|c| c.to_uppercase().collect())
        .unwrap_or_default();
    format!("{first}{}.", letters.as_str())
}

/// Returns `5 min ago (2026-01-31T10:00:00.000Z)`. A future time counts as now.
pub fn ago(at_ms: i64, now_ms: i64) -> String {
    format!(
        "{} ago ({})",
        duration((now_ms - at_ms).max(0)),
        timestamp(at_ms)
    )
}

/// Returns a duration in its largest unit.
pub fn duration(ms: i64) -> String {
    match ms {
        DAY_MS.. => format!("{:.1} days", ms as f64 / DAY_MS as f64),
        HOUR_MS..DAY_MS => format!("{:.1} hours", ms as f64 / HOUR_MS as f64),
        MINUTE_MS..HOUR_MS => format!("{} min", ms / MINUTE_MS),
        _ => format!("{} s", ms / SECOND_MS),
    }
}

/// Returns a size in its largest decimal unit.
pub fn bytes(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{} KB", bytes / 1_000),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}
