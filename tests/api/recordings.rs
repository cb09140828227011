//! Commands on recorded payloads: replay, rebuild, events and why.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use stripe_reconciler::ingest::{Delivery, prepare};
use stripe_reconciler::store::{NewEvent, Outcome, Store};

use testkit::each_database;
use testkit::{CommandOutput, Files, SECRET, fixtures, invoice_path};

fn texts<'v>(items: &'v [Value], name: &str) -> Vec<&'v str> {
    items
        .iter()
        .map(|item| item[name].as_str().unwrap_or("-"))
        .collect()
}

fn import(url: &str, tenant: &str, lines: &str) -> CommandOutput {
    testkit::run(
        &[("DATABASE_URL", url)],
        &["invoices", "import", "--tenant", tenant, "-"],
        lines.as_bytes(),
    )
}

each_database! {
    async fn replay_reads_every_file_format(server: TestServer) {
        let (document, uid) = fixtures::story_invoice();
        server
            .put(&invoice_path(&uid), &document)
            .await
            .with_status(201);
        for event in fixtures::events() {
            server.deliver(&event).await.with_status(200);
        }

        let states = server.states(&uid).await;
        assert!(states.as_array().unwrap().len() > 3);

        let files = Files::new();
        let pretty = |value: &Value| serde_json::to_string_pretty(value).unwrap();
        let list = json!({"object": "list", "url": "/v1/events", "has_more": false, "data": fixtures::events()});
        for (number, event) in fixtures::events().iter().enumerate() {
            let text = if number == 0 {
                event.to_string()
            } else {
                pretty(event)
            };
            files.add(&format!("folder/{}/{number}.json", number % 3), text);
        }

        files.add("folder/notes.txt", "no event");
        files.add(
            "folder/more/events.jsonl",
            fixtures::events()[0].to_string(),
        );
        let forms: [(String, &str); 7] = [
            (files.path("folder").to_str().unwrap().to_owned(), ""),
            (files.add("list.json", pretty(&list)), ""),
            (files.add("list.jsonl", list.to_string()), ""),
            (
                files.add("array.json", pretty(&json!(fixtures::events()))),
                "",
            ),
            (files.add("lines.jsonl", fixtures::lines().join("\n")), ""),
            ("-".to_owned(), &fixtures::lines().join("\r\n")),
            ("-".to_owned(), &list.to_string()),
        ];

        let count = fixtures::events().len() as u64;
        for (path, input) in forms {
            let database = server.empty_database();
            let run = |arguments: &[&str], input: &str| {
                testkit::run(
                    &[("DATABASE_URL", &database.url)],
                    arguments,
                    input.as_bytes(),
                )
                .with_code(0)
            };
            import(&database.url, "acme", &document.to_string()).with_code(0);
            let counts = run(&["replay", &path, "--json"], input).json();
            let new =
                counts["recorded"].as_u64().unwrap() + counts["no_payment_fact"].as_u64().unwrap();
            assert_eq!(
                (new, counts["refused"].as_u64()),
                (count, Some(0)),
                "{path}: {counts}"
            );
            assert_eq!(
                run(&["invoices", "get", "acme", &uid], "").json()["status"]["states"],
                states,
                "{path}"
            );
            let received = run(&["events", "list", "--json", "--limit", "1000"], "").json_lines();
            assert_eq!(received.len() as u64, count);
            assert!(
                received
                    .iter()
                    .all(|event| event["source"] == "replay" && event["secretLabel"].is_null()),
                "{received:?}"
            );
            let again = run(&["replay", &path], input).stdout;
            assert!(
                again.starts_with("0 recorded, ")
                    && again.contains(" 0 without a payment fact, 0 refused"),
                "{again}"
            );
        }
    }

    async fn replay_locates_invalid_payloads_and_replays_the_rest(server: TestServer) {
        let files = Files::new();
        let mut lines: Vec<String> = fixtures::lines().into_iter().map(str::to_owned).collect();
        let count = lines.len();
        lines.insert(1, r#"{"id": "evt_x", "type": 5}"#.to_owned());
        lines.insert(4, "this is no JSON".to_owned());
        lines.push("[1, 2]".to_owned());
        let file = files.add("recorded.jsonl", lines.join("\n"));
        let missing = files.path("missing").to_str().unwrap().to_owned();
        let output = server.run(&["replay", &file, &missing]).with_code(1);

        assert!(output.stdout.contains("4 refused"), "{}", output.stdout);

        let locations = [
            format!("{file}:2: "),
            format!("{file}:5: "),
            format!("{file}:{}: ", count + 3),
            format!("{missing}: "),
        ];
        for location in &locations {
            assert_eq!(
                output
                    .stderr
                    .lines()
                    .filter(|line| line.starts_with(location))
                    .count(),
                1,
                "{location} in\n{}",
                output.stderr
            );
        }

        assert_eq!(
            output.stderr.lines().count(),
            locations.len(),
            "{}",
            output.stderr
        );
        assert_eq!(
            server
                .run(&["events", "list", "--json", "--limit", "1000"])
                .with_code(0)
                .json_lines()
                .len(),
            count
        );
    }

    async fn replay_to_url_signs_with_the_first_secret(server: TestServer) {
        let files = Files::new();
        let file = files.add("story.jsonl", fixtures::lines().join("\n"));
        let (document, uid) = fixtures::story_invoice();
        server
            .put(&invoice_path(&uid), &document)
            .await
            .with_status(201);
        let to = format!("{}/webhooks/stripe", server.process.base);
        let replay = |secrets: &str, arguments: &[&str]| {
            let environment = if secrets.is_empty() {
                vec![]
            } else {
                vec![("STRIPE_WEBHOOK_SECRET", secrets)]
            };
            testkit::run(
                &environment,
                &[&["replay", "--to"], arguments].concat(),
                b"",
            )
        };

        let refused = replay(&format!("whsec_unknown,{SECRET}"), &[&to, &file]).with_code(1);
        let count = fixtures::events().len();
        assert!(
            refused.stdout.contains(&format!("{count} refused")),
            "{}",
            refused.stdout
        );

        for line in 1..=count {
            let location = format!("{file}:{line}: was rejected with 400");
            assert_eq!(
                refused
                    .stderr
                    .lines()
                    .filter(|count| count.starts_with(&location))
                    .count(),
                1,
                "{location} in {}",
                refused.stderr
            );
        }

        assert_eq!(
            server
                .run(&["events", "list"])
                .with_code(0)
                .stdout
                .lines()
                .count(),
            1
        );

        let counts = replay(
            &format!("new={SECRET},whsec_unknown"),
            &[&to, &file, "--json"],
        )
        .with_code(0)
        .json();
        assert_eq!(
            counts["recorded"].as_u64().unwrap() + counts["no_payment_fact"].as_u64().unwrap(),
            count as u64,
            "{counts}"
        );

        let received = server
            .run(&["events", "list", "--json", "--limit", "1000"])
            .with_code(0)
            .json_lines();
        assert!(
            received
                .iter()
                .all(|event| event["source"] == "webhook" && event["secretLabel"] == "live"),
            "{received:?}"
        );
        assert_eq!(
            server
                .states(&uid)
                .await
                .as_array()
                .unwrap()
                .last()
                .unwrap()["state"],
            "Paid"
        );

        let again = replay(SECRET, &[&to, &file, "--json"]).with_code(0).json();
        assert_eq!(again["duplicate"], count);

        replay("", &[&to, &file]).with_code(2);
        replay(SECRET, &["127.0.0.1:1", &file]).with_code(2);
        let unreachable =
            replay(SECRET, &["http://127.0.0.1:1/webhooks/stripe", &file]).with_code(4);
        assert!(
            unreachable.stderr.contains("127.0.0.1:1"),
            "{}",
            unreachable.stderr
        );
    }

    async fn rebuild_corrects_observations_of_an_older_version(server: TestServer) {
        let (document, uid) = fixtures::story_invoice();
        server
            .put(&invoice_path(&uid), &document)
            .await
            .with_status(201);
        for event in fixtures::events() {
            server.deliver(&event).await.with_status(200);
        }

        let states = server.states(&uid).await;
        for arguments in [&["rebuild", "--dry-run"][..], &["rebuild"]] {
            let output = server.run(arguments).with_code(0);
            assert!(
                output
                    .stdout
                    .starts_with(&format!("{} events read again", fixtures::events().len())),
                "{}",
                output.stdout
            );
        }

        delete_observations(&server.database.url).await;
        assert_eq!(server.states(&uid).await, json!([]));

        for _ in 0..2 {
            let output = server.run(&["rebuild", "--dry-run"]).with_code(3);
            assert!(
                output.stdout.contains(&uid)
                    && output.stdout.contains("acme")
                    && output.stdout.contains("invoice.paid"),
                "{}",
                output.stdout
            );
            assert_eq!(
                server.states(&uid).await,
                json!([]),
                "a dry run changes nothing"
            );
        }

        let dry = server
            .run(&["rebuild", "--dry-run", "--json"])
            .with_code(3)
            .json();
        let report = server.run(&["rebuild", "--json"]).with_code(3).json();
        assert_eq!(report, dry);

        let invoice = report["differing"]
            .as_array()
            .unwrap()
            .iter()
            .find(|i| i["invoiceUid"] == *uid)
            .unwrap();
        assert_eq!(
            (&invoice["stripeInvoiceId"], &invoice["tenantUid"]),
            (&document["status"]["stripeInvoiceId"], &json!("acme"))
        );
        assert_eq!(server.states(&uid).await, states);
        assert_eq!(
            server.run(&["rebuild", "--json"]).with_code(0).json()["differing"],
            json!([])
        );

        server.database.execute("delete from mentions").await;
        assert_eq!(server.states(&uid).await, json!([]));

        let output = server.run(&["rebuild"]).with_code(3);
        assert!(
            output.stdout.contains(&uid)
                && output.stdout.contains("with a missing link to an object that it names"),
            "{}",
            output.stdout
        );
        assert_eq!(server.states(&uid).await, states);

        server.run(&["rebuild", "--dry-run"]).with_code(0);
    }
}

/// Deletes all observations, as if a version had stored the bodies without understanding these
/// types.
async fn delete_observations(database_url: &str) {
    let store = Store::connect(database_url).await.unwrap();
    let unread = |stored: stripe_reconciler::store::StoredBody| {
        let logged = stored.logged;
        let delivery = Delivery {
            body: stored.body.unwrap().into(),
            source: logged.source,
            secret_label: logged.secret_label,
            received_ms: logged.received_ms,
        };
        let unread = NewEvent {
            observation: None,
            mentions: Vec::new(),
            outcome: Outcome::NoPaymentFact,
            ..prepare(delivery)
        };
        (logged.key, unread)
    };

    let stored = store.stored_bodies(None, 1000).await.unwrap();
    store
        .replace_readings(&stored.into_iter().map(unread).collect::<Vec<_>>())
        .await
        .unwrap();
    store.close().await;
}

fn stories() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/stories");
    let files = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    files
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "jsonl")
        })
        .collect()
}

