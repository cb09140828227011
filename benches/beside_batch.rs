//! How deliveries fare while a batch command works on the same database: `--beside-batch`.
//!
//! The real `serve` receives 50 deliveries a second. Beside it, one after the other, the real
//! `import`, `replay`, `rebuild`, `copy` and `events prune` run. The target is a p99 below 250 ms
//! during each, and no delivery refused.

use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use sqlx::{AssertSqlSafe, Connection, PgConnection, SqliteConnection};

use crate::deliveries;
use crate::load::{Timings, open_loop_until};
use crate::process::{Served, product};

/// Deliveries a second.
const RATE: f64 = 50.0;
/// Enough that a delivery that stalls does not delay the next ones.
const CONNECTIONS: usize = 64;
/// A signature is good for five minutes.
const LONGEST: Duration = Duration::from_secs(280);
/// How long deliveries are measured with no batch command beside them.
const ALONE: Duration = Duration::from_secs(10);
const CHECK_INTERVAL: Duration = Duration::from_millis(20);

/// Makes each event differ from what its bytes say, so that `rebuild` rewrites all of them.
const SPOIL: &str = "update events set outcome = 'no_payment_fact' where outcome = 'recorded'";

/// One database, a server on it, and files for the batch commands.
pub struct BesideBatch {
    pub url: String,
    /// An empty database of the same engine.
    pub copy_url: String,
    pub folder: PathBuf,
    /// Events and invoices that each command works on.
    pub rows: usize,
}

impl BesideBatch {
    pub async fn measure(&self) {
        let (invoices, events, more_events) = (
            self.write("invoices.jsonl", self.invoices()),
            self.write("events.jsonl", deliveries::bodies(0, self.rows)),
            self.write("more.jsonl", deliveries::bodies(self.rows, self.rows)),
        );
        self.command(&["migrate"]).wait().expect("it ends");
        self.command(&["replay", &events]).wait().expect("it ends");
        let server = Served::product(&self.url);
        println!("beside          seconds  rows/s  deliveries  p50 ms  p99 ms  max ms  not 2xx");

        // Each measurement delivers events of its own.
        let mut first = 10 * self.rows;
        let mut measure = async |name: &str, arguments: Option<&[&str]>| {
            let requests = deliveries::signed(first, (RATE * LONGEST.as_secs_f64()) as usize);
            first += requests.len();
            let mut child = arguments.map(|arguments| self.command(arguments));
            let begun = Instant::now();
            let ended = async {
                match &mut child {
                    Some(child) => until_ended(child).await,
                    None => tokio::time::sleep(ALONE).await,
                }
                begun.elapsed()
            };
            let (timings, took) =
                open_loop_until(&server.authority, CONNECTIONS, &requests, RATE, ended).await;
            self.print(name, took, &timings);
        };
        measure("nothing", None).await;
        let import = ["invoices", "import", "--tenant", "acme", &invoices];
        measure("import", Some(&import)).await;
        measure("import again", Some(&import)).await;
        measure("replay", Some(&["replay", &more_events])).await;
        self.execute(SPOIL).await;
        measure("rebuild", Some(&["rebuild", "--json"])).await;
        measure("copy", Some(&["copy", "--to", &self.copy_url])).await;
        let prune = ["events", "prune", "--older-than", "1s"];
        measure("events prune", Some(&prune)).await;
    }

    fn print(&self, name: &str, took: Duration, timings: &Timings) {
        let seconds = took.as_secs_f64();
        println!(
            "{name:<14}  {seconds:>7.1}  {:>6.0}  {:>10}  {:>6.2}  {:>6.1}  {:>6.0}  {:>7}",
            self.rows as f64 / seconds,
            timings.sorted.len(),
            timings.quantile_ms(0.5),
            timings.quantile_ms(0.99),
            timings.quantile_ms(1.0),
            timings.not_2xx
        );
    }

    fn invoices(&self) -> impl Iterator<Item = String> {
        (0..self.rows).map(|n| {
            let stripe_invoice_id = deliveries::stripe_invoice_id(n);
            format!(
                r#"{{"metadata":{{"uid":"invoice-{n}"}},"status":{{"stripeInvoiceId":"{stripe_invoice_id}"}}}}"#
            )
        })
    }

    fn write(&self, name: &str, documents: impl Iterator<Item = String>) -> String {
        let path = self.folder.join(name);
        let lines: Vec<String> = documents.map(|text| text.replace('\n', "")).collect();
        std::fs::write(&path, lines.join("\n")).expect("a file");
        path.display().to_string()
    }

    fn command(&self, arguments: &[&str]) -> Child {
        let mut command = product(&self.url);
        command.args(arguments).stdout(Stdio::null());
        command.spawn().expect("it runs")
    }

    async fn execute(&self, sql: &str) {
        let statement = sqlx::raw_sql(AssertSqlSafe(sql.to_owned()));
        let executed = if self.url.starts_with("sqlite:") {
            let opened = SqliteConnection::connect(&self.url).await;
            statement
                .execute(&mut opened.expect("a connection"))
                .await
                .map(drop)
        } else {
            let opened = PgConnection::connect(&self.url).await;
            statement
                .execute(&mut opened.expect("a connection"))
                .await
                .map(drop)
        };

        executed.expect("it is executed");
    }
}

async fn until_ended(child: &mut Child) {
    while child.try_wait().expect("a child of ours").is_none() {
        tokio::time::sleep(CHECK_INTERVAL).await;
    }
}
