//! `doctor`, as the person on call meets it: things are broken one by one, and it says which, and what to do.

mod stripe;

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

/// What it says, by the names of its checks.
struct DoctorOutput {
    code: i32,
    checks: Vec<Value>,
    state: String,
}

impl DoctorOutput {
    #[track_caller]
    fn of(ran: &CommandOutput) -> DoctorOutput {
        let said = ran.json();
        let checks = said["checks"].as_array().unwrap().clone();
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
            code: ran.code,
            checks,
            state: said["state"].as_str().unwrap().to_owned(),
        }
    }

    fn check(&self, name: &str) -> &Value {
        self.checks
            .iter()
            .find(|check| check["name"] == name)
            .unwrap_or_else(|| panic!("{name} is not in {:#?}", self.checks))
    }

    /// That only these are wrong, and so.
    #[track_caller]
    fn assert_wrong(&self, wrong: &[(&str, &str)]) -> &DoctorOutput {
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

    /// That a check says all of this, in what it found or in its cure.
    #[track_caller]
    fn assert_says(&self, name: &str, words: &[&str]) -> &DoctorOutput {
        let check = self.check(name);
        let text = format!(
            "{} {}",
            check["finding"].as_str().unwrap(),
            check["cure"].as_str().unwrap_or_default()
        );
        let missing: Vec<&&str> = words.iter().filter(|word| !text.contains(**word)).collect();
        assert!(missing.is_empty(), "{missing:?} is not in {text}");
        self
    }
}

/// With these settings beside the database's.
fn doctor(server: &TestServer, settings: &[(&str, &str)]) -> DoctorOutput {
    let environment = [&[("DATABASE_URL", server.database.url.as_str())], settings].concat();
    DoctorOutput::of(&testkit::run(&environment, &["doctor", "--json"], b""))
}

