//! Limits on work and memory: wide events, large pages, bodies in tiny chunks, abandoned requests.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};

use testkit::each_database;
use testkit::{Engine, TestServer, Wire, invoice_path};

const MIB: usize = 1024 * 1024;

/// An event of 378 KB whose invoice names this many payments.
fn wide_event(payments: usize) -> Value {
    let payment = |n: usize| json!({"payment": {"payment_intent": format!("pi_{n:08}")}});
    let payments: Vec<Value> = (0..payments).map(payment).collect();
    let invoice = json!({"id": "in_1", "object": "invoice", "status": "open", "payments": {"data": payments}});
    json!({"id": "evt_wide", "object": "event", "type": "invoice.updated", "created": 1_769_850_000, "data": {"object": invoice}})
}

/// Stores invoices of tenant `acme` whose documents have this many bytes.
async fn store_large(server: &TestServer, count: usize, bytes: usize) {
    for n in 0..count {
        let uid = format!("inv-{n:03}");
        let document = json!({"metadata": {"uid": uid}, "spec": {"note": "x".repeat(bytes)}});
        server
            .put(&invoice_path(&uid), &document)
            .await
            .with_status(201);
    }
}

/// Most memory that the server ever had, in bytes.
fn peak_memory(server: &TestServer) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.process.pid())).unwrap();
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap();
    let kb: usize = peak.trim().trim_end_matches(" kB").parse().unwrap();
    kb * 1024
}

each_database! {
    async fn event_with_ten_thousand_payments_is_cut_and_acknowledged(server: TestServer) {
        server.store("inv-1", "in_1").await.with_status(201);
        server.deliver(&wide_event(10_000)).await.with_status(200);
        let log = server.process.log();
        let line = log
            .lines()
            .find(|line| line.contains("event names too many objects"))
            .expect("it is logged");
        assert!(
            line.contains("evt_wide") && line.contains("10001") && line.contains("9001"),
            "{line}"
        );

        let started = Instant::now();
        assert_eq!(server.history("inv-1").await, Vec::<String>::new());
        assert!(
            started.elapsed() < Duration::from_secs(5),
            "{:?}",
            started.elapsed()
        );
    }

    async fn page_of_large_documents_ends_after_four_mebibytes(server: TestServer) {
        store_large(&server, 12, MIB - 1000).await;
        let (mut path, mut uids, mut pages) = (
            "/v1/tenants/acme/invoices?limit=500".to_owned(),
            Vec::new(),
            0,
        );

        loop {
            let answer = server.get(&path, &server.acme_key).await.with_status(200);
            assert!(answer.body.len() < 5 * MIB, "{}", answer.body.len());
            let page = answer.json();
            let items = page["items"].as_array().unwrap();
            uids.extend(
                items
                    .iter()
                    .map(|invoice| invoice["metadata"]["uid"].as_str().unwrap().to_owned()),
            );
            pages += 1;
            let Some(cursor) = page["nextCursor"].as_str() else {
                break;
            };
            path = format!("/v1/tenants/acme/invoices?limit=500&cursor={cursor}");
        }

        uids.sort();
        let expected: Vec<String> = (0..12).map(|n| format!("inv-{n:03}")).collect();
        assert_eq!((uids, pages), (expected, 3));
    }

    async fn sixteen_large_pages_at_once_need_little_memory(server: TestServer) {
        store_large(&server, 100, 111_000).await;
        let path = "/v1/tenants/acme/invoices?limit=500";
        let reads = (0..16).map(|_| server.get(path, &server.acme_key));
        for answer in join_all(reads).await {
            // A debug build on a busy machine may be too slow for sixteen pages in time. What they
            // need at once, they have needed by then.
            assert!(
                [200, 503].contains(&answer.status.as_u16()),
                "{}",
                answer.status
            );
        }

        let peak = peak_memory(&server);
        assert!(peak < 200 * MIB, "{} MiB", peak / MIB);
    }

    async fn bodies_in_tiny_chunks_cost_their_size(server: TestServer) {
        const BYTES: usize = 64 * 1024;

        let forged = format!("t=1,v1={}", "0".repeat(64));
        let head = format!(
            "POST /webhooks/stripe HTTP/1.1\r\nHost: x\r\nStripe-Signature: {forged}\r\nTransfer-Encoding: chunked\r\n\r\n"
        );
        let chunks = "1\r\nx\r\n".repeat(4096);
        let before = peak_memory(&server);
        let sent = (0..16).map(async |_| {
            let mut wire = Wire::connect(server.process.authority()).await;
            wire.write(head.as_bytes()).await;
            for _ in 0..BYTES / 4096 {
                wire.write(chunks.as_bytes()).await;
            }
            wire
        });

        let wires = join_all(sent).await;
        // The last chunk of a body is answered when everything before it was read.
        for mut wire in wires {
            wire.write(b"0\r\n\r\n").await;
            assert!(wire.read_head().await.starts_with("HTTP/1.1 4"));
        }

        // 1 MiB of bodies, each in a buffer of at most twice its size; not 25 times that.
        let grown = peak_memory(&server).saturating_sub(before);
        assert!(grown < 12 * MIB, "{} MiB", grown / MIB);
    }

    async fn abandoned_read_ends_in_database(server: TestServer) {
        server.store("inv-1", "in_1").await.with_status(201);
        server.store("inv-2", "in_2").await.with_status(201);
        let request = format!(
            "GET {} HTTP/1.1\r\nHost: x\r\nApiKey: {}\r\n\r\n",
            invoice_path("inv-1"),
            server.acme_key
        );

        match server.engine {
            Engine::Sqlite => abandon_in_sqlite(&server, request.as_bytes()).await,
            Engine::Postgres => abandon_in_postgres(&server, request.as_bytes()).await,
        }

        server
            .get(&invoice_path("inv-2"), &server.acme_key)
            .await
            .with_status(200);
    }
}

