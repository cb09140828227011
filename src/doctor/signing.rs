//! Checks of signatures and signing secrets: whether Stripe's deliveries are accepted, and which
//! secret can be removed.

use super::format::{DAY_MS, HOUR_MS, MINUTE_MS, ago, failing, ok, unknown, warning, with_remedy};
use super::{Check, CheckId, CheckStatus};
use crate::domain::stripe::signature::SignatureError;
use crate::domain::stripe::signing_secrets::SecretName;
use crate::monitoring::last_seen::{LastSeen, Rejection};
use crate::monitoring::signing_secrets::{configured_since, last_used};
use crate::monitoring::snapshot::HealthSnapshot;

/// Time between an accepted and a rejected delivery from which they count separately. A delivery
/// accepted earlier does not weaken the rejection; one accepted later ends it.
const UNRELATED_MS: i64 = 10 * MINUTE_MS;
/// Time after a roll during which Stripe also signs with the old secret, plus an hour of delay.
const ROLL_MS: i64 = 25 * HOUR_MS;
const SECRET_UNUSED_MS: i64 = 30 * DAY_MS;

/// Checks whether authentic deliveries are rejected because of their signature or its time.
pub fn signatures(snapshot: &HealthSnapshot, now_ms: i64) -> Check {
    let accepted_ms = snapshot.last_seen(&LastSeen::Delivery);
    let accepted = accepted_ms.map_or("none was ever accepted".to_owned(), |ms| {
        format!("the last accepted one was received {}", ago(ms, now_ms))
    });
    let none_accepted_before =
        |at_ms: i64| accepted_ms.is_none_or(|accepted_ms| accepted_ms < at_ms - UNRELATED_MS);

    let mismatch_ms = rejected_today(snapshot, SignatureError::Mismatch, now_ms);
    if let Some(at_ms) = mismatch_ms.filter(|at_ms| none_accepted_before(*at_ms)) {
        return failing(
            CheckId::Signatures,
            format!(
                "Deliveries are rejected because no configured secret signs them, most recently \
                 {}; {accepted}.",
                ago(at_ms, now_ms)
            ),
            "Compare STRIPE_WEBHOOK_SECRET with the endpoint's signing secret in Stripe's Dashboard: \
             was it rolled? Configure old and new together (`live=whsec_...,old=whsec_...`) and \
             restart. Test mode, live mode and Connect have one each.",
        );
    }
    if let Some((at_ms, problem)) = recent_clock_problem(snapshot, accepted_ms, now_ms) {
        let status = if none_accepted_before(at_ms) {
            CheckStatus::Failing
        } else {
            CheckStatus::Warning
        };
        return with_remedy(
            CheckId::Signatures,
            status,
            format!(
                "Authentic deliveries are rejected as {problem}. The last was received {}; \
                 {accepted}.",
                ago(at_ms, now_ms)
            ),
            "Set the clock and keep it set by NTP (`timedatectl`, `chronyc tracking`).",
        );
    }

    ok(
        CheckId::Signatures,
        match mismatch_ms {
            Some(at_ms) => format!(
                "Deliveries signed by Stripe are accepted. Others were rejected, most recently {}.",
                ago(at_ms, now_ms)
            ),
            None => "No delivery was rejected for its signature today.".to_owned(),
        },
    )
}

/// Returns the time of the last rejection for this reason, within a day.
fn rejected_today(snapshot: &HealthSnapshot, reason: SignatureError, now_ms: i64) -> Option<i64> {
    snapshot
        .last_seen(&LastSeen::Rejected(Rejection::Signature(reason)))
        .filter(|at_ms| now_ms - at_ms < DAY_MS)
}

/// Returns the last rejection because of a wrong clock, within an hour, unless deliveries are
/// accepted again since.
fn recent_clock_problem(
    snapshot: &HealthSnapshot,
    accepted_ms: Option<i64>,
    now_ms: i64,
) -> Option<(i64, &'static str)> {
    // A clock that was corrected too far leaves rejections of both kinds, so the later one counts.
    [
        (
            SignatureError::Future,
            "from the future: this machine's clock is behind",
        ),
        (
            SignatureError::Stale,
            "too old: this machine's clock is ahead, or somebody replays them",
        ),
    ]
    .into_iter()
    .filter_map(|(reason, problem)| Some((rejected_today(snapshot, reason, now_ms)?, problem)))
    .max()
    .filter(|(at_ms, _)| {
        let is_over = accepted_ms.is_some_and(|accepted_ms| accepted_ms > at_ms + UNRELATED_MS);
        now_ms - at_ms < HOUR_MS && !is_over
    })
}

