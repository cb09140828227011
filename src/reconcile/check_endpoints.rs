//! How deliveries come: is the webhook endpoint on, does it send all that we read, and has it been silent for longer than usual?

use std::collections::BTreeSet;

use serde_json::Value;

use super::{ApiOnlyEvent, ReconcileError, RunContext, WriteMode};
use crate::domain::history::fact::PAYMENT_EVENT_TYPES;
use crate::domain::time::{parse_time, timestamp};
use crate::monitoring::delivery_gap::{self, Unusual};
use crate::monitoring::missed_webhooks;
use crate::monitoring::monitor;
use crate::stripe_api::{Scope, StripeApi, StripeApiError};

/// What our own endpoint's URL ends with, wherever it is.
const PATH: &str = "/webhooks/stripe";
/// How the remark begins where the key lacks the right.
pub const NOT_LOOKED_AT: &str = "The webhook endpoints could not be looked at";

pub async fn run(pass: &mut RunContext<'_>) -> Result<(), ReconcileError> {
    let mut remarks = look_at_endpoints(&pass.tools.api).await?;
    remarks.extend(silence(pass).await?);
    for remark in &remarks {
        tracing::warn!(remark, "endpoint watch");
    }
    pass.report.endpoint_remarks = remarks;
    Ok(())
}

/// What is wrong with the registered webhook endpoints, in words.
///
/// # Errors
/// Stripe cannot be reached, or does not accept the key.
pub async fn look_at_endpoints(api: &StripeApi) -> Result<Vec<String>, StripeApiError> {
    match api.list("/v1/webhook_endpoints", &[], &Scope::Own).await {
        Ok(page) => {
            let endpoints: Vec<Value> = page
                .data
                .iter()
                .filter_map(|raw| serde_json::from_str(raw.get()).ok())
                .collect();
            Ok(about(&endpoints))
        }
        Err(StripeApiError::Refused { reason, .. }) => {
            let reason = reason.trim_end_matches('.');
            let remedy = "Let the key read webhook endpoints (Developers, API keys)";
            Ok(vec![format!("{NOT_LOOKED_AT}: {reason}. {remedy}.")])
        }
        Err(error) => Err(error),
    }
}

/// Ours, by their path; where none has it, all: a proxy may rewrite paths.
fn about(endpoints: &[Value]) -> Vec<String> {
    let is_ours = |e: &&Value| {
        e["url"]
            .as_str()
            .is_some_and(|url| url.trim_end_matches('/').ends_with(PATH))
    };
    let ours: Vec<&Value> = endpoints.iter().filter(is_ours).collect();
    let looked_at: Vec<&Value> = if ours.is_empty() {
        endpoints.iter().collect()
    } else {
        ours
    };
    if looked_at.is_empty() {
        return vec![
            "Stripe has no webhook endpoint in this account. Add one for this service in Stripe's Dashboard (unless an event \
             destination delivers thin events)."
                .to_owned(),
        ];
    }
    let remarks: Vec<Vec<String>> = looked_at
        .iter()
        .map(|endpoint| remarks_about(endpoint))
        .collect();
    let nobody_is_ours = !looked_at.iter().any(is_ours);
    if nobody_is_ours && remarks.iter().any(Vec::is_empty) {
        // One of them delivers all that we read, and may be ours behind a proxy.
        return Vec::new();
    }
    remarks.into_iter().flatten().collect()
}

