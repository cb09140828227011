//! A primary dies, and its synchronous standby takes over behind the same address: nothing that was acknowledged is lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::block_in_place;

use testkit::{Database, Load, PostgresServer, TestServer, invoice_path};

/// The address that stays: whoever comes is taken to the server that it points to. It has the port of the first one, so that it
/// is not taken for a pooler.
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
                    // Whichever side goes away takes the other with it.
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

/// A primary that acknowledges only what its standby has on disk too.
fn pair() -> (Arc<PostgresServer>, PostgresServer) {
    let primary = Arc::new(PostgresServer::of_its_own(
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

/// A world on the primary, by an address that can lead to the standby.
async fn world_of(primary: &Arc<PostgresServer>) -> (TestServer, Forwarder) {
    let forwarder = Forwarder::start(primary.port()).await;
    let url = |name: &str| format!("postgres://postgres@127.0.0.2:{}/{name}", primary.port());
    (
        TestServer::on(Database::create_on(primary).by_way_of(url)).await,
        forwarder,
    )
}

/// Returns when service is back, by itself.
async fn until_back(server: &TestServer) {
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
async fn a_failover_to_a_synchronous_standby_loses_nothing_and_service_comes_back_by_itself() {
    let (primary, standby) = block_in_place(pair);
    let (server, forwarder) = world_of(&primary).await;
    let load = Load::start(&server);
    load.acknowledge(200).await;
    block_in_place(|| primary.sigkill());
    let acknowledged = load.acknowledged();
    assert_eq!(server.get("/readyz", "").await.status, 503);

    // What an operator does, or whoever does it for one: the standby leads, then the address leads to it.
    block_in_place(|| standby.sql("postgres", "select pg_promote(true, 60)"));
    forwarder.to.store(standby.port(), Ordering::Relaxed);
    until_back(&server).await;
    let kept = server.logged_ids();
    let lost: Vec<&String> = acknowledged
        .iter()
        .filter(|id| !kept.contains(id))
        .collect();
    assert!(lost.is_empty(), "acknowledged and lost: {lost:?}");
    load.acknowledge(100).await;
    let told = load.finish().await;
    assert!(!told.refused_by().is_empty(), "it happened under load");
    told.check_log(&server.logged_ids(), "after the failover");
    told.check_histories(&server.all_histories(), "after the failover")
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_that_leads_to_a_standby_too_early_shows_nothing_that_may_be_old_until_that_leads()
 {
    let (primary, standby) = block_in_place(pair);
    let (server, forwarder) = world_of(&primary).await;
    let document = server.store("inv-0", "in_0").await.with_status(201).json();
    let path = invoice_path("inv-0");

    // Connections that are open go on leading to the primary; so many at once need others.
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
    until_back(&server).await;
    server.put(&path, &document).await.with_status(200);
}
