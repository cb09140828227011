//! `copy`: everything to another database, and all histories compared at the end.

use clap::Args;
use serde_json::json;

use super::output;
use super::{Exit, GlobalArgs};
use crate::clock::Clock;
use crate::config::{Config, ConfigErrors, Flags, Purpose};
use crate::jobs::copy::{self, Carried, CopyError, CopyReport, Differing, Mismatch};
use crate::store::{Store, StoreError};
use crate::telemetry;

/// Carry everything to another database, and compare all histories at the end
#[derive(Args)]
#[command(after_help = "Examples:
  stripe-reconciler copy --to postgres://USER:PASSWORD@HOST/DATABASE           from SQLite, beside a running serve
  COPY_TO_FILE=/run/secrets/new-database stripe-reconciler copy                so that no password is on the command line
  stripe-reconciler copy --database-url postgres://... --to sqlite://new.db    the other way

The other database must be empty, or a copy made before: then only what is new, has changed or has gone is carried. It is
refused when anything but copy has written to it. A run that was interrupted is simply begun again. The first runs may be
made while serve goes on; the last one when nothing writes to the old database any more. It exits with 3 when the
histories differ.")]
pub struct Copy {
    /// The database to copy to [env: COPY_TO, better: a flag can be seen in the list of processes]
    #[arg(long, value_name = "DATABASE_URL")]
    to: Option<String>,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

/// Invoices whose histories differ that are named to a person.
const SHOWN: usize = 20;

/// How long each part took, in milliseconds.
struct Took {
    carrying_ms: i64,
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
            CopyError::Refused(_) | CopyError::Superseded => {
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

/// Migrated.
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

async fn copy(source: &Store, target: &Store) -> Result<(CopyReport, Took), CopyError> {
    let clock = Clock::system();
    let mut copy = copy::Copying::begin(source, target).await?;
    let started_ms = clock.now_ms();
    let bar = output::progress("");
    copy.carry(|table, rows| {
        if bar.message() != table {
            bar.set_message(table);
            bar.reset();
        }
        bar.set_position(rows);
    })
    .await?;
    let carried_ms = clock.now_ms();
    bar.set_message("histories compared");
    bar.reset();
    let report = copy.compare(|invoices| bar.set_position(invoices)).await?;
    bar.finish_and_clear();
    Ok((
        report,
        Took {
            carrying_ms: carried_ms - started_ms,
            comparing_ms: clock.now_ms() - carried_ms,
        },
    ))
}

fn print(report: &CopyReport, took: &Took) -> anyhow::Result<()> {
    let row = |(
        table,
        Carried {
            rows,
            new,
            changed,
            removed,
        },
    ): &(&str, Carried)| {
        [
            [(*table).to_owned()].as_slice(),
            &[rows, new, changed, removed].map(u64::to_string),
        ]
        .concat()
    };
    output::line(output::table(
        &["TABLE", "ROWS", "NEW", "CHANGED", "REMOVED"],
        report.tables.iter().map(row).collect(),
    ))?;
    let rows: u64 = report.tables.iter().map(|(_, carried)| carried.rows).sum();
    output::line(format!("\n{rows} rows in {}", rate(rows, took.carrying_ms)))?;
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
            Mismatch::AnswersOtherwise => "is answered otherwise by the copy",
        };
        output::line(format!(
            "  invoice {invoice_uid} of {tenant_uid} ({}) {how}",
            output::or_dash(stripe_invoice_id)
        ))?;
    }
    if report.differing > SHOWN as u64 {
        output::line(format!(
            "  and {} more (--json names a thousand)",
            report.differing - SHOWN as u64
        ))?;
    }
    output::note(
        "What was written to the old database meanwhile differs, too: stop what writes there, and copy again.",
    );
    Ok(())
}

/// `12.3 s (4567 a second)`
fn rate(count: u64, ms: i64) -> String {
    let seconds = ms.max(1) as f64 / 1000.0;
    format!("{seconds:.1} s ({:.0} a second)", count as f64 / seconds)
}

fn as_json(report: &CopyReport, took: &Took) -> serde_json::Value {
    let tables = report.tables.iter().map(|(table, Carried { rows, new, changed, removed })| {
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
        "milliseconds": {"carrying": took.carrying_ms, "comparing": took.comparing_ms},
    })
}
