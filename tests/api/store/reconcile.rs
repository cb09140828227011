//! Data of reconciliation: progress, leases, reports, pending lookups and invoice checks.

use std::collections::BTreeSet;

use serde_json::value::RawValue;
use stripe_reconciler::clock::Clock;
use stripe_reconciler::domain::stripe::event::EventKey;
use stripe_reconciler::reconcile::{Lease, ReconcileError};
use stripe_reconciler::store::{
    CheckCandidate, CheckResult, Comparison, LookupKind, LookupState, NewEvent, Outcome,
    PendingLookup, ProgressKey, Run, Store,
};

use super::{ODD, TestStore, each_store, event, invoice, key, mention, nth};

/// Returns an event of this type.
fn of_type(id: &str, event_type: &str) -> NewEvent {
    NewEvent {
        event_type: Some(event_type.to_owned()),
        observation: Some(format!("{{\"of\":\"{id}\"}}")),
        ..event(id, 0, "in_1", 5)
    }
}

/// Returns the lookups that are due: key and number of attempts.
async fn due(store: &Store, kind: LookupKind, now_ms: i64) -> BTreeSet<(EventKey, i64)> {
    let found: Vec<PendingLookup> = store.due_lookups(kind, now_ms, 100).await.unwrap();
    let all: BTreeSet<(EventKey, i64)> = found
        .iter()
        .map(|lookup| (lookup.key, lookup.attempts))
        .collect();
    assert_eq!(all.len(), found.len(), "each event is due once");
    all
}

pub(super) fn state(key: EventKey, due_ms: Option<i64>, attempts: i64) -> LookupState {
    LookupState {
        key,
        due_ms,
        attempts,
    }
}

fn ids(found: &[CheckCandidate]) -> Vec<&str> {
    found
        .iter()
        .map(|candidate| &*candidate.stripe_invoice_id)
        .collect()
}

fn checked(id: &str, checked_ms: i64, check_due_ms: Option<i64>) -> CheckResult {
    CheckResult {
        stripe_invoice_id: id.to_owned(),
        checked_ms,
        check_due_ms,
        differs_since_ms: None,
        agrees: true,
    }
}

pub(super) fn run_of(n: i64) -> Run {
    let report = RawValue::from_string(format!("{{\"n\": {n}, \"odd\": \"日本 '\"}}")).unwrap();
    Run {
        id: format!("run_{n:04}"),
        started_ms: n / 2,
        ended_ms: n + 1,
        report,
    }
}

