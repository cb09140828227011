//! How findings are worded: states, times, sizes and numbers.

use super::{Check, CheckStatus};
use crate::domain::time::timestamp;

pub const SECOND_MS: i64 = 1_000;
pub const MINUTE_MS: i64 = 60 * SECOND_MS;
pub const HOUR_MS: i64 = 60 * MINUTE_MS;
pub const DAY_MS: i64 = 24 * HOUR_MS;

/// `1 event`, `2 events`
pub fn count(number: i64, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

pub fn ok(name: &'static str, finding: String) -> Check {
    Check {
        name,
        state: CheckStatus::Ok,
        finding,
        remedy: None,
    }
}

pub fn unknown(name: &'static str, finding: String, remedy: &str) -> Check {
    Check {
        name,
        state: CheckStatus::Unknown,
        finding,
        remedy: Some(remedy.to_owned()),
    }
}

pub fn warning(name: &'static str, finding: String, remedy: &str) -> Check {
    Check {
        name,
        state: CheckStatus::Warning,
        finding,
        remedy: Some(remedy.to_owned()),
    }
}

pub fn failing(name: &'static str, finding: String, remedy: &str) -> Check {
    Check {
        name,
        state: CheckStatus::Failing,
        finding,
        remedy: Some(remedy.to_owned()),
    }
}

/// With a capital letter in front and a full stop behind.
pub fn sentence(text: &str) -> String {
    let mut letters = text.trim_end_matches('.').chars();
    let first: String = letters
        .next()
        .map(|c| c.to_uppercase().collect())
        .unwrap_or_default();
    format!("{first}{}.", letters.as_str())
}

pub fn ago(at_ms: i64, now_ms: i64) -> String {
    format!(
        "{} ago ({})",
        duration((now_ms - at_ms).max(0)),
        timestamp(at_ms)
    )
}

pub fn duration(ms: i64) -> String {
    match ms {
        DAY_MS.. => format!("{:.1} days", ms as f64 / DAY_MS as f64),
        HOUR_MS..DAY_MS => format!("{:.1} hours", ms as f64 / HOUR_MS as f64),
        MINUTE_MS..HOUR_MS => format!("{} min", ms / MINUTE_MS),
        _ => format!("{} s", ms / SECOND_MS),
    }
}

pub fn bytes(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{} KB", bytes / 1_000),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}
