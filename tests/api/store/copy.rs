//! `copy` between two databases: pages of rows, merging, and write protection.

use stripe_reconciler::jobs::copy::{CopyError, Copying, Mismatch};
use stripe_reconciler::store::{
    ActivityDelta, Appended, CheckResult, CopyTarget, NewEvent, PackedBody, ProgressKey, Row,
    Scope, Store, Table, Value,
};

use super::opening::api_key;
use super::reconcile::{run_of, state};
use super::{NewInvoice, ODD, TestStore, each_store, event, invoice, key, nth};
use testkit::{Engine, PostgresServer};

/// Size of a body that does not fit into one page, in bytes.
const LARGE: usize = 700_000;

/// Returns all rows of a table, read page by page, and the number of pages.
async fn all(store: &Store, table: Table) -> (Vec<Row>, usize) {
    let (mut rows, mut pages): (Vec<Row>, usize) = (Vec::new(), 0);
    loop {
        let page = store
            .rows_after(table, rows.last().map(Row::key))
            .await
            .unwrap();
        assert!(
            page.is_last || !page.rows.is_empty(),
            "a page that is not the last has rows"
        );
        rows.extend(page.rows);
        pages += 1;
        if page.is_last {
            assert!(
                rows.is_sorted_by(|a, b| a.key() < b.key()),
                "{}: by key, each once",
                table.name
            );
            return (rows, pages);
        }
    }
}

/// Returns all rows between two keys with their bodies, and the number of pages.
async fn whole(store: &Store, table: Table, rows: &[Row]) -> (Vec<Row>, usize) {
    let (mut found, mut pages): (Vec<Row>, usize) = (Vec::new(), 0);
    let last = rows.last().unwrap().key();
    let mut from = rows[0].key().to_vec();

    loop {
        let page = store.rows_between(table, &from, last).await.unwrap();
        // A range begins with its first key, not after it.
        found.extend(
            page.rows
                .into_iter()
                .filter(|row| pages == 0 || row.key() > &from[..]),
        );
        pages += 1;
        from = found.last().unwrap().key().to_vec();
        if page.is_last {
            return (found, pages);
        }
    }
}

/// Returns random bytes, which compression cannot shrink.
fn large_body() -> PackedBody {
    let mut bytes = vec![0; LARGE];
    rand::fill(&mut bytes[..]);
    PackedBody::pack(&bytes)
}

/// Fills every table, with odd and large values among the rows.
async fn fill(store: &Store) {
    let odd = ODD.iter().enumerate().map(|(n, odd)| {
        let observation = Some(format!("{odd}{}", "x".repeat(LARGE)));
        NewEvent {
            secret_label: Some((*odd).to_owned()),
            observation,
            ..event(&format!("evt_odd_{n}"), 0, odd, -5)
        }
    });
    let large = (0..5).map(|n| NewEvent {
        body: large_body(),
        ..event(&format!("evt_large_{n}"), 255, "in_large", 9)
    });
    store
        .append(
            &odd.chain(large)
                .chain((0..1200).map(nth))
                .collect::<Vec<_>>(),
        )
        .await
        .unwrap();

    let invoices: Vec<_> = (0..600)
        .map(|n| invoice("acme", &format!("inv-{n}"), Some(&format!("in_{n}"))))
        .collect();
    store.put_invoices(&invoices, 5).await.unwrap();
    store
        .put_invoice(&invoice(ODD[3], ODD[0], None), i64::MIN, &|_| true)
        .await
        .unwrap();
    store
        .insert_key(
            &api_key("key_1", Scope::Tenant(ODD[1].to_owned()), 10),
            &[0; 32],
        )
        .await
        .unwrap();

    store
        .insert_key(&api_key("key_2", Scope::Operator, 10), &[255; 32])
        .await
        .unwrap();
    store.revoke_key("key_1", 11).await.unwrap();
    store
        .set_progress(&ProgressKey::AccountEvents("acct_1".to_owned()), i64::MIN)
        .await
        .unwrap();
    store
        .mark_lookup(&[
            state(key("evt_1", 1), None, 3),
            state(key("evt_2", 2), Some(77), 1),
        ])
        .await
        .unwrap();

    let checked = |id: &str, check_due_ms| CheckResult {
        stripe_invoice_id: id.to_owned(),
        checked_ms: 5,
        check_due_ms,
        differs_since_ms: Some(4),
        agrees: check_due_ms.is_none(),
    };
    store
        .save_check_results(&[checked("in_1", None), checked("in_2", Some(9))])
        .await
        .unwrap();
    store.save_run(&run_of(7)).await.unwrap();
    let last_seen = [(ODD[2].to_owned(), i64::MIN), ("delivered".to_owned(), 7)].into();
    let news = ActivityDelta {
        last_seen,
        hours: [490_000].into(),
        named_invoices: [("in_awaited".to_owned(), 8)].into(),
    };

    store.save_activity(&news, 9, 0, 0).await.unwrap();
    store.take_lease("pass", "holder", 0, 100).await.unwrap();
}

