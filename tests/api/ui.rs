//! The pages at `/ui`: access, protection, and inert display of foreign text. One test uses a real
//! browser.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use stripe_reconciler::clock::Clock;
use testkit::each_database;
use testkit::{
    Answer, Database, OLD_SECRET, PostgresServer, SECRET, Server, TestServer, client, fixtures,
    invoice_path, send, send_raw, signature,
};

/// All pages, with `inv-1` of tenant `acme` and the event `evt_1`.
const PAGES: [&str; 9] = [
    "/ui",
    "/ui?q=inv",
    "/ui/invoice?tenant=acme&uid=inv-1",
    "/ui/waiting",
    "/ui/unreadable",
    "/ui/events",
    "/ui/event?id=evt_1",
    "/ui/reconciliation",
    "/ui/alarms",
];
const FOR_OPERATORS: [&str; 6] = [
    "/ui/waiting",
    "/ui/unreadable",
    "/ui/events",
    "/ui/event?id=evt_1",
    "/ui/reconciliation",
    "/ui/alarms",
];

fn start_with_ui(server: &TestServer) -> Server {
    let secrets = format!("live={SECRET},old={OLD_SECRET}");
    Server::start_with(&[
        ("DATABASE_URL", &server.database.url),
        ("STRIPE_WEBHOOK_SECRET", &secrets),
        ("UI", "on"),
    ])
}

async fn look(
    process: &Server,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    form: &str,
) -> Answer {
    let kind = [("content-type", "application/x-www-form-urlencoded")];
    let headers = [&kind[usize::from(form.is_empty())..], headers].concat();
    send(
        &client(),
        method,
        &format!("{}{path}", process.base),
        &headers,
        form.as_bytes().to_vec(),
    )
    .await
}

async fn sign_in(process: &Server, key: &str) -> Answer {
    look(
        process,
        "POST",
        "/ui/sign-in",
        &[("origin", &process.base)],
        &format!("key={key}"),
    )
    .await
}

/// Signs in with a key and returns the session as `name=value`.
async fn session(process: &Server, key: &str) -> String {
    let answer = sign_in(process, key).await.with_status(303);
    answer
        .header("set-cookie")
        .split(';')
        .next()
        .unwrap()
        .to_owned()
}

async fn page(process: &Server, path: &str, session: &str) -> Answer {
    look(process, "GET", path, &[("cookie", session)], "").await
}

fn text(answer: &Answer) -> String {
    assert_eq!(
        answer.header("content-type"),
        "text/html; charset=utf-8",
        "{answer:?}"
    );
    String::from_utf8(answer.body.to_vec()).unwrap()
}

/// Returns a page without the parts that differ between requests.
fn without_request(answer: &Answer) -> String {
    text(answer).replace(answer.header("x-request-id"), "")
}

fn event(id: &str, invoice: Value) -> Value {
    json!({"id": id, "object": "event", "type": "invoice.paid", "created": 1_769_850_000, "livemode": false, "data": {"object": invoice}})
}

fn paid(id: &str, stripe_invoice_id: &str) -> Value {
    event(
        id,
        json!({"id": stripe_invoice_id, "object": "invoice", "status": "paid", "number": "No 1", "currency": "eur",
        "amount_due": 5000, "amount_paid": 5000}),
    )
}

/// Returns the target of the link with this text.
fn link(page: &str, shown: &str) -> String {
    let (before, _) = page
        .rsplit_once(&format!("{shown}</"))
        .unwrap_or_else(|| panic!("{shown} is not in {page}"));
    let (_, link) = before.rsplit_once("href=\"").unwrap();
    link.split('"').next().unwrap().replace("&amp;", "&")
}

