//! `GET /v1/tenants/{tenantUid}/invoices/{invoiceUid}`: access, answers, and what callers cannot
//! find out.

use serde_json::{Value, json};

use testkit::each_database;
use testkit::{Answer, TestServer, invoice_path};

const FIXTURES: &str = include_str!("../../fixtures/invoices.jsonl");

fn paid(id: &str, created: i64) -> Value {
    json!({"id": id, "object": "event", "type": "invoice.paid", "created": created, "data": {"object": {
        "id": "in_1", "object": "invoice", "status": "paid", "currency": "usd", "amount_due": 5000, "amount_paid": 5000}}})
}

/// Returns header lines that carry a key, in every accepted style.
fn with_key(key: &str) -> Vec<String> {
    let names = [
        "ApiKey",
        "apikey",
        "APIKEY",
        "aPiKeY",
        "Authorization",
        "authorization",
        "AUTHORIZATION",
    ];
    let plain = names.iter().map(|name| format!("{name}: {key}"));
    let bearer = names[4..]
        .iter()
        .flat_map(|name| ["Bearer", "bearer"].map(|scheme| format!("{name}: {scheme} {key}")));

    plain
        .chain(bearer)
        .chain([
            format!("ApiKey:  {key} "),
            format!("ApiKey: wrong\r\nAuthorization: {key}"),
        ])
        .collect()
}

/// Returns header lines that resemble a key and carry no valid one.
fn without_key(key: &str, spent: &[String]) -> Vec<String> {
    let (shorter, upper) = (&key[..key.len() - 1], key.to_uppercase());
    let values = [
        "",
        " ",
        "Bearer",
        "Bearer ",
        "wrong",
        "*",
        "null",
        "\u{e9}",
        "' or 1=1 --",
        shorter,
        &upper,
    ];

    let mut lines = vec![
        "Accept: */*".to_owned(),
        format!("X-Api-Key: {key}"),
        format!("Cookie: ApiKey={key}"),
    ];
    lines.extend(values.iter().flat_map(|value| {
        [
            format!("ApiKey: {value}"),
            format!("Authorization: {value}"),
        ]
    }));
    lines.extend([
        format!("Authorization: Basic {key}"),
        format!("ApiKey: Bearer {key}"),
        format!("ApiKey: {key}x"),
    ]);

    // A proxy may have checked either of two keys.
    lines.push(format!("ApiKey: {key}\r\nApiKey: {key}"));
    lines.extend(
        spent
            .iter()
            .flat_map(|key| with_key(key).into_iter().take(12)),
    );
    lines
}

/// Sends one request with these header lines and returns head and body.
async fn answered(server: &TestServer, path: &str, lines: &str) -> (String, String) {
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\n{lines}\r\nConnection: close\r\n\r\n");
    let answer = server.send_raw(request.as_bytes()).await;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .unwrap_or_else(|| panic!("{request:?} is answered {answer:?}"));
    (head.to_owned(), body.to_owned())
}

/// Returns an answer without the parts that identify the request.
fn anonymous(answer: &Answer) -> (u16, Vec<(String, String)>, String) {
    let of_the_request = ["x-request-id", "date"];
    let headers = answer
        .headers
        .iter()
        .filter(|(name, _)| !of_the_request.contains(&name.as_str()));
    let headers = headers
        .map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned()))
        .collect();
    let body = String::from_utf8_lossy(&answer.body).replace(answer.header("x-request-id"), "REF");
    (answer.status.as_u16(), headers, body)
}

