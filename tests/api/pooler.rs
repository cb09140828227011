//! PgBouncer in transaction mode with fewer connections than clients: everything works as without
//! it.

use testkit::{CommandOutput, Database, Engine, Load, Pooler, PostgresServer, TestServer, run};

/// Uses every database feature of the program, with two servers and many commands on a few
/// connections.
async fn assert_behaves_as_without(server: TestServer, direct_url: &str) {
    let second = server.another_server();
    let load = Load::start(&server);
    load.redirect_to(&[&server.process.base, &second.base]);
    load.acknowledge(150).await;

    // Under load: the commands must neither find nor leave session state on a shared connection.
    for _ in 0..3 {
        assert_eq!(
            server.key(&["--tenant", "acme"]).len(),
            server.acme_key.len()
        );
        server.run(&["rebuild"]).with_code(0);
        server.run(&["migrate"]).with_code(0);
        server
            .run(&["invoices", "get", "acme", "inv-0"])
            .with_code(0);
    }

    load.acknowledge(150).await;
    let deliveries = load.finish().await;
    assert!(
        deliveries.refused_by().is_empty(),
        "{:?}",
        deliveries.refused_by()
    );

    deliveries.check_log(&server.logged_ids(), "through a pooler");
    let histories = server.all_histories();
    deliveries
        .check_histories(&histories, "through a pooler")
        .await;
    for (uid, states) in histories.iter().take(3) {
        assert_eq!(server.states(uid).await.to_string(), *states);
    }

    check_commands(&server, direct_url, histories.keys().next().unwrap());
    assert_eq!(server.all_histories(), histories);
}

/// Asserts that read-only commands print the same without the pooler and that the others write
/// their data.
fn check_commands(server: &TestServer, direct_url: &str, uid: &str) {
    let run_directly = |arguments: &[&str]| {
        run(&[("DATABASE_URL", direct_url)], arguments, b"")
            .with_code(0)
            .stdout
    };
    let why = ["why", "acme", uid];
    let keys = run(
        &[("DATABASE_URL", direct_url)],
        &["keys", "list", "--json"],
        b"",
    )
    .with_code(0)
    .json();
    let key_id = keys[0]["id"].clone();

    server
        .run(&["keys", "revoke", key_id.as_str().unwrap()])
        .with_code(0);
    for arguments in [
        &why[..],
        &["keys", "list"],
        &["events", "list", "--limit", "50"],
        &["events", "show", "evt_1"],
        &["events", "export"],
    ] {
        assert_eq!(
            server.run(arguments).with_code(0).stdout,
            run_directly(arguments),
            "{arguments:?}"
        );
    }

    let differs = |output: CommandOutput| output.with_code(3);
    PostgresServer::shared().sql(
        direct_url,
        "update events set telling = null where id in ('evt_0', 'evt_6', 'evt_12')",
    );
    differs(server.run(&["rebuild", "--dry-run"]));
    differs(server.run(&["rebuild"]));
    server.run(&["rebuild", "--dry-run"]).with_code(0);
    let exported = server.run(&["events", "export"]).with_code(0).stdout;
    let again = server
        .run_with_input(&["replay", "-", "--json"], exported.as_bytes())
        .with_code(0)
        .json();

    assert_eq!(
        (again["recorded"].as_u64(), again["refused"].as_u64()),
        (Some(0), Some(0)),
        "{again}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pooler_on_another_port_is_detected_and_works() {
    let pooler = Pooler::start(PostgresServer::shared());
    let database = Database::create(Engine::Postgres);
    let run_directly = database.url.clone();
    assert_behaves_as_without(
        TestServer::on(database.with_url(|name| pooler.url(name))).await,
        &run_directly,
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pooler_on_same_port_works_if_named_in_url() {
    let pooler = Pooler::start_on_same_port(PostgresServer::shared());
    let database = Database::create(Engine::Postgres);
    let run_directly = database.url.clone();
    let url = |name: &str| format!("{}?statement-cache-capacity=0", pooler.url(name));
    assert_behaves_as_without(TestServer::on(database.with_url(url)).await, &run_directly).await;
}

#[test]
fn concurrent_migrations_through_pooler_do_not_block() {
    let pooler = Pooler::start(PostgresServer::shared());
    for _ in 0..3 {
        let database = Database::create(Engine::Postgres).with_url(|name| pooler.url(name));
        let migrate =
            |code| run(&[("DATABASE_URL", &database.url)], &["migrate"], b"").with_code(code);
        let outputs: Vec<String> = std::thread::scope(|scope| {
            let migrating: Vec<_> = (0..4).map(|_| scope.spawn(|| migrate(0).stdout)).collect();
            migrating
                .into_iter()
                .map(|migrated| migrated.join().expect("each of them ends well"))
                .collect()
        });
        assert_eq!(
            outputs
                .iter()
                .filter(|deliveries| deliveries.contains("start"))
                .count(),
            1,
            "{outputs:?}"
        );

        // A schema left by a newer version.
        let sql = |statement: &str| PostgresServer::shared().sql(&database.url, statement);
        sql(
            "insert into _sqlx_migrations select 9999, 'newer', now(), true, checksum, 0 from _sqlx_migrations limit 1",
        );
        let refused: Vec<String> = (0..4).map(|_| migrate(4).stderr).collect();
        assert!(
            refused
                .iter()
                .all(|deliveries| deliveries.contains("newer version")),
            "{refused:?}"
        );
        sql("delete from _sqlx_migrations where version = 9999");
        migrate(0);
        let lock_count = "select count(*) from pg_locks where locktype = 'advisory' and database = (select oid from pg_database where datname = current_database())";
        assert_eq!(
            sql(lock_count),
            "0",
            "a lock is left on a connection that others use"
        );
    }
}
