//! The current time. Only this file reads the system clock.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

/// Milliseconds by which the clocks of processes on the same database may differ.
pub const MAX_SKEW_MS: i64 = 60_000;

/// The system clock, or a time that a test sets.
#[derive(Clone, Debug)]
pub struct Clock(Option<Arc<AtomicI64>>);

impl Clock {
    /// Creates a clock that returns the system time.
    pub fn system() -> Clock {
        Clock(None)
    }

    /// Creates a clock that stays at `ms` (Unix milliseconds) until a test sets it.
    pub fn fixed(ms: i64) -> Clock {
        Clock(Some(Arc::new(AtomicI64::new(ms))))
    }

    /// Sets a fixed clock and all its clones, in Unix milliseconds. A system clock ignores the
    /// call.
    pub fn set(&self, ms: i64) {
        if let Some(fixed) = &self.0 {
            fixed.store(ms, Ordering::Relaxed);
        }
    }

    /// Returns the time in Unix milliseconds.
    #[expect(
        clippy::disallowed_methods,
        reason = "only this function reads the system clock"
    )]
    pub fn now_ms(&self) -> i64 {
        match &self.0 {
            Some(fixed) => fixed.load(Ordering::Relaxed),
            None => jiff::Timestamp::now().as_millisecond(),
        }
    }

    /// Returns the time in Unix seconds.
    pub fn now_s(&self) -> i64 {
        self.now_ms().div_euclid(1000)
    }
}