each_database! {
    async fn pages_are_absent_unless_enabled(server: TestServer) {
        for path in [
            "/ui",
            "/ui/",
            "/ui/sign-in",
            "/ui/invoice?tenant=acme&uid=inv-1",
        ] {
            look(&server.process, "GET", path, &[], "")
                .await
                .with_error(404, "ResourceNotFound");
        }
    }

    async fn session_is_shared_by_replicas_and_ends_with_its_key(server: TestServer) {
        let (process, replica) = (start_with_ui(&server), start_with_ui(&server));
        for path in PAGES {
            let answer = look(&process, "GET", path, &[], "").await.with_status(303);
            assert!(
                answer
                    .header("location")
                    .starts_with("/ui/sign-in?next=%2Fui"),
                "{answer:?}"
            );
        }
        let asked = text(&look(&process, "GET", "/ui/sign-in?next=%2Fui%2Falarms", &[], "").await);
        assert_eq!(
            link(&asked, "Open the page"),
            "/ui/alarms",
            "who came by a link from elsewhere may be signed in"
        );
        let answer = look(
            &process,
            "POST",
            "/ui/sign-in",
            &[("origin", &process.base)],
            &format!("key=+{}+&next=%2Fui%2Falarms", server.operator_key),
        )
        .await;
        assert_eq!(
            (answer.status.as_u16(), answer.header("location")),
            (303, "/ui/alarms")
        );
        let cookie = answer.header("set-cookie");
        assert!(
            cookie.ends_with("; Path=/ui; Max-Age=43200; HttpOnly; SameSite=Strict"),
            "{cookie}"
        );
        assert!(
            !cookie.contains(&server.operator_key),
            "the key is not in it: {cookie}"
        );
        let secure = look(
            &process,
            "POST",
            "/ui/sign-in",
            &[
                ("sec-fetch-site", "same-origin"),
                ("x-forwarded-proto", "https"),
            ],
            &format!("key={}", server.acme_key),
        )
        .await;
        assert!(
            secure.header("set-cookie").ends_with("; Secure"),
            "{secure:?}"
        );

        let key = server.key(&["--tenant", "acme"]);
        let session = session(&process, &key).await;
        for process in [&process, &replica] {
            page(process, "/ui", &session).await.with_status(200);
        }
        let other_cookie = format!(
            "GET /ui HTTP/1.1\r\nHost: x\r\nCookie: of_another=Jos\u{e9}; {session}\r\nConnection: close\r\n\r\n"
        );
        let other_cookie = send_raw(process.authority(), other_cookie.as_bytes()).await;
        assert!(
            other_cookie.starts_with("HTTP/1.1 200"),
            "another program on this host set a cookie that is no ASCII: {other_cookie}"
        );
        let (name, value) = session.split_once('=').unwrap();
        let forged = [
            format!("{name}="),
            format!("{name}={key}"),
            format!("{name}={}0", &value[..value.len() - 1]),
            format!("other={value}"),
        ];
        for forged in forged.iter().filter(|forged| **forged != session) {
            page(&process, "/ui", forged).await.with_status(303);
        }
        let keys: Value = server.run(&["keys", "list", "--json"]).with_code(0).json();
        server
            .run(&["keys", "revoke", keys[0]["id"].as_str().unwrap()])
            .with_code(0);
        for process in [&process, &replica] {
            page(process, "/ui", &session).await.with_status(303);
        }
        let out = look(
            &process,
            "POST",
            "/ui/sign-out",
            &[("origin", &process.base)],
            "",
        )
        .await
        .with_status(303);
        assert!(
            out.header("set-cookie").contains("=; Path=/ui; Max-Age=0"),
            "{out:?}"
        );
    }

    async fn sign_in_rejects_other_sites_and_wrong_keys(server: TestServer) {
        let process = start_with_ui(&server);
        let form = format!("key={}", server.operator_key);
        let elsewhere: [&[(&str, &str)]; 5] = [
            &[],
            &[("origin", "null")],
            &[("origin", "https://evil.example")],
            &[("sec-fetch-site", "cross-site"), ("origin", &process.base)],
            &[("sec-fetch-site", "same-site")],
        ];
        for headers in elsewhere {
            for path in ["/ui/sign-in", "/ui/sign-out"] {
                let answer = look(&process, "POST", path, headers, &form)
                    .await
                    .with_status(403);
                assert!(
                    text(&answer).contains("Request from another site")
                        && answer.header("set-cookie").is_empty()
                );
            }
        }
        for wrong in ["", "srk_0", "%00", "<script>"] {
            let answer = sign_in(&process, wrong).await.with_status(401);
            assert!(
                text(&answer).contains("not valid") && answer.header("set-cookie").is_empty(),
                "{wrong}"
            );
        }
        let large = format!("key={}", "a".repeat(20_000));
        for (form, status) in [
            ("", 400),
            ("next=%2Fui", 400),
            ("key=a&key=b", 400),
            ("key=%ff", 401),
            (&*large, 413),
        ] {
            let answer = look(
                &process,
                "POST",
                "/ui/sign-in",
                &[("origin", &process.base)],
                form,
            )
            .await
            .with_status(status);
            assert!(text(&answer).contains("<h1>"), "{answer:?}");
        }
        let away = look(
            &process,
            "POST",
            "/ui/sign-in",
            &[("origin", &process.base)],
            &format!("{form}&next=https%3A%2F%2Fevil.example"),
        )
        .await;
        assert_eq!(away.header("location"), "/ui");
    }

    async fn every_page_requires_sign_in_and_answers_head(server: TestServer) {
        server.store("inv-1", "in_1").await.with_status(201);
        server
            .deliver(&paid("evt_1", "in_1"))
            .await
            .with_status(200);
        let process = start_with_ui(&server);
        let operator = session(&process, &server.operator_key).await;
        let others = [
            "/ui/sign-in",
            "/ui/nothing",
            "/ui/style-0.css",
            "/ui/invoice",
            "/ui/invoice?tenant=acme&uid=%ff",
            "/ui/event?id=",
            "/ui?cursor=x",
            "/ui/invoice?tenant=acme&uid=inv-1&at=x",
            "/ui?q=a&q=b",
        ];
        for path in PAGES.iter().chain(&others) {
            let answer = page(&process, path, &operator).await;
            let policy = answer.header("content-security-policy");
            assert!(
                policy.starts_with("default-src 'none'; style-src 'self';")
                    && policy.contains("frame-ancestors 'none'"),
                "{path}: {policy}"
            );
            let headers = [
                "cache-control",
                "x-content-type-options",
                "referrer-policy",
                "x-frame-options",
            ]
            .map(|name| answer.header(name));
            assert_eq!(
                headers,
                ["no-store", "nosniff", "same-origin", "DENY"],
                "{path}"
            );
            let shown = text(&answer);
            assert!(
                shown.contains("<html lang=\"en\">")
                    && shown.contains("<main")
                    && shown.contains("<h1"),
                "{path}: {shown}"
            );
            for scripted in ["<script", "onclick", "javascript:", " style=", "http://"] {
                assert!(!shown.contains(scripted), "{path} has {scripted}");
            }
            let head = look(&process, "HEAD", path, &[("cookie", &operator)], "")
                .await
                .with_status(answer.status.as_u16());
            assert!(
                head.body.is_empty() && head.header("content-security-policy") == policy,
                "{path}"
            );
            assert_eq!(
                answer.status == 200,
                PAGES.contains(path) || *path == "/ui/sign-in",
                "{path}: {answer:?}"
            );
            if PAGES.contains(path) {
                let refused = look(
                    &process,
                    "POST",
                    path,
                    &[("cookie", &operator), ("origin", &process.base)],
                    "",
                )
                .await
                .with_status(405);
                assert!(text(&refused).contains("page is read-only"));
            }
        }
        let shown = text(&page(&process, "/ui", &operator).await);
        let style = shown
            .split("rel=\"stylesheet\" href=\"")
            .nth(1)
            .unwrap()
            .split('"')
            .next()
            .unwrap();
        let style = look(&process, "GET", style, &[], "").await.with_status(200);
        assert_eq!(
            (style.header("content-type"), style.header("cache-control")),
            (
                "text/css; charset=utf-8",
                "public, max-age=31536000, immutable"
            )
        );
    }

    async fn tenants_cannot_see_each_others_invoices(server: TestServer) {
        server.store("inv-1", "in_1").await.with_status(201);
        server
            .put(
                "/v1/tenants/other/invoices/inv-2",
                &json!({"status": {"stripeInvoiceId": "in_2"}}),
            )
            .await
            .with_status(201);
        server
            .put(
                "/v1/tenants/other/invoices/inv-1",
                &json!({"status": {"stripeInvoiceId": "in_3"}}),
            )
            .await
            .with_status(201);
        server
            .deliver(&paid("evt_1", "in_1"))
            .await
            .with_status(200);
        let process = start_with_ui(&server);
        let (acme, operator) = (
            session(&process, &server.acme_key).await,
            session(&process, &server.operator_key).await,
        );
        let own = text(
            &page(&process, "/ui/invoice?tenant=acme&uid=inv-1", &acme)
                .await
                .with_status(200),
        );
        assert!(
            own.contains("Paid on ") && own.contains("evt_1") && !own.contains("/ui/event"),
            "{own}"
        );
        let absent = without_request(
            &page(&process, "/ui/invoice?tenant=acme&uid=inv-2", &acme)
                .await
                .with_status(404),
        );
        for path in [
            "/ui/invoice?tenant=other&uid=inv-2",
            "/ui/invoice?tenant=other&uid=none",
            "/ui/invoice?tenant=&uid=",
            "/ui/invoice?uid=inv-1",
        ] {
            assert_eq!(
                without_request(&page(&process, path, &acme).await.with_status(404)),
                absent,
                "{path}"
            );
        }
        for sought in ["inv-2", "in_2", "in_3"] {
            let found = text(
                &page(&process, &format!("/ui?q={sought}"), &acme)
                    .await
                    .with_status(200),
            );
            assert!(found.contains("No invoice has"), "{found}");
            let found = page(&process, &format!("/ui?q={sought}"), &operator)
                .await
                .with_status(303);
            assert!(
                found
                    .header("location")
                    .starts_with("/ui/invoice?tenant=other&uid=inv-"),
                "{found:?}"
            );
        }
        let found = page(&process, "/ui?q=+inv-1+", &acme)
            .await
            .with_status(303);
        assert_eq!(
            found.header("location"),
            "/ui/invoice?tenant=acme&uid=inv-1"
        );
        let found = text(
            &page(&process, "/ui?q=inv-1", &operator)
                .await
                .with_status(200),
        );
        assert!(
            found.contains("tenant=acme&amp;uid=inv-1")
                && found.contains("tenant=other&amp;uid=inv-1"),
            "{found}"
        );
        let listed = text(&page(&process, "/ui", &acme).await.with_status(200));
        assert!(
            listed.contains("uid=inv-1")
                && !listed.contains("other<")
                && !listed.contains("uid=inv-2")
                && !listed.contains("/ui/alarms"),
            "{listed}"
        );
        for path in FOR_OPERATORS {
            let refused = text(&page(&process, path, &acme).await.with_status(403));
            assert!(
                refused.contains("operator's key") && !refused.contains("evt_1"),
                "{path}: {refused}"
            );
        }
    }

    async fn list_page_paginates_and_filters_by_state(server: TestServer) {
        let lines: Vec<String> = (0..60).map(|n| json!({"metadata": {"uid": format!("inv-{n:02}")}, "status": {"stripeInvoiceId": format!("in_{n:02}")}}).to_string()).collect();
        server
            .run_with_input(
                &["invoices", "import", "--tenant", "acme", "-"],
                lines.join("\n").as_bytes(),
            )
            .with_code(0);
        server
            .deliver(&paid("evt_1", "in_07"))
            .await
            .with_status(200);
        let process = start_with_ui(&server);
        let acme = session(&process, &server.acme_key).await;
        let uids = |shown: &str| shown.matches("uid=inv-").count();
        let first = text(&page(&process, "/ui", &acme).await.with_status(200));
        assert_eq!(uids(&first), 50);
        let second = text(
            &page(&process, &link(&first, "Older"), &acme)
                .await
                .with_status(200),
        );
        assert_eq!(uids(&second), 10);
        assert_eq!(link(&second, "First page"), "/ui");
        let paid = text(
            &page(&process, "/ui?state=Paid", &acme)
                .await
                .with_status(200),
        );
        assert!(
            uids(&paid) == 1 && paid.contains("50.00 EUR paid for invoice No 1"),
            "{paid}"
        );
        assert_eq!(
            uids(&text(
                &page(&process, "/ui?state=PaymentFailed", &acme).await
            )),
            0
        );
        page(&process, "/ui?state=Odd", &acme)
            .await
            .with_status(400);
        let later: Vec<String> = (0..1_500)
            .map(|n| json!({"metadata": {"uid": format!("late-{n}")}}).to_string())
            .collect();
        server
            .run_with_input(
                &["invoices", "import", "--tenant", "acme", "-"],
                later.join("\n").as_bytes(),
            )
            .with_code(0);
        assert_eq!(
            uids(&text(&page(&process, "/ui?state=Paid", &acme).await)),
            1,
            "a rare one is found in a few steps"
        );
    }

    async fn invoice_page_shows_what_happened_to_the_money(server: TestServer) {
        server.store("inv-1", "in_1").await.with_status(201);
        let mut note = event(
            "evt_2",
            json!({"id": "cn_1", "object": "credit_note", "invoice": "in_1", "number": "CN-1", "amount": 1500,
            "currency": "eur", "status": "issued", "type": "post_payment"}),
        );
        note["type"] = json!("credit_note.created");
        let mut voided = note.clone();
        (
            voided["id"],
            voided["type"],
            voided["data"]["object"]["status"],
        ) = (json!("evt_3"), json!("credit_note.voided"), json!("void"));
        for event in [paid("evt_1", "in_1"), note, voided] {
            server.deliver(&event).await.with_status(200);
        }
        let process = start_with_ui(&server);
        let acme = session(&process, &server.acme_key).await;
        let shown = text(
            &page(&process, "/ui/invoice?tenant=acme&uid=inv-1", &acme)
                .await
                .with_status(200),
        );
        let (answer, _) = shown.split_once("How we know").unwrap();
        for text in [
            "50.00 EUR paid for invoice No 1",
            "over 15.00 EUR for invoice No 1 was issued",
            "was voided",
            "In test mode: no real money.",
        ] {
            assert!(answer.contains(text), "{text} is not in {answer}");
        }
        assert!(
            !answer.contains("waits for payment"),
            "what was before it was paid is history: {answer}"
        );
    }

    async fn invoice_page_shows_proofs_and_past_knowledge(server: TestServer) {
        let (document, uid) = fixtures::story_invoice();
        server
            .put(&invoice_path(&uid), &document)
            .await
            .with_status(201);
        let before = &stripe_reconciler::domain::time::timestamp(Clock::system().now_ms())[..19];
        while Clock::system().now_s() * 1000
            < stripe_reconciler::domain::time::parse_time(&format!("{before}Z")).unwrap() + 1000
        {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        for event in fixtures::events() {
            server.deliver(&event).await.with_status(200);
        }
        let process = start_with_ui(&server);
        let operator = session(&process, &server.operator_key).await;
        let path = format!("/ui/invoice?tenant=acme&uid={uid}");
        let shown = text(&page(&process, &path, &operator).await.with_status(200));
        let evidence = server
            .get(
                &format!("{}/evidence", invoice_path(&uid)),
                &server.acme_key,
            )
            .await
            .json();
        let entries = evidence["entries"].as_array().unwrap();
        assert_eq!(shown.matches("<article>").count(), entries.len());
        for entry in entries {
            assert!(
                shown.contains(entry["paymentMsg"].as_str().unwrap()),
                "{entry} is not in {shown}"
            );
            for proof in entry["proofs"].as_array().unwrap() {
                assert!(
                    shown.contains(&format!("/ui/event?id={}", proof["id"].as_str().unwrap())),
                    "{proof}"
                );
            }
        }
        for text in [
            "Paid on ",
            "not compared with Stripe",
            "Nothing is left to fetch",
            "webhook, signed with secret",
            "1299.00 EUR",
            "https://dashboard.stripe.com/",
        ] {
            assert!(shown.contains(text), "{text} is not in {shown}");
        }
        for at in [
            before.to_owned(),
            format!("{before}Z"),
            "2026-01-01T00:00".to_owned(),
            "2026-01-01T00:00:00%2B01:00".to_owned(),
        ] {
            let then = text(
                &page(&process, &format!("{path}&at={at}"), &operator)
                    .await
                    .with_status(200),
            );
            assert!(
                then.contains("Nothing was known about its payment at that time")
                    && then.contains("as known at"),
                "{at}: {then}"
            );
            assert!(
                then.contains("<dd>not known</dd>") && !then.contains("not compared"),
                "{at}: {then}"
            );
        }
        let now = text(
            &page(&process, &format!("{path}&at=2999-01-01T00:00"), &operator)
                .await
                .with_status(200),
        );
        assert_eq!(now.matches("<article>").count(), entries.len());
        assert!(
            text(
                &page(&process, &format!("{path}&at=yesterday"), &operator)
                    .await
                    .with_status(400)
            )
            .contains("RFC 3339")
        );
    }

    async fn hostile_text_is_shown_and_stays_inert(server: TestServer) {
        let process = start_with_ui(&server);
        let hostile = [
            "<script>alert(1)</script>",
            "a/b c?d=e&f#g%2F+é\"'",
            "..",
            "\u{202e}gnp.exe",
            &"日".repeat(85),
        ];
        let encoded = |text: &str| {
            text.bytes()
                .map(|byte| format!("%{byte:02X}"))
                .collect::<String>()
        };
        for (n, uid) in hostile.iter().enumerate() {
            let document = json!({"metadata": {"uid": uid, "name": format!("{uid}</dd><script>")}, "status": {"stripeInvoiceId": uid}});
            server
                .run_with_input(
                    &["invoices", "import", "--tenant", uid, "-"],
                    document.to_string().as_bytes(),
                )
                .with_code(0);
            let mut event = paid(&format!("evt_{n}<script>{uid}"), uid);
            event["data"]["object"]["number"] = json!("<img src=x onerror=alert(1)>");
            server.deliver(&event).await.with_status(200);
        }
        let operator = session(&process, &server.operator_key).await;
        let mut shown = vec![
            text(&page(&process, "/ui", &operator).await.with_status(200)),
            text(&page(&process, "/ui/events", &operator).await),
        ];
        for uid in hostile {
            let found = page(&process, &format!("/ui?q={}", encoded(uid)), &operator)
                .await
                .with_status(303);
            let invoice = text(
                &page(&process, found.header("location"), &operator)
                    .await
                    .with_status(200),
            );
            assert!(invoice.contains("Paid on "), "{uid}: {invoice}");
            let event = invoice
                .split("/ui/event?id=")
                .nth(1)
                .unwrap()
                .split('"')
                .next()
                .unwrap();
            shown.push(text(
                &page(&process, &format!("/ui/event?id={event}"), &operator)
                    .await
                    .with_status(200),
            ));
            shown.push(text(
                &page(
                    &process,
                    &format!("/ui?q={}", encoded(&format!("{uid}x"))),
                    &operator,
                )
                .await,
            ));
            shown.push(invoice);
        }
        for page in &shown {
            // A form's input appears in it as sent.
            let seen: String = page
                .split(" value=\"")
                .enumerate()
                .map(|(n, part)| {
                    if n == 0 {
                        part
                    } else {
                        part.split_once('"').unwrap().1
                    }
                })
                .collect();
            assert!(
                !page.contains("<script") && !page.contains("<img") && !seen.contains('\u{202e}'),
                "{page}"
            );
        }
        assert!(
            shown.iter().any(|page| page.contains("\\u{202e}gnp.exe")),
            "it is spelt out"
        );
    }

    async fn operator_page_lists_unmatched_and_unreadable_events(server: TestServer) {
        server
            .deliver(&paid("evt_1", "in_nobody"))
            .await
            .with_status(200);
        let bytes = [b"<b>no event</b>\0\xff\x1b[31m", &[b'x'; 70_000][..]].concat();
        let signature = signature(SECRET, Clock::system().now_s(), &bytes);
        server
            .deliver_signed(&signature, &bytes)
            .await
            .with_status(200);
        let process = start_with_ui(&server);
        let operator = session(&process, &server.operator_key).await;
        let unreadable = text(
            &page(&process, "/ui/unreadable", &operator)
                .await
                .with_status(200),
        );
        let shown = text(&page(&process, &link(&unreadable, "Unreadable"), &operator).await);
        assert!(
            shown.contains("3c 62 3e 6e 6f")
                && shown.contains("&lt;b&gt;no event&lt;/b&gt;")
                && shown.len() < 40_000,
            "{shown}"
        );
        let events = text(
            &page(&process, "/ui/events?invoice=in_nobody", &operator)
                .await
                .with_status(200),
        );
        assert!(
            events.contains("evt_1") && !events.contains("3c623e"),
            "{events}"
        );
        let alarms = text(
            &page(&process, "/ui/alarms", &operator)
                .await
                .with_status(200),
        );
        assert!(alarms.contains(" checks could not be made."), "{alarms}");
        for check in [
            "database",
            "deliveries",
            "unmatched",
            "unreadable",
            "reconciliation",
        ] {
            assert!(alarms.contains(check), "{check}");
        }
        // The alarms page scans the log; recently received rows are scanned again until they can no
        // longer change.
        let waiting = text(
            &page(&process, "/ui/waiting", &operator)
                .await
                .with_status(200),
        );
        assert!(
            waiting.contains("/ui/events?invoice=in_nobody"),
            "{waiting}"
        );
        server.store("inv-1", "in_nobody").await.with_status(201);
        assert!(
            text(&page(&process, "/ui/waiting", &operator).await).contains("No unmatched events.")
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn page_reports_unreachable_database() {
    let postgres = std::sync::Arc::new(PostgresServer::start_durable("", &[]));
    let server = TestServer::on(Database::create_on(&postgres)).await;
    let process = start_with_ui(&server);
    let operator = session(&process, &server.operator_key).await;
    tokio::task::block_in_place(|| postgres.stop_immediately());
    for path in PAGES {
        let answer = page(&process, path, &operator).await.with_status(503);
        assert!(
            text(&answer).contains("The database does not answer")
                && !answer.header("retry-after").is_empty(),
            "{path}"
        );
    }
    let answer = sign_in(&process, &server.operator_key)
        .await
        .with_status(503);
    assert!(text(&answer).contains("The database does not answer"));
}

/// Returns the event that pays the recorded invoice.
fn proof() -> String {
    let events = fixtures::events();
    fixtures::event_id(
        events
            .iter()
            .find(|event| event["type"] == "invoice.paid")
            .unwrap(),
    )
    .to_owned()
}

/// Returns a command that runs Chromium through Node, or `None` if one is missing, which skips the
/// test unless the environment requires it.
fn browser(arguments: &[&str]) -> Option<Command> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    if root.join("node_modules/playwright-core").is_dir()
        && Path::new("/usr/bin/chromium").is_file()
    {
        let mut command = Command::new("node");
        command
            .arg(root.join("tests/browser/ui.mjs"))
            .args(arguments);
        return Some(command);
    }
    let reason = "Chromium or playwright-core is not there: run ./test, which installs them";
    #[expect(
        clippy::disallowed_methods,
        reason = "not a setting of the program: ./test says that nothing may be left out"
    )]
    let required = std::env::var_os("BROWSER_REQUIRED").is_some_and(|value| value == "1");
    assert!(!required, "{reason}");
    println!("not tested: {reason}");
    None
}

each_database! {
    async fn real_browser_finds_an_invoice_and_its_proof(server: TestServer) {
        for line in fixtures::INVOICES.lines() {
            let document: Value = serde_json::from_str(line).unwrap();
            server
                .put(
                    &invoice_path(document["metadata"]["uid"].as_str().unwrap()),
                    &document,
                )
                .await
                .with_status(201);
        }
        server
            .put(
                "/v1/tenants/other/invoices/inv-other",
                &json!({"status": {"stripeInvoiceId": "in_other"}}),
            )
            .await
            .with_status(201);
        for event in fixtures::events() {
            server.deliver(&event).await.with_status(200);
        }
        server
            .deliver(&paid("evt_nobody", "in_nobody"))
            .await
            .with_status(200);
        server.deliver_bytes(b"no event").await.with_status(200);
        let process = start_with_ui(&server);
        let (document, uid) = fixtures::story_invoice();
        let setting = json!({"base": process.base, "operatorKey": server.operator_key, "tenantKey": server.acme_key, "uid": uid,
            "stripeId": document["status"]["stripeInvoiceId"], "event": proof()});
        let Some(mut browser) = browser(&[&setting.to_string()]) else {
            return;
        };
        let output = tokio::task::spawn_blocking(move || browser.output().unwrap())
            .await
            .unwrap();
        let context = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(output.status.success(), "{context}");
    }
}
