//! The operator's calls for invoices: storing, replacing and listing.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::future::join_all;
use serde_json::{Value, json};
use stripe_reconciler::clock::Clock;

use testkit::each_database;
use testkit::{Answer, TestServer, invoice_path};

const LIST: &str = "/v1/tenants/acme/invoices";

/// Returns a snapshot event of Stripe invoice `in_1`, `second` seconds after 2026-01-31T09:00:00Z.
fn snapshot_event(event_type: &str, second: i64, fields: Value) -> Value {
    let mut object = json!({"id": "in_1", "object": "invoice", "currency": "usd", "amount_due": 5000, "amount_remaining": 5000});
    object
        .as_object_mut()
        .unwrap()
        .extend(fields.as_object().unwrap().clone());
    json!({"id": format!("evt_{event_type}_{second}"), "object": "event", "type": event_type, "created": 1_769_850_000 + second, "data": {"object": object}})
}

fn finalized(second: i64) -> Value {
    snapshot_event("invoice.finalized", second, json!({"status": "open"}))
}

fn paid(second: i64) -> Value {
    snapshot_event(
        "invoice.paid",
        second,
        json!({"status": "paid", "amount_paid": 5000, "amount_remaining": 0}),
    )
}

/// Returns the paths of the errors in order, after asserting that each has a reason.
#[track_caller]
fn fault_places(answer: &Answer) -> Vec<String> {
    let faults = answer.json()["details"]["faults"]
        .as_array()
        .unwrap()
        .clone();

    let field_path = |fault: &Value| {
        assert!(
            fault["reason"]
                .as_str()
                .is_some_and(|reason| !reason.is_empty()),
            "{fault}"
        );
        fault["pointer"].as_str().unwrap().to_owned()
    };
    faults.iter().map(field_path).collect()
}

/// Puts a document as the operator under a precondition.
async fn put_if(
    server: &TestServer,
    uid: &str,
    condition: (&str, &str),
    document: &Value,
) -> Answer {
    let headers = [("ApiKey", server.operator_key.as_str()), condition];
    server
        .send(
            "PUT",
            &invoice_path(uid),
            &headers,
            document.to_string().into_bytes(),
        )
        .await
}

