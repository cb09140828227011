//! How signatures and signing secrets are judged: is what Stripe sends believed, and which secret can go?

use super::Check;
use super::format::{DAY_MS, HOUR_MS, MINUTE_MS, ago, failing, ok, unknown, warning};
use crate::domain::stripe::signing_secrets::SecretName;
use crate::monitoring::monitor::{DELIVERED, HealthSnapshot, REFUSED, SECRET};
use crate::monitoring::signing_secrets::{configured_since, last_used};

/// How long nothing may be accepted beside what is refused; and how long others are accepted after it until it is over.
const NOTHING_ACCEPTED_MS: i64 = 10 * MINUTE_MS;
/// How long Stripe signs with the old secret, too, when one is rolled; and some time to notice.
const ROLLED_MS: i64 = 25 * HOUR_MS;
const SECRET_UNUSED_MS: i64 = 30 * DAY_MS;

pub fn signatures(snapshot: &HealthSnapshot, now_ms: i64) -> Check {
    let recently = |reason: &str| {
        snapshot
            .moment(REFUSED, reason)
            .filter(|at_ms| now_ms - at_ms < DAY_MS)
    };
    let accepted_ms = snapshot.moment(DELIVERED, "");
    let accepted = accepted_ms.map_or("none was ever accepted".to_owned(), |ms| {
        format!("the last that was accepted came {}", ago(ms, now_ms))
    });
    let alone = |at_ms: i64| {
        accepted_ms.is_none_or(|accepted_ms| accepted_ms < at_ms - NOTHING_ACCEPTED_MS)
    };
    if let Some(at_ms) = recently("mismatch").filter(|at_ms| alone(*at_ms)) {
        return failing(
            "signatures",
            format!(
                "Deliveries are refused because no configured secret signs them, the last {}; {accepted}.",
                ago(at_ms, now_ms)
            ),
            "Compare STRIPE_WEBHOOK_SECRET with the endpoint's signing secret in Stripe's Dashboard: was it rolled? Configure old and \
             new together (`live=whsec_...,old=whsec_...`) and restart. Test mode, live mode and Connect each have their own.",
        );
    }
    let off = [
        ("future", "from the future: this machine's clock is behind"),
        (
            "stale",
            "too old: this machine's clock is ahead, or somebody repeats them",
        ),
    ];
    // A clock that was set wrong the other way leaves word of both.
    let last_off = off
        .iter()
        .filter_map(|(reason, found)| recently(reason).map(|at_ms| (at_ms, found)))
        .max();
    let is_over = |at_ms: i64| {
        accepted_ms.is_some_and(|accepted_ms| accepted_ms > at_ms + NOTHING_ACCEPTED_MS)
    };
    if let Some((at_ms, found)) =
        last_off.filter(|(at_ms, _)| now_ms - at_ms < HOUR_MS && !is_over(*at_ms))
    {
        let found = format!(
            "Authentic deliveries are refused as {found}. The last came {}; {accepted}.",
            ago(at_ms, now_ms)
        );
        let remedy = "Set the clock, and let NTP keep it (`timedatectl`, `chronyc tracking`).";
        return if alone(at_ms) {
            failing("signatures", found, remedy)
        } else {
            warning("signatures", found, remedy)
        };
    }
    ok(
        "signatures",
        match recently("mismatch") {
            Some(at_ms) => format!(
                "Stripe's are accepted. Somebody else's were refused, the last {}.",
                ago(at_ms, now_ms)
            ),
            None => "No delivery was refused for its signature today.".to_owned(),
        },
    )
}

pub fn secrets(snapshot: &HealthSnapshot, secrets: Option<&[SecretName]>, now_ms: i64) -> Check {
    let when =
        |used_ms: Option<i64>| used_ms.map_or("never".to_owned(), |at_ms| ago(at_ms, now_ms));
    let Some(secrets) = secrets else {
        let labels = snapshot
            .moments
            .keys()
            .filter_map(|name| name.strip_prefix(SECRET));
        let known: Vec<String> = labels
            .map(|label| format!("`{label}` ({})", when(snapshot.moment(SECRET, label))))
            .collect();
        let found = if known.is_empty() {
            "None was used yet.".to_owned()
        } else {
            format!("Last used: {}.", known.join(", "))
        };
        return unknown(
            "secrets",
            found,
            "Give STRIPE_WEBHOOK_SECRET as `serve` has it: which are old or never used is known then.",
        );
    };
    let told = |secrets: &[&SecretName]| {
        let each: Vec<String> = secrets
            .iter()
            .map(|secret| format!("`{}` ({})", secret.label, when(last_used(snapshot, secret))))
            .collect();
        each.join(", ")
    };
    let is_used = |secret: &SecretName, within_ms: i64| {
        last_used(snapshot, secret).is_some_and(|at_ms| now_ms - at_ms < within_ms)
    };
    let others_are_used = |secret: &SecretName| {
        secrets
            .iter()
            .any(|other| other != secret && is_used(other, SECRET_UNUSED_MS))
    };
    let is_settled = |secret: &SecretName| {
        configured_since(snapshot, secret).is_none_or(|since_ms| now_ms - since_ms > ROLLED_MS)
    };
    let (old, current): (Vec<&SecretName>, Vec<&SecretName>) =
        secrets.iter().partition(|secret| is_old(&secret.label));
    let (still, done): (Vec<&SecretName>, Vec<&SecretName>) = old
        .into_iter()
        .partition(|secret| is_used(secret, ROLLED_MS));
    let mut unused: Vec<&SecretName> = current
        .into_iter()
        .filter(|secret| !is_used(secret, SECRET_UNUSED_MS) && others_are_used(secret))
        .collect();
    if !still.is_empty() {
        let none_by = if unused.is_empty() {
            String::new()
        } else {
            format!(" None is signed with {}.", told(&unused))
        };
        return warning(
            "secrets",
            format!(
                "Old secrets still sign deliveries: {}.{none_by}",
                told(&still)
            ),
            "Keep them until they do no more. A new one that signs nothing: compare it with the Dashboard, before the old one runs out \
             there. If this lasts longer than a day, an endpoint was not rolled: find it in Stripe's Dashboard.",
        );
    }
    unused.splice(
        0..0,
        done.into_iter()
            .filter(|secret| others_are_used(secret) && is_settled(secret)),
    );
    if !unused.is_empty() {
        return warning(
            "secrets",
            format!(
                "Configured, but no delivery is signed with them: {}.",
                told(&unused)
            ),
            "Remove the old ones from STRIPE_WEBHOOK_SECRET. A new one that was never used: compare it with the Dashboard, before the one \
             in use runs out.",
        );
    }
    ok(
        "secrets",
        format!("Last used: {}.", told(&secrets.iter().collect::<Vec<_>>())),
    )
}

/// By its label: `old`, `old-2025`, `previous`.
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
    fn a_secret_is_old_by_its_label() {
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