each_store! {
    async fn progress_is_found_by_its_key_and_accounts_are_listed(test: TestStore) {
        let store = &test.store;
        let account = |id: &str| ProgressKey::Account(id.to_owned());
        let account_events = |id: &str| ProgressKey::AccountEvents(id.to_owned());
        assert_eq!(store.progress(&ProgressKey::Events).await.unwrap(), None);
        assert!(store.known_accounts(9).await.unwrap().is_empty());

        for (key, value) in [
            (account_events("acct_2"), 2),
            (account_events("acct_1"), 1),
            (ProgressKey::Events, 3),
            (ProgressKey::LogScan, i64::MIN),
            (ProgressKey::AccountSearch, 4),
            (account("acct_2"), 5),
            (account("acct_1"), 6),
            (account("acct_\u{e9}'%"), 7),
            (account_events("acct_1"), 9),
        ] {
            store.set_progress(&key, value).await.unwrap();
        }

        assert_eq!(
            store.progress(&account_events("acct_1")).await.unwrap(),
            Some(9),
            "the last value counts"
        );
        assert_eq!(
            store.progress(&account_events("acct_2")).await.unwrap(),
            Some(2)
        );
        assert_eq!(store.progress(&ProgressKey::Events).await.unwrap(), Some(3));
        assert_eq!(
            store.progress(&ProgressKey::LogScan).await.unwrap(),
            Some(i64::MIN)
        );

        assert_eq!(
            store.progress(&account_events("acct_")).await.unwrap(),
            None,
            "no prefix"
        );
        assert_eq!(
            store.known_accounts(9).await.unwrap(),
            ["acct_1", "acct_2", "acct_\u{e9}'%"],
            "accounts only, in order"
        );
        assert_eq!(store.known_accounts(1).await.unwrap(), ["acct_1"]);
    }

    async fn lease_has_one_holder_until_it_expires_or_is_released(test: TestStore) {
        let store = &test.store;
        assert_eq!(store.lease("pass").await.unwrap(), None);

        let taking: Vec<_> = (0..12)
            .map(|n| {
                let store = store.clone();
                tokio::spawn(async move {
                    store
                        .take_lease("pass", &format!("holder {n}"), 100, 200)
                        .await
                        .unwrap()
                })
            })
            .collect();
        let mut taken = 0;
        for one in taking {
            taken += usize::from(one.await.unwrap());
        }

        assert_eq!(taken, 1);

        let (holder, expires_ms) = store.lease("pass").await.unwrap().unwrap();
        assert_eq!(expires_ms, 200);
        assert!(
            store.take_lease("other", ODD[2], 100, 200).await.unwrap(),
            "a lease of another name"
        );
        assert!(
            store.take_lease("pass", &holder, 150, 300).await.unwrap(),
            "its holder renews it"
        );
        assert!(!store.take_lease("pass", "late", 299, 400).await.unwrap());
        assert!(
            store.take_lease("pass", "late", 300, 400).await.unwrap(),
            "it has expired"
        );

        assert!(!store.take_lease("pass", &holder, 301, 500).await.unwrap());

        store.release_lease("pass", &holder).await.unwrap();
        assert_eq!(
            store.lease("pass").await.unwrap(),
            Some(("late".to_owned(), 400)),
            "only the holder releases it"
        );

        store.release_lease("pass", "late").await.unwrap();
        assert_eq!(store.lease("pass").await.unwrap(), None);
        assert_eq!(
            store.lease("other").await.unwrap(),
            Some((ODD[2].to_owned(), 200))
        );

        // A lease taken under a clock one hour ahead would block everyone for an hour.
        assert!(!store.take_lease("other", "late", 0, 100).await.unwrap());
        assert!(
            store
                .take_lease("ahead", "dead", 3_600_000, 3_612_000)
                .await
                .unwrap()
        );
        assert!(
            !store
                .take_lease("ahead", "late", 3_545_000, 3_557_000)
                .await
                .unwrap(),
            "clocks differ a little"
        );

        assert!(store.take_lease("ahead", "late", 0, 12_000).await.unwrap());
    }

    async fn lease_is_released_whether_its_work_succeeds_or_fails(test: TestStore) {
        let (store, clock) = (&test.store, Clock::system());
        let lease = Lease::take(store, &clock).await.unwrap();
        assert!(
            Lease::try_take(store, &clock).await.unwrap().is_none(),
            "it has one holder"
        );
        assert_eq!(lease.run(async { Ok(7) }).await.unwrap(), 7);
        assert_eq!(store.lease("reconcile").await.unwrap(), None);

        let lease = Lease::try_take(store, &clock).await.unwrap().unwrap();
        let failed: Result<(), ReconcileError> =
            lease.run(async { Err(ReconcileError::LeaseLost) }).await;
        assert!(failed.is_err());
        assert_eq!(store.lease("reconcile").await.unwrap(), None);
    }

    async fn reports_of_last_runs_are_stored(test: TestStore) {
        let store = &test.store;
        assert!(store.last_runs(10, i64::MAX).await.unwrap().is_empty());

        for n in 0..205 {
            store.save_run(&run_of(n)).await.unwrap();
        }

        let last = store.last_runs(3, i64::MAX).await.unwrap();
        let shown = |run: &Run| {
            (
                run.id.clone(),
                run.started_ms,
                run.ended_ms,
                run.report.get().to_owned(),
            )
        };
        assert_eq!(
            last.iter().map(shown).collect::<Vec<_>>(),
            [204, 202, 203].map(|n| shown(&run_of(n))),
            "by start, then by id"
        );

        let all = store.last_runs(1000, i64::MAX).await.unwrap();
        assert_eq!(all.len(), 200, "the oldest are deleted");
        assert!(all.iter().all(|run| run.started_ms >= 2));
        assert_eq!(
            store.last_runs(1, last[1].started_ms - 1).await.unwrap()[0].started_ms,
            last[1].started_ms - 1,
            "no run that began later"
        );
        assert!(
            store.save_run(&run_of(204)).await.is_err(),
            "a run ends once"
        );
    }

    async fn lookup_is_due_until_it_is_marked(test: TestStore) {
        let store = &test.store;
        let silent = NewEvent {
            outcome: Outcome::NoPaymentFact,
            ..of_type("evt_8", "charge.updated")
        };
        let batch = [
            of_type("evt_1", "v1.invoice.paid"),
            of_type("evt_2", "charge.failed"),
            of_type("evt_3", "payment_intent.processing"),
            of_type("evt_4", "refund.created"),
            of_type("evt_5", "invoice.paid"),
            of_type("evt_6", "chargeback"),
            of_type("evt_7", "v1"),
            silent,
        ];
        store.append(&batch).await.unwrap();
        let of = |ids: &[&str], attempts| {
            ids.iter()
                .map(|id| (key(id, 0), attempts))
                .collect::<BTreeSet<_>>()
        };
        assert_eq!(due(store, LookupKind::Object, 10).await, of(&["evt_1"], 0));
        assert_eq!(
            due(store, LookupKind::Invoice, 10).await,
            of(&["evt_2", "evt_3", "evt_4"], 0)
        );
        let found = store
            .due_lookups(LookupKind::Object, 10, 100)
            .await
            .unwrap();
        assert_eq!(
            (found[0].observation.as_ref(), found[0].body.as_ref()),
            (batch[0].observation.as_ref(), batch[0].body.unpack().as_ref())
        );

        store
            .mark_lookup(&[
                state(key("evt_1", 0), Some(50), 3),
                state(key("evt_2", 0), None, 1),
                state(key("evt_9", 0), Some(1), 1),
            ])
            .await
            .unwrap();
        store.mark_lookup(&[]).await.unwrap();
        let about = store
            .lookup_states(&[
                key("evt_1", 0),
                key("evt_9", 0),
                key("evt_2", 0),
                key("evt_3", 0),
            ])
            .await
            .unwrap();
        let about: BTreeSet<_> = about
            .into_iter()
            .map(|about| (about.key, about.due_ms, about.attempts))
            .collect();
        assert_eq!(
            about,
            BTreeSet::from([
                (key("evt_1", 0), Some(50), 3),
                (key("evt_2", 0), None, 1),
                (key("evt_3", 0), Some(0), 0)
            ])
        );
        assert!(store.lookup_states(&[]).await.unwrap().is_empty());
        assert!(
            due(store, LookupKind::Object, 49).await.is_empty(),
            "not due yet"
        );
        assert_eq!(due(store, LookupKind::Object, 50).await, of(&["evt_1"], 3));
        assert_eq!(
            due(store, LookupKind::Invoice, 1000).await,
            of(&["evt_3", "evt_4"], 0)
        );
        store.forget_bodies(1000, None, 100).await.unwrap();
        assert!(
            store
                .due_lookups(LookupKind::Object, 50, 100)
                .await
                .unwrap()[0]
                .body
                .is_none(),
            "pruned"
        );

        let more: Vec<NewEvent> = (10..20)
            .map(|n| of_type(&format!("evt_{n}"), "charge.failed"))
            .collect();
        store.append(&more).await.unwrap();
        let marks: Vec<LookupState> = more
            .iter()
            .enumerate()
            .map(|(n, e)| state(e.key, Some(100 - n as i64), 0))
            .collect();
        store.mark_lookup(&marks).await.unwrap();
        store
            .mark_lookup(&[
                state(key("evt_3", 0), None, 0),
                state(key("evt_4", 0), None, 0),
            ])
            .await
            .unwrap();
        let found = store
            .due_lookups(LookupKind::Invoice, 1000, 4)
            .await
            .unwrap();
        let longest_due: Vec<EventKey> = more.iter().rev().take(4).map(|event| event.key).collect();
        assert_eq!(
            found.iter().map(|lookup| lookup.key).collect::<Vec<_>>(),
            longest_due
        );
    }

    async fn known_events_are_found_by_key_and_id(test: TestStore) {
        let store = &test.store;
        store
            .append(&[
                nth(1),
                nth(2),
                event("evt_1", 9, "in_1", 1),
                event("evt_\u{e9}'", 0, "in_1", 1),
            ])
            .await
            .unwrap();
        let known = store
            .known_keys(&[nth(1).key, key("evt_1", 8), key("evt_1", 9), nth(3).key])
            .await
            .unwrap();

        assert_eq!(
            known.into_iter().collect::<BTreeSet<_>>(),
            BTreeSet::from([nth(1).key, key("evt_1", 9)])
        );

        let known = store
            .known_ids(&["evt_1", "evt_3", "evt_\u{e9}'", "EVT_2", "evt_"])
            .await
            .unwrap();
        assert_eq!(known, ["evt_1", "evt_\u{e9}'"]);
        assert!(
            store.known_ids(&[]).await.unwrap().is_empty()
                && store.known_keys(&[]).await.unwrap().is_empty()
        );
    }

    async fn invoice_is_compared_when_it_is_due(test: TestStore) {
        let store = &test.store;
        for (n, id) in ["in_b", "in_A", "in_\u{e9}", "in_a"]
            .into_iter()
            .enumerate()
        {
            store
                .put_invoice(
                    &invoice("acme", &format!("{n}"), Some(id)),
                    10 + n as i64,
                    &|_| true,
                )
                .await
                .unwrap();
        }
        store
            .put_invoice(&invoice("acme", "none", None), 10, &|_| true)
            .await
            .unwrap();
        let by_bytes = ["in_A", "in_a", "in_b", "in_\u{e9}"];
        assert_eq!(
            ids(&store.check_candidates_after("", 10).await.unwrap()),
            by_bytes
        );
        assert_eq!(
            ids(&store.check_candidates_after("in_A", 2).await.unwrap()),
            ["in_a", "in_b"]
        );
        assert!(
            store
                .check_candidates_after("in_\u{e9}", 2)
                .await
                .unwrap()
                .is_empty()
        );
        let of = CheckCandidate {
            tenant_uid: "acme".to_owned(),
            invoice_uid: "1".to_owned(),
            stripe_invoice_id: "in_A".to_owned(),
            differs_since_ms: None,
        };
        assert_eq!(
            store
                .check_candidates(&["in_unknown", "in_A"])
                .await
                .unwrap(),
            std::slice::from_ref(&of)
        );
        assert!(store.check_candidates(&[]).await.unwrap().is_empty());

        assert_eq!(
            store.due_check_candidates(0, 100, 10).await.unwrap().len(),
            4,
            "an invoice that was never compared is due"
        );
        assert_eq!(
            ids(&store.due_check_candidates(0, 10, 10).await.unwrap()),
            ["in_b"],
            "no invoice that was stored later"
        );
        let differs = CheckResult {
            differs_since_ms: Some(70),
            agrees: false,
            ..checked("in_A", 80, Some(300))
        };
        store
            .save_check_results(&[
                differs,
                checked("in_a", 60, Some(200)),
                checked("in_b", 50, None),
                checked("in_\u{e9}", 40, None),
                checked("in_?", 1, None),
            ])
            .await
            .unwrap();
        assert!(
            store
                .due_check_candidates(199, 100, 10)
                .await
                .unwrap()
                .is_empty()
        );
        let due = store.due_check_candidates(300, 100, 10).await.unwrap();
        assert_eq!(
            (ids(&due), due[1].differs_since_ms),
            (vec!["in_a", "in_A"], Some(70)),
            "the longest due first"
        );
        assert_eq!(
            ids(&store.due_check_candidates(300, 100, 1).await.unwrap()),
            ["in_a"]
        );
        assert_eq!(
            ids(&store.sampled_check_candidates(100, 10).await.unwrap()),
            ["in_\u{e9}", "in_b"],
            "settled invoices, the longest ago first"
        );
        assert_eq!(
            ids(&store.sampled_check_candidates(49, 10).await.unwrap()),
            ["in_\u{e9}"]
        );
        assert_eq!(
            store.check_candidates(&["in_A"]).await.unwrap(),
            [CheckCandidate {
                differs_since_ms: Some(70),
                ..of
            }]
        );
        let check_state = |check_due_ms, confirmed_ms, differs_since_ms| {
            Some(Comparison {
                check_due_ms,
                confirmed_ms,
                differs_since_ms,
            })
        };
        assert_eq!(
            store.comparison("acme", "1").await.unwrap(),
            check_state(Some(300), None, Some(70))
        );
        assert_eq!(
            store.comparison("acme", "3").await.unwrap(),
            check_state(Some(200), Some(60), None)
        );
        assert_eq!(
            store.comparison("acme", "0").await.unwrap(),
            check_state(None, Some(50), None)
        );
        assert_eq!(
            store.comparison("acme", "none").await.unwrap(),
            check_state(Some(0), None, None)
        );
        assert_eq!(store.comparison("beta", "1").await.unwrap(), None);
    }

    async fn accounts_and_related_observations_come_from_the_log(test: TestStore) {
        let store = &test.store;
        let with = |n: usize, account: Option<&str>, mentions: &[(&str, bool)]| NewEvent {
            observation: Some(match account {
                Some(account) => {
                    format!(r#"{{"id":"evt_{n}","account":"{account}","object":{{}}}}"#)
                }
                None => format!(r#"{{"id":"evt_{n}","object":{{"account":5}}}}"#),
            }),
            mentions: mentions
                .iter()
                .map(|(id, is_invoice)| mention(id, *is_invoice))
                .collect(),
            ..nth(n)
        };
        store
            .append(&[
                with(1, Some("acct_1"), &[("in_1", true), ("ch_1", false)]),
                with(2, Some("acct_2"), &[("ch_1", false), ("re_1", false)]),
                with(3, Some("acct_2"), &[("re_1", false)]),
                with(4, None, &[("in_2", true), ("ch_2", false)]),
                nth(5),
            ])
            .await
            .unwrap();
        let accounts = |found: Vec<String>| found.into_iter().collect::<BTreeSet<_>>();
        assert_eq!(
            accounts(store.accounts_since(0).await.unwrap()),
            BTreeSet::from(["acct_1".to_owned(), "acct_2".to_owned()])
        );
        assert_eq!(
            store.accounts_since(nth(2).received_ms).await.unwrap(),
            ["acct_2"]
        );
        assert!(store.accounts_since(i64::MAX).await.unwrap().is_empty());

        let cases = [
            (vec!["re_1"], vec![1, 2, 3]),
            (vec!["in_1"], vec![1, 2, 3]),
            (vec!["ch_2", "in_2"], vec![4]),
            (vec!["re_1", "in_1", "ch_2"], vec![1, 2, 3, 4]),
            (vec!["in_9"], vec![]),
            (vec![], vec![]),
        ];
        for (ids, expected) in cases {
            let of: Vec<String> = ids.iter().map(|id| (*id).to_owned()).collect();
            let found = store.observations_for(&of).await.unwrap();
            let keys: BTreeSet<EventKey> = found.iter().map(|row| row.key).collect();
            assert_eq!(keys.len(), found.len(), "{ids:?}: each once");
            assert_eq!(
                keys,
                expected.iter().map(|n| nth(*n).key).collect(),
                "{ids:?}"
            );
        }
    }
}
