//! `reconcile`: one pass against Stripe's API, and its report; or the reports of the last passes.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use serde_json::{Value, json};

use super::output;
use super::{Access, Exit, GlobalArgs, open};
use crate::clock::Clock;
use crate::config::{Config, ConfigErrors, Flags, Purpose};
use crate::ingest::batch_writer::BatchWriter;
use crate::reconcile::{
    self, Differing, Extent, Healed, Lease, Plan, ReconcileContext, ReconcileError, Report,
    UnknownHere, WriteMode,
};
use crate::store::{Run, Store};
use crate::stripe_api::StripeApi;

/// Items of a list that are printed for a person; `--json` has all.
const SHOWN: usize = 50;
/// Passes that `--list` shows.
const LISTED: u32 = 20;

/// Compare with Stripe's API: find what no webhook told, and print where the two sides agree and differ
#[derive(Args)]
#[command(after_help = "Examples:
  STRIPE_API_KEY=rk_live_... stripe-reconciler reconcile      one pass; exits with 3 if anything was healed or differs
  stripe-reconciler reconcile --dry-run                       what a pass would find; changes nothing
  stripe-reconciler reconcile --since 30d --json              all that Stripe still lists, whatever is known of it
  stripe-reconciler reconcile --list                          the last passes, those of a running `serve` among them

It waits while another pass is under way. Repeating is harmless: a second run right after finds nothing new.
A restricted key needs to read events, invoices, invoice payments, PaymentIntents, charges and webhook endpoints.")]
pub struct Reconcile {
    /// Read Stripe's events and invoices of this long, such as 30d or 12h [default: from where the last pass ended]
    #[arg(long, value_name = "DURATION")]
    since: Option<String>,
    /// Change nothing
    #[arg(long)]
    dry_run: bool,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
    /// Only print the reports of the last passes
    #[arg(long, conflicts_with_all = ["since", "dry_run"])]
    list: bool,
    #[command(flatten)]
    stripe: StripeFlags,
}

/// How Stripe's API is reached.
#[derive(Args, Clone)]
pub(super) struct StripeFlags {
    /// Secret or restricted key of Stripe's API [env: STRIPE_API_KEY, better: a flag can be seen in the list of processes]
    #[arg(long, value_name = "KEY")]
    stripe_api_key: Option<String>,
    /// Where Stripe's API is, for tests [env: STRIPE_API_BASE]
    #[arg(long, value_name = "URL")]
    stripe_api_base: Option<String>,
    /// Calls a second to each of its endpoints at most [env: STRIPE_API_RATE] [default: 25]
    #[arg(long, value_name = "N")]
    stripe_api_rate: Option<String>,
}