each_database! {
    async fn exported_events_replay_to_the_same_histories(server: TestServer) {
        import(&server.database.url, "acme", fixtures::INVOICES).with_code(0);
        let stories: Vec<String> = stories()
            .iter()
            .map(|path| path.to_str().unwrap().to_owned())
            .collect();
        let arguments: Vec<&str> = ["replay"]
            .into_iter()
            .chain(stories.iter().map(String::as_str))
            .collect();
        server.run(&arguments).with_code(0);
        server
            .deliver_bytes(b"authentic, and no JSON")
            .await
            .with_status(200);

        let exported = server.run(&["events", "export"]).with_code(0);
        assert_eq!(
            exported.json_lines().len() + 1,
            server
                .run(&["events", "list", "--json", "--limit", "100000"])
                .with_code(0)
                .json_lines()
                .len()
        );
        assert!(
            exported.stderr.contains("1 "),
            "what is left out is said: {}",
            exported.stderr
        );

        let elsewhere = server.empty_database();
        testkit::run(
            &[("DATABASE_URL", &elsewhere.url)],
            &["replay", "-"],
            exported.stdout.as_bytes(),
        )
        .with_code(0);
        import(&elsewhere.url, "acme", fixtures::INVOICES).with_code(0);
        let list = |url: &str| {
            testkit::run(
                &[("DATABASE_URL", url)],
                &["invoices", "list", "--json"],
                b"",
            )
            .with_code(0)
            .stdout
        };

        let (here, there) = (list(&server.database.url), list(&elsewhere.url));
        assert!(here.matches("\"state\":\"Paid\"").count() > 10);
        assert_eq!(here, there);
    }

    async fn events_command_lists_and_shows_events(server: TestServer) {
        let events = fixtures::events();
        for event in &events {
            server.deliver(event).await.with_status(200);
        }

        let (first, paid) = (
            &events[0],
            events
                .iter()
                .find(|event| event["type"] == "invoice.paid")
                .unwrap(),
        );
        let stripe_invoice_id = paid["data"]["object"]["id"].as_str().unwrap();
        let mut rendered = paid.clone();
        rendered["api_version"] = json!("2022-11-15");
        server.deliver(&rendered).await.with_status(200);
        server
            .deliver_bytes(b"authentic, and no JSON")
            .await
            .with_status(200);

        let list = |arguments: &[&str]| {
            server
                .run(&[&["events", "list", "--json", "--limit", "1000"], arguments].concat())
                .with_code(0)
                .json_lines()
        };
        let all = list(&[]);
        assert_eq!(all.len(), events.len() + 2);
        assert!(
            all.iter()
                .map(|event| event["receivedAt"].as_str().unwrap())
                .is_sorted_by(|a, b| a >= b),
            "the latest received first"
        );

        assert_eq!(
            texts(&list(&["--type", "invoice.paid"]), "id"),
            [fixtures::event_id(paid); 2]
        );
        assert_eq!(texts(&list(&["--outcome", "unreadable"]), "id"), ["-"]);
        assert!(
            list(&["--outcome", "recorded"])
                .iter()
                .all(|event| event["outcome"] == "recorded")
        );
        assert!(
            list(&["--invoice", stripe_invoice_id, "--type", "invoice.paid"]).len() == 2
                && list(&["--invoice", "in_unknown"]).is_empty()
        );

        assert_eq!(
            server
                .run(&["events", "list", "--limit", "3", "--json"])
                .with_code(0)
                .json_lines(),
            all[..3]
        );

        let table = server
            .run(&["events", "list", "--type", "invoice.paid"])
            .with_code(0)
            .stdout;
        for part in [
            fixtures::event_id(paid),
            "invoice.paid",
            "recorded",
            "webhook",
            "live",
        ] {
            assert!(
                table.lines().nth(1).unwrap().contains(part),
                "{part} is missing in\n{table}"
            );
        }

        let shown = server
            .run(&["events", "show", fixtures::event_id(paid), "--json"])
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
            [paid, &rendered],
            "all renderings, oldest receipt first"
        );

        let shown = server
            .run(&["events", "show", fixtures::event_id(first)])
            .with_code(0)
            .stdout;
        assert!(
            shown.contains(&first.to_string()) && shown.contains("live"),
            "{shown}"
        );

        server.run(&["events", "show", "evt_unknown"]).with_code(1);
        for unfit in [
            &["--limit", "0"][..],
            &["--limit", "x"],
            &["--outcome", "duplicate"],
            &["--unknown"],
        ] {
            server
                .run(&[&["events", "list"], unfit].concat())
                .with_code(2);
        }
    }

    async fn why_prints_the_proofs_of_each_entry(server: TestServer) {
        let (mut document, uid) = fixtures::story_invoice();
        document["status"]["states"] = json!([{"state": "PaymentPending", "timestamp": "2020-01-01T00:00:00Z", "paymentMsg": "Imported."}]);
        server
            .put(&invoice_path(&uid), &document)
            .await
            .with_status(201);
        let empty = server
            .run(&["why", "acme", &uid, "--json"])
            .with_code(0)
            .json();

        assert_eq!(empty["entries"].as_array().unwrap().len(), 1);

        for event in fixtures::events() {
            server.deliver(&event).await.with_status(200);
        }

        let why = server
            .run(&["why", "acme", &uid, "--json"])
            .with_code(0)
            .json();
        assert_eq!(
            (
                &why["tenantUid"],
                &why["invoiceUid"],
                &why["stripeInvoiceId"]
            ),
            (
                &json!("acme"),
                &json!(uid),
                &document["status"]["stripeInvoiceId"]
            )
        );

        let entries = why["entries"].as_array().unwrap();
        let as_state = |entry: &Value| json!({"state": entry["state"], "timestamp": entry["timestamp"], "paymentMsg": entry["paymentMsg"]});
        assert_eq!(
            entries.iter().map(as_state).collect::<Value>(),
            server.states(&uid).await
        );
        assert_eq!(
            (&entries[0]["imported"], &entries[0]["proofs"]),
            (&json!(true), &json!([]))
        );

        let text = server.run(&["why", "acme", &uid]).with_code(0).stdout;
        assert!(text.contains("imported with the stored invoice"), "{text}");

        for entry in &entries[1..] {
            let proofs = entry["proofs"].as_array().unwrap();
            assert!(!proofs.is_empty() && entry["imported"] == false, "{entry}");
            for proof in proofs {
                let id = proof["id"].as_str().unwrap();
                let event = fixtures::events()
                    .into_iter()
                    .find(|event| fixtures::event_id(event) == id)
                    .unwrap();
                assert_eq!(
                    (&proof["type"], &proof["source"], &proof["secretLabel"]),
                    (&event["type"], &json!("webhook"), &json!("live"))
                );
                let (happened, received) = (
                    proof["createdAt"].as_str().unwrap(),
                    proof["receivedAt"].as_str().unwrap(),
                );
                let line = text.lines().find(|line| line.contains(id)).unwrap();
                for part in [
                    proof["type"].as_str().unwrap(),
                    &format!("happened {happened}"),
                    &format!("received {received}"),
                    "webhook",
                    "live",
                ] {
                    assert!(line.contains(part), "{part} is missing in {line}");
                }
            }
        }

        assert!(
            entries.last().unwrap()["proofs"]
                .as_array()
                .unwrap()
                .iter()
                .any(|proof| proof["type"] == "invoice.paid")
        );

        server.run(&["why", "acme", "unknown"]).with_code(1);
        server.run(&["why", "beta", &uid]).with_code(1);
    }
}

