//! How each thing is judged: plain functions of what was seen and of the time. `docs/operations.md` says the same rules. The
//! database is judged in `database`, signatures and secrets in `signing`.

use std::collections::BTreeSet;

use super::Check;
use super::format::{
    HOUR_MS, MINUTE_MS, SECOND_MS, ago, count, duration, failing, ok, sentence, unknown, warning,
};
use crate::domain::time::timestamp;
use crate::monitoring::delivery_gap::{self, Unusual};
use crate::monitoring::monitor::{
    DELIVERED, FailedRun, HealthSnapshot, RECONCILING_FAILED, RECONCILING_FAILED_BY, REFUSED,
};
use crate::reconcile::NOT_LOOKED_AT;
use crate::store::COUNTED;
use crate::stripe_api::StripeApiError;

/// How far clocks may be apart: deliveries are refused at 300 s.
const CLOCKS_DIFFER_MS: i64 = 10 * SECOND_MS;
const CLOCKS_FAIL_MS: i64 = 60 * SECOND_MS;
/// Why authentic deliveries are answered 503; and how long that is news, where none was accepted since.
const NOT_TAKEN: [&str; 3] = ["unavailable", "queue_full", "timed_out"];
const NOT_TAKEN_MS: i64 = 10 * MINUTE_MS;
/// How much later than it happened a refusal may be noted.
const NOTED_MS: i64 = 15 * SECOND_MS;
const NOTED_TWICE_MS: i64 = 2 * NOTED_MS;
/// An invoice is stored soon after it was made at Stripe.
const WAITS_MS: i64 = HOUR_MS;
/// What waits to be asked at Stripe: one pass asks for more.
const BACKLOG: i64 = 5_000;
/// `serve` makes a pass every five minutes.
const OVERDUE_MS: i64 = 15 * MINUTE_MS;

pub fn clock(database_ahead_ms: Option<i64>, stripe_ahead_ms: Option<i64>) -> Check {
    let compared = [
        ("Stripe's", stripe_ahead_ms),
        ("the database's", database_ahead_ms),
    ];
    let known = || {
        compared
            .iter()
            .filter_map(|(whose, ahead_ms)| ahead_ms.map(|ahead_ms| (whose, ahead_ms)))
    };
    let Some((whose, ahead_ms)) = known().max_by_key(|(_, ahead_ms)| ahead_ms.abs()) else {
        let remedy = "Run `doctor` with STRIPE_API_KEY: Stripe's answers say what time it is.";
        return unknown(
            "clock",
            "There is nothing to compare it with.".to_owned(),
            remedy,
        );
    };
    let (off, side) = (
        duration(ahead_ms.abs()),
        if ahead_ms > 0 { "behind" } else { "ahead of" },
    );
    let found = format!("This machine's clock is {off} {side} {whose}.");
    let remedy = "Set the clock, and let NTP keep it (`timedatectl`, `chronyc tracking`). Deliveries are refused when it is 5 minutes off.";
    match ahead_ms.abs() {
        CLOCKS_FAIL_MS.. => failing("clock", found, remedy),
        CLOCKS_DIFFER_MS.. => warning("clock", found, remedy),
        _ => {
            let whose: Vec<&str> = known().map(|(whose, _)| *whose).collect();
            ok("clock", format!("It agrees with {}.", whose.join(" and ")))
        }
    }
}

/// `missed_ms`: when Stripe made the first event since that no webhook brought.
pub fn deliveries(
    snapshot: &HealthSnapshot,
    hours: &BTreeSet<i64>,
    missed_ms: Option<i64>,
    now_ms: i64,
) -> Check {
    let last_ms = snapshot.moment(DELIVERED, "");
    if let Some(check) = not_taken(snapshot, last_ms, now_ms) {
        return check;
    }
    let Some(last_ms) = last_ms else {
        let remedy =
            "Point a webhook endpoint in Stripe's Dashboard at /webhooks/stripe of this service.";
        return unknown("deliveries", "No webhook has come yet.".to_owned(), remedy);
    };
    let since = format!("The last webhook came {}", ago(last_ms, now_ms));
    let remedy = "Look at the endpoint's deliveries in Stripe's Dashboard (Developers, Webhooks): is it enabled, is its URL right, what is \
                answered? Then at what stands in front of this service: DNS, certificate, proxy, firewall. Stripe repeats for three \
                days; what is older, `reconcile` finds.";
    if let Some(missed_ms) = missed_ms {
        let found = format!(
            "{since}, and Stripe made events since, the first {}.",
            ago(missed_ms, now_ms)
        );
        return failing("deliveries", found, remedy);
    }
    match delivery_gap::judge(hours, last_ms, now_ms) {
        Some(Unusual::Missed(hours)) => warning(
            "deliveries",
            format!(
                "{since}: {} went by that had webhooks in each of the last three weeks.",
                count(hours, "hour")
            ),
            remedy,
        ),
        Some(Unusual::Longest(hours)) => warning(
            "deliveries",
            format!(
                "{since}: the longest silence before was {}.",
                count(hours, "hour")
            ),
            remedy,
        ),
        None => ok("deliveries", format!("{since}.")),
    }
}

