//! Is it unusual that no webhook comes? Judged by the hours in which webhooks came before, so that neither a night nor a small
//! merchant raises an alarm.

use std::collections::BTreeSet;

const HOUR_MS: i64 = 3_600_000;
const WEEK: i64 = 7 * 24;
/// Weeks that are looked back.
const WEEKS: i64 = 3;
/// Hours without a webhook, each of which had one in every week before: this many are no chance.
const MISSED: i64 = 2;
/// With less behind us, hours with webhooks say nothing about what is usual.
const ENOUGH: usize = 20;
/// As long as there are not enough weeks behind us, a silence counts from here on.
const SHORTEST: i64 = 3;

/// Why a silence is unusual.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unusual {
    /// So many of its hours had webhooks at the same time of each of the last three weeks.
    Missed(i64),
    /// It is more than twice as long as the longest silence before it, in hours.
    Longest(i64),
}

/// The earliest hour that matters when the last webhook came at this time.
pub fn first_hour(last_ms: i64) -> i64 {
    last_ms.div_euclid(HOUR_MS) - (WEEKS + 1) * WEEK
}

/// `hours`: those since 1970 in which webhooks came. None: the silence since `last_ms` is nothing unusual.
pub fn judge(hours: &BTreeSet<i64>, last_ms: i64, now_ms: i64) -> Option<Unusual> {
    let (last, now) = (last_ms.div_euclid(HOUR_MS), now_ms.div_euclid(HOUR_MS));
    // The hours that are over and had none.
    let silent = last + 1..now;
    if silent.is_empty() || hours.len() < ENOUGH {
        return None;
    }
    let first = *hours.first()?;
    if first <= silent.start - WEEKS * WEEK {
        let is_usual = |hour: &i64| (1..=WEEKS).all(|week| hours.contains(&(hour - week * WEEK)));
        let missed = silent.filter(is_usual).count() as i64;
        return (missed >= MISSED).then_some(Unusual::Missed(missed));
    }
    let known: Vec<i64> = hours.iter().copied().collect();
    let longest = known
        .windows(2)
        .map(|pair| pair[1] - pair[0] - 1)
        .max()
        .unwrap_or_default();
    let length = silent.end - silent.start;
    (length >= SHORTEST && length > 2 * longest).then_some(Unusual::Longest(longest))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Some Monday at midnight, in hours.
    const MONDAY: i64 = 20_000 * 24;

    fn hours(days: i64, is_busy: impl Fn(i64, i64) -> bool) -> BTreeSet<i64> {
        let busy = (0..days * 24).filter(|hour| is_busy(hour / 24, hour % 24));
        busy.map(|hour| MONDAY + hour - days * 24).collect()
    }

    fn judged(hours: &BTreeSet<i64>, now: i64) -> Option<Unusual> {
        judge(hours, (hours.last().unwrap() * HOUR_MS) + 1, now * HOUR_MS)
    }

    #[test]
    fn a_night_or_a_weekend_is_no_silence_and_a_missed_morning_is() {
        let office = hours(28, |day, hour| day % 7 < 5 && (8..18).contains(&hour));
        assert_eq!(judged(&office, MONDAY + 8), None);
        assert_eq!(judged(&office, MONDAY + 9), None);
        assert_eq!(judged(&office, MONDAY + 10), Some(Unusual::Missed(2)));
        assert_eq!(judged(&office, MONDAY + 24), Some(Unusual::Missed(10)));
    }

    #[test]
    fn who_gets_a_few_webhooks_a_week_is_left_alone() {
        let few = hours(28, |day, hour| (day * 7 + 3) % 24 == hour);
        assert_eq!(judged(&few, MONDAY + 12), None);
        let day = hours(10, |_, _| false);
        assert_eq!(
            judge(&day, MONDAY * HOUR_MS, (MONDAY + 100) * HOUR_MS),
            None
        );
    }

    #[test]
    fn before_three_weeks_have_gone_by_the_longest_silence_counts() {
        let young = hours(5, |_, hour| hour % 2 == 0);
        assert_eq!(judged(&young, MONDAY), None);
        assert_eq!(judged(&young, MONDAY + 1), None);
        assert_eq!(judged(&young, MONDAY + 2), Some(Unusual::Longest(1)));
    }
}