fn uids(page: &Value) -> Vec<String> {
    page["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|item| item["metadata"]["uid"].as_str().unwrap().to_owned())
        .collect()
}

/// Returns the uids on each page of a list.
async fn pages(server: &TestServer, query: &str) -> Vec<Vec<String>> {
    let (mut pages, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = server
            .get(&format!("{LIST}?{query}{cursor}"), &server.acme_key)
            .await
            .with_status(200)
            .json();
        pages.push(uids(&page));
        match page["nextCursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => return pages,
        }
        assert!(pages.len() < 1000, "the pages come to an end");
    }
}

/// Waits for the next millisecond.
async fn next_millisecond() {
    let now_ms = Clock::system().now_ms();
    while Clock::system().now_ms() == now_ms {
        tokio::task::yield_now().await;
    }
}

/// Stores these invoices of tenant `acme` in the same millisecond.
fn import(server: &TestServer, uids: &[&str]) {
    let lines: Vec<String> = uids
        .iter()
        .map(|uid| json!({"metadata": {"uid": uid}}).to_string())
        .collect();
    server
        .run_with_input(
            &["invoices", "import", "--tenant", "acme", "-"],
            lines.join("\n").as_bytes(),
        )
        .with_code(0);
}

each_database! {
    async fn storing_answers_201_and_replacing_200_like_a_read(server: TestServer) {
        for (status, name) in [(201, "first"), (200, "second"), (200, "second")] {
            let put = server
                .put(
                    &invoice_path("a"),
                    &json!({"metadata": {"name": name}, "odd": {"x": null}}),
                )
                .await
                .with_status(status);
            let read = server
                .get(&invoice_path("a"), &server.acme_key)
                .await
                .with_status(200);
            assert_eq!(put.invoice(), read.invoice());
            assert_eq!(
                put.invoice(),
                json!({"metadata": {"name": name}, "odd": {"x": null}, "status": {"states": []}})
            );
            assert_eq!(put.header("etag"), read.header("etag"));
        }

        // The same uid of another tenant is another invoice.
        server
            .put("/v1/tenants/beta/invoices/a", &json!({}))
            .await
            .with_status(201);
    }

    async fn invalid_document_is_rejected_with_path_of_every_fault(server: TestServer) {
        let paid_at = |time: &str| json!({"state": "Paid", "timestamp": time});
        let faulty: Vec<(Value, Vec<&str>)> = vec![
            (json!(null), vec![""]),
            (json!([{}]), vec![""]),
            (json!({"metadata": {"uid": "b"}}), vec!["/metadata/uid"]),
            (json!({"metadata": {"uid": ""}}), vec!["/metadata/uid"]),
            (json!({"metadata": {"uid": 1}}), vec!["/metadata/uid"]),
            (json!({"metadata": []}), vec!["/metadata"]),
            (
                json!({"metadata": {"labels": {"a/b~c": 1, "d": null}, "annotations": "x"}}),
                vec![
                    "/metadata/annotations",
                    "/metadata/labels/a~1b~0c",
                    "/metadata/labels/d",
                ],
            ),
            (
                json!({"spec": {"month": "2026-01-31", "envType": 1, "paymentUnit": "eur"}}),
                vec!["/spec/envType", "/spec/month", "/spec/paymentUnit"],
            ),
            (
                json!({"spec": {"credits": {"alloyFreeCredits": 1.5, "pureFreeCredits": 1e19}}}),
                vec![
                    "/spec/credits/alloyFreeCredits",
                    "/spec/credits/pureFreeCredits",
                ],
            ),
            (
                json!({"spec": {"plan": {"plantype": "Free", "freeCredits": [null, {"planCredit": {}}], "slaCredits": {}}}}),
                vec![
                    "/spec/plan/freeCredits/0",
                    "/spec/plan/freeCredits/1/planCredit/type",
                    "/spec/plan/plantype",
                    "/spec/plan/slaCredits",
                ],
            ),
            (
                json!({"status": {"productInvoice": {"pure": {"overageLimitPercentage": 128, "amount": "1"}}}}),
                vec![
                    "/status/productInvoice/pure/amount",
                    "/status/productInvoice/pure/overageLimitPercentage",
                ],
            ),
            (
                json!({"status": {"projects": [{}, {"usage": {"alloy": {"tierPrice": true}}}]}}),
                vec!["/status/projects/1/usage/alloy/tierPrice"],
            ),
            (
                json!({"status": {"stripeInvoiceId": ""}}),
                vec!["/status/stripeInvoiceId"],
            ),
            (
                json!({"status": {"stripeInvoiceId": "x".repeat(256)}}),
                vec!["/status/stripeInvoiceId"],
            ),
            (
                json!({"status": {"stripeInvoiceId": "in_\u{0}"}}),
                vec!["/status/stripeInvoiceId"],
            ),
            (
                json!({"status": {"states": [{}]}}),
                vec!["/status/states/0/state", "/status/states/0/timestamp"],
            ),
            (
                json!({"status": {"states": [{"state": "paid", "timestamp": "2026-01-31T09:00:00Z"}, "Paid"]}}),
                vec!["/status/states/0/state", "/status/states/1"],
            ),
            (
                json!({"status": {"states": [{"state": "Paid", "timestamp": "yesterday"}]}}),
                vec!["/status/states/0/timestamp"],
            ),
            (
                json!({"status": {"states": [paid_at("2026-01-31T09:00:00Z"), paid_at("2026-01-31T10:00:00.0009+01:00"), paid_at("2026-01-31T09:00:00Z")]}}),
                vec!["/status/states/1", "/status/states/2"],
            ),
            // If this is the first field, serde_json reads it as the text of another document.
            (
                json!({"spec": {"address": null, "$serde_json::private::RawValue": "["}}),
                vec!["/spec/$serde_json::private::RawValue"],
            ),
            // Errors of one kind do not hide those of another.
            (
                json!({"metadata": {"uid": "b", "name": 1}, "status": {"billableAmount": "1", "states": [paid_at("2026-01-31T09:00:00Z"), paid_at("2026-01-31T09:00:00Z")]}}),
                vec![
                    "/metadata/name",
                    "/metadata/uid",
                    "/status/billableAmount",
                    "/status/states/1",
                ],
            ),
        ];

        for (document, field_paths) in faulty {
            let answer = server
                .put(&invoice_path("a"), &document)
                .await
                .with_error(400, "InvalidInvoice");
            let mut found = fault_places(&answer);
            found.sort();
            assert_eq!(found, field_paths, "{document}");
        }

        for body in [
            "",
            "{",
            "{}x",
            "nul",
            "\u{feff}{}",
            "{\"a\": \"\\ud800\"}",
            "{\"a\": 1e999}",
        ] {
            let answer = server
                .send(
                    "PUT",
                    &invoice_path("a"),
                    &[("ApiKey", &server.operator_key)],
                    body.into(),
                )
                .await;
            assert_eq!(
                fault_places(&answer.with_error(400, "InvalidInvoice")),
                [""],
                "{body}"
            );
        }

        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000)).into_bytes();
        for body in [deep, b"{\"a\": \"\xff\"}".to_vec()] {
            let answer = server
                .send(
                    "PUT",
                    &invoice_path("a"),
                    &[("ApiKey", &server.operator_key)],
                    body,
                )
                .await;
            answer.with_error(400, "InvalidInvoice");
        }

        server
            .get(&invoice_path("a"), &server.operator_key)
            .await
            .with_error(404, "ResourceNotFound");
    }

    async fn put_accepts_one_mebibyte_and_rejects_one_byte_more(server: TestServer) {
        let with_length =
            |length: usize| format!("{{\"x\":\"{}\"}}", "y".repeat(length - 8)).into_bytes();
        let key = [("ApiKey", server.operator_key.as_str())];
        server
            .send("PUT", &invoice_path("a"), &key, with_length(1 << 20))
            .await
            .with_status(201);
        server
            .send("PUT", &invoice_path("b"), &key, with_length((1 << 20) + 1))
            .await
            .with_error(413, "PayloadTooLarge");

        server
            .get(&invoice_path("b"), &server.operator_key)
            .await
            .with_error(404, "ResourceNotFound");
    }

    async fn only_operator_stores_invoices(server: TestServer) {
        let put = async |path: &str, key: &str| {
            server
                .send("PUT", path, &[("ApiKey", key)], b"{}".to_vec())
                .await
        };
        put(&invoice_path("a"), "wrong")
            .await
            .with_error(401, "Unauthorized");
        put(&invoice_path("a"), &server.acme_key)
            .await
            .with_error(403, "Forbidden");
        put("/v1/tenants/beta/invoices/a", &server.acme_key)
            .await
            .with_error(404, "ResourceNotFound");

        for path in [&invoice_path("a"), "/v1/tenants/beta/invoices/a"] {
            server
                .get(path, &server.operator_key)
                .await
                .with_error(404, "ResourceNotFound");
        }
    }

    async fn stripe_invoice_belongs_to_one_invoice_permanently(server: TestServer) {
        server.store("a", "in_1").await.with_status(201);
        server
            .store("b", "in_1")
            .await
            .with_error(409, "StripeInvoiceTaken");
        let of_beta = json!({"status": {"stripeInvoiceId": "in_1"}});

        server
            .put("/v1/tenants/beta/invoices/a", &of_beta)
            .await
            .with_error(409, "StripeInvoiceTaken");
        server
            .store("a", "in_2")
            .await
            .with_error(409, "StripeInvoiceFixed");

        for path in [&invoice_path("b"), "/v1/tenants/beta/invoices/a"] {
            server
                .get(path, &server.operator_key)
                .await
                .with_error(404, "ResourceNotFound");
        }

        for keeps_it in [
            json!({}),
            json!({"status": null}),
            json!({"status": {"stripeInvoiceId": null, "billableAmount": 1}}),
            of_beta,
        ] {
            let answer = server
                .put(&invoice_path("a"), &keeps_it)
                .await
                .with_status(200)
                .invoice();
            assert_eq!(answer["status"]["stripeInvoiceId"], "in_1", "{keeps_it}");
        }

        // An invoice without a Stripe invoice may get one later, permanently.
        server
            .put(&invoice_path("b"), &json!({}))
            .await
            .with_status(201);
        server
            .store("b", "in_1")
            .await
            .with_error(409, "StripeInvoiceTaken");
        server.store("b", "in_2").await.with_status(200);
        server
            .store("b", "in_3")
            .await
            .with_error(409, "StripeInvoiceFixed");

        server.store("c", "in_3").await.with_status(201);
    }

    async fn precondition_controls_replacement(server: TestServer) {
        let document = |name: &str| json!({"metadata": {"name": name}});
        put_if(&server, "a", ("If-Match", "*"), &document("x"))
            .await
            .with_error(412, "PreconditionFailed");
        put_if(&server, "a", ("If-Match", "\"x\""), &document("x"))
            .await
            .with_error(412, "PreconditionFailed");
        let first = put_if(&server, "a", ("If-None-Match", "*"), &document("first"))
            .await
            .with_status(201)
            .header("etag")
            .to_owned();

        put_if(&server, "a", ("If-None-Match", "*"), &document("x"))
            .await
            .with_error(412, "PreconditionFailed");
        let second = put_if(&server, "a", ("If-Match", &first), &document("second"))
            .await
            .with_status(200)
            .header("etag")
            .to_owned();
        assert_ne!(first, second);

        for stale in [
            first.clone(),
            "\"\"".to_owned(),
            String::new(),
            format!("{first}, \"x\""),
        ] {
            put_if(&server, "a", ("If-Match", &stale), &document("x"))
                .await
                .with_error(412, "PreconditionFailed");
        }

        assert_eq!(
            server
                .get(&invoice_path("a"), &server.acme_key)
                .await
                .json()["metadata"]["name"],
            "second"
        );

        put_if(
            &server,
            "a",
            ("If-Match", &format!("\"x\", {second}")),
            &document("third"),
        )
        .await
        .with_status(200);

        put_if(&server, "a", ("If-Match", "*"), &document("fourth"))
            .await
            .with_status(200);
    }
}

