//! `copy`: copies everything to another database, and compares all histories at the end.

use clap::Args;
use serde_json::json;

use super::output;
use super::{Exit, GlobalArgs};
use crate::clock::Clock;
use crate::config::{Config, ConfigErrors, Flags, Purpose};
use crate::jobs::copy::{self, CopyError, CopyReport, Differing, Mismatch, TableCounts};
use crate::store::{Store, StoreError};
use crate::telemetry;

/// Copy everything to another database, and compare all histories at the end
#[derive(Args)]
#[command(after_help = "Examples:
  stripe-reconciler copy --to postgres://USER:PASSWORD@HOST/DATABASE
      from SQLite, while serve runs
  COPY_TO_FILE=/run/secrets/new-database stripe-reconciler copy
      without a password on the command line
  stripe-reconciler copy --database-url postgres://... --to sqlite://new.db
      from PostgreSQL to SQLite

The other database must be empty or hold an earlier copy; then only new, changed and deleted rows
are applied. A database that another command has written to is rejected. After an interruption,
start the copy again. The first copies may run while serve runs; make the last one when nothing
writes to the old database any more. The exit code is 3 if histories differ.")]
pub struct Copy {
    /// Copy to this database [env: COPY_TO, preferred: flags show in process lists]
    #[arg(long, value_name = "DATABASE_URL")]
    to: Option<String>,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

/// Limit on the differing invoices that the text output names.
const SHOWN: usize = 20;

/// Duration of each part, in milliseconds.
struct Durations {
    copying_ms: i64,
    comparing_ms: i64,
}

impl Copy {
    pub(super) async fn run(self, settings: GlobalArgs) -> anyhow::Result<Exit> {
        let mut config = Config::load(
            &Flags {
                copy_to: self.to.clone(),
                ..settings.flags()
            },
            Purpose::Copy,
        )?;

        let to = config.copy_to.take().unwrap_or_default();
        telemetry::start(config.telemetry);
        let source = opened(
            "DATABASE_URL",
            Store::connect_to_existing(&config.database_url).await,
        )
        .await?;
        let target = opened("COPY_TO", Store::connect(&to).await).await?;
        let (report, took) = copy(&source, &target).await.map_err(|error| match error {
            CopyError::TargetInUse(_) | CopyError::Superseded => {
                ConfigErrors(vec![error.to_string()]).into()
            }
            CopyError::Store(error) => anyhow::Error::from(error),
        })?;
        source.close().await;
        target.close().await;

        if self.json {
            output::line(serde_json::to_string_pretty(&as_json(&report, &took))?)?;
        } else {
            print(&report, &took)?;
        }
        Ok(if report.differing > 0 {
            Exit::Differs
        } else {
            Exit::Done
        })
    }
}

/// Migrates the database and names it in errors.
async fn opened(name: &str, connected: Result<Store, StoreError>) -> anyhow::Result<Store> {
    let migrated = async {
        let store = connected?;
        store.migrate().await?;
        Ok::<Store, StoreError>(store)
    };
    migrated
        .await
        .map_err(|error| anyhow::Error::from(error).context(format!("{name} cannot be opened")))
}

async fn copy(source: &Store, target: &Store) -> Result<(CopyReport, Durations), CopyError> {
    let clock = Clock::system();
    let mut copy = copy::Copying::begin(source, target).await?;
    let started_ms = clock.now_ms();
    let bar = output::progress("");
    copy.copy_tables(|table, rows| {
        if bar.message() != table {
            bar.set_message(table);
            bar.reset();
        }
        bar.set_position(rows);
    })
    .await?;
    let copied_ms = clock.now_ms();

    bar.set_message("histories compared");
    bar.reset();
    let report = copy.compare(|invoices| bar.set_position(invoices)).await?;
    bar.finish_and_clear();

    Ok((
        report,
        Durations {
            copying_ms: copied_ms - started_ms,
            comparing_ms: clock.now_ms() - copied_ms,
        },
    ))
}

fn print(report: &CopyReport, took: &Durations) -> anyhow::Result<()> {
    output::line(output::table(
        &["TABLE", "ROWS", "NEW", "CHANGED", "REMOVED"],
        report.tables.iter().map(table_row).collect(),
    ))?;
    let rows: u64 = report.tables.iter().map(|(_, counts)| counts.rows).sum();
    output::line(format!("\n{rows} rows in {}", rate(rows, took.copying_ms)))?;
    let compared = format!(
        "{} histories compared in {}",
        report.compared,
        rate(report.compared, took.comparing_ms)
    );
    if report.differing == 0 {
        return output::line(format!("{compared}: all the same"));
    }

    output::line(format!("{compared}: {} differ", report.differing))?;
    for Differing {
        tenant_uid,
        invoice_uid,
        stripe_invoice_id,
        how,
    } in report.named.iter().take(SHOWN)
    {
        let how = match how {
            Mismatch::NotInCopy => "is not in the copy",
            Mismatch::OnlyInCopy => "is only in the copy",
            Mismatch::AnswersOtherwise => "has a different document in the copy",
        };
        output::line(format!(
            "  invoice {invoice_uid} of {tenant_uid} ({}) {how}",
            output::or_dash(stripe_invoice_id)
        ))?;
    }

    if report.differing > SHOWN as u64 {
        output::line(format!(
            "  and {} more (--json lists up to a thousand)",
            report.differing - SHOWN as u64
        ))?;
    }

    output::note(
        "Writes to the old database during the copy also show as differences. \
         Stop the writers and copy again.",
    );

    Ok(())
}

fn table_row((table, counts): &(&'static str, TableCounts)) -> Vec<String> {
    let TableCounts {
        rows,
        new,
        changed,
        removed,
    } = counts;
    let mut row = vec![(*table).to_owned()];
    row.extend([rows, new, changed, removed].map(u64::to_string));
    row
}

/// Formats a duration and a rate: `12.3 s (4567 a second)`.
fn rate(count: u64, ms: i64) -> String {
    let seconds = ms.max(1) as f64 / 1000.0;
    format!("{seconds:.1} s ({:.0} a second)", count as f64 / seconds)
}

fn as_json(report: &CopyReport, took: &Durations) -> serde_json::Value {
    let tables = report.tables.iter().map(|(table, TableCounts { rows, new, changed, removed })| {
        json!({"table": table, "rows": rows, "new": new, "changed": changed, "removed": removed})
    });
    let differing = report.named.iter().map(|differing| {
        let how = match differing.how {
            Mismatch::NotInCopy => "notInCopy",
            Mismatch::OnlyInCopy => "onlyInCopy",
            Mismatch::AnswersOtherwise => "answersOtherwise",
        };
        json!({"tenantUid": differing.tenant_uid, "invoiceUid": differing.invoice_uid,
            "stripeInvoiceId": differing.stripe_invoice_id, "how": how})
    });

    json!({
        "tables": tables.collect::<Vec<_>>(),
        "counts": {"compared": report.compared, "differing": report.differing},
        "differing": differing.collect::<Vec<_>>(),
        "milliseconds": {"carrying": took.copying_ms, "comparing": took.comparing_ms},
    })
}
