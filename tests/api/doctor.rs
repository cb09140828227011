//! `doctor` as an operator sees it: each test breaks something, and `doctor` names the problem and
//! the remedy.

mod stripe;

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stripe_reconciler::clock::Clock;
use stripe_reconciler::ingest::{Delivery, prepare};
use stripe_reconciler::store::{Source, Store};
use tokio::task::block_in_place;

use crate::metrics::until;
use testkit::each_database;
use testkit::stripe::{Endpoint, Stripe, now_s};
use testkit::{
    self, CommandOutput, Database, Engine, OLD_SECRET, PostgresServer, SECRET, Server, TestServer,
    invoice_path, signature,
};

const TIMEOUT: Duration = Duration::from_secs(30);
const BOTH: &str = "live=whsec_world_live,old=whsec_world_old";

/// Findings of `doctor` by the name of their check.
struct DoctorOutput {
    code: i32,
    checks: Vec<Value>,
    state: String,
}

impl DoctorOutput {
    #[track_caller]
    fn of(output: &CommandOutput) -> DoctorOutput {
        let report = output.json();
        let checks = report["checks"].as_array().unwrap().clone();
        for check in &checks {
            assert!(
                check["finding"]
                    .as_str()
                    .is_some_and(|finding| finding.len() > 10),
                "{check}"
            );
            assert_eq!(
                check["cure"].is_null(),
                check["state"] == "ok",
                "every check that is not ok has a remedy: {check}"
            );
        }

        DoctorOutput {
            code: output.code,
            checks,
            state: report["state"].as_str().unwrap().to_owned(),
        }
    }

    fn check(&self, name: &str) -> &Value {
        self.checks
            .iter()
            .find(|check| check["name"] == name)
            .unwrap_or_else(|| panic!("{name} is not in {:#?}", self.checks))
    }

    /// Asserts that exactly these checks fail, with these states.
    #[track_caller]
    fn assert_findings(&self, wrong: &[(&str, &str)]) -> &DoctorOutput {
        let found: Vec<(&str, &str)> = self
            .checks
            .iter()
            .map(|check| {
                (
                    check["name"].as_str().unwrap(),
                    check["state"].as_str().unwrap(),
                )
            })
            .filter(|(_, state)| !["ok", "unknown"].contains(state))
            .collect();
        assert_eq!(found, wrong, "{:#?}", self.checks);

        let overall = if wrong.iter().any(|(_, state)| *state == "failing") {
            "failing"
        } else if wrong.is_empty() {
            "ok"
        } else {
            "warning"
        };
        assert_eq!(self.state, overall);

        self
    }

    /// Asserts that the finding or the remedy of a check contains all of these texts.
    #[track_caller]
    fn assert_mentions(&self, name: &str, expected: &[&str]) -> &DoctorOutput {
        let check = self.check(name);
        let text = format!(
            "{} {}",
            check["finding"].as_str().unwrap(),
            check["cure"].as_str().unwrap_or_default()
        );
        let missing: Vec<&&str> = expected
            .iter()
            .filter(|part| !text.contains(**part))
            .collect();
        assert!(missing.is_empty(), "{missing:?} is not in {text}");

        self
    }
}

/// Runs `doctor` with these settings in addition to the database's.
fn doctor(server: &TestServer, settings: &[(&str, &str)]) -> DoctorOutput {
    let environment = [&[("DATABASE_URL", server.database.url.as_str())], settings].concat();
    DoctorOutput::of(&testkit::run(&environment, &["doctor", "--json"], b""))
}

