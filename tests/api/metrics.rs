//! `/metrics` as Prometheus and an operator see it, and the deployed alerts and dashboard compared
//! with the exported metrics.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stripe_reconciler::clock::Clock;
use tokio::task::block_in_place;

use testkit::each_database;
use testkit::stripe::{CLOVER, DAY, Endpoint, HOUR, LIVE_KEY, Stripe, Terms};
use testkit::{
    Answer, Database, Engine, OLD_SECRET, PostgresServer, SECRET, Server, TestServer, Wire, client,
    invoice_path, send, signature,
};

/// Maximum age of database metrics, with time for a busy machine.
const TIMEOUT: Duration = Duration::from_secs(30);
const A_MOMENT: Duration = Duration::from_millis(100);
const PREFIX: &str = "stripe_reconciler_";
const SIGNED_AT: &str = "Stripe-Signature";

/// All series of a scrape by their text: `name{label="value"}`.
#[derive(Debug)]
pub struct Scrape(BTreeMap<String, f64>);

impl Scrape {
    #[track_caller]
    pub fn read(answer: Answer) -> Scrape {
        let answer = answer.with_status(200);
        assert!(
            answer
                .header("content-type")
                .starts_with("text/plain; version=0.0.4"),
            "{answer:?}"
        );

        let text = std::str::from_utf8(&answer.body).unwrap();
        let series = text
            .lines()
            .filter(|line| !line.starts_with('#'))
            .map(|line| {
                let (name, value) = line.rsplit_once(' ').unwrap();
                (name.to_owned(), value.parse().unwrap())
            });
        Scrape(series.collect())
    }

    pub async fn of(server: &TestServer) -> Scrape {
        Scrape::read(server.get("/metrics", &server.operator_key).await)
    }

    /// Returns the value of one of our series.
    #[track_caller]
    pub fn value(&self, series: &str) -> f64 {
        *self
            .0
            .get(&format!("{PREFIX}{series}"))
            .unwrap_or_else(|| panic!("there is no {series} in {:#?}", self.0))
    }

    /// Returns the names without labels.
    fn names(&self) -> BTreeSet<&str> {
        self.0
            .keys()
            .map(|series| series.split('{').next().unwrap())
            .collect()
    }

    fn family(&self, name: &str) -> BTreeMap<&str, f64> {
        let start = format!("{PREFIX}{name}{{");
        self.0
            .iter()
            .filter_map(|(series, value)| {
                Some((series.strip_prefix(&start)?.trim_end_matches('}'), *value))
            })
            .collect()
    }
}

/// Scrapes until the condition holds.
pub async fn until(
    server: &TestServer,
    what: &str,
    condition_holds: impl Fn(&Scrape) -> bool,
) -> Scrape {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let scrape = Scrape::of(server).await;
        if condition_holds(&scrape) {
            return scrape;
        }
        assert!(Instant::now() < deadline, "{what}: {scrape:#?}");
        tokio::time::sleep(A_MOMENT).await;
    }
}

fn now_s() -> i64 {
    Clock::system().now_s()
}

fn paid(id: &str, livemode: bool) -> Value {
    json!({"id": id, "object": "event", "type": "invoice.paid", "created": 1_769_850_000, "livemode": livemode,
        "data": {"object": {"id": "in_1", "object": "invoice", "status": "paid", "currency": "eur", "amount_due": 5000, "amount_paid": 5000}}})
}

/// Returns an event that asserts nothing about a payment.
fn customer(id: &str, livemode: bool) -> Value {
    json!({"id": id, "object": "event", "type": "customer.updated", "created": 1_769_850_000, "livemode": livemode,
        "data": {"object": {"id": "cus_1", "object": "customer"}}})
}

async fn deliver(server: &TestServer, secret: &str, at_s: i64, body: &str) -> u16 {
    server
        .deliver_signed(&signature(secret, at_s, body.as_bytes()), body.as_bytes())
        .await
        .status
        .as_u16()
}