/// Checks which signing secrets are used. `secrets` are the configured secrets; `None` if unknown.
pub fn secrets(snapshot: &HealthSnapshot, secrets: Option<&[SecretName]>, now_ms: i64) -> Check {
    let Some(secrets) = secrets else {
        return used_labels(snapshot, now_ms);
    };
    let usage = SecretUsage {
        snapshot,
        secrets,
        now_ms,
    };
    let (old, current): (Vec<&SecretName>, Vec<&SecretName>) =
        secrets.iter().partition(|secret| is_old(&secret.label));
    let (still_used, retired): (Vec<&SecretName>, Vec<&SecretName>) = old
        .into_iter()
        .partition(|secret| usage.is_used_within(secret, ROLL_MS));
    let unused: Vec<&SecretName> = current
        .into_iter()
        .filter(|secret| {
            !usage.is_used_within(secret, SECRET_UNUSED_MS) && usage.is_another_used(secret)
        })
        .collect();

    if !still_used.is_empty() {
        let unused = if unused.is_empty() {
            String::new()
        } else {
            format!(" None is signed with {}.", usage.describe(&unused))
        };
        return warning(
            CheckId::Secrets,
            format!(
                "Old secrets still sign deliveries: {}.{unused}",
                usage.describe(&still_used)
            ),
            "Keep them until they no longer sign deliveries. If no delivery is signed with a new one, \
             compare it with the Dashboard before the old one expires there. If this lasts longer \
             than a day, an endpoint was not rolled: find it in Stripe's Dashboard.",
        );
    }
    let removable: Vec<&SecretName> = retired
        .into_iter()
        .filter(|secret| usage.is_another_used(secret) && usage.is_past_roll(secret))
        .chain(unused)
        .collect();
    if !removable.is_empty() {
        return warning(
            CheckId::Secrets,
            format!(
                "Configured, but no delivery is signed with them: {}.",
                usage.describe(&removable)
            ),
            "Remove the old ones from STRIPE_WEBHOOK_SECRET. If a new one was never used, compare \
             it with the Dashboard before the one in use expires.",
        );
    }
    let all: Vec<&SecretName> = secrets.iter().collect();
    ok(
        CheckId::Secrets,
        format!("Last used: {}.", usage.describe(&all)),
    )
}

/// Reports the labels that signed deliveries, if the configured secrets are unknown.
fn used_labels(snapshot: &HealthSnapshot, now_ms: i64) -> Check {
    let known: Vec<String> = snapshot
        .last_seen
        .iter()
        .filter_map(|(what, at_ms)| match what {
            LastSeen::SecretUsed(label) => Some(format!("`{label}` ({})", ago(at_ms, now_ms))),
            _ => None,
        })
        .collect();
    let finding = if known.is_empty() {
        "No secret was used yet.".to_owned()
    } else {
        format!("Last used: {}.", known.join(", "))
    };

    unknown(
        CheckId::Secrets,
        finding,
        "Set STRIPE_WEBHOOK_SECRET as for `serve`, to see which secrets are old or were never used.",
    )
}

/// The last uses of the configured secrets.
struct SecretUsage<'a> {
    snapshot: &'a HealthSnapshot,
    secrets: &'a [SecretName],
    now_ms: i64,
}

impl SecretUsage<'_> {
    fn is_used_within(&self, secret: &SecretName, within_ms: i64) -> bool {
        last_used(self.snapshot, secret).is_some_and(|at_ms| self.now_ms - at_ms < within_ms)
    }

    fn is_another_used(&self, secret: &SecretName) -> bool {
        self.secrets
            .iter()
            .any(|other| other != secret && self.is_used_within(other, SECRET_UNUSED_MS))
    }

    /// Returns whether the secret has had its label for longer than a roll lasts.
    fn is_past_roll(&self, secret: &SecretName) -> bool {
        configured_since(self.snapshot, secret)
            .is_none_or(|since_ms| self.now_ms - since_ms > ROLL_MS)
    }

    fn describe(&self, secrets: &[&SecretName]) -> String {
        let each: Vec<String> = secrets
            .iter()
            .map(|secret| {
                let used = last_used(self.snapshot, secret)
                    .map_or("never".to_owned(), |at_ms| ago(at_ms, self.now_ms));
                format!("`{}` ({used})", secret.label)
            })
            .collect();
        each.join(", ")
    }
}

/// Returns whether a label marks an old secret: `old`, `old-2025`, `previous`.
fn is_old(label: &str) -> bool {
    let rest = label
        .strip_prefix("old")
        .or_else(|| label.strip_prefix("previous"));
    rest.is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_alphabetic()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn label_marks_secret_as_old() {
        assert!(
            ["old", "old-2025", "old_1", "old2", "previous"]
                .iter()
                .all(|label| is_old(label))
        );

        assert!(
            [
                "live",
                "older",
                "oldenburg",
                "previously",
                "gold",
                "new-old"
            ]
            .iter()
            .all(|label| !is_old(label))
        );
    }
}
