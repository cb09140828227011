//! Opening, migrating and closing a store, and API keys.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use stripe_reconciler::store::{
    ApiKey, Durability, Outcome, PackedBody, Scope, Source, Store, StoreErrorClass, StoreErrorKind,
};

use super::{TestStore, each_store, nth};
use testkit::{Database, Engine};

pub(super) fn api_key(id: &str, scope: Scope, created_ms: i64) -> ApiKey {
    ApiKey {
        id: id.to_owned(),
        scope,
        created_ms,
        expires_ms: Some(created_ms + 5),
        revoked_ms: None,
    }
}

each_store! {
    async fn concurrent_migrations_run_once(test: TestStore) {
        assert!(
            test.store.migrate().await.unwrap().is_empty(),
            "the second time there is nothing to do"
        );

        test.store.ping().await.unwrap();
        let empty = Database::create(test.database.engine);
        let store = Store::connect(&empty.url).await.unwrap();
        let unmigrated = store
            .ping_within(Duration::from_secs(30))
            .await
            .unwrap_err();

        assert!(
            unmigrated.kind() == StoreErrorKind::NotMigrated,
            "{unmigrated}"
        );

        let unread = store.invoice("acme", "a").await.unwrap_err();
        assert_eq!(unread.kind(), StoreErrorKind::NotMigrated, "{unread}");
        assert!(unread.to_string().contains("migrate"), "{unread}");

        let migrating: Vec<_> = (0..6)
            .map(|_| {
                let url = empty.url.clone();
                tokio::spawn(
                    async move { Store::connect(&url).await.unwrap().migrate().await.unwrap() },
                )
            })
            .collect();
        let mut applied = Vec::new();
        for migrated in migrating {
            applied.extend(migrated.await.unwrap());
        }

        assert!(applied.contains(&"start"), "{applied:?}");

        let once: std::collections::BTreeSet<&str> = applied.iter().copied().collect();
        assert_eq!(
            once.len(),
            applied.len(),
            "each by one of them: {applied:?}"
        );

        store.ping().await.unwrap();
    }

    async fn newer_schema_is_rejected(test: TestStore) {
        test.database.execute("update _sqlx_migrations set version = 9999 where version = (select max(version) from _sqlx_migrations)").await;
        let refused = test.store.migrate().await.unwrap_err();
        assert_eq!(refused.kind(), StoreErrorKind::SchemaNewer);
        assert!(refused.to_string().contains("newer version"), "{refused}");
        assert!(
            test.store.ping().await.is_err(),
            "it is not what this version needs"
        );
        let again = tokio::time::timeout(Duration::from_secs(5), test.store.migrate()).await;
        assert!(again.unwrap().is_err(), "no lock is left behind");
    }

    async fn closed_store_fails_and_another_continues(test: TestStore) {
        test.store.append(&[nth(1)]).await.unwrap();
        let other = Store::connect(&test.database.url).await.unwrap();
        test.store.close().await;
        assert!(test.store.append(&[nth(2)]).await.is_err() && test.store.keys().await.is_err());
        assert_eq!(other.stored_bodies(None, 10).await.unwrap().len(), 1);
    }

    async fn key_is_found_by_hash_and_listed_newest_first(test: TestStore) {
        let store = &test.store;
        let (operator, acme) = (
            api_key("key_1", Scope::Operator, 10),
            api_key("key_2", Scope::Tenant("acme \u{e9}'".to_owned()), 20),
        );
        let third = ApiKey {
            expires_ms: None,
            ..api_key("key_0", Scope::Operator, 20)
        };
        for (key, hash) in [(&operator, [1; 32]), (&acme, [2; 32]), (&third, [3; 32])] {
            store.insert_key(key, &hash).await.unwrap();
        }

        assert_eq!(
            store.key_by_hash(&[2; 32]).await.unwrap(),
            Some(acme.clone())
        );
        assert_eq!(store.key_by_hash(&[9; 32]).await.unwrap(), None);
        assert_eq!(
            store.key_by_id(&acme.id).await.unwrap(),
            Some((acme.clone(), vec![2; 32]))
        );
        assert_eq!(store.key_by_id("key_9").await.unwrap(), None);
        assert_eq!(
            store.keys().await.unwrap(),
            [third.clone(), acme.clone(), operator.clone()]
        );

        assert!(
            store
                .insert_key(&api_key("key_1", Scope::Operator, 30), &[4; 32])
                .await
                .is_err(),
            "the id is taken"
        );
        assert!(
            store
                .insert_key(&api_key("key_4", Scope::Operator, 30), &[1; 32])
                .await
                .is_err(),
            "the hash is taken"
        );

        assert_eq!(store.keys().await.unwrap().len(), 3);
        assert!(
            acme.scope.reads("acme \u{e9}'")
                && !acme.scope.reads("acme")
                && operator.scope.reads("acme")
        );
    }

    async fn key_revocation_applies_at_once_and_once(test: TestStore) {
        let store = &test.store;
        store
            .insert_key(&api_key("key_1", Scope::Operator, 10), &[1; 32])
            .await
            .unwrap();
        let revoking: Vec<_> = (0..8)
            .map(|n| {
                let store = store.clone();
                tokio::spawn(async move { store.revoke_key("key_1", 100 + n).await.unwrap() })
            })
            .collect();
        let mut revoked = 0;
        for one in revoking {
            revoked += usize::from(one.await.unwrap());
        }

        assert_eq!(revoked, 1);
        assert!(
            !store.revoke_key("key_1", 500).await.unwrap()
                && !store.revoke_key("key_9", 500).await.unwrap()
        );

        let key = store.key_by_hash(&[1; 32]).await.unwrap().unwrap();
        assert!(
            key.revoked_ms.is_some_and(|ms| (100..108).contains(&ms)),
            "{key:?}"
        );
    }
}

