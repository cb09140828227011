//! `POST /webhooks/stripe` as Stripe sees it: answers and stored events.

use std::collections::BTreeSet;

use futures_util::future::join_all;
use hmac::{Hmac, KeyInit, Mac};
use serde_json::{Value, json};
use sha2::Sha256;
use stripe_reconciler::clock::Clock;

use testkit::each_database;
use testkit::{Answer, OLD_SECRET, SECRET, TestServer, Wire, signature};

const PATH: &str = "/webhooks/stripe";
const MIB: usize = 1024 * 1024;

fn event(id: &str, kind: &str, created: i64, object: Value) -> Value {
    json!({"id": id, "object": "event", "type": kind, "created": created, "livemode": true, "data": {"object": object}})
}

fn paid_invoice() -> Value {
    json!({"id": "in_1", "object": "invoice", "status": "paid", "currency": "eur", "amount_due": 5000, "amount_paid": 5000})
}

fn paid(id: &str, created: i64) -> Value {
    event(id, "invoice.paid", created, paid_invoice())
}

/// Returns the thin event of `invoice.paid` whose snapshot twin is `twin`.
fn thin(id: &str, twin: &str) -> Value {
    json!({"id": id, "object": "v2.core.event", "type": "v1.invoice.paid", "created": "2026-01-31T09:00:00.123456789Z",
        "livemode": true, "snapshot_event": twin, "related_object": {"id": "in_1", "type": "invoice"}})
}

/// Returns the outcome in a 200 answer.
#[track_caller]
fn outcome(answer: Answer) -> String {
    let mut body = answer.with_status(200).json();
    let outcome = body["outcome"].take();
    assert_eq!(body, json!({"received": true, "outcome": null}));
    outcome.as_str().expect("an outcome is a word").to_owned()
}

fn listed(server: &TestServer, filter: &[&str]) -> Vec<Value> {
    let all = [&["events", "list", "--limit", "1000", "--json"], filter].concat();
    server.run(&all).with_code(0).json_lines()
}

fn now_s() -> i64 {
    Clock::system().now_s()
}

/// Independent implementation of the scheme: returns the `v1` for this `t` as written in the
/// header.
fn v1(secret: &str, t: impl std::fmt::Display, body: &[u8]) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).unwrap();
    mac.update(format!("{t}.").as_bytes());
    mac.update(body);
    hex::encode(mac.finalize().into_bytes())
}

/// Returns the head of a signed request. `how` is the header line that frames the body.
fn head(body: &[u8], how: &str) -> String {
    let signature = signature(SECRET, now_s(), body);
    format!(
        "POST {PATH} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nStripe-Signature: {signature}\r\n{how}\r\n\r\n"
    )
}

