//! `why`: for each entry of an invoice's history, the events that prove it.

use std::collections::HashMap;

use clap::Args;
use serde_json::{Value, json};

use super::{Exit, Settings, output};
use crate::domain::event::EventKey;
use crate::domain::history::Entry;
use crate::flows::invoices::history;
use crate::store::LoggedEvent;

/// Show why an invoice is in the state it is in: each entry of its history, and the events that prove it
#[derive(Args)]
#[command(after_help = "Example:\n  stripe-reconciler why acme inv-2026-01")]
pub struct Why {
    tenant: String,
    uid: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Why {
    pub(super) async fn run(self, settings: Settings) -> anyhow::Result<Exit> {
        let store = settings.store().await?;
        let Some(invoice) = store.invoice(&self.tenant, &self.uid).await? else {
            output::note(format!("error: tenant {} has no invoice {}", self.tenant, self.uid));
            return Ok(Exit::Refused);
        };
        let history = history(&invoice)?;
        let keys: Vec<EventKey> = history.iter().flat_map(|entry| entry.proofs.iter().copied()).collect();
        let found = store.events_by_keys(&keys).await?;
        let events: HashMap<EventKey, LoggedEvent> = found.into_iter().map(|event| (event.key, event)).collect();
        if self.json {
            let entries: Vec<Value> = history.iter().map(|entry| as_json(entry, &events)).collect();
            let answer = json!({"tenantUid": self.tenant, "invoiceUid": self.uid, "stripeInvoiceId": invoice.stripe_invoice_id, "entries": entries});
            output::line(serde_json::to_string_pretty(&answer)?)?;
            return Ok(Exit::Done);
        }
        output::line(format!(
            "invoice {} of {}, at Stripe {}",
            self.uid,
            self.tenant,
            output::or_dash(&invoice.stripe_invoice_id)
        ))?;
        if history.is_empty() {
            output::line("nothing is known about its payment")?;
        }
        for entry in &history {
            print(entry, &events)?;
        }
        Ok(Exit::Done)
    }
}

fn print(entry: &Entry, events: &HashMap<EventKey, LoggedEvent>) -> anyhow::Result<()> {
    let message = entry.message.as_deref().unwrap_or_default();
    output::line(format!("\n{}  {}  {message}", output::time(Some(entry.timestamp_ms)), entry.state.as_str()))?;
    if entry.proofs.is_empty() {
        return output::line("  came with the stored invoice");
    }
    let row = |event: &LoggedEvent| {
        vec![
            format!("  {}", output::or_dash(&event.id)),
            output::or_dash(&event.event_type),
            format!("happened {}", output::time(event.created_s.map(|s| s * 1000))),
            format!("received {}", output::time(Some(event.received_ms))),
            came_by(event),
        ]
    };
    let rows: Vec<Vec<String>> = entry.proofs.iter().filter_map(|key| events.get(key)).map(row).collect();
    let table = output::table(&[], rows);
    table.lines().try_for_each(|line| output::line(format!("  {line}")))
}

fn came_by(event: &LoggedEvent) -> String {
    match &event.secret_label {
        Some(label) => format!("by {}, signed with {label}", event.source.as_str()),
        None => format!("by {}", event.source.as_str()),
    }
}

fn as_json(entry: &Entry, events: &HashMap<EventKey, LoggedEvent>) -> Value {
    let proof = |event: &LoggedEvent| {
        json!({
            "id": event.id,
            "type": event.event_type,
            "createdAt": event.created_s.map(|s| output::time(Some(s * 1000))),
            "receivedAt": output::time(Some(event.received_ms)),
            "source": event.source.as_str(),
            "secretLabel": event.secret_label,
        })
    };
    json!({
        "state": entry.state.as_str(),
        "timestamp": output::time(Some(entry.timestamp_ms)),
        "paymentMsg": entry.message,
        "imported": entry.proofs.is_empty(),
        "proofs": entry.proofs.iter().filter_map(|key| events.get(key)).map(proof).collect::<Vec<_>>(),
    })
}