/// Deliveries are answered 503.
fn not_taken(snapshot: &HealthSnapshot, last_ms: Option<i64>, now_ms: i64) -> Option<Check> {
    let at_ms = NOT_TAKEN
        .iter()
        .filter_map(|reason| snapshot.moment(REFUSED, reason))
        .max()?;
    let remedy = "The log of `serve` says why (`request failed`): a full disk or a lock of the database, or more than it can commit. \
                Nothing is lost: Stripe delivers them again for three days.";
    let accepted = last_ms.map_or("none was accepted yet".to_owned(), |last_ms| {
        format!("the last that was accepted came {}", ago(last_ms, now_ms))
    });
    let found = format!(
        "are answered 503, the last {}; {accepted}.",
        ago(at_ms, now_ms)
    );
    match now_ms - at_ms {
        ..NOT_TAKEN_MS if last_ms.is_none_or(|last_ms| last_ms < at_ms - NOTED_MS) => {
            Some(failing("deliveries", format!("Deliveries {found}"), remedy))
        }
        // What is known already needs no room: it is accepted all the time.
        ..NOTED_TWICE_MS => Some(warning(
            "deliveries",
            format!("Some deliveries {found}"),
            remedy,
        )),
        _ => None,
    }
}

/// `is_read`: the log was read to its end.
pub fn unmatched(snapshot: &HealthSnapshot, is_read: bool, now_ms: i64) -> Check {
    let Some(oldest_ms) = snapshot.oldest_without_invoice_ms else {
        if !is_read {
            let until = snapshot
                .read_until_ms
                .map_or("not at all".to_owned(), |ms| {
                    format!("up to {}", timestamp(ms))
                });
            let remedy = "Ask again: every time, and by a running `serve`, it is read on.";
            return unknown(
                "unmatched",
                format!("None that is known; but the log is read {until} yet."),
                remedy,
            );
        }
        return ok(
            "unmatched",
            "Every event of the last 30 days found its invoice.".to_owned(),
        );
    };
    let (events, invoices) = (snapshot.events_without_invoice, snapshot.awaited_invoices);
    let at_least = if invoices >= COUNTED as usize {
        "at least "
    } else {
        ""
    };
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

pub fn unreadable(snapshot: &HealthSnapshot) -> Check {
    let Some(since_ms) = snapshot.unreadable.since_ms else {
        return ok(
            "unreadable",
            "Every event of the last 30 days could be read.".to_owned(),
        );
    };
    warning(
        "unreadable",
        format!(
            "{} could not be read, the first of {}.",
            count(snapshot.unreadable.count, "event"),
            timestamp(since_ms)
        ),
        "`events list --outcome unreadable` says why, and `events show` with the id that it prints shows the bytes: they are kept. Install a \
         version that can read them, and run `rebuild`. What no version will ever read is no longer said 30 days after it came.",
    )
}

/// `asked`: what Stripe says now; else, what the last pass found.
pub fn endpoint(
    asked: Option<&Result<Vec<String>, StripeApiError>>,
    passes: &[FailedRun],
    now_ms: i64,
) -> Check {
    const CURE: &str = "In Stripe's Dashboard: Developers, Webhooks. What was missed meanwhile, `reconcile` finds.";
    const RIGHTS: &str = "In Stripe's Dashboard: Developers, API keys. Nothing has to be restarted where the key stays the same.";
    let remarks = match asked {
        Some(Ok(remarks)) => remarks.clone(),
        Some(Err(error @ StripeApiError::Unauthorized(_))) => {
            return failing("endpoint", sentence(&error.to_string()), NEW_KEY);
        }
        Some(Err(error @ StripeApiError::Busy(_))) => {
            return warning("endpoint", sentence(&error.to_string()), ASK_LESS);
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
                return unknown(
                    "endpoint",
                    "It was not looked at.".to_owned(),
                    "Run `doctor` with STRIPE_API_KEY.",
                );
            };
            let mut remarks = pass.endpoint_remarks();
            if remarks.is_empty() {
                return ok(
                    "endpoint",
                    format!(
                        "It was enabled and sent all event types {}.",
                        ago(pass.ended_ms, now_ms)
                    ),
                );
            }
            // Whether it is cured is seen by the next.
            remarks.push(format!(
                "The last pass saw that, {}.",
                ago(pass.ended_ms, now_ms)
            ));
            remarks
        }
    };
    let remedy = if remarks.iter().any(|remark| remark.contains(NOT_LOOKED_AT)) {
        RIGHTS
    } else {
        CURE
    };
    match remarks.is_empty() {
        true => ok(
            "endpoint",
            "It is enabled and sends all event types that are read.".to_owned(),
        ),
        false => failing("endpoint", remarks.join(" "), remedy),
    }
}

const NEW_KEY: &str = "Make a restricted key in Stripe's Dashboard (Developers, API keys; the README says what it must read), set STRIPE_API_KEY, and \
                       restart `serve`.";
