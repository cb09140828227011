//! Checks of Stripe's webhook endpoint, of reconciliation, and of differences from Stripe.

use super::format::{MINUTE_MS, ago, count, failing, ok, sentence, unknown, warning};
use super::{Check, CheckId};
use crate::domain::run_summary::{EndpointIssue, RunErrorCause};
use crate::domain::time::timestamp;
use crate::monitoring::last_seen::LastSeen;
use crate::monitoring::snapshot::{HealthSnapshot, PastRun};
use crate::stripe_api::StripeApiError;

/// Number of pending calls to Stripe's API from which the check warns. One run makes more calls
/// than this.
const MAX_BACKLOG: i64 = 5_000;
/// Age of the last run from which the next is overdue. `serve` starts one every five minutes.
const OVERDUE_MS: i64 = 15 * MINUTE_MS;

const NEW_KEY: &str = "Create a restricted key in Stripe's Dashboard (Developers, API keys; the README lists what it \
     must be able to read), set STRIPE_API_KEY, and restart `serve`.";
const FEWER_CALLS: &str = "Other programs use up the calls that Stripe allows this account: let them make fewer, or \
     lower STRIPE_API_RATE.";

/// Checks the webhook endpoint. `asked` is Stripe's current answer; without it, the last run
/// counts.
pub fn endpoint(
    asked: Option<&Result<Vec<EndpointIssue>, StripeApiError>>,
    runs: &[PastRun],
    now_ms: i64,
) -> Check {
    match asked {
        Some(Ok(issues)) if issues.is_empty() => ok(
            CheckId::Endpoint,
            "It is enabled and sends all event types that are read.",
        ),
        Some(Ok(issues)) => endpoint_issues(issues, None),
        Some(Err(error)) => endpoint_unknown(error),
        None => {
            let Some(run) = runs.first() else {
                return unknown(
                    CheckId::Endpoint,
                    "It was not checked yet.",
                    "Run `doctor` with STRIPE_API_KEY.",
                );
            };

            let checked = ago(run.ended_ms, now_ms);
            if run.summary.endpoint_issues.is_empty() {
                return ok(
                    CheckId::Endpoint,
                    format!("It was enabled and sent all event types {checked}."),
                );
            }
            endpoint_issues(&run.summary.endpoint_issues, Some(&checked))
        }
    }
}

/// Reports issues. `checked` is the time when the last run found them; only the next run can find
/// them fixed.
fn endpoint_issues(issues: &[EndpointIssue], checked: Option<&str>) -> Check {
    let mut sentences: Vec<String> = issues.iter().map(ToString::to_string).collect();
    if let Some(checked) = checked {
        sentences.push(format!("The last run found this {checked}."));
    }

    let lacks_permission = issues
        .iter()
        .any(|issue| matches!(issue, EndpointIssue::MissingPermission { .. }));
    let remedy = if lacks_permission {
        "In Stripe's Dashboard: Developers, API keys. If the key stays the same, nothing has to be \
         restarted."
    } else {
        "In Stripe's Dashboard: Developers, Webhooks. `reconcile` finds what was missed meanwhile."
    };
    failing(CheckId::Endpoint, sentences.join(" "), remedy)
}

fn endpoint_unknown(error: &StripeApiError) -> Check {
    let finding = sentence(&error.to_string());
    match error {
        StripeApiError::Unauthorized(_) => failing(CheckId::Endpoint, finding, NEW_KEY),
        StripeApiError::Busy(_) => warning(CheckId::Endpoint, finding, FEWER_CALLS),
        StripeApiError::Away(_)
        | StripeApiError::Refused { .. }
        | StripeApiError::Invalid { .. } => warning(
            CheckId::Endpoint,
            finding,
            "Check status.stripe.com, and whether this machine may connect to Stripe.",
        ),
    }
}

/// Checks whether runs end and succeed. `is_enabled` is `true` if this process has an API key for
/// runs.
pub fn reconciliation(snapshot: &HealthSnapshot, is_enabled: bool, now_ms: i64) -> Check {
    let failed_ms = snapshot.last_seen(&LastSeen::RunFailed);
    let last = snapshot.runs.first();
    if let Some(failed_ms) = failed_ms
        && last.is_none_or(|run| run.ended_ms < failed_ms)
    {
        return failed_run(snapshot, failed_ms, now_ms);
    }
    let Some(run) = last else {
        return if is_enabled {
            warning(
                CheckId::Reconciliation,
                "No run has ended yet.",
                "Start `serve` with STRIPE_API_KEY, or run `reconcile`.",
            )
        } else {
            unknown(
                CheckId::Reconciliation,
                "It is off, so events that no webhook delivers are not found.",
                "Set STRIPE_API_KEY for `serve`, or run `reconcile` from time to time.",
            )
        };
    };

    let ended = format!("The last run ended {}", ago(run.ended_ms, now_ms));
    let backlog = snapshot.backlog.objects + snapshot.backlog.links + snapshot.backlog.checks;
    if now_ms - run.ended_ms > overdue_after_ms(&snapshot.runs) {
        return warning(
            CheckId::Reconciliation,
            format!("{ended}: the next is overdue."),
            "Start `serve` with STRIPE_API_KEY, or run `reconcile`.",
        );
    }
    if backlog >= MAX_BACKLOG {
        return warning(
            CheckId::Reconciliation,
            format!("{ended}, but {backlog} calls to Stripe are waiting."),
            "Wait. If the number does not fall, allow more calls (STRIPE_API_RATE), as far as \
             Stripe allows.",
        );
    }
    ok(CheckId::Reconciliation, format!("{ended}."))
}

