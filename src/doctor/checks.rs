//! Checks of the clock, deliveries, events and the comparison with Stripe.
//!
//! Each check is a plain function of the collected data and the time. `docs/operations.md` lists
//! the same rules. Checks of the database are in `database`, checks of signatures and secrets in
//! `signing`, checks of Stripe's endpoint and of reconciliation in `stripe`.

use std::collections::BTreeSet;

use super::format::{
    HOUR_MS, MINUTE_MS, SECOND_MS, ago, count, duration, failing, ok, sentence, unknown, warning,
};
use super::{Check, CheckId};
use crate::domain::run_summary::SilenceEvidence;
use crate::domain::time::timestamp;
use crate::monitoring::delivery_gap;
use crate::monitoring::last_seen::{LastSeen, Rejection};
use crate::monitoring::snapshot::HealthSnapshot;
use crate::store::COUNT_LIMIT;

/// Clock differences from which the check warns and fails. Deliveries are rejected at 300 s.
const CLOCK_WARNING_MS: i64 = 10 * SECOND_MS;
const CLOCK_FAILING_MS: i64 = 60 * SECOND_MS;
/// Reasons for answering authentic deliveries with 503.
const OVERLOAD_REASONS: [Rejection; 3] = [
    Rejection::Unavailable,
    Rejection::QueueFull,
    Rejection::TimedOut,
];
/// Longest age of such a rejection that is reported if no delivery was accepted since.
const OVERLOAD_MS: i64 = 10 * MINUTE_MS;
/// Longest delay between a rejection and its record.
const RECORDING_DELAY_MS: i64 = 15 * SECOND_MS;
const TWICE_RECORDING_DELAY_MS: i64 = 2 * RECORDING_DELAY_MS;
/// Age from which an unmatched event counts as a problem. Invoices are usually stored soon after
/// Stripe created them.
const UNMATCHED_MS: i64 = HOUR_MS;

/// Checks this machine's clock. The arguments are the offsets of the database's and Stripe's clock
/// ahead of ours; `None` if unknown.
pub fn clock(database_ahead_ms: Option<i64>, stripe_ahead_ms: Option<i64>) -> Check {
    let known: Vec<(&str, i64)> = [
        ("Stripe's", stripe_ahead_ms),
        ("the database's", database_ahead_ms),
    ]
    .into_iter()
    .filter_map(|(whose, ahead_ms)| Some((whose, ahead_ms?)))
    .collect();
    let worst = known.iter().max_by_key(|(_, ahead_ms)| ahead_ms.abs());
    let Some((whose, ahead_ms)) = worst else {
        return unknown(
            CheckId::Clock,
            "No other clock to compare with.",
            "Run `doctor` with STRIPE_API_KEY: Stripe's responses contain the time.",
        );
    };

    let side = if *ahead_ms > 0 { "behind" } else { "ahead of" };
    let finding = format!(
        "This machine's clock is {} {side} {whose}.",
        duration(ahead_ms.abs())
    );
    let remedy = "Set the clock and keep it set by NTP (`timedatectl`, `chronyc tracking`). \
                  Deliveries are rejected when it is 5 minutes off.";
    match ahead_ms.abs() {
        CLOCK_FAILING_MS.. => failing(CheckId::Clock, finding, remedy),
        CLOCK_WARNING_MS.. => warning(CheckId::Clock, finding, remedy),
        _ => {
            let names: Vec<&str> = known.iter().map(|(whose, _)| *whose).collect();
            ok(
                CheckId::Clock,
                format!("It agrees with {}.", names.join(" and ")),
            )
        }
    }
}

/// Checks whether webhooks are received. `hours` are the hours in which webhooks were received
/// before; `missed_ms` is the time when Stripe created the first event since then that no webhook
/// delivered.
pub fn deliveries(
    snapshot: &HealthSnapshot,
    hours: &BTreeSet<i64>,
    missed_ms: Option<i64>,
    now_ms: i64,
) -> Check {
    const REMEDY: &str = "Check the endpoint's deliveries in Stripe's Dashboard (Developers, Webhooks): is it \
         enabled, is its URL correct, which status is returned? Then check what is in front of \
         this service: DNS, certificate, proxy, firewall. Stripe retries for three days; \
         `reconcile` finds older events.";
    let last_ms = snapshot.last_seen(&LastSeen::Delivery);
    if let Some(check) = overload(snapshot, last_ms, now_ms) {
        return check;
    }
    let Some(last_ms) = last_ms else {
        return unknown(
            CheckId::Deliveries,
            "No webhook was received yet.",
            "Point a webhook endpoint in Stripe's Dashboard at /webhooks/stripe of this service.",
        );
    };

    let since = format!("The last webhook was received {}", ago(last_ms, now_ms));
    if let Some(missed_ms) = missed_ms {
        let finding = format!(
            "{since}, but Stripe has created events since, the first {}.",
            ago(missed_ms, now_ms)
        );
        return failing(CheckId::Deliveries, finding, REMEDY);
    }
    let why_unusual = match delivery_gap::judge(hours, last_ms, now_ms) {
        None => return ok(CheckId::Deliveries, format!("{since}.")),
        Some(SilenceEvidence::BusyHours { hours }) => format!(
            "{} since then had webhooks in each of the last three weeks",
            count(hours, "hour")
        ),
        Some(SilenceEvidence::LongestGap { hours }) => {
            format!("the longest gap before was {}", count(hours, "hour"))
        }
        Some(SilenceEvidence::EventsAtStripe) => "Stripe's list has new events".to_owned(),
    };
    warning(
        CheckId::Deliveries,
        format!("{since}: {why_unusual}."),
        REMEDY,
    )
}