each_database! {
    async fn prune_deletes_bodies_but_keeps_facts_and_ids(server: TestServer) {
        server.store("a", "in_1").await.with_status(201);
        let paid = json!({"id": "evt_1", "object": "event", "type": "invoice.paid", "created": 1_769_850_000, "livemode": true,
            "data": {"object": {"id": "in_1", "object": "invoice", "status": "paid", "currency": "eur", "amount_due": 5000, "amount_paid": 5000}}});
        server.deliver(&paid).await.with_status(200);
        server.deliver_bytes(b"no event").await.with_status(200);
        let before = server.states("a").await;

        assert_eq!(
            server
                .run(&["events", "prune", "--older-than", "90d", "--json"])
                .with_code(0)
                .json(),
            json!({"forgotten": 0})
        );

        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while server
            .run(&["events", "prune", "--older-than", "1s", "--json"])
            .with_code(0)
            .json()
            != json!({"forgotten": 1})
        {
            assert!(
                std::time::Instant::now() < deadline,
                "an event of a second ago is never forgotten"
            );
        }
        assert_eq!(server.states("a").await, before);
        assert!(
            server
                .run(&["events", "show", "evt_1"])
                .with_code(0)
                .stdout
                .contains("its bytes are pruned")
        );

        assert_eq!(server.deliver(&paid).await.json()["outcome"], "duplicate");
        assert_eq!(
            server.deliver_bytes(b"no event").await.json()["outcome"],
            "duplicate"
        );

        let rebuilt = server.run(&["rebuild", "--json"]).with_code(0).json();
        assert_eq!(
            (&rebuilt["events"], &rebuilt["pruned"]),
            (&json!(2), &json!(1))
        );
        assert_eq!(server.states("a").await, before);

        for wrong in ["90", "d", "-1d", "", "0d"] {
            server
                .run(&["events", "prune", &format!("--older-than={wrong}")])
                .with_code(2);
        }
    }
}
