//! Events of the service whose last time is stored, and the keys under which it is stored.

use std::collections::BTreeMap;
use std::fmt;

use crate::domain::run_summary::RunErrorCause;
pub use crate::metrics::Rejection;

/// An event of the service whose last time is stored.
///
/// [`Display`](fmt::Display) writes the stored key and [`LastSeen::parse`] reads it. Stored keys
/// never change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LastSeen {
    /// An accepted webhook.
    Delivery,
    /// An accepted webhook of this mode.
    DeliveryInMode(Mode),
    /// An accepted webhook that the secret with this label signed.
    SecretUsed(String),
    /// The first time when `serve` had this secret, identified by its mark, under this label.
    SecretConfigured { label: String, mark: String },
    /// A webhook that was rejected for this reason.
    Rejected(Rejection),
    /// A reconcile run that failed.
    RunFailed,
    /// A reconcile run that failed for this reason.
    RunFailedBy(RunErrorCause),
    /// A run of `doctor` that could write.
    DoctorRun,
}

/// Stripe's live or test mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Live,
    Test,
}

impl Mode {
    pub const ALL: [Mode; 2] = [Mode::Live, Mode::Test];

    pub fn as_str(self) -> &'static str {
        match self {
            Mode::Live => "live",
            Mode::Test => "test",
        }
    }

    pub fn from_livemode(livemode: bool) -> Mode {
        if livemode { Mode::Live } else { Mode::Test }
    }
}

const DELIVERY: &str = "delivered";
const DELIVERY_IN_MODE: &str = "delivered ";
const SECRET_USED: &str = "secret ";
const SECRET_CONFIGURED: &str = "configured ";
const REJECTED: &str = "refused ";
const RUN_FAILED: &str = "reconciling failed";
const RUN_FAILED_BY: &str = "reconciling failed by ";
const DOCTOR_RUN: &str = "examined";

impl fmt::Display for LastSeen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LastSeen::Delivery => f.write_str(DELIVERY),
            LastSeen::DeliveryInMode(mode) => write!(f, "{DELIVERY_IN_MODE}{}", mode.as_str()),
            LastSeen::SecretUsed(label) => write!(f, "{SECRET_USED}{label}"),
            LastSeen::SecretConfigured { label, mark } => {
                write!(f, "{SECRET_CONFIGURED}{label} {mark}")
            }
            LastSeen::Rejected(reason) => write!(f, "{REJECTED}{}", reason.as_str()),
            LastSeen::RunFailed => f.write_str(RUN_FAILED),
            LastSeen::RunFailedBy(cause) => write!(f, "{RUN_FAILED_BY}{}", cause.as_str()),
            LastSeen::DoctorRun => f.write_str(DOCTOR_RUN),
        }
    }
}

impl LastSeen {
    /// Parses a stored key. Returns `None` for a key that another version wrote.
    pub fn parse(key: &str) -> Option<LastSeen> {
        match key {
            DELIVERY => return Some(LastSeen::Delivery),
            RUN_FAILED => return Some(LastSeen::RunFailed),
            DOCTOR_RUN => return Some(LastSeen::DoctorRun),
            _ => {}
        }

        if let Some(mode) = key.strip_prefix(DELIVERY_IN_MODE) {
            return Mode::ALL
                .into_iter()
                .find(|known| known.as_str() == mode)
                .map(LastSeen::DeliveryInMode);
        }
        if let Some(label) = key.strip_prefix(SECRET_USED) {
            return Some(LastSeen::SecretUsed(label.to_owned()));
        }
        if let Some(configured) = key.strip_prefix(SECRET_CONFIGURED) {
            // A mark is hexadecimal, so the last blank separates it from any label.
            let (label, mark) = configured.rsplit_once(' ')?;
            return Some(LastSeen::SecretConfigured {
                label: label.to_owned(),
                mark: mark.to_owned(),
            });
        }
        if let Some(reason) = key.strip_prefix(REJECTED) {
            return Rejection::ALL
                .into_iter()
                .find(|known| known.as_str() == reason)
                .map(LastSeen::Rejected);
        }
        let cause = key.strip_prefix(RUN_FAILED_BY)?;
        RunErrorCause::parse(cause).map(LastSeen::RunFailedBy)
    }
}

