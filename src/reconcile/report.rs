//! What a pass found: for a person, the command line writes it out; for a script, this is its JSON.

use serde::Serialize;
use serde_json::{Value, json};
use uuid::Uuid;

use super::{Plan, WriteMode};
use crate::domain::payment_state::PaymentState;
use crate::domain::time::timestamp;

/// Items of each list that are kept with a pass; all of them are counted.
const KEPT: usize = 100;

/// A stored invoice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Invoice {
    pub stripe_invoice_id: String,
    pub tenant_uid: String,
    pub invoice_uid: String,
}

/// A history that this pass changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Healed {
    #[serde(flatten)]
    pub invoice: Invoice,
    /// The state that it is in now.
    pub state: Option<PaymentState>,
    pub added: Vec<Change>,
    /// What stood there before, and is said better now.
    pub removed: Vec<Change>,
}

/// An entry of a history, and what proves it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Change {
    pub state: PaymentState,
    pub timestamp: String,
    pub payment_msg: Option<String>,
    pub proofs: Vec<Proof>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Proof {
    /// The event's id, or the object's.
    pub id: String,
    /// The event's type, or that it is what Stripe's API says.
    pub what: String,
}

/// Something that a stored invoice and Stripe's say differently.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Differing {
    #[serde(flatten)]
    pub invoice: Invoice,
    /// `amount`, `currency`, `livemode` or `state`.
    pub field: &'static str,
    pub ours: String,
    pub stripes: String,
    /// When it was first seen.
    pub since: String,
}

/// An invoice of Stripe's that nobody stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct UnknownHere {
    pub stripe_invoice_id: String,
    pub number: Option<String>,
    pub status: Option<String>,
    pub amount: Option<String>,
    pub created: String,
}

/// An event that no webhook brought.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ApiOnlyEvent {
    pub event_id: String,
    #[serde(rename = "type")]
    pub event_type: String,
    pub created: String,
    pub stripe_invoice_id: Option<String>,
}

#[derive(Clone, Debug)]
pub struct Report {
    pub id: String,
    /// Unix milliseconds; so is `ended_ms`.
    pub started_ms: i64,
    pub ended_ms: i64,
    pub plan: Plan,
    /// Calls to Stripe.
    pub calls: u64,
    pub agreeing: Vec<Invoice>,
    pub healed: Vec<Healed>,
    pub differing: Vec<Differing>,
    pub unknown_at_stripe: Vec<Invoice>,
    pub unknown_here: Vec<UnknownHere>,
    /// Stripe's events say more than its API yet: nothing is wrong, and they are looked at again.
    pub stripe_lags: Vec<Invoice>,
    pub api_only_events: Vec<ApiOnlyEvent>,
    pub endpoint_remarks: Vec<String>,
    counts: Option<Value>,
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
            endpoint_remarks: Vec::new(),
            counts: None,
        }
    }

    /// Something was healed, or is not the same on both sides. Invoices of Stripe's that nobody stored are told, but an account
    /// may have many that are none of our business.
    pub fn differs(&self) -> bool {
        !(self.healed.is_empty() && self.differing.is_empty() && self.unknown_at_stripe.is_empty())
    }

    /// Each invoice that was healed counts as that, not as agreeing; lists by id.
    pub(super) fn put_in_order(&mut self) {
        let healed: std::collections::HashSet<&str> = self
            .healed
            .iter()
            .map(|healed| healed.invoice.stripe_invoice_id.as_str())
            .collect();
        self.agreeing
            .retain(|invoice| !healed.contains(invoice.stripe_invoice_id.as_str()));
        self.agreeing
            .sort_by(|a, b| a.stripe_invoice_id.cmp(&b.stripe_invoice_id));
        self.healed.sort_by(|a, b| {
            a.invoice
                .stripe_invoice_id
                .cmp(&b.invoice.stripe_invoice_id)
        });
        self.differing.sort_by(|a, b| {
            (&a.invoice.stripe_invoice_id, a.field).cmp(&(&b.invoice.stripe_invoice_id, b.field))
        });
        self.unknown_at_stripe
            .sort_by(|a, b| a.stripe_invoice_id.cmp(&b.stripe_invoice_id));
        self.unknown_here
            .sort_by(|a, b| a.stripe_invoice_id.cmp(&b.stripe_invoice_id));
        self.unknown_here
            .dedup_by(|a, b| a.stripe_invoice_id == b.stripe_invoice_id);
        self.api_only_events
            .sort_by(|a, b| (&a.created, &a.event_id).cmp(&(&b.created, &b.event_id)));
    }

    pub fn to_json(&self) -> Value {
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
            "endpointRemarks": self.endpoint_remarks,
        })
    }

    fn counts(&self) -> Value {
        let counted = || {
            json!({
                "agreeing": self.agreeing.len(),
                "healed": self.healed.len(),
                "differing": self.differing.len(),
                "unknownAtStripe": self.unknown_at_stripe.len(),
                "unknownHere": self.unknown_here.len(),
                "stripeLags": self.stripe_lags.len(),
                "apiOnlyEvents": self.api_only_events.len(),
                "endpointRemarks": self.endpoint_remarks.len(),
                "calls": self.calls,
            })
        };
        self.counts.clone().unwrap_or_else(counted)
    }

    /// Fit to be kept: what agrees is only counted, and of everything else the first items stand for all.
    pub(super) fn shortened(&self) -> Report {
        let mut short = self.clone();
        short.counts = Some(self.counts());
        short.agreeing.clear();
        short.healed.truncate(KEPT);
        short.differing.truncate(KEPT);
        short.unknown_at_stripe.truncate(KEPT);
        short.unknown_here.truncate(KEPT);
        short.stripe_lags.truncate(KEPT);
        short.api_only_events.truncate(KEPT);
        short
    }
}
