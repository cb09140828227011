//! When each configured signing secret was last used, so that an old one can be removed safely.
//!
//! The log keeps the label of the secret that signed a delivery, and a rotation hands a label on: what was `live` yesterday is
//! `old` today. So it is noted since when a label names which secret, and what came before does not count.

use std::collections::BTreeMap;

use super::monitor::{HealthSnapshot, SECRET};
use crate::domain::stripe::signing_secrets::SecretName;
use crate::store::{Store, StoreError};

/// Begins the names of moments: a label and a mark follow.
const CONFIGURED: &str = "configured ";

/// When a webhook was last signed with this secret, Unix milliseconds.
pub fn last_used(snapshot: &HealthSnapshot, secret: &SecretName) -> Option<i64> {
    let used_ms = snapshot.moment(SECRET, &secret.label)?;
    let is_first = named(&snapshot.moments, &secret.label).all(|(mark, _)| mark == secret.mark);
    let is_its_own =
        is_first || configured_since(snapshot, secret).is_some_and(|since_ms| since_ms <= used_ms);
    is_its_own.then_some(used_ms)
}

/// Since when `serve` has it by this label; None: that is not known.
pub fn configured_since(snapshot: &HealthSnapshot, secret: &SecretName) -> Option<i64> {
    named(&snapshot.moments, &secret.label)
        .find(|(mark, _)| *mark == secret.mark)
        .map(|(_, since_ms)| since_ms)
}

/// Notes which secrets the labels name from now on, where they named others, or none.
///
/// # Errors
/// The database cannot be reached, or takes nothing.
pub async fn note_configured(
    store: &Store,
    secrets: &[SecretName],
    now_ms: i64,
) -> Result<(), StoreError> {
    let moments = store.moments().await?;
    let is_new = |secret: &&SecretName| {
        let latest = named(&moments, &secret.label).max_by_key(|(_, since_ms)| *since_ms);
        latest.is_none_or(|(mark, _)| mark != secret.mark)
    };
    let name = |secret: &SecretName| {
        (
            format!("{CONFIGURED}{} {}", secret.label, secret.mark),
            now_ms,
        )
    };
    let new: BTreeMap<String, i64> = secrets.iter().filter(is_new).map(name).collect();
    if new.is_empty() {
        Ok(())
    } else {
        store.note_moments(&new, now_ms).await
    }
}

/// The marks of the secrets that a label has named, and since when it did.
fn named<'m>(
    moments: &'m BTreeMap<String, i64>,
    label: &str,
) -> impl Iterator<Item = (&'m str, i64)> + use<'m> {
    let start = format!("{CONFIGURED}{label} ");
    moments
        .range(start.clone()..)
        .map_while(move |(name, at_ms)| Some((name.strip_prefix(&start)?, *at_ms)))
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

    fn seen(moments: &[(&str, i64)]) -> HealthSnapshot {
        let moments = moments
            .iter()
            .map(|(name, at_ms)| ((*name).to_owned(), *at_ms))
            .collect();
        HealthSnapshot {
            moments,
            ..HealthSnapshot::default()
        }
    }

    #[test]
    fn what_a_label_did_before_it_named_this_secret_does_not_count() {
        let before = seen(&[("secret live", 50), ("configured live aa", 100)]);
        assert_eq!(
            last_used(&before, &secret("live", "aa")),
            Some(50),
            "it named no other"
        );
        let rolled = seen(&[
            ("secret live", 150),
            ("configured live aa", 100),
            ("configured live bb", 200),
        ]);
        assert_eq!(last_used(&rolled, &secret("live", "bb")), None);
        assert_eq!(
            last_used(&rolled, &secret("live", "cc")),
            None,
            "no serve ever had it"
        );
        let used = seen(&[
            ("secret live", 250),
            ("configured live aa", 100),
            ("configured live bb", 200),
        ]);
        assert_eq!(last_used(&used, &secret("live", "bb")), Some(250));
        assert_eq!(configured_since(&used, &secret("live", "bb")), Some(200));
        assert_eq!(configured_since(&used, &secret("liv", "bb")), None);
    }
}
