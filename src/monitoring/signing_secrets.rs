//! Determines the last use of each configured signing secret, so that an old one can be removed
//! safely.
//!
//! The log stores the label of the secret that signed a delivery, but a rotation reuses labels:
//! yesterday's `live` secret is today's `old`. So the time when a label started to name a secret is
//! stored too, and earlier uses of the label do not count.

use std::collections::BTreeMap;

use super::last_seen::{LastSeen, LastSeenTimes, stored_times};
use super::snapshot::HealthSnapshot;
use crate::domain::stripe::signing_secrets::SecretName;
use crate::store::{Store, StoreError};

/// Returns the time when this secret last signed a webhook, in Unix milliseconds.
pub fn last_used(snapshot: &HealthSnapshot, secret: &SecretName) -> Option<i64> {
    let used_ms = snapshot.last_seen(&LastSeen::SecretUsed(secret.label.clone()))?;
    let is_only_secret =
        secrets_of_label(&snapshot.last_seen, &secret.label).all(|(mark, _)| mark == secret.mark);
    let was_used_since_configured =
        configured_since(snapshot, secret).is_some_and(|since_ms| since_ms <= used_ms);

    (is_only_secret || was_used_since_configured).then_some(used_ms)
}

/// Returns the time since when `serve` has had this secret under its label, or `None` if unknown.
pub fn configured_since(snapshot: &HealthSnapshot, secret: &SecretName) -> Option<i64> {
    secrets_of_label(&snapshot.last_seen, &secret.label)
        .find(|(mark, _)| *mark == secret.mark)
        .map(|(_, since_ms)| since_ms)
}

/// Records the secrets that the labels name from now on, for labels that named another secret or no
/// secret before.
///
/// # Errors
/// Returns an error if the database cannot be read or written.
pub async fn record_configured(
    store: &Store,
    secrets: &[SecretName],
    now_ms: i64,
) -> Result<(), StoreError> {
    let last_seen = LastSeenTimes::from_stored(store.last_seen().await?);
    let is_new = |secret: &&SecretName| {
        let latest = secrets_of_label(&last_seen, &secret.label).max_by_key(|(_, since)| *since);
        latest.is_none_or(|(mark, _)| mark != secret.mark)
    };
    let new: BTreeMap<String, i64> = stored_times(secrets.iter().filter(is_new).map(|secret| {
        let last_seen_key = LastSeen::SecretConfigured {
            label: secret.label.clone(),
            mark: secret.mark.clone(),
        };
        (last_seen_key, now_ms)
    }));

    if new.is_empty() {
        Ok(())
    } else {
        store.record_last_seen(&new, now_ms).await
    }
}

/// Returns the marks of the secrets that a label has named, each with its start time.
fn secrets_of_label(
    last_seen: &LastSeenTimes,
    wanted: &str,
) -> impl Iterator<Item = (String, i64)> {
    last_seen
        .iter()
        .filter_map(move |(what, at_ms)| match what {
            LastSeen::SecretConfigured { label, mark } if label == wanted => Some((mark, at_ms)),
            _ => None,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(label: &str, mark: &str) -> SecretName {
        SecretName {
            label: label.to_owned(),
            mark: mark.to_owned(),
        }
    }

    fn snapshot(times: &[(&str, i64)]) -> HealthSnapshot {
        let times = times
            .iter()
            .map(|(key, at_ms)| ((*key).to_owned(), *at_ms))
            .collect();
        HealthSnapshot {
            last_seen: LastSeenTimes::from_stored(times),
            ..HealthSnapshot::default()
        }
    }

    #[test]
    fn use_of_label_counts_only_for_its_present_secret() {
        let before = snapshot(&[("secret live", 50), ("configured live aa", 100)]);
        assert_eq!(
            last_used(&before, &secret("live", "aa")),
            Some(50),
            "the label never named another secret"
        );
        let rolled = snapshot(&[
            ("secret live", 150),
            ("configured live aa", 100),
            ("configured live bb", 200),
        ]);
        assert_eq!(last_used(&rolled, &secret("live", "bb")), None);
        assert_eq!(
            last_used(&rolled, &secret("live", "cc")),
            None,
            "no server ever had this secret"
        );
        let used = snapshot(&[
            ("secret live", 250),
            ("configured live aa", 100),
            ("configured live bb", 200),
        ]);
        assert_eq!(last_used(&used, &secret("live", "bb")), Some(250));
        assert_eq!(configured_since(&used, &secret("live", "bb")), Some(200));

        assert_eq!(configured_since(&used, &secret("liv", "bb")), None);
    }
}
