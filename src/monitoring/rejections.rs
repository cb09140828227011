//! Holds the last rejection time per reason until it can be written.
//!
//! Without it, rejections during an outage would be stamped with the time the database came back.

use crate::metrics::{Metrics, Rejection};

/// Rejections of this process, by reason.
pub struct Rejections([Seen; Rejection::ALL.len()]);

#[derive(Clone, Copy, Default)]
struct Seen {
    count: u64,
    /// Unix milliseconds of the last increase of `count`.
    at_ms: i64,
    /// Value of `count` up to which the time is saved.
    saved: u64,
}

/// Rejections for one reason that are not saved yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PendingRejection {
    pub reason: Rejection,
    pub count: u64,
    /// Unix milliseconds of the last rejection.
    pub at_ms: i64,
}

impl Default for Rejections {
    fn default() -> Rejections {
        Rejections([Seen::default(); Rejection::ALL.len()])
    }
}

impl Rejections {
    /// Reads the counters and returns the reasons that have rejections to save.
    pub fn pending(&mut self, metrics: &Metrics, now_ms: i64) -> Vec<PendingRejection> {
        let mut pending = Vec::new();
        for (reason, seen) in Rejection::ALL.into_iter().zip(&mut self.0) {
            let count = metrics.count_rejected(reason);
            if count > seen.count {
                (seen.count, seen.at_ms) = (count, now_ms);
            }
            if count > seen.saved {
                pending.push(PendingRejection {
                    reason,
                    count,
                    at_ms: seen.at_ms,
                });
            }
        }

        pending
    }

    /// Marks these rejections as saved.
    pub fn mark_saved(&mut self, saved: &[PendingRejection]) {
        for (reason, seen) in Rejection::ALL.into_iter().zip(&mut self.0) {
            if let Some(saved) = saved.iter().find(|saved| saved.reason == reason) {
                seen.saved = saved.count;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rejection_keeps_its_original_time() {
        let (metrics, mut rejections) = (Metrics::default(), Rejections::default());
        assert!(rejections.pending(&metrics, 1).is_empty());

        metrics.rejected(Rejection::Unavailable);
        let first = [PendingRejection {
            reason: Rejection::Unavailable,
            count: 1,
            at_ms: 2,
        }];
        assert_eq!(rejections.pending(&metrics, 2), first);
        assert_eq!(
            rejections.pending(&metrics, 3_600_000),
            first,
            "an hour later it is still not saved"
        );

        rejections.mark_saved(&first);
        assert!(rejections.pending(&metrics, 3_600_001).is_empty());

        metrics.rejected(Rejection::Unavailable);
        assert_eq!(
            rejections.pending(&metrics, 3_600_002),
            [PendingRejection {
                reason: Rejection::Unavailable,
                count: 2,
                at_ms: 3_600_002,
            }]
        );
    }
}
