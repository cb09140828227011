//! `copy`: copies everything from each engine to the other, with interruptions and concurrent
//! writers.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stripe_reconciler::store::{CheckResult, ProgressKey, Store};

use testkit::{
    CommandOutput, Database, Engine, Files, Load, Server, TestServer, binary, invoice_path, run,
};

/// Read-only commands whose output is compared.
const COMPARED: [&[&str]; 6] = [
    &["invoices", "list", "--json"],
    &["events", "list", "--limit", "1000000", "--json"],
    &["events", "export"],
    &["keys", "list", "--json"],
    &["reconcile", "--list", "--json"],
    &["why", "acme", "inv-paid", "--json"],
];

/// Maximum time until a copy that is to be killed has written a row.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Defines tests that copy from each engine to the other.
macro_rules! each_direction {
    ($($(#[$attribute:meta])* async fn $name:ident($server:ident: TestServer, $target:ident: Database) $body:block)*) => {
        $(
            $(#[$attribute])*
            mod $name {
                #[allow(unused_imports)]
                use super::*;

                async fn between($server: TestServer, $target: Database) $body

                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn sqlite_to_postgres() {
                    between(TestServer::start(Engine::Sqlite).await, Database::create(Engine::Postgres)).await
                }

                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn postgres_to_sqlite() {
                    between(TestServer::start(Engine::Postgres).await, Database::create(Engine::Sqlite)).await
                }
            }
        )*
    };
}

fn copy(server: &TestServer, target: &Database) -> CommandOutput {
    run(
        &[
            ("DATABASE_URL", &server.database.url),
            ("COPY_TO", &target.url),
        ],
        &["copy", "--json"],
        b"",
    )
}

/// Returns the number of rows written or deleted.
fn changes(report: &Value) -> u64 {
    let tables = report["tables"].as_array().unwrap();
    tables
        .iter()
        .flat_map(|table| ["new", "changed", "removed"].map(|count| table[count].as_u64().unwrap()))
        .sum()
}

fn assert_same_output(server: &TestServer, target: &Database, commands: &[&[&str]]) {
    for arguments in commands {
        let there = run(&[("DATABASE_URL", &target.url)], arguments, b"").with_code(0);
        assert_eq!(
            server.run(arguments).with_code(0).stdout,
            there.stdout,
            "{arguments:?}"
        );
    }
}

/// Delivers every recorded payload, stores its invoices and writes some of all other data.
async fn fill(server: &TestServer) {
    let imported = json!({"metadata": {"uid": "inv-paid"}, "status": {"stripeInvoiceId": "in_1", "states": [
        {"state": "PaymentPending", "timestamp": "2026-01-01T00:00:00.000Z"}]}});
    server
        .put(&invoice_path("inv-paid"), &imported)
        .await
        .with_status(201);
    server.store("inv-open", "in_2").await.with_status(201);
    let paid = json!({"id": "in_1", "object": "invoice", "status": "paid", "currency": "eur", "amount_due": 5000, "amount_paid": 5000});
    let open = json!({"id": "in_2", "object": "invoice", "status": "open", "currency": "eur", "amount_due": 5000, "amount_remaining": 5000});
    let event = |id: &str, kind: &str, object: &Value| json!({"id": id, "object": "event", "type": kind, "created": 1_769_850_000, "livemode": true, "data": {"object": object}});

    server
        .deliver(&event("evt_live_1", "invoice.paid", &paid))
        .await
        .with_status(200);
    server
        .deliver(&event("evt_live_2", "invoice.finalized", &open))
        .await
        .with_status(200);
    server
        .deliver_bytes("{\"not\": \"an event, odd \u{1F980}\"}".as_bytes())
        .await
        .with_status(200);
    server
        .run_with_input(
            &["replay", "-"],
            event("evt_live_3", "customer.updated", &json!({"id": "cus_1"}))
                .to_string()
                .as_bytes(),
        )
        .with_code(0);

    server.key(&["--tenant", "acme", "--expires-in", "90d"]);
    let store = Store::connect(&server.database.url).await.unwrap();
    let checked = CheckResult {
        stripe_invoice_id: "in_1".to_owned(),
        checked_ms: 5,
        check_due_ms: None,
        differs_since_ms: None,
        agrees: true,
    };
    store.save_check_results(&[checked]).await.unwrap();
    store
        .set_progress(
            &ProgressKey::AccountEvents("acct_1".to_owned()),
            1_769_850_000,
        )
        .await
        .unwrap();

    store.close().await;
}

/// Delivers this many events, each for its own invoice.
fn deliver_many(server: &TestServer, events: usize) {
    let line = |n: usize| {
        json!({"id": format!("evt_many_{n}"), "object": "event", "type": "charge.failed", "created": 1_769_850_000 + n, "livemode": true,
            "data": {"object": {"id": format!("ch_{n}"), "object": "charge", "invoice": format!("in_many_{n}"), "amount": 5000,
                "currency": "eur", "failure_code": "card_declined"}}}).to_string()
    };
    let lines: Vec<String> = (0..events).map(line).collect();
    server
        .run_with_input(&["replay", "-"], lines.join("\n").as_bytes())
        .with_code(0);
}

each_direction! {
    async fn copy_answers_every_read_byte_for_byte(server: TestServer, target: Database) {
        fill(&server).await;
        let first = copy(&server, &target).with_code(0).json();
        assert_eq!(first["counts"], json!({"compared": 2, "differing": 0}));
        assert_same_output(&server, &target, &COMPARED);
        let second = copy(&server, &target).with_code(0).json();
        assert_eq!(
            (changes(&second), &second["counts"]),
            (0, &first["counts"]),
            "{second}"
        );

        let answers = async |server: &TestServer| {
            let mut answers = Vec::new();
            for uid in ["inv-paid", "inv-open"] {
                let answer = server
                    .get(&invoice_path(uid), &server.acme_key)
                    .await
                    .with_status(200);
                answers.push((answer.header("etag").to_owned(), answer.body.clone()));
            }
            answers
        };
        let before = answers(&server).await;
        assert!(
            before
                .iter()
                .any(|(_, body)| String::from_utf8_lossy(body).contains("Paid"))
        );
        let mut moved = server;
        moved.process = Server::start(&target.url);
        assert_eq!(
            answers(&moved).await,
            before,
            "with the keys of the old one"
        );
    }

    async fn next_copy_applies_changes_and_deletions(server: TestServer, target: Database) {
        fill(&server).await;
        copy(&server, &target).with_code(0);
        let keys = server.run(&["keys", "list", "--json"]).with_code(0).json();
        server
            .run(&["keys", "revoke", keys[0]["id"].as_str().unwrap()])
            .with_code(0);
        let replaced = json!({"metadata": {"uid": "inv-open", "name": "new"}, "status": {"stripeInvoiceId": "in_2"}});

        server
            .put(&invoice_path("inv-open"), &replaced)
            .await
            .with_status(200);
        server.store("inv-new", "in_3").await.with_status(201);
        let store = Store::connect(&server.database.url).await.unwrap();
        let (forgotten, _) = store.forget_bodies(i64::MAX, None, 100).await.unwrap();
        store.close().await;

        assert_eq!(forgotten, 3);

        let report = copy(&server, &target).with_code(0).json();
        assert_eq!(
            (changes(&report), &report["counts"]["compared"]),
            (1 + 2 + 3, &json!(3)),
            "{report}"
        );
        assert_same_output(&server, &target, &COMPARED);
    }

    async fn killed_copy_resumes(server: TestServer, target: Database) {
        fill(&server).await;
        deliver_many(&server, 6000);
        let there = Store::connect(&target.url).await.unwrap();
        there.migrate().await.unwrap();
        let events = stripe_reconciler::store::Table::ALL
            .into_iter()
            .find(|table| table.name == "events")
            .unwrap();
        let mut copying = binary(&[
            ("DATABASE_URL", &server.database.url),
            ("COPY_TO", &target.url),
        ])
        .arg("copy")
        .spawn()
        .unwrap();
        let started = Instant::now();
        let mut found = 0;
        while found == 0 {
            assert!(started.elapsed() < TIMEOUT, "it writes nothing");
            found = there.rows_after(events, None).await.unwrap().rows.len();
        }
        copying.kill().unwrap();
        assert!(
            copying.wait().unwrap().code().is_none(),
            "it was killed in the middle"
        );
        there.close().await;

        let report = copy(&server, &target).with_code(0).json();
        let of_events = report["tables"]
            .as_array()
            .unwrap()
            .iter()
            .find(|table| table["table"] == "events")
            .unwrap();
        let (rows, new) = (
            of_events["rows"].as_u64().unwrap(),
            of_events["new"].as_u64().unwrap(),
        );
        assert!(
            rows == 6004 && 0 < new && new < rows,
            "it goes on where it was: {report}"
        );
        assert_eq!(
            (&of_events["changed"], &of_events["removed"]),
            (&json!(0), &json!(0))
        );
        assert_same_output(&server, &target, &COMPARED);
    }

    async fn second_copy_applies_deliveries_made_under_load(server: TestServer, target: Database) {
        let load = Load::start(&server);
        load.acknowledge(100).await;
        let environment = [
            ("DATABASE_URL", server.database.url.clone()),
            ("COPY_TO", target.url.clone()),
        ];
        let copied = move || {
            run(
                &environment.each_ref().map(|(name, url)| (*name, &**url)),
                &["copy", "--json"],
                b"",
            )
        };
        let first = tokio::task::spawn_blocking(copied).await.unwrap();

        // Events that arrive during the comparison make it differ.
        assert!([0, 3].contains(&first.code), "{first:?}");

        load.acknowledge(100).await;
        let deliveries = load.finish().await;
        let second = copy(&server, &target).with_code(0).json();
        assert!(changes(&second) >= 100, "{second}");
        assert_same_output(&server, &target, &COMPARED[..5]);

        let moved = TestServer::on(target).await;
        deliveries.check_log(&moved.logged_ids(), "copied");
        deliveries
            .check_histories(&moved.all_histories(), "copied")
            .await;
    }

    async fn copy_refuses_target_that_would_lose_data(server: TestServer, target: Database) {
        fill(&server).await;
        let refused = |environment: &[(&str, &str)], reason: &str| {
            let output = run(environment, &["copy"], b"").with_code(2);
            assert!(
                output.stderr.contains(reason) && output.stdout.is_empty(),
                "{output:?}"
            );
        };
        let here = ("DATABASE_URL", &*server.database.url);
        refused(&[here], "COPY_TO is not set");
        refused(&[here, ("COPY_TO", &server.database.url)], "the same");
        refused(
            &[here, ("COPY_TO", "mysql://u:hidden@h/d")],
            "COPY_TO: expected sqlite://PATH or",
        );
        let empty = Database::create(target.engine);
        Store::connect(&empty.url).await.unwrap().close().await;
        refused(
            &[("DATABASE_URL", &empty.url), ("COPY_TO", &target.url)],
            "an empty database",
        );

        let other = TestServer::start(target.engine).await;
        other.store("inv-1", "in_1").await.with_status(201);
        let kept = other.run(COMPARED[0]).stdout;
        refused(&[here, ("COPY_TO", &other.database.url)], "is in use");
        assert_eq!(other.run(COMPARED[0]).stdout, kept);

        copy(&server, &target).with_code(0);
        refused(
            &[
                ("DATABASE_URL", &other.database.url),
                ("COPY_TO", &target.url),
            ],
            "a copy of another database",
        );
        assert_same_output(&server, &target, &COMPARED);
        // Reads leave the target usable for further copies; writes do not.
        copy(&server, &target).with_code(0);
        run(
            &[("DATABASE_URL", &target.url)],
            &["keys", "create", "--operator"],
            b"",
        )
        .with_code(0);
        refused(&[here, ("COPY_TO", &target.url)], "is in use");

        let away = run(
            &[here, ("COPY_TO", "postgres://u:hidden@127.0.0.1:1/d")],
            &["copy"],
            b"",
        )
        .with_code(4);
        let missing = run(
            &[
                ("DATABASE_URL", "sqlite:///no/such.db"),
                ("COPY_TO", &target.url),
            ],
            &["copy"],
            b"",
        )
        .with_code(4);
        assert!(
            missing.stderr.contains("DATABASE_URL cannot be opened"),
            "{missing:?}"
        );
        assert!(
            away.stderr.contains("COPY_TO cannot be opened") && !away.stderr.contains("hidden"),
            "{away:?}"
        );
    }

    async fn copy_prints_counts_and_rate_for_humans(server: TestServer, target: Database) {
        fill(&server).await;
        let files = Files::new();
        let url = files.add("url", &target.url);
        let output = run(
            &[
                ("DATABASE_URL", &server.database.url),
                ("COPY_TO_FILE", &url),
            ],
            &["copy"],
            b"",
        )
        .with_code(0);
        let lines: Vec<&str> = output.stdout.lines().collect();
        let words = |line: &str| {
            line.split_whitespace()
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };

        assert_eq!(
            words(lines[0]),
            ["TABLE", "ROWS", "NEW", "CHANGED", "REMOVED"]
        );
        assert!(
            lines
                .iter()
                .any(|line| words(line) == ["events", "4", "4", "0", "0"]),
            "{output:?}"
        );
        assert!(
            lines
                .last()
                .unwrap()
                .starts_with("2 histories compared in ")
                && output.stdout.ends_with(": all the same\n"),
            "{output:?}"
        );

        assert_eq!(output.stderr, "");
    }

    async fn copy_prints_at_most_twenty_differing_invoices(server: TestServer, target: Database) {
        deliver_many(&server, 25);
        for n in 0..25 {
            server
                .store(&format!("inv-{n}"), &format!("in_many_{n}"))
                .await
                .with_status(201);
        }

        let there = Store::connect(&target.url).await.unwrap();
        there.migrate().await.unwrap();
        there.close().await;

        // Delete the rows that link events with an invoice.
        let (lose, find) = match target.engine {
            Engine::Sqlite => ("create trigger lost before insert on mentions begin select raise(ignore); end", "drop trigger lost"),
            Engine::Postgres => (
                "create function lost() returns trigger language plpgsql as $$ begin return null; end $$;
                 create trigger lost before insert on mentions for each row execute function lost()",
                "drop trigger lost on mentions",
            ),
        };
        target.execute(lose).await;
        let output = run(
            &[
                ("DATABASE_URL", &server.database.url),
                ("COPY_TO", &target.url),
            ],
            &["copy"],
            b"",
        )
        .with_code(3);

        let named = output.stdout.lines().filter(|line| {
            line.starts_with("  invoice inv-")
                && line.ends_with(") has a different document in the copy")
        });
        assert_eq!(named.count(), 20, "{output:?}");
        assert!(
            output.stdout.contains(": 25 differ\n")
                && output
                    .stdout
                    .ends_with("  and 5 more (--json lists up to a thousand)\n"),
            "{output:?}"
        );
        assert!(output.stderr.contains("copy again"), "{output:?}");

        let report = copy(&server, &target).with_code(3).json();
        assert_eq!(
            (
                &report["counts"]["differing"],
                report["differing"].as_array().unwrap().len()
            ),
            (&json!(25), 25)
        );

        target.execute(find).await;
        assert_eq!(
            copy(&server, &target).with_code(0).json()["counts"]["differing"],
            0
        );
    }
}
