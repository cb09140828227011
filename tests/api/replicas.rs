//! Several servers on one database: no event is lost or stored twice, and all servers answer the
//! same.

use std::collections::{BTreeMap, BTreeSet};

use testkit::{
    Database, Engine, Load, PostgresServer, Server, TestServer, client, run, send, uid_and_states,
};

/// Processes that start on an empty database.
const AT_ONCE: usize = 4;

/// Returns the answers of a server for the invoices of tenant `acme` that have a history.
async fn histories(server: &TestServer, process: &Server) -> BTreeMap<String, String> {
    let (client, mut histories, mut cursor) = (client(), BTreeMap::new(), String::new());
    loop {
        let url = format!(
            "{}/v1/tenants/acme/invoices?limit=500{cursor}",
            process.base
        );
        let page = send(
            &client,
            "GET",
            &url,
            &[("ApiKey", &server.acme_key)],
            Vec::new(),
        )
        .await
        .with_status(200)
        .json();
        histories.extend(
            page["items"]
                .as_array()
                .unwrap()
                .iter()
                .map(uid_and_states)
                .filter(|(_, states)| states != "[]"),
        );
        match page["nextCursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => return histories,
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_replicas_store_each_event_once_and_agree() {
    let server = TestServer::start(Engine::Postgres).await;
    let (second, third) = (server.another_server(), server.another_server());
    let load = Load::start(&server);
    load.redirect_to(&[&server.process.base, &second.base, &third.base]);
    load.acknowledge(500).await;
    let deliveries = load.finish().await;

    assert!(
        deliveries.refused_by().is_empty(),
        "{:?}",
        deliveries.refused_by()
    );

    deliveries.check_log(&server.logged_ids(), "three servers");
    for process in [&server.process, &second, &third] {
        deliveries
            .check_histories(&histories(&server, process).await, &process.base)
            .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_replica_loses_nothing_and_disturbs_no_other() {
    let server = TestServer::start(Engine::Postgres).await;
    let (mut second, third) = (server.another_server(), server.another_server());
    let load = Load::start(&server);
    load.redirect_to(&[&server.process.base, &second.base, &third.base]);
    load.acknowledge(200).await;
    second.sigkill();

    // Deliveries still go to the killed server, as before a load balancer notices.
    load.acknowledge(200).await;
    let acknowledged = load.acknowledged();
    let deliveries = load.finish().await;
    assert_eq!(
        deliveries.refused_by(),
        BTreeSet::from([second.base.clone()]),
        "the others go on"
    );

    let log = server.logged_ids();
    assert!(acknowledged.is_subset(&log.iter().cloned().collect()));

    deliveries.check_log(&log, "one is killed");
    deliveries
        .check_histories(&histories(&server, &third).await, "one is killed")
        .await;
}

#[test]
fn servers_that_start_together_migrate_once() {
    let database = Database::create(Engine::Postgres);
    let url = database.url.as_str();
    let servers = at_once(url, || drop(Server::start(url)));
    assert_eq!(servers.len(), AT_ONCE, "each of them starts");
    let applied = PostgresServer::shared().sql(
        url,
        "select count(*), count(distinct version) from _sqlx_migrations",
    );
    let (rows, versions) = applied.split_once('|').unwrap();
    assert!(rows == versions && rows != "0", "{applied}");

    let database = Database::create(Engine::Postgres);
    let url = database.url.as_str();
    let deliveries = at_once(url, || {
        run(&[("DATABASE_URL", url)], &["migrate"], b"")
            .with_code(0)
            .stdout
    });
    let did = deliveries
        .iter()
        .filter(|deliveries| deliveries.contains("start"))
        .count();
    assert_eq!(did, 1, "one of them migrates it: {deliveries:?}");
}

/// Locks the empty database until several processes are in the middle of migrating it.
fn at_once<T: Send>(url: &str, migrate: impl Fn() -> T + Sync) -> Vec<T> {
    let process = PostgresServer::shared();
    let mut holding = process.hold_transaction(url, "create table events (held int)");

    std::thread::scope(|scope| {
        let migrating: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(&migrate)).collect();
        process.wait_until("they do not come", || {
            process.waiting_for_locks(url) == AT_ONCE
        });
        holding.kill().unwrap();
        holding.wait().unwrap();
        migrating
            .into_iter()
            .map(|migrated| migrated.join().expect("each of them ends well"))
            .collect()
    })
}
