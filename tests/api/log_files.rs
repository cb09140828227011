//! Somebody deletes, replaces or truncates the files beside a SQLite database in use: nothing that
//! was acknowledged is lost, and no more is accepted.

use std::fs::{self, OpenOptions};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::json;
use sqlx::{Connection, SqliteConnection};
use tokio::task::block_in_place;

use testkit::{Engine, Load, Server, TestServer, invoice_path};

/// Longest time until a lost log is saved: the check interval, and a machine that is busy.
const SAVED_WITHIN: Duration = Duration::from_secs(20);
const SAVED: &str = "saved the lost write-ahead log";

struct Files {
    log: PathBuf,
    index: PathBuf,
}

fn files(server: &TestServer) -> Files {
    let file = server.database.url.trim_start_matches("sqlite://");
    Files {
        log: format!("{file}-wal").into(),
        index: format!("{file}-shm").into(),
    }
}

async fn deliver(server: &TestServer, id: &str) -> u16 {
    let event = json!({"id": id, "object": "event", "type": "customer.updated",
        "created": 1_769_850_000, "data": {"object": {"id": "cus_1", "object": "customer"}}});
    server.deliver(&event).await.status.as_u16()
}

async fn wait_until_logged(server: &Server, text: &str) {
    let deadline = Instant::now() + SAVED_WITHIN;
    while !server.log().contains(text) {
        assert!(Instant::now() < deadline, "{text:?} must be logged");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Delivers, damages the files, kills the server, and looks for all acknowledged deliveries.
async fn check_damage(damage: impl FnOnce(&Files), loses_log: bool, cause: &str) {
    let mut server = TestServer::start(Engine::Sqlite).await;
    let load = Load::start(&server);
    load.acknowledge(300).await;
    damage(&files(&server));

    // From here on, all is refused.
    assert_eq!(deliver(&server, "evt_after").await, 503, "{cause}");
    server.get("/readyz", "").await.with_status(503);
    server
        .get(&invoice_path("inv-0"), &server.acme_key)
        .await
        .with_status(503);
    wait_until_logged(&server.process, cause).await;
    if loses_log {
        wait_until_logged(&server.process, SAVED).await;
    }
    let doctor = server.run(&["doctor"]).with_code(4).stdout;
    assert!(doctor.contains("write-ahead log"), "{doctor}");
    assert!(doctor.contains("Restart `serve`"), "{doctor}");
    let acknowledged = load.acknowledged();
    assert_eq!(deliver(&server, "evt_later").await, 503);

    // Killed, so that it cannot put right anything more.
    server.process.sigkill();
    server.process = block_in_place(|| server.another_server());
    let kept = server.logged_ids();
    let lost: Vec<_> = acknowledged
        .iter()
        .filter(|id| !kept.contains(id))
        .collect();
    assert!(lost.is_empty(), "{cause}: {lost:?} were acknowledged");
    assert!(!kept.contains(&"evt_later".to_owned()), "{cause}");

    load.redirect_to(&[&server.process.base]);
    load.finish().await.check_log(&kept_of_load(&server), cause);
}

/// The events of the load, without those that the test delivered itself.
fn kept_of_load(server: &TestServer) -> Vec<String> {
    let mut ids = server.logged_ids();
    ids.retain(|id| id != "evt_after");
    ids
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deleted_log_loses_nothing_acknowledged() {
    let damage = |files: &Files| fs::remove_file(&files.log).unwrap();
    check_damage(damage, true, "-wal is no longer there").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deleted_index_loses_nothing_acknowledged() {
    let damage = |files: &Files| fs::remove_file(&files.index).unwrap();
    check_damage(damage, false, "-shm is no longer there").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deleted_log_and_index_lose_nothing_acknowledged() {
    let damage = |files: &Files| {
        fs::remove_file(&files.log).unwrap();
        fs::remove_file(&files.index).unwrap();
    };
    check_damage(damage, true, "-wal is no longer there").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn renamed_log_loses_nothing_acknowledged() {
    let damage = |files: &Files| {
        fs::rename(&files.log, files.log.with_extension("moved")).unwrap();
    };
    check_damage(damage, true, "-wal is no longer there").await;
}

/// As a restore would: a log of the same database, of an earlier time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replaced_log_loses_nothing_acknowledged() {
    let damage = |files: &Files| {
        let earlier = files.log.with_extension("earlier");
        let log = fs::read(&files.log).unwrap();
        fs::write(&earlier, &log[..log.len() / 2]).unwrap();
        fs::rename(&earlier, &files.log).unwrap();
    };
    check_damage(damage, true, "-wal is no longer the file that was opened").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn log_that_is_put_back_is_accepted_again() {
    let server = TestServer::start(Engine::Sqlite).await;
    assert_eq!(deliver(&server, "evt_1").await, 200);
    let log = files(&server).log;
    let aside = log.with_extension("aside");

    fs::rename(&log, &aside).unwrap();
    assert_eq!(deliver(&server, "evt_2").await, 503);
    fs::rename(&aside, &log).unwrap();
    assert_eq!(deliver(&server, "evt_3").await, 200);
    assert_eq!(server.logged_ids(), ["evt_3", "evt_1"]);
}

/// A truncation destroys frames in place, so the database may be damaged at the next start. This
/// test claims only that the running server refuses at once and names the remedy.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn truncated_log_is_refused() {
    let server = TestServer::start(Engine::Sqlite).await;
    assert_eq!(deliver(&server, "evt_1").await, 200);
    let log = OpenOptions::new().write(true).open(files(&server).log);
    log.unwrap().set_len(0).unwrap();

    for _ in 0..3 {
        assert_eq!(deliver(&server, "evt_2").await, 503);
    }
    server.get("/readyz", "").await.with_status(503);
    wait_until_logged(&server.process, "was truncated while it was in use").await;
    let doctor = server.run(&["doctor"]).with_code(4).stdout;
    assert!(doctor.contains("reconcile --since 30d"), "{doctor}");
}

/// Backup tools do this, and nothing is lost by it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn truncating_checkpoint_of_another_process_is_accepted() {
    let server = TestServer::start(Engine::Sqlite).await;
    for n in 0..20 {
        assert_eq!(deliver(&server, &format!("evt_{n}")).await, 200);
    }

    let mut other = SqliteConnection::connect(&server.database.url)
        .await
        .unwrap();
    let checkpoint = sqlx::query("pragma wal_checkpoint(truncate)");
    checkpoint.execute(&mut other).await.unwrap();
    assert_eq!(fs::metadata(files(&server).log).unwrap().len(), 0);
    assert_eq!(deliver(&server, "evt_20").await, 200);
    assert_eq!(server.logged_ids().len(), 21);
}

/// Another process would create an empty log, and write nonsense between the two.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_do_not_join_a_lost_log() {
    let server = TestServer::start(Engine::Sqlite).await;
    assert_eq!(deliver(&server, "evt_1").await, 200);
    let log = files(&server).log;
    fs::remove_file(&log).unwrap();

    let invoice = br#"{"metadata":{"uid":"inv-1"}}"#;
    let import = ["invoices", "import", "--tenant", "acme", "-"];
    let refused = server.run_with_input(&import, invoice).with_code(4);
    assert!(refused.stderr.contains("-wal is missing"), "{refused:?}");
    assert!(!log.exists(), "no command creates a log");
}
