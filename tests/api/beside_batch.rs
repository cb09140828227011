//! Batch commands work on the database of a server that receives deliveries: none is refused.

use std::io::Write;
use std::process::Stdio;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use serde_json::json;
use stripe_reconciler::store::Store;
use tokio::task::block_in_place;

use testkit::each_database;
use testkit::{Engine, Load, TestServer, binary};

/// Rows that each command has to work on: dozens of transactions.
const ROWS: usize = 600;
/// Makes all events of the replay differ from what their bytes say.
const SPOIL: &str = "update events set outcome = 'no_payment_fact' where source = 'replay'";
const TIMEOUT: Duration = Duration::from_secs(60);

fn lines(line: impl Fn(usize) -> serde_json::Value) -> Vec<u8> {
    let lines: Vec<String> = (0..ROWS).map(|n| line(n).to_string()).collect();
    lines.join("\n").into_bytes()
}

fn invoice(n: usize) -> serde_json::Value {
    json!({"metadata": {"uid": format!("batch-{n}")},
        "status": {"stripeInvoiceId": format!("in_batch_{n}")}})
}

fn event(n: usize) -> serde_json::Value {
    json!({"id": format!("evt_batch_{n}"), "object": "event", "type": "invoice.paid",
        "created": 1_769_850_000, "livemode": true, "data": {"object": {
            "id": format!("in_batch_{n}"), "object": "invoice", "status": "paid", "currency": "eur",
            "amount_due": 5000, "amount_paid": 5000, "amount_remaining": 0}}})
}

async fn check_deliveries_beside_batch_commands(engine: Engine) {
    let server = TestServer::start(engine).await;
    let load = Load::start(&server);
    let copy = server.empty_database();
    let run = |arguments: &[&str], input: &[u8]| {
        block_in_place(|| server.run_with_input(arguments, input))
    };

    load.acknowledge(100).await;
    let import = ["invoices", "import", "--tenant", "acme", "-"];
    run(&import, &lines(invoice)).with_code(0);
    run(&import, &lines(invoice)).with_code(0);
    run(&["replay", "-"], &lines(event)).with_code(0);
    server.database.execute(SPOIL).await;
    let rebuilt = run(&["rebuild", "--json"], b"").with_code(3).json();
    assert_eq!(rebuilt["differing"].as_array().unwrap().len(), ROWS);
    // Histories of invoices that the load goes on with differ, or not.
    let copied = run(&["copy", "--to", &copy.url], b"");
    assert!([0, 3].contains(&copied.code), "{copied:?}");
    let pruned = run(&["events", "prune", "--older-than", "1s", "--json"], b"");
    assert!(pruned.with_code(0).json()["forgotten"].as_u64().unwrap() >= ROWS as u64);
    load.acknowledge(100).await;

    let told = load.finish().await;
    assert!(told.refused_by().is_empty(), "no delivery may be refused");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batch_commands_refuse_no_delivery_in_sqlite() {
    check_deliveries_beside_batch_commands(Engine::Sqlite).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batch_commands_refuse_no_delivery_in_postgres() {
    check_deliveries_beside_batch_commands(Engine::Postgres).await;
}

each_database! {
    async fn import_commits_while_it_reads(server: TestServer) {
        let arguments = ["invoices", "import", "--tenant", "acme", "-"];
        let mut command = binary(&[("DATABASE_URL", &server.database.url)]);
        let mut import = command
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut input = import.stdin.take().unwrap();
        for n in 0..60 {
            writeln!(input, "{}", invoice(n)).unwrap();
        }

        let deadline = Instant::now() + TIMEOUT;
        let stored = || {
            server
                .run(&["invoices", "list", "--json"])
                .with_code(0)
                .json_lines()
                .len()
        };
        while stored() < 50 {
            assert!(
                Instant::now() < deadline,
                "a transaction must hold fifty invoices at most"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        drop(input);
        assert!(import.wait().unwrap().success());
        assert_eq!(stored(), 60);
    }

    async fn write_is_followed_by_pause_as_long_as_itself(server: TestServer) {
        let store = Store::connect(&server.database.url).await.unwrap();
        let worked = Duration::from_millis(30);
        let started = Instant::now();
        let pause = store.pause_after_write(worked);

        match server.engine {
            Engine::Postgres => assert_eq!(
                pause.now_or_never(),
                Some(()),
                "rows are locked, not the database"
            ),
            Engine::Sqlite => {
                pause.await;
                assert!(started.elapsed() >= worked, "{:?}", started.elapsed());
            }
        }

        store.close().await;
    }
}
