//! Stored invoices: ownership of Stripe invoices, replacement and pages.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::Value;
use stripe_reconciler::domain::stripe::event::{EventKey, Reading, read};
use stripe_reconciler::ingest::{Delivery, prepare};
use stripe_reconciler::store::{
    ApiKey, InvoiceCursor, NewEvent, NewInvoice, Put, Scope, Source, Store, StoredInvoice,
};

use super::{ODD, TestStore, each_store, event, invoice, mention};

/// Stores an invoice without a precondition.
async fn put(store: &Store, new: &NewInvoice, now_ms: i64) -> Put {
    store.put_invoice(new, now_ms, &|_| true).await.unwrap()
}

async fn stored(store: &Store, uid: &str) -> StoredInvoice {
    store.invoice("acme", uid).await.unwrap().unwrap()
}

/// Returns an event about an object that names others, with its observation.
fn with_observation(id: &str, kind: &str, object: &str) -> NewEvent {
    let body = format!(
        r#"{{"id":"{id}","object":"event","type":"{kind}","created":1769850000,"data":{{"object":{object}}}}}"#
    );
    assert!(matches!(read(body.as_bytes()), Reading::Event(_)), "{body}");
    prepare(Delivery {
        body: body.into(),
        source: Source::Webhook,
        secret_label: None,
        received_ms: 1,
    })
}

/// Returns the keys of the events with observations about the invoice.
fn sources(invoice: &StoredInvoice) -> BTreeSet<EventKey> {
    invoice.observations.iter().map(|known| known.key).collect()
}

fn uids(page: &[StoredInvoice]) -> Vec<(i64, &str, &str)> {
    page.iter()
        .map(|invoice| {
            (
                invoice.stored_ms,
                &*invoice.tenant_uid,
                &*invoice.invoice_uid,
            )
        })
        .collect()
}