each_database! {
    async fn key_is_accepted_in_every_header_style(server: TestServer) {
        server.store("a", "in_1").await.with_status(201);
        for key in [&server.acme_key, &server.operator_key] {
            for lines in with_key(key) {
                let (head, body) = answered(&server, &invoice_path("a"), &lines).await;
                assert!(
                    head.starts_with("HTTP/1.1 200 "),
                    "{lines:?} is answered {head} {body}"
                );
            }
        }
    }

    async fn requests_without_valid_key_get_opaque_401(server: TestServer) {
        server.store("a", "in_1").await.with_status(201);
        let path = invoice_path("a");
        let spent = [
            server.revoked_key(&path).await,
            server.expired_key(&path).await,
        ];

        for lines in without_key(&server.acme_key, &spent) {
            for path in [
                &path,
                &invoice_path("missing"),
                &invoice_path("%ff"),
                "/v1/tenants/beta/invoices/a",
                "/v1/tenants/acme/invoices",
            ] {
                let (head, body) = answered(&server, path, &lines).await;
                assert!(
                    head.starts_with("HTTP/1.1 401 "),
                    "{lines:?} to {path} is answered {head} {body}"
                );
                let error: Value = serde_json::from_str(&body).unwrap();
                assert_eq!(error["code"], "Unauthorized");
                assert!(!body.contains(&server.acme_key[..8]), "{body}");
            }
        }

        server
            .send("GET", &path, &[], vec![])
            .await
            .with_error(401, "Unauthorized");
        server
            .send("HEAD", &path, &[], vec![])
            .await
            .with_status(401);
    }

    async fn foreign_invoice_looks_like_a_missing_one(server: TestServer) {
        server
            .put("/v1/tenants/beta/invoices/there", &json!({}))
            .await
            .with_status(201);
        let missing = server
            .get(&invoice_path("missing"), &server.acme_key)
            .await
            .with_error(404, "ResourceNotFound");

        for path in [
            "/v1/tenants/beta/invoices/there",
            "/v1/tenants/beta/invoices/missing",
            "/v1/tenants/nobody/invoices/there",
        ] {
            let answer = server
                .get(path, &server.acme_key)
                .await
                .with_error(404, "ResourceNotFound");
            assert_eq!(anonymous(&answer), anonymous(&missing), "{path}");
            let put = server
                .send("PUT", path, &[("ApiKey", &server.acme_key)], b"{}".to_vec())
                .await;
            assert_eq!(anonymous(&put), anonymous(&missing), "PUT {path}");
        }

        server
            .get("/v1/tenants/beta/invoices/there", &server.operator_key)
            .await
            .with_status(200);
        server
            .get("/v1/tenants/beta/invoices/missing", &server.operator_key)
            .await
            .with_error(404, "ResourceNotFound");

        server
            .get("/v1/elsewhere", &server.acme_key)
            .await
            .with_error(404, "ResourceNotFound");
    }

    async fn malformed_id_is_invalid_path_only_with_a_key(server: TestServer) {
        let (longest, too_long) = ("x".repeat(255), "x".repeat(256));
        let (wide, too_wide) = ("%C3%A9".repeat(127), "%C3%A9".repeat(128));
        for uid in [
            &longest,
            &wide,
            "..",
            "%2e%2e",
            "a%2Fb",
            "%20",
            "a+b",
            "*",
            "%25",
            "%F0%9F%92%A5",
            "null",
        ] {
            server
                .get(&invoice_path(uid), &server.acme_key)
                .await
                .with_error(404, "ResourceNotFound");
        }

        for id in [
            "",
            "%ff",
            "%C3",
            "%ED%A0%80",
            "%00",
            "a%00b",
            "%0A",
            "%0d%0a",
            "%1b",
            "%7f",
            "%C2%85",
            &too_long,
            &too_wide,
        ] {
            for path in [
                format!("/v1/tenants/acme/invoices/{id}"),
                format!("/v1/tenants/{id}/invoices/a"),
                format!("/v1/tenants/{id}/invoices"),
            ] {
                for key in [&server.acme_key, &server.operator_key] {
                    server.get(&path, key).await.with_error(400, "InvalidPath");
                }
                server
                    .get(&path, "wrong")
                    .await
                    .with_error(401, "Unauthorized");
            }
            for path in [
                format!("/v1/tenants/acme/invoices/{id}"),
                format!("/v1/tenants/{id}/invoices/a"),
            ] {
                server
                    .put(&path, &json!({}))
                    .await
                    .with_error(400, "InvalidPath");
            }
        }
    }

    async fn unsupported_method_answers_405_with_allow_header(server: TestServer) {
        server.store("a", "in_1").await.with_status(201);
        for (path, allowed) in [
            (invoice_path("a"), "GET,HEAD,PUT"),
            ("/v1/tenants/acme/invoices".to_owned(), "GET,HEAD"),
        ] {
            for method in ["POST", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"] {
                let answer = server
                    .send(method, &path, &[("ApiKey", &server.operator_key)], vec![])
                    .await;
                let answer = answer.with_error(405, "MethodNotAllowed");
                assert_eq!(answer.header("allow"), allowed, "{method} {path}");
            }
        }
    }
}

