//! Data of the health monitor: stored scan results and counts.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use stripe_reconciler::clock::Clock;
use stripe_reconciler::metrics::{Metrics, Rejection};
use stripe_reconciler::monitoring::last_seen::LastSeen;
use stripe_reconciler::monitoring::monitor::HealthMonitor;
use stripe_reconciler::store::{
    ActivityDelta, Backlog, CheckResult, Counted, LogRow, LookupState, NewEvent, Outcome, Source,
    UnmatchedInvoice,
};

use super::{TestStore, each_store, event, invoice, nth};

fn times(times: &[(&str, i64)]) -> BTreeMap<String, i64> {
    times
        .iter()
        .map(|(name, at_ms)| ((*name).to_owned(), *at_ms))
        .collect()
}

fn named(names: &[(&str, i64)]) -> ActivityDelta {
    ActivityDelta {
        named_invoices: times(names),
        ..ActivityDelta::default()
    }
}

fn unmatched(id: &str, received_ms: i64, events: i64) -> UnmatchedInvoice {
    UnmatchedInvoice {
        stripe_invoice_id: id.to_owned(),
        received_ms,
        events,
    }
}

each_store! {
    async fn log_is_read_in_order_of_receipt(test: TestStore) {
        let store = &test.store;
        let body = |text: &str| stripe_reconciler::store::PackedBody::pack(text.as_bytes());
        let readable = NewEvent {
            observation: Some("{}".to_owned()),
            ..event("evt_a", 1, "in_1", 10)
        };
        let silent = NewEvent {
            source: Source::Replay,
            secret_label: None,
            body: body("silent"),
            ..event("evt_b", 1, "in_1", 10)
        };
        let unreadable = NewEvent {
            outcome: Outcome::Unreadable,
            ..event("evt_c", 1, "in_1", 30)
        };

        store
            .append(&[unreadable.clone(), silent.clone(), readable.clone()])
            .await
            .unwrap();
        let all: Vec<LogRow> = store.log_rows(9, None, 50, 10).await.unwrap();
        let keys: Vec<_> = all.iter().map(|row| row.key).collect();
        assert_eq!(keys, [readable.key, silent.key, unreadable.key]);
        assert_eq!(all[0].observation.as_deref(), Some("{}"));

        let damaged = all[0].parse_observation().unwrap().unwrap_err();
        assert_eq!(damaged.key, readable.key);
        assert!(
            all[1].parse_observation().is_none(),
            "there is no observation"
        );
        assert!(
            all[0].body.is_none() && all[2].body.is_none(),
            "only a row without an observation has its body"
        );
        assert_eq!(
            (all[1].source, all[1].body.clone()),
            (Source::Replay, Some(body("silent")))
        );

        assert_eq!(
            (
                all[0].secret_label.as_deref(),
                all[1].secret_label.as_deref()
            ),
            (Some("live"), None)
        );
        assert_eq!(
            store.log_rows(10, None, 50, 10).await.unwrap().len(),
            1,
            "only rows received later"
        );

        let clock_behind = store.log_rows(9, None, 20 - 60_000, 10).await.unwrap();
        assert_eq!(
            clock_behind.len(),
            2,
            "rows from a skewed clock are read when their time comes"
        );

        let rest = store
            .log_rows(9, Some((10, readable.key)), 50, 1)
            .await
            .unwrap();
        assert_eq!(rest[0].key, silent.key);
    }

    async fn earlier_time_does_not_overwrite_last_seen(test: TestStore) {
        let store = &test.store;
        assert!(store.last_seen().await.unwrap().is_empty());

        store
            .record_last_seen(&times(&[("delivered live", 20), ("secret it's", 5)]), 50)
            .await
            .unwrap();
        store
            .record_last_seen(&times(&[("delivered live", 10), ("secret it's", 6)]), 50)
            .await
            .unwrap();
        assert_eq!(
            store.last_seen().await.unwrap(),
            times(&[("delivered live", 20), ("secret it's", 6)])
        );

        let news = ActivityDelta {
            last_seen: times(&[("delivered live", 30)]),
            hours: BTreeSet::from([1, 5, 9]),
            ..ActivityDelta::default()
        };
        store.save_activity(&news, 50, 5, 0).await.unwrap();
        store
            .save_activity(
                &ActivityDelta {
                    hours: BTreeSet::from([9, 10]),
                    ..ActivityDelta::default()
                },
                50,
                5,
                0,
            )
            .await
            .unwrap();

        assert_eq!(store.last_seen().await.unwrap()["delivered live"], 30);

        store
            .record_last_seen(&times(&[("delivered live", 90_000)]), 90_000)
            .await
            .unwrap();
        store
            .record_last_seen(&times(&[("delivered live", 29_000)]), 29_000)
            .await
            .unwrap();
        assert_eq!(
            store.last_seen().await.unwrap()["delivered live"],
            29_000,
            "a skewed clock wrote the later time"
        );
        assert_eq!(
            store.delivery_hours(0).await.unwrap(),
            BTreeSet::from([5, 9, 10])
        );

        assert_eq!(
            store.delivery_hours(10).await.unwrap(),
            BTreeSet::from([10])
        );
    }

    async fn busy_hours_stay_known_while_deliveries_are_rejected(test: TestStore) {
        let store = &test.store;
        let week_ms = 7 * 24 * 3_600_000;
        let news = ActivityDelta {
            last_seen: times(&[(&LastSeen::Delivery.to_string(), 100 * week_ms)]),
            hours: BTreeSet::from([100 * 7 * 24]),
            ..ActivityDelta::default()
        };

        store
            .save_activity(&news, 100 * week_ms, 0, 0)
            .await
            .unwrap();
        let metrics = Arc::new(Metrics::default());
        let monitor = HealthMonitor::new(
            store.clone(),
            metrics.clone(),
            Clock::fixed(106 * week_ms),
            Vec::new(),
        );
        metrics.rejected(Rejection::Unavailable);
        monitor.refresh().await;

        assert!(
            store
                .last_seen()
                .await
                .unwrap()
                .contains_key("refused unavailable")
        );
        assert_eq!(
            store.delivery_hours(0).await.unwrap(),
            news.hours,
            "six weeks without a delivery still show as a gap"
        );
    }

    async fn repeated_delivery_survives_failed_writes(test: TestStore) {
        let store = &test.store;
        let monitor = HealthMonitor::new(
            store.clone(),
            Arc::default(),
            Clock::fixed(2_000_000),
            Vec::new(),
        );
        monitor.record_repeated(b"{}", 1_000_000, "live");
        test.database
            .execute("alter table moments rename to away")
            .await;
        monitor.refresh().await;
        test.database
            .execute("alter table away rename to moments")
            .await;

        let saved = async {
            while store.last_seen().await.unwrap().is_empty() {
                // The monitor refreshes a snapshot that has become old.
                monitor.refresh().await;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), saved)
            .await
            .expect("it is saved once the database accepts writes");
        let last_seen = store.last_seen().await.unwrap();
        assert_eq!(
            (last_seen["delivered"], last_seen["secret live"]),
            (1_000_000, 1_000_000)
        );
    }

    async fn concurrent_saves_of_activity_do_not_deadlock(test: TestStore) {
        let keeping: Vec<_> = (0..12)
            .map(|n| {
                let store = test.store.clone();
                let news = ActivityDelta {
                    last_seen: (0..20).map(|m| (format!("moment {m}"), n)).collect(),
                    hours: (0..20).collect(),
                    named_invoices: (0..20).map(|m| (format!("in_{m}"), n)).collect(),
                };
                tokio::spawn(async move { store.save_activity(&news, 50, 0, 0).await })
            })
            .collect();
        for kept in keeping {
            kept.await.unwrap().unwrap();
        }

        assert!(
            test.store
                .last_seen()
                .await
                .unwrap()
                .values()
                .all(|at_ms| *at_ms == 11)
        );
        assert_eq!(test.store.unmatched_invoices(100).await.unwrap().len(), 20);
    }

    async fn invoice_is_unmatched_from_first_event_until_stored(test: TestStore) {
        let store = &test.store;
        store
            .append(&[
                event("evt_a", 1, "in_1", 10),
                event("evt_b", 1, "in_1", 20),
                event("evt_c", 1, "in_2", 15),
            ])
            .await
            .unwrap();
        store
            .put_invoice(&invoice("acme", "c", Some("in_3")), 1, &|_| true)
            .await
            .unwrap();
        store
            .save_activity(
                &named(&[("in_1", 10), ("in_2", 15), ("in_3", 12)]),
                50,
                0,
                0,
            )
            .await
            .unwrap();

        store
            .save_activity(&named(&[("in_1", 20)]), 50, 0, 0)
            .await
            .unwrap();
        let both = [unmatched("in_1", 10, 2), unmatched("in_2", 15, 1)];
        assert_eq!(
            store.unmatched_invoices(10).await.unwrap(),
            both,
            "in_3 is stored, and the first event counts"
        );
        assert_eq!(store.unmatched_invoices(1).await.unwrap(), both[..1]);

        store
            .put_invoices(&[invoice("acme", "a", Some("in_1"))], 1)
            .await
            .unwrap();
        assert_eq!(store.unmatched_invoices(10).await.unwrap(), both[1..]);

        store
            .save_activity(&ActivityDelta::default(), 50, 0, 16)
            .await
            .unwrap();
        assert!(
            store.unmatched_invoices(10).await.unwrap().is_empty(),
            "an old invoice is no longer counted"
        );
    }

    async fn unreadable_and_differing_are_counted(test: TestStore) {
        let store = &test.store;
        assert_eq!(store.count_unreadable(0).await.unwrap(), Counted::default());
        assert_eq!(store.count_differing().await.unwrap(), Counted::default());

        let unreadable = |n: usize| NewEvent {
            outcome: Outcome::Unreadable,
            ..nth(n)
        };
        store
            .append(&[nth(1), unreadable(2), unreadable(3)])
            .await
            .unwrap();
        assert_eq!(
            store.count_unreadable(0).await.unwrap(),
            Counted {
                count: 2,
                since_ms: Some(1_002)
            }
        );

        assert_eq!(
            store.count_unreadable(1_003).await.unwrap(),
            Counted {
                count: 1,
                since_ms: Some(1_003)
            }
        );
        assert_eq!(
            store.count_unreadable(1_004).await.unwrap(),
            Counted::default(),
            "older events do not count"
        );

        for (uid, id) in [("a", "in_1"), ("b", "in_2"), ("c", "in_3")] {
            store
                .put_invoice(&invoice("acme", uid, Some(id)), 1, &|_| true)
                .await
                .unwrap();
        }

        let checked = |id: &str, differs_since_ms| CheckResult {
            stripe_invoice_id: id.to_owned(),
            checked_ms: 9,
            check_due_ms: Some(50),
            differs_since_ms,
            agrees: false,
        };
        store
            .save_check_results(&[
                checked("in_1", Some(7)),
                checked("in_2", Some(8)),
                checked("in_3", None),
            ])
            .await
            .unwrap();

        assert_eq!(
            store.count_differing().await.unwrap(),
            Counted {
                count: 2,
                since_ms: Some(7)
            }
        );
    }

    async fn backlog_is_counted_by_kind(test: TestStore) {
        let store = &test.store;
        assert_eq!(store.backlog(100).await.unwrap(), Backlog::default());

        let of_type = |id: &str, event_type: &str| NewEvent {
            event_type: Some(event_type.to_owned()),
            ..event(id, 0, "in_1", 5)
        };
        let events = [
            of_type("evt_a", "v1.invoice.paid"),
            of_type("evt_b", "charge.failed"),
            of_type("evt_c", "payment_intent.created"),
            of_type("evt_d", "refund.created"),
            of_type("evt_e", "invoice.paid"),
        ];
        store.append(&events).await.unwrap();
        store
            .put_invoice(&invoice("acme", "a", Some("in_1")), 1, &|_| true)
            .await
            .unwrap();

        store
            .put_invoice(&invoice("acme", "b", None), 1, &|_| true)
            .await
            .unwrap();
        assert_eq!(
            store.backlog(100).await.unwrap(),
            Backlog {
                objects: 1,
                links: 3,
                checks: 1
            }
        );

        store
            .mark_lookup(&[
                LookupState {
                    key: events[0].key,
                    due_ms: Some(200),
                    attempts: 1,
                },
                LookupState {
                    key: events[1].key,
                    due_ms: None,
                    attempts: 1,
                },
            ])
            .await
            .unwrap();

        assert_eq!(
            store.backlog(100).await.unwrap(),
            Backlog {
                objects: 0,
                links: 2,
                checks: 1
            }
        );
        assert_eq!(store.backlog(200).await.unwrap().objects, 1);
    }

    async fn space_and_time_of_database_are_known(test: TestStore) {
        let space = test.store.space().await.unwrap();
        assert!(space.database > 1_000, "{space:?}");

        let is_here = test.database.engine == testkit::Engine::Sqlite;
        assert_eq!(
            (space.disk.is_some(), space.wal.is_some()),
            (is_here, is_here)
        );
        assert!(
            space
                .disk
                .is_none_or(|disk| disk.free > 0 && disk.free <= disk.size),
            "{space:?}"
        );

        let time_ms = test.store.time_ms().await.unwrap();
        assert_eq!(time_ms.is_none(), is_here);

        let now_ms = stripe_reconciler::clock::Clock::system().now_ms();
        assert!(
            time_ms.is_none_or(|time_ms| (time_ms - now_ms).abs() < 60_000),
            "{time_ms:?}"
        );
    }
}
