//! `GET /v1/tenants/{tenantUid}/invoices/{invoiceUid}/evidence`: the proofs of each entry, their
//! age, and the knowledge at an earlier time.

use serde_json::{Value, json};
use stripe_reconciler::clock::Clock;
use stripe_reconciler::domain::time::timestamp;
use stripe_reconciler::store::{LookupState, Store};

use testkit::each_database;
use testkit::stripe::{self, DAY, ENDIVE, HOUR, LIVE_KEY, Life, Stripe, Terms, now_s};
use testkit::{SECRET, TestServer, binary, fixtures, invoice_path};

fn path(uid: &str) -> String {
    format!("{}/evidence", invoice_path(uid))
}

async fn evidence(server: &TestServer, uid: &str) -> Value {
    server
        .get(&path(uid), &server.acme_key)
        .await
        .with_status(200)
        .json()
}

async fn evidence_as_of(server: &TestServer, uid: &str, as_of: &str) -> Value {
    server
        .get(&format!("{}?asOf={as_of}", path(uid)), &server.acme_key)
        .await
        .with_status(200)
        .json()
}

/// Returns the entries as a read of the invoice shows them.
fn states(evidence: &Value) -> Value {
    let entries = evidence["entries"].as_array().unwrap().iter();
    entries
        .map(|entry| json!({"state": entry["state"], "timestamp": entry["timestamp"], "paymentMsg": entry["paymentMsg"]}))
        .collect()
}

fn messages(evidence: &Value) -> Vec<&str> {
    evidence["missing"]
        .as_array()
        .unwrap()
        .iter()
        .map(|missing| missing["message"].as_str().unwrap())
        .collect()
}

/// Returns the current time. The next step happens at a later millisecond.
fn now_text() -> String {
    let now_ms = Clock::system().now_ms();
    while Clock::system().now_ms() <= now_ms {
        std::hint::spin_loop();
    }
    timestamp(now_ms)
}

fn event(id: &str, kind: &str, invoice: Value) -> Value {
    json!({"id": id, "object": "event", "type": kind, "created": 1_769_850_000, "livemode": true, "data": {"object": invoice}})
}

fn paid() -> Value {
    let invoice = json!({"id": "in_1", "object": "invoice", "status": "paid", "currency": "eur", "amount_due": 5000, "amount_paid": 5000});
    event("evt_paid", "invoice.paid", invoice)
}

