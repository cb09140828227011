//! How many calls may be made: so many a second to each endpoint, whoever makes them.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::Instant;

/// A little more than the second that Stripe counts by: calls do not arrive as evenly as they are sent.
const WINDOW: Duration = Duration::from_millis(1100);

pub struct RateLimit {
    /// Calls in a window, to each endpoint.
    rate: usize,
    /// When the last calls to an endpoint may go, oldest first; as many as `rate` at most.
    made: Mutex<HashMap<String, VecDeque<Instant>>>,
}

impl RateLimit {
    pub fn new(rate: u32) -> RateLimit {
        RateLimit {
            rate: rate.max(1) as usize,
            made: Mutex::default(),
        }
    }

    /// Returns when a call to this endpoint may go.
    pub async fn acquire(&self, endpoint: &str) {
        let at = self.reserve(endpoint).await;
        tokio::time::sleep_until(at).await;
    }

    /// Takes a place in the line, so that nobody has to hold it while waiting.
    async fn reserve(&self, endpoint: &str) -> Instant {
        let now = Instant::now();
        let mut made = self.made.lock().await;
        let of_endpoint = match made.get_mut(endpoint) {
            Some(found) => found,
            None => made.entry(endpoint.to_owned()).or_default(),
        };
        let at = if of_endpoint.len() < self.rate {
            now
        } else {
            of_endpoint
                .pop_front()
                .map_or(now, |oldest| now.max(oldest + WINDOW))
        };
        of_endpoint.push_back(at);
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn no_window_has_more_calls_than_the_rate_and_endpoints_do_not_share() {
        let budget = RateLimit::new(5);
        let mut times = Vec::new();
        for _ in 0..23 {
            times.push(budget.reserve("/v1/events").await);
        }
        assert!(
            times.windows(6).all(|calls| calls[5] - calls[0] >= WINDOW),
            "{times:?}"
        );
        assert!(times.is_sorted());
        assert!(budget.reserve("/v1/invoices").await < times[5]);
    }
}
