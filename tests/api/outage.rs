//! Outages of the database: requests that need it are rejected at once, and service recovers by
//! itself.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::json;
use tokio::task::block_in_place;

use testkit::{Answer, Database, Engine, Load, PostgresServer, TestServer, invoice_path};

/// Maximum duration of an immediate answer.
const AT_ONCE: Duration = Duration::from_millis(400);
/// Maximum duration of the first delivery after a server has disappeared.
const FIRST: Duration = Duration::from_millis(1500);
/// Maximum time until an unresponsive server counts as unavailable: one slow statement and one
/// probe.
const NOTICED: Duration = Duration::from_secs(4);
const BACK: Duration = Duration::from_secs(2);
/// Maximum time until a server has recorded its rejections.
const NOTED: Duration = Duration::from_secs(60);

/// Single deliveries of new events, in addition to the load.
struct Probe<'w> {
    server: &'w TestServer,
    count: usize,
    refused: Vec<String>,
}

impl Probe<'_> {
    /// Delivers an event. Returns the answer and its duration.
    async fn deliver(&mut self) -> (Answer, Duration) {
        self.count += 1;
        let id = format!("evt_probe_{}", self.count);
        let event = json!({"id": id, "object": "event", "type": "customer.updated", "created": 1_769_850_000,
            "data": {"object": {"id": "cus_1", "object": "customer"}}});
        let asked = Instant::now();
        let answer = self.server.deliver(&event).await;
        let took = asked.elapsed();

        if answer.status == 503 {
            assert!(!answer.header("retry-after").is_empty(), "{answer:?}");
            self.refused.push(id);
        }

        (answer, took)
    }

    /// Waits until a delivery is answered 503 at once.
    async fn until_refused_at_once(&mut self, within: Duration) {
        let deadline = Instant::now() + within;
        loop {
            let (answer, took) = self.deliver().await;
            if answer.status == 503 && took < AT_ONCE {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "it is not refused at once within {within:?}: {answer:?} took {took:?}"
            );
        }
    }

    /// Waits until deliveries are accepted and the server is ready.
    async fn until_taken(&mut self, within: Duration) {
        let asked = Instant::now();
        while self.deliver().await.0.status != 200
            || self.server.get("/readyz", "").await.status != 200
        {
            assert!(asked.elapsed() < within, "it is not back within {within:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        read_on_all_connections(self.server).await;
    }
}

/// Reads with more concurrent requests than the server has database connections.
async fn read_on_all_connections(server: &TestServer) {
    let path = invoice_path("inv-0");
    for read in join_all((0..20).map(|_| server.get(&path, &server.acme_key))).await {
        read.with_status(200);
    }
}

/// Asserts that everything that needs the database is rejected and everything else is answered.
async fn check_refused(server: &TestServer) {
    let asked = Instant::now();
    for path in [
        "/readyz",
        &invoice_path("inv-0"),
        "/v1/tenants/acme/invoices",
    ] {
        let answer = server
            .get(path, &server.acme_key)
            .await
            .with_error(503, "Unavailable");
        assert!(!answer.header("retry-after").is_empty(), "{answer:?}");
    }

    server
        .put(&invoice_path("inv-0"), &json!({}))
        .await
        .with_error(503, "Unavailable");
    server.get("/healthz", "").await.with_status(200);
    assert!(asked.elapsed() < AT_ONCE, "{:?}", asked.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stopped_database_answers_503_and_service_recovers() {
    let cluster = Arc::new(PostgresServer::start_durable("-c fsync=on", &[]));
    let server = TestServer::on(Database::create_on(&cluster)).await;
    let (load, mut probe) = (
        Load::start(&server),
        Probe {
            server: &server,
            count: 0,
            refused: Vec::new(),
        },
    );
    for round in 0..2 {
        load.acknowledge(150).await;
        assert_eq!(probe.deliver().await.0.status, 200);
        read_on_all_connections(&server).await;
        let acknowledged = load.acknowledged();
        block_in_place(|| cluster.stop_immediately());

        let (answer, took) = probe.deliver().await;
        assert!(
            answer.status == 503 && took < FIRST,
            "{answer:?} took {took:?}"
        );
        for _ in 0..20 {
            let (answer, took) = probe.deliver().await;
            assert!(
                answer.status == 503 && took < AT_ONCE,
                "{answer:?} took {took:?}"
            );
        }
        check_refused(&server).await;

        block_in_place(|| cluster.restart());
        probe.until_taken(BACK).await;
        let kept = server.logged_ids();
        assert!(
            acknowledged.iter().all(|id| kept.contains(id)),
            "round {round}: what was acknowledged is there"
        );
        // No old connection is used again: each would count as another outage.
        assert_eq!(
            server
                .process
                .log()
                .matches("database available again")
                .count(),
            round + 1,
            "{}",
            server.process.log()
        );
    }
    let refused = std::mem::take(&mut probe.refused);
    check_at_the_end(&server, load).await;
    assert!(
        server.logged_ids().iter().all(|id| !refused.contains(id)),
        "what nobody could take is not there"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn paused_database_answers_503_and_duplicates_nothing() {
    let cluster = Arc::new(PostgresServer::start_durable("-c fsync=on", &[]));
    let server = TestServer::on(Database::create_on(&cluster)).await;
    let (load, mut probe) = (
        Load::start(&server),
        Probe {
            server: &server,
            count: 0,
            refused: Vec::new(),
        },
    );
    load.acknowledge(150).await;
    let paused = block_in_place(|| cluster.pause());
    let asked = Instant::now();
    server
        .get("/readyz", "")
        .await
        .with_error(503, "Unavailable");
    server.get("/healthz", "").await.with_status(200);
    assert!(asked.elapsed() < FIRST, "{:?}", asked.elapsed());
    probe.until_refused_at_once(NOTICED).await;
    check_refused(&server).await;

    drop(paused);
    probe.until_taken(BACK).await;
    load.acknowledge(100).await;
    check_at_the_end(&server, load).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exhausted_connections_do_not_count_as_outage() {
    let cluster = PostgresServer::shared();
    cluster.sql("postgres", "create role few login");
    let database = Database::create(Engine::Postgres);
    let name = database.url.rsplit('/').next().unwrap();
    cluster.sql("postgres", &format!("alter database {name} owner to few"));
    let server =
        TestServer::on(database.with_url(|name| cluster.url(name).replace("postgres@", "few@")))
            .await;
    server.store("inv-0", "in_0").await.with_status(201);
    cluster.sql("postgres", "alter role few connection limit 2");
    let path = invoice_path("inv-0");
    let reads = join_all((0..30).map(|_| server.get(&path, &server.acme_key))).await;

    assert!(
        reads.iter().any(|read| read.status == 503),
        "there are too few connections"
    );
    assert!(
        reads.iter().any(|read| read.status == 200),
        "those that there are go on"
    );

    let since = Instant::now();
    while server.get(&path, &server.acme_key).await.status != 200 {
        assert!(since.elapsed() < 2 * BACK, "it is not back");
    }
}

async fn check_at_the_end(server: &TestServer, load: Load) {
    let logged_outages = load.finish().await;
    let (probes, log): (Vec<String>, Vec<String>) = server
        .logged_ids()
        .into_iter()
        .partition(|id| id.starts_with("evt_probe"));
    let different: std::collections::BTreeSet<&String> = probes.iter().collect();
    assert_eq!(different.len(), probes.len(), "a delivery is there twice");
    assert!(
        !logged_outages.refused_by().is_empty(),
        "it happened under load"
    );

    logged_outages.check_log(&log, "the database was away");
    logged_outages
        .check_histories(&server.all_histories(), "the database was away")
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_disk_rejects_deliveries_and_still_serves_reads() {
    let server = TestServer::start(Engine::Postgres).await;
    server.store("inv-0", "in_0").await.with_status(201);
    let mut probe = Probe {
        server: &server,
        count: 0,
        refused: Vec::new(),
    };
    assert_eq!(probe.deliver().await.0.status, 200);

    // Move the time one minute into the past.
    server
        .database
        .execute("update events set received_ms = received_ms - 60000")
        .await;

    // Updates within existing pages still succeed, as on a full disk.
    let full = "create function disk_full() returns trigger language plpgsql as $$ begin
        raise exception using errcode = 'disk_full', message = 'could not extend file: No space left on device'; end $$;
        create trigger disk_full after insert on events for each row execute function disk_full()";
    server.database.execute(full).await;

    for _ in 0..20 {
        assert_eq!(probe.deliver().await.0.status, 503);
        server
            .get(&invoice_path("inv-0"), &server.acme_key)
            .await
            .with_status(200);
    }

    let log = server.process.log();
    assert!(
        log.contains("No space left on device") && !log.contains("database unavailable"),
        "{log}"
    );

    let until_doctor = async |code: i32, words: &str| {
        let deadline = Instant::now() + NOTED;
        loop {
            let said = server.run(&["doctor", "--quiet"]);
            if said.code == code && said.stdout.contains(words) {
                break;
            }
            assert!(
                Instant::now() < deadline,
                "not {code} with {words}: {said:?}"
            );
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };

    until_doctor(3, "FAILING  deliveries      Deliveries are answered 503").await;
    // Known events need no space.
    probe.count = 0;
    assert_eq!(probe.deliver().await.0.status, 200);
    assert_eq!(probe.deliver().await.0.status, 503);

    until_doctor(
        3,
        "warning  deliveries      Some deliveries are answered 503",
    )
    .await;
    server
        .database
        .execute("drop trigger disk_full on events")
        .await;
    assert_eq!(probe.deliver().await.0.status, 200);

    until_doctor(0, "").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn read_only_database_rejects_deliveries_and_serves_reads() {
    let cluster = Arc::new(PostgresServer::start_durable("-c fsync=on", &[]));
    let server = TestServer::on(Database::create_on(&cluster)).await;
    server.store("inv-0", "in_0").await.with_status(201);
    let mut probe = Probe {
        server: &server,
        count: 0,
        refused: Vec::new(),
    };

    assert_eq!(probe.deliver().await.0.status, 200);

    let name = server.database.url.rsplit('/').next().unwrap();
    let sessions = "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()";
    cluster.sql(
        name,
        &format!("alter database {name} set default_transaction_read_only = on; {sessions}"),
    );

    // Wait until the connections of ended sessions are closed.
    let deadline = Instant::now() + NOTED;
    while !server.process.log().contains("in a read-only transaction")
        || server.get("/readyz", "").await.status != 503
    {
        probe.deliver().await;
        assert!(
            Instant::now() < deadline,
            "it is not read-only: {}",
            server.process.log()
        );
    }
    let logged_outages = |log: &str| {
        (
            log.matches("database unavailable").count(),
            log.matches("database available again").count(),
        )
    };

    let before = logged_outages(&server.process.log());
    for _ in 0..20 {
        assert_eq!(probe.deliver().await.0.status, 503);
        server
            .get(&invoice_path("inv-0"), &server.acme_key)
            .await
            .with_status(200);
        server.get("/readyz", "").await.with_status(503);
    }

    let log = server.process.log();
    assert_eq!(logged_outages(&log), before, "{log}");

    cluster.sql(
        "postgres",
        &format!("alter database {name} reset default_transaction_read_only"),
    );
    probe.until_taken(BACK).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn moved_or_replaced_file_accepts_no_delivery() {
    let server = TestServer::start(Engine::Sqlite).await;
    let mut probe = Probe {
        server: &server,
        count: 0,
        refused: Vec::new(),
    };
    assert_eq!(probe.deliver().await.0.status, 200);

    let file = server.database.url.trim_start_matches("sqlite://");
    let moved = format!("{file}.moved");
    std::fs::rename(file, &moved).unwrap();
    let refused = async |probe: &mut Probe<'_>| {
        assert_eq!(probe.deliver().await.0.status, 503);
        server.get("/readyz", "").await.with_status(503);
        server
            .get(&invoice_path("inv-0"), &server.acme_key)
            .await
            .with_status(503);
    };
    refused(&mut probe).await;
    std::fs::copy(&moved, file).unwrap();
    refused(&mut probe).await;

    let log = server.process.log();
    assert!(
        log.contains("is no longer there") && log.contains("is no longer the file that was opened"),
        "{log}"
    );

    std::fs::rename(&moved, file).unwrap();
    assert_eq!(probe.deliver().await.0.status, 200);
}