each_database! {
    async fn evidence_lists_the_proofs_that_why_prints(server: TestServer) {
        let (mut document, uid) = fixtures::story_invoice();
        document["status"]["states"] = json!([{"state": "PaymentPending", "timestamp": "2020-01-01T00:00:00Z", "paymentMsg": "Imported."}]);
        server
            .put(&invoice_path(&uid), &document)
            .await
            .with_status(201);
        let untold = evidence(&server, &uid).await;

        assert_eq!(
            (
                &untold["lastEventAt"],
                &untold["confirmedAt"],
                &untold["asOf"]
            ),
            (&Value::Null, &Value::Null, &Value::Null)
        );

        for event in fixtures::events() {
            server.deliver(&event).await.with_status(200);
        }

        let answer = server
            .get(&path(&uid), &server.acme_key)
            .await
            .with_status(200);
        assert_eq!(
            (
                answer.header("content-type"),
                answer.header("cache-control")
            ),
            ("application/json", "private, no-cache")
        );

        let body = answer.json();
        assert_eq!(
            body,
            server
                .run(&["why", "acme", &uid, "--json"])
                .with_code(0)
                .json()
        );
        assert_eq!(
            body,
            server.get(&path(&uid), &server.operator_key).await.json()
        );
        assert_eq!(states(&body), server.states(&uid).await);
        assert_eq!(
            (&body["tenantUid"], &body["invoiceUid"]),
            (&json!("acme"), &json!(uid))
        );

        assert_eq!(
            body["stripeInvoiceId"],
            document["status"]["stripeInvoiceId"]
        );

        let entries = body["entries"].as_array().unwrap();
        assert_eq!(
            (&entries[0]["imported"], &entries[0]["proofs"]),
            (&json!(true), &json!([]))
        );

        let log = server
            .run(&["events", "list", "--json", "--limit", "1000"])
            .with_code(0)
            .json_lines();
        for proof in entries[1..]
            .iter()
            .flat_map(|entry| entry["proofs"].as_array().unwrap())
        {
            let logged = log
                .iter()
                .find(|logged| logged["id"] == proof["id"])
                .unwrap();
            for name in ["type", "createdAt", "receivedAt", "source", "secretLabel"] {
                assert_eq!(proof[name], logged[name], "{name} of {proof}");
            }
        }
        let last_proof = entries
            .iter()
            .flat_map(|entry| entry["proofs"].as_array().unwrap())
            .map(|proof| proof["receivedAt"].as_str().unwrap())
            .max();

        let last_event = body["lastEventAt"].as_str().unwrap();
        assert!(
            log.iter().any(|logged| logged["receivedAt"] == last_event)
                && Some(last_event) >= last_proof,
            "{body}"
        );

        now_text();
        server
            .deliver(&event(
                "evt_other",
                "invoice.finalized",
                json!({"id": "in_other", "object": "invoice", "status": "open"}),
            ))
            .await
            .with_status(200);
        assert_eq!(
            evidence(&server, &uid).await,
            body,
            "another's event is no news"
        );

        server
            .deliver(&event(
                "evt_sent",
                "invoice.sent",
                json!({"id": document["status"]["stripeInvoiceId"], "object": "invoice"}),
            ))
            .await
            .with_status(200);
        assert!(
            evidence(&server, &uid).await["lastEventAt"]
                .as_str()
                .unwrap()
                > last_event,
            "what tells no fact is news"
        );

        let head = server
            .send("HEAD", &path(&uid), &[("ApiKey", &server.acme_key)], vec![])
            .await
            .with_status(200);
        assert!(
            head.body.is_empty() && head.header("content-length") == answer.body.len().to_string(),
            "{head:?}"
        );
    }

    async fn as_of_answers_what_was_known_at_that_time(server: TestServer) {
        let (mut document, uid) = fixtures::story_invoice();
        document["status"]["states"] = json!([{"state": "PaymentFailed", "timestamp": "2020-01-01T00:00:00Z", "paymentMsg": "Imported."}]);
        let mut then = vec![now_text()];
        let events = fixtures::events();
        let finalized = events
            .iter()
            .position(|event| event["type"] == "invoice.finalized")
            .unwrap();
        let (early, late) = events.split_at(finalized + 1);

        for event in early {
            server.deliver(event).await.with_status(200);
            then.push(now_text());
        }

        server
            .put(&invoice_path(&uid), &document)
            .await
            .with_status(201);
        let mut known = vec![(now_text(), server.states(&uid).await)];

        for event in late {
            server.deliver(event).await.with_status(200);
            known.push((now_text(), server.states(&uid).await));
        }

        // Later events from any source and a rebuild do not change past knowledge.
        server.deliver(&events[0]).await.with_status(200);
        server.run(&["rebuild"]).with_code(0);
        for (now_text, states_then) in &known {
            let body = evidence_as_of(&server, &uid, now_text).await;
            assert_eq!(states(&body), *states_then, "{now_text}");
            assert!(
                body["lastEventAt"].as_str().unwrap() <= body["asOf"].as_str().unwrap(),
                "{body}"
            );
            assert_eq!(
                body,
                server
                    .run(&["why", "acme", &uid, "--json", "--as-of", now_text])
                    .with_code(0)
                    .json()
            );
            let text = server
                .run(&["why", "acme", &uid, "--as-of", now_text])
                .with_code(0)
                .stdout;
            assert!(
                text.contains(&format!(
                    "as known at {}",
                    body["asOf"].as_str().unwrap()
                )),
                "{text}"
            );
            assert!(
                text.contains("whether Stripe's API agreed by then is not known"),
                "{text}"
            );
        }

        assert!(
            known
                .iter()
                .map(|(_, states)| states.to_string())
                .collect::<std::collections::BTreeSet<_>>()
                .len()
                > 4
        );

        // The imported states were unknown before the invoice was stored; Stripe's events were
        // known.
        let entries: Vec<usize> = {
            let mut entries = Vec::new();
            for now_text in &then {
                let body = evidence_as_of(&server, &uid, now_text).await;
                assert!(
                    body["entries"]
                        .as_array()
                        .unwrap()
                        .iter()
                        .all(|entry| entry["imported"] == false),
                    "{body}"
                );
                assert!(
                    body["storedAt"].as_str().unwrap() > now_text.as_str(),
                    "{body}"
                );
                entries.push(body["entries"].as_array().unwrap().len());
            }
            entries
        };

        assert!(
            entries[0] == 0 && entries[entries.len() - 1] > 0,
            "{entries:?}"
        );

        let now = evidence(&server, &uid).await;
        let to_come = evidence_as_of(&server, &uid, "2999-01-01T00:00:00Z").await;
        assert_eq!(
            (&now["entries"], &now["lastEventAt"]),
            (&to_come["entries"], &to_come["lastEventAt"])
        );
        assert!(
            to_come["asOf"].as_str().unwrap() < "2999",
            "what is to come is now: {to_come}"
        );
    }

    async fn as_of_requires_rfc_3339_with_offset(server: TestServer) {
        server.store("a", "in_1").await.with_status(201);
        let same = [
            "2026-01-31T09:15:00.123Z",
            "2026-01-31T09:15:00.1239Z",
            "2026-01-31T10:15:00.123%2B01:00",
            "2026-01-31T10:15:00.123+01:00",
            "2026-01-31T03:45:00.123-05:30",
            "2026-01-31t09:15:00.123z",
            "2026-01-31T09:15:00.123-00:00",
        ];

        for now_text in same {
            assert_eq!(
                evidence_as_of(&server, "a", now_text).await["asOf"],
                "2026-01-31T09:15:00.123Z",
                "{now_text}"
            );
        }

        let odd = [
            "",
            "now",
            "2026-01-31",
            "2026-01-31T09:15:00",
            "2026-01-31T09:15Z",
            "1769850900",
            "2026-02-30T00:00:00Z",
            "2026-01-31T24:00:00Z",
            "2026-01-31T09:15:60Z",
            "2026-01-31T09:15:00.Z",
            "2026-01-31T09:15:00%2B0100",
            "-2026-01-31T09:15:00Z",
            "2026-01-31T09:15:00Z[UTC]",
            "%ff",
            "2026-01-31T09:15:00Z%00",
            "99999-01-01T00:00:00Z",
            "2026-01-31T09:15:00Z&asOf=2026-01-31T09:15:00Z",
        ];

        for now_text in odd {
            let answer = server
                .get(&format!("{}?asOf={now_text}", path("a")), &server.acme_key)
                .await;
            answer.with_error(400, "InvalidQuery");
        }

        server
            .run(&["why", "acme", "a", "--as-of", "yesterday"])
            .with_code(2);
    }

    async fn key_reads_evidence_of_its_own_tenant_only(server: TestServer) {
        server.store("a", "in_1").await.with_status(201);
        server
            .put("/v1/tenants/beta/invoices/b", &json!({}))
            .await
            .with_status(201);
        let beta = "/v1/tenants/beta/invoices/b/evidence";

        server
            .get(beta, &server.operator_key)
            .await
            .with_status(200);
        for missing in [
            beta,
            "/v1/tenants/beta/invoices/unknown/evidence",
            "/v1/tenants/unknown/invoices/b/evidence",
            &path("unknown"),
        ] {
            server
                .get(missing, &server.acme_key)
                .await
                .with_error(404, "ResourceNotFound");
            server
                .get(&format!("{missing}?asOf=x"), "wrong")
                .await
                .with_error(401, "Unauthorized");
        }

        server
            .get(&format!("{beta}?asOf=x"), &server.acme_key)
            .await
            .with_error(404, "ResourceNotFound");
        server
            .get(&path("%ff"), &server.acme_key)
            .await
            .with_error(400, "InvalidPath");
        server
            .get(&path("%00"), "wrong")
            .await
            .with_error(401, "Unauthorized");
        let posted = server
            .send(
                "POST",
                &path("a"),
                &[("ApiKey", &server.operator_key)],
                vec![],
            )
            .await
            .with_error(405, "MethodNotAllowed");

        assert_eq!(posted.header("allow"), "GET,HEAD");
    }

    async fn evidence_names_the_source_of_each_proof(server: TestServer) {
        server.store("a", "in_1").await.with_status(201);
        let line = event(
            "evt_replayed",
            "invoice.payment_failed",
            json!({"id": "in_1", "object": "invoice", "status": "open", "attempt_count": 1,
            "amount_due": 5000, "amount_remaining": 5000, "currency": "eur"}),
        );
        server
            .run_with_input(&["replay", "-"], line.to_string().as_bytes())
            .with_code(0);
        let replayed = now_text();
        server.deliver(&paid()).await.with_status(200);

        // Delivered again: the first receipt remains the proof.
        server.deliver(&line).await.with_status(200);
        let body = evidence(&server, "a").await;
        let proof_sources: Vec<(&Value, &Value)> = body["entries"]
            .as_array()
            .unwrap()
            .iter()
            .flat_map(|entry| entry["proofs"].as_array().unwrap())
            .map(|p| (&p["source"], &p["secretLabel"]))
            .collect();
        assert!(
            proof_sources.contains(&(&json!("replay"), &Value::Null))
                && proof_sources.contains(&(&json!("webhook"), &json!("live"))),
            "{body}"
        );

        let then = evidence_as_of(&server, "a", &replayed).await;
        assert!(
            !then.to_string().contains("evt_paid") && then.to_string().contains("evt_replayed"),
            "{then}"
        );
    }

    async fn evidence_lists_pending_lookups_until_fetched(server: TestServer) {
        let stripe = Stripe::start();
        let terms = Terms {
            account: None,
            livemode: true,
            due: 5000,
            currency: "usd",
            sent: false,
            start: now_s() - DAY,
            listed: ENDIVE,
            delivered: ENDIVE,
            order_reference: None,
        };
        let mut life = Life::begin(&stripe, terms, &["invoice.created"]);
        life.later(HOUR)
            .omit_events(&[""])
            .finalized()
            .later(2)
            .paid_by_card();
        server.store("thin", life.id()).await.with_status(201);
        let thin = stripe
            .events()
            .into_iter()
            .find(|event| event.kind == "invoice.paid")
            .unwrap()
            .as_thin();
        stripe::deliver_one(&server.process.base, &thin).await;
        let announced = evidence(&server, "thin").await;
        assert_eq!(
            messages(&announced),
            [
                "Stripe announced invoice.paid without its details: the invoice is still to be fetched from Stripe's API"
            ]
        );
        assert_eq!(
            (
                &announced["missing"][0]["eventId"],
                &announced["missing"][0]["objectId"]
            ),
            (&thin["id"], &json!(life.id()))
        );
        assert!(
            announced["lastEventAt"].is_string() && announced["confirmedAt"].is_null(),
            "{announced}"
        );
        let text = server.run(&["why", "acme", "thin"]).with_code(0).stdout;
        assert!(
            text.contains("still to be fetched") && text.contains("not compared with Stripe's API"),
            "{text}"
        );

        let before = now_text();
        let settings = [
            ("DATABASE_URL", &*server.database.url),
            ("STRIPE_WEBHOOK_SECRET", SECRET),
            ("STRIPE_API_KEY", LIVE_KEY),
            ("STRIPE_API_BASE", &stripe.base),
        ];
        let output = binary(&settings)
            .args(["reconcile", "--json"])
            .output()
            .unwrap();
        assert!(
            [Some(0), Some(3)].contains(&output.status.code()),
            "{output:?}"
        );
        let fetched = evidence(&server, "thin").await;
        assert_eq!(messages(&fetched), [""; 0]);
        assert!(
            fetched["confirmedAt"].as_str().unwrap() > before.as_str(),
            "{fetched}"
        );
        assert_eq!(
            fetched["lastEventAt"], announced["lastEventAt"],
            "what the API showed is no event"
        );
        assert!(
            fetched["entries"].as_array().unwrap().last().unwrap()["proofs"]
                .to_string()
                .contains("\"source\":\"api\""),
            "{fetched}"
        );
        let then = evidence_as_of(&server, "thin", &before).await;
        assert_eq!(
            messages(&then),
            [
                "Stripe announced invoice.paid without its details: the invoice was fetched from Stripe's API later"
            ]
        );
        assert_eq!(
            (&then["entries"], &then["confirmedAt"]),
            (&announced["entries"], &Value::Null)
        );
        let text = server.run(&["why", "acme", "thin"]).with_code(0).stdout;
        assert!(text.contains("Stripe's API last agreed"), "{text}");
    }

    async fn evidence_reports_missing_reasons_and_hidden_objects(server: TestServer) {
        server.store("a", "in_1").await.with_status(201);
        let failed = json!({"id": "in_1", "object": "invoice", "status": "open", "attempt_count": 1, "amount_due": 5000, "amount_remaining": 5000,
            "currency": "eur", "payment_intent": "pi_1"});
        server
            .deliver(&event("evt_1", "invoice.payment_failed", failed))
            .await
            .with_status(200);
        let unexplained = evidence(&server, "a").await;
        assert_eq!(
            messages(&unexplained),
            [
                "No event says why the latest attempt failed: the reason is still to be fetched from Stripe's API"
            ]
        );
        assert_eq!(unexplained["missing"][0]["eventId"], Value::Null);
        let reason = json!({"id": "pi_1", "object": "payment_intent", "amount": 5000, "currency": "eur", "last_payment_error": {"code": "card_declined", "message": "No."}});
        server
            .deliver(&event("evt_2", "payment_intent.payment_failed", reason))
            .await
            .with_status(200);
        assert_eq!(messages(&evidence(&server, "a").await), [""; 0]);

        let thin = json!({"id": "evt_test_3", "object": "v2.core.event", "type": "v1.invoice.overdue", "created": "2026-01-31T09:00:00Z",
            "related_object": {"id": "in_1", "type": "invoice", "url": "/v1/invoices/in_1"}});
        server.deliver(&thin).await.with_status(200);
        assert!(messages(&evidence(&server, "a").await)[0].contains("still to be fetched"));
        let store = Store::connect(&server.database.url).await.unwrap();
        let key = store.events_by_id("evt_test_3", None, 1).await.unwrap()[0].key;
        store
            .mark_lookup(&[LookupState {
                key,
                due_ms: None,
                attempts: 8,
            }])
            .await
            .unwrap();
        store.close().await;
        let given_up = "Stripe announced invoice.overdue without its details: the invoice was requested from Stripe's API 8 times and not found";
        assert_eq!(messages(&evidence(&server, "a").await), [given_up]);
        // Its snapshot twin has the details.
        let mut twin = thin.clone();
        (twin["id"], twin["snapshot_event"]) = (json!("evt_test_4"), json!("evt_1"));
        server.deliver(&twin).await.with_status(200);
        assert_eq!(
            messages(&evidence(&server, "a").await),
            [given_up],
            "and the other event lacks nothing"
        );
    }
}
