//! `invoices`: imports documents, prints one invoice, and lists all with their payment state.

use std::io::Write;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::json;

use super::document_progress::DocumentProgress;
use super::output;
use super::{Access, Exit, GlobalArgs};
use crate::clock::Clock;
use crate::config::ConfigErrors;
use crate::domain::history::Entry;
use crate::domain::invoice::schema::validate_uid;
use crate::jobs::import::{ImportCounts, Importer};
use crate::queries::invoices::{PageRequest, StateFilter, page, render, render_with};
use crate::store::{Store, StoredInvoice};

/// Import, show and list invoices
#[derive(Args)]
#[command(after_help = "Examples:
  stripe-reconciler invoices import --tenant acme invoices.jsonl
  stripe-reconciler invoices list --state PaymentFailed")]
pub struct Invoices {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Store v1Invoice documents: JSON, a JSON array, or JSON lines
    #[command(after_help = "Examples:
  stripe-reconciler invoices import --tenant acme invoices.jsonl
  generate-invoices | stripe-reconciler invoices import --tenant acme -

All valid documents are stored. Each invalid one is reported as FILE:LINE: POINTER: reason, and the
exit code is 1. metadata.uid names the invoice, status.stripeInvoiceId the invoice at Stripe.")]
    Import(Import),
    /// Print the document of one invoice that the HTTP API returns
    #[command(after_help = "Example:\n  stripe-reconciler invoices get acme inv-2026-01")]
    Get { tenant: String, uid: String },
    /// List invoices with their payment state, newest first
    #[command(after_help = "Examples:
  stripe-reconciler invoices list --tenant acme --state PaymentFailed
  stripe-reconciler invoices list --json | jq -r .metadata.uid")]
    List(List),
}

#[derive(Args)]
struct Import {
    /// Store the invoices for this tenant
    #[arg(long)]
    tenant: String,
    /// Read these files; - is standard input
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Print the counts as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct List {
    /// Only of this tenant
    #[arg(long)]
    tenant: Option<String>,
    /// Only in this state: Paid, PaymentPending, PaymentInProgress, PaymentFailed, or none for an
    /// empty history
    #[arg(long)]
    state: Option<String>,
    /// Print the documents, one per line
    #[arg(long)]
    json: bool,
}

impl Invoices {
    pub(super) async fn run(self, settings: GlobalArgs) -> anyhow::Result<Exit> {
        match self.command {
            Command::Import(import) => import.run(settings).await,
            Command::Get { tenant, uid } => {
                get(&settings.store(Access::Reads).await?, &tenant, &uid).await
            }
            Command::List(list) => list.run(settings).await,
        }
    }
}

impl Import {
    async fn run(self, settings: GlobalArgs) -> anyhow::Result<Exit> {
        validate_uid(&self.tenant)
            .map_err(|reason| ConfigErrors(vec![format!("--tenant {reason}")]))?;
        let store = settings.store(Access::Writes).await?;

        let mut progress = DocumentProgress::start("invoices");
        let mut importer = Importer {
            store: &store,
            tenant_uid: &self.tenant,
            clock: &Clock::system(),
            sink: &mut progress,
            counts: ImportCounts::default(),
        };
        for file in &self.files {
            importer.import_file(file).await?;
        }
        let ImportCounts {
            created,
            replaced,
            invalid,
        } = importer.counts;
        progress.finish();

        if self.json {
            output::line(json!({"created": created, "replaced": replaced, "refused": invalid}))?;
        } else {
            output::line(format!(
                "{created} stored, {replaced} replaced, {invalid} refused"
            ))?;
        }
        store.close().await;

        Ok(if invalid > 0 {
            Exit::Refused
        } else {
            Exit::Done
        })
    }
}

async fn get(store: &Store, tenant: &str, uid: &str) -> anyhow::Result<Exit> {
    if let Some(invoice) = store.invoice(tenant, uid).await? {
        output::line(serde_json::to_string_pretty(&render(&invoice)?)?)?;
        Ok(Exit::Done)
    } else {
        output::note(format!("error: tenant {tenant} has no invoice {uid}"));
        Ok(Exit::Refused)
    }
}

impl List {
    async fn run(self, settings: GlobalArgs) -> anyhow::Result<Exit> {
        let state = self
            .state
            .as_deref()
            .map_or(Ok(StateFilter::Any), StateFilter::parse);
        let state = state.map_err(|mistake| ConfigErrors(vec![format!("--{mistake}")]))?;
        let store = settings.store(Access::Reads).await?;
        let mut request = PageRequest {
            tenant_uid: self.tenant,
            stripe_invoice_id: None,
            state,
            limit: 500,
            after: None,
        };

        let mut rows = Vec::new();
        loop {
            let found = page(&store, &request, |invoice, history| {
                if self.json {
                    Ok(Line::Json(render_with(invoice, &history)?.to_string()))
                } else {
                    Ok(Line::Row(row(invoice, &history)))
                }
            })
            .await?;
            for line in found.items {
                match line {
                    Line::Json(json) => output::line(json)?,
                    Line::Row(row) => rows.push(row),
                }
            }
            match found.next {
                Some(next) => request.after = Some(next),
                None => break,
            }
        }

        if !self.json {
            output::line(output::table(
                &[
                    "TENANT",
                    "INVOICE",
                    "STRIPE INVOICE",
                    "STATE",
                    "SINCE",
                    "MESSAGE",
                ],
                rows,
            ))?;
        }

        std::io::stdout().flush()?;

        Ok(Exit::Done)
    }
}

/// A listed invoice in one of the two output forms.
enum Line {
    Json(String),
    Row(Vec<String>),
}

fn row(invoice: &StoredInvoice, history: &[Entry]) -> Vec<String> {
    let last = history.last();
    vec![
        invoice.tenant_uid.clone(),
        invoice.invoice_uid.clone(),
        output::or_dash(&invoice.stripe_invoice_id),
        last.map_or("none", |entry| entry.state.as_str()).to_owned(),
        output::time(last.map(|entry| entry.timestamp_ms)),
        last.and_then(|entry| entry.message.clone())
            .unwrap_or_default(),
    ]
}
