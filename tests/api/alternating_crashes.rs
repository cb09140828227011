//! Our server is killed, and the database is, by turns and at random moments under load: what was acknowledged and what is kept
//! are the same in the end, and so are the histories.

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
async fn whoever_is_killed_at_whatever_moment_all_that_was_acknowledged_is_kept_once() {
    let cluster = Arc::new(PostgresServer::of_its_own("-c fsync=on", &[]));
    let mut server = TestServer::on(Database::create_on(&cluster)).await;
    let seed = seed();
    let mut random = StdRng::seed_from_u64(seed);
    let load = Load::start(&server);
    for round in 0..ROUNDS {
        load.acknowledge(random.random_range(10..80)).await;
        // Wherever the deliveries under way happen to be by then.
        tokio::time::sleep(Duration::from_micros(random.random_range(0..5000))).await;
        if round % 2 == 0 {
            server.process.sigkill();
            let acknowledged = load.acknowledged();
            server.process = block_in_place(|| server.another_server());
            load.aim_at(&[&server.process.base]);
            check(
                &server,
                &acknowledged,
                &format!("our server is killed in round {round}, seed {seed}"),
            );
        } else {
            block_in_place(|| cluster.stop_at_once());
            let acknowledged = load.acknowledged();
            block_in_place(|| cluster.start_again());
            check(
                &server,
                &acknowledged,
                &format!("the database is stopped in round {round}, seed {seed}"),
            );
        }
    }
    let told = load.finish().await;
    assert!(told.events() >= ROUNDS * 10 && !told.refused_by().is_empty());
    told.check_log(&server.logged_ids(), &format!("seed {seed}"));
    told.check_histories(&server.all_histories(), &format!("seed {seed}"))
        .await;
}

fn check(server: &TestServer, acknowledged: &BTreeSet<String>, told: &str) {
    let kept: BTreeSet<String> = server.logged_ids().into_iter().collect();
    let lost: Vec<&String> = acknowledged.difference(&kept).collect();
    assert!(lost.is_empty(), "{told}: acknowledged and lost: {lost:?}");
}
