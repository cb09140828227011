//! Checks the delivery of webhooks: the endpoint must be enabled and send all event types that we
//! read, and the time since the last webhook must not be unusually long.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{ApiOnlyEvent, ReconcileError, RunContext, WriteMode};
use crate::domain::history::fact::PAYMENT_EVENT_TYPES;
use crate::domain::run_summary::{EndpointIssue, SilenceEvidence};
use crate::domain::time::parse_time;
use crate::monitoring::delivery_gap;
use crate::monitoring::last_seen::{LastSeen, LastSeenTimes};
use crate::monitoring::log_scanner;
use crate::monitoring::missed_webhooks::{first_missed, is_due, should_be_sent};
use crate::stripe_api::{Scope, StripeApi, StripeApiError};

/// Path of our webhook endpoint, on any host.
const PATH: &str = "/webhooks/stripe";

/// Checks the registered endpoints and the time since the last webhook.
pub async fn check_endpoints(run: &mut RunContext<'_>) -> Result<(), ReconcileError> {
    let mut issues = check_registered_endpoints(&run.context.api).await?;
    issues.extend(check_silence(run).await?);

    for issue in &issues {
        tracing::warn!(%issue, "webhook endpoint has an issue");
    }
    run.report.endpoint_issues = issues;
    Ok(())
}

/// Returns the issues of the registered webhook endpoints.
///
/// # Errors
/// Returns an error if Stripe cannot be reached or does not accept the key. A key that may not read
/// endpoints is an issue, not an error.
pub async fn check_registered_endpoints(
    api: &StripeApi,
) -> Result<Vec<EndpointIssue>, StripeApiError> {
    match api.list("/v1/webhook_endpoints", &[], &Scope::Own).await {
        Ok(page) => {
            let endpoints: Vec<Value> = page
                .data
                .iter()
                .filter_map(|raw| serde_json::from_str(raw.get()).ok())
                .collect();
            Ok(issues_of(&endpoints))
        }
        Err(StripeApiError::Refused { reason, .. }) => {
            Ok(vec![EndpointIssue::MissingPermission { reason }])
        }
        Err(error) => Err(error),
    }
}

/// Returns the issues of our endpoints, recognised by their path. If no endpoint has the path, all
/// are checked, because a proxy may rewrite paths.
fn issues_of(endpoints: &[Value]) -> Vec<EndpointIssue> {
    let ours: Vec<&Value> = endpoints
        .iter()
        .filter(|endpoint| {
            endpoint["url"]
                .as_str()
                .is_some_and(|url| url.trim_end_matches('/').ends_with(PATH))
        })
        .collect();
    let none_is_ours = ours.is_empty();
    let checked: Vec<&Value> = if none_is_ours {
        endpoints.iter().collect()
    } else {
        ours
    };
    if checked.is_empty() {
        return vec![EndpointIssue::NoEndpoint];
    }

    let issues: Vec<Option<EndpointIssue>> =
        checked.iter().map(|endpoint| issue_of(endpoint)).collect();

    if none_is_ours && issues.iter().any(Option::is_none) {
        // One endpoint sends everything that we read. It may be ours behind a proxy.
        return Vec::new();
    }
    issues.into_iter().flatten().collect()
}

/// Returns the issue of one endpoint, or `None` if it sends everything that we read.
fn issue_of(endpoint: &Value) -> Option<EndpointIssue> {
    let endpoint_id = endpoint["id"].as_str().unwrap_or("?").to_owned();
    let url = address(endpoint).to_owned();
    if endpoint["status"] == "disabled" {
        return Some(EndpointIssue::Disabled { endpoint_id, url });
    }

    let enabled: Vec<&str> = endpoint["enabled_events"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let types: Vec<String> = PAYMENT_EVENT_TYPES
        .into_iter()
        .filter(|wanted| !enabled.iter().any(|pattern| matches_type(pattern, wanted)))
        .map(str::to_owned)
        .collect();
    (!types.is_empty()).then_some(EndpointIssue::MissingTypes {
        endpoint_id,
        url,
        types,
    })
}

/// Returns whether `pattern`, such as `invoice.*`, includes this event type.
fn matches_type(pattern: &str, event_type: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(prefix) => event_type.starts_with(prefix),
        None => pattern == event_type,
    }
}

/// Returns the URL without its query, which may contain secrets.
fn address(endpoint: &Value) -> &str {
    let url = endpoint["url"].as_str().unwrap_or("no address");
    url.split(['?', '#']).next().unwrap_or_default()
}

