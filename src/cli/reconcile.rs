//! `reconcile`: makes one run against Stripe's API and prints its report, or lists the last
//! reports.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use serde_json::{Value, json};

use super::output;
use super::{Access, Exit, GlobalArgs, duration_ms, open};
use crate::clock::Clock;
use crate::config::{Config, ConfigErrors, Flags, Purpose};
use crate::domain::run_summary::RunSummary;
use crate::ingest::batch_writer::BatchWriter;
use crate::reconcile::{
    self, Differing, Extent, Healed, Lease, Plan, ReconcileContext, ReconcileError, Report,
    UnknownHere, WriteMode,
};
use crate::store::{Run, Store};
use crate::stripe_api::StripeApi;

/// Limit on the items of each list that are printed. `--json` prints all.
const MAX_ITEMS: usize = 50;
/// Limit on the runs that `--list` shows.
const MAX_RUNS: u32 = 20;

/// Compare stored invoices with Stripe, find missed events, and report differences
#[derive(Args)]
#[command(after_help = "Examples:
  STRIPE_API_KEY=rk_live_... stripe-reconciler reconcile   make one run
  stripe-reconciler reconcile --dry-run                    report findings without saving
  stripe-reconciler reconcile --since 30d --json           read everything that Stripe still lists
  stripe-reconciler reconcile --list                       list the last runs, also those of `serve`

The command waits while another run is in progress. Repeating is harmless: a second run finds
nothing new. The exit code is 3 if a run healed a history or found a difference.
A restricted key must be able to read events, invoices, invoice payments, PaymentIntents, charges
and webhook endpoints.")]
pub struct Reconcile {
    /// Look back this long, such as 30d or 12h [default: from where the last run ended]
    #[arg(long, value_name = "DURATION")]
    since: Option<String>,
    /// Report findings without saving
    #[arg(long)]
    dry_run: bool,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
    /// Print the reports of the last runs instead of making a run
    #[arg(long, conflicts_with_all = ["since", "dry_run"])]
    list: bool,
    #[command(flatten)]
    stripe: StripeFlags,
}

/// Flags for access to Stripe's API.
#[derive(Args, Clone)]
pub(super) struct StripeFlags {
    /// Stripe secret or restricted API key [env: STRIPE_API_KEY, preferred: flags show in process
    /// lists]
    #[arg(long, value_name = "KEY")]
    stripe_api_key: Option<String>,
    /// Base URL of Stripe's API, for tests [env: STRIPE_API_BASE]
    #[arg(long, value_name = "URL")]
    stripe_api_base: Option<String>,
    /// Maximum calls per second to each API endpoint [env: STRIPE_API_RATE] [default: 25]
    #[arg(long, value_name = "N")]
    stripe_api_rate: Option<String>,
}

impl StripeFlags {
    /// Adds these flags to the flags of the command.
    pub fn fill(self, flags: Flags) -> Flags {
        let StripeFlags {
            stripe_api_key,
            stripe_api_base,
            stripe_api_rate,
        } = self;
        Flags {
            stripe_api_key,
            stripe_api_base,
            stripe_api_rate,
            ..flags
        }
    }
}

impl Reconcile {
    pub(super) async fn run(self, settings: GlobalArgs) -> anyhow::Result<Exit> {
        if self.list {
            return list(&settings.store(Access::Reads).await?, self.json).await;
        }

        let since_s = self.since.as_deref().map(parse_since).transpose()?;
        let mut config = Config::load(
            &self.stripe.clone().fill(settings.flags()),
            Purpose::StripeApi,
        )?;
        let api = StripeApi::new(
            config
                .stripe_api
                .take()
                .context("checked with the configuration")?,
        );

        let (mode, access) = if self.dry_run {
            (WriteMode::DryRun, Access::Reads)
        } else {
            (WriteMode::Save, Access::Writes)
        };

        let store = open(config, access).await?;
        let report = reconcile(
            &store,
            api,
            Plan {
                extent: Extent::All,
                mode,
                since_s,
            },
        )
        .await?;

        if self.json {
            output::line(serde_json::to_string_pretty(&report.to_json())?)?;
        } else {
            print(&report)?;
        }
        Ok(if report.differs() {
            Exit::Differs
        } else {
            Exit::Done
        })
    }
}

