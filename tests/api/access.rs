//! Access control: every route with every kind of key, and odd requests from every kind of caller.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use testkit::each_database;
use testkit::openapi::DOCUMENT;
use testkit::{Answer, TestServer, invoice_path};

/// Text in the invoice and the event of another tenant.
const SECRET_OF_BETA: &str = "only beta may read this";
const HIDDEN: &str = "/v1/tenants/beta/invoices/hidden";

/// Stores invoice `a` of tenant `acme` and invoice `hidden` of tenant `beta`, each with an event.
async fn fill(server: &TestServer) {
    let hidden =
        json!({"metadata": {"name": SECRET_OF_BETA}, "status": {"stripeInvoiceId": "in_hidden"}});
    server.put(HIDDEN, &hidden).await.with_status(201);
    server.store("a", "in_1").await.with_status(201);

    for (id, invoice, number) in [
        ("evt_hidden", "in_hidden", SECRET_OF_BETA),
        ("evt_1", "in_1", "ACME-1"),
    ] {
        let object = json!({"id": invoice, "object": "invoice", "status": "paid", "amount_due": 5000, "amount_paid": 5000, "number": number});
        let event = json!({"id": id, "object": "event", "type": "invoice.paid", "created": 1_769_850_000, "data": {"object": object}});
        server.deliver(&event).await.with_status(200);
    }
}

/// A documented operation, an existing path of it, a missing path of the same form, and the status
/// for an unknown key, the tenant's, another tenant's and the operator's key.
type Row = (&'static str, &'static str, &'static str, [u16; 4]);

const TABLE: [Row; 12] = [
    (
        "get /v1/tenants/{tenantUid}/invoices",
        "/v1/tenants/acme/invoices",
        "/v1/tenants/nobody/invoices",
        [401, 200, 404, 200],
    ),
    (
        "get /v1/tenants/{tenantUid}/invoices/{invoiceUid}",
        "/v1/tenants/acme/invoices/a",
        "/v1/tenants/acme/invoices/x",
        [401, 200, 404, 200],
    ),
    (
        "put /v1/tenants/{tenantUid}/invoices/{invoiceUid}",
        "/v1/tenants/acme/invoices/a",
        "/v1/tenants/acme/invoices/x",
        [401, 403, 404, 200],
    ),
    (
        "get /v1/tenants/{tenantUid}/invoices/{invoiceUid}/evidence",
        "/v1/tenants/acme/invoices/a/evidence",
        "/v1/tenants/acme/invoices/x/evidence",
        [401, 200, 404, 200],
    ),
    (
        "get /v1/events",
        "/v1/events",
        "/v1/events?invoice=in_x",
        [401, 403, 403, 200],
    ),
    (
        "get /v1/events/{id}",
        "/v1/events/evt_1",
        "/v1/events/evt_x",
        [401, 403, 403, 200],
    ),
    (
        "get /metrics",
        "/metrics",
        "/metrics?x",
        [401, 403, 403, 200],
    ),
    ("get /healthz", "/healthz", "/healthz?x", [200; 4]),
    ("get /readyz", "/readyz", "/readyz?x", [200; 4]),
    (
        "get /openapi.json",
        "/openapi.json",
        "/openapi.json?x",
        [200; 4],
    ),
    (
        "post /webhooks/stripe",
        "/webhooks/stripe",
        "/webhooks/stripe?x",
        [400; 4],
    ),
    ("get /", "/", "/v1", [404; 4]),
];

/// Returns an answer without the parts that identify the request.
fn anonymous(answer: &Answer) -> (u16, BTreeMap<String, String>, String) {
    let headers = answer
        .headers
        .iter()
        .filter(|(name, _)| !["x-request-id", "date"].contains(&name.as_str()));
    let headers = headers
        .map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned()))
        .collect();

    (
        answer.status.as_u16(),
        headers,
        String::from_utf8_lossy(&answer.body).replace(answer.header("x-request-id"), "REF"),
    )
}

async fn call(server: &TestServer, method: &str, path: &str, key: Option<&str>) -> Answer {
    let headers: Vec<(&str, &str)> = key.map(|key| ("ApiKey", key)).into_iter().collect();
    server
        .send(
            method,
            path,
            &headers,
            if method == "PUT" {
                b"{}".to_vec()
            } else {
                Vec::new()
            },
        )
        .await
}

#[test]
fn access_table_covers_every_documented_call() {
    let documented = DOCUMENT["paths"]
        .as_object()
        .unwrap()
        .iter()
        .flat_map(|(path, item)| {
            let methods = item
                .as_object()
                .unwrap()
                .keys()
                .filter(|method| *method != "parameters");
            methods.map(move |method| format!("{method} {path}"))
        });
    let listed: BTreeSet<String> = TABLE
        .iter()
        .map(|(call, ..)| (*call).to_owned())
        .filter(|call| call != "get /")
        .collect();

    assert_eq!(listed, documented.collect());
}