each_database! {
    async fn imported_states_count_only_in_first_document(server: TestServer) {
        let with_states =
            |states: Value| json!({"status": {"stripeInvoiceId": "in_1", "states": states}});
        let states = json!([
            {"state": "PaymentFailed", "timestamp": "2026-02-01T00:00:00.9999999Z", "paymentMsg": "Declined."},
            {"state": "PaymentPending", "timestamp": "2026-01-31T20:00:00-05:00"},
            {"state": "PaymentPending", "timestamp": "2026-02-01t01:00:00.001z", "paymentMsg": ""}]);
        let in_normal_form = json!([
            {"state": "PaymentFailed", "timestamp": "2026-02-01T00:00:00.999Z", "paymentMsg": "Declined."},
            {"state": "PaymentPending", "timestamp": "2026-02-01T01:00:00.000Z"},
            {"state": "PaymentPending", "timestamp": "2026-02-01T01:00:00.001Z", "paymentMsg": ""}]);
        let stored = server
            .put(&invoice_path("a"), &with_states(states))
            .await
            .with_status(201)
            .invoice();

        assert_eq!(stored["status"]["states"], in_normal_form);

        let other = json!([{"state": "Paid", "timestamp": "2026-01-01T00:00:00Z"}]);
        for replacement in [with_states(other), with_states(json!([])), json!({})] {
            let replaced = server
                .put(&invoice_path("a"), &replacement)
                .await
                .with_status(200)
                .invoice();
            assert_eq!(replaced["status"]["states"], in_normal_form);
        }

        let faulty = with_states(json!([{"state": "Paid"}]));
        server
            .put(&invoice_path("a"), &faulty)
            .await
            .with_error(400, "InvalidInvoice");

        // Imported states come first, whatever their times.
        server.deliver(&finalized(0)).await.with_status(200);
        assert_eq!(
            server.history("a").await,
            [
                "PaymentFailed 2026-02-01T00:00:00.999Z",
                "PaymentPending 2026-02-01T01:00:00.000Z",
                "PaymentPending 2026-02-01T01:00:00.001Z",
                "PaymentPending 2026-01-31T09:00:00.000Z"
            ]
        );
    }

    async fn imported_payment_hides_earlier_due_and_repeats_no_entry(server: TestServer) {
        server.deliver(&finalized(0)).await.with_status(200);
        server.deliver(&paid(60)).await.with_status(200);
        let note = json!({"id": "evt_note", "object": "event", "type": "credit_note.created", "created": 1_769_850_120, "data": {"object":
            {"id": "cn_1", "object": "credit_note", "invoice": "in_1", "amount": 1000, "currency": "usd", "status": "issued", "type": "post_payment",
             "created": 1_769_850_120}}});
        server.deliver(&note).await.with_status(200);
        let document = json!({"status": {"stripeInvoiceId": "in_1", "states": [
            {"state": "Paid", "timestamp": "2026-01-31T10:01:00.0001+01:00", "paymentMsg": "By wire."}]}});

        server
            .put(&invoice_path("a"), &document)
            .await
            .with_status(201);
        let states = server.states("a").await;
        assert_eq!(
            states[0],
            json!({"state": "Paid", "timestamp": "2026-01-31T09:01:00.000Z", "paymentMsg": "By wire."})
        );
        assert_eq!(
            server.history("a").await,
            [
                "Paid 2026-01-31T09:01:00.000Z",
                "Paid 2026-01-31T09:02:00.000Z"
            ],
            "{states}"
        );
    }

    async fn payment_at_another_time_than_imported_adds_an_entry(server: TestServer) {
        let document = |states| json!({"status": {"stripeInvoiceId": "in_1", "states": states}});
        let states = json!([{"state": "Paid", "timestamp": "2026-01-31T09:00:59.999Z"}]);
        server
            .put(&invoice_path("a"), &document(states))
            .await
            .with_status(201);
        server.deliver(&finalized(0)).await.with_status(200);
        server.deliver(&paid(60)).await.with_status(200);

        assert_eq!(
            server.history("a").await,
            [
                "Paid 2026-01-31T09:00:59.999Z",
                "Paid 2026-01-31T09:01:00.000Z"
            ]
        );
    }

    async fn replacement_keeps_every_payment_state(server: TestServer) {
        server.store("a", "in_1").await.with_status(201);
        server.deliver(&finalized(0)).await.with_status(200);
        server.deliver(&paid(60)).await.with_status(200);
        let states = server.states("a").await;

        assert_eq!(states.as_array().unwrap().len(), 2);

        for replacement in [
            json!({}),
            json!({"status": {"states": []}}),
            json!({"status": {"states": [{"state": "PaymentFailed", "timestamp": "2026-01-01T00:00:00Z"}]}}),
        ] {
            let replaced = server
                .put(&invoice_path("a"), &replacement)
                .await
                .with_status(200)
                .invoice();
            assert_eq!(
                (&replaced["status"]["states"], &server.states("a").await),
                (&states, &states),
                "{replacement}"
            );
        }
    }

    async fn concurrent_puts_create_an_invoice_once(server: TestServer) {
        let documents: Vec<Value> = (0..24)
            .map(|number| json!({"metadata": {"name": number.to_string()}}))
            .collect();
        let count =
            |puts: &[Answer], status: u16| puts.iter().filter(|put| put.status == status).count();
        let puts = join_all(
            documents[..12]
                .iter()
                .map(|document| put_if(&server, "a", ("Accept", "*/*"), document)),
        )
        .await;
        assert_eq!((count(&puts, 201), count(&puts, 200)), (1, 11), "{puts:?}");

        // Each replaces what it read: after the first, the others are outdated.
        let tag = server
            .get(&invoice_path("a"), &server.acme_key)
            .await
            .header("etag")
            .to_owned();
        let puts = join_all(
            documents[12..]
                .iter()
                .map(|document| put_if(&server, "a", ("If-Match", &tag), document)),
        )
        .await;
        assert_eq!((count(&puts, 200), count(&puts, 412)), (1, 11), "{puts:?}");

        let current = server
            .get(&invoice_path("a"), &server.acme_key)
            .await
            .invoice();
        assert_eq!(
            puts.iter().find(|put| put.status == 200).unwrap().invoice(),
            current
        );

        let puts = join_all(
            documents[..12]
                .iter()
                .map(|document| put_if(&server, "b", ("If-None-Match", "*"), document)),
        )
        .await;
        assert_eq!((count(&puts, 201), count(&puts, 412)), (1, 11), "{puts:?}");
    }

    async fn concurrent_claims_of_stripe_invoice_have_one_winner(server: TestServer) {
        for round in 0..10 {
            let stripe_invoice_id = format!("in_{round}");
            let uids = ["a", "b", "c"].map(|letter| format!("{letter}{round}"));
            let puts = join_all(uids.iter().map(|uid| server.store(uid, &stripe_invoice_id))).await;
            let mut statuses: Vec<u16> = puts.iter().map(|put| put.status.as_u16()).collect();
            statuses.sort_unstable();
            assert_eq!(statuses, [201, 409, 409]);
            for put in puts.into_iter().filter(|put| put.status == 409) {
                put.with_error(409, "StripeInvoiceTaken");
            }
            let found = server
                .get(
                    &format!("{LIST}?stripeInvoiceId={stripe_invoice_id}"),
                    &server.acme_key,
                )
                .await
                .json();
            assert_eq!(found["items"].as_array().unwrap().len(), 1);
        }
    }
}