fn failed_run(snapshot: &HealthSnapshot, failed_ms: i64, now_ms: i64) -> Check {
    let succeeded = snapshot
        .runs
        .first()
        .map_or("none has succeeded yet".to_owned(), |run| {
            format!(
                "the last that succeeded ended {}",
                ago(run.ended_ms, now_ms)
            )
        });
    let cause = RunErrorCause::ALL
        .into_iter()
        .find(|cause| snapshot.last_seen(&LastSeen::RunFailedBy(*cause)) == Some(failed_ms));
    let (cause, remedy) = cause.map_or(("", GENERAL_REMEDY), cause_and_remedy);

    failing(
        CheckId::Reconciliation,
        format!(
            "The last run failed{cause}, {}; {succeeded}.",
            ago(failed_ms, now_ms)
        ),
        remedy,
    )
}

const GENERAL_REMEDY: &str =
    "Read the log of `serve` for the reason, or run `reconcile`, which prints it.";

fn cause_and_remedy(cause: RunErrorCause) -> (&'static str, &'static str) {
    match cause {
        RunErrorCause::Key => (": Stripe does not accept STRIPE_API_KEY", NEW_KEY),
        RunErrorCause::Denied => (
            ": Stripe denied a request",
            "Read Stripe's message in the log of `serve`. Let the key read what the README lists \
             (Stripe's Dashboard, Developers, API keys).",
        ),
        RunErrorCause::Unreachable => (
            ": Stripe could not be reached",
            "Reconciliation continues by itself when Stripe answers again; the log of `serve` has \
             the details. Check status.stripe.com, and whether this machine may connect to Stripe.",
        ),
        RunErrorCause::RateLimited => (
            ": Stripe rejected calls above its rate limit (429)",
            FEWER_CALLS,
        ),
        RunErrorCause::Database => (
            ": the database was unavailable",
            "Reconciliation continues by itself when the database is available again.",
        ),
        RunErrorCause::LeaseLost => ("", GENERAL_REMEDY),
    }
}

/// Returns three times the usual time between two runs, which may be minutes (`serve`) or a day
/// (cron).
fn overdue_after_ms(runs: &[PastRun]) -> i64 {
    let mut between_ms: Vec<i64> = runs
        .windows(2)
        .map(|pair| pair[0].started_ms - pair[1].started_ms)
        .collect();
    between_ms.sort_unstable();

    between_ms
        .get(between_ms.len() / 2)
        .map_or(OVERDUE_MS, |usual_ms| (3 * usual_ms).max(OVERDUE_MS))
}

/// Checks for invoices that differ from Stripe's, or that Stripe does not have.
pub fn drift(snapshot: &HealthSnapshot) -> Check {
    let Some(run) = snapshot.runs.first() else {
        return match differing(snapshot) {
            Some(finding) => warning(CheckId::Drift, finding, DRIFT_REMEDY),
            None => unknown(
                CheckId::Drift,
                "No invoice was compared with Stripe yet.",
                "Run `reconcile`.",
            ),
        };
    };

    let unknown_at_stripe = run.summary.counts.unknown_at_stripe;
    let missing = (unknown_at_stripe > 0).then(|| {
        format!(
            "Not found at Stripe: {} in the last run.",
            count(unknown_at_stripe, "invoice")
        )
    });
    let findings: Vec<String> = differing(snapshot).into_iter().chain(missing).collect();
    if findings.is_empty() {
        return ok(
            CheckId::Drift,
            "No invoice is known to differ from Stripe's.",
        );
    }
    warning(CheckId::Drift, findings.join(" "), DRIFT_REMEDY)
}

const DRIFT_REMEDY: &str = "Run `reconcile`: it names each invoice with both values. Find out which side is wrong. Correct \
     the stored invoice (PUT it again), or credit, void or replace it at Stripe.";

fn differing(snapshot: &HealthSnapshot) -> Option<String> {
    let since_ms = snapshot.differing.since_ms?;
    Some(format!(
        "Different from Stripe's: {}, the first since {}.",
        count(snapshot.differing.count, "invoice"),
        timestamp(since_ms)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::format::DAY_MS;

    #[test]
    fn run_is_overdue_after_three_times_the_usual_interval() {
        let runs_at = |minutes: &[i64]| -> Vec<PastRun> {
            minutes
                .iter()
                .map(|minute| PastRun {
                    started_ms: minute * MINUTE_MS,
                    ended_ms: minute * MINUTE_MS,
                    ..PastRun::default()
                })
                .collect()
        };

        assert_eq!(overdue_after_ms(&runs_at(&[])), 15 * MINUTE_MS);
        assert_eq!(
            overdue_after_ms(&runs_at(&[100, 95, 90, 85])),
            15 * MINUTE_MS
        );
        assert_eq!(overdue_after_ms(&runs_at(&[4320, 2880, 1440])), 3 * DAY_MS);

        assert_eq!(
            overdue_after_ms(&runs_at(&[2000, 1995, 1990, 10])),
            15 * MINUTE_MS,
            "one pause does not count"
        );
    }
}