async fn reconcile(store: &Store, api: StripeApi, plan: Plan) -> anyhow::Result<Report> {
    let (inbox, writer) = BatchWriter::start(store.clone(), Arc::default());
    let context = ReconcileContext {
        store: store.clone(),
        inbox,
        api,
        clock: Clock::system(),
        metrics: Arc::default(),
    };

    let bar = output::progress("calls to Stripe");
    let show_calls = async {
        loop {
            bar.set_position(context.api.calls());
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    let ended = tokio::select! {
        ended = run_under_lease(&context, plan) => ended,
        () = show_calls => unreachable!("the loop never ends"),
    };

    bar.finish_and_clear();
    drop(context);
    writer.finish().await;
    store.close().await;
    Ok(ended?)
}

async fn run_under_lease(context: &ReconcileContext, plan: Plan) -> Result<Report, ReconcileError> {
    if plan.mode == WriteMode::DryRun {
        Lease::wait_until_free(&context.store, &context.clock).await?;
        return reconcile::run(context, plan).await;
    }

    let lease = Lease::take(&context.store, &context.clock).await?;
    lease.run(reconcile::run(context, plan)).await
}

/// Parses `--since`, in seconds.
fn parse_since(text: &str) -> Result<i64, ConfigErrors> {
    Ok(duration_ms("--since", text)? / 1000)
}

fn print_counts(report: &Report) -> anyhow::Result<()> {
    let counts = [
        (report.agreeing.len(), "agree with Stripe"),
        (
            report.healed.len(),
            if report.plan.mode == WriteMode::DryRun {
                "would be healed"
            } else {
                "healed"
            },
        ),
        (report.differing.len(), "differ from Stripe"),
        (report.unknown_at_stripe.len(), "not found at Stripe"),
        (report.unknown_here.len(), "at Stripe, but not stored here"),
    ];

    for (count, label) in counts {
        output::line(format!("{count:>8} {label}"))?;
    }
    Ok(())
}

/// Prints the report, with advice for each list.
fn print(report: &Report) -> anyhow::Result<()> {
    print_counts(report)?;

    let title = if report.plan.mode == WriteMode::DryRun {
        "Would be healed"
    } else {
        "Healed"
    };
    let advice =
        "Nothing to do. Each history now includes the events that no webhook had delivered.";
    section(title, advice, &report.healed, healed)?;
    let advice = "Find out which side is wrong. Correct the stored invoice (PUT it again), \
                  or credit, void or replace it at Stripe.";
    section("Differing", advice, &report.differing, differing)?;
    let advice = "Stripe does not have these invoices. Check status.stripeInvoiceId, and that \
                  the key is for the same account and mode.";
    section(
        "Not found at Stripe",
        advice,
        &report.unknown_at_stripe,
        |i| {
            vec![format!(
                "{}  invoice {} of {}",
                i.stripe_invoice_id, i.invoice_uid, i.tenant_uid
            )]
        },
    )?;
    let advice =
        "Store the invoices that are yours (`invoices import`): their history appears immediately.";
    section(
        "At Stripe, but not stored here",
        advice,
        &report.unknown_here,
        unknown_here,
    )?;
    let advice =
        "Nothing to do. Stripe's API lags behind its events. A later run compares them again.";
    section("Stripe's API lags", advice, &report.stripe_lags, |i| {
        vec![i.stripe_invoice_id.clone()]
    })?;
    let advice = "If there are many, check the webhook endpoint in Stripe's Dashboard.";
    let events = "Events that no webhook delivered";
    section(events, advice, &report.api_only_events, |e| {
        vec![format!("{}  {}  {}", e.created, e.event_id, e.event_type)]
    })?;
    section("Webhook endpoint", "", &report.endpoint_issues, |issue| {
        vec![issue.to_string()]
    })?;
    output::line(if report.differs() {
        ""
    } else {
        "\nEverything stored here agrees with Stripe."
    })
}

fn section<T>(
    title: &str,
    advice: &str,
    items: &[T],
    lines: impl Fn(&T) -> Vec<String>,
) -> anyhow::Result<()> {
    if items.is_empty() {
        return Ok(());
    }
    output::line(format!("\n{} ({})", output::bold(title), items.len()))?;
    if !advice.is_empty() {
        output::line(advice)?;
    }

    for item in items.iter().take(MAX_ITEMS) {
        for line in lines(item) {
            output::line(format!("  {line}"))?;
        }
    }
    if items.len() > MAX_ITEMS {
        output::line(format!(
            "  and {} more: --json prints all",
            items.len() - MAX_ITEMS
        ))?;
    }
    Ok(())
}

fn healed(healed: &Healed) -> Vec<String> {
    let invoice = &healed.invoice;
    let state = healed.state.map_or("no state", |state| state.as_str());
    let mut lines = vec![format!(
        "invoice {} of {} ({}): {state}",
        invoice.invoice_uid, invoice.tenant_uid, invoice.stripe_invoice_id
    )];

    for (sign, changes) in [("-", &healed.removed), ("+", &healed.added)] {
        for change in changes {
            let message = change.payment_msg.as_deref().unwrap_or_default();
            lines.push(format!(
                "  {sign} {}  {}  {message}",
                change.timestamp,
                change.state.as_str()
            ));
            let proofs: Vec<String> = change
                .proofs
                .iter()
                .map(|proof| format!("{} ({})", proof.id, proof.what))
                .collect();
            if sign == "+" && !proofs.is_empty() {
                lines.push(format!("      proved by {}", proofs.join(", ")));
            }
        }
    }
    lines
}

fn differing(differing: &Differing) -> Vec<String> {
    let Differing {
        invoice,
        field,
        ours,
        stripes,
        since,
    } = differing;

    let label = match *field {
        "livemode" => "mode",
        other => other,
    };
    vec![format!(
        "invoice {} of {} ({}): {label} is {ours} here and {stripes} at Stripe since {since}",
        invoice.invoice_uid, invoice.tenant_uid, invoice.stripe_invoice_id
    )]
}

fn unknown_here(unknown: &UnknownHere) -> Vec<String> {
    let UnknownHere {
        stripe_invoice_id,
        number,
        status,
        amount,
        created,
    } = unknown;

    let known = [number, status, amount]
        .into_iter()
        .flatten()
        .cloned()
        .collect::<Vec<_>>()
        .join(", ");
    vec![format!("{stripe_invoice_id}  {known}, created {created}")]
}

async fn list(store: &Store, json: bool) -> anyhow::Result<Exit> {
    let runs = store.last_runs(MAX_RUNS, i64::MAX).await?;
    if json {
        let runs: Vec<Value> = runs.iter().map(as_json).collect::<Result<_, _>>()?;
        output::line(serde_json::to_string_pretty(&json!({"runs": runs}))?)?;
        return Ok(Exit::Done);
    }

    let rows = runs.iter().map(row).collect::<anyhow::Result<Vec<_>>>()?;
    let head = [
        "STARTED",
        "SECONDS",
        "AGREE",
        "HEALED",
        "DIFFER",
        "NOT AT STRIPE",
        "NOT HERE",
        "API-ONLY EVENTS",
        "CALLS",
    ];
    output::line(output::table(&head, rows))?;
    store.close().await;
    Ok(Exit::Done)
}

fn as_json(run: &Run) -> serde_json::Result<Value> {
    let mut report: Value = serde_json::from_str(run.report.get())?;
    report["id"] = run.id.as_str().into();
    Ok(report)
}

fn row(run: &Run) -> anyhow::Result<Vec<String>> {
    let summary: RunSummary = serde_json::from_str(run.report.get())?;
    let seconds = (run.ended_ms - run.started_ms) as f64 / 1000.0;
    let counts = summary.counts;
    let counts = [
        counts.agreeing,
        counts.healed,
        counts.differing,
        counts.unknown_at_stripe,
        counts.unknown_here,
        counts.api_only_events,
        counts.calls,
    ];

    let mut row = vec![output::time(Some(run.started_ms)), format!("{seconds:.1}")];
    row.extend(counts.iter().map(i64::to_string));
    Ok(row)
}