/// Time within which an abandoned statement ends. Less than every time limit of a statement.
const ENDED: Duration = Duration::from_secs(3);

async fn send_all(server: &TestServer, request: &[u8]) -> Vec<Wire> {
    join_all((0..4).map(async |_| {
        let mut wire = Wire::connect(server.process.authority()).await;
        wire.write(request).await;
        wire
    }))
    .await
}

/// Reads that wait for a lock.
async fn abandon_in_postgres(server: &TestServer, request: &[u8]) {
    const ACTIVE: &str = "select count(*) from pg_stat_activity
        where datname = current_database() and application_name = 'stripe-reconciler' and state = 'active'";
    let mut holder = PgConnection::connect(&server.database.url).await.unwrap();
    let mut observer = PgConnection::connect(&server.database.url).await.unwrap();
    let lock = "begin; lock table mentions in access exclusive mode";
    sqlx::raw_sql(lock).execute(&mut holder).await.unwrap();
    let mut active = async || {
        sqlx::query_scalar::<_, i64>(ACTIVE)
            .fetch_one(&mut observer)
            .await
            .unwrap()
    };

    let wires = send_all(server, request).await;
    while active().await < 4 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    drop(wires);
    let abandoned = Instant::now();
    while active().await > 0 {
        assert!(
            abandoned.elapsed() < ENDED,
            "no backend works for a client that is gone"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    sqlx::raw_sql("rollback")
        .execute(&mut holder)
        .await
        .unwrap();
}

/// Reads that follow two million links: all four readers are busy for seconds.
async fn abandon_in_sqlite(server: &TestServer, request: &[u8]) {
    let fill = "
        insert into events (key, received_ms, source, outcome, linked)
        with recursive event (n) as (select 1 union all select n + 1 from event where n < 1000),
                       object (n) as (select 1 union all select n + 1 from object where n < 2000)
        select randomblob(32), 1, 'webhook', 'recorded', (select json_group_array('pi_' || n) from object) from event;
        insert into mentions (object_id, event_key) select 'in_1', key from events";
    server.database.execute(fill).await;
    let wires = send_all(server, request).await;
    while cpu_ms(server) < 1000 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    drop(wires);

    let abandoned = Instant::now();
    loop {
        let before = cpu_ms(server);
        tokio::time::sleep(Duration::from_millis(300)).await;
        if cpu_ms(server) - before < 60 {
            break;
        }
        assert!(
            abandoned.elapsed() < ENDED,
            "no reader works for a client that is gone"
        );
    }
}

/// Processor time that the server has used, in milliseconds.
fn cpu_ms(server: &TestServer) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", server.process.pid())).unwrap();
    let fields: Vec<&str> = stat
        .rsplit_once(')')
        .unwrap()
        .1
        .split_whitespace()
        .collect();

    // The system counts in hundredths of a second.
    [fields[11], fields[12]]
        .iter()
        .map(|ticks| ticks.parse::<u64>().unwrap() * 10)
        .sum()
}