/// Returns an issue if no webhook was received for unusually long.
async fn check_silence(run: &RunContext<'_>) -> Result<Option<EndpointIssue>, ReconcileError> {
    let (store, now_ms) = (&run.context.store, run.started_ms);
    if run.plan.mode == WriteMode::Save {
        log_scanner::scan(store, now_ms).await?;
    }
    let last_seen = LastSeenTimes::from_stored(store.last_seen().await?);
    let Some(last_ms) = last_seen.get(&LastSeen::Delivery) else {
        return Ok(None);
    };
    let hours = store
        .delivery_hours(delivery_gap::first_hour(last_ms))
        .await?;

    // The events that a dry run found are not in the log.
    let found_missed = run.recorder.api_only.iter().any(|event: &ApiOnlyEvent| {
        should_be_sent(&event.event_type)
            && parse_time(&event.created).is_ok_and(|ms| is_due(ms, last_ms, now_ms))
    });
    let is_missed = found_missed || first_missed(store, last_ms, now_ms).await?.is_some();
    Ok(judge_silence(&hours, last_ms, now_ms, is_missed))
}

/// Returns an issue if the silence is unusual. `is_missed` is `true` if Stripe's list has later
/// events that a webhook should have delivered.
fn judge_silence(
    hours: &BTreeSet<i64>,
    last_ms: i64,
    now_ms: i64,
    is_missed: bool,
) -> Option<EndpointIssue> {
    let evidence = if is_missed {
        SilenceEvidence::EventsAtStripe
    } else {
        delivery_gap::judge(hours, last_ms, now_ms)?
    };

    Some(EndpointIssue::Silent {
        last_delivery_ms: last_ms,
        duration_ms: now_ms - last_ms,
        evidence,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn endpoint(url: &str, status: &str, enabled: Value) -> Value {
        json!({"id": "we_1", "url": url, "status": status, "enabled_events": enabled})
    }

    #[test]
    fn complete_endpoint_has_no_issue() {
        let all = endpoint("https://x.example/webhooks/stripe", "enabled", json!(["*"]));
        assert_eq!(issues_of(std::slice::from_ref(&all)), []);
        assert_eq!(
            issues_of(&[endpoint(
                "https://x.example/hook",
                "enabled",
                json!(PAYMENT_EVENT_TYPES)
            )]),
            []
        );
        let other = endpoint("https://other.example/hook", "disabled", json!(["*"]));
        assert_eq!(issues_of(&[other, all]), []);
    }

    #[test]
    fn disabled_incomplete_and_missing_endpoints_are_issues() {
        let disabled = issues_of(&[endpoint(
            "https://x.example/webhooks/stripe?token=s3cret",
            "disabled",
            json!(["*"]),
        )]);
        assert_eq!(
            disabled,
            [EndpointIssue::Disabled {
                endpoint_id: "we_1".to_owned(),
                url: "https://x.example/webhooks/stripe".to_owned(),
            }],
            "the query is not shown"
        );

        let few = issues_of(&[endpoint(
            "https://x.example/webhooks/stripe",
            "enabled",
            json!(["invoice.paid", "charge.*"]),
        )]);
        let [EndpointIssue::MissingTypes { types, .. }] = &few[..] else {
            panic!("{few:?}");
        };
        assert!(types.iter().any(|missing| missing == "invoice.voided"));
        assert!(
            !types
                .iter()
                .any(|missing| missing == "invoice.paid" || missing.starts_with("charge."))
        );

        assert_eq!(issues_of(&[]), [EndpointIssue::NoEndpoint]);
    }

    #[test]
    fn silence_is_an_issue_if_unusual_or_stripe_has_events() {
        let (hour_ms, now) = (3_600_000, 500_000);
        let hourly: BTreeSet<i64> = (now - 48..now - 5).collect();
        let evidence = |now: i64, is_missed| {
            let last_ms = *hourly.last().unwrap() * hour_ms;
            match judge_silence(&hourly, last_ms, now * hour_ms, is_missed)? {
                EndpointIssue::Silent { evidence, .. } => Some(evidence),
                other => panic!("{other:?}"),
            }
        };

        assert_eq!(
            evidence(now, false),
            Some(SilenceEvidence::LongestGap { hours: 0 })
        );
        assert_eq!(evidence(now - 4, false), None);

        assert_eq!(
            evidence(now - 4, true),
            Some(SilenceEvidence::EventsAtStripe)
        );
    }
}
