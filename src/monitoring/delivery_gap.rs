//! Decides whether a time without webhooks is unusual.
//!
//! The decision compares the time with the hours in which webhooks were received before, so that
//! neither a night nor a small merchant raises an alarm.

use std::collections::BTreeSet;

use crate::domain::run_summary::SilenceEvidence;

const HOUR_MS: i64 = 3_600_000;
const WEEK_HOURS: i64 = 7 * 24;
/// Number of weeks that are compared.
const WEEKS: i64 = 3;
/// Number of silent hours that were busy in each of the last three weeks. This many cannot be
/// coincidence.
const MIN_BUSY_HOURS: i64 = 2;
/// Smallest number of recorded busy hours that show the usual pattern.
const MIN_RECORDED_HOURS: usize = 20;
/// Shortest gap, in hours, that counts while fewer than three weeks are recorded.
const MIN_GAP_HOURS: i64 = 3;

/// Returns the earliest hour that matters if the last webhook was received at this time.
pub fn first_hour(last_ms: i64) -> i64 {
    last_ms.div_euclid(HOUR_MS) - (WEEKS + 1) * WEEK_HOURS
}

/// Returns the reason why the time without webhooks since `last_ms` is unusual, or `None` if it is
/// usual.
///
/// `hours` holds the hours since 1970 in which webhooks were received.
pub fn judge(hours: &BTreeSet<i64>, last_ms: i64, now_ms: i64) -> Option<SilenceEvidence> {
    let (last, now) = (last_ms.div_euclid(HOUR_MS), now_ms.div_euclid(HOUR_MS));
    // Only hours that are over count.
    let silent = last + 1..now;
    if silent.is_empty() || hours.len() < MIN_RECORDED_HOURS {
        return None;
    }

    let first = *hours.first()?;
    if first <= silent.start - WEEKS * WEEK_HOURS {
        let busy_hours = silent
            .filter(|hour| (1..=WEEKS).all(|week| hours.contains(&(hour - week * WEEK_HOURS))))
            .count() as i64;
        return (busy_hours >= MIN_BUSY_HOURS)
            .then_some(SilenceEvidence::BusyHours { hours: busy_hours });
    }

    let recorded: Vec<i64> = hours.iter().copied().collect();
    let longest = recorded
        .windows(2)
        .map(|pair| pair[1] - pair[0] - 1)
        .max()
        .unwrap_or_default();
    let length = silent.end - silent.start;
    (length >= MIN_GAP_HOURS && length > 2 * longest)
        .then_some(SilenceEvidence::LongestGap { hours: longest })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A Monday at midnight, in hours since 1970.
    const MONDAY: i64 = 20_000 * 24;

    fn hours(days: i64, is_busy: impl Fn(i64, i64) -> bool) -> BTreeSet<i64> {
        let busy = (0..days * 24).filter(|hour| is_busy(hour / 24, hour % 24));
        busy.map(|hour| MONDAY + hour - days * 24).collect()
    }

    fn judged(hours: &BTreeSet<i64>, now: i64) -> Option<SilenceEvidence> {
        judge(hours, (hours.last().unwrap() * HOUR_MS) + 1, now * HOUR_MS)
    }

    #[test]
    fn missed_morning_is_unusual_but_nights_and_weekends_are_not() {
        let office = hours(28, |day, hour| day % 7 < 5 && (8..18).contains(&hour));
        assert_eq!(judged(&office, MONDAY + 8), None);
        assert_eq!(judged(&office, MONDAY + 9), None);
        assert_eq!(
            judged(&office, MONDAY + 10),
            Some(SilenceEvidence::BusyHours { hours: 2 })
        );
        assert_eq!(
            judged(&office, MONDAY + 24),
            Some(SilenceEvidence::BusyHours { hours: 10 })
        );
    }

    #[test]
    fn few_webhooks_a_week_are_never_unusual() {
        let few = hours(28, |day, hour| (day * 7 + 3) % 24 == hour);
        assert_eq!(judged(&few, MONDAY + 12), None);
        let day = hours(10, |_, _| false);
        assert_eq!(
            judge(&day, MONDAY * HOUR_MS, (MONDAY + 100) * HOUR_MS),
            None
        );
    }

    #[test]
    fn longest_gap_counts_in_first_three_weeks() {
        let young = hours(5, |_, hour| hour % 2 == 0);
        assert_eq!(judged(&young, MONDAY), None);
        assert_eq!(judged(&young, MONDAY + 1), None);
        assert_eq!(
            judged(&young, MONDAY + 2),
            Some(SilenceEvidence::LongestGap { hours: 1 })
        );
    }
}