each_database! {
    async fn redelivered_event_is_acknowledged_without_effect(server: TestServer) {
        server.store("a", "in_1").await.with_status(201);
        let first = server
            .deliver(&paid("evt_1", 1_769_850_000))
            .await
            .with_status(200)
            .json();
        assert_eq!(first, json!({"received": true, "outcome": "recorded"}));

        let again = server
            .deliver(&paid("evt_1", 1_769_850_000))
            .await
            .with_status(200)
            .json();
        assert_eq!(again, json!({"received": true, "outcome": "duplicate"}));
        assert_eq!(server.history("a").await, ["Paid 2026-01-31T09:00:00.000Z"]);
        assert_eq!(
            server
                .run(&["events", "list", "--json"])
                .with_code(0)
                .json_lines()
                .len(),
            1
        );
    }

    async fn answer_reports_outcome_and_duplicate_on_repetition(server: TestServer) {
        let invoice = paid_invoice;
        let draft = json!({"id": "in_1", "object": "invoice", "status": "draft", "amount_due": 5000, "amount_remaining": 5000});
        let refund = json!({"id": "re_1", "object": "refund", "payment_intent": "pi_of_nobody", "amount": 1, "currency": "eur"});
        let without_id =
            json!({"object": "invoice", "status": "paid", "amount_due": 5000, "amount_paid": 5000});
        let table = [
            (event("evt_01", "invoice.paid", 100, invoice()), "recorded"),
            (
                event("evt_02", "invoice.payment_succeeded", 100, invoice()),
                "recorded",
            ), // the same fact once more
            (
                event(
                    "evt_03",
                    "customer.created",
                    100,
                    json!({"id": "cus_1", "object": "customer"}),
                ),
                "no_payment_fact",
            ),
            (
                event(
                    "evt_04",
                    "made.up.tomorrow",
                    100,
                    json!({"id": "x_1", "object": "x"}),
                ),
                "no_payment_fact",
            ),
            (
                event("evt_05", "made.up.tomorrow", 100, json!({})),
                "no_payment_fact",
            ),
            (
                event("evt_06", "invoice.created", 100, draft.clone()),
                "no_payment_fact",
            ),
            (
                event("evt_07", "invoice.updated", 100, draft),
                "no_payment_fact",
            ),
            (
                event("evt_08", "invoice.updated", 100, invoice()),
                "recorded",
            ), // its snapshot asserts the fact
            (
                event("evt_09", "invoice.paid", 100, without_id.clone()),
                "no_payment_fact",
            ),
            (
                event("evt_10", "invoice.upcoming", 100, without_id),
                "no_payment_fact",
            ),
            (
                event("evt_11", "refund.created", 100, refund.clone()),
                "recorded",
            ), // nothing links it yet
            (
                event("evt_12", "refund.made_up_tomorrow", 100, refund),
                "recorded",
            ),
            (
                event(
                    "evt_13",
                    "charge.refunded",
                    100,
                    json!({"id": "ch_1", "object": "charge"}),
                ),
                "recorded",
            ),
            (
                event(
                    "evt_14",
                    "credit_note.updated",
                    100,
                    json!({"id": "cn_1", "object": "credit_note"}),
                ),
                "recorded",
            ),
            (
                event(
                    "evt_15",
                    "charge.dispute.updated",
                    100,
                    json!({"id": "du_1", "object": "dispute"}),
                ),
                "recorded",
            ),
            (
                event(
                    "evt_16",
                    "payment_intent.canceled",
                    9,
                    json!({"id": "pi_1", "object": "payment_intent"}),
                ),
                "no_payment_fact",
            ),
            (
                event(
                    "evt_17",
                    "invoice.voided",
                    253_000_000_000,
                    json!({"id": "in_2", "object": "invoice"}),
                ),
                "recorded",
            ),
            (thin("evt_18", "evt_of_tomorrow"), "recorded"),
        ];

        let before_s = now_s();
        for (event, expected) in &table {
            assert_eq!(outcome(server.deliver(event).await), *expected, "{event}");
            assert_eq!(outcome(server.deliver(event).await), "duplicate", "{event}");
        }

        let log = listed(&server, &[]);
        let kept: BTreeSet<_> = log
            .iter()
            .map(|e| (e["id"].as_str().unwrap(), e["outcome"].as_str().unwrap()))
            .collect();
        assert_eq!(
            kept,
            table
                .iter()
                .map(|(event, outcome)| (event["id"].as_str().unwrap(), *outcome))
                .collect()
        );
        assert_eq!(log.len(), table.len());

        for event in log {
            let received: jiff::Timestamp = event["receivedAt"].as_str().unwrap().parse().unwrap();
            assert!(
                (before_s..=now_s()).contains(&received.as_second()),
                "{event}"
            );
            assert_eq!(
                (&event["source"], &event["secretLabel"]),
                (&json!("webhook"), &json!("live"))
            );
        }
    }

    async fn overlong_id_is_ignored_and_event_is_stored(server: TestServer) {
        // Random, because a repeated signature could be deduplicated.
        let endless: String = (0..100).map(|part| v1(SECRET, part, b"")).collect();
        let failed = event(
            "evt_1",
            "charge.failed",
            100,
            json!({"id": "ch_1", "object": "charge", "invoice": endless}),
        );
        let paid = event(
            "evt_2",
            "invoice.paid",
            100,
            json!({"id": endless, "object": "invoice", "status": "paid"}),
        );

        assert_eq!(outcome(server.deliver(&failed).await), "recorded");
        assert_eq!(outcome(server.deliver(&paid).await), "no_payment_fact");
        assert_eq!(listed(&server, &[]).len(), 2);
    }

    async fn authentic_non_event_bytes_are_stored_for_operator(server: TestServer) {
        let deep = [b"{\"id\":".repeat(5000), b"1".to_vec(), b"}".repeat(5000)].concat();
        let event = |without: &str| {
            let mut event = paid("evt_1", 100);
            event.as_object_mut().unwrap().remove(without);
            event.to_string().into_bytes()
        };
        let table = [
            b"".to_vec(), b" ".to_vec(), b"no JSON".to_vec(), b"{\"id\": \"evt_1\"".to_vec(), b"\xff\xfe{}".to_vec(), deep,
            b"{}".to_vec(), b"[]".to_vec(), b"null".to_vec(), b"\"evt_1\"".to_vec(),
            event("id"), event("type"), event("created"), event("data"),
            json!({"id": 1, "type": "invoice.paid", "created": 1, "data": {"object": {}}}).to_string().into_bytes(),
            json!({"id": "evt_1", "type": "invoice.paid", "created": "soon", "data": {"object": {}}}).to_string().into_bytes(),
            json!({"id": "evt_1", "type": "invoice.paid", "created": 1, "data": {"object": "in_1"}}).to_string().into_bytes(),
        ];

        for body in &table {
            let shown = String::from_utf8_lossy(&body[..body.len().min(100)]);
            assert_eq!(
                outcome(server.deliver_bytes(body).await),
                "unreadable",
                "{shown}"
            );
            assert_eq!(
                outcome(server.deliver_bytes(body).await),
                "duplicate",
                "{shown}"
            );
        }

        assert_eq!(
            outcome(server.deliver(&paid("evt_readable", 100)).await),
            "recorded"
        );

        let unreadable = listed(&server, &["--outcome", "unreadable"]);
        assert_eq!(unreadable.len(), table.len());

        for event in unreadable {
            assert!(
                !event["unreadableReason"].as_str().unwrap().is_empty(),
                "{event}"
            );
        }
    }

    async fn body_is_stored_as_received(server: TestServer) {
        let start = r#"{"object" : "event","id":"evt_1","type":"invoice.paid","created":1700000000,"data":{"object":"#;
        let odd = r#"{"id":"in_1","cost":100.00,"big":123456789012345678901234567890,"twice":1,"twice":2,"text":"\u20ac \/ €"}"#;
        let body = [start, odd, "}}"].concat();
        assert_eq!(
            outcome(server.deliver_bytes(body.as_bytes()).await),
            "no_payment_fact"
        );

        assert_eq!(
            server
                .run(&["events", "export"])
                .with_code(0)
                .stdout
                .trim_end(),
            body
        );
    }

    async fn known_id_in_new_rendering_is_answered_by_content(server: TestServer) {
        const PLACEHOLDER: &str = "evt_00000000000000";

        server.store("a", "in_1").await.with_status(201);
        let version = |version: &str| {
            let mut event = paid("evt_1", 1_769_850_000);
            event["api_version"] = json!(version);
            event
        };
        let other = |id: &str| json!({"id": id, "object": "invoice", "status": "paid", "amount_due": 1, "amount_paid": 1});
        let renderings = [
            (version("2022-11-15"), "recorded"),
            (version("2026-09-30.endive"), "recorded"),
            (thin("evt_1", "evt_1"), "recorded"),
            (thin("evt_of_its_own", "evt_1"), "recorded"),
            (
                event(
                    PLACEHOLDER,
                    "invoice.paid",
                    1_326_853_478,
                    other("in_00000000000000"),
                ),
                "recorded",
            ),
            (
                event(
                    PLACEHOLDER,
                    "invoice.payment_failed",
                    1_326_853_478,
                    other("in_00000000000000"),
                ),
                "recorded",
            ),
            (
                event(
                    PLACEHOLDER,
                    "invoice.paid",
                    1_326_853_478,
                    other("in_00000000000001"),
                ),
                "recorded",
            ),
            (
                event(
                    PLACEHOLDER,
                    "customer.created",
                    1_326_853_478,
                    json!({"id": "cus_00000000000000"}),
                ),
                "no_payment_fact",
            ),
        ];

        for (event, expected) in &renderings {
            assert_eq!(outcome(server.deliver(event).await), *expected, "{event}");
        }

        for (event, _) in &renderings {
            assert_eq!(outcome(server.deliver(event).await), "duplicate", "{event}");
        }

        assert_eq!(server.history("a").await, ["Paid 2026-01-31T09:00:00.000Z"]);

        for (id, expected) in [
            ("evt_1", &renderings[0..3]),
            (PLACEHOLDER, &renderings[4..8]),
        ] {
            let shown = server
                .run(&["events", "show", id, "--json"])
                .with_code(0)
                .json();
            let bodies: Vec<&Value> = shown
                .as_array()
                .unwrap()
                .iter()
                .map(|rendering| &rendering["body"])
                .collect();
            assert_eq!(
                bodies,
                expected.iter().map(|(event, _)| event).collect::<Vec<_>>()
            );
        }
    }

    async fn concurrent_deliveries_record_one_and_duplicate_the_rest(server: TestServer) {
        let event = paid("evt_1", 100);
        let mut outcomes: Vec<String> = join_all((0..32).map(|_| server.deliver(&event)))
            .await
            .into_iter()
            .map(outcome)
            .collect();

        outcomes.sort();
        assert_eq!(
            outcomes.iter().filter(|o| *o == "duplicate").count(),
            31,
            "{outcomes:?}"
        );
        assert_eq!(outcomes[31], "recorded");
        assert_eq!(listed(&server, &[]).len(), 1);
    }

    async fn early_event_appears_once_its_invoice_is_stored(server: TestServer) {
        assert_eq!(
            outcome(server.deliver(&paid("evt_1", 1_769_850_000)).await),
            "recorded"
        );
        let stored = server.store("a", "in_1").await.with_status(201).json();
        assert_eq!(stored["status"]["states"][0]["state"], "Paid", "{stored}");
        assert_eq!(server.history("a").await, ["Paid 2026-01-31T09:00:00.000Z"]);
    }

    async fn invalid_signature_is_rejected_opaquely_and_not_stored(server: TestServer) {
        let event = paid("evt_1", 100).to_string();
        let body = event.as_bytes();
        let now = now_s();
        let good = v1(SECRET, now, body);
        let signed_at = |t: &str| format!("t={t},v1={}", v1(SECRET, t, body));
        let table: Vec<Vec<String>> = [
            vec![],                                                         // none
            vec![signed_at(&now.to_string()), signed_at(&now.to_string())], // several lines
            vec![signed_at(&now.to_string()), format!("t={now}")],
            vec![String::new()], // malformed
            vec![good.clone()],
            vec![format!("v1={good}")],
            vec![format!("t={now}")],
            vec![format!("t={now},v1=")],
            vec![format!("t={now},v1={}", &good[..62])],
            vec![format!("t={now},v1={good}00")],
            vec![format!("T={now},V1={good}")],
            vec![format!("t={now},t={now},v1={good}")],
            vec![format!("t={now};v1={good}")],
            vec![signed_at("")],
            vec![signed_at("abc")],
            vec![signed_at(&format!("-{now}"))],
            vec![signed_at(&format!("{now}.5"))],
            vec![signed_at("99999999999999999999")],
            vec![format!("t={now},v0={good}")], // a scheme that does not count
            vec![format!("t={now},v0={good},v1={}", "0".repeat(64))],
            vec![format!(
                "t={now},v1={}",
                v1("whsec_of_a_stranger", now, body)
            )], // forged
            vec![format!(
                "t={now},v1={}",
                v1(&SECRET["whsec_".len()..], now, body)
            )],
            vec![format!("t={now},v1={}", v1(SECRET, now, b"another body"))],
            vec![format!("t={now},v1={}", v1(SECRET, now - 1, body))],
            vec![format!(
                "t={now},v1={}",
                v1(SECRET, now, &[body, b"\n"].concat())
            )],
            vec![signed_at(&(now - 301).to_string())], // stale
            vec![signed_at(&(now - 4 * 86_400).to_string())],
            vec![signed_at(&(now + 310).to_string())], // future
            vec![signed_at(&(now + 86_400).to_string())],
        ]
        .into();

        for signatures in &table {
            let headers: Vec<(&str, &str)> = signatures
                .iter()
                .map(|s| ("Stripe-Signature", s.as_str()))
                .collect();
            let answer = server
                .send("POST", PATH, &headers, body.to_vec())
                .await
                .with_status(400);
            let mut body = answer.json();
            assert_eq!(body["ref"].take(), answer.header("x-request-id"));
            let all = json!({"code": "InvalidSignature", "message": "the delivery was not accepted", "details": {}, "ref": null});
            assert_eq!(body, all, "{signatures:?}");
        }

        assert_eq!(listed(&server, &[]), [] as [Value; 0]);
        assert_eq!(outcome(server.deliver_bytes(body).await), "recorded");
    }

    async fn unauthentic_body_is_not_parsed(server: TestServer) {
        let answer = server
            .send(
                "POST",
                PATH,
                &[("Stripe-Signature", "t=1,v1=00")],
                b"no JSON".to_vec(),
            )
            .await
            .with_status(400);
        assert_eq!(answer.json()["code"], "InvalidSignature");
        assert_eq!(listed(&server, &[]), [] as [Value; 0]);
    }

    async fn signature_header_accepts_what_all_sdks_accept(server: TestServer) {
        let now = now_s();
        let junk = "0".repeat(64);
        let headers: [&dyn Fn(&str) -> String; 12] = [
            &|v1| format!("t={now},v1={v1}"),
            &|v1| format!("t={now},v1={v1},v0={junk}"),
            &|v1| format!("t={now},v0={junk},v1={v1}"),
            &|v1| format!("v1={v1},t={now}"),
            &|v1| format!("v1={v1},v0={junk},t={now}"),
            &|v1| format!("t={now},v1={v1},v1={junk}"),
            &|v1| format!("t={now},v1={junk},v1={v1}"),
            &|v1| format!("t={now},v1={v1},v1=potato"),
            &|v1| format!("t={now},v1=potato,v1={v1}"),
            &|v1| format!("t={now},v1=,v1={v1}"),
            &|v1| format!("t={now},v2={junk},scheme=unknown,v1={v1}"),
            &|v1| format!("t={now}{},v1={v1}", format!(",v1={junk}").repeat(200)),
        ];

        for (number, header) in headers.iter().enumerate() {
            let body = paid(&format!("evt_{number}"), 100).to_string();
            let header = header(&v1(SECRET, now, body.as_bytes()));
            assert_eq!(
                outcome(server.deliver_signed(&header, body.as_bytes()).await),
                "recorded",
                "{header}"
            );
        }

        for age in [290, -299] {
            let body = paid(&format!("evt_{age}"), 100).to_string();
            let header = signature(SECRET, now - age, body.as_bytes());
            assert_eq!(
                outcome(server.deliver_signed(&header, body.as_bytes()).await),
                "recorded",
                "{age} s old"
            );
        }
    }

    async fn every_secret_is_accepted_and_logged_by_label(server: TestServer) {
        let (body, now) = (|id: &str| paid(id, 100).to_string().into_bytes(), now_s());
        let with = |secrets: &[&str], body: &[u8]| {
            secrets.iter().fold(format!("t={now}"), |header, secret| {
                format!("{header},v1={}", v1(secret, now, body))
            })
        };
        let table: [(&str, &[&str], &str); 4] = [
            ("evt_1", &[SECRET], "live"),
            ("evt_2", &[OLD_SECRET], "old"),
            ("evt_3", &["whsec_of_a_stranger", OLD_SECRET], "old"),
            ("evt_4", &[OLD_SECRET, "whsec_of_a_stranger"], "old"),
        ];

        for (id, secrets, _) in table {
            assert_eq!(
                outcome(
                    server
                        .deliver_signed(&with(secrets, &body(id)), &body(id))
                        .await
                ),
                "recorded",
                "{secrets:?}"
            );
        }

        // While a secret is rolled, Stripe signs with both, so either label is correct.
        assert_eq!(
            outcome(
                server
                    .deliver_signed(&with(&[SECRET, OLD_SECRET], &body("evt_5")), &body("evt_5"))
                    .await
            ),
            "recorded"
        );

        let listed = server.run(&["events", "list", "--json"]).with_code(0);
        assert!(
            !listed.stdout.contains("whsec") && !listed.stdout.contains(SECRET),
            "{}",
            listed.stdout
        );

        let label = |id: &str| {
            listed
                .json_lines()
                .iter()
                .find(|e| e["id"] == id)
                .map(|e| e["secretLabel"].clone())
                .unwrap()
        };
        for (id, _, expected) in table {
            assert_eq!(label(id), expected, "{id}");
        }
    }

    async fn webhook_accepts_one_mebibyte_and_rejects_one_byte_more(server: TestServer) {
        let mut body = paid("evt_1", 100).to_string().into_bytes();
        body.resize(MIB + 1, b' ');
        let answer = server.deliver_bytes(&body).await.with_status(413).json();
        assert_eq!(answer["code"], "PayloadTooLarge");

        // The size limit applies before the signature check.
        server
            .deliver_signed("t=1,v1=00", &body)
            .await
            .with_status(413);
        let chunked = [
            head(&body, "Transfer-Encoding: chunked").as_bytes(),
            &in_chunks(&body, 64 * 1024),
        ]
        .concat();
        let answer = server.send_raw(&chunked).await;
        assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
        assert_eq!(listed(&server, &[]), [] as [Value; 0]);
        assert_eq!(
            outcome(server.deliver_bytes(&body[..MIB]).await),
            "recorded"
        );
    }

    async fn webhook_answers_other_methods_with_allow_header(server: TestServer) {
        for method in ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS"] {
            let answer = server
                .send(method, PATH, &[], Vec::new())
                .await
                .with_status(405);
            assert_eq!(answer.header("allow"), "POST", "{method}");
        }
    }

    async fn every_answer_carries_a_unique_request_id(server: TestServer) {
        let oversized = vec![b' '; MIB + 1];
        let answers = [
            server.deliver(&paid("evt_1", 100)).await.with_status(200),
            server.deliver(&paid("evt_1", 100)).await.with_status(200),
            server.deliver_bytes(b"no JSON").await.with_status(200),
            server
                .send(
                    "POST",
                    PATH,
                    &[("X-Request-Id", "chosen by the sender")],
                    Vec::new(),
                )
                .await
                .with_status(400),
            server
                .send("GET", PATH, &[], Vec::new())
                .await
                .with_status(405),
            server.deliver_bytes(&oversized).await.with_status(413),
            server
                .send("POST", "/webhooks/nobody", &[], Vec::new())
                .await
                .with_status(404),
        ];

        let ids: BTreeSet<&str> = answers
            .iter()
            .map(|answer| answer.header("x-request-id"))
            .collect();
        assert_eq!(ids.len(), answers.len(), "{ids:?}");
        assert!(
            !ids.contains("") && !ids.contains("chosen by the sender"),
            "{ids:?}"
        );
    }

    async fn chunked_body_is_accepted(server: TestServer) {
        let body = paid("evt_1", 100).to_string().into_bytes();
        let request = [
            head(&body, "Transfer-Encoding: chunked").as_bytes(),
            &in_chunks(&body, 7),
        ]
        .concat();
        let answer = server.send_raw(&request).await;
        assert!(
            answer.starts_with("HTTP/1.1 200 ") && answer.contains(r#""outcome":"recorded""#),
            "{answer}"
        );
        assert_eq!(listed(&server, &[]).len(), 1);
    }

    async fn truncated_body_is_neither_acknowledged_nor_stored(server: TestServer) {
        let body = paid("evt_1", 100).to_string().into_bytes();
        let (longer, chunks) = (
            format!("Content-Length: {}", body.len() + 1),
            in_chunks(&body, 7),
        );

        // The received part is authentic in itself; only the missing rest shows that the body is
        // truncated.
        let cut: [(&str, &[u8], &[u8]); 4] = [
            (&longer, &body, &body),
            (&longer, b"", b""),
            (
                "Transfer-Encoding: chunked",
                &chunks[..chunks.len() - b"0\r\n\r\n".len()],
                &body,
            ),
            ("Transfer-Encoding: chunked", &chunks[..3], b""),
        ];
        for (how, arrives, signed) in cut {
            let mut wire = Wire::connect(server.process.authority()).await;
            wire.write(&[head(signed, how).as_bytes(), arrives].concat())
                .await;
            wire.hang_up().await;
            // The connection may be closed already.
            let answer = wire.read_to_end().await;
            assert!(
                answer.is_empty() || answer.starts_with("HTTP/1.1 400 "),
                "{how}: {answer}"
            );
        }

        assert_eq!(listed(&server, &[]), [] as [Value; 0]);
        assert_eq!(outcome(server.deliver_bytes(&body).await), "recorded");
    }

    async fn shutdown_answers_deliveries_in_progress(server: TestServer) {
        let mut server = server;
        let body = |n: usize| paid(&format!("evt_{n}"), 100).to_string().into_bytes();
        let mut wires = Vec::new();
        for n in 0..40 {
            let mut wire = Wire::connect(server.process.authority()).await;
            let how = format!("Content-Length: {}\r\nExpect: 100-continue", body(n).len());
            wire.write(head(&body(n), &how).as_bytes()).await;
            // The server waits for the body, so the delivery is in progress.
            assert!(wire.read_head().await.starts_with("HTTP/1.1 100 "));
            wires.push(wire);
        }

        // Half of the bodies arrive just as the server is told to stop, the others after it stopped
        // accepting connections.
        let (racing, late) = wires.split_at_mut(20);
        join_all(
            racing
                .iter_mut()
                .enumerate()
                .map(async |(n, wire)| wire.write(&body(n)).await),
        )
        .await;
        server.process.terminate();
        while tokio::net::TcpStream::connect(server.process.authority())
            .await
            .is_ok()
        {}
        join_all(
            late.iter_mut()
                .enumerate()
                .map(async |(n, wire)| wire.write(&body(20 + n)).await),
        )
        .await;
        let answers = join_all(wires.iter_mut().map(Wire::read_to_end)).await;
        let mut acknowledged = BTreeSet::new();

        for (n, answer) in answers.iter().enumerate() {
            let refused = answer.starts_with("HTTP/1.1 503 ")
                && answer.to_lowercase().contains("\r\nretry-after: ");
            assert!(
                refused || n < 20 && answer.starts_with("HTTP/1.1 200 "),
                "{n}: {answer:?}"
            );
            if !refused {
                acknowledged.insert(format!("evt_{n}"));
            }
        }

        assert_eq!(server.process.exit_code(), Some(0));

        let kept: BTreeSet<String> = listed(&server, &[])
            .iter()
            .map(|e| e["id"].as_str().unwrap().to_owned())
            .collect();
        assert_eq!(kept, acknowledged);
    }

    async fn webhook_answers_503_while_store_cannot_write(server: TestServer) {
        server.store("a", "in_1").await.with_status(201);
        let lock = server.database.lock().await;
        let event = paid("evt_1", 1_769_850_000);
        let answer = server.deliver(&event).await.with_status(503);
        let seconds: u32 = answer.header("retry-after").parse().unwrap();

        assert!((1..=60).contains(&seconds), "{answer:?}");
        assert_eq!(answer.json()["code"], "Unavailable");
        assert!(server.history("a").await.is_empty());

        lock.release().await;
        assert_eq!(outcome(server.deliver(&event).await), "recorded");
        assert_eq!(listed(&server, &[]).len(), 1);
        assert_eq!(server.history("a").await, ["Paid 2026-01-31T09:00:00.000Z"]);
    }
}

fn in_chunks(body: &[u8], size: usize) -> Vec<u8> {
    let mut chunks = Vec::new();
    for chunk in body.chunks(size) {
        chunks.extend(format!("{:x}\r\n", chunk.len()).into_bytes());
        chunks.extend(chunk);
        chunks.extend(b"\r\n");
    }
    chunks.extend(b"0\r\n\r\n");
    chunks
}
