//! How each thing is judged: plain functions of what was seen and of the time. `docs/operations.md` says the same rules.

use std::collections::BTreeSet;

use super::Check;
use super::words::{DAY_MS, HOUR_MS, MINUTE_MS, SECOND_MS, ago, bytes, count, duration, failing, ok, sentence, unknown, warning};
use crate::domain::silence::{self, Unusual};
use crate::domain::time::timestamp;
use crate::flows::signs::{DELIVERED, Pass, RECONCILING_FAILED, REFUSED, SECRET, Vitals};
use crate::store::{COUNTED, Space, StoreError};
use crate::stripe_api::StripeApiError;

/// While the room that is left is more than this, no share of a disk is too little.
const ROOMY: u64 = 10 << 30;
/// SQLite's log is some megabytes long.
const LONG_LOG: u64 = 1 << 30;
/// How far clocks may be apart: deliveries are refused at 300 s.
const CLOCKS_DIFFER_MS: i64 = 10 * SECOND_MS;
const CLOCKS_FAIL_MS: i64 = 60 * SECOND_MS;
/// How long nothing may be accepted beside what is refused.
const NOTHING_ACCEPTED_MS: i64 = 10 * MINUTE_MS;
/// How long Stripe signs with the old secret, too, when one is rolled; and some time to notice.
const ROLLED_MS: i64 = 25 * HOUR_MS;
const SECRET_UNUSED_MS: i64 = 30 * DAY_MS;
/// How long a webhook may take longer than Stripe's list.
const ON_ITS_WAY_MS: i64 = 10 * MINUTE_MS;
/// An invoice is stored soon after it was made at Stripe.
const WAITS_MS: i64 = HOUR_MS;
/// What waits to be asked at Stripe: one pass asks for more.
const BACKLOG: i64 = 5_000;
/// `serve` makes a pass every five minutes.
const OVERDUE_MS: i64 = 15 * MINUTE_MS;

pub fn database_away(error: &StoreError) -> Check {
    let cure = match error {
        StoreError::Refused(_) => {
            "Use a version of this program that is as new as the database, and a URL that names it (DATABASE_URL)."
        }
        StoreError::Unavailable(reason) if reason.contains("migrat") => {
            "Run `stripe-reconciler migrate`; `serve` does it when it starts."
        }
        StoreError::Away(reason) if reason.starts_with("there is no file") => {
            "Put DATABASE_URL right; or, for a new one, start `serve`, which makes it."
        }
        _ => {
            "Start it, or put DATABASE_URL right. Meanwhile deliveries are answered 503 and nothing is lost: Stripe delivers them \
             again for three days."
        }
    };
    failing("database", sentence(&error.to_string()), cure)
}

/// `refused`: why it takes nothing.
pub fn database(vitals: &Vitals, refused: Option<&StoreError>) -> Check {
    let size = bytes(vitals.space.database + vitals.space.log.unwrap_or_default());
    match refused {
        Some(error) => failing(
            "database",
            format!("It can be read, but takes nothing: {error}."),
            "Is its disk full, is it read-only or a standby, does another process hold it locked? Meanwhile deliveries are answered 503, \
             and Stripe repeats them for three days.",
        ),
        None => ok("database", format!("Reached, and migrated. It takes {size}.")),
    }
}

pub fn disk(space: &Space) -> Check {
    let Some(disk) = space.disk else {
        return unknown(
            "disk",
            "The database server's disk cannot be seen from here.".to_owned(),
            "Watch it where the server runs.",
        );
    };
    let share = disk.free as f64 / disk.size.max(1) as f64;
    let left = format!("{} of {} are free ({:.0} %)", bytes(disk.free), bytes(disk.size), share * 100.0);
    let cure = "Make room: enlarge the disk, or forget old payloads (`events prune --older-than 90d`), which keeps the file from \
                growing. When it is full, deliveries are answered 503, and Stripe repeats them for three days.";
    match share {
        share if share < 0.03 && disk.free < ROOMY => failing("disk", format!("It is nearly full: {left}."), cure),
        share if share < 0.1 && disk.free < ROOMY => warning("disk", format!("It fills up: {left}."), cure),
        _ if space.log.is_some_and(|log| log > LONG_LOG) => warning(
            "disk",
            format!("SQLite's log has grown to {}: something reads an old state of it.", bytes(space.log.unwrap_or_default())),
            "Look for a process that holds the database open, such as a backup that hangs (`fuser` names it), and end it.",
        ),
        _ => ok("disk", format!("{left}.")),
    }
}