const ASK_LESS: &str = "Other programs use up the calls that Stripe allows the account: let them ask less, or lower STRIPE_API_RATE.";
/// Why a pass failed (by [`ReconcileError::cause`](crate::reconcile::ReconcileError)), and what to do.
const WHY_FAILED: [(&str, &str, &str); 5] = [
    ("key", ": Stripe does not accept STRIPE_API_KEY", NEW_KEY),
    (
        "refused",
        ": Stripe refused what was asked",
        "The log of `serve` has Stripe's words. Let the key read what the README says (Stripe's Dashboard, Developers, API keys).",
    ),
    (
        "away",
        ": Stripe could not be reached",
        "It goes on by itself when Stripe answers again; the log of `serve` has Stripe's words. Look at status.stripe.com, and whether \
         this machine may connect to it.",
    ),
    ("busy", ": Stripe took no more calls (429)", ASK_LESS),
    (
        "database",
        ": the database was away or took nothing",
        "It goes on by itself when the database is back.",
    ),
];

/// `is_on`: here, there is a key for it.
pub fn reconciliation(snapshot: &HealthSnapshot, is_on: bool, now_ms: i64) -> Check {
    let failed_ms = snapshot.moment(RECONCILING_FAILED, "");
    let last = snapshot.passes.first();
    let remedy = "The log of `serve` says why; `reconcile` makes a pass at once, and says it too.";
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
                format!(
                    "the last that succeeded ended {}",
                    ago(pass.ended_ms, now_ms)
                )
            });
            let why = WHY_FAILED
                .iter()
                .find(|(by, ..)| snapshot.moment(RECONCILING_FAILED_BY, by) == Some(failed_ms));
            let (why, remedy) = why.map_or(("", remedy), |(_, why, remedy)| (*why, *remedy));
            failing(
                "reconciliation",
                format!(
                    "The last pass failed{why}, {}; {succeeded}.",
                    ago(failed_ms, now_ms)
                ),
                remedy,
            )
        }
        (Some(pass), _) => {
            let ended = format!("The last pass ended {}", ago(pass.ended_ms, now_ms));
            let waiting =
                snapshot.backlog.objects + snapshot.backlog.links + snapshot.backlog.checks;
            match () {
                () if now_ms - pass.ended_ms > overdue_after_ms(&snapshot.passes) => warning(
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
fn overdue_after_ms(passes: &[FailedRun]) -> i64 {
    let mut between: Vec<i64> = passes
        .windows(2)
        .map(|pair| pair[0].started_ms - pair[1].started_ms)
        .collect();
    between.sort_unstable();
    between
        .get(between.len() / 2)
        .map_or(OVERDUE_MS, |usual| (3 * usual).max(OVERDUE_MS))
}

pub fn drift(snapshot: &HealthSnapshot) -> Check {
    const CURE: &str = "Run `reconcile`: it names each, with both values. Find out which side is wrong; correct the stored invoice (PUT it again), \
                        or credit, void or replace it at Stripe.";
    let unknown_at_stripe = snapshot
        .passes
        .first()
        .map_or(0, |pass| pass.count("unknownAtStripe"));
    let found: Vec<String> = [
        snapshot.differing.since_ms.map(|since_ms| {
            format!(
                "Not as Stripe has it: {}, the first since {}.",
                count(snapshot.differing.count, "invoice"),
                timestamp(since_ms)
            )
        }),
        (unknown_at_stripe > 0).then(|| {
            format!(
                "Not known to Stripe: {} of the last pass.",
                count(unknown_at_stripe, "invoice")
            )
        }),
    ]
    .into_iter()
    .flatten()
    .collect();
    match snapshot.passes.first() {
        _ if !found.is_empty() => warning("drift", found.join(" "), CURE),
        Some(_) => ok(
            "drift",
            "No invoice is known to differ from Stripe's.".to_owned(),
        ),
        None => unknown(
            "drift",
            "Nothing was compared with Stripe yet.".to_owned(),
            "Run `reconcile`.",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::format::DAY_MS;

    #[test]
    fn a_pass_is_overdue_by_how_often_there_was_one() {
        let at = |minutes: &[i64]| -> Vec<FailedRun> {
            let pass = |m: &i64| FailedRun {
                started_ms: m * MINUTE_MS,
                ended_ms: m * MINUTE_MS,
                report: Default::default(),
            };
            minutes.iter().map(pass).collect()
        };
        assert_eq!(overdue_after_ms(&at(&[])), 15 * MINUTE_MS);
        assert_eq!(overdue_after_ms(&at(&[100, 95, 90, 85])), 15 * MINUTE_MS);
        assert_eq!(overdue_after_ms(&at(&[4320, 2880, 1440])), 3 * DAY_MS);
        assert_eq!(
            overdue_after_ms(&at(&[2000, 1995, 1990, 10])),
            15 * MINUTE_MS,
            "one pause does not count"
        );
    }
}