each_database! {
    async fn every_call_checks_each_kind_of_key(server: TestServer) {
        fill(&server).await;
        let path = invoice_path("a");
        let (beta, revoked, expired) = (
            server.key(&["--tenant", "beta"]),
            server.revoked_key(&path).await,
            server.expired_key(&path).await,
        );
        let nobodys = [
            None,
            Some("wrong"),
            Some(&*revoked),
            Some(&*expired),
            Some("Bearer"),
            Some(""),
        ];

        for (called, path, elsewhere, expected) in TABLE {
            let method = called.split(' ').next().unwrap().to_uppercase();
            for (keys, status) in [
                &nobodys[..],
                &[Some(&*server.acme_key)],
                &[Some(&beta)],
                &[Some(&server.operator_key)],
            ]
            .iter()
            .zip(expected)
            {
                let mut refusals = BTreeSet::new();
                for key in *keys {
                    let answer = call(&server, &method, path, *key).await.with_status(status);
                    if status >= 400 {
                        // The answer must not depend on whether the resource exists.
                        refusals.insert(anonymous(&answer));
                        refusals.insert(anonymous(&call(&server, &method, elsewhere, *key).await));
                    }
                    if method == "GET" {
                        let head = call(&server, "HEAD", path, *key).await.with_status(status);
                        assert!(head.body.is_empty());
                    }
                }
                assert!(refusals.len() < 2, "{called} with {keys:?}: {refusals:#?}");
            }
        }

        // Of two keys, any valid one opens.
        let both = [
            ("ApiKey", "wrong"),
            ("Authorization", server.acme_key.as_str()),
        ];
        server
            .send("GET", &path, &both, vec![])
            .await
            .with_status(200);
    }

    async fn tenant_reads_nothing_of_another_through_any_call(server: TestServer) {
        fill(&server).await;
        for (called, path, ..) in TABLE {
            let method = called.split(' ').next().unwrap().to_uppercase();
            let path = path
                .replace("acme/invoices/a", "beta/invoices/hidden")
                .replace("acme", "beta")
                .replace("evt_1", "evt_hidden");
            for key in [None, Some(&*server.acme_key)] {
                let answer = call(&server, &method, &path, key).await;
                assert!(
                    !String::from_utf8_lossy(&answer.body).contains(SECRET_OF_BETA),
                    "{method} {path}: {answer:?}"
                );
            }
        }

        let evidence: Value = call(
            &server,
            "GET",
            &format!("{HIDDEN}/evidence"),
            Some(&server.operator_key),
        )
        .await
        .with_status(200)
        .json();
        assert!(
            evidence.to_string().contains(SECRET_OF_BETA),
            "there is something to hide: {evidence}"
        );
    }
}

const ODD_PIECES: [&str; 30] = [
    "",
    ".",
    "..",
    "%2e",
    "%2e%2e",
    "%2f",
    "..%2fbeta",
    "..%2f..%2fbeta%2finvoices%2fhidden",
    "%5c..%5cbeta",
    "%00",
    "acme%00",
    "%ff",
    "%",
    "%zz",
    "%u0041",
    "*",
    "'",
    "\"",
    "hidden'--",
    "beta",
    "hidden",
    "beta/invoices/hidden",
    "{invoiceUid}",
    "a;b=c",
    "?tenant=beta",
    "#hidden",
    "\u{e9}",
    "%F0%9F%92%A5",
    "+",
    "../beta",
];

fn odd_paths() -> Vec<String> {
    let mut paths: Vec<String> = Vec::new();
    for piece in ODD_PIECES {
        paths.extend(
            ODD_PIECES[..20]
                .iter()
                .map(|other| format!("/v1/tenants/{piece}/invoices/{other}")),
        );
        paths.push(format!("/v1/tenants/{piece}/invoices"));
        paths.extend(
            ["state", "stripeInvoiceId", "limit", "cursor", "tenantUid"]
                .map(|name| format!("/v1/tenants/acme/invoices?{name}={piece}")),
        );
        paths.extend(
            ["type", "invoice", "outcome", "limit", "cursor"]
                .map(|name| format!("/v1/events?{name}={piece}")),
        );
        paths.extend([
            format!("/v1/events/{piece}"),
            format!("/v1/events/evt_hidden?cursor={piece}"),
            format!("/v1/tenants/{piece}/invoices/{piece}/evidence"),
            format!("/v1/tenants/beta/invoices/hidden/evidence?asOf={piece}"),
            format!("/v1/tenants/acme/invoices/a/evidence?asOf={piece}"),
            format!("/metrics{piece}"),
            format!("/{piece}"),
            format!("//{piece}"),
            format!("/v1/{piece}"),
            format!("/v1/tenants/acme/{piece}/hidden"),
        ]);
    }

    // A list filtered by every query, with the invoice of another tenant in the query; the cursor
    // names its owner.
    let cursor: String = r#"[9223372036854775807,"beta","hidden\u0000"]"#.bytes().map(|byte| format!("{byte:02x}")).collect();
    paths.extend([
        format!("/v1/tenants/acme/invoices?cursor={cursor}"),
        "/v1/tenants/acme/invoices?stripeInvoiceId=in_hidden".to_owned(),
    ]);
    paths.extend(
        [
            "*",
            "http://x/v1/tenants/beta/invoices/hidden",
            "https://beta:x@y/",
            "x:1",
        ]
        .map(str::to_owned),
    );

    paths.push(format!("/v1/tenants/acme/invoices/{}", "x".repeat(60_000)));
    paths
}

