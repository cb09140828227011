//! The event log: appending events in all combinations and reading them back.

use std::collections::BTreeSet;

use stripe_reconciler::domain::stripe::event::EventKey;
use stripe_reconciler::ingest::batch_writer::{AppendError, BatchWriter};
use stripe_reconciler::store::{
    Appended, EventFilter, LoggedEvent, NewEvent, Outcome, PackedBody, Source, Store,
    StoreErrorClass,
};

use super::{ODD, TestStore, each_store, event, invoice, key, mention, nth};
use testkit::Engine;

fn ids(page: &[LoggedEvent]) -> Vec<&str> {
    page.iter()
        .map(|logged| logged.id.as_deref().unwrap())
        .collect()
}

/// Returns the events of all pages.
async fn pages(store: &Store, filter: &EventFilter, limit: u32) -> Vec<LoggedEvent> {
    let (mut all, mut after): (Vec<LoggedEvent>, Option<(i64, EventKey)>) = (Vec::new(), None);
    loop {
        let page = store.events_page(filter, after, limit).await.unwrap();
        let Some(last) = page.last() else { return all };
        assert!(page.len() <= limit as usize);
        after = Some((last.received_ms, last.key));
        all.extend(page);
    }
}

async fn all(store: &Store) -> Vec<LoggedEvent> {
    store
        .events_page(&EventFilter::default(), None, 10_000)
        .await
        .unwrap()
}

/// Returns an event with text that PostgreSQL cannot store.
fn unstorable() -> NewEvent {
    NewEvent {
        event_type: Some("a\0b".to_owned()),
        ..nth(7)
    }
}

