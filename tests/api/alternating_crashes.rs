//! Kills the server and the database in turn, at random times under load. The acknowledged and the
//! logged events are the same in the end, and the histories are correct.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::task::block_in_place;

use crate::seed::seed;
use testkit::{Database, Load, PostgresServer, TestServer};

const ROUNDS: usize = 10;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn alternating_crashes_lose_no_acknowledged_event() {
    let cluster = Arc::new(PostgresServer::start_durable("-c fsync=on", &[]));
    let mut server = TestServer::on(Database::create_on(&cluster)).await;
    let seed = seed();
    let mut random = StdRng::seed_from_u64(seed);
    let load = Load::start(&server);

    for round in 0..ROUNDS {
        load.acknowledge(random.random_range(10..80)).await;
        // A random delay, so that the kill hits deliveries at any stage.
        tokio::time::sleep(Duration::from_micros(random.random_range(0..5000))).await;
        if round % 2 == 0 {
            server.process.sigkill();
            let acknowledged = load.acknowledged();
            server.process = block_in_place(|| server.another_server());
            load.redirect_to(&[&server.process.base]);
            check(
                &server,
                &acknowledged,
                &format!("our server is killed in round {round}, seed {seed}"),
            );
        } else {
            block_in_place(|| cluster.stop_immediately());
            let acknowledged = load.acknowledged();
            block_in_place(|| cluster.restart());
            check(
                &server,
                &acknowledged,
                &format!("the database is stopped in round {round}, seed {seed}"),
            );
        }
    }

    let deliveries = load.finish().await;
    assert!(deliveries.events() >= ROUNDS * 10 && !deliveries.refused_by().is_empty());

    deliveries.check_log(&server.logged_ids(), &format!("seed {seed}"));
    deliveries
        .check_histories(&server.all_histories(), &format!("seed {seed}"))
        .await;
}

fn check(server: &TestServer, acknowledged: &BTreeSet<String>, context: &str) {
    let kept: BTreeSet<String> = server.logged_ids().into_iter().collect();
    let lost: Vec<&String> = acknowledged.difference(&kept).collect();
    assert!(
        lost.is_empty(),
        "{context}: acknowledged and lost: {lost:?}"
    );
}
