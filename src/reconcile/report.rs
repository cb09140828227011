//! The report of a run. The command line prints it; scripts read it as JSON.

use std::cmp::Ordering;
use std::collections::HashSet;

use serde::Serialize;
use serde_json::{Value, json};
use uuid::Uuid;

use super::{Plan, WriteMode};
use crate::domain::payment_state::PaymentState;
use crate::domain::run_summary::{EndpointIssue, RunCounts};
use crate::domain::time::timestamp;

/// Items of each list that are stored with a run. All of them are counted.
const STORED_ITEMS: usize = 100;

/// A stored invoice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Invoice {
    pub stripe_invoice_id: String,
    pub tenant_uid: String,
    pub invoice_uid: String,
}

/// A history that this run changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Healed {
    #[serde(flatten)]
    pub invoice: Invoice,
    /// The present state of the invoice.
    pub state: Option<PaymentState>,
    pub added: Vec<Change>,
    /// Entries that better ones replace.
    pub removed: Vec<Change>,
}

/// An entry of a history, with its proofs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Change {
    pub state: PaymentState,
    pub timestamp: String,
    pub payment_msg: Option<String>,
    pub proofs: Vec<Proof>,
}

/// An event or object that proves an entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Proof {
    /// Id of the event or object.
    pub id: String,
    /// Type of the event, or a text for an object of Stripe's API.
    pub what: String,
}

/// A field with different values in a stored invoice and at Stripe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Differing {
    #[serde(flatten)]
    pub invoice: Invoice,
    /// `amount`, `currency`, `livemode` or `state`.
    pub field: &'static str,
    pub ours: String,
    pub stripes: String,
    /// Time at which the difference was first seen.
    pub since: String,
}

/// An invoice at Stripe that is not stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct UnknownHere {
    pub stripe_invoice_id: String,
    pub number: Option<String>,
    pub status: Option<String>,
    pub amount: Option<String>,
    pub created: String,
}

/// An event that no webhook delivered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ApiOnlyEvent {
    pub event_id: String,
    #[serde(rename = "type")]
    pub event_type: String,
    pub created: String,
    pub stripe_invoice_id: Option<String>,
}

/// The findings of a run. Times in Unix milliseconds.
#[derive(Clone, Debug)]
pub struct Report {
    pub id: String,
    pub started_ms: i64,
    pub ended_ms: i64,
    pub plan: Plan,
    /// Calls to Stripe's API.
    pub calls: u64,
    pub agreeing: Vec<Invoice>,
    pub healed: Vec<Healed>,
    pub differing: Vec<Differing>,
    pub unknown_at_stripe: Vec<Invoice>,
    pub unknown_here: Vec<UnknownHere>,
    /// Invoices for which Stripe's API lags behind its events. Nothing is wrong, and a later run
    /// compares them again.
    pub stripe_lags: Vec<Invoice>,
    pub api_only_events: Vec<ApiOnlyEvent>,
    pub endpoint_issues: Vec<EndpointIssue>,
    /// The numbers of items before the lists were shortened, or `None` if they are complete.
    counts: Option<RunCounts>,
}

impl Report {
    pub(super) fn new(started_ms: i64, plan: Plan) -> Report {
        Report {
            id: format!("run_{}", Uuid::now_v7().simple()),
            started_ms,
            ended_ms: started_ms,
            plan,
            calls: 0,
            agreeing: Vec::new(),
            healed: Vec::new(),
            differing: Vec::new(),
            unknown_at_stripe: Vec::new(),
            unknown_here: Vec::new(),
            stripe_lags: Vec::new(),
            api_only_events: Vec::new(),
            endpoint_issues: Vec::new(),
            counts: None,
        }
    }

    /// Returns whether the run changed a history or found a difference. Invoices at Stripe that are
    /// not stored do not count, because an account may have many that belong to other systems.
    pub fn differs(&self) -> bool {
        !(self.healed.is_empty() && self.differing.is_empty() && self.unknown_at_stripe.is_empty())
    }

    /// Sorts the lists by id. An invoice that was healed no longer counts as agreeing.
    pub(super) fn sort(&mut self) {
        let healed: HashSet<&str> = self
            .healed
            .iter()
            .map(|healed| healed.invoice.stripe_invoice_id.as_str())
            .collect();
        self.agreeing
            .retain(|invoice| !healed.contains(invoice.stripe_invoice_id.as_str()));

        self.agreeing.sort_by(by_stripe_invoice);
        self.healed
            .sort_by(|a, b| by_stripe_invoice(&a.invoice, &b.invoice));
        self.differing.sort_by(|a, b| {
            by_stripe_invoice(&a.invoice, &b.invoice).then_with(|| a.field.cmp(b.field))
        });
        self.unknown_at_stripe.sort_by(by_stripe_invoice);
        self.unknown_here
            .sort_by(|a, b| a.stripe_invoice_id.cmp(&b.stripe_invoice_id));
        self.unknown_here
            .dedup_by(|a, b| a.stripe_invoice_id == b.stripe_invoice_id);
        self.api_only_events
            .sort_by(|a, b| (&a.created, &a.event_id).cmp(&(&b.created, &b.event_id)));
    }

    /// Returns the report as JSON. `endpointRemarks` has the sentences of `endpointIssues`.
    pub fn to_json(&self) -> Value {
        let remarks: Vec<String> = self
            .endpoint_issues
            .iter()
            .map(ToString::to_string)
            .collect();

        json!({
            "startedAt": timestamp(self.started_ms),
            "endedAt": timestamp(self.ended_ms),
            "dryRun": self.plan.mode == WriteMode::DryRun,
            "counts": self.counts(),
            "agreeing": self.agreeing,
            "healed": self.healed,
            "differing": self.differing,
            "unknownAtStripe": self.unknown_at_stripe,
            "unknownHere": self.unknown_here,
            "stripeLags": self.stripe_lags,
            "apiOnlyEvents": self.api_only_events,
            "endpointIssues": self.endpoint_issues,
            "endpointRemarks": remarks,
        })
    }

    /// Returns the number of items of each list, before it was shortened.
    pub fn counts(&self) -> RunCounts {
        self.counts.unwrap_or(RunCounts {
            agreeing: self.agreeing.len() as i64,
            healed: self.healed.len() as i64,
            differing: self.differing.len() as i64,
            unknown_at_stripe: self.unknown_at_stripe.len() as i64,
            unknown_here: self.unknown_here.len() as i64,
            stripe_lags: self.stripe_lags.len() as i64,
            api_only_events: self.api_only_events.len() as i64,
            endpoint_remarks: self.endpoint_issues.len() as i64,
            calls: self.calls as i64,
        })
    }

    /// Returns the report in its stored form: agreeing invoices are only counted, and each other
    /// list has its first 100 items.
    pub(super) fn shortened(&self) -> Report {
        let mut short = self.clone();
        short.counts = Some(self.counts());

        short.agreeing.clear();
        short.healed.truncate(STORED_ITEMS);
        short.differing.truncate(STORED_ITEMS);
        short.unknown_at_stripe.truncate(STORED_ITEMS);
        short.unknown_here.truncate(STORED_ITEMS);
        short.stripe_lags.truncate(STORED_ITEMS);
        short.api_only_events.truncate(STORED_ITEMS);
        short
    }
}

fn by_stripe_invoice(a: &Invoice, b: &Invoice) -> Ordering {
    a.stripe_invoice_id.cmp(&b.stripe_invoice_id)
}
