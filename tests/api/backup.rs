//! Restores a database from a backup. Events acknowledged after the backup come back from Stripe.

use std::collections::BTreeMap;

use serde_json::Value;
use sqlx::{Connection, SqliteConnection};

use testkit::each_database;
use testkit::stripe::{LIVE_KEY, Stripe, story};
use testkit::{CommandOutput, Database, Engine, Files};

const INVOICES: usize = 60;

fn command(database: &Database, arguments: &[&str], input: &str) -> CommandOutput {
    testkit::run(
        &[("DATABASE_URL", &database.url), ("RUST_LOG", "warn")],
        arguments,
        input.as_bytes(),
    )
}

fn histories(database: &Database) -> BTreeMap<String, String> {
    let listed = command(database, &["invoices", "list", "--json"], "")
        .with_code(0)
        .json_lines();
    let uid = |invoice: &Value| invoice["metadata"]["uid"].as_str().unwrap().to_owned();
    listed
        .iter()
        .map(|invoice| (uid(invoice), invoice["status"]["states"].to_string()))
        .collect()
}

/// Makes an online copy of the database and a new database from that copy.
async fn backed_up_and_restored(database: &Database, files: &Files) -> Database {
    let restored = Database::create(database.engine);
    match database.engine {
        Engine::Sqlite => {
            let mut connection = SqliteConnection::connect(&database.url).await.unwrap();
            let path = restored.url.strip_prefix("sqlite://").unwrap();
            sqlx::query("vacuum into $1")
                .bind(path)
                .execute(&mut connection)
                .await
                .unwrap();
        }
        Engine::Postgres => {
            let dump = files.path("dump");
            database.dump(&dump);
            restored.restore(&dump);
        }
    }

    restored
}

each_database! {
    async fn restored_backup_fetches_later_events_from_stripe(server: TestServer) {
        let (stripe, files) = (Stripe::start(), Files::new());
        let invoices = story::play(&stripe, INVOICES);
        let documents: Vec<String> = invoices
            .iter()
            .map(|invoice| invoice.document().to_string())
            .collect();
        let mut events = stripe.events();
        events.sort_by_key(|event| event.created);
        let delivered: Vec<String> = events
            .iter()
            .map(|event| event.as_delivered().to_string())
            .collect();
        let (before, after) = delivered.split_at(delivered.len() / 2);

        let database = &server.database;
        command(
            database,
            &["invoices", "import", "--tenant", "acme", "-"],
            &documents.join("\n"),
        )
        .with_code(0);
        command(database, &["replay", "-"], &before.join("\n")).with_code(0);
        let restored = backed_up_and_restored(database, &files).await;
        command(database, &["replay", "-"], &after.join("\n")).with_code(0);
        let whole = histories(database);
        assert!(histories(&restored) != whole, "something was lost");

        let environment = [
            ("DATABASE_URL", &*restored.url),
            ("STRIPE_API_KEY", LIVE_KEY),
            ("STRIPE_API_BASE", &stripe.base),
            ("STRIPE_API_RATE", "1000"),
            ("RUST_LOG", "warn"),
        ];
        testkit::run(&environment, &["reconcile", "--since", "30d"], b"").with_code(3);
        let found = histories(&restored);
        let other: Vec<_> = whole
            .iter()
            .filter(|(uid, states)| found.get(*uid) != Some(*states))
            .take(2)
            .collect();
        assert!(
            other.is_empty() && found.len() == whole.len(),
            "expected {other:?}"
        );
        testkit::run(&environment, &["reconcile"], b"").with_code(0);
    }
}
