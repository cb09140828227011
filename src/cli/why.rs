//! `why`: prints each entry of an invoice's history, and the events that prove it.

use clap::Args;

use super::output;
use super::{Access, Exit, GlobalArgs};
use crate::clock::Clock;
use crate::config::ConfigErrors;
use crate::queries::evidence::{self, Evidence, Proven};
use crate::store::LoggedEvent;

/// Show each entry of an invoice's history, and the events that prove it
#[derive(Args)]
#[command(after_help = "Examples:
  stripe-reconciler why acme inv-2026-01
  stripe-reconciler why acme inv-2026-01 --as-of 2026-01-31T18:00:00+01:00
  stripe-reconciler why acme inv-2026-01 --json")]
pub struct Why {
    tenant: String,
    uid: String,
    /// Show the history as known at this time: only events received by then count
    #[arg(long, value_name = "TIME")]
    as_of: Option<String>,
    /// Print the JSON of GET /v1/tenants/TENANT/invoices/UID/evidence
    #[arg(long)]
    json: bool,
}

impl Why {
    pub(super) async fn run(self, settings: GlobalArgs) -> anyhow::Result<Exit> {
        let now_ms = Clock::system().now_ms();
        let as_of_ms = self
            .as_of
            .as_deref()
            .map(|text| evidence::as_of(text, now_ms))
            .transpose()
            .map_err(|reason| ConfigErrors(vec![format!("--as-of {reason}")]))?;

        let store = settings.store(Access::Reads).await?;
        let Some(evidence) = evidence::gather(&store, &self.tenant, &self.uid, as_of_ms).await?
        else {
            output::note(format!(
                "error: tenant {} has no invoice {}",
                self.tenant, self.uid
            ));
            return Ok(Exit::Refused);
        };

        if self.json {
            output::line(serde_json::to_string_pretty(&evidence.to_json())?)?;
        } else {
            print(&evidence)?;
        }
        Ok(Exit::Done)
    }
}

fn print(evidence: &Evidence) -> anyhow::Result<()> {
    let Evidence {
        tenant_uid,
        invoice_uid,
        stripe_invoice_id,
        ..
    } = evidence;
    output::line(format!(
        "invoice {invoice_uid} of {tenant_uid}, at Stripe {}",
        output::or_dash(stripe_invoice_id)
    ))?;
    if evidence.as_of_ms.is_some() {
        output::line(format!("as known at {}", output::time(evidence.as_of_ms)))?;
    }

    output::line(match evidence.last_event_ms {
        Some(_) => format!(
            "last event received {}",
            output::time(evidence.last_event_ms)
        ),
        None => "no event about this invoice was received".to_owned(),
    })?;
    output::line(match (evidence.confirmed_ms, evidence.differs_since_ms) {
        (_, Some(_)) => format!(
            "Stripe's API has differed since {}",
            output::time(evidence.differs_since_ms)
        ),
        (Some(_), _) => format!(
            "Stripe's API last agreed {}",
            output::time(evidence.confirmed_ms)
        ),
        (None, None) if evidence.as_of_ms.is_some() => {
            "whether Stripe's API agreed by then is not known".to_owned()
        }
        (None, None) => "not compared with Stripe's API".to_owned(),
    })?;
    if evidence.entries.is_empty() {
        output::line("nothing is known about its payment")?;
    }

    for missing in &evidence.missing {
        let id = missing
            .event
            .as_ref()
            .and_then(|event| event.id.as_deref())
            .map_or(String::new(), |id| format!(" ({id})"));
        output::line(format!("{}{id}", missing.message))?;
    }

    evidence.entries.iter().try_for_each(print_entry)
}

fn print_entry(entry: &Proven) -> anyhow::Result<()> {
    let message = entry.message.as_deref().unwrap_or_default();
    output::line(format!(
        "\n{}  {}  {message}",
        output::time(Some(entry.timestamp_ms)),
        entry.state.as_str()
    ))?;
    if entry.is_imported {
        return output::line("  imported with the stored invoice");
    }

    let table = output::table(&[], entry.proofs.iter().map(proof_row).collect());
    table
        .lines()
        .try_for_each(|line| output::line(format!("  {line}")))?;
    if entry.more_proofs > 0 {
        output::line(format!("    and {} more", entry.more_proofs))?;
    }

    Ok(())
}

fn proof_row(event: &LoggedEvent) -> Vec<String> {
    let created_ms = event.created_s.map(|s| s * 1000);
    vec![
        format!("  {}", output::or_dash(&event.id)),
        output::or_dash(&event.event_type),
        format!("happened {}", output::time(created_ms)),
        format!("received {}", output::time(Some(event.received_ms))),
        source(event),
    ]
}

fn source(event: &LoggedEvent) -> String {
    match &event.secret_label {
        Some(label) => format!("by {}, signed with {label}", event.source.as_str()),
        None => format!("by {}", event.source.as_str()),
    }
}