each_store! {
    async fn invoice_is_read_as_stored(test: TestStore) {
        let store = &test.store;
        assert!(store.invoice("acme", "a").await.unwrap().is_none());

        for (n, odd) in ODD.iter().enumerate() {
            let document =
                serde_json::json!({"a": odd, "status": {"stripeInvoiceId": odd}}).to_string();
            let new = NewInvoice {
                document,
                imported_states: r#"[{"state":"Paid","timestamp_ms":5}]"#.to_owned(),
                ..invoice(odd, odd, Some(odd))
            };
            assert_eq!(put(store, &new, 100 + n as i64).await, Put::Created);
            let found = store.invoice(odd, odd).await.unwrap().unwrap();
            assert_eq!(
                (
                    &*found.tenant_uid,
                    &*found.invoice_uid,
                    found.stripe_invoice_id.as_deref()
                ),
                (*odd, *odd, Some(*odd))
            );
            assert_eq!(
                (found.document, found.imported_states),
                (new.document, new.imported_states)
            );
            assert_eq!(
                (found.stored_ms, found.revision, found.observations.len()),
                (100 + n as i64, 1, 0)
            );
            assert_eq!(
                store.holders(&[odd.to_string()]).await.unwrap(),
                [(odd.to_string(), odd.to_string(), odd.to_string())]
            );
        }

        assert!(store.invoice(ODD[0], ODD[1]).await.unwrap().is_none());

        let of = [
            ODD[3].to_owned(),
            "in_unknown".to_owned(),
            ODD[1].to_owned(),
        ];
        assert_eq!(store.holders(&of).await.unwrap().len(), 2);
        assert!(store.holders(&[]).await.unwrap().is_empty());
    }

    async fn replacement_keeps_stripe_id_first_states_and_time(test: TestStore) {
        let store = &test.store;
        let states = r#"[{"state":"Paid","timestamp_ms":5}]"#;
        put(
            store,
            &NewInvoice {
                imported_states: states.to_owned(),
                ..invoice("acme", "a", None)
            },
            10,
        )
        .await;
        let with_id = invoice("acme", "a", Some("in_1"));
        assert_eq!(
            put(store, &with_id, 20).await,
            Put::Replaced,
            "what had none may get one"
        );
        let first = stored(store, "a").await;
        assert_eq!(
            (
                first.stored_ms,
                first.revision,
                &*first.imported_states,
                first.stripe_invoice_id.as_deref()
            ),
            (10, 2, states, Some("in_1"))
        );
        assert_eq!(put(store, &with_id, 30).await, Put::Replaced);
        assert_eq!(
            stored(store, "a").await.revision,
            2,
            "the same is no change"
        );

        let without = NewInvoice {
            document: r#"{"b":1}"#.to_owned(),
            ..invoice("acme", "a", None)
        };
        assert_eq!(put(store, &without, 40).await, Put::Replaced);
        let kept = stored(store, "a").await;
        let document: Value = serde_json::from_str(&kept.document).unwrap();
        assert_eq!(
            document,
            serde_json::json!({"b": 1, "status": {"stripeInvoiceId": "in_1"}})
        );
        assert_eq!(
            (
                kept.stripe_invoice_id.as_deref(),
                kept.revision,
                kept.stored_ms
            ),
            (Some("in_1"), 3, 10)
        );
        assert_eq!(put(store, &without, 50).await, Put::Replaced);
        assert_eq!(stored(store, "a").await.revision, 3);

        assert_eq!(
            put(store, &invoice("acme", "a", Some("in_2")), 60).await,
            Put::StripeInvoiceFixed
        );
        for (tenant, uid) in [("acme", "b"), ("other", "a")] {
            assert_eq!(
                put(store, &invoice(tenant, uid, Some("in_1")), 60).await,
                Put::StripeInvoiceTaken
            );
            assert!(store.invoice(tenant, uid).await.unwrap().is_none());
        }
        assert_eq!(
            put(store, &invoice("acme", "b", Some("IN_1")), 60).await,
            Put::Created,
            "an id is its bytes"
        );
    }

    async fn batch_answers_in_order_and_rejects_documents_singly(test: TestStore) {
        let store = &test.store;
        assert!(store.put_invoices(&[], 1).await.unwrap().is_empty());

        put(store, &invoice("acme", "a", Some("in_1")), 1).await;
        let batch = [
            invoice("acme", "b", Some("in_1")),
            invoice("acme", "c", Some("in_3")),
            invoice("acme", "a", Some("in_9")),
            invoice("acme", "c", None),
            invoice("acme", "d", Some("in_3")),
            invoice("acme", "e", None),
            invoice("acme", "a", None),
        ];
        let answers = store.put_invoices(&batch, 2).await.unwrap();
        let expected = [
            Put::StripeInvoiceTaken,
            Put::Created,
            Put::StripeInvoiceFixed,
            Put::Replaced,
            Put::StripeInvoiceTaken,
            Put::Created,
            Put::Replaced,
        ];

        assert_eq!(answers, expected);
        assert_eq!(
            stored(store, "c").await.stripe_invoice_id.as_deref(),
            Some("in_3")
        );

        let many: Vec<NewInvoice> = (0..500)
            .map(|n| invoice("many", &format!("{n}"), Some(&format!("in_many_{n}"))))
            .collect();
        assert_eq!(
            store.put_invoices(&many, 3).await.unwrap(),
            vec![Put::Created; 500]
        );
        assert_eq!(
            store.put_invoices(&many, 4).await.unwrap(),
            vec![Put::Replaced; 500]
        );
    }

    async fn precondition_sees_document_and_observations(test: TestStore) {
        let store = &test.store;
        let new = invoice("acme", "a", Some("in_1"));
        assert_eq!(
            store
                .put_invoice(&new, 1, &|stored| stored.is_some())
                .await
                .unwrap(),
            Put::PreconditionFailed
        );
        assert!(store.invoice("acme", "a").await.unwrap().is_none());
        assert_eq!(
            store
                .put_invoice(&new, 1, &|stored| stored.is_none())
                .await
                .unwrap(),
            Put::Created
        );

        store
            .append(&[with_observation(
                "evt_1",
                "charge.failed",
                r#"{"id":"ch_1","object":"charge","invoice":"in_1"}"#,
            )])
            .await
            .unwrap();
        let is_told = |stored: Option<&StoredInvoice>| {
            stored.is_some_and(|invoice| invoice.observations.len() == 1)
        };
        assert_eq!(
            store.put_invoice(&new, 1, &is_told).await.unwrap(),
            Put::Replaced
        );

        let other = NewInvoice {
            document: r#"{"other":1}"#.to_owned(),
            ..new
        };
        assert_eq!(
            store
                .put_invoice(&other, 1, &|stored| stored.is_none())
                .await
                .unwrap(),
            Put::PreconditionFailed
        );
        assert!(!stored(store, "a").await.document.contains("other"));
    }

    async fn invoice_collects_linked_observations_within_its_bounds(test: TestStore) {
        let store = &test.store;
        let of_first = [
            with_observation(
                "evt_1",
                "charge.failed",
                r#"{"id":"ch_1","object":"charge","invoice":"in_1","payment_intent":"pi_1"}"#,
            ),
            with_observation(
                "evt_2",
                "payment_intent.processing",
                r#"{"id":"pi_1","object":"payment_intent"}"#,
            ),
            with_observation(
                "evt_3",
                "refund.created",
                r#"{"id":"re_1","object":"refund","charge":"ch_1"}"#,
            ),
            with_observation(
                "evt_4",
                "refund.updated",
                r#"{"id":"re_1","object":"refund"}"#,
            ),
        ];

        let of_second = [with_observation(
            "evt_5",
            "charge.failed",
            r#"{"id":"ch_2","object":"charge","invoice":"in_2"}"#,
        )];
        let of_none = [with_observation(
            "evt_6",
            "customer.updated",
            r#"{"id":"cus_1","object":"customer"}"#,
        )];
        store
            .append(&[&of_first[..], &of_second, &of_none].concat())
            .await
            .unwrap();

        for (uid, id) in [("a", Some("in_1")), ("b", Some("in_2")), ("c", None)] {
            put(store, &invoice("acme", uid, id), 1).await;
        }

        let keys = |events: &[NewEvent]| {
            events
                .iter()
                .map(|event| event.key)
                .collect::<BTreeSet<EventKey>>()
        };
        let expected = [keys(&of_first), keys(&of_second), BTreeSet::new()];
        for (uid, expected) in ["a", "b", "c"].iter().zip(&expected) {
            assert_eq!(sources(&stored(store, uid).await), *expected, "{uid}");
        }

        let listed = store.invoices_page(None, None, None, 10).await.unwrap();
        assert_eq!(
            listed.iter().map(sources).collect::<Vec<_>>(),
            expected,
            "a page tells the same"
        );
    }

    async fn invoice_is_found_by_uid_prefix(test: TestStore) {
        let store = &test.store;
        for (tenant, uid) in [
            ("b", "inv-2"),
            ("a", "inv-2"),
            ("a", "inv-10"),
            ("a", "inv"),
            ("a", "INV-2"),
            ("a", "inv-2\u{10ffff}"),
            ("a", "%_"),
        ] {
            put(
                store,
                &invoice(tenant, uid, Some(&format!("in_{tenant}_{uid}"))),
                5,
            )
            .await;
        }

        let found = async |tenant: Option<&str>, start: &str, limit: u32| {
            let page = store
                .documents_by_uid(tenant, start, limit, usize::MAX)
                .await
                .unwrap();
            page.invoices
                .into_iter()
                .map(|found| format!("{} {}", found.tenant_uid, found.invoice_uid))
                .collect::<Vec<_>>()
        };
        assert_eq!(found(None, "inv-2", 10).await, ["a inv-2", "b inv-2"]);
        assert_eq!(
            found(None, "inv", 3).await,
            ["a inv", "a inv-10", "a inv-2"]
        );

        assert_eq!(
            found(Some("a"), "inv-", 10).await[..2],
            ["a inv-10", "a inv-2"]
        );
        assert_eq!(found(Some("b"), "inv", 10).await, ["b inv-2"]);
        assert_eq!(found(None, "%", 10).await, ["a %_"]);
        assert!(
            found(None, "nv", 10).await.is_empty() && found(Some("c"), "inv", 10).await.is_empty()
        );

        store
            .append(&[with_observation(
                "evt_1",
                "charge.failed",
                r#"{"id":"ch_1","object":"charge","invoice":"in_a_inv-10"}"#,
            )])
            .await
            .unwrap();
        let mut page = store.documents_by_uid(None, "inv-10", 1, 1).await.unwrap();
        assert!(
            page.has_more && page.invoices.len() == 1 && page.invoices[0].observations.is_empty()
        );

        store.add_observations(&mut page.invoices).await.unwrap();
        assert_eq!(page.invoices[0].observations.len(), 1);
    }

    async fn invoice_read_returns_the_matching_api_key(test: TestStore) {
        let store = &test.store;
        let key = |id: &str, scope| ApiKey {
            id: id.to_owned(),
            scope,
            created_ms: 1,
            expires_ms: Some(2),
            revoked_ms: None,
        };
        let (operator, acme) = (
            key("key_1", Scope::Operator),
            key("key_2", Scope::Tenant("acme".to_owned())),
        );
        store.insert_key(&operator, &[1; 32]).await.unwrap();
        store.insert_key(&acme, &[2; 32]).await.unwrap();

        store.revoke_key("key_2", 3).await.unwrap();
        let acme = ApiKey {
            revoked_ms: Some(3),
            ..acme
        };
        let other = key("key_3", Scope::Tenant("other".to_owned()));
        store.insert_key(&other, &[3; 32]).await.unwrap();

        for is_stored in [false, true] {
            if is_stored {
                put(store, &invoice("acme", "a", Some("in_1")), 1).await;
                store
                    .append(&[with_observation(
                        "evt_1",
                        "charge.failed",
                        r#"{"id":"ch_1","object":"charge","invoice":"in_1"}"#,
                    )])
                    .await
                    .unwrap();
            }
            let asked = [
                ([None, None], vec![]),
                ([Some([1; 32]), None], vec![&operator]),
                ([None, Some([1; 32])], vec![&operator]),
                ([Some([2; 32]), Some([1; 32])], vec![&acme, &operator]),
                ([Some([1; 32]), Some([2; 32])], vec![&operator, &acme]),
                ([Some([1; 32]), Some([9; 32])], vec![&operator]),
                ([Some([9; 32]), Some([9; 32])], vec![]),
                ([Some([3; 32]), None], vec![&other]),
                ([Some([3; 32]), Some([2; 32])], vec![&other, &acme]),
            ];
            for (hashes, expected) in asked {
                let (invoice, keys) = store.invoice_and_keys("acme", "a", hashes).await.unwrap();
                assert_eq!(keys.iter().collect::<Vec<_>>(), expected, "{hashes:?}");
                let may_read = expected.iter().any(|key| key.scope.reads("acme"));
                assert_eq!(
                    invoice.map(|invoice| invoice.observations.len()),
                    (is_stored && may_read).then_some(1),
                    "{hashes:?}"
                );
            }
        }
    }

    async fn pages_order_newest_first_then_by_id_bytes(test: TestStore) {
        let store = &test.store;
        let ids = ["Z", "a", "B", "é", "~", "10", "9", "aa", "日"];
        for (n, uid) in ids.iter().enumerate() {
            for tenant in ["acme", "Other"] {
                let id = format!("in_{tenant}_{n}");
                put(store, &invoice(tenant, uid, Some(&id)), 100 + n as i64 / 4).await;
            }
        }

        let mut expected: Vec<(i64, &str, &str)> = ids
            .iter()
            .enumerate()
            .flat_map(|(n, uid)| ["acme", "Other"].map(|tenant| (100 + n as i64 / 4, tenant, *uid)))
            .collect();
        expected.sort_by(|a, b| {
            b.0.cmp(&a.0)
                .then((a.1.as_bytes(), a.2.as_bytes()).cmp(&(b.1.as_bytes(), b.2.as_bytes())))
        });

        for tenant in [None, Some("acme"), Some("acm"), Some("Other")] {
            let expected: Vec<_> = expected
                .iter()
                .filter(|row| tenant.is_none_or(|tenant| tenant == row.1))
                .copied()
                .collect();
            for limit in [1, 2, 5, 18, 19] {
                let (mut found, mut after): (Vec<StoredInvoice>, Option<InvoiceCursor>) =
                    (Vec::new(), None);
                while let page = store
                    .invoices_page(tenant, None, after.as_ref(), limit)
                    .await
                    .unwrap()
                    && !page.is_empty()
                {
                    let last = &page[page.len() - 1];
                    let (tenant_uid, invoice_uid) =
                        (last.tenant_uid.clone(), last.invoice_uid.clone());
                    after = Some(InvoiceCursor {
                        stored_ms: last.stored_ms,
                        tenant_uid,
                        invoice_uid,
                    });
                    found.extend(page);
                }
                assert_eq!(uids(&found), expected, "{tenant:?} by {limit}");
            }
        }

        for tenant in [None, Some("acme")] {
            let found = store
                .invoices_page(tenant, Some("in_acme_3"), None, 10)
                .await
                .unwrap();
            assert_eq!(uids(&found), [(100, "acme", "é")]);
        }

        assert!(
            store
                .invoices_page(Some("Other"), Some("in_acme_3"), None, 10)
                .await
                .unwrap()
                .is_empty()
        );
    }

    async fn page_ends_after_bytes_of_documents(test: TestStore) {
        let store = &test.store;
        for (n, bytes) in [900_000, 10, 600_000, 500_000, 10].into_iter().enumerate() {
            let document = format!(r#"{{"n":"{}"}}"#, "x".repeat(bytes));
            put(
                store,
                &NewInvoice {
                    document,
                    ..invoice("acme", &format!("inv-{n}"), None)
                },
                100 - n as i64,
            )
            .await;
        }
        let (mut pages, mut after) = (Vec::new(), None);
        loop {
            let page = store
                .documents_page(Some("acme"), None, after.as_ref(), 10, 1_000_000)
                .await
                .unwrap();
            pages.push((
                page.invoices
                    .iter()
                    .map(|found| found.invoice_uid.clone())
                    .collect::<Vec<_>>(),
                page.has_more,
            ));
            let Some(last) = page.invoices.last().filter(|_| page.has_more) else {
                break;
            };
            after = Some(InvoiceCursor {
                stored_ms: last.stored_ms,
                tenant_uid: last.tenant_uid.clone(),
                invoice_uid: last.invoice_uid.clone(),
            });
        }
        let page = |uids: &[&str], has_more| {
            (
                uids.iter().map(|uid| (*uid).to_owned()).collect::<Vec<_>>(),
                has_more,
            )
        };
        assert_eq!(
            pages,
            [
                page(&["inv-0", "inv-1", "inv-2"], true),
                page(&["inv-3", "inv-4"], false)
            ]
        );

        let by_uid = store
            .documents_by_uid(None, "inv-", 10, 900_001)
            .await
            .unwrap();
        assert_eq!((by_uid.invoices.len(), by_uid.has_more), (1, true));
        let one = store.documents_page(None, None, None, 10, 0).await.unwrap();
        assert!(one.invoices.is_empty() && !one.has_more, "{one:?}");
    }

    async fn reading_ten_thousand_links_is_linear(test: TestStore) {
        let store = &test.store;
        put(store, &invoice("acme", "a", Some("in_1")), 1).await;
        let payments = (0..10_000).map(|n| mention(&format!("pi_{n:05}"), false));
        let links = std::iter::once(mention("in_1", true))
            .chain(payments)
            .collect();
        let wide = NewEvent {
            observation: Some("{}".to_owned()),
            mentions: links,
            ..event("evt_1", 1, "in_1", 1)
        };
        let payment = NewEvent {
            observation: Some("{}".to_owned()),
            mentions: vec![mention("pi_09999", false)],
            ..event("evt_2", 1, "in_1", 2)
        };

        let keys = BTreeSet::from([wide.key, payment.key]);
        store.append(&[wide, payment]).await.unwrap();

        // From every payment to every payment there are 100,000,000 ways: half a minute.
        let reading = async {
            assert_eq!(sources(&stored(store, "a").await), keys);
            let page = store.invoices_page(None, None, None, 10).await.unwrap();
            assert_eq!(sources(&page[0]), keys);
            let found = store
                .observations_for(&["pi_00000".to_owned(), "pi_00001".to_owned()])
                .await
                .unwrap();
            assert_eq!(found.len(), 2);
        };

        tokio::time::timeout(Duration::from_secs(4), reading)
            .await
            .expect("each link is followed once");
    }

    async fn concurrent_stores_create_an_invoice_once(test: TestStore) {
        let putting: Vec<_> = (0..24)
            .map(|n: i64| {
                let store = test.store.clone();
                tokio::spawn(async move {
                    put(
                        &store,
                        &NewInvoice {
                            document: format!(r#"{{"n":{n}}}"#),
                            ..invoice("acme", "a", None)
                        },
                        n,
                    )
                    .await
                })
            })
            .collect();

        let mut answers = Vec::new();
        for answer in putting {
            answers.push(answer.await.unwrap());
        }

        assert_eq!(
            answers
                .iter()
                .filter(|answer| **answer == Put::Created)
                .count(),
            1,
            "{answers:?}"
        );
        assert_eq!(
            answers
                .iter()
                .filter(|answer| **answer == Put::Replaced)
                .count(),
            23,
            "{answers:?}"
        );

        assert_eq!(
            stored(&test.store, "a").await.revision,
            24,
            "each change counts"
        );
    }

    async fn concurrent_links_to_stripe_invoice_have_one_winner(test: TestStore) {
        for round in 0..3 {
            let id = format!("in_{round}");
            let putting: Vec<_> = (0..16)
                .map(|n| {
                    let (store, new) = (
                        test.store.clone(),
                        invoice("acme", &format!("{round}_{n}"), Some(&id)),
                    );
                    tokio::spawn(async move { put(&store, &new, n).await })
                })
                .collect();
            let mut answers = Vec::new();
            for answer in putting {
                answers.push(answer.await.unwrap());
            }
            assert_eq!(
                answers
                    .iter()
                    .filter(|answer| **answer == Put::Created)
                    .count(),
                1,
                "{answers:?}"
            );
            assert_eq!(
                answers
                    .iter()
                    .filter(|answer| **answer == Put::StripeInvoiceTaken)
                    .count(),
                15,
                "{answers:?}"
            );
            let holders = test.store.holders(std::slice::from_ref(&id)).await.unwrap();
            assert_eq!(holders.len(), 1);
            assert_eq!(
                test.store
                    .invoices_page(None, Some(&id), None, 20)
                    .await
                    .unwrap()
                    .len(),
                1
            );
        }
    }
}