pub fn clock(database_ahead_ms: Option<i64>, stripe_ahead_ms: Option<i64>) -> Check {
    let compared = [("Stripe's", stripe_ahead_ms), ("the database's", database_ahead_ms)];
    let known = || compared.iter().filter_map(|(whose, ahead_ms)| ahead_ms.map(|ahead_ms| (whose, ahead_ms)));
    let Some((whose, ahead_ms)) = known().max_by_key(|(_, ahead_ms)| ahead_ms.abs()) else {
        let cure = "Run `doctor` with STRIPE_API_KEY: Stripe's answers say what time it is.";
        return unknown("clock", "There is nothing to compare it with.".to_owned(), cure);
    };
    let (off, side) = (duration(ahead_ms.abs()), if ahead_ms > 0 { "behind" } else { "ahead of" });
    let found = format!("This machine's clock is {off} {side} {whose}.");
    let cure = "Set the clock, and let NTP keep it (`timedatectl`, `chronyc tracking`). Deliveries are refused when it is 5 minutes off.";
    match ahead_ms.abs() {
        CLOCKS_FAIL_MS.. => failing("clock", found, cure),
        CLOCKS_DIFFER_MS.. => warning("clock", found, cure),
        _ => {
            let whose: Vec<&str> = known().map(|(whose, _)| *whose).collect();
            ok("clock", format!("It agrees with {}.", whose.join(" and ")))
        }
    }
}

