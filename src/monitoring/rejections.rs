//! When deliveries were last refused, by the reason, until that is noted beside the log: a database that takes nothing takes no note
//! of it either, and then a refusal of an hour ago is not one of now.

use std::collections::{BTreeMap, HashMap};

use crate::metrics::{Metrics, Rejection};

#[derive(Default)]
pub struct Rejections(HashMap<&'static str, Seen>);

#[derive(Clone, Copy, Default)]
struct Seen {
    count: u64,
    at_ms: i64,
    /// Up to here it is noted.
    noted: u64,
}

impl Rejections {
    /// Those that are to be noted: the reasons, how many there were, and when the last was seen.
    pub fn look(&mut self, metrics: &Metrics, now_ms: i64) -> BTreeMap<&'static str, (u64, i64)> {
        let mut new = BTreeMap::new();
        for why in Rejection::ALL {
            let (reason, count) = (why.as_str(), metrics.count_rejected(why));
            let seen = self.0.entry(reason).or_default();
            if count > seen.count {
                (seen.count, seen.at_ms) = (count, now_ms);
            }
            if count > seen.noted {
                new.insert(reason, (count, seen.at_ms));
            }
        }
        new
    }

    pub fn noted(&mut self, new: &BTreeMap<&'static str, (u64, i64)>) {
        for (reason, (count, _)) in new {
            self.0.entry(reason).or_default().noted = *count;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_of_the_time_when_it_was_seen_however_late_it_is_noted() {
        let (metrics, mut refusals) = (Metrics::default(), Rejections::default());
        assert!(refusals.look(&metrics, 1).is_empty());
        metrics.rejected(Rejection::Unavailable);
        let new = BTreeMap::from([("unavailable", (1, 2))]);
        assert_eq!(refusals.look(&metrics, 2), new);
        assert_eq!(
            refusals.look(&metrics, 3_600_000),
            new,
            "it could not be noted"
        );
        refusals.noted(&new);
        assert!(refusals.look(&metrics, 3_600_001).is_empty());
        metrics.rejected(Rejection::Unavailable);
        assert_eq!(
            refusals.look(&metrics, 3_600_002),
            BTreeMap::from([("unavailable", (2, 3_600_002))])
        );
    }
}
