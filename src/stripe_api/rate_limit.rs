//! Limits the calls per second to each endpoint, across the whole process.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::Instant;

/// Length of a window: a little more than Stripe's second, because calls arrive less evenly than
/// they are sent.
const WINDOW: Duration = Duration::from_millis(1100);

/// A sliding window per endpoint.
pub struct RateLimit {
    /// Calls per window and endpoint.
    rate: usize,
    /// The start times of the latest calls per endpoint, oldest first; at most `rate` of them.
    starts: Mutex<HashMap<String, VecDeque<Instant>>>,
}

impl RateLimit {
    pub fn new(rate: u32) -> RateLimit {
        RateLimit {
            rate: rate.max(1) as usize,
            starts: Mutex::default(),
        }
    }

    /// Waits until a call to this endpoint may start.
    pub async fn acquire(&self, endpoint: &str) {
        let at = self.reserve(endpoint).await;
        tokio::time::sleep_until(at).await;
    }

    /// Reserves the next start time, so that the lock is not held while waiting.
    async fn reserve(&self, endpoint: &str) -> Instant {
        let now = Instant::now();
        let mut starts = self.starts.lock().await;
        let of_endpoint = match starts.get_mut(endpoint) {
            Some(found) => found,
            None => starts.entry(endpoint.to_owned()).or_default(),
        };

        let at = if of_endpoint.len() < self.rate {
            now
        } else {
            let oldest = of_endpoint.pop_front();
            oldest.map_or(now, |oldest| now.max(oldest + WINDOW))
        };
        of_endpoint.push_back(at);
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn window_never_exceeds_rate_of_endpoint() {
        let limit = RateLimit::new(5);
        let mut times = Vec::new();
        for _ in 0..23 {
            times.push(limit.reserve("/v1/events").await);
        }
        assert!(
            times.windows(6).all(|calls| calls[5] - calls[0] >= WINDOW),
            "{times:?}"
        );
        assert!(times.is_sorted());
        assert!(limit.reserve("/v1/invoices").await < times[5]);
    }
}
