//! How deliveries come: is the webhook endpoint on, does it send all that we read, and has it been silent for longer than usual?

use serde_json::Value;

use super::{Pass, ReconcileError};
use crate::domain::fact::TYPES_THAT_TELL;
use crate::domain::invoice::timestamp;
use crate::store::{EventFilter, LoggedEvent, Source};
use crate::stripe_api::{Scope, StripeApi, StripeApiError};

/// What our own endpoint's URL ends with, wherever it is.
const PATH: &str = "/webhooks/stripe";
/// Receipts by which it is known what is usual.
const RECEIPTS: u32 = 1_000;
/// Fewer say nothing about what is usual.
const ENOUGH: usize = 20;
const SHORTEST_SILENCE_MS: i64 = 3600 * 1000;

pub async fn run(pass: &mut Pass<'_>) -> Result<(), ReconcileError> {
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
            let endpoints: Vec<Value> = page.data.iter().filter_map(|raw| serde_json::from_str(raw.get()).ok()).collect();
            Ok(about(&endpoints))
        }
        Err(StripeApiError::Refused { reason, .. }) => {
            Ok(vec![format!("The webhook endpoints could not be looked at: {reason}. Let the key read webhook endpoints.")])
        }
        Err(error) => Err(error),
    }
}

/// Ours, by their path; where none has it, all: a proxy may rewrite paths.
fn about(endpoints: &[Value]) -> Vec<String> {
    let is_ours = |e: &&Value| e["url"].as_str().is_some_and(|url| url.trim_end_matches('/').ends_with(PATH));
    let ours: Vec<&Value> = endpoints.iter().filter(is_ours).collect();
    let looked_at: Vec<&Value> = if ours.is_empty() { endpoints.iter().collect() } else { ours };
    if looked_at.is_empty() {
        return vec![
            "Stripe has no webhook endpoint in this account. Add one for this service in Stripe's Dashboard (unless an event \
             destination delivers thin events)."
                .to_owned(),
        ];
    }
    let remarks: Vec<Vec<String>> = looked_at.iter().map(|endpoint| remarks_about(endpoint)).collect();
    let nobody_is_ours = !looked_at.iter().any(is_ours);
    if nobody_is_ours && remarks.iter().any(Vec::is_empty) {
        // One of them delivers all that we read, and may be ours behind a proxy.
        return Vec::new();
    }
    remarks.into_iter().flatten().collect()
}

fn remarks_about(endpoint: &Value) -> Vec<String> {
    let name = format!("Webhook endpoint {} ({})", endpoint["id"].as_str().unwrap_or("?"), address(endpoint));
    if endpoint["status"] == "disabled" {
        return vec![format!("{name} is disabled: Stripe delivers nothing to it. Enable it in Stripe's Dashboard.")];
    }
    let enabled: Vec<&str> = endpoint["enabled_events"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let is_sent = |kind: &&str| enabled.iter().any(|e| *e == "*" || e == kind || is_group_of(e, kind));
    let missing: Vec<&str> = TYPES_THAT_TELL.into_iter().filter(|kind| !is_sent(kind)).collect();
    if missing.is_empty() {
        return Vec::new();
    }
    vec![format!("{name} does not send {}. Add these event types to it.", missing.join(", "))]
}

/// `invoice.*`
fn is_group_of(group: &str, kind: &str) -> bool {
    group.strip_suffix('*').is_some_and(|prefix| kind.starts_with(prefix))
}

/// Without the query, which may hold what is nobody's business.
fn address(endpoint: &Value) -> &str {
    let url = endpoint["url"].as_str().unwrap_or("no address");
    url.split(['?', '#']).next().unwrap_or_default()
}

async fn silence(pass: &Pass<'_>) -> Result<Option<String>, ReconcileError> {
    let page = pass.tools.store.events_page(&EventFilter::default(), None, RECEIPTS).await?;
    let is_webhook = |event: &&LoggedEvent| event.source == Source::Webhook;
    let received: Vec<i64> = page.iter().filter(is_webhook).map(|event| event.received_ms).collect();
    let told_otherwise = !pass.keeper.api_only.is_empty();
    Ok(judge_silence(&received, pass.started_ms, told_otherwise))
}

/// `received`: when webhooks came, the newest first. A silence is remarkable when it is longer than any before it, and all the
/// more when Stripe's list had events meanwhile.
fn judge_silence(received: &[i64], now_ms: i64, told_otherwise: bool) -> Option<String> {
    let newest = *received.first()?;
    if received.len() < ENOUGH {
        return None;
    }
    let usual = received.windows(2).map(|pair| pair[0] - pair[1]).max().unwrap_or_default();
    let silent = now_ms - newest;
    let factor = if told_otherwise { 1 } else { 3 };
    if silent < SHORTEST_SILENCE_MS.max(usual.saturating_mul(factor)) {
        return None;
    }
    let hours = |ms: i64| format!("{:.1} hours", ms as f64 / 3_600_000.0);
    let meanwhile = if told_otherwise { ", while Stripe's list has new events" } else { "" };
    Some(format!(
        "No webhook came since {} ({}; the longest silence before was {}){meanwhile}. Look at the endpoint's deliveries in \
         Stripe's Dashboard.",
        timestamp(newest),
        hours(silent),
        hours(usual)
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
        assert_eq!(about(&[endpoint("https://x.example/webhooks/stripe", "enabled", json!(["*"]))]), Vec::<String>::new());
        assert_eq!(about(&[endpoint("https://x.example/hook", "enabled", json!(TYPES_THAT_TELL))]), Vec::<String>::new());
        let other = endpoint("https://other.example/hook", "disabled", json!(["*"]));
        let ours = endpoint("https://x.example/webhooks/stripe", "enabled", json!(["*"]));
        assert_eq!(about(&[other, ours]), Vec::<String>::new());
    }

    #[test]
    fn a_disabled_or_incomplete_endpoint_and_none_at_all_are_said() {
        let disabled = about(&[endpoint("https://x.example/webhooks/stripe?token=s3cret", "disabled", json!(["*"]))]);
        assert!(disabled[0].contains("is disabled") && !disabled[0].contains("s3cret"), "{disabled:?}");
        let few = about(&[endpoint("https://x.example/webhooks/stripe", "enabled", json!(["invoice.paid"]))]);
        assert!(few[0].contains("invoice.voided") && !few[0].contains("invoice.paid,"), "{few:?}");
        assert!(about(&[])[0].contains("no webhook endpoint"));
    }

    #[test]
    fn a_silence_longer_than_usual_is_said() {
        let minute = 60_000;
        let received: Vec<i64> = (0..30).map(|i| -i * 10 * minute).collect();
        assert_eq!(judge_silence(&received, 50 * minute, true), None);
        assert!(judge_silence(&received, 61 * minute, true).is_some());
        assert_eq!(judge_silence(&received[..5], 600 * minute, true), None);
        let daily: Vec<i64> = (0..30).map(|i| -i * 24 * 60 * minute).collect();
        assert_eq!(judge_silence(&daily, 48 * 60 * minute, false), None);
        assert!(judge_silence(&daily, 73 * 60 * minute, false).is_some());
    }
}
