//! Results of a reconcile run that monitoring reads: counts, endpoint issues, causes of failure.
//!
//! `reconcile` writes these values and `monitoring`, one layer below, reads them. So they are
//! defined here.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::time::timestamp;

/// The cause of a failed run. Causes differ if an operator acts differently on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RunErrorCause {
    /// Stripe does not accept the API key.
    Key,
    /// Stripe denied a request of a valid key.
    Denied,
    /// Stripe could not be reached.
    Unreachable,
    /// Stripe answered 429 to every retry.
    RateLimited,
    /// The database was unavailable.
    Database,
    /// Another process took over the lease.
    LeaseLost,
}

impl RunErrorCause {
    pub const ALL: [RunErrorCause; 6] = [
        RunErrorCause::Key,
        RunErrorCause::Denied,
        RunErrorCause::Unreachable,
        RunErrorCause::RateLimited,
        RunErrorCause::Database,
        RunErrorCause::LeaseLost,
    ];

    /// Returns the stored name. Stored names never change.
    pub fn as_str(self) -> &'static str {
        match self {
            RunErrorCause::Key => "key",
            RunErrorCause::Denied => "refused",
            RunErrorCause::Unreachable => "away",
            RunErrorCause::RateLimited => "busy",
            RunErrorCause::Database => "database",
            RunErrorCause::LeaseLost => "lease",
        }
    }

    /// Returns the cause with this stored name. Returns `None` for an unknown name.
    pub fn parse(text: &str) -> Option<RunErrorCause> {
        RunErrorCause::ALL
            .into_iter()
            .find(|cause| cause.as_str() == text)
    }
}

/// A problem with Stripe's delivery of webhooks. [`Display`](fmt::Display) writes a sentence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    tag = "issue",
    rename_all = "camelCase",
    rename_all_fields = "camelCase"
)]
pub enum EndpointIssue {
    /// The account has no webhook endpoint.
    NoEndpoint,
    /// The endpoint is disabled.
    Disabled { endpoint_id: String, url: String },
    /// The endpoint does not send some event types that we read.
    MissingTypes {
        endpoint_id: String,
        url: String,
        types: Vec<String>,
    },
    /// The API key may not read webhook endpoints. `reason` is Stripe's text.
    MissingPermission { reason: String },
    /// No webhook was received for an unusually long time.
    Silent {
        last_delivery_ms: i64,
        duration_ms: i64,
        evidence: SilenceEvidence,
    },
    /// An issue that an older version saved as a sentence.
    Text { sentence: String },
}

/// Reasons why a time without webhooks is unusual.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "camelCase")]
pub enum SilenceEvidence {
    /// Stripe lists newer events that a webhook should have brought.
    EventsAtStripe,
    /// This many of the hours had webhooks in each of the last three weeks.
    BusyHours { hours: i64 },
    /// The longest earlier gap lasted this many hours, less than half of the current gap.
    LongestGap { hours: i64 },
}

impl fmt::Display for EndpointIssue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            EndpointIssue::NoEndpoint => f.write_str(
                "Stripe has no webhook endpoint in this account. Add one for this service in \
                 Stripe's Dashboard (unless an event destination delivers thin events).",
            ),
            EndpointIssue::Disabled { endpoint_id, url } => write!(
                f,
                "Webhook endpoint {endpoint_id} ({url}) is disabled: Stripe does not deliver \
                 to it. Enable it in Stripe's Dashboard."
            ),
            EndpointIssue::MissingTypes {
                endpoint_id,
                url,
                types,
            } => write!(
                f,
                "Webhook endpoint {endpoint_id} ({url}) does not send {}. Add these event types \
                 to it.",
                types.join(", ")
            ),
            EndpointIssue::MissingPermission { reason } => write!(
                f,
                "The API key may not read webhook endpoints: {}. Allow it to (Developers, API \
                 keys).",
                reason.trim_end_matches('.')
            ),
            EndpointIssue::Silent {
                last_delivery_ms,
                duration_ms,
                evidence,
            } => write!(
                f,
                "No webhook was received since {} ({:.1} hours), {evidence}. Check the endpoint's \
                 deliveries in Stripe's Dashboard.",
                timestamp(*last_delivery_ms),
                *duration_ms as f64 / 3_600_000.0
            ),
            EndpointIssue::Text { sentence } => f.write_str(sentence),
        }
    }
}