async fn assert_same(source: &Store, target: &Store) {
    for table in Table::ALL {
        let (here, there) = (all(source, table).await.0, all(target, table).await.0);
        assert!(
            here == there,
            "{}: {} and {} rows",
            table.name,
            here.len(),
            there.len()
        );
        assert!(table.has_payload() == (table.name == "events"));
        if !here.is_empty() {
            assert!(
                whole(source, table, &here).await.0 == whole(target, table, &here).await.0,
                "{}",
                table.name
            );
        }
    }
}

async fn copy(source: &Store, target: &Store) -> u64 {
    let mut copying = Copying::begin(source, target).await.unwrap();
    copying.copy_tables(|_, _| {}).await.unwrap();
    let report = copying.compare(|_| {}).await.unwrap();
    assert_eq!((report.compared, report.differing), (601, 0));
    report
        .tables
        .iter()
        .map(|(_, carried)| carried.new + carried.changed + carried.removed)
        .sum()
}

each_store! {
    async fn rows_are_read_once_in_bounded_pages(test: TestStore) {
        let store = &test.store;
        assert!(!store.holds_rows().await.unwrap());

        for table in Table::ALL {
            assert!(all(store, table).await.0.is_empty(), "{}", table.name);
        }

        fill(store).await;
        assert!(store.holds_rows().await.unwrap());

        let mut counts = Vec::new();
        for table in Table::ALL {
            let (rows, pages) = all(store, table).await;
            counts.push((table.name, rows.len()));
            // 3 of the 7 observations fit into a page, and 3 of the 5 bodies.
            assert!(table.name != "events" || pages >= 4, "{pages}");
            assert!(table.name != "events" || whole(store, table, &rows).await.1 >= 4);
        }

        let expected = [
            ("api_keys", 2),
            ("progress", 1),
            ("moments", 2),
            ("delivery_hours", 1),
            ("awaited", 1),
            ("runs", 1),
            ("invoices", 601),
            ("events", 1212),
            ("mentions", 2424),
        ];
        assert_eq!(counts, expected);
    }

    async fn copy_is_identical_and_second_copy_changes_nothing(test: TestStore) {
        let (source, target) = (
            &test.store,
            &TestStore::new(test.database.engine).await.store,
        );
        fill(source).await;
        assert_eq!(
            copy(source, target).await,
            2 + 1 + 4 + 1 + 601 + 1212 + 2424
        );
        assert_same(source, target).await;
        assert_eq!(
            target.lease("pass").await.unwrap(),
            None,
            "who holds a lease, holds it there"
        );

        assert_eq!(copy(source, target).await, 0);
    }

    async fn copy_applies_inserts_changes_and_deletions(test: TestStore) {
        let (source, target) = (
            &test.store,
            &TestStore::new(test.database.engine).await.store,
        );
        fill(source).await;
        copy(source, target).await;
        assert_eq!(source.append(&[nth(2000)]).await.unwrap(), [Appended::New]);

        let replaced = NewInvoice {
            document: r#"{"a":1}"#.to_owned(),
            ..invoice("acme", "inv-8", None)
        };
        source.put_invoice(&replaced, 6, &|_| true).await.unwrap();
        source.revoke_key("key_2", 12).await.unwrap();
        source
            .set_progress(&ProgressKey::AccountEvents("acct_1".to_owned()), 5)
            .await
            .unwrap();
        let (forgotten, _) = source.forget_bodies(1_010, None, 100).await.unwrap();
        let reread = NewEvent {
            observation: Some("{}".to_owned()),
            ..event("evt_20", 99, "in_other", 8)
        };

        source
            .replace_readings(&[(nth(20).key, reread)])
            .await
            .unwrap();

        // A replaced observation is one insert and one delete. It names two objects, as the new
        // event does.
        assert_eq!(
            (forgotten, copy(source, target).await),
            (22, 22 + 3 + 4 + 3)
        );
        assert_same(source, target).await;
    }

    async fn only_latest_copy_writes_and_never_into_a_used_database(test: TestStore) {
        let (source, target) = (
            &test.store,
            &TestStore::new(test.database.engine).await.store,
        );
        fill(source).await;
        let id = source.copy_id(5).await.unwrap();
        assert_eq!(
            (id, source.copy_id(6).await.unwrap()),
            (5, 5),
            "it keeps its name"
        );
        assert_eq!(target.begin_copy(id, 1).await.unwrap(), CopyTarget::Ready);
        assert_eq!(
            target.begin_copy(9, 2).await.unwrap(),
            CopyTarget::Ready,
            "nothing came of the first"
        );

        let keys = Table::ALL[0];
        let (rows, _) = all(source, keys).await;
        assert!(
            !target.apply(1, keys, &rows, &[]).await.unwrap()
                && all(target, keys).await.0.is_empty(),
            "overtaken"
        );
        assert!(target.apply(2, keys, &rows, &[]).await.unwrap());
        assert!(
            target.apply(2, keys, &[], &rows[..1]).await.unwrap()
                && all(target, keys).await.0 == rows[1..]
        );
        assert_eq!(
            target.begin_copy(id, 3).await.unwrap(),
            CopyTarget::CopyOfAnother
        );

        assert_eq!(target.begin_copy(9, 4).await.unwrap(), CopyTarget::Ready);

        target.end_copying(100).await.unwrap();
        target.end_copying(101).await.unwrap();
        assert!(
            !target.apply(4, keys, &rows, &rows).await.unwrap()
                && all(target, keys).await.0 == rows[1..],
            "in use"
        );
        assert_eq!(target.begin_copy(9, 5).await.unwrap(), CopyTarget::InUse);
        assert_eq!(
            source.begin_copy(9, 6).await.unwrap(),
            CopyTarget::HoldsOther("api_keys")
        );

        let is_first = |cell: &Value| matches!(cell, Value::Text(Some(id)) if id == "key_1");
        assert!(is_first(&rows[0].key()[0]), "{rows:?}");
    }

    async fn copy_stops_if_target_is_used_and_names_differences(test: TestStore) {
        let (source, target) = (
            &test.store,
            &TestStore::new(test.database.engine).await.store,
        );
        assert!(
            matches!(Copying::begin(source, target).await, Err(CopyError::TargetInUse(reason)) if reason.contains("an empty database"))
        );

        fill(source).await;
        let mut copying = Copying::begin(source, target).await.unwrap();
        let mut later = Copying::begin(source, target).await.unwrap();
        assert!(matches!(
            copying.copy_tables(|_, _| {}).await,
            Err(CopyError::Superseded)
        ));

        later.copy_tables(|_, _| {}).await.unwrap();
        let replaced = NewInvoice {
            document: r#"{"a":1}"#.to_owned(),
            ..invoice("acme", "inv-8", None)
        };
        source.put_invoice(&replaced, 6, &|_| true).await.unwrap();
        source
            .put_invoice(&invoice("acme", "new", Some("in_new")), 6, &|_| true)
            .await
            .unwrap();
        target
            .put_invoice(&invoice("other", "new", None), 4, &|_| true)
            .await
            .unwrap();

        let report = later.compare(|_| {}).await.unwrap();
        let named: Vec<_> = report
            .named
            .iter()
            .map(|differing| {
                (
                    &*differing.tenant_uid,
                    &*differing.invoice_uid,
                    differing.how,
                )
            })
            .collect();
        let expected = [
            ("acme", "new", Mismatch::NotInCopy),
            ("acme", "inv-8", Mismatch::AnswersOtherwise),
            ("other", "new", Mismatch::OnlyInCopy),
        ];

        assert_eq!(
            (named, report.compared, report.differing),
            (expected.to_vec(), 603, 3)
        );

        target.end_copying(100).await.unwrap();
        assert!(
            matches!(Copying::begin(source, target).await, Err(CopyError::TargetInUse(reason)) if reason.contains("in use"))
        );
    }
}