each_store! {
    async fn event_is_read_as_appended(test: TestStore) {
        let (store, mut batch) = (&test.store, Vec::new());
        for (n, odd) in ODD.iter().enumerate() {
            let mut event = nth(n);
            for field in [
                &mut event.id,
                &mut event.event_type,
                &mut event.api_version,
                &mut event.object_id,
                &mut event.secret_label,
            ] {
                *field = Some(format!("{odd}{n}"));
            }
            event.key = key(event.id.as_deref().unwrap(), 0);
            event.body = PackedBody::pack(odd.as_bytes());
            event.source = [Source::Webhook, Source::Replay, Source::Api][n % 3];
            event.mentions = vec![mention(odd, n % 2 == 0)];
            batch.push(event);
        }

        let bare = NewEvent {
            id: None,
            event_type: None,
            api_version: None,
            object_id: None,
            created_s: None,
            secret_label: None,
            outcome: Outcome::Unreadable,
            unreadable_reason: Some(ODD.concat()),
            mentions: vec![],
            body: PackedBody::pack(&[0, 159, 255]),
            ..nth(99)
        };
        batch.push(bare);

        batch.push(NewEvent {
            created_s: Some(i64::MAX),
            received_ms: i64::MAX - 1,
            outcome: Outcome::NoPaymentFact,
            ..nth(100)
        });
        assert_eq!(
            store.append(&batch).await.unwrap(),
            vec![Appended::New; batch.len()]
        );

        let stored = store.stored_bodies(None, 100).await.unwrap();
        assert_eq!(stored.len(), batch.len());

        for (event, stored) in batch.iter().zip(&stored) {
            let NewEvent {
                key,
                id,
                event_type,
                api_version,
                object_id,
                created_s,
                received_ms,
                source,
                secret_label,
                outcome,
                unreadable_reason,
                ..
            } = event.clone();
            let expected = LoggedEvent {
                key,
                id,
                event_type,
                api_version,
                object_id,
                created_s,
                received_ms,
                source,
                secret_label,
                outcome,
                unreadable_reason,
            };
            assert_eq!(stored.logged, expected);
            assert_eq!(
                (&stored.observation, &stored.body),
                (&event.observation, &event.body.unpack())
            );
        }

        for odd in ODD {
            let found = pages(
                store,
                &EventFilter {
                    stripe_invoice_id: Some(odd.to_owned()),
                    ..EventFilter::default()
                },
                10,
            )
            .await;
            assert_eq!(found.len(), 1, "what it names is kept: {odd}");
            let id = found[0].id.as_deref().unwrap();
            assert_eq!(
                store.events_by_id(id, None, 100).await.unwrap().len(),
                1,
                "{id}"
            );
        }
    }

    async fn repeated_event_counts_as_duplicate(test: TestStore) {
        let store = &test.store;
        assert!(store.append(&[]).await.unwrap().is_empty());

        let answers = store
            .append(&[nth(1), nth(2), nth(1), nth(3), nth(1)])
            .await
            .unwrap();
        assert_eq!(
            answers,
            [
                Appended::New,
                Appended::New,
                Appended::Duplicate,
                Appended::New,
                Appended::Duplicate
            ]
        );

        let changed = NewEvent {
            received_ms: 1,
            body: PackedBody::pack(b"other"),
            mentions: vec![mention("in_2", true)],
            ..nth(2)
        };
        assert_eq!(
            store.append(&[nth(4), changed, nth(3)]).await.unwrap(),
            [Appended::New, Appended::Duplicate, Appended::Duplicate]
        );
        assert_eq!(
            ids(&all(store).await),
            ["evt_4", "evt_3", "evt_2", "evt_1"],
            "the first stays as it was"
        );

        let second = store.event_by_key(&nth(2).key).await.unwrap().unwrap();
        assert_eq!(
            (
                store.events_by_id("evt_2", None, 100).await.unwrap().len(),
                second.body
            ),
            (1, nth(2).body.unpack())
        );

        let named = EventFilter {
            stripe_invoice_id: Some("in_2".to_owned()),
            ..EventFilter::default()
        };
        assert!(
            pages(store, &named, 10).await.is_empty(),
            "a duplicate names nothing"
        );

        let (first, second) = (
            nth(5),
            NewEvent {
                body: PackedBody::pack(b"other"),
                mentions: vec![mention("in_2", true)],
                ..nth(5)
            },
        );
        assert_eq!(
            store.append(&[first.clone(), second]).await.unwrap(),
            [Appended::New, Appended::Duplicate]
        );
        assert_eq!(
            store.event_by_key(&first.key).await.unwrap().unwrap().body,
            first.body.unpack(),
            "the first of a batch is kept"
        );

        assert!(
            pages(store, &named, 10).await.is_empty(),
            "nor does one in the same batch"
        );
    }

    async fn second_rendering_of_an_id_is_stored_separately(test: TestStore) {
        let store = &test.store;
        let (first, second) = (event("evt_1", 9, "in_1", 30), event("evt_1", 1, "in_1", 40));
        let third = event("evt_1", 0, "in_1", 40);
        for rendering in [&second, &first, &third] {
            assert_eq!(
                store.append(std::slice::from_ref(rendering)).await.unwrap(),
                [Appended::New]
            );
        }

        let found = store.events_by_id("evt_1", None, 100).await.unwrap();
        let keys: Vec<EventKey> = found.iter().map(|logged| logged.key).collect();
        assert_eq!(
            keys,
            [first.key, third.key, second.key],
            "oldest receipt first"
        );
        assert!(
            store
                .events_by_id("evt_", None, 100)
                .await
                .unwrap()
                .is_empty()
                && store
                    .events_by_id("EVT_1", None, 100)
                    .await
                    .unwrap()
                    .is_empty()
        );

        let page = store
            .events_by_id("evt_1", Some((30, first.key)), 1)
            .await
            .unwrap();
        assert_eq!(
            page.iter().map(|logged| logged.key).collect::<Vec<_>>(),
            [third.key],
            "after the first, one more"
        );
        assert!(
            store
                .events_by_id("evt_1", Some((40, second.key)), 1)
                .await
                .unwrap()
                .is_empty()
        );

        let by_key = store.event_by_key(&third.key).await.unwrap().unwrap();
        assert_eq!(
            (by_key.logged.key, by_key.body),
            (third.key, third.body.unpack())
        );
        assert!(
            store
                .event_by_key(&key("evt_1", 77))
                .await
                .unwrap()
                .is_none()
        );

        let found = store
            .events_by_keys(&[second.key, key("evt_1", 77), first.key])
            .await
            .unwrap();
        let keys: BTreeSet<EventKey> = found.iter().map(|logged| logged.key).collect();
        assert_eq!(
            keys,
            BTreeSet::from([first.key, second.key]),
            "what is not there is left out"
        );
        assert!(store.events_by_keys(&[]).await.unwrap().is_empty());
    }

    async fn batch_of_300_is_appended_and_read_in_any_page_size(test: TestStore) {
        let store = &test.store;
        // Many events in the same millisecond, some with a common prefix of their key. Then the
        // bytes decide, compared as unsigned.
        let batch: Vec<NewEvent> = (0..300)
            .map(|n| {
                event(
                    ["evt_a", "evt_\u{e9}", "evt_Z"][n % 3],
                    (n / 3 * 2) as u8,
                    "in_1",
                    1_000 + n as i64 / 100,
                )
            })
            .collect();
        assert_eq!(
            store.append(&batch).await.unwrap(),
            vec![Appended::New; 300]
        );

        let mut expected: Vec<(i64, EventKey)> =
            batch.iter().map(|e| (e.received_ms, e.key)).collect();
        expected.sort();
        for limit in [1, 7, 100, 299, 300, 301] {
            let mut found = Vec::new();
            while let page = store
                .stored_bodies(found.last().copied(), limit)
                .await
                .unwrap()
                && !page.is_empty()
            {
                found.extend(
                    page.iter()
                        .map(|stored| (stored.logged.received_ms, stored.logged.key)),
                );
            }
            assert_eq!(found, expected, "forward by {limit}");
            let found = pages(store, &EventFilter::default(), limit).await;
            let found: Vec<(i64, EventKey)> = found
                .iter()
                .rev()
                .map(|logged| (logged.received_ms, logged.key))
                .collect();
            assert_eq!(found, expected, "back by {limit}");
        }

        assert!(
            store
                .append(&batch)
                .await
                .unwrap()
                .iter()
                .all(|answer| *answer == Appended::Duplicate)
        );
    }

    async fn event_page_applies_all_filters(test: TestStore) {
        let store = &test.store;
        let other = NewEvent {
            event_type: Some("charge.updated".to_owned()),
            outcome: Outcome::NoPaymentFact,
            ..event("evt_b", 2, "in_2", 50)
        };
        let third = NewEvent {
            outcome: Outcome::NoPaymentFact,
            ..event("evt_c", 3, "in_2", 60)
        };
        let unreadable = |id: &str, event_type: Option<String>, received_ms| NewEvent {
            event_type,
            outcome: Outcome::Unreadable,
            ..event(id, 4, "in_9", received_ms)
        };

        store
            .append(&[
                event("evt_a", 1, "in_1", 40),
                other,
                third,
                unreadable("evt_d", Some("charge.failed".to_owned()), 10),
                unreadable("evt_e", None, 20),
            ])
            .await
            .unwrap();
        let text = |text: &str| Some(text.to_owned());
        let filters = [
            (
                EventFilter::default(),
                vec!["evt_c", "evt_b", "evt_a", "evt_e", "evt_d"],
            ),
            (
                EventFilter {
                    event_type: text("charge.failed"),
                    ..EventFilter::default()
                },
                vec!["evt_c", "evt_a", "evt_d"],
            ),
            (
                EventFilter {
                    outcome: Some(Outcome::NoPaymentFact),
                    ..EventFilter::default()
                },
                vec!["evt_c", "evt_b"],
            ),
            (
                EventFilter {
                    stripe_invoice_id: text("in_2"),
                    ..EventFilter::default()
                },
                vec!["evt_c", "evt_b"],
            ),
            (
                EventFilter {
                    stripe_invoice_id: text("in_2"),
                    event_type: text("charge.failed"),
                    outcome: Some(Outcome::NoPaymentFact),
                },
                vec!["evt_c"],
            ),
            (
                EventFilter {
                    stripe_invoice_id: text("in_1"),
                    outcome: Some(Outcome::Unreadable),
                    ..EventFilter::default()
                },
                vec![],
            ),
            (
                EventFilter {
                    event_type: text("%"),
                    ..EventFilter::default()
                },
                vec![],
            ),
            (
                EventFilter {
                    outcome: Some(Outcome::Unreadable),
                    ..EventFilter::default()
                },
                vec!["evt_e", "evt_d"],
            ),
            (
                EventFilter {
                    outcome: Some(Outcome::Unreadable),
                    event_type: text("charge.failed"),
                    ..EventFilter::default()
                },
                vec!["evt_d"],
            ),
        ];

        for (filter, expected) in filters {
            for limit in [1, 10] {
                assert_eq!(
                    ids(&pages(store, &filter, limit).await),
                    expected,
                    "{filter:?} by {limit}"
                );
            }
        }

        assert!(
            store
                .events_page(&EventFilter::default(), None, 0)
                .await
                .unwrap()
                .is_empty()
        );
    }

    async fn concurrent_batches_get_their_own_outcomes(test: TestStore) {
        let appending: Vec<_> = (0..8)
            .map(|n: usize| {
                let store = test.store.clone();
                // Each batch shares half of its events with the next, in another order.
                let mut batch: Vec<NewEvent> = (n * 20..n * 20 + 40).map(nth).collect();
                if n.is_multiple_of(2) {
                    batch.reverse();
                }
                tokio::spawn(async move { store.append(&batch).await.unwrap() })
            })
            .collect();
        let mut new = 0;

        for answers in appending {
            new += answers
                .await
                .unwrap()
                .into_iter()
                .filter(|answer| *answer == Appended::New)
                .count();
        }

        assert_eq!(new, 180, "each is new to one of them");
        assert_eq!(all(&test.store).await.len(), 180);
    }

    async fn rejected_event_fails_alone(test: TestStore) {
        let (inbox, writer) = BatchWriter::start(test.store.clone(), Default::default());
        let lock = test.database.lock().await;

        // All wait while the database is locked, so that they share a batch.
        let append = |event: NewEvent| {
            let inbox = inbox.clone();
            tokio::spawn(async move { inbox.append(event).await })
        };
        let others: Vec<_> = (0..6).chain(8..40).map(|n| append(nth(n))).collect();
        let poisoned = append(unstorable());
        tokio::task::yield_now().await;
        lock.release().await;
        for other in others {
            assert_eq!(other.await.unwrap().unwrap(), Appended::New);
        }

        let answer = poisoned.await.unwrap();
        let is_right = match test.database.engine {
            Engine::Sqlite => matches!(answer, Ok(Appended::New)),
            Engine::Postgres => matches!(
                &answer,
                Err(AppendError::Store(error)) if error.class() == StoreErrorClass::Rejected
            ),
        };
        assert!(is_right, "{answer:?}");

        drop(inbox);
        writer.finish().await;
        let kept = all(&test.store).await.len();
        assert_eq!(kept, 38 + usize::from(answer.is_ok()));
    }

    async fn rejected_batch_leaves_no_row(test: TestStore) {
        if test
            .store
            .append(&[nth(1), unstorable(), nth(2)])
            .await
            .is_err()
        {
            assert!(all(&test.store).await.is_empty());
            assert_eq!(
                test.store.append(&[nth(1), nth(2)]).await.unwrap(),
                [Appended::New; 2]
            );
        }
    }

    async fn pruning_deletes_bodies_in_steps_and_nothing_else(test: TestStore) {
        let store = &test.store;
        let unreadable = NewEvent {
            id: None,
            outcome: Outcome::Unreadable,
            ..nth(3)
        };
        let batch: Vec<NewEvent> = (0..3)
            .map(nth)
            .chain([unreadable])
            .chain((4..10).map(nth))
            .collect();
        store.append(&batch).await.unwrap();
        let before_ms = nth(8).received_ms;
        let (mut forgotten, mut after, mut steps) = (0, None, 0);

        loop {
            let (count, next) = store.forget_bodies(before_ms, after, 3).await.unwrap();
            assert!(count <= 3);
            (forgotten, steps) = (forgotten + count, steps + 1);
            match next {
                Some(next) => after = Some(next),
                None => break,
            }
        }

        assert!(
            forgotten == 7 && (3..=4).contains(&steps),
            "{forgotten} in {steps}"
        );

        let stored = store.stored_bodies(None, 100).await.unwrap();
        assert_eq!(stored.len(), 10, "the events stay");

        for (n, (stored, event)) in stored.iter().zip(&batch).enumerate() {
            let is_kept = n == 3 || n >= 8;
            assert_eq!(stored.body, event.body.unpack().filter(|_| is_kept), "{n}");
            assert_eq!(
                (&stored.logged.id, stored.logged.received_ms),
                (&event.id, event.received_ms)
            );
        }

        assert!(
            store
                .event_by_key(&nth(1).key)
                .await
                .unwrap()
                .unwrap()
                .body
                .is_none()
        );
        assert_eq!(
            store.append(&batch).await.unwrap(),
            vec![Appended::Duplicate; 10],
            "nor are their ids forgotten"
        );

        assert_eq!(
            store.forget_bodies(before_ms, None, 100).await.unwrap().0,
            0,
            "they are forgotten once"
        );
        assert_eq!(
            store.forget_bodies(i64::MIN, None, 100).await.unwrap(),
            (0, None)
        );
    }

    async fn new_observation_replaces_old_one_and_its_links(test: TestStore) {
        let store = &test.store;
        let with_observation = |id: &str, n: usize| NewEvent {
            observation: Some(format!(
                r#"{{"id":"{id}","type":"charge.failed","created":1,"object":{}}}"#,
                object(n)
            )),
            ..nth(n)
        };
        store.append(&[nth(1), nth(2), nth(3)]).await.unwrap();
        store
            .put_invoice(&invoice("acme", "a", Some("in_9")), 5, &|_| true)
            .await
            .unwrap();
        assert!(
            store
                .invoice("acme", "a")
                .await
                .unwrap()
                .unwrap()
                .observations
                .is_empty()
        );
        let named = |invoice: &str| EventFilter {
            stripe_invoice_id: Some(invoice.to_owned()),
            ..EventFilter::default()
        };

        // The first under its own key, the second under a new one, the third under an existing key.
        let first = NewEvent {
            mentions: vec![mention("in_9", true)],
            ..with_observation("evt_1", 1)
        };
        let second = NewEvent {
            mentions: vec![mention("in_9", true)],
            received_ms: nth(2).received_ms,
            ..with_observation("evt_20", 20)
        };
        store
            .replace_readings(&[
                (nth(1).key, first.clone()),
                (nth(2).key, second.clone()),
                (nth(3).key, first.clone()),
            ])
            .await
            .unwrap();
        let keys: BTreeSet<EventKey> = all(store).await.iter().map(|logged| logged.key).collect();
        assert_eq!(keys, BTreeSet::from([first.key, second.key]));
        assert_eq!(pages(store, &named("in_9"), 10).await.len(), 2);
        let observations = store
            .observed_page(&named("in_9"), None, 10, usize::MAX)
            .await
            .unwrap()
            .events;
        let observations: BTreeSet<Option<String>> = observations
            .into_iter()
            .map(|(_, observation)| observation)
            .collect();
        assert_eq!(
            observations,
            BTreeSet::from([first.observation.clone(), second.observation.clone()])
        );
        assert_eq!(
            store
                .invoice("acme", "a")
                .await
                .unwrap()
                .unwrap()
                .observations
                .len(),
            2
        );
        let cut = store
            .observed_page(&named("in_9"), None, 10, 1)
            .await
            .unwrap();
        assert!(cut.has_more && cut.events.len() == 1);
        let times: BTreeSet<_> = store
            .received_times(&[first.key, second.key, key("evt_1", 77)])
            .await
            .unwrap()
            .into_iter()
            .collect();
        assert_eq!(
            times,
            BTreeSet::from([
                (first.key, first.received_ms),
                (second.key, second.received_ms)
            ])
        );
        let (one, both) = (
            NewEvent {
                mentions: vec![mention("in_9", true)],
                ..first.clone()
            },
            vec![mention("in_9", true), mention("ch_9", false)],
        );
        assert_eq!(store.unmentioned(&[&one, &second]).await.unwrap(), []);
        assert_eq!(
            store
                .unmentioned(&[
                    &NewEvent {
                        mentions: both,
                        ..first.clone()
                    },
                    &second
                ])
                .await
                .unwrap(),
            [first.key]
        );
        store.replace_readings(&[]).await.unwrap();
        store
            .replace_readings(&[(first.key, first.clone())])
            .await
            .unwrap();
        assert_eq!(all(store).await.len(), 2, "repeating is harmless");

        if test.database.engine == Engine::Postgres {
            store
                .replace_readings(&[(first.key, nth(40)), (second.key, unstorable())])
                .await
                .unwrap_err();
            let after: BTreeSet<EventKey> =
                all(store).await.iter().map(|logged| logged.key).collect();
            assert_eq!(after, keys, "all of them or none");
        }
    }
}

/// Returns an object in the stored form of an `Observation`.
fn object(n: usize) -> String {
    let payment = stripe_reconciler::domain::stripe::event::read(
        format!(r#"{{"id":"evt_{n}","type":"charge.failed","created":1,"data":{{"object":{{"id":"ch_{n}","object":"charge","invoice":"in_9"}}}}}}"#).as_bytes(),
    );
    let stripe_reconciler::domain::stripe::event::Reading::Event(event) = payment else {
        unreachable!("it is an event")
    };
    serde_json::to_value(event.observation.unwrap()).unwrap()["object"].to_string()
}