impl fmt::Display for SilenceEvidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SilenceEvidence::EventsAtStripe => f.write_str("while Stripe's list has new events"),
            SilenceEvidence::BusyHours { hours } => write!(
                f,
                "{hours} hours of it had webhooks in each of the last three weeks"
            ),
            SilenceEvidence::LongestGap { hours } => {
                write!(f, "the longest gap before was {hours} hours")
            }
        }
    }
}

/// Number of items in each list of a report. Stored reports have only the first of each list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct RunCounts {
    pub agreeing: i64,
    pub healed: i64,
    pub differing: i64,
    pub unknown_at_stripe: i64,
    pub unknown_here: i64,
    pub stripe_lags: i64,
    pub api_only_events: i64,
    pub endpoint_remarks: i64,
    /// Calls to Stripe's API.
    pub calls: i64,
}

/// The part of a saved report that monitoring reads.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(from = "SavedReport")]
pub struct RunSummary {
    pub counts: RunCounts,
    pub endpoint_issues: Vec<EndpointIssue>,
}

/// The fields of a saved report. Reports of older versions have only the sentences.
#[derive(Deserialize)]
#[serde(default, rename_all = "camelCase")]
#[derive(Default)]
struct SavedReport {
    counts: RunCounts,
    endpoint_issues: Option<Vec<EndpointIssue>>,
    endpoint_remarks: Vec<String>,
}

impl From<SavedReport> for RunSummary {
    fn from(saved: SavedReport) -> RunSummary {
        RunSummary {
            counts: saved.counts,
            endpoint_issues: saved.endpoint_issues.unwrap_or_else(|| {
                saved
                    .endpoint_remarks
                    .into_iter()
                    .map(|sentence| EndpointIssue::Text { sentence })
                    .collect()
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn stored_run_causes_never_change() {
        let stored = RunErrorCause::ALL.map(RunErrorCause::as_str);
        assert_eq!(
            stored,
            ["key", "refused", "away", "busy", "database", "lease"]
        );
        for cause in RunErrorCause::ALL {
            assert_eq!(RunErrorCause::parse(cause.as_str()), Some(cause));
        }
        assert_eq!(RunErrorCause::parse("moon"), None);
    }

    #[test]
    fn report_of_older_version_still_parses() {
        let report = json!({
            "startedAt": "2026-01-31T10:00:00Z",
            "dryRun": false,
            "counts": {"agreeing": 3, "unknownAtStripe": 2, "endpointRemarks": 1, "calls": 9},
            "endpointRemarks": ["Webhook endpoint we_1 (https://x.example) is disabled."],
        });
        let summary: RunSummary = serde_json::from_value(report).unwrap();
        assert_eq!(
            (summary.counts.agreeing, summary.counts.unknown_at_stripe),
            (3, 2)
        );
        assert_eq!((summary.counts.healed, summary.counts.calls), (0, 9));

        assert_eq!(
            summary.endpoint_issues[0].to_string(),
            "Webhook endpoint we_1 (https://x.example) is disabled."
        );
    }

    #[test]
    fn typed_issues_win_over_sentences() {
        let issues = vec![
            EndpointIssue::NoEndpoint,
            EndpointIssue::MissingTypes {
                endpoint_id: "we_1".to_owned(),
                url: "https://x.example".to_owned(),
                types: vec!["invoice.paid".to_owned()],
            },
            EndpointIssue::Silent {
                last_delivery_ms: 0,
                duration_ms: 7_200_000,
                evidence: SilenceEvidence::BusyHours { hours: 2 },
            },
        ];
        let sentences: Vec<String> = issues.iter().map(ToString::to_string).collect();
        let report = json!({"endpointIssues": issues, "endpointRemarks": sentences});
        let summary: RunSummary = serde_json::from_value(report).unwrap();
        assert_eq!(summary.endpoint_issues, issues);

        assert!(sentences[2].contains("(2.0 hours), 2 hours of it had webhooks"));
    }
}