/// Checks whether authentic deliveries are answered with 503. Returns `None` if they are not.
fn overload(snapshot: &HealthSnapshot, accepted_ms: Option<i64>, now_ms: i64) -> Option<Check> {
    let rejected_ms = OVERLOAD_REASONS
        .into_iter()
        .filter_map(|reason| snapshot.last_seen(&LastSeen::Rejected(reason)))
        .max()?;
    let remedy = "Read the log of `serve` (`request failed`) for the reason: a full disk, a lock in \
                  the database, or more deliveries than it can commit. Nothing is lost: Stripe \
                  redelivers for three days.";
    let accepted = accepted_ms.map_or("none was accepted yet".to_owned(), |ms| {
        format!("the last accepted one was received {}", ago(ms, now_ms))
    });
    let finding = format!(
        "deliveries are answered 503, most recently {}; {accepted}.",
        ago(rejected_ms, now_ms)
    );

    let none_accepted_since =
        accepted_ms.is_none_or(|accepted_ms| accepted_ms < rejected_ms - RECORDING_DELAY_MS);
    match now_ms - rejected_ms {
        ..OVERLOAD_MS if none_accepted_since => {
            Some(failing(CheckId::Deliveries, sentence(&finding), remedy))
        }
        // Repeated events need no space, so they are accepted even if the disk is full.
        ..TWICE_RECORDING_DELAY_MS => Some(warning(
            CheckId::Deliveries,
            format!("Some {finding}"),
            remedy,
        )),
        _ => None,
    }
}

/// Checks for events that name invoices which are not stored. `is_scanned` is `true` if the log was
/// read to its end.
pub fn unmatched(snapshot: &HealthSnapshot, is_scanned: bool, now_ms: i64) -> Check {
    let Some(oldest_ms) = snapshot.oldest_unmatched_ms else {
        if is_scanned {
            return ok(
                CheckId::Unmatched,
                "Every event of the last 30 days matched a stored invoice.",
            );
        }
        let progress = snapshot
            .scanned_until_ms
            .map_or("has not been read yet".to_owned(), |ms| {
                format!("has been read only up to {}", timestamp(ms))
            });
        return unknown(
            CheckId::Unmatched,
            format!("No such event is known, but the log {progress}."),
            "Run `doctor` again: each run, and a running `serve`, continues reading.",
        );
    };

    let (events, invoices) = (snapshot.unmatched_events, snapshot.unmatched_invoices);
    let at_least = if invoices >= COUNT_LIMIT as usize {
        "at least "
    } else {
        ""
    };
    let finding = sentence(&format!(
        "{at_least}{} about {} that are not stored; the first was received {}.",
        count(events, "event"),
        count(invoices as i64, "invoice"),
        ago(oldest_ms, now_ms)
    ));
    if now_ms - oldest_ms < UNMATCHED_MS {
        return ok(CheckId::Unmatched, finding);
    }
    warning(
        CheckId::Unmatched,
        finding,
        "Store these invoices (`invoices import`, or PUT): their history appears immediately. The \
         report of `reconcile --list` names them under `unknownHere`. If the Stripe account has \
         invoices that are not yours, this warning stays and is harmless.",
    )
}

/// Checks for events that could not be read.
pub fn unreadable(snapshot: &HealthSnapshot) -> Check {
    let Some(since_ms) = snapshot.unreadable.since_ms else {
        return ok(
            CheckId::Unreadable,
            "Every event of the last 30 days could be read.",
        );
    };

    warning(
        CheckId::Unreadable,
        format!(
            "{} could not be read, the first of {}.",
            count(snapshot.unreadable.count, "event"),
            timestamp(since_ms)
        ),
        "Run `events list --outcome unreadable` for the reason, and `events show` with the printed \
         id for the bytes, which are stored. Install a version that can read them, then run \
         `rebuild`. Events that no version can read are reported for 30 days.",
    )
}
