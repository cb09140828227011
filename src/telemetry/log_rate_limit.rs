//! A flood of requests must not become a flood of log lines, or the disk fills: of each kind of line so many are written in a
//! while, and of the rest only how many there were. Lines below `info` are all written: who asks for them wants them.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tracing::callsite::Identifier;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

/// Lines of one kind that are written in a while.
const LINES: u64 = 20;
/// How long a while is.
const WHILE: Duration = Duration::from_secs(10);

/// The lines of this while, by the place in the program that writes them.
#[derive(Clone, Default)]
pub struct LogRateLimit(Arc<Mutex<HashMap<Identifier, Kind>>>);

#[derive(Default)]
struct Kind {
    count: u64,
    message: String,
}

impl LogRateLimit {
    /// Says at the end of each while what was left out.
    pub fn start() -> LogRateLimit {
        let flood = LogRateLimit::default();
        let counted = flood.clone();
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(WHILE).await;
                for (message, left_out) in counted.end() {
                    tracing::warn!(
                        left_out,
                        of = message,
                        "lines were left out: there were too many of a kind"
                    );
                }
            }
        });
        flood
    }

    fn end(&self) -> Vec<(String, u64)> {
        let kinds = std::mem::take(&mut *self.kinds());
        let too_many = kinds.into_values().filter(|kind| kind.count > LINES);
        too_many
            .map(|kind| (kind.message, kind.count - LINES))
            .collect()
    }

    fn kinds(&self) -> MutexGuard<'_, HashMap<Identifier, Kind>> {
        // Counts, whatever happened.
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
    fn of_too_many_lines_the_rest_is_counted_and_debug_lines_are_all_written() {
        #[derive(Clone, Default)]
        struct Written(Arc<Mutex<Vec<Level>>>);
        impl<S: Subscriber> Layer<S> for Written {
            fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
                self.0.lock().unwrap().push(*event.metadata().level());
            }
        }
        let (written, flood) = (Written::default(), LogRateLimit::default());
        let subscriber = tracing_subscriber::registry()
            .with(written.clone())
            .with(flood.clone());
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
        assert_eq!(flood.end(), [("refused".to_owned(), 30)]);
        assert_eq!(flood.end(), []);
    }
}
