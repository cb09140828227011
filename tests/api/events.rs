//! `GET /v1/events` and `GET /v1/events/{id}`: received events, visible to the operator only.

use serde_json::{Value, json};

use testkit::each_database;
use testkit::{Answer, TestServer, fixtures, invoice_path};

async fn get(server: &TestServer, path: &str) -> Answer {
    server.get(path, &server.operator_key).await
}

/// Returns the items of all pages of a list.
async fn all(server: &TestServer, query: &str) -> Vec<Value> {
    let (mut items, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = get(server, &format!("/v1/events?{query}{cursor}"))
            .await
            .with_status(200)
            .json();
        items.extend(page["items"].as_array().unwrap().clone());
        match page["nextCursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => return items,
        }
    }
}

fn texts<'a>(items: &'a [Value], name: &str) -> Vec<&'a str> {
    items
        .iter()
        .map(|item| item[name].as_str().unwrap_or("-"))
        .collect()
}

/// Returns an event that names an invoice and asserts no fact.
fn sent(id: &str, invoice: &str) -> Value {
    json!({"id": id, "object": "event", "type": "invoice.sent", "created": 1_769_850_000, "api_version": "2025-11-17.clover",
        "data": {"object": {"id": invoice, "object": "invoice"}}})
}

fn charge(id: &str, names: Value) -> Value {
    let mut object = json!({"id": format!("ch_{id}"), "object": "charge", "status": "failed"});
    object
        .as_object_mut()
        .unwrap()
        .extend(names.as_object().unwrap().clone());
    json!({"id": id, "object": "event", "type": "charge.failed", "created": 1_769_850_000, "data": {"object": object}})
}

