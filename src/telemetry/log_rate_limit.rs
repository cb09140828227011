//! Limits the log lines of each kind per period, so that a flood of requests does not fill the
//! disk. Lines beyond the limit are counted, and the count is logged. Lines below `info` are never
//! limited: an operator who enables them wants all of them.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tracing::callsite::Identifier;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

/// Number of lines of one kind that are written in a [`PERIOD`].
const LINES: u64 = 20;
/// Length of a counting period.
const PERIOD: Duration = Duration::from_secs(10);

/// The number of lines in the current period by call site.
#[derive(Clone, Default)]
pub struct LogRateLimit(Arc<Mutex<HashMap<Identifier, Kind>>>);

/// The lines of one call site.
#[derive(Default)]
struct Kind {
    count: u64,
    /// The message of the first line over the limit.
    message: String,
}

impl LogRateLimit {
    /// Starts counting. At the end of each period, logs how many lines were dropped.
    pub fn start() -> LogRateLimit {
        let limit = LogRateLimit::default();
        let counted = limit.clone();
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(PERIOD).await;
                for (message, dropped) in counted.end_period() {
                    tracing::warn!(
                        dropped,
                        of = message,
                        "log lines dropped, too many of a kind"
                    );
                }
            }
        });

        limit
    }

    /// Starts a new period. Returns each message over the limit with the number of dropped lines.
    fn end_period(&self) -> Vec<(String, u64)> {
        let kinds = std::mem::take(&mut *self.kinds());
        let too_many = kinds.into_values().filter(|kind| kind.count > LINES);
        too_many
            .map(|kind| (kind.message, kind.count - LINES))
            .collect()
    }

    fn kinds(&self) -> MutexGuard<'_, HashMap<Identifier, Kind>> {
        // The counts are still usable after a panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S: Subscriber> Layer<S> for LogRateLimit {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        if *event.metadata().level() > Level::INFO {
            return true;
        }

        let mut kinds = self.kinds();
        let kind = kinds.entry(event.metadata().callsite()).or_default();
        kind.count += 1;
        if kind.count == LINES + 1 {
            event.record(&mut Message(&mut kind.message));
        }
        kind.count <= LINES
    }
}

/// A visitor that reads the message of an event.
struct Message<'m>(&'m mut String);

impl Visit for Message<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            *self.0 = format!("{value:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    #[test]
    fn excess_lines_are_counted_and_debug_lines_written() {
        #[derive(Clone, Default)]
        struct Written(Arc<Mutex<Vec<Level>>>);
        impl<S: Subscriber> Layer<S> for Written {
            fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
                self.0.lock().unwrap().push(*event.metadata().level());
            }
        }

        let (written, limit) = (Written::default(), LogRateLimit::default());
        let subscriber = tracing_subscriber::registry()
            .with(written.clone())
            .with(limit.clone());

        tracing::subscriber::with_default(subscriber, || {
            for number in 0..50 {
                tracing::warn!(number, "refused");
                tracing::debug!("in detail");
            }
            tracing::warn!("another kind");
        });

        let count = |level| {
            written
                .0
                .lock()
                .unwrap()
                .iter()
                .filter(|l| **l == level)
                .count()
        };
        assert_eq!((count(Level::WARN), count(Level::DEBUG)), (21, 50));
        assert_eq!(limit.end_period(), [("refused".to_owned(), 30)]);
        assert_eq!(limit.end_period(), []);
    }
}
