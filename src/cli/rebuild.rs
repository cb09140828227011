//! `rebuild`: derives all facts again from the stored bytes, and prints the differences.

use std::collections::BTreeMap;

use clap::Args;
use serde_json::{Value, json};

use super::output;
use super::{Access, Exit, GlobalArgs};
use crate::jobs::rebuild::{self, RebuildDifference, RebuildReport, WriteMode};
use crate::store::Store;

/// Derive all facts again from the stored bytes, and print the differences by invoice
#[derive(Args)]
#[command(after_help = "Examples:
  stripe-reconciler rebuild --dry-run     print the differences; exit code 3 if there are any
  stripe-reconciler rebuild               also save the new facts; exit code 3 if any differed")]
pub struct Rebuild {
    /// Print the differences without saving
    #[arg(long)]
    dry_run: bool,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

impl Rebuild {
    pub(super) async fn run(self, settings: GlobalArgs) -> anyhow::Result<Exit> {
        let (mode, access) = if self.dry_run {
            (WriteMode::DryRun, Access::Reads)
        } else {
            (WriteMode::Save, Access::Writes)
        };
        let store = settings.store(access).await?;

        let bar = output::progress("events");
        let report = rebuild::rebuild(&store, mode, |done| bar.set_position(done)).await?;
        bar.finish_and_clear();

        let holders = holders(&store, &report).await?;
        if self.json {
            print_json(&report, &holders)?;
        } else {
            print_text(&report, &holders, mode)?;
        }
        store.close().await;

        Ok(if report.differs() {
            Exit::Differs
        } else {
            Exit::Done
        })
    }
}

/// Tenant and uid of the stored invoice, by Stripe invoice.
type Holders = BTreeMap<String, (String, String)>;

async fn holders(store: &Store, report: &RebuildReport) -> anyhow::Result<Holders> {
    let ids: Vec<String> = report.differing.keys().cloned().collect();
    let holders = store.holders(&ids).await?;
    Ok(holders
        .into_iter()
        .map(|(tenant, uid, stripe)| (stripe, (tenant, uid)))
        .collect())
}

fn print_text(report: &RebuildReport, holders: &Holders, mode: WriteMode) -> anyhow::Result<()> {
    for (stripe_invoice_id, differences) in &report.differing {
        output::line(
            match (stripe_invoice_id.as_str(), holders.get(stripe_invoice_id)) {
                ("", _) => "without an invoice".to_owned(),
                (id, Some((tenant, uid))) => format!("invoice {uid} of {tenant} ({id})"),
                (id, None) => format!("{id} (not stored)"),
            },
        )?;
        for RebuildDifference {
            event_id,
            event_type,
            was,
            is,
        } in differences
        {
            output::line(format!(
                "  {} {}",
                output::or_dash(event_id),
                output::or_dash(event_type)
            ))?;
            output::line(format!("    was {was}"))?;
            output::line(format!("    is  {is}"))?;
        }
    }

    let differing = report.differing.len();
    let (events, pruned) = (report.events, report.pruned);
    let verb = if mode == WriteMode::DryRun {
        "would change"
    } else {
        "changed"
    };
    output::line(format!(
        "{events} events read again, {pruned} pruned; {differing} invoices {verb}"
    ))
}

fn print_json(report: &RebuildReport, holders: &Holders) -> anyhow::Result<()> {
    let mut differing = Vec::with_capacity(report.differing.len());
    for (id, differences) in &report.differing {
        let holder = holders.get(id);
        differing.push(json!({
            "stripeInvoiceId": Some(id).filter(|id| !id.is_empty()),
            "tenantUid": holder.map(|(tenant, _)| tenant),
            "invoiceUid": holder.map(|(_, uid)| uid),
            "events": differences.iter().map(as_json).collect::<Vec<_>>(),
        }));
    }
    let report = json!({"events": report.events, "pruned": report.pruned, "differing": differing});

    output::line(serde_json::to_string_pretty(&report)?)
}

fn as_json(difference: &RebuildDifference) -> Value {
    json!({
        "eventId": difference.event_id,
        "type": difference.event_type,
        "was": difference.was,
        "is": difference.is,
    })
}