pub fn deliveries(vitals: &Vitals, hours: &BTreeSet<i64>, now_ms: i64) -> Check {
    let Some(last_ms) = vitals.moment(DELIVERED, "") else {
        let cure = "Point a webhook endpoint in Stripe's Dashboard at /webhooks/stripe of this service.";
        return unknown("deliveries", "No webhook has come yet.".to_owned(), cure);
    };
    let since = format!("The last webhook came {}", ago(last_ms, now_ms));
    // A webhook had the time to come, too.
    let is_since = |pass: &&Pass| pass.started_ms > last_ms && pass.started_ms < now_ms - ON_ITS_WAY_MS;
    let missed: i64 = vitals.passes.iter().filter(is_since).map(|pass| pass.count("apiOnlyEvents")).sum();
    let cure = "Look at the endpoint's deliveries in Stripe's Dashboard (Developers, Webhooks): is it enabled, is its URL right, what is \
                answered? Then at what stands in front of this service: DNS, certificate, proxy, firewall. Stripe repeats for three \
                days; what is older, `reconcile` finds.";
    if missed > 0 && now_ms - last_ms > HOUR_MS {
        return failing("deliveries", format!("{since}, and Stripe made {} since.", count(missed, "event")), cure);
    }
    match silence::judge(hours, last_ms, now_ms) {
        Some(Unusual::Missed(hours)) => warning(
            "deliveries",
            format!("{since}: {} went by that had webhooks in each of the last three weeks.", count(hours, "hour")),
            cure,
        ),
        Some(Unusual::Longest(hours)) => {
            warning("deliveries", format!("{since}: the longest silence before was {}.", count(hours, "hour")), cure)
        }
        None => ok("deliveries", format!("{since}.")),
    }
}

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
    for (reason, found) in [
        ("future", "from the future: this machine's clock is behind"),
        ("stale", "too old: this machine's clock is ahead, or somebody repeats them"),
    ] {
        if let Some(at_ms) = recently(reason).filter(|at_ms| now_ms - at_ms < HOUR_MS) {
            let found = format!("Authentic deliveries are refused as {found}. The last came {}; {accepted}.", ago(at_ms, now_ms));
            let cure = "Set the clock, and let NTP keep it (`timedatectl`, `chronyc tracking`).";
            return if alone(at_ms) { failing("signatures", found, cure) } else { warning("signatures", found, cure) };
        }
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

/// `is_read`: the log was read to its end.
pub fn unmatched(vitals: &Vitals, is_read: bool, now_ms: i64) -> Check {
    let Some(oldest_ms) = vitals.oldest_without_invoice_ms else {
        if !is_read {
            let until = vitals.read_until_ms.map_or("not at all".to_owned(), |ms| format!("up to {}", timestamp(ms)));
            let cure = "Ask again: every time, and by a running `serve`, it is read on.";
            return unknown("unmatched", format!("None that is known; but the log is read {until} yet."), cure);
        }
        return ok("unmatched", "Every event of the last 30 days found its invoice.".to_owned());
    };
    let (events, invoices) = (vitals.events_without_invoice, vitals.awaited_invoices);
    let at_least = if invoices >= COUNTED as usize { "at least " } else { "" };
    let found = format!(
        "{at_least}{} about {} that nobody stored; the first came {}.",
        count(events, "event"),
        count(invoices as i64, "invoice"),
        ago(oldest_ms, now_ms)
    );
    if now_ms - oldest_ms < WAITS_MS {
        return ok("unmatched", sentence(&found));
    }
    warning(
        "unmatched",
        sentence(&found),
        "Store these invoices (`invoices import`, or PUT): what is known shows at once. `reconcile --list` and its report name them under \
         `unknownHere`. Where the Stripe account has invoices that are none of yours, this stays so, and does no harm.",
    )
}

pub fn unreadable(vitals: &Vitals) -> Check {
    let Some(since_ms) = vitals.unreadable.since_ms else { return ok("unreadable", "Every event could be read.".to_owned()) };
    warning(
        "unreadable",
        format!("{} could not be read, the first of {}.", count(vitals.unreadable.count, "event"), timestamp(since_ms)),
        "List them with `events list --outcome unreadable`. Their bytes are kept: install a version that can read them, and run `rebuild`.",
    )
}

/// `asked`: what Stripe says now; else, what the last pass found.
pub fn endpoint(asked: Option<&Result<Vec<String>, StripeApiError>>, passes: &[Pass], now_ms: i64) -> Check {
    const CURE: &str = "In Stripe's Dashboard: Developers, Webhooks. What was missed meanwhile, `reconcile` finds.";
    let remarks = match asked {
        Some(Ok(remarks)) => remarks.clone(),
        Some(Err(error @ StripeApiError::Unauthorized(_))) => {
            let cure = "Make a restricted key in Stripe's Dashboard (Developers, API keys) and set STRIPE_API_KEY.";
            return failing("endpoint", sentence(&error.to_string()), cure);
        }
        Some(Err(error)) => {
            return warning(
                "endpoint",
                sentence(&error.to_string()),
                "Look at status.stripe.com, and whether this machine may connect to it.",
            );
        }
        None => {
            let Some(pass) = passes.first() else {
                return unknown("endpoint", "It was not looked at.".to_owned(), "Run `doctor` with STRIPE_API_KEY.");
            };
            let remarks = pass.endpoint_remarks();
            if remarks.is_empty() {
                return ok("endpoint", format!("It was enabled and sent all event types {}.", ago(pass.ended_ms, now_ms)));
            }
            remarks
        }
    };
    match remarks.is_empty() {
        true => ok("endpoint", "It is enabled and sends all event types that are read.".to_owned()),
        false => failing("endpoint", remarks.join(" "), CURE),
    }
}

/// `is_on`: here, there is a key for it.
pub fn reconciliation(vitals: &Vitals, is_on: bool, now_ms: i64) -> Check {
    let failed_ms = vitals.moment(RECONCILING_FAILED, "");
    let last = vitals.passes.first();
    let cure = "The log of `serve` says why; `reconcile` makes a pass at once, and says it too.";
    match (last, failed_ms) {
        (None, None) if is_on => warning(
            "reconciliation",
            "No pass was made yet.".to_owned(),
            "Start `serve` with STRIPE_API_KEY, or run `reconcile`.",
        ),
        (None, None) => unknown(
            "reconciliation",
            "It is off: what no webhook tells is not found.".to_owned(),
            "Set STRIPE_API_KEY for `serve`, or run `reconcile` from time to time.",
        ),
        (last, Some(failed_ms)) if last.is_none_or(|pass| pass.ended_ms < failed_ms) => {
            let succeeded = last.map_or("none succeeded yet".to_owned(), |pass| {
                format!("the last that succeeded ended {}", ago(pass.ended_ms, now_ms))
            });
            failing("reconciliation", format!("The last pass failed, {}; {succeeded}.", ago(failed_ms, now_ms)), cure)
        }
        (Some(pass), _) => {
            let ended = format!("The last pass ended {}", ago(pass.ended_ms, now_ms));
            let waiting = vitals.backlog.objects + vitals.backlog.links + vitals.backlog.checks;
            match () {
                () if now_ms - pass.ended_ms > overdue_after_ms(&vitals.passes) => warning(
                    "reconciliation",
                    format!("{ended}: the next is overdue."),
                    "Start `serve` with STRIPE_API_KEY, or run `reconcile`.",
                ),
                () if waiting >= BACKLOG => warning(
                    "reconciliation",
                    format!("{ended}, but {waiting} things wait to be asked at Stripe."),
                    "Give it time. Where it does not get less, let it make more calls (STRIPE_API_RATE), as far as Stripe allows.",
                ),
                () => ok("reconciliation", format!("{ended}.")),
            }
        }
        (None, Some(_)) => unreachable!("one that failed is later than none"),
    }
}

/// Three times as long as was usual between two passes: they may be made by `serve`, or by cron once a day.
fn overdue_after_ms(passes: &[Pass]) -> i64 {
    let mut between: Vec<i64> = passes.windows(2).map(|pair| pair[0].started_ms - pair[1].started_ms).collect();
    between.sort_unstable();
    between.get(between.len() / 2).map_or(OVERDUE_MS, |usual| (3 * usual).max(OVERDUE_MS))
}

pub fn drift(vitals: &Vitals) -> Check {
    const CURE: &str = "Run `reconcile`: it names each, with both values. Find out which side is wrong; correct the stored invoice (PUT it again), \
                        or credit, void or replace it at Stripe.";
    let unknown_at_stripe = vitals.passes.first().map_or(0, |pass| pass.count("unknownAtStripe"));
    let found: Vec<String> = [
        vitals.differing.since_ms.map(|since_ms| {
            format!(
                "Not as Stripe has it: {}, the first since {}.",
                count(vitals.differing.count, "invoice"),
                timestamp(since_ms)
            )
        }),
        (unknown_at_stripe > 0)
            .then(|| format!("Not known to Stripe: {} of the last pass.", count(unknown_at_stripe, "invoice"))),
    ]
    .into_iter()
    .flatten()
    .collect();
    match vitals.passes.first() {
        _ if !found.is_empty() => warning("drift", found.join(" "), CURE),
        Some(_) => ok("drift", "No invoice is known to differ from Stripe's.".to_owned()),
        None => unknown("drift", "Nothing was compared with Stripe yet.".to_owned(), "Run `reconcile`."),
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;
    use crate::store::Disk;

    #[test]
    fn a_disk_is_full_by_its_share_unless_much_room_is_left() {
        let judged = |free: u64, size: u64| disk(&Space { disk: Some(Disk { free, size }), ..Space::default() }).state;
        assert_eq!(judged(50 << 30, 100 << 30), State::Ok);
        assert_eq!(judged(9 << 30, 100 << 30), State::Warning);
        assert_eq!(judged(20 << 30, 1000 << 30), State::Ok, "two in a hundred, and much room");
        assert_eq!(judged(1 << 20, 3 << 30), State::Failing);
        assert_eq!(judged(0, 0), State::Failing);
        let long = Space { log: Some(2 << 30), disk: Some(Disk { free: 50 << 30, size: 100 << 30 }), ..Space::default() };
        assert_eq!(disk(&long).state, State::Warning);
    }

    #[test]
    fn a_secret_is_old_by_its_label() {
        assert!(["old", "old-2025", "old_1", "old2", "previous"].iter().all(|label| is_old(label)));
        assert!(["live", "older", "oldenburg", "previously", "gold", "new-old"].iter().all(|label| !is_old(label)));
    }

    #[test]
    fn a_pass_is_overdue_by_how_often_there_was_one() {
        let at = |minutes: &[i64]| -> Vec<Pass> {
            let pass = |m: &i64| Pass { started_ms: m * MINUTE_MS, ended_ms: m * MINUTE_MS, report: Default::default() };
            minutes.iter().map(pass).collect()
        };
        assert_eq!(overdue_after_ms(&at(&[])), 15 * MINUTE_MS);
        assert_eq!(overdue_after_ms(&at(&[100, 95, 90, 85])), 15 * MINUTE_MS);
        assert_eq!(overdue_after_ms(&at(&[4320, 2880, 1440])), 3 * DAY_MS);
        assert_eq!(overdue_after_ms(&at(&[2000, 1995, 1990, 10])), 15 * MINUTE_MS, "one pause does not count");
    }
}