/// Only in PostgreSQL: SQLite has one writer at a time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writer_waits_for_copy_page_in_progress_in_postgres() {
    let (test, copy) = (
        TestStore::new(Engine::Postgres).await,
        TestStore::new(Engine::Postgres).await,
    );
    test.store.append(&[nth(1)]).await.unwrap();
    let events = Table::ALL
        .into_iter()
        .find(|table| table.name == "events")
        .unwrap();
    let rows = whole(&test.store, events, &all(&test.store, events).await.0)
        .await
        .0;
    assert_eq!(
        copy.store.begin_copy(5, 1).await.unwrap(),
        CopyTarget::Ready
    );

    let (server, url) = (PostgresServer::shared(), &copy.database.url);
    let lock = copy.database.lock().await;
    let (target, page) = (copy.store.clone(), rows.clone());
    let carrying = tokio::spawn(async move { target.apply(1, events, &page, &[]).await.unwrap() });
    server.wait_until("the page is not written", || {
        server.waiting_for_locks(url) == 1
    });
    let target = copy.store.clone();
    let using = tokio::spawn(async move { target.end_copying(100).await.unwrap() });
    server.wait_until("nobody waits", || {
        using.is_finished() || server.waiting_for_locks(url) == 2
    });
    assert!(!using.is_finished(), "it waits for the page");
    lock.release().await;
    assert!(carrying.await.unwrap(), "the page is written");
    using.await.unwrap();
    assert!(
        !copy.store.apply(1, events, &[], &rows).await.unwrap(),
        "and no other"
    );
    assert_eq!(all(&copy.store, events).await.0.len(), 1);
}