/// The last time of each event of the service, in Unix milliseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LastSeenTimes(BTreeMap<String, i64>);

impl LastSeenTimes {
    /// Wraps stored times by stored key.
    pub fn from_stored(times: BTreeMap<String, i64>) -> LastSeenTimes {
        LastSeenTimes(times)
    }

    /// Returns the last time of this event, or `None` if no time is stored.
    pub fn get(&self, what: &LastSeen) -> Option<i64> {
        self.0.get(&what.to_string()).copied()
    }

    /// Iterates over all entries that this version knows, in the order of the stored keys.
    pub fn iter(&self) -> impl Iterator<Item = (LastSeen, i64)> {
        self.0
            .iter()
            .filter_map(|(key, at_ms)| Some((LastSeen::parse(key)?, *at_ms)))
    }

    /// Drops times later than this.
    pub fn drop_later_than(&mut self, latest_ms: i64) {
        self.0.retain(|_, at_ms| *at_ms <= latest_ms);
    }

    /// Adds stored times; the later time of each key wins.
    pub fn merge(&mut self, times: &BTreeMap<String, i64>) {
        for (key, at_ms) in times {
            let known_ms = self.0.entry(key.clone()).or_insert(*at_ms);
            *known_ms = (*at_ms).max(*known_ms);
        }
    }
}

/// Builds stored times, for [`Store::record_last_seen`](crate::store::Store::record_last_seen).
pub fn stored_times(times: impl IntoIterator<Item = (LastSeen, i64)>) -> BTreeMap<String, i64> {
    times
        .into_iter()
        .map(|(what, at_ms)| (what.to_string(), at_ms))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::stripe::signature::SignatureError;

    #[test]
    fn stored_keys_survive_round_trip() {
        let configured = |label: &str| LastSeen::SecretConfigured {
            label: label.to_owned(),
            mark: "aa".to_owned(),
        };

        for (what, stored) in [
            (LastSeen::Delivery, "delivered"),
            (LastSeen::DeliveryInMode(Mode::Live), "delivered live"),
            (LastSeen::DeliveryInMode(Mode::Test), "delivered test"),
            (LastSeen::SecretUsed("live".to_owned()), "secret live"),
            (
                LastSeen::SecretUsed("it's odd".to_owned()),
                "secret it's odd",
            ),
            (configured("live"), "configured live aa"),
            (configured("two words"), "configured two words aa"),
            (
                LastSeen::Rejected(Rejection::QueueFull),
                "refused queue_full",
            ),
            (
                LastSeen::Rejected(Rejection::Signature(SignatureError::Stale)),
                "refused stale",
            ),
            (LastSeen::RunFailed, "reconciling failed"),
            (
                LastSeen::RunFailedBy(RunErrorCause::RateLimited),
                "reconciling failed by busy",
            ),
            (LastSeen::DoctorRun, "examined"),
        ] {
            assert_eq!(what.to_string(), stored);
            assert_eq!(LastSeen::parse(stored), Some(what), "{stored}");
        }
    }

    #[test]
    fn every_reason_and_cause_survives_round_trip() {
        let reasons = Rejection::ALL.map(LastSeen::Rejected);
        let causes = RunErrorCause::ALL.map(LastSeen::RunFailedBy);
        for what in reasons.into_iter().chain(causes) {
            assert_eq!(LastSeen::parse(&what.to_string()), Some(what));
        }
    }

    #[test]
    fn unknown_stored_key_is_ignored() {
        for key in [
            "",
            "moment 7",
            "refused moon",
            "delivered moon",
            "configured x",
        ] {
            assert_eq!(LastSeen::parse(key), None, "{key}");
        }
    }
}