/// Asks until a check is so: a server notes what it refused within some seconds.
async fn doctor_until(server: &TestServer, name: &str, state: &str) -> DoctorOutput {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let said = doctor(server, &[]);
        if said.check(name)["state"] == state {
            return said;
        }
        assert!(
            Instant::now() < deadline,
            "{name} is not {state} in {:#?}",
            said.checks
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

/// Puts webhooks into the log that came so many milliseconds ago.
async fn came(server: &TestServer, ago_ms: impl IntoIterator<Item = i64>) {
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
    async fn when_nothing_is_wrong_it_says_so(server: TestServer) {
        let said = doctor(&server, &[]);
        said.assert_wrong(&[]);
        assert_eq!(said.code, 0);
        server.store("a", "in_1").await.with_status(201);
        server.deliver(&of_invoice("evt_1", "in_1")).await.with_status(200);
        let said = doctor(&server, &secrets("live=whsec_world_live"));
        said.assert_wrong(&[]).assert_says("deliveries", &["The last webhook was received 0 s ago"]);
        let for_a_person = server.run(&["doctor"]).with_code(0).stdout;
        assert!(for_a_person.contains("Nothing is wrong.") && for_a_person.contains("ok       database"), "{for_a_person}");
        assert_eq!(server.run(&["doctor", "--quiet"]).with_code(0).stdout, "");
    }

    async fn a_database_that_is_not_migrated_or_by_a_newer_version_is_said_and_not_migrated(server: TestServer) {
        let empty = server.empty_database();
        let there = Store::connect(&empty.url).await.unwrap();
        there.close().await;
        for _ in 0..2 {
            let ran = testkit::run(&[("DATABASE_URL", &empty.url)], &["doctor", "--json"], b"").with_code(4);
            DoctorOutput::of(&ran).assert_wrong(&[("database", "failing")]).assert_says("database", &["migrate", "restore the backup"]);
        }
        let text = testkit::run(&[("DATABASE_URL", &empty.url)], &["doctor"], b"").with_code(4).stdout;
        assert!(text.contains("FAILING  database") && text.contains("stripe-reconciler migrate"), "{text}");
        // Whoever does that all the same, or starts `serve`, is told again that this may not be what was there.
        let process = Server::start(&empty.url);
        assert!(process.log().contains("the database holds no API key"), "{}", process.log());
        let ran = testkit::run(&[("DATABASE_URL", &empty.url)], &["doctor", "--json"], b"").with_code(3);
        DoctorOutput::of(&ran).assert_wrong(&[("database", "warning")]).assert_says("database", &["no API key", "keys create", "restore the backup"]);
        // What a newer version has migrated, this one cannot.
        server.database.execute("update _sqlx_migrations set version = version + 1000").await;
        let said = doctor(&server, &[]);
        said.assert_says("database", &["newer version", "Run that version"]);
        assert!(!said.check("database").to_string().contains("stripe-reconciler migrate"));
    }

    async fn a_database_that_takes_nothing_is_said_with_what_can_be_read(server: TestServer) {
        came(&server, [10 * MINUTE_MS]).await;
        match server.engine {
            Engine::Sqlite => {
                let held = server.database.hold().await;
                let said = doctor(&server, &[]);
                said.assert_wrong(&[("database", "failing")]).assert_says("database", &["rejects writes", "locked", "503"]);
                said.assert_says("deliveries", &["10 min ago"]).assert_says("unmatched", &["has not been read yet"]);
                assert_eq!(said.code, 4);
                held.release().await;
            }
            Engine::Postgres => {
                let name = server.database.url.rsplit('/').next().unwrap();
                server.database.execute(&format!("alter database {name} set default_transaction_read_only = on")).await;
                let said = doctor(&server, &[]);
                said.assert_wrong(&[("database", "failing")]).assert_says("database", &["Readable, but rejects writes", "read-only", "503"]);
                said.assert_says("deliveries", &["10 min ago"]);
                assert_eq!(said.code, 4);
            }
        }
    }

    async fn deliveries_that_are_answered_503_are_said_before_any_was_accepted(server: TestServer) {
        let held = server.database.hold().await;
        server.deliver(&of_invoice("evt_1", "in_1")).await.with_status(503);
        held.release().await;
        let said = doctor_until(&server, "deliveries", "failing").await;
        said.assert_wrong(&[("deliveries", "failing")]).assert_says("deliveries", &["are answered 503", "none was accepted yet"]);
        server.store("a", "in_1").await.with_status(201);
        server.deliver(&of_invoice("evt_1", "in_1")).await.with_status(200);
        // As if it had been refused half a minute before.
        server.database.execute("update moments set at_ms = at_ms - 31000 where name like 'refused%'").await;
        doctor_until(&server, "deliveries", "ok").await.assert_wrong(&[]);
    }

    async fn a_silence_is_wrong_when_the_same_hours_were_busy_in_the_weeks_before(server: TestServer) {
        server.store("a", "in_1").await.with_status(201);
        // Every hour of four weeks, but for the last 30 hours.
        came(&server, (30..28 * 24).map(|hours| hours * HOUR_MS)).await;
        let said = doctor(&server, &[]);
        said.assert_wrong(&[("deliveries", "warning")]);
        said.assert_says("deliveries", &["1.3 days ago", "had webhooks in each of the last three weeks", "Dashboard", "reconcile"]);
        assert_eq!(said.code, 3);
        // By night there were none in the other weeks, either.
        let night = server.another().await;
        night.store("a", "in_1").await.with_status(201);
        came(&night, (5..28 * 24).filter(|hours| hours % 24 >= 5).map(|hours| hours * HOUR_MS)).await;
        doctor(&night, &[]).assert_wrong(&[]);
    }

    async fn secrets_that_were_rotated_are_told_apart(server: TestServer) {
        server.store("a", "in_1").await.with_status(201);
        let deliver = async |secret: &str, id: &str| {
            let body = of_invoice(id, "in_1").to_string();
            server.deliver_signed(&signature(secret, now_s(), body.as_bytes()), body.as_bytes()).await.status.as_u16()
        };
        assert_eq!(deliver(OLD_SECRET, "evt_1").await, 200);
        let said = doctor(&server, &secrets(BOTH));
        said.assert_wrong(&[("secrets", "warning")]).assert_says("secrets", &["`old` (0 s ago", "still sign", "Dashboard"]);
        let said = doctor(&server, &secrets("live=whsec_world_live,first=whsec_world_old"));
        said.assert_wrong(&[]);
        // Nothing in the log tells of a delivery that brings what is known.
        assert_eq!(deliver(SECRET, "evt_1").await, 200);
        until(&server, "it is noted", |scrape| scrape.value("secret_last_used_timestamp_seconds{label=\"live\"}") > 0.0).await;
        doctor(&server, &secrets("live=whsec_world_live,new=whsec_new"))
            .assert_wrong(&[("secrets", "warning")])
            .assert_says("secrets", &["`new` (never)", "compare it with the Dashboard"]);
        doctor(&server, &secrets("live=whsec_world_live,old-2025=whsec_world_older"))
            .assert_wrong(&[("secrets", "warning")])
            .assert_says("secrets", &["`old-2025` (never)", "Remove"]);
        doctor(&server, &[]).assert_wrong(&[]).assert_says("secrets", &["`live` (", "`old` ("]);
    }

    async fn a_label_that_names_another_secret_now_does_not_speak_for_the_one_before(server: TestServer) {
        server.store("a", "in_1").await.with_status(201);
        let body = of_invoice("evt_1", "in_1").to_string();
        server.deliver(&of_invoice("evt_1", "in_1")).await.with_status(200);
        let rolled = "live=whsec_rolled,old=whsec_world_live";
        let server = server.with_server(&[("STRIPE_WEBHOOK_SECRET", rolled)]);
        until(&server, "it is known that nothing is signed with the new one yet", |scrape| scrape.value("secret_last_used_timestamp_seconds{label=\"live\"}") == 0.0).await;
        // What signed until now is called old: it may not go yet.
        doctor(&server, &secrets(rolled)).assert_wrong(&[]).assert_says("secrets", &["`live` (never)", "`old` (never)"]);
        server.deliver_signed(&signature(SECRET, now_s(), body.as_bytes()), body.as_bytes()).await.with_status(200);
        until(&server, "the old one is used", |scrape| scrape.value("secret_last_used_timestamp_seconds{label=\"old\"}") > 0.0).await;
        let said = doctor(&server, &secrets(rolled));
        said.assert_wrong(&[("secrets", "warning")]).assert_says("secrets", &["`old` (", "still sign", "None is signed with `live` (never)", "compare it"]);
        // Stripe signs with the new one; after a day, the old one can go.
        server.deliver_signed(&signature("whsec_rolled", now_s(), body.as_bytes()), body.as_bytes()).await.with_status(200);
        until(&server, "the new one is used", |scrape| scrape.value("secret_last_used_timestamp_seconds{label=\"live\"}") > 0.0).await;
        server.database.execute(&format!("update moments set at_ms = at_ms - {} where name like '%old%'", 26 * HOUR_MS)).await;
        doctor(&server, &secrets(rolled)).assert_wrong(&[("secrets", "warning")]).assert_says("secrets", &["`old` (1.1 days ago", "Remove"]);
    }

    async fn a_secret_that_was_rolled_without_us_is_said(server: TestServer) {
        server.store("a", "in_1").await.with_status(201);
        came(&server, [HOUR_MS]).await;
        let body = of_invoice("evt_rolled", "in_1").to_string();
        server.deliver_signed(&signature("whsec_rolled", now_s(), body.as_bytes()), body.as_bytes()).await.with_status(400);
        let said = doctor_until(&server, "signatures", "failing").await;
        said.assert_wrong(&[("signatures", "failing")]);
        said.assert_says("signatures", &["no configured secret", "1.0 hours ago", "STRIPE_WEBHOOK_SECRET", "rolled"]);
        server.deliver(&of_invoice("evt_right", "in_1")).await.with_status(200);
        doctor(&server, &[]).assert_wrong(&[]).assert_says("signatures", &["Others were rejected"]);
        server.deliver_signed(&signature(SECRET, now_s() + 1000, body.as_bytes()), body.as_bytes()).await.with_status(400);
        doctor_until(&server, "signatures", "warning").await.assert_wrong(&[("signatures", "warning")]).assert_says("signatures", &["clock is behind", "NTP"]);
        // Set wrong the other way: what is said is of the last.
        server.database.execute("update moments set at_ms = at_ms - 60000 where name = 'refused future'").await;
        server.deliver_signed(&signature(SECRET, now_s() - 1000, body.as_bytes()), body.as_bytes()).await.with_status(400);
        until(&server, "it is noted", |_| doctor(&server, &[]).check("signatures").to_string().contains("clock is ahead")).await;
        // The clock was set: as if that had been some time before the last that was accepted.
        server.database.execute("update moments set at_ms = at_ms - 660000 where name like 'refused %'").await;
        doctor(&server, &[]).assert_wrong(&[]);
    }

    async fn what_waits_for_its_invoice_is_wrong_when_it_ages_and_what_cannot_be_read_is(server: TestServer) {
        came(&server, [10 * MINUTE_MS]).await;
        doctor(&server, &[]).assert_wrong(&[]).assert_says("unmatched", &["1 event", "1 invoice", "10 min ago"]);
        let server = server.another().await;
        came(&server, [20 * MINUTE_MS, 10 * MINUTE_MS, 3 * HOUR_MS]).await;
        let said = doctor(&server, &[]);
        said.assert_wrong(&[("unmatched", "warning")]).assert_says("unmatched", &["3 events", "1 invoice", "3.0 hours ago", "invoices import"]);
        server.store("a", "in_1").await.with_status(201);
        doctor(&server, &[]).assert_wrong(&[]);
        server.deliver_bytes(b"no json").await.with_status(200);
        doctor(&server, &[]).assert_wrong(&[("unreadable", "warning")]).assert_says("unreadable", &["1 event", "events list --outcome unreadable", "rebuild"]);
        // Nobody can do more about it than to look at it.
        server.database.execute(&format!("update events set received_ms = received_ms - {} where outcome = 'unreadable'", 30 * DAY_MS)).await;
        doctor(&server, &[]).assert_wrong(&[]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_is_away_is_said_and_what_can_be_told_without_it() {
    let process = Arc::new(PostgresServer::of_its_own("-c fsync=on", &[]));
    let server = TestServer::on(Database::create_on(&process)).await;
    let stripe = Stripe::start();
    stripe.register(Endpoint::enabled(&format!(
        "{}/webhooks/stripe",
        server.process.base
    )));
    block_in_place(|| process.stop_at_once());
    let said = doctor(&server, &stripe.settings());
    assert_eq!(said.code, 4);
    said.assert_wrong(&[("database", "failing")])
        .assert_says("database", &["cannot be reached", "503", "DATABASE_URL"]);
    said.assert_says("endpoint", &["It is enabled"])
        .assert_says("clock", &["It agrees with Stripe's"]);
    block_in_place(|| process.start_again());
    assert_eq!(
        doctor(&server, &stripe.settings()).check("database")["state"],
        "ok"
    );
}

#[test]
fn a_file_that_is_not_there_is_said_and_not_made() {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("sqlite://{}/no.db", folder.path().display());
    let ran = testkit::run(&[("DATABASE_URL", &url)], &["doctor", "--json"], b"").with_code(4);
    DoctorOutput::of(&ran)
        .assert_wrong(&[("database", "failing")])
        .assert_says("database", &["no.db", "DATABASE_URL"]);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    let unfit = testkit::run(
        &[("DATABASE_URL", &url), ("STRIPE_WEBHOOK_SECRET", "a=x,a=y")],
        &["doctor"],
        b"",
    )
    .with_code(2);
    assert!(unfit.stderr.contains("STRIPE_WEBHOOK_SECRET"), "{unfit:?}");
}
