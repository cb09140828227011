//! A synchronous standby replaces its dead primary at the same address. No acknowledged event is
//! lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::block_in_place;

use testkit::{Database, Load, PostgresServer, TestServer, invoice_path};

/// A proxy at a fixed address that connects to the current server.
///
/// It listens on the port of the first server, so that the program does not take it for a pooler.
struct Forwarder {
    to: Arc<AtomicU16>,
}

impl Forwarder {
    async fn start(to: u16) -> Forwarder {
        let (listener, to) = (
            TcpListener::bind(("127.0.0.2", to)).await.unwrap(),
            Arc::new(AtomicU16::new(to)),
        );
        let target = to.clone();
        tokio::spawn(async move {
            while let Ok((mut from, _)) = listener.accept().await {
                let to = target.load(Ordering::Relaxed);
                tokio::spawn(async move {
                    // When one side closes, the other is closed too.
                    let mut to = TcpStream::connect(("127.0.0.1", to)).await?;
                    to.set_nodelay(true)?;
                    from.set_nodelay(true)?;
                    tokio::io::copy_bidirectional(&mut from, &mut to).await
                });
            }
        });

        Forwarder { to }
    }
}

/// Starts a primary that acknowledges only what its standby has written to disk, and the standby.
fn start_pair() -> (Arc<PostgresServer>, PostgresServer) {
    let primary = Arc::new(PostgresServer::start_durable(
        "-c fsync=on -c synchronous_commit=on",
        &[],
    ));
    let standby = PostgresServer::standby_of(&primary);
    primary.sql(
        "postgres",
        "alter system set synchronous_standby_names = '*'",
    );
    primary.sql("postgres", "select pg_reload_conf()");
    let state = "select string_agg(sync_state, ',') from pg_stat_replication";

    primary.wait_until("the standby does not follow", || {
        primary.sql("postgres", state) == "sync"
    });
    (primary, standby)
}

/// Starts a test server on the primary behind a forwarder.
async fn start_behind_forwarder(primary: &Arc<PostgresServer>) -> (TestServer, Forwarder) {
    let forwarder = Forwarder::start(primary.port()).await;
    let url = |name: &str| format!("postgres://postgres@127.0.0.2:{}/{name}", primary.port());
    (
        TestServer::on(Database::create_on(primary).with_url(url)).await,
        forwarder,
    )
}

/// Waits until the service has recovered by itself.
async fn wait_for_recovery(server: &TestServer) {
    let since = Instant::now();
    while server.get("/readyz", "").await.status != 200 {
        assert!(
            since.elapsed() < Duration::from_secs(2),
            "service is not back"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failover_to_synchronous_standby_loses_nothing() {
    let (primary, standby) = block_in_place(start_pair);
    let (server, forwarder) = start_behind_forwarder(&primary).await;
    let load = Load::start(&server);
    load.acknowledge(200).await;
    block_in_place(|| primary.sigkill());
    let acknowledged = load.acknowledged();
    assert_eq!(server.get("/readyz", "").await.status, 503);

    // The steps of an operator or of failover software: promote the standby, then move the address.
    block_in_place(|| standby.sql("postgres", "select pg_promote(true, 60)"));
    forwarder.to.store(standby.port(), Ordering::Relaxed);
    wait_for_recovery(&server).await;
    let kept = server.logged_ids();
    let lost: Vec<&String> = acknowledged
        .iter()
        .filter(|id| !kept.contains(id))
        .collect();
    assert!(lost.is_empty(), "acknowledged and lost: {lost:?}");
    load.acknowledge(100).await;
    let deliveries = load.finish().await;
    assert!(
        !deliveries.refused_by().is_empty(),
        "it happened under load"
    );
    deliveries.check_log(&server.logged_ids(), "after the failover");
    deliveries
        .check_histories(&server.all_histories(), "after the failover")
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn standby_is_refused_until_promoted() {
    let (primary, standby) = block_in_place(start_pair);
    let (server, forwarder) = start_behind_forwarder(&primary).await;
    let document = server.store("inv-0", "in_0").await.with_status(201).json();
    let path = invoice_path("inv-0");

    // Open connections still lead to the primary; this many concurrent requests need new ones.
    forwarder.to.store(standby.port(), Ordering::Relaxed);
    let since = Instant::now();
    while server.get("/readyz", "").await.status != 503 {
        for answer in join_all((0..10).map(|_| server.put(&path, &document))).await {
            assert!([200, 503].contains(&answer.status.as_u16()), "{answer:?}");
        }
        assert!(
            since.elapsed() < Duration::from_secs(5),
            "it is still ready: {}",
            server.process.log()
        );
    }
    server.get(&path, &server.acme_key).await.with_status(503);
    assert!(
        server.process.log().contains("the server is a standby"),
        "{}",
        server.process.log()
    );

    block_in_place(|| standby.sql("postgres", "select pg_promote(true, 60)"));
    wait_for_recovery(&server).await;
    server.put(&path, &document).await.with_status(200);
}