fn odd_headers(key: &str) -> Vec<String> {
    let names = [
        "X-Original-URL",
        "X-Rewrite-URL",
        "X-Forwarded-Prefix",
        "Forwarded",
        "X-HTTP-Method-Override",
        "X-Request-Id",
        "Host",
        "Range",
        "If-Match",
        "If-None-Match",
        "If-Modified-Since",
        "Accept",
        "Accept-Encoding",
        "Content-Encoding",
        "Content-Length",
        "Transfer-Encoding",
        "Expect",
        "Upgrade",
        "TE",
        "Cookie",
        "Origin",
        "ApiKey",
        "Authorization",
        "X-Tenant",
    ];

    let values = [
        "",
        "beta",
        "/v1/tenants/beta/invoices/hidden",
        "PUT",
        "0",
        "-1",
        "99999999999999999999",
        "bytes=0-5",
        "*",
        "\"",
        "gzip;q=x",
        "identity;q=0, *;q=0",
        "chunked, chunked",
        "100-continue",
        "websocket",
        "\u{e9}\u{1f4a5}",
        "\u{1}",
        "a,b;c=\"d",
    ];

    names
        .iter()
        .flat_map(|name| values.iter().map(move |value| format!("{name}: {value}")))
        .chain([
            format!("X: {key}"),
            "no colon".to_owned(),
            format!("X: {}", "y".repeat(70_000)),
        ])
        .collect()
}

each_database! {
    async fn odd_requests_neither_break_server_nor_leak_tenants(server: TestServer) {
        fill(&server).await;
        let key_line = format!("ApiKey: {}\r\n", server.acme_key);
        let by_path = odd_paths()
            .into_iter()
            .map(|path| format!("GET {path} HTTP/1.1\r\nHost: x\r\n{key_line}"));
        let without_key = odd_paths()
            .into_iter()
            .map(|path| format!("GET {path} HTTP/1.1\r\nHost: x\r\n"));
        let paths = [
            invoice_path("a"),
            "/v1/tenants/beta/invoices/hidden".to_owned(),
        ];
        let by_header = odd_headers(&server.acme_key).into_iter().flat_map(|line| {
            paths
                .clone()
                .map(|path| format!("GET {path} HTTP/1.1\r\nHost: x\r\n{key_line}{line}\r\n"))
        });

        let mut asked = 0;
        for request in by_path.chain(without_key).chain(by_header) {
            let answer = server
                .send_raw(format!("{request}Connection: close\r\n\r\n").as_bytes())
                .await;
            let shown = &request[..request.len().min(300)];
            let status: u16 = answer
                .get(9..12)
                .and_then(|code| code.parse().ok())
                .unwrap_or_else(|| panic!("{shown:?} is answered {answer:?}"));
            assert!(status < 500, "{shown:?} is answered {answer}");
            assert!(
                !answer.contains(SECRET_OF_BETA),
                "{shown:?} is answered {answer}"
            );
            assert!(
                !answer.contains(&server.acme_key),
                "{shown:?} is answered {answer}"
            );
            asked += 1;
        }

        assert!(asked > 2_000, "{asked}");

        // The operator may see everything, so only failures count.
        for path in odd_paths() {
            let request = format!(
                "GET {path} HTTP/1.1\r\nHost: x\r\nApiKey: {}\r\nConnection: close\r\n\r\n",
                server.operator_key
            );
            let answer = server.send_raw(request.as_bytes()).await;
            assert!(
                answer.starts_with("HTTP/1.1 ") && !answer.starts_with("HTTP/1.1 5"),
                "{path} is answered {answer}"
            );
        }

        server
            .get(&invoice_path("a"), &server.acme_key)
            .await
            .with_status(200);
    }
}