impl StripeFlags {
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
    let tools = ReconcileContext {
        store: store.clone(),
        inbox,
        api,
        clock: Clock::system(),
        metrics: Arc::default(),
    };
    let bar = output::progress("calls to Stripe");
    let counting = async {
        loop {
            bar.set_position(tools.api.calls());
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    let ended = tokio::select! {
        ended = under_lease(&tools, plan) => ended,
        () = counting => unreachable!("it counts as long as the pass lasts"),
    };
    bar.finish_and_clear();
    drop(tools);
    writer.finish().await;
    store.close().await;
    Ok(ended?)
}

async fn under_lease(tools: &ReconcileContext, plan: Plan) -> Result<Report, ReconcileError> {
    if plan.mode == WriteMode::DryRun {
        Lease::wait_until_free(&tools.store, &tools.clock).await?;
        return reconcile::run(tools, plan).await;
    }
    let lease = Lease::take(&tools.store, &tools.clock).await?;
    let ended = tokio::select! {
        ended = reconcile::run(tools, plan) => ended,
        () = lease.lost() => Err(ReconcileError::LeaseLost),
    };
    lease.release().await;
    ended
}

fn parse_since(text: &str) -> Result<i64, ConfigErrors> {
    let unfit = || {
        ConfigErrors(vec![format!(
            "--since: `{text}` is no duration such as 30d, 12h or 90m"
        )])
    };
    let (number, unit) = text
        .split_at_checked(text.len().saturating_sub(1))
        .ok_or_else(unfit)?;
    let unit_s = match unit {
        "d" => 24 * 3600,
        "h" => 3600,
        "m" => 60,
        _ => return Err(unfit()),
    };
    let number: i64 = number
        .parse()
        .ok()
        .filter(|n| (1..=100_000).contains(n))
        .ok_or_else(unfit)?;
    Ok(number * unit_s)
}

fn print(report: &Report) -> anyhow::Result<()> {
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
        (report.differing.len(), "differ from Stripe's"),
        (report.unknown_at_stripe.len(), "not found at Stripe"),
        (report.unknown_here.len(), "at Stripe, but not stored here"),
    ];
    for (count, what) in counts {
        output::line(format!("{count:>8} {what}"))?;
    }
    let title = if report.plan.mode == WriteMode::DryRun {
        "Would be healed"
    } else {
        "Healed"
    };
    let advice = "Nothing to do. Each invoice now shows what Stripe says; no webhook had told it.";
    section(title, advice, &report.healed, healed)?;
    let advice = "Find out which side is wrong. Correct the stored invoice (PUT it again), or credit, void or replace it at Stripe.";
    section("Differing", advice, &report.differing, differing)?;
    let advice = "Stripe has no such invoice. Check status.stripeInvoiceId, and that the key is for the same account and mode.";
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
    let advice = "Store those that are yours (`invoices import`): what is known about their payment shows at once.";
    section(
        "At Stripe, but not stored here",
        advice,
        &report.unknown_here,
        unknown_here,
    )?;
    let advice = "Nothing to do. Stripe's own events say more than its API shows yet; they are looked at again.";
    section("Stripe's API lags", advice, &report.stripe_lags, |i| {
        vec![i.stripe_invoice_id.clone()]
    })?;
    let advice = "Look at the webhook endpoint in Stripe's Dashboard when these are many.";
    let events = "Events that no webhook brought";
    section(events, advice, &report.api_only_events, |e| {
        vec![format!("{}  {}  {}", e.created, e.event_id, e.event_type)]
    })?;
    section("Webhook endpoint", "", &report.endpoint_remarks, |remark| {
        vec![remark.clone()]
    })?;
    output::line(if report.differs() {
        ""
    } else {
        "\nEverything that is stored here agrees with Stripe."
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
    for item in items.iter().take(SHOWN) {
        for line in lines(item) {
            output::line(format!("  {line}"))?;
        }
    }
    if items.len() > SHOWN {
        output::line(format!(
            "  and {} more: --json has all",
            items.len() - SHOWN
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
    let what = match *field {
        "livemode" => "mode",
        other => other,
    };
    vec![format!(
        "invoice {} of {} ({}): {what} is {ours} here and {stripes} at Stripe, seen since {since}",
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
    vec![format!("{stripe_invoice_id}  {known}, made {created}")]
}

async fn list(store: &Store, json: bool) -> anyhow::Result<Exit> {
    let runs = store.last_runs(LISTED, i64::MAX).await?;
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
        "EVENTS BY API ONLY",
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
    let report: Value = serde_json::from_str(run.report.get())?;
    let count = |name: &str| report["counts"][name].to_string();
    let seconds = (run.ended_ms - run.started_ms) as f64 / 1000.0;
    let counts = [
        "agreeing",
        "healed",
        "differing",
        "unknownAtStripe",
        "unknownHere",
        "apiOnlyEvents",
        "calls",
    ]
    .map(count);
    Ok([
        vec![output::time(Some(run.started_ms)), format!("{seconds:.1}")],
        counts.to_vec(),
    ]
    .concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_has_a_number_and_a_unit() {
        assert_eq!(parse_since("30d").unwrap(), 30 * 24 * 3600);
        assert_eq!(parse_since("90m").unwrap(), 5400);
        for wrong in ["", "d", "30", "-1d", "0h", "1.5h", "30é"] {
            assert!(parse_since(wrong).is_err(), "{wrong}");
        }
    }
}