/// Polls until a check has this state: a server records its rejections within seconds.
async fn doctor_until(server: &TestServer, name: &str, state: &str) -> DoctorOutput {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let report = doctor(server, &[]);
        if report.check(name)["state"] == state {
            return report;
        }
        assert!(
            Instant::now() < deadline,
            "{name} is not {state} in {:#?}",
            report.checks
        );
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

fn secrets(text: &str) -> [(&'static str, &str); 1] {
    [("STRIPE_WEBHOOK_SECRET", text)]
}

fn of_invoice(id: &str, invoice: &str) -> Value {
    json!({"id": id, "object": "event", "type": "invoice.paid", "created": 1_769_850_000, "livemode": true,
        "data": {"object": {"id": invoice, "object": "invoice", "status": "paid", "currency": "eur", "amount_due": 5000, "amount_paid": 5000}}})
}

/// Inserts webhooks into the log that were received this many milliseconds ago.
async fn insert_deliveries(server: &TestServer, ago_ms: impl IntoIterator<Item = i64>) {
    let store = Store::connect(&server.database.url).await.unwrap();
    let now_ms = Clock::system().now_ms();
    let events: Vec<_> = ago_ms
        .into_iter()
        .enumerate()
        .map(|(n, ago_ms)| {
            let body = of_invoice(&format!("evt_{n}_{ago_ms}"), "in_1")
                .to_string()
                .into_bytes()
                .into();
            prepare(Delivery {
                body,
                source: Source::Webhook,
                secret_label: Some("live".to_owned()),
                received_ms: now_ms - ago_ms,
            })
        })
        .collect();

    for some in events.chunks(200) {
        store.append(some).await.unwrap();
    }

    store.close().await;
}

const MINUTE_MS: i64 = 60_000;
const HOUR_MS: i64 = 60 * MINUTE_MS;
const DAY_MS: i64 = 24 * HOUR_MS;

each_database! {
    async fn healthy_system_passes_every_check(server: TestServer) {
        let report = doctor(&server, &[]);
        report.assert_findings(&[]);
        assert_eq!(report.code, 0);

        server.store("a", "in_1").await.with_status(201);
        server
            .deliver(&of_invoice("evt_1", "in_1"))
            .await
            .with_status(200);
        let report = doctor(&server, &secrets("live=whsec_world_live"));
        report
            .assert_findings(&[])
            .assert_mentions("deliveries", &["The last webhook was received 0 s ago"]);
        let for_a_person = server.run(&["doctor"]).with_code(0).stdout;

        assert!(
            for_a_person.contains("Nothing is wrong.")
                && for_a_person.contains("ok       database"),
            "{for_a_person}"
        );
        assert_eq!(server.run(&["doctor", "--quiet"]).with_code(0).stdout, "");
    }

    async fn doctor_reports_wrong_schema_and_does_not_migrate(server: TestServer) {
        let empty = server.empty_database();
        let there = Store::connect(&empty.url).await.unwrap();
        there.close().await;
        for _ in 0..2 {
            let output = testkit::run(&[("DATABASE_URL", &empty.url)], &["doctor", "--json"], b"")
                .with_code(4);
            DoctorOutput::of(&output)
                .assert_findings(&[("database", "failing")])
                .assert_mentions("database", &["migrate", "restore the backup"]);
        }

        let text = testkit::run(&[("DATABASE_URL", &empty.url)], &["doctor"], b"")
            .with_code(4)
            .stdout;
        assert!(
            text.contains("FAILING  database") && text.contains("stripe-reconciler migrate"),
            "{text}"
        );

        // A `serve` or another command that creates the file warns that it may not be the intended
        // database.
        let process = Server::start(&empty.url);
        assert!(
            process.log().contains("database has no API key"),
            "{}",
            process.log()
        );

        let output =
            testkit::run(&[("DATABASE_URL", &empty.url)], &["doctor", "--json"], b"").with_code(3);
        DoctorOutput::of(&output)
            .assert_findings(&[("database", "warning")])
            .assert_mentions(
                "database",
                &["no API key", "keys create", "restore the backup"],
            );

        // The migration of a newer version, which this version cannot undo.
        server
            .database
            .execute("update _sqlx_migrations set version = version + 1000")
            .await;
        let report = doctor(&server, &[]);
        report.assert_mentions("database", &["newer version", "Run that version"]);
        assert!(
            !report
                .check("database")
                .to_string()
                .contains("stripe-reconciler migrate")
        );
    }

    async fn read_only_database_is_reported_with_readable_checks(server: TestServer) {
        insert_deliveries(&server, [10 * MINUTE_MS]).await;
        match server.engine {
            Engine::Sqlite => {
                let lock = server.database.lock().await;
                let report = doctor(&server, &[]);
                report
                    .assert_findings(&[("database", "failing")])
                    .assert_mentions("database", &["rejects writes", "locked", "503"]);
                report
                    .assert_mentions("deliveries", &["10 min ago"])
                    .assert_mentions("unmatched", &["has not been read yet"]);
                assert_eq!(report.code, 4);
                lock.release().await;
            }
            Engine::Postgres => {
                let name = server.database.url.rsplit('/').next().unwrap();
                server
                    .database
                    .execute(&format!(
                        "alter database {name} set default_transaction_read_only = on"
                    ))
                    .await;
                let report = doctor(&server, &[]);
                report
                    .assert_findings(&[("database", "failing")])
                    .assert_mentions(
                        "database",
                        &["Readable, but rejects writes", "read-only", "503"],
                    );
                report.assert_mentions("deliveries", &["10 min ago"]);
                assert_eq!(report.code, 4);
            }
        }
    }

    async fn rejected_deliveries_are_reported_before_any_is_accepted(server: TestServer) {
        let lock = server.database.lock().await;
        server
            .deliver(&of_invoice("evt_1", "in_1"))
            .await
            .with_status(503);
        lock.release().await;
        let report = doctor_until(&server, "deliveries", "failing").await;
        report
            .assert_findings(&[("deliveries", "failing")])
            .assert_mentions("deliveries", &["are answered 503", "none was accepted yet"]);
        server.store("a", "in_1").await.with_status(201);
        server
            .deliver(&of_invoice("evt_1", "in_1"))
            .await
            .with_status(200);

        // Move the rejection half a minute into the past.
        server
            .database
            .execute("update moments set at_ms = at_ms - 31000 where name like 'refused%'")
            .await;
        doctor_until(&server, "deliveries", "ok")
            .await
            .assert_findings(&[]);
    }

    async fn delivery_gap_fails_if_same_hours_were_busy_before(server: TestServer) {
        server.store("a", "in_1").await.with_status(201);
        // Every hour of four weeks except the last 30 hours.
        insert_deliveries(&server, (30..28 * 24).map(|hours| hours * HOUR_MS)).await;
        let report = doctor(&server, &[]);
        report.assert_findings(&[("deliveries", "warning")]);
        report.assert_mentions(
            "deliveries",
            &[
                "1.3 days ago",
                "had webhooks in each of the last three weeks",
                "Dashboard",
                "reconcile",
            ],
        );

        assert_eq!(report.code, 3);

        // There were no deliveries at night in the other weeks either.
        let night = server.another().await;
        night.store("a", "in_1").await.with_status(201);
        insert_deliveries(
            &night,
            (5..28 * 24)
                .filter(|hours| hours % 24 >= 5)
                .map(|hours| hours * HOUR_MS),
        )
        .await;
        doctor(&night, &[]).assert_findings(&[]);
    }

    async fn rotated_secrets_are_reported_separately(server: TestServer) {
        server.store("a", "in_1").await.with_status(201);
        let deliver = async |secret: &str, id: &str| {
            let body = of_invoice(id, "in_1").to_string();
            server
                .deliver_signed(
                    &signature(secret, now_s(), body.as_bytes()),
                    body.as_bytes(),
                )
                .await
                .status
                .as_u16()
        };
        assert_eq!(deliver(OLD_SECRET, "evt_1").await, 200);

        let report = doctor(&server, &secrets(BOTH));
        report
            .assert_findings(&[("secrets", "warning")])
            .assert_mentions("secrets", &["`old` (0 s ago", "still sign", "Dashboard"]);
        let report = doctor(
            &server,
            &secrets("live=whsec_world_live,first=whsec_world_old"),
        );
        report.assert_findings(&[]);

        // The log has no trace of a delivery that repeats a known event.
        assert_eq!(deliver(SECRET, "evt_1").await, 200);

        until(&server, "it is noted", |scrape| {
            scrape.value("secret_last_used_timestamp_seconds{label=\"live\"}") > 0.0
        })
        .await;
        doctor(&server, &secrets("live=whsec_world_live,new=whsec_new"))
            .assert_findings(&[("secrets", "warning")])
            .assert_mentions(
                "secrets",
                &["`new` (never)", "compare it with the Dashboard"],
            );
        doctor(
            &server,
            &secrets("live=whsec_world_live,old-2025=whsec_world_older"),
        )
        .assert_findings(&[("secrets", "warning")])
        .assert_mentions("secrets", &["`old-2025` (never)", "Remove"]);

        doctor(&server, &[])
            .assert_findings(&[])
            .assert_mentions("secrets", &["`live` (", "`old` ("]);
    }

    async fn reused_label_does_not_inherit_use_of_old_secret(server: TestServer) {
        server.store("a", "in_1").await.with_status(201);
        let body = of_invoice("evt_1", "in_1").to_string();
        server
            .deliver(&of_invoice("evt_1", "in_1"))
            .await
            .with_status(200);
        let rolled = "live=whsec_rolled,old=whsec_world_live";
        let server = server.with_server(&[("STRIPE_WEBHOOK_SECRET", rolled)]);

        until(
            &server,
            "it is known that nothing is signed with the new one yet",
            |scrape| scrape.value("secret_last_used_timestamp_seconds{label=\"live\"}") == 0.0,
        )
        .await;

        // The secret that signed until now is labelled old and must not be removed yet.
        doctor(&server, &secrets(rolled))
            .assert_findings(&[])
            .assert_mentions("secrets", &["`live` (never)", "`old` (never)"]);
        server
            .deliver_signed(
                &signature(SECRET, now_s(), body.as_bytes()),
                body.as_bytes(),
            )
            .await
            .with_status(200);
        until(&server, "the old one is used", |scrape| {
            scrape.value("secret_last_used_timestamp_seconds{label=\"old\"}") > 0.0
        })
        .await;

        let report = doctor(&server, &secrets(rolled));
        report
            .assert_findings(&[("secrets", "warning")])
            .assert_mentions(
                "secrets",
                &[
                    "`old` (",
                    "still sign",
                    "None is signed with `live` (never)",
                    "compare it",
                ],
            );

        // Stripe signs with the new secret. After a day the old one can be removed.
        server
            .deliver_signed(
                &signature("whsec_rolled", now_s(), body.as_bytes()),
                body.as_bytes(),
            )
            .await
            .with_status(200);
        until(&server, "the new one is used", |scrape| {
            scrape.value("secret_last_used_timestamp_seconds{label=\"live\"}") > 0.0
        })
        .await;
        server
            .database
            .execute(&format!(
                "update moments set at_ms = at_ms - {} where name like '%old%'",
                26 * HOUR_MS
            ))
            .await;

        doctor(&server, &secrets(rolled))
            .assert_findings(&[("secrets", "warning")])
            .assert_mentions("secrets", &["`old` (1.1 days ago", "Remove"]);
    }

    async fn secret_rolled_only_at_stripe_is_reported(server: TestServer) {
        server.store("a", "in_1").await.with_status(201);
        insert_deliveries(&server, [HOUR_MS]).await;
        let body = of_invoice("evt_rolled", "in_1").to_string();
        server
            .deliver_signed(
                &signature("whsec_rolled", now_s(), body.as_bytes()),
                body.as_bytes(),
            )
            .await
            .with_status(400);
        let report = doctor_until(&server, "signatures", "failing").await;
        report.assert_findings(&[("signatures", "failing")]);
        report.assert_mentions(
            "signatures",
            &[
                "no configured secret",
                "1.0 hours ago",
                "STRIPE_WEBHOOK_SECRET",
                "rolled",
            ],
        );

        server
            .deliver(&of_invoice("evt_right", "in_1"))
            .await
            .with_status(200);
        doctor(&server, &[])
            .assert_findings(&[])
            .assert_mentions("signatures", &["Others were rejected"]);
        server
            .deliver_signed(
                &signature(SECRET, now_s() + 1000, body.as_bytes()),
                body.as_bytes(),
            )
            .await
            .with_status(400);

        doctor_until(&server, "signatures", "warning")
            .await
            .assert_findings(&[("signatures", "warning")])
            .assert_mentions("signatures", &["clock is behind", "NTP"]);

        // Wrong in the other way: the last problem is reported.
        server
            .database
            .execute("update moments set at_ms = at_ms - 60000 where name = 'refused future'")
            .await;
        server
            .deliver_signed(
                &signature(SECRET, now_s() - 1000, body.as_bytes()),
                body.as_bytes(),
            )
            .await
            .with_status(400);
        until(&server, "it is noted", |_| {
            doctor(&server, &[])
                .check("signatures")
                .to_string()
                .contains("clock is ahead")
        })
        .await;

        // Move the rejection before the last accepted delivery, as a clock change would.
        server
            .database
            .execute("update moments set at_ms = at_ms - 660000 where name like 'refused %'")
            .await;
        doctor(&server, &[]).assert_findings(&[]);
    }

    async fn aged_unmatched_and_unreadable_events_are_reported(server: TestServer) {
        insert_deliveries(&server, [10 * MINUTE_MS]).await;
        doctor(&server, &[])
            .assert_findings(&[])
            .assert_mentions("unmatched", &["1 event", "1 invoice", "10 min ago"]);
        let server = server.another().await;
        insert_deliveries(&server, [20 * MINUTE_MS, 10 * MINUTE_MS, 3 * HOUR_MS]).await;
        let report = doctor(&server, &[]);

        report
            .assert_findings(&[("unmatched", "warning")])
            .assert_mentions(
                "unmatched",
                &["3 events", "1 invoice", "3.0 hours ago", "invoices import"],
            );
        server.store("a", "in_1").await.with_status(201);
        doctor(&server, &[]).assert_findings(&[]);
        server.deliver_bytes(b"no json").await.with_status(200);
        doctor(&server, &[])
            .assert_findings(&[("unreadable", "warning")])
            .assert_mentions(
                "unreadable",
                &["1 event", "events list --outcome unreadable", "rebuild"],
            );

        // All that an operator can do about these events is to read them.
        server
            .database
            .execute(&format!(
                "update events set received_ms = received_ms - {} where outcome = 'unreadable'",
                30 * DAY_MS
            ))
            .await;
        doctor(&server, &[]).assert_findings(&[]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unreachable_database_leaves_other_checks_running() {
    let process = Arc::new(PostgresServer::start_durable("-c fsync=on", &[]));
    let server = TestServer::on(Database::create_on(&process)).await;
    let stripe = Stripe::start();
    stripe.register(Endpoint::enabled(&format!(
        "{}/webhooks/stripe",
        server.process.base
    )));
    block_in_place(|| process.stop_immediately());
    let report = doctor(&server, &stripe.settings());

    assert_eq!(report.code, 4);

    report
        .assert_findings(&[("database", "failing")])
        .assert_mentions("database", &["cannot be reached", "503", "DATABASE_URL"]);
    report
        .assert_mentions("endpoint", &["It is enabled"])
        .assert_mentions("clock", &["It agrees with Stripe's"]);
    block_in_place(|| process.restart());
    assert_eq!(
        doctor(&server, &stripe.settings()).check("database")["state"],
        "ok"
    );
}

#[test]
fn missing_file_is_reported_and_not_created() {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("sqlite://{}/no.db", folder.path().display());
    let output = testkit::run(&[("DATABASE_URL", &url)], &["doctor", "--json"], b"").with_code(4);
    DoctorOutput::of(&output)
        .assert_findings(&[("database", "failing")])
        .assert_mentions("database", &["no.db", "DATABASE_URL"]);

    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);

    let unfit = testkit::run(
        &[("DATABASE_URL", &url), ("STRIPE_WEBHOOK_SECRET", "a=x,a=y")],
        &["doctor"],
        b"",
    )
    .with_code(2);
    assert!(unfit.stderr.contains("STRIPE_WEBHOOK_SECRET"), "{unfit:?}");
}

#[tokio::test]
async fn database_file_readable_by_all_is_reported() {
    let server = TestServer::start(Engine::Sqlite).await;
    let set_mode = |mode| {
        let path = server.database.url.strip_prefix("sqlite://").unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    doctor(&server, &[]).assert_findings(&[]);

    set_mode(0o644);
    doctor(&server, &[])
        .assert_findings(&[("database", "warning")])
        .assert_mentions("database", &["mode 644", "chmod 600"]);
    let log = server.another_server().log();
    assert!(
        log.contains("every user of this machine can read the database file"),
        "{log}"
    );

    set_mode(0o640);
    doctor(&server, &[]).assert_findings(&[]);
}
