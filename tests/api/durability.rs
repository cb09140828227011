//! PostgreSQL's settings are switched to unsafe ones while the program runs: no acknowledged
//! delivery depends on them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::task::block_in_place;

use testkit::{Answer, Database, Pooler, PostgresServer, TestServer, run};

/// Time within which a server notices that a setting changed.
const NOTICED: Duration = Duration::from_secs(3);

/// Records which `synchronous_commit` each insert of an event runs under.
const RECORD_SETTING: &str = "
    create table settings_seen (value text);
    create function record_setting() returns trigger language plpgsql as $$ begin
        insert into settings_seen values (current_setting('synchronous_commit')); return new; end $$;
    create trigger record_setting after insert on events
    for each row execute function record_setting()";

async fn deliver(server: &TestServer, id: &str) -> Answer {
    let event = json!({"id": id, "object": "event", "type": "customer.updated",
        "created": 1_769_850_000, "data": {"object": {"id": "cus_1", "object": "customer"}}});
    server.deliver(&event).await
}

fn name_of(server: &TestServer) -> String {
    let name = server.database.url.rsplit('/').next().unwrap();
    name.to_owned()
}

/// Switches a setting, and reloads the settings of all sessions.
fn switch(cluster: &PostgresServer, setting: &str, value: &str) {
    cluster.sql("postgres", &format!("alter system set {setting} = {value}"));
    cluster.sql("postgres", "select pg_reload_conf()");
    cluster.wait_until("the setting is not reloaded", || {
        cluster.sql("postgres", &format!("show {setting}")) == value
    });
}

/// Switches `synchronous_commit` off in each place, and checks that deliveries commit with it.
async fn commit_synchronously(cluster: &PostgresServer, server: &TestServer) {
    let name = name_of(server);
    let sql = |statement: &str| block_in_place(|| cluster.sql(&name, statement));
    sql(RECORD_SETTING);
    let mut count = 0;
    let switches = [
        "alter system set synchronous_commit = off".to_owned(),
        "alter role postgres set synchronous_commit = off".to_owned(),
        format!("alter database {name} set synchronous_commit = off"),
    ];
    let end_all = "select count(pg_terminate_backend(pid)) from pg_stat_activity \
                   where datname = current_database() and pid <> pg_backend_pid()";

    for unsafe_setting in switches {
        sql(&unsafe_setting);
        sql("select pg_reload_conf()");
        assert_eq!(
            block_in_place(|| {
                cluster.wait_until("the setting is not reloaded", || {
                    cluster.sql(&name, "show synchronous_commit") == "off"
                });
                cluster.sql(&name, "show synchronous_commit")
            }),
            "off"
        );
        // On the connections that are open, and on new ones.
        for _ in 0..2 {
            count += 1;
            let id = format!("evt_{count}");
            deliver(server, &id).await.with_status(200);
            sql(end_all);
        }
    }

    let seen = "select string_agg(distinct value, ','), count(*) from settings_seen";
    assert_eq!(sql(seen), format!("on|{count}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deliveries_commit_synchronously_whatever_is_set() {
    let cluster = Arc::new(PostgresServer::start_durable("-c fsync=on", &[]));
    let server = TestServer::on(Database::create_on(&cluster)).await;
    commit_synchronously(&cluster, &server).await;

    let url = server.database.url.as_str();
    let refused = run(&[("DATABASE_URL", url)], &["migrate"], b"").with_code(4);
    assert!(
        refused.stderr.contains("synchronous_commit is off"),
        "{refused:?}"
    );
    let examined = server.run(&["doctor", "--quiet"]);
    assert!(
        examined.code != 0 && examined.stdout.contains("synchronous_commit is off"),
        "{examined:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deliveries_through_pooler_commit_synchronously() {
    let cluster = Arc::new(PostgresServer::start_durable("-c fsync=on", &[]));
    let pooler = Pooler::start(&cluster);
    let database = Database::create_on(&cluster).with_url(|name| pooler.url(name));
    let server = TestServer::on(database).await;
    commit_synchronously(&cluster, &server).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn server_that_does_not_flush_is_refused() {
    let cluster = Arc::new(PostgresServer::start_durable("", &[]));
    let server = TestServer::on(Database::create_on(&cluster)).await;
    // While the database is unavailable, only a key that has scraped before may scrape.
    let metrics = server.get("/metrics", &server.operator_key).await;
    metrics.with_status(200);
    for (n, setting) in ["fsync", "full_page_writes"].into_iter().enumerate() {
        deliver(&server, &format!("evt_before_{n}"))
            .await
            .with_status(200);
        block_in_place(|| switch(&cluster, setting, "off"));
        let deadline = Instant::now() + NOTICED;
        let mut count = 0;
        loop {
            count += 1;
            let id = format!("evt_{setting}_{count}");
            if deliver(&server, &id).await.status == 503 {
                break;
            }
            assert!(
                Instant::now() < deadline,
                "deliveries are acknowledged with {setting} = off"
            );
        }
        server.get("/readyz", "").await.with_status(503);
        let why = format!("{setting} is off");
        assert!(
            server.process.log().contains(&why),
            "{}",
            server.process.log()
        );

        let metrics = server.get("/metrics", &server.operator_key).await;
        let gauge = format!("stripe_reconciler_database_unsafe_setting{{setting=\"{setting}\"}} 1");
        let text = String::from_utf8_lossy(&metrics.body);
        assert!(text.contains(&gauge), "{text}");
        let url = server.database.url.as_str();
        let refused = run(&[("DATABASE_URL", url)], &["migrate"], b"").with_code(4);
        assert!(refused.stderr.contains(&why), "{refused:?}");
        let examined = server.run(&["doctor", "--quiet"]);
        assert!(
            examined.code != 0 && examined.stdout.contains(&why),
            "{examined:?}"
        );

        block_in_place(|| switch(&cluster, setting, "on"));
        let deadline = Instant::now() + NOTICED;
        while deliver(&server, &format!("evt_after_{n}")).await.status != 200 {
            assert!(Instant::now() < deadline, "it is not back");
        }
    }
}