fn remarks_about(endpoint: &Value) -> Vec<String> {
    let name = format!(
        "Webhook endpoint {} ({})",
        endpoint["id"].as_str().unwrap_or("?"),
        address(endpoint)
    );
    if endpoint["status"] == "disabled" {
        return vec![format!(
            "{name} is disabled: Stripe delivers nothing to it. Enable it in Stripe's Dashboard."
        )];
    }
    let enabled: Vec<&str> = endpoint["enabled_events"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let is_sent = |kind: &&str| {
        enabled
            .iter()
            .any(|e| *e == "*" || e == kind || is_group_of(e, kind))
    };
    let missing: Vec<&str> = PAYMENT_EVENT_TYPES
        .into_iter()
        .filter(|kind| !is_sent(kind))
        .collect();
    if missing.is_empty() {
        return Vec::new();
    }
    vec![format!(
        "{name} does not send {}. Add these event types to it.",
        missing.join(", ")
    )]
}

/// `invoice.*`
fn is_group_of(group: &str, kind: &str) -> bool {
    group
        .strip_suffix('*')
        .is_some_and(|prefix| kind.starts_with(prefix))
}

/// Without the query, which may hold what is nobody's business.
fn address(endpoint: &Value) -> &str {
    let url = endpoint["url"].as_str().unwrap_or("no address");
    url.split(['?', '#']).next().unwrap_or_default()
}

async fn silence(pass: &RunContext<'_>) -> Result<Option<String>, ReconcileError> {
    let (store, now_ms) = (&pass.tools.store, pass.started_ms);
    if pass.plan.mode == WriteMode::Save {
        monitor::scan(store, now_ms).await?;
    }
    let Some(last_ms) = store.moments().await?.get(monitor::DELIVERED).copied() else {
        return Ok(None);
    };
    let hours = store
        .delivery_hours(delivery_gap::first_hour(last_ms))
        .await?;
    // What a dry run found is not in the log.
    let is_due = |event: &ApiOnlyEvent| {
        parse_time(&event.created).is_ok_and(|ms| missed_webhooks::is_due(ms, last_ms, now_ms))
    };
    let was_found = pass
        .keeper
        .api_only
        .iter()
        .any(|event| missed_webhooks::should_be_sent(&event.event_type) && is_due(event));
    let is_missed = was_found
        || missed_webhooks::first_missed(store, last_ms, now_ms)
            .await?
            .is_some();
    Ok(judge_silence(&hours, last_ms, now_ms, is_missed))
}

/// `is_missed`: Stripe's list has events meanwhile that a webhook should have brought.
fn judge_silence(
    hours: &BTreeSet<i64>,
    last_ms: i64,
    now_ms: i64,
    is_missed: bool,
) -> Option<String> {
    let why = match delivery_gap::judge(hours, last_ms, now_ms) {
        _ if is_missed => "while Stripe's list has new events".to_owned(),
        Some(Unusual::Missed(hours)) => {
            format!("{hours} hours of it had webhooks in each of the last three weeks")
        }
        Some(Unusual::Longest(hours)) => format!("the longest silence before was {hours} hours"),
        None => return None,
    };
    let hours = (now_ms - last_ms) as f64 / 3_600_000.0;
    Some(format!(
        "No webhook came since {} ({hours:.1} hours), {why}. Look at the endpoint's deliveries in Stripe's Dashboard.",
        timestamp(last_ms)
    ))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn endpoint(url: &str, status: &str, enabled: Value) -> Value {
        json!({"id": "we_1", "url": url, "status": status, "enabled_events": enabled})
    }

    #[test]
    fn an_endpoint_that_sends_all_that_we_read_is_not_worth_a_remark() {
        assert_eq!(
            about(&[endpoint(
                "https://x.example/webhooks/stripe",
                "enabled",
                json!(["*"])
            )]),
            Vec::<String>::new()
        );
        assert_eq!(
            about(&[endpoint(
                "https://x.example/hook",
                "enabled",
                json!(PAYMENT_EVENT_TYPES)
            )]),
            Vec::<String>::new()
        );
        let other = endpoint("https://other.example/hook", "disabled", json!(["*"]));
        let ours = endpoint("https://x.example/webhooks/stripe", "enabled", json!(["*"]));
        assert_eq!(about(&[other, ours]), Vec::<String>::new());
    }

    #[test]
    fn a_disabled_or_incomplete_endpoint_and_none_at_all_are_said() {
        let disabled = about(&[endpoint(
            "https://x.example/webhooks/stripe?token=s3cret",
            "disabled",
            json!(["*"]),
        )]);
        assert!(
            disabled[0].contains("is disabled") && !disabled[0].contains("s3cret"),
            "{disabled:?}"
        );
        let few = about(&[endpoint(
            "https://x.example/webhooks/stripe",
            "enabled",
            json!(["invoice.paid"]),
        )]);
        assert!(
            few[0].contains("invoice.voided") && !few[0].contains("invoice.paid,"),
            "{few:?}"
        );
        assert!(about(&[])[0].contains("no webhook endpoint"));
    }

    #[test]
    fn a_silence_is_said_when_it_is_unusual_or_stripe_told_otherwise() {
        let (hour_ms, now) = (3_600_000, 500_000);
        let hourly: BTreeSet<i64> = (now - 48..now - 5).collect();
        let judged = |now: i64, is_missed| {
            judge_silence(
                &hourly,
                *hourly.last().unwrap() * hour_ms,
                now * hour_ms,
                is_missed,
            )
        };
        assert!(
            judged(now, false)
                .is_some_and(|remark| remark.contains("longest silence before was 0 hours"))
        );
        assert_eq!(judged(now - 4, false), None);
        assert!(
            judged(now - 4, true)
                .is_some_and(|remark| remark.contains("Stripe's list has new events"))
        );
    }
}