#[test]
fn invalid_url_error_hides_the_password() {
    for right in [
        "sqlite://a.db",
        "sqlite:///tmp/a b.db",
        "postgres://u:p@h/d",
        "postgresql://h:1/d?sslmode=verify-full",
        "postgres:///d?host=/run",
    ] {
        Store::check_url(right).unwrap();
    }

    let wrong = [
        "",
        "a.db",
        "mysql://u:hidden@h/d",
        "sqlite://",
        "sqlite://:memory:",
        "sqlite://a?mode=memory",
        "postgres://u:hidden@h:port/d",
        "postgres://u:hidden@h/d?sslmode=hidden_too",
    ];
    for wrong in wrong {
        let error = Store::check_url(wrong).unwrap_err();
        assert!(
            !error.is_empty() && !error.contains("hidden@") && !error.contains("u:"),
            "{wrong}: {error}"
        );
    }
}

#[tokio::test]
async fn read_only_open_creates_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("sqlite://{}/a.db?cache=private", folder.path().display());
    let missing = Store::connect_to_existing(&url).await.unwrap_err();
    assert!(
        missing.kind() == StoreErrorKind::FileMissing && missing.reason().contains("a.db"),
        "{missing}"
    );
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);

    Store::connect(&url).await.unwrap().close().await;
    assert!(
        Store::connect_to_existing(&url)
            .await
            .unwrap()
            .ping()
            .await
            .is_err(),
        "it is there, and not migrated"
    );
}

#[tokio::test]
async fn unopenable_database_is_a_readable_error() {
    let unknown = Store::connect("mysql://h/d").await.unwrap_err();
    assert_eq!(unknown.class(), StoreErrorClass::Rejected, "{unknown}");

    let missing = Store::connect("sqlite:///no/such/folder/a.db")
        .await
        .unwrap_err();
    assert!(
        missing.to_string().contains("/no/such/folder/a.db"),
        "{missing}"
    );

    // No process listens on port 1.
    let away = Store::connect("postgres://u:hidden@127.0.0.1:1/d")
        .await
        .unwrap_err();
    assert!(
        away.kind() == StoreErrorKind::Unreachable && !away.to_string().contains("hidden"),
        "{away}"
    );

    let database = Database::create(Engine::Postgres);
    let unsafe_url = format!("{}?options=-c%20synchronous_commit%3Doff", database.url);
    let refused = Store::connect(&unsafe_url).await.unwrap_err();
    assert!(
        refused.kind() == StoreErrorKind::UnsafeCommit
            && refused.to_string().contains("synchronous_commit"),
        "{refused}"
    );
}

#[test]
fn odd_names_and_bodies_survive_round_trip() {
    for outcome in [
        Outcome::Recorded,
        Outcome::NoPaymentFact,
        Outcome::Unreadable,
    ] {
        assert_eq!(Outcome::parse(outcome.as_str()), Some(outcome));
    }

    assert_eq!(Outcome::parse("duplicate"), None);

    let sources = [Source::Webhook, Source::Replay, Source::Api].map(Source::as_str);
    assert_eq!(sources, ["webhook", "replay", "api"]);

    for body in [&b""[..], b"{}", &[0, 255, 0], &[7; 100_000]] {
        assert_eq!(PackedBody::pack(body).unpack().as_deref(), Some(body));
    }
}

#[tokio::test]
async fn new_database_is_durable() {
    for engine in [Engine::Sqlite, Engine::Postgres] {
        let database = Database::create(engine);
        let store = Store::connect(&database.url).await.unwrap();
        assert_eq!(store.durability(), Durability::SAFE);
    }
}

#[tokio::test]
async fn new_sqlite_file_is_private_to_its_user() {
    let folder = tempfile::tempdir().unwrap();
    let mode = |name: &str| {
        std::fs::metadata(folder.path().join(name))
            .unwrap()
            .permissions()
            .mode()
            & 0o777
    };
    let url = format!("sqlite://{}/with%20a%20blank.db", folder.path().display());
    let missing = Store::connect_to_existing(&url).await.unwrap_err();

    assert_eq!(missing.kind(), StoreErrorKind::FileMissing);

    let store = Store::connect(&url).await.unwrap();
    store.migrate().await.unwrap();
    let names: Vec<String> = std::fs::read_dir(folder.path())
        .unwrap()
        .map(|f| f.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(names.len(), 3, "the file, its log and its index: {names:?}");

    for name in names {
        assert!(
            name.starts_with("with a blank.db") && mode(&name) == 0o600,
            "{name}: {:o}",
            mode(&name)
        );
    }

    std::fs::set_permissions(
        folder.path().join("with a blank.db"),
        std::fs::Permissions::from_mode(0o640),
    )
    .unwrap();
    Store::connect_to_existing(&url).await.unwrap();
    assert_eq!(
        mode("with a blank.db"),
        0o640,
        "what somebody has chosen stays"
    );
}

each_store! {
    async fn only_file_readable_by_all_is_exposed(place: TestStore) {
        assert_eq!(place.store.exposed_mode(), None);
        let Some(path) = place.database.url.strip_prefix("sqlite://") else {
            return;
        };
        for (mode, exposed) in [(0o640, None), (0o604, Some(0o604)), (0o600, None)] {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(place.store.exposed_mode(), exposed);
        }
    }
}
