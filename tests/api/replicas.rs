//! Several servers on one database: no event is lost, none is there twice, and all of them tell the same.

use std::collections::{BTreeMap, BTreeSet};

use testkit::{
    Database, Engine, Load, PostgresServer, Server, TestServer, client, run, send, uid_and_states,
};

/// Processes that meet an empty database.
const AT_ONCE: usize = 4;

/// What a server answers about the invoices of tenant `acme` that have a history.
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
async fn three_servers_keep_every_event_once_and_tell_the_same() {
    let server = TestServer::start(Engine::Postgres).await;
    let (second, third) = (server.another_server(), server.another_server());
    let load = Load::start(&server);
    load.aim_at(&[&server.process.base, &second.base, &third.base]);
    load.acknowledge(500).await;
    let told = load.finish().await;
    assert!(told.refused_by().is_empty(), "{:?}", told.refused_by());
    told.check_log(&server.logged_ids(), "three servers");
    for process in [&server.process, &second, &third] {
        told.check_histories(&histories(&server, process).await, &process.base)
            .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_killed_changes_nothing_for_the_others_and_loses_nothing() {
    let server = TestServer::start(Engine::Postgres).await;
    let (mut second, third) = (server.another_server(), server.another_server());
    let load = Load::start(&server);
    load.aim_at(&[&server.process.base, &second.base, &third.base]);
    load.acknowledge(200).await;
    second.sigkill();
    // Deliveries still come to it, as long as nobody has told whoever distributes them.
    load.acknowledge(200).await;
    let acknowledged = load.acknowledged();
    let told = load.finish().await;
    assert_eq!(
        told.refused_by(),
        BTreeSet::from([second.base.clone()]),
        "the others go on"
    );
    let log = server.logged_ids();
    assert!(acknowledged.is_subset(&log.iter().cloned().collect()));
    told.check_log(&log, "one is killed");
    told.check_histories(&histories(&server, &third).await, "one is killed")
        .await;
}

#[test]
fn servers_that_start_at_once_on_an_empty_database_migrate_it_once() {
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
    let told = at_once(url, || {
        run(&[("DATABASE_URL", url)], &["migrate"], b"")
            .with_code(0)
            .stdout
    });
    let did = told.iter().filter(|told| told.contains("start")).count();
    assert_eq!(did, 1, "one of them migrates it: {told:?}");
}

/// Holds the empty database until several are in the middle of migrating it, each in a process of its own.
fn at_once<T: Send>(url: &str, migrate: impl Fn() -> T + Sync) -> Vec<T> {
    let process = PostgresServer::shared();
    let mut holding = process.hold(url, "create table events (held int)");
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