each_database! {
    async fn list_orders_by_first_storing_then_uid_newest_first(server: TestServer) {
        import(&server, &["b", "é", "a", "B", "a0"]);
        next_millisecond().await;
        import(&server, &["z", "c"]);
        let order = ["c", "z", "B", "a", "a0", "b", "é"];
        let page = server.get(LIST, &server.acme_key).await.with_status(200);

        assert_eq!(uids(&page.json()), order);
        assert!(page.json().get("nextCursor").is_none());

        next_millisecond().await;
        // Replacing an invoice does not make it new.
        server
            .put(
                &invoice_path("a"),
                &json!({"metadata": {"uid": "a", "name": "replaced"}}),
            )
            .await
            .with_status(200);

        for limit in [1, 2, 3, 7, 500] {
            let pages = pages(&server, &format!("limit={limit}")).await;
            assert!(pages.iter().all(|page| page.len() <= limit), "{pages:?}");
            assert_eq!(pages.concat(), order, "limit {limit}");
        }

        for item in page.json()["items"].as_array().unwrap() {
            let read = server
                .get(
                    &invoice_path(
                        &item["metadata"]["uid"]
                            .as_str()
                            .unwrap()
                            .replace('é', "%C3%A9"),
                    ),
                    &server.acme_key,
                )
                .await;
            assert_eq!(
                read.with_status(200).invoice()["metadata"]["uid"],
                item["metadata"]["uid"]
            );
        }
    }

    async fn pages_show_each_invoice_once_during_inserts(server: TestServer) {
        let there: Vec<String> = (0..30).map(|number| format!("old-{number:02}")).collect();
        import(
            &server,
            &there.iter().map(String::as_str).collect::<Vec<_>>(),
        );
        let (mut seen, mut cursor, mut added) = (Vec::new(), String::new(), 0_usize);

        loop {
            let page = server
                .get(&format!("{LIST}?limit=4{cursor}"), &server.acme_key)
                .await
                .with_status(200)
                .json();
            seen.extend(uids(&page));
            let Some(next) = page["nextCursor"].as_str() else {
                break;
            };
            cursor = format!("&cursor={next}");
            for number in added..added + 3 {
                let uid = format!(
                    "{}-{number}",
                    if number.is_multiple_of(2) {
                        "aaa"
                    } else {
                        "zzz"
                    }
                );
                server
                    .put(&invoice_path(&uid), &json!({"metadata": {"uid": uid}}))
                    .await
                    .with_status(201);
            }
            added += 3;
        }

        let (old, new): (Vec<String>, Vec<String>) =
            seen.into_iter().partition(|uid| uid.starts_with("old"));
        assert_eq!(old, there);
        assert_eq!(
            new.iter().collect::<BTreeSet<_>>().len(),
            new.len(),
            "{new:?}"
        );
        assert_eq!(pages(&server, "limit=500").await[0].len(), 30 + added);
    }

    async fn list_filters_by_state_and_stripe_invoice(server: TestServer) {
        let states = [
            ("paid-1", "Paid"),
            ("failed", "PaymentFailed"),
            ("pending", "PaymentPending"),
            ("moving", "PaymentInProgress"),
            ("paid-2", "Paid"),
        ];
        for (uid, state) in states {
            let states = json!([{"state": "PaymentPending", "timestamp": "2026-01-01T00:00:00Z"}, {"state": state, "timestamp": "2026-01-02T00:00:00Z"}]);
            let document = json!({"metadata": {"uid": uid}, "status": {"stripeInvoiceId": format!("in_{uid}"), "states": states}});
            server
                .put(&invoice_path(uid), &document)
                .await
                .with_status(201);
        }

        server
            .put(
                &invoice_path("told"),
                &json!({"metadata": {"uid": "told"}, "status": {"stripeInvoiceId": "in_1"}}),
            )
            .await
            .with_status(201);
        server
            .put(&invoice_path("none"), &json!({"metadata": {"uid": "none"}}))
            .await
            .with_status(201);
        server.deliver(&paid(0)).await.with_status(200);
        let expected = BTreeMap::from([
            ("state=Paid", vec!["paid-1", "paid-2", "told"]),
            ("state=PaymentFailed", vec!["failed"]),
            ("state=PaymentPending", vec!["pending"]),
            ("state=PaymentInProgress", vec!["moving"]),
            ("state=none", vec!["none"]),
            ("stripeInvoiceId=in_1", vec!["told"]),
            ("stripeInvoiceId=in_", vec![]),
            ("stripeInvoiceId=in_%25", vec![]),
            ("state=none&stripeInvoiceId=in_1", vec![]),
            ("state=Paid&stripeInvoiceId=in_1", vec!["told"]),
        ]);

        for (query, uids) in expected {
            for limit in [1, 50] {
                let mut found = pages(&server, &format!("{query}&limit={limit}"))
                    .await
                    .concat();
                found.sort();
                assert_eq!(found, uids, "{query}");
            }
        }
    }

    async fn unanswerable_list_query_is_invalid_query(server: TestServer) {
        let foreign: String = "[1,2,3]"
            .bytes()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let queries = [
            "state=paid",
            "state=",
            "state=None",
            "state=Paid,none",
            "limit=0",
            "limit=501",
            "limit=-1",
            "limit=x",
            "limit=",
            "limit=1.5",
            "limit=99999999999999999999",
            "cursor=",
            "cursor=zz",
            "cursor=abc",
            "cursor=%ff",
            "limit=1&limit=2",
            "state=Paid&state=none",
        ]
        .map(str::to_owned);

        for query in queries.into_iter().chain([format!("cursor={foreign}")]) {
            server
                .get(&format!("{LIST}?{query}"), &server.acme_key)
                .await
                .with_error(400, "InvalidQuery");
            server
                .get(&format!("{LIST}?{query}"), "wrong")
                .await
                .with_error(401, "Unauthorized");
            server
                .get(
                    &format!("/v1/tenants/beta/invoices?{query}"),
                    &server.acme_key,
                )
                .await
                .with_error(404, "ResourceNotFound");
        }

        // A malformed id matches no invoice or is an invalid query. It is not a failure.
        for query in [
            "stripeInvoiceId=%00",
            "stripeInvoiceId=%ff",
            "stripeInvoiceId=",
        ] {
            let status = server
                .get(&format!("{LIST}?{query}"), &server.acme_key)
                .await
                .status
                .as_u16();
            assert!([200, 400].contains(&status), "{query} is answered {status}");
        }
    }

    async fn tenant_key_lists_only_its_own_invoices(server: TestServer) {
        server
            .put(&invoice_path("a"), &json!({"metadata": {"uid": "a"}}))
            .await
            .with_status(201);
        let of_beta = json!({"metadata": {"uid": "b"}, "status": {"stripeInvoiceId": "in_b"}});
        server
            .put("/v1/tenants/beta/invoices/b", &of_beta)
            .await
            .with_status(201);
        assert_eq!(pages(&server, "").await, [["a"]]);
        assert_eq!(
            pages(&server, "stripeInvoiceId=in_b").await,
            [Vec::<String>::new()]
        );

        for tenant in ["beta", "nobody", "ACME", "acme%20"] {
            server
                .get(&format!("/v1/tenants/{tenant}/invoices"), &server.acme_key)
                .await
                .with_error(404, "ResourceNotFound");
        }

        let list = async |tenant: &str| {
            uids(
                &server
                    .get(
                        &format!("/v1/tenants/{tenant}/invoices"),
                        &server.operator_key,
                    )
                    .await
                    .with_status(200)
                    .json(),
            )
        };
        assert_eq!(
            (list("acme").await, list("beta").await, list("nobody").await),
            (vec!["a".to_owned()], vec!["b".to_owned()], vec![])
        );

        // A cursor names a position and grants no access.
        import(&server, &["c", "d"]);
        let page = server
            .get(&format!("{LIST}?limit=1"), &server.acme_key)
            .await
            .with_status(200)
            .json();
        let path = format!(
            "/v1/tenants/beta/invoices?cursor={}",
            page["nextCursor"].as_str().unwrap()
        );

        server
            .get(&path, &server.acme_key)
            .await
            .with_error(404, "ResourceNotFound");
    }
}
