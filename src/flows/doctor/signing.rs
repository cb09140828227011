//! How signatures and signing secrets are judged: is what Stripe sends believed, and which secret can go?

use super::Check;
use super::words::{DAY_MS, HOUR_MS, MINUTE_MS, ago, failing, ok, unknown, warning};
use crate::flows::signs::{DELIVERED, REFUSED, SECRET, Vitals};

/// How long nothing may be accepted beside what is refused.
const NOTHING_ACCEPTED_MS: i64 = 10 * MINUTE_MS;
/// How long Stripe signs with the old secret, too, when one is rolled; and some time to notice.
const ROLLED_MS: i64 = 25 * HOUR_MS;
const SECRET_UNUSED_MS: i64 = 30 * DAY_MS;

pub fn signatures(vitals: &Vitals, now_ms: i64) -> Check {
    let recently = |reason: &str| vitals.moment(REFUSED, reason).filter(|at_ms| now_ms - at_ms < DAY_MS);
    let accepted_ms = vitals.moment(DELIVERED, "");
    let accepted = accepted_ms
        .map_or("none was ever accepted".to_owned(), |ms| format!("the last that was accepted came {}", ago(ms, now_ms)));
    let alone = |at_ms: i64| accepted_ms.is_none_or(|accepted_ms| accepted_ms < at_ms - NOTHING_ACCEPTED_MS);
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
        ("stale", "too old: this machine's clock is ahead, or somebody repeats them"),
    ];
    // A clock that was set wrong the other way leaves word of both.
    let last_off = off.iter().filter_map(|(reason, found)| recently(reason).map(|at_ms| (at_ms, found))).max();
    if let Some((at_ms, found)) = last_off.filter(|(at_ms, _)| now_ms - at_ms < HOUR_MS) {
        let found = format!("Authentic deliveries are refused as {found}. The last came {}; {accepted}.", ago(at_ms, now_ms));
        let cure = "Set the clock, and let NTP keep it (`timedatectl`, `chronyc tracking`).";
        return if alone(at_ms) { failing("signatures", found, cure) } else { warning("signatures", found, cure) };
    }
    ok(
        "signatures",
        match recently("mismatch") {
            Some(at_ms) => format!("Stripe's are accepted. Somebody else's were refused, the last {}.", ago(at_ms, now_ms)),
            None => "No delivery was refused for its signature today.".to_owned(),
        },
    )
}

pub fn secrets(vitals: &Vitals, labels: Option<&[String]>, now_ms: i64) -> Check {
    let used = |label: &str| vitals.moment(SECRET, label);
    let told = |label: &str| format!("`{label}` ({})", used(label).map_or("never".to_owned(), |at_ms| ago(at_ms, now_ms)));
    let Some(labels) = labels else {
        let known: Vec<String> = vitals.moments.keys().filter_map(|name| name.strip_prefix(SECRET)).map(told).collect();
        let found = if known.is_empty() { "None was used yet.".to_owned() } else { format!("Last used: {}.", known.join(", ")) };
        return unknown(
            "secrets",
            found,
            "Give STRIPE_WEBHOOK_SECRET as `serve` has it: which are old or never used is known then.",
        );
    };
    let (old, current): (Vec<&String>, Vec<&String>) = labels.iter().partition(|label| is_old(label));
    let is_used = |label: &str, within_ms: i64| used(label).is_some_and(|at_ms| now_ms - at_ms < within_ms);
    let others_are_used = |label: &str| labels.iter().any(|other| other != label && is_used(other, SECRET_UNUSED_MS));
    let still: Vec<String> = old.iter().filter(|label| is_used(label, ROLLED_MS)).map(|label| told(label)).collect();
    if !still.is_empty() {
        return warning(
            "secrets",
            format!("Old secrets still sign deliveries: {}.", still.join(", ")),
            "Keep them until they do no more. If that lasts longer than a day, an endpoint was not rolled: find it in Stripe's Dashboard.",
        );
    }
    let never = current.into_iter().filter(|label| !is_used(label, SECRET_UNUSED_MS) && others_are_used(label));
    let unused: Vec<String> =
        old.into_iter().filter(|label| others_are_used(label)).chain(never).map(|label| told(label)).collect();
    if !unused.is_empty() {
        return warning(
            "secrets",
            format!("Configured, but no delivery is signed with them: {}.", unused.join(", ")),
            "Remove the old ones from STRIPE_WEBHOOK_SECRET. A new one that was never used: compare it with the Dashboard, before the one \
             in use runs out.",
        );
    }
    ok("secrets", format!("Last used: {}.", labels.iter().map(|label| told(label)).collect::<Vec<_>>().join(", ")))
}

/// By its label: `old`, `old-2025`, `previous`.
fn is_old(label: &str) -> bool {
    let rest = label.strip_prefix("old").or_else(|| label.strip_prefix("previous"));
    rest.is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_alphabetic()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_old_by_its_label() {
        assert!(["old", "old-2025", "old_1", "old2", "previous"].iter().all(|label| is_old(label)));
        assert!(["live", "older", "oldenburg", "previously", "gold", "new-old"].iter().all(|label| !is_old(label)));
    }
}
