//! The database goes away: everything that needs it is refused at once, and it all goes on by itself when it is back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::json;
use tokio::task::block_in_place;

use testkit::{Answer, Database, Engine, Load, PostgresServer, TestServer, invoice_path};

/// "At once".
const AT_ONCE: Duration = Duration::from_millis(400);
/// What the first delivery may take that meets a server that is gone.
const FIRST: Duration = Duration::from_millis(1500);
/// What it may take until a server counts as away that answers nothing: a statement that takes long, and then a question.
const NOTICED: Duration = Duration::from_secs(4);
const BACK: Duration = Duration::from_secs(2);
/// Within which a server notes what it refused, and it is no longer news.
const NOTED: Duration = Duration::from_secs(60);

/// Deliveries beside the load, one after the other, each of them new.
struct Probe<'w> {
    server: &'w TestServer,
    count: usize,
    refused: Vec<String>,
}

impl Probe<'_> {
    /// What it is answered, and in which time.
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

    /// Returns when a delivery is answered 503 at once.
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

    /// Returns when it is taken again, and the server is ready.
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

/// More at a time than a server has connections to its database.
async fn read_on_all_connections(server: &TestServer) {
    let path = invoice_path("inv-0");
    for read in join_all((0..20).map(|_| server.get(&path, &server.acme_key))).await {
        read.with_status(200);
    }
}

/// Everything that needs the database is refused; what does not is answered.
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
async fn a_database_that_is_stopped_is_answered_503_at_once_and_it_goes_on_by_itself() {
    let cluster = Arc::new(PostgresServer::of_its_own("-c fsync=on", &[]));
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
        block_in_place(|| cluster.stop_at_once());

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

        block_in_place(|| cluster.start_again());
        probe.until_taken(BACK).await;
        let kept = server.logged_ids();
        assert!(
            acknowledged.iter().all(|id| kept.contains(id)),
            "round {round}: what was acknowledged is there"
        );
        // No connection that led to the server before is used again: each would be taken for another outage.
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
async fn a_database_that_is_paused_is_answered_503_and_what_was_in_doubt_is_there_at_most_once() {
    let cluster = Arc::new(PostgresServer::of_its_own("-c fsync=on", &[]));
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
async fn a_server_without_a_connection_to_spare_is_not_away() {
    let cluster = PostgresServer::shared();
    cluster.sql("postgres", "create role few login");
    let database = Database::create(Engine::Postgres);
    let name = database.url.rsplit('/').next().unwrap();
    cluster.sql("postgres", &format!("alter database {name} owner to few"));
    let server =
        TestServer::on(database.by_way_of(|name| cluster.url(name).replace("postgres@", "few@")))
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
    let told = load.finish().await;
    let (probes, log): (Vec<String>, Vec<String>) = server
        .logged_ids()
        .into_iter()
        .partition(|id| id.starts_with("evt_probe"));
    let different: std::collections::BTreeSet<&String> = probes.iter().collect();
    assert_eq!(different.len(), probes.len(), "a delivery is there twice");
    assert!(!told.refused_by().is_empty(), "it happened under load");
    told.check_log(&log, "the database was away");
    told.check_histories(&server.all_histories(), "the database was away")
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_is_full_takes_no_delivery_and_is_still_read_and_the_doctor_says_what_to_do() {
    let server = TestServer::start(Engine::Postgres).await;
    server.store("inv-0", "in_0").await.with_status(201);
    let mut probe = Probe {
        server: &server,
        count: 0,
        refused: Vec::new(),
    };
    assert_eq!(probe.deliver().await.0.status, 200);
    // As if that were a minute ago.
    server
        .database
        .execute("update events set received_ms = received_ms - 60000")
        .await;
    // What has room in a page is still written, as on a disk that is full.
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
    // What is known already needs no room.
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
async fn a_database_that_is_read_only_takes_no_delivery_and_is_still_read_in_a_calm_log() {
    let cluster = Arc::new(PostgresServer::of_its_own("-c fsync=on", &[]));
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
    // Those that were open when their sessions ended are gone first.
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
    let told = |log: &str| {
        (
            log.matches("database unavailable").count(),
            log.matches("database available again").count(),
        )
    };
    let before = told(&server.process.log());
    for _ in 0..20 {
        assert_eq!(probe.deliver().await.0.status, 503);
        server
            .get(&invoice_path("inv-0"), &server.acme_key)
            .await
            .with_status(200);
        server.get("/readyz", "").await.with_status(503);
    }
    let log = server.process.log();
    assert_eq!(told(&log), before, "{log}");
    cluster.sql(
        "postgres",
        &format!("alter database {name} reset default_transaction_read_only"),
    );
    probe.until_taken(BACK).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_is_moved_away_or_replaced_takes_nothing_that_would_be_lost() {
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