each_database! {
    async fn http_lists_events_like_the_command(server: TestServer) {
        for event in fixtures::events() {
            server.deliver(&event).await.with_status(200);
        }

        server
            .run_with_input(
                &["replay", "-"],
                sent("evt_replayed", "in_1").to_string().as_bytes(),
            )
            .with_code(0);
        server
            .deliver_bytes(b"authentic, and no JSON")
            .await
            .with_status(200);
        let listed = server
            .run(&["events", "list", "--json", "--limit", "1000"])
            .with_code(0)
            .json_lines();

        assert_eq!(listed.len(), fixtures::events().len() + 2);

        for limit in [1, 3, listed.len(), 500] {
            assert_eq!(
                all(&server, &format!("limit={limit}")).await,
                listed,
                "by {limit}"
            );
        }

        let unreadable = &all(&server, "outcome=unreadable").await[0];
        assert_eq!(
            (&unreadable["id"], &unreadable["secretLabel"]),
            (&Value::Null, &json!("live"))
        );
        assert!(
            unreadable["unreadableReason"]
                .as_str()
                .unwrap()
                .contains("not JSON"),
            "{unreadable}"
        );
        assert_eq!(
            texts(&all(&server, "type=invoice.payment_failed").await, "type"),
            ["invoice.payment_failed"; 2]
        );

        let stripe_invoice_id = fixtures::story_invoice().0["status"]["stripeInvoiceId"]
            .as_str()
            .unwrap()
            .to_owned();
        let paid = all(
            &server,
            &format!("invoice={stripe_invoice_id}&type=invoice.paid&outcome=recorded&limit=1"),
        )
        .await;
        assert_eq!(
            (texts(&paid, "type"), texts(&paid, "outcome")),
            (vec!["invoice.paid"], vec!["recorded"])
        );

        let replayed = all(&server, "type=invoice.sent").await;
        assert_eq!(
            (
                texts(&replayed, "source"),
                texts(&replayed, "secretLabel"),
                texts(&replayed, "outcome")
            ),
            (vec!["replay"], vec!["-"], vec!["no_payment_fact"])
        );
        assert!(
            all(&server, "invoice=in_unknown").await.is_empty()
                && all(&server, "type=%25").await.is_empty()
        );

        let answer = get(&server, "/v1/events").await;
        assert_eq!(
            (
                answer.header("content-type"),
                answer.header("cache-control")
            ),
            ("application/json", "private, no-cache")
        );
        assert!(
            server
                .send(
                    "HEAD",
                    "/v1/events",
                    &[("ApiKey", &server.operator_key)],
                    vec![]
                )
                .await
                .with_status(200)
                .body
                .is_empty()
        );
    }

    async fn unmatched_event_is_listed_until_invoice_is_stored(server: TestServer) {
        server.store("stored", "in_stored").await.with_status(201);
        let deliveries = [
            sent("evt_1", "in_nobody"),
            sent("evt_2", "in_stored"),
            charge("evt_3", json!({"invoice": "in_nobody"})),
            charge("evt_4", json!({})),
            charge("evt_5", json!({"invoice": "in_stored"})),
            json!({"id": "evt_6", "object": "event", "type": "customer.updated", "created": 1, "data": {"object": {}}}),
        ];
        for delivery in &deliveries {
            server.deliver(delivery).await.with_status(200);
        }

        server.deliver_bytes(b"no event").await.with_status(200);
        for limit in [1, 2, 50] {
            assert_eq!(
                texts(
                    &all(&server, &format!("outcome=unmatched&limit={limit}")).await,
                    "id"
                ),
                ["evt_3", "evt_1"],
                "by {limit}"
            );
        }

        assert_eq!(
            texts(
                &all(&server, "outcome=unmatched&type=charge.failed").await,
                "id"
            ),
            ["evt_3"]
        );
        assert!(
            all(&server, "outcome=unmatched&invoice=in_stored")
                .await
                .is_empty()
        );

        let listed = server
            .run(&["events", "list", "--outcome", "unmatched", "--json"])
            .with_code(0)
            .json_lines();
        assert_eq!(texts(&listed, "id"), ["evt_3", "evt_1"]);

        server.store("late", "in_nobody").await.with_status(201);
        assert!(
            all(&server, "outcome=unmatched").await.is_empty(),
            "the moment that it is stored"
        );
    }

    async fn unmatched_event_is_found_behind_many_later_events(server: TestServer) {
        server.store("stored", "in_stored").await.with_status(201);
        let lines: Vec<String> = (0..3_000)
            .map(|n| {
                sent(
                    &format!("evt_{n}"),
                    if n == 7 { "in_nobody" } else { "in_stored" },
                )
                .to_string()
            })
            .collect();

        server
            .run_with_input(&["replay", "-"], lines.join("\n").as_bytes())
            .with_code(0);
        assert_eq!(
            texts(&all(&server, "outcome=unmatched&limit=500").await, "id"),
            ["evt_7"]
        );
    }

    async fn every_rendering_of_an_event_is_shown_byte_for_byte(server: TestServer) {
        let odd = r#"{ "id":"evt_1", "object":"event","type":"invoice.sent", "created":1769850000 ,"a":1.50,"a":1e2,"big":123456789012345678901234567890,
            "text":"\u00e9 \/ 日本","data":{"object":{"id":"in_1","object":"invoice"}}}"#;
        server.deliver_bytes(odd.as_bytes()).await.with_status(200);
        server
            .deliver(&sent("evt_1", "in_1"))
            .await
            .with_status(200);
        let answer = get(&server, "/v1/events/evt_1").await.with_status(200);
        let items = answer.json()["items"].as_array().unwrap().clone();

        assert!(
            String::from_utf8_lossy(&answer.body).contains(odd),
            "as it was received: {answer:?}"
        );

        let other = items
            .iter()
            .find(|item| item["apiVersion"] == "2025-11-17.clover")
            .unwrap();
        assert_eq!((items.len(), &other["body"]), (2, &sent("evt_1", "in_1")));
        assert_eq!(texts(&items, "bodyForm"), ["json"; 2]);

        let shown = server
            .run(&["events", "show", "evt_1", "--json"])
            .with_code(0)
            .json();
        assert_eq!(json!(items), shown);

        let mut listed = all(&server, "").await;
        listed.reverse();
        for (item, listed) in items.iter().zip(&listed) {
            let metadata = item
                .as_object()
                .unwrap()
                .iter()
                .filter(|(name, _)| !name.starts_with("body"));
            assert_eq!(
                metadata
                    .map(|(name, value)| (name.clone(), value.clone()))
                    .collect::<Value>(),
                *listed
            );
            let by_key = get(
                &server,
                &format!("/v1/events/{}", listed["key"].as_str().unwrap()),
            )
            .await
            .with_status(200)
            .json();
            assert_eq!(
                by_key["items"],
                json!([item]),
                "by its key, this rendering alone"
            );
        }

        get(&server, "/v1/events/evt_2")
            .await
            .with_error(404, "ResourceNotFound");
    }

    async fn unreadable_body_is_shown_by_its_event_key(server: TestServer) {
        for body in [
            &b"no JSON \"\\"[..],
            b"[1, 2]",
            b"\xff\x00\xfe",
            b"{\"id\": \"evt_1\", ",
        ] {
            server.deliver_bytes(body).await.with_status(200);
        }

        let mut shown = Vec::new();
        for listed in all(&server, "outcome=unreadable").await.iter().rev() {
            let key = listed["key"].as_str().unwrap();
            let items = get(&server, &format!("/v1/events/{key}"))
                .await
                .with_status(200)
                .json()["items"]
                .clone();
            shown.push((
                items[0]["bodyForm"].as_str().unwrap().to_owned(),
                items[0]["body"].to_string(),
            ));
            assert_eq!(
                server
                    .run(&["events", "show", key, "--json"])
                    .with_code(0)
                    .json(),
                items
            );
            let table = server
                .run(&["events", "list", "--outcome", "unreadable"])
                .with_code(0)
                .stdout;
            assert!(
                table.contains(key) && table.contains("unreadable: the body is not JSON"),
                "{table}"
            );
        }

        assert!(
            server
                .process
                .log()
                .contains("delivery stored as unreadable")
        );

        shown.sort();
        let expected = [
            ("hex", json!("ff00fe")),
            ("json", json!([1, 2])),
            ("text", json!("no JSON \"\\")),
            ("text", json!("{\"id\": \"evt_1\", ")),
        ];
        assert_eq!(
            shown,
            expected.map(|(form, body)| (form.to_owned(), body.to_string()))
        );

        get(&server, &format!("/v1/events/{}", "0".repeat(64)))
            .await
            .with_error(404, "ResourceNotFound");
    }

    async fn pruned_body_is_reported_as_pruned(server: TestServer) {
        server
            .deliver(&sent("evt_1", "in_1"))
            .await
            .with_status(200);
        while server
            .run(&["events", "prune", "--older-than", "1s", "--json"])
            .with_code(0)
            .json()
            != json!({"forgotten": 1})
        {}
        let item = &get(&server, "/v1/events/evt_1")
            .await
            .with_status(200)
            .json()["items"][0];
        assert_eq!(
            (&item["bodyForm"], &item["body"], &item["id"]),
            (&json!("pruned"), &Value::Null, &json!("evt_1"))
        );
        assert!(
            server
                .run(&["events", "show", "evt_1"])
                .with_code(0)
                .stdout
                .contains("its bytes are pruned")
        );
    }

    async fn events_that_share_an_id_come_in_bounded_pages(server: TestServer) {
        let large = |n: usize| {
            let mut event = sent("evt_00000000000000", &format!("in_{n:03}"));
            event["padding"] = "x".repeat(if n < 12 { 900_000 } else { 10 }).into();
            event
        };
        let count = 130;
        for n in 0..count {
            server.deliver(&large(n)).await.with_status(200);
        }

        let (mut found, mut cursor, mut pages) = (Vec::new(), String::new(), 0);
        loop {
            let answer = get(&server, &format!("/v1/events/evt_00000000000000{cursor}"))
                .await
                .with_status(200);
            assert!(answer.body.len() < 8 << 20, "{}", answer.body.len());
            let page = answer.json();
            let items = page["items"].as_array().unwrap();
            assert!(items.len() <= 100);
            found.extend(
                items
                    .iter()
                    .map(|item| item["objectId"].as_str().unwrap().to_owned()),
            );
            pages += 1;
            match page["nextCursor"].as_str() {
                Some(next) => cursor = format!("?cursor={next}"),
                None => break,
            }
        }

        // Within a millisecond, events are ordered by their keys.
        found.sort();
        assert_eq!(
            found,
            (0..count).map(|n| format!("in_{n:03}")).collect::<Vec<_>>()
        );
        assert!((3..=5).contains(&pages), "{pages}");

        let shown = server
            .run(&["events", "show", "evt_00000000000000", "--json"])
            .with_code(0)
            .json();
        assert_eq!(shown.as_array().unwrap().len(), count);
    }

    async fn only_operator_reads_received_events(server: TestServer) {
        server.store("a", "in_1").await.with_status(201);
        server
            .deliver(&sent("evt_1", "in_1"))
            .await
            .with_status(200);

        for path in [
            "/v1/events",
            "/v1/events/evt_1",
            "/v1/events/evt_unknown",
            "/v1/events/",
            "/v1/events?limit=0",
            "/v1/events/%00",
        ] {
            server
                .get(path, &server.acme_key)
                .await
                .with_error(403, "Forbidden");
            server
                .get(path, "wrong")
                .await
                .with_error(401, "Unauthorized");
            server
                .send("GET", path, &[], vec![])
                .await
                .with_error(401, "Unauthorized");
        }

        assert_eq!(
            server
                .get(&invoice_path("a"), &server.acme_key)
                .await
                .status,
            200
        );
    }

    async fn invalid_event_query_is_rejected(server: TestServer) {
        let long = "x".repeat(256);
        let wrong = [
            "limit=0",
            "limit=501",
            "limit=-1",
            "limit=x",
            "limit=",
            "outcome=duplicate",
            "outcome=",
            "outcome=Recorded",
            "type=",
            "invoice=",
            "cursor=",
            "cursor=x",
            "cursor=00",
            "limit=1&limit=2",
            "type=a%00b",
            "invoice=%0a",
            &format!("type={long}"),
            &format!("cursor={long}"),
        ];

        for query in wrong {
            get(&server, &format!("/v1/events?{query}"))
                .await
                .with_error(400, "InvalidQuery");
        }

        get(&server, "/v1/events/evt_1?cursor=x")
            .await
            .with_error(400, "InvalidQuery");
        for id in ["", "%00", "%ff", "a%0Ab", &long] {
            get(&server, &format!("/v1/events/{id}"))
                .await
                .with_error(400, "InvalidPath");
        }

        for path in ["/v1/events", "/v1/events/evt_1"] {
            let answer = server
                .send("POST", path, &[("ApiKey", &server.operator_key)], vec![])
                .await
                .with_error(405, "MethodNotAllowed");
            assert_eq!(answer.header("allow"), "GET,HEAD");
        }
    }
}