async fn another(process: &Server, path: &str, headers: &[(&str, &str)]) -> Answer {
    send(
        &client(),
        "GET",
        &format!("{}{path}", process.base),
        headers,
        vec![],
    )
    .await
}

each_database! {
    async fn every_delivery_is_counted_once_by_outcome(server: TestServer) {
        let start = Scrape::of(&server).await;
        assert_eq!(start.family("deliveries_total").len(), 4);
        assert_eq!(start.family("rejected_total").len(), 14);
        assert!(
            start
                .family("deliveries_total")
                .values()
                .chain(start.family("rejected_total").values())
                .all(|count| *count == 0.0)
        );

        let (body, now) = (paid("evt_1", true).to_string(), now_s());
        assert_eq!(deliver(&server, SECRET, now, &body).await, 200);
        assert_eq!(deliver(&server, SECRET, now, &body).await, 200);
        assert_eq!(
            deliver(&server, SECRET, now, &customer("evt_2", true).to_string()).await,
            200
        );
        assert_eq!(deliver(&server, SECRET, now, "no json").await, 200);
        assert_eq!(deliver(&server, "whsec_other", now, &body).await, 400);
        assert_eq!(deliver(&server, SECRET, now - 400, &body).await, 400);
        assert_eq!(deliver(&server, SECRET, now + 400, &body).await, 400);
        server
            .deliver_signed("t=1", body.as_bytes())
            .await
            .with_status(400);
        let signed = signature(SECRET, now, body.as_bytes());
        server
            .send("POST", "/webhooks/stripe", &[], body.clone().into())
            .await
            .with_status(400);
        server
            .send(
                "POST",
                "/webhooks/stripe",
                &[(SIGNED_AT, &signed), (SIGNED_AT, &signed)],
                body.clone().into(),
            )
            .await
            .with_status(400);
        server
            .deliver_bytes(&vec![b' '; 2 << 20])
            .await
            .with_status(413);
        let mut cut_short = Wire::connect(server.process.authority()).await;
        let head = format!(
            "POST /webhooks/stripe HTTP/1.1\r\nHost: x\r\n{SIGNED_AT}: {signed}\r\nContent-Length: 100\r\n\r\nonly this"
        );
        cut_short.write(head.as_bytes()).await;
        cut_short.hang_up().await;
        cut_short.read_to_end().await;

        let scrape = until(&server, "all are counted", |scrape| {
            scrape.family("rejected_total").values().sum::<f64>() == 8.0
        })
        .await;
        let once = BTreeMap::from_iter(
            ["recorded", "duplicate", "no_payment_fact", "unreadable"]
                .map(|outcome| (format!("outcome=\"{outcome}\""), 1.0)),
        );
        assert_eq!(
            scrape.family("deliveries_total"),
            once.iter()
                .map(|(outcome, count)| (outcome.as_str(), *count))
                .collect()
        );
        for reason in [
            "missing",
            "several",
            "malformed",
            "mismatch",
            "stale",
            "future",
            "too_large",
            "incomplete",
        ] {
            assert_eq!(
                scrape.value(&format!("rejected_total{{reason=\"{reason}\"}}")),
                1.0,
                "{reason}"
            );
        }
        assert_eq!(
            scrape.value("ack_seconds_count"),
            4.0,
            "what was refused is not acknowledged"
        );
        assert_eq!(
            (
                scrape.value("commit_seconds_count"),
                scrape.value("batch_size_sum")
            ),
            (4.0, 4.0)
        );
        assert!(
            scrape.value("ack_seconds_sum") >= scrape.value("commit_seconds_sum"),
            "{scrape:?}"
        );
        assert_eq!(
            (scrape.value("queue_depth"), scrape.value("queue_capacity")),
            (0.0, 1024.0)
        );
    }

    async fn reads_are_counted_by_route_without_customer_labels(server: TestServer) {
        server.store("inv-a", "in_1").await.with_status(201);
        server
            .get(&invoice_path("inv-a"), &server.acme_key)
            .await
            .with_status(200);
        server
            .send(
                "HEAD",
                &invoice_path("inv-a"),
                &[("ApiKey", &server.acme_key)],
                vec![],
            )
            .await
            .with_status(200);

        server
            .get(&invoice_path("inv-b"), &server.acme_key)
            .await
            .with_status(404);
        server
            .get(&invoice_path("inv-a"), "nobody")
            .await
            .with_status(401);
        server
            .get("/v1/tenants/acme/invoices", &server.acme_key)
            .await
            .with_status(200);
        let tag = server
            .get(&invoice_path("inv-a"), &server.acme_key)
            .await
            .header("etag")
            .to_owned();

        server
            .send(
                "GET",
                &invoice_path("inv-a"),
                &[("ApiKey", &server.acme_key), ("If-None-Match", &tag)],
                vec![],
            )
            .await
            .with_status(304);
        let scrape = Scrape::of(&server).await;
        let invoice = "reads_total{route=\"/v1/tenants/{tenantUid}/invoices/{invoiceUid}\",status=";

        for (status, count) in [("200", 3.0), ("404", 1.0), ("401", 1.0), ("304", 1.0)] {
            assert_eq!(
                scrape.value(&format!("{invoice}\"{status}\"}}")),
                count,
                "{status}"
            );
        }

        assert_eq!(
            scrape.value("read_seconds_count"),
            7.0,
            "what is written is no read, and neither is a scrape"
        );
        assert!(
            !format!("{scrape:?}").contains("acme") && !format!("{scrape:?}").contains("inv-a")
        );
    }

    async fn metrics_need_operator_key_or_their_own_listener(server: TestServer) {
        server
            .get("/metrics", "")
            .await
            .with_error(401, "Unauthorized");
        server
            .get("/metrics", &server.acme_key)
            .await
            .with_error(403, "Forbidden");
        server
            .send(
                "GET",
                "/metrics",
                &[("Authorization", &format!("Bearer {}", server.operator_key))],
                vec![],
            )
            .await
            .with_status(200);
        server
            .send(
                "POST",
                "/metrics",
                &[("ApiKey", &server.operator_key)],
                vec![],
            )
            .await
            .with_error(405, "MethodNotAllowed");

        let address = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .to_string();
        let environment = [
            ("DATABASE_URL", server.database.url.as_str()),
            ("STRIPE_WEBHOOK_SECRET", SECRET),
            ("METRICS_ADDR", &address),
        ];
        let process = Server::start_with(&environment);
        another(&process, "/metrics", &[("ApiKey", &server.operator_key)])
            .await
            .with_error(404, "ResourceNotFound");
        let apart = async |path: &str| {
            send(
                &client(),
                "GET",
                &format!("http://{address}{path}"),
                &[],
                vec![],
            )
            .await
        };
        assert_eq!(
            Scrape::read(apart("/metrics").await).value("database_up"),
            1.0
        );
        for path in ["/", "/readyz", "/v1/tenants/acme/invoices"] {
            apart(path).await.with_error(404, "ResourceNotFound");
        }
        let taken = testkit::run(
            &environment,
            &["serve", "--listen-addr", "127.0.0.1:0"],
            b"",
        )
        .with_code(2);
        assert!(taken.stderr.contains(&address), "{taken:?}");
    }

    async fn log_metrics_agree_across_replicas_and_restarts(server: TestServer) {
        let mut server = server;
        let before = now_s() as f64;
        assert_eq!(
            deliver(
                &server,
                OLD_SECRET,
                now_s(),
                &paid("evt_1", true).to_string()
            )
            .await,
            200
        );
        assert_eq!(
            deliver(
                &server,
                SECRET,
                now_s(),
                &customer("evt_2", false).to_string()
            )
            .await,
            200
        );
        let exported = |scrape: &Scrape| {
            let names = [
                "last_delivery_timestamp_seconds{mode=\"live\"}",
                "last_delivery_timestamp_seconds{mode=\"test\"}",
                "secret_last_used_timestamp_seconds{label=\"live\"}",
                "secret_last_used_timestamp_seconds{label=\"old\"}",
                "events_without_invoice",
                "unreadable_events",
            ];
            names.map(|name| scrape.value(name))
        };
        let scrape = until(&server, "both are seen", |scrape| {
            exported(scrape)[..5].iter().all(|value| *value > 0.0)
        })
        .await;
        let seen = exported(&scrape);
        assert!(
            seen[..4]
                .iter()
                .all(|at| (before..=before + 60.0).contains(at)),
            "{seen:?}"
        );
        assert_eq!(scrape.value("events_without_invoice"), 1.0);

        let replica = server.another_server();
        let elsewhere =
            Scrape::read(another(&replica, "/metrics", &[("ApiKey", &server.operator_key)]).await);
        assert_eq!(exported(&elsewhere), seen);
        assert_eq!(
            elsewhere.value("deliveries_total{outcome=\"recorded\"}"),
            0.0,
            "it counts its own"
        );
        server.process.sigkill();
        server.process = server.another_server();
        assert_eq!(exported(&Scrape::of(&server).await), seen);
        let environment = [
            ("DATABASE_URL", server.database.url.as_str()),
            ("STRIPE_WEBHOOK_SECRET", "new=whsec_new"),
        ];
        let rotated = Server::start_with(&environment);
        let rotated =
            Scrape::read(another(&rotated, "/metrics", &[("ApiKey", &server.operator_key)]).await);
        assert_eq!(
            rotated.family("secret_last_used_timestamp_seconds"),
            BTreeMap::from([("label=\"new\"", 0.0)])
        );
    }

    async fn unmatched_and_unreadable_events_are_counted(server: TestServer) {
        server.deliver(&paid("evt_1", true)).await.with_status(200);
        server.deliver(&paid("evt_2", true)).await.with_status(200);
        server.deliver_bytes(b"no json").await.with_status(200);
        let waiting = until(&server, "they wait", |scrape| {
            scrape.value("events_without_invoice") == 2.0
        })
        .await;

        assert_eq!(waiting.value("unreadable_events"), 1.0);

        until(&server, "they age", |scrape| {
            scrape.value("oldest_event_without_invoice_age_seconds") > 0.5
        })
        .await;
        server.store("a", "in_1").await.with_status(201);
        let none = until(&server, "it is stored", |scrape| {
            scrape.value("events_without_invoice") == 0.0
        })
        .await;
        assert_eq!(none.value("oldest_event_without_invoice_age_seconds"), 0.0);

        server.deliver(&paid("evt_3", true)).await.with_status(200);
        until(&server, "it is seen", |scrape| {
            scrape.value("deliveries_total{outcome=\"recorded\"}") == 3.0
        })
        .await;
        assert_eq!(
            Scrape::of(&server).await.value("events_without_invoice"),
            0.0
        );
    }

    async fn runs_and_their_findings_are_exported(server: TestServer) {
        let mut server = server;
        let stripe = Stripe::start();
        stripe.register(Endpoint {
            status: "disabled",
            ..Endpoint::enabled(&format!("{}/webhooks/stripe", server.process.base))
        });
        let mut life = stripe.draft(Terms::automatic(now_s() - DAY, CLOVER));
        life.later(HOUR).finalized();
        let url = server.database.url.clone();
        let with_key = |key: &str| {
            let environment = [
                ("DATABASE_URL", url.as_str()),
                ("STRIPE_WEBHOOK_SECRET", SECRET),
                ("STRIPE_API_BASE", &stripe.base),
                ("STRIPE_API_KEY", key),
            ];
            Server::start_with(&environment)
        };

        server.process = with_key(LIVE_KEY);
        let found = until(&server, "a pass ends", |scrape| {
            scrape.value("reconcile_endpoint_remarks") == 1.0
        })
        .await;
        assert_eq!(found.value("reconcile_enabled"), 1.0);
        assert_eq!(found.value("reconcile_runs_total{result=\"agrees\"}"), 1.0);
        assert!(found.value("reconcile_api_calls_total") >= 2.0, "{found:?}");

        let listed = stripe.events();
        let need_not_be_sent = listed
            .iter()
            .filter(|event| ["invoice.created", "payment_intent.created"].contains(&event.kind))
            .count();
        assert!(need_not_be_sent > 0, "it tells them apart");
        assert_eq!(
            found.value("reconcile_api_only_events_total"),
            (listed.len() - need_not_be_sent) as f64
        );
        assert!(
            found.value("reconcile_last_success_age_seconds") < 60.0,
            "{found:?}"
        );

        assert!(
            (found.value("reconcile_last_success_timestamp_seconds") - now_s() as f64).abs() < 60.0,
            "{found:?}"
        );

        server.process = with_key("sk_live_of_somebody_else");
        let failed = until(&server, "a pass fails", |scrape| {
            scrape.value("reconcile_runs_total{result=\"failed\"}") >= 1.0
        })
        .await;
        assert_eq!(
            failed.value("reconcile_runs_total{result=\"agrees\"}"),
            0.0,
            "each process counts its own"
        );
        assert_eq!(
            failed.value("reconcile_endpoint_remarks"),
            1.0,
            "what the last pass that ended found"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scrape_answers_and_reports_unreachable_database() {
    let process = Arc::new(PostgresServer::start_durable("-c fsync=on", &[]));
    let server = TestServer::on(Database::create_on(&process)).await;
    server.deliver(&paid("evt_1", true)).await.with_status(200);
    until(&server, "it is up", |scrape| {
        scrape.value("database_up") == 1.0 && scrape.value("events_without_invoice") == 1.0
    })
    .await;
    block_in_place(|| process.stop_immediately());
    server.deliver(&paid("evt_2", true)).await.with_status(503);
    let away = Scrape::of(&server).await;

    assert_eq!(away.value("database_up"), 0.0);
    assert_eq!(
        away.value("events_without_invoice"),
        1.0,
        "what was seen last"
    );
    assert_eq!(away.value("rejected_total{reason=\"unavailable\"}"), 1.0);
    assert!(away.value("commit_failures_total") >= 1.0);

    server
        .get("/metrics", &server.acme_key)
        .await
        .with_error(503, "Unavailable");
    server
        .get("/metrics", "nobody")
        .await
        .with_error(503, "Unavailable");
    server
        .get("/metrics", "")
        .await
        .with_error(401, "Unauthorized");
    block_in_place(|| process.restart());

    until(&server, "it is back", |scrape| {
        scrape.value("database_up") == 1.0
    })
    .await;
}

/// Returns our metrics named in a text, without the suffixes of histograms.
fn metrics_in(text: &str) -> BTreeSet<String> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut names = BTreeSet::new();
    for prefix in [PREFIX, "process_"] {
        for (at, _) in text
            .match_indices(prefix)
            .filter(|(at, _)| !text[..*at].ends_with(is_name))
        {
            names.insert(text[at..].chars().take_while(|c| is_name(*c)).collect());
        }
    }

    names
}

fn project_file(path: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

#[tokio::test]
async fn alerts_dashboard_and_docs_use_exported_metrics() {
    let server = TestServer::start(Engine::Sqlite).await;
    server
        .get("/v1/tenants/acme/invoices", &server.acme_key)
        .await
        .with_status(200);
    let scrape = Scrape::of(&server).await;
    let exported = scrape.names();

    for path in [
        "deploy/prometheus/alerts.yml",
        "deploy/grafana/dashboard.json",
    ] {
        let asked = metrics_in(&project_file(path));
        assert!(asked.len() > 15, "{path}: {asked:?}");
        let unknown: Vec<&String> = asked
            .iter()
            .filter(|name| !exported.contains(name.as_str()))
            .collect();
        assert!(
            unknown.is_empty(),
            "{path} asks for {unknown:?}, which nobody exports"
        );
    }

    let documents = project_file("docs/operations.md");
    for name in exported.iter().filter_map(|name| name.strip_prefix(PREFIX)) {
        let histogram = ["_bucket", "_sum", "_count"]
            .into_iter()
            .find_map(|end| name.strip_suffix(end));
        let name = histogram
            .unwrap_or(name)
            .replace("reconcile_last_success_age_seconds", "..._age_seconds");
        assert!(
            documents.contains(&format!("`{name}`")) || documents.contains(&format!("`{name}{{")),
            "{name} is not in docs/operations.md"
        );
    }
}

#[test]
fn every_alert_has_a_docs_section_and_vice_versa() {
    let (rules, documents) = (
        project_file("deploy/prometheus/alerts.yml"),
        project_file("docs/operations.md"),
    );
    let alarms: Vec<&str> = rules
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- alert: "))
        .collect();
    let sections: Vec<&str> = documents
        .lines()
        .filter_map(|line| line.strip_prefix("### "))
        .collect();
    assert!(alarms.len() > 15, "{alarms:?}");
    assert_eq!(
        alarms.iter().collect::<BTreeSet<_>>(),
        sections.iter().collect::<BTreeSet<_>>()
    );

    let runbooks: Vec<&str> = rules
        .lines()
        .filter_map(|line| line.trim().strip_prefix("runbook: docs/operations.md#"))
        .collect();
    assert_eq!(
        runbooks,
        alarms
            .iter()
            .map(|alarm| alarm.to_lowercase())
            .collect::<Vec<_>>(),
        "each leads to its own"
    );

    for part in rules.split("- alert: ").skip(1) {
        assert!(
            part.contains("severity: ") && part.contains("summary: "),
            "{part}"
        );
    }

    for section in documents.split("\n### ").skip(1) {
        let of_alarm = section.split("\n## ").next().unwrap();
        assert!(
            of_alarm.contains("**Means**: ")
                && of_alarm.contains("**Check**")
                && of_alarm.to_lowercase().contains("**remedy**: "),
            "{of_alarm}"
        );
    }

    let dashboard: Value =
        serde_json::from_str(&project_file("deploy/grafana/dashboard.json")).unwrap();
    let titles: Vec<&str> = dashboard["panels"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|panel| panel["type"] == "row")
        .map(|row| row["title"].as_str().unwrap())
        .collect();
    for row in ["Deliveries", "Disk", "Matching", "Reconciliation", "Reads"] {
        assert!(titles.contains(&row), "{titles:?}");
    }
}

/// A count that stops at a bound says so, or a flat line at 10000 looks like a fact.
#[tokio::test]
async fn help_of_bounded_counts_names_bound() {
    let server = TestServer::start(Engine::Sqlite).await;
    let scraped = server.get("/metrics", &server.operator_key).await;
    let text = String::from_utf8(scraped.body.to_vec()).unwrap();
    let bound = format!(
        "stops counting at {}",
        stripe_reconciler::store::COUNT_LIMIT
    );
    for name in [
        "events_without_invoice",
        "unreadable_events",
        "reconcile_backlog",
        "reconcile_differing",
    ] {
        let start = format!("# HELP {PREFIX}{name} ");
        let help = text.lines().find(|line| line.starts_with(&start));
        assert!(
            help.is_some_and(|help| help.contains(&bound)),
            "{name}: {help:?}"
        );
    }
}