each_database! {
    async fn etag_changes_if_a_state_is_appended(server: TestServer) {
        server.store("a", "in_1").await.with_status(201);
        let path = invoice_path("a");
        let ask = async |named: &str| {
            server
                .send(
                    "GET",
                    &path,
                    &[("ApiKey", &server.acme_key), ("If-None-Match", named)],
                    vec![],
                )
                .await
        };
        let tag = server
            .get(&path, &server.acme_key)
            .await
            .with_status(200)
            .header("etag")
            .to_owned();

        assert!(
            tag.starts_with('"') && tag.ends_with('"') && tag.len() > 8,
            "{tag}"
        );

        for named in [
            tag.clone(),
            format!("W/{tag}"),
            format!("\"other\", {tag}"),
            format!("\"other\" ,W/{tag},\"third\""),
            "*".to_owned(),
        ] {
            let answer = ask(&named).await.with_status(304);
            assert_eq!(
                (answer.header("etag"), answer.body.len()),
                (&*tag, 0),
                "{named}"
            );
        }

        for named in [
            "",
            "\"other\"",
            "W/\"other\"",
            tag.trim_matches('"'),
            "\"\"",
            "\u{e9}",
        ] {
            assert_eq!(
                ask(named).await.with_status(200).header("etag"),
                tag,
                "{named}"
            );
        }

        // An event that asserts nothing about this payment.
        let mut other = paid("evt_other", 1_769_850_000);
        other["data"]["object"]["id"] = "in_other".into();
        server.deliver(&other).await.with_status(200);
        ask(&tag).await.with_status(304);
        server
            .deliver(&paid("evt_1", 1_769_850_000))
            .await
            .with_status(200);
        let newer = ask(&tag).await.with_status(200).header("etag").to_owned();

        assert_ne!(newer, tag);

        server
            .deliver(&paid("evt_1", 1_769_850_000))
            .await
            .with_status(200);
        ask(&newer).await.with_status(304);
        server
            .put(&path, &json!({"metadata": {"name": "another"}}))
            .await
            .with_status(200);
        assert_ne!(ask(&newer).await.with_status(200).header("etag"), newer);
    }

    async fn head_answers_like_get_without_body(server: TestServer) {
        server.store("a", "in_1").await.with_status(201);
        let key = [("ApiKey", server.acme_key.as_str())];
        let get = server
            .send("GET", &invoice_path("a"), &key, vec![])
            .await
            .with_status(200);
        let head = server
            .send("HEAD", &invoice_path("a"), &key, vec![])
            .await
            .with_status(200);

        assert_eq!(head.header("content-length"), get.body.len().to_string());
        assert_eq!(
            (head.header("etag"), head.header("content-type")),
            (get.header("etag"), "application/json")
        );
        assert!(head.body.is_empty());

        server
            .send("HEAD", &invoice_path("missing"), &key, vec![])
            .await
            .with_status(404);
    }

    async fn answer_is_compressed_only_on_request(server: TestServer) {
        let path = invoice_path("inv-2026-01-001");
        server
            .put(
                &path,
                &serde_json::from_str(FIXTURES.lines().next().unwrap()).unwrap(),
            )
            .await
            .with_status(201);
        let key = ("ApiKey", server.acme_key.as_str());
        let plain = server
            .send("GET", &path, &[key], vec![])
            .await
            .with_status(200);

        assert_eq!(plain.header("content-encoding"), "");

        let packed = server
            .send(
                "GET",
                &path,
                &[key, ("Accept-Encoding", "br, gzip")],
                vec![],
            )
            .await
            .with_status(200);
        assert_eq!(
            (packed.header("content-encoding"), packed.header("vary")),
            ("gzip", "accept-encoding")
        );
        assert!(packed.body.len() < plain.body.len());

        assert_eq!(unpack(&packed.body), plain.body);

        // The compressed answer has a weak tag that still identifies the answer.
        let tag = packed.header("etag");
        assert_eq!(tag, format!("W/{}", plain.header("etag")));

        for encoding in ["gzip", "identity"] {
            let headers = [key, ("Accept-Encoding", encoding), ("If-None-Match", tag)];
            server
                .send("GET", &path, &headers, vec![])
                .await
                .with_status(304);
        }
    }

    async fn unsupported_encodings_get_an_uncompressed_answer(server: TestServer) {
        let none = ("Accept-Encoding", "gzip;q=0, identity;q=0");
        let (operator, acme) = (
            ("ApiKey", server.operator_key.as_str()),
            ("ApiKey", server.acme_key.as_str()),
        );
        let path = invoice_path("a");

        server
            .send("PUT", &path, &[operator, none], b"{}".to_vec())
            .await
            .with_status(201);
        let read = server
            .send("GET", &path, &[acme, none], vec![])
            .await
            .with_status(200);
        assert_eq!(
            (read.header("content-encoding"), read.invoice()),
            ("", json!({"status": {"states": []}}))
        );

        let known = ("If-None-Match", read.header("etag"));
        server
            .send("GET", &path, &[acme, none, known], vec![])
            .await
            .with_status(304);
        server
            .send("GET", &invoice_path("missing"), &[acme, none], vec![])
            .await
            .with_error(404, "ResourceNotFound");
    }

    async fn documents_are_returned_as_stored(server: TestServer) {
        server
            .run_with_input(
                &["invoices", "import", "--tenant", "acme", "-"],
                FIXTURES.as_bytes(),
            )
            .with_code(0);

        for line in FIXTURES.lines() {
            let stored: Value = serde_json::from_str(line).unwrap();
            let answer = server
                .get(
                    &invoice_path(stored["metadata"]["uid"].as_str().unwrap()),
                    &server.acme_key,
                )
                .await
                .with_status(200);
            assert_eq!(answer.header("content-type"), "application/json");
            assert_eq!(answer.invoice(), stored);
        }
    }

    async fn answer_has_the_types_that_strict_clients_need(server: TestServer) {
        let stored = r#"{
            "metadata": {"uid": "a", "creationTimestamp": "2026-01-31T10:15:00+01:00", "deletionTimestamp": null, "labels": {}},
            "spec": {"credits": {"pureFreeCredits": 2500.0, "alloyFreeCredits": -9223372036854775808}, "address": null,
                     "plan": {"freeCredits": [], "slaCredits": [{"totalCpuCoreHours": 1e3, "planCredit": {"type": "Pure", "cpuCoreHours": 0.0}}]}},
            "status": {"billableAmount": 0.1, "projects": [], "productInvoice": {"pure": {"overageLimitPercentage": 10.0, "tierPrice": 0.05}}}}"#;
        server
            .put(&invoice_path("a"), &serde_json::from_str(stored).unwrap())
            .await
            .with_status(201)
            .invoice();
        let answer = server
            .get(&invoice_path("a"), &server.acme_key)
            .await
            .with_status(200);

        assert_eq!(
            answer.invoice(),
            json!({
                "metadata": {"uid": "a", "creationTimestamp": "2026-01-31T09:15:00.000Z", "labels": {}},
                "spec": {"credits": {"pureFreeCredits": 2500, "alloyFreeCredits": i64::MIN},
                         "plan": {"freeCredits": [], "slaCredits": [{"totalCpuCoreHours": 1000, "planCredit": {"type": "Pure", "cpuCoreHours": 0}}]}},
                "status": {"billableAmount": 0.1, "projects": [], "states": [],
                           "productInvoice": {"pure": {"overageLimitPercentage": 10, "tierPrice": 0.05}}},
            })
        );
        assert!(!answer.body.windows(4).any(|four| four == b"null"));

        for smallest in [
            json!({}),
            json!({"status": {}}),
            json!({"status": null}),
            json!({"metadata": null, "status": {"states": null}}),
        ] {
            server.put(&invoice_path("b"), &smallest).await;
            let states = json!({"status": {"states": []}});
            assert_eq!(
                server
                    .get(&invoice_path("b"), &server.acme_key)
                    .await
                    .with_status(200)
                    .invoice(),
                states,
                "{smallest}"
            );
        }
    }

    async fn unknown_fields_are_returned_unchanged(server: TestServer) {
        let odd = json!({"": null, "n": [1.0, -0.5, 1e300, u64::MAX], "text": "\u{0}\u{1}\u{7f}é💥\u{2028}\"\\/", "deep": [[[{"a~b/c": {}}]]]});
        let document = json!({
            "zzz": odd, "aaa": odd, "metadata": {"uid": "a", "odd": odd}, "spec": {"odd": odd, "address": {"odd": odd}},
            "status": {"odd": odd, "projects": [{"odd": odd}], "productInvoice": {"pure": {"odd": odd}}}});
        server
            .put(&invoice_path("a"), &document)
            .await
            .with_status(201);
        let answer = server
            .get(&invoice_path("a"), &server.acme_key)
            .await
            .with_status(200);
        let mut expected = document;
        expected["status"]["states"] = json!([]);

        assert_eq!(answer.invoice(), expected);

        let (first, second) = (
            answer.body.windows(5).position(|w| w == b"\"zzz\""),
            answer.body.windows(5).position(|w| w == b"\"aaa\""),
        );
        assert!(first < second, "fields keep their order");
    }
}

/// Decompresses with an independent decoder.
fn unpack(packed: &[u8]) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("answer.gz");
    std::fs::write(&file, packed).unwrap();
    let output = std::process::Command::new("gzip")
        .arg("-dc")
        .arg(&file)
        .output()
        .unwrap();

    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );

    output.stdout
}
