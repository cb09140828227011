//! The commands for invoices, keys and migrations: inputs, output for people and scripts, and exit
//! codes. Also exit codes and help of all commands.

use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;

use serde_json::json;

use testkit::each_database;
use testkit::{Files, SECRET, binary, fixtures, invoice_path};

each_database! {
    async fn import_reads_every_file_format_and_applies_at_once(server: TestServer) {
        let files = Files::new();
        let document = |uid: &str| json!({"metadata": {"uid": uid}, "status": {"stripeInvoiceId": format!("in_{uid}")}});
        let one = files.add(
            "one.json",
            serde_json::to_string_pretty(&document("one")).unwrap(),
        );
        let array = files.add(
            "array.json",
            serde_json::to_string_pretty(&json!([document("a1"), document("a2")])).unwrap(),
        );
        let lines = files.add(
            "lines.jsonl",
            format!("{}\n\n{}\r\n", document("l1"), document("l2")),
        );

        let arguments = [
            "invoices", "import", "--tenant", "acme", &one, &array, &lines, "-",
        ];
        let first = server
            .run_with_input(&arguments, document("in").to_string().as_bytes())
            .with_code(0);
        assert_eq!(
            (first.stdout.as_str(), first.stderr.as_str()),
            ("6 stored, 0 replaced, 0 refused\n", "")
        );

        let again = server
            .run_with_input(
                &[&arguments[..], &["--json"]].concat(),
                document("new").to_string().as_bytes(),
            )
            .with_code(0);
        assert_eq!(
            again.json(),
            json!({"created": 1, "replaced": 5, "refused": 0})
        );

        for uid in ["one", "a1", "a2", "l1", "l2", "in", "new"] {
            let invoice = server
                .get(&invoice_path(uid), &server.acme_key)
                .await
                .with_status(200)
                .invoice();
            assert_eq!(invoice["status"]["stripeInvoiceId"], format!("in_{uid}"));
        }
    }

    async fn import_locates_invalid_documents_and_stores_the_rest(server: TestServer) {
        server.store("holder", "in_taken").await.with_status(201);
        server.store("fixed", "in_fixed").await.with_status(201);
        let files = Files::new();
        let faulty = files.add("faulty.jsonl", [
            r#"{"metadata": {"uid": "good-1"}}"#,
            r#"{"metadata": {"name": "nameless"}, "status": {"billableAmount": "1"}}"#,
            r#"{"metadata": {"uid": "broken""#,
            "",
            r#"{"metadata": {"uid": "faulty", "labels": {"a/b": 1}}, "spec": {"month": "January"}}"#,
            r#"{"metadata": {"uid": "thief"}, "status": {"stripeInvoiceId": "in_taken"}}"#,
            r#"{"metadata": {"uid": "fixed"}, "status": {"stripeInvoiceId": "in_other"}}"#,
            r#"[{"metadata": {"uid": "in-a-list"}}]"#,
            r#"{"metadata": {"uid": "good-2"}}"#,
        ].join("\n"));

        let missing = files.path("missing.jsonl").to_str().unwrap().to_owned();
        let arguments = [
            "invoices", "import", "--tenant", "acme", &missing, &faulty, "-",
        ];
        let output = server
            .run_with_input(&arguments, b"{}\n{\"metadata\": {\"uid\": \"good-3\"}}")
            .with_code(1);
        assert_eq!(output.stdout, "3 stored, 0 replaced, 8 refused\n");

        let mut printed: Vec<&str> = output.stderr.lines().collect();
        let locations = [
            format!("{missing}: cannot be read"),
            format!("{faulty}:2: /metadata/uid: "),
            format!("{faulty}:2: /status/billableAmount: "),
            format!("{faulty}:3: ends in the middle"),
            format!("{faulty}:5: /metadata/labels/a~1b: "),
            format!("{faulty}:5: /spec/month: "),
            format!("{faulty}:6: /status/stripeInvoiceId: "),
            format!("{faulty}:7: /status/stripeInvoiceId: "),
            format!("{faulty}:8: must"),
            "standard input:1: /metadata/uid: ".to_owned(),
        ];
        printed.sort_unstable();

        let mut expected: Vec<&str> = locations.iter().map(String::as_str).collect();
        expected.sort_unstable();
        assert_eq!(printed.len(), expected.len(), "{printed:#?}");

        for (printed, expected) in printed.iter().zip(expected) {
            assert!(
                printed.starts_with(expected) && printed.len() > expected.len() + 4,
                "{printed:?} is not {expected:?}"
            );
        }

        for uid in ["good-1", "good-2", "good-3"] {
            server
                .get(&invoice_path(uid), &server.acme_key)
                .await
                .with_status(200);
        }

        server
            .run(&["invoices", "import", "--tenant", "", &faulty])
            .with_code(2);
    }

    async fn import_reads_many_lines_and_tolerates_closed_pipe(server: TestServer) {
        let line = |number: usize| {
            match number {
            10_000 => "{\"metadata\": {\"uid\": \"x\"}, \"status\": {\"billableAmount\": \"much\"}}".to_owned(),
            _ => json!({"metadata": {"uid": format!("inv-{number:05}"), "name": "A name as long as names are"}, "status": {"billableAmount": number}}).to_string(),
        }
        };
        let lines: Vec<String> = (1..=20_000).map(line).collect();
        let import = ["invoices", "import", "--tenant", "acme", "-"];
        let output = server
            .run_with_input(&import, lines.join("\n").as_bytes())
            .with_code(1);

        assert_eq!(output.stdout, "19999 stored, 0 replaced, 1 refused\n");
        assert!(
            output
                .stderr
                .starts_with("standard input:10000: /status/billableAmount: "),
            "{}",
            output.stderr
        );
        assert_eq!(output.stderr.lines().count(), 1);

        for uid in ["inv-00001", "inv-09999", "inv-10001", "inv-20000"] {
            server
                .get(&invoice_path(uid), &server.acme_key)
                .await
                .with_status(200);
        }

        for arguments in [&["invoices", "list", "--json"][..], &["invoices", "list"]] {
            let mut command = binary(&[("DATABASE_URL", &server.database.url)]);
            let mut process = command
                .args(arguments)
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            let mut line = String::new();
            // Closes the pipe, as `| head -1` does.
            BufReader::new(process.stdout.take().unwrap())
                .read_line(&mut line)
                .unwrap();
            let mut printed = String::new();
            process
                .stderr
                .take()
                .unwrap()
                .read_to_string(&mut printed)
                .unwrap();
            assert_eq!(
                (process.wait().unwrap().code(), printed.as_str()),
                (Some(0), ""),
                "{arguments:?}"
            );
            assert!(!line.is_empty());
        }
    }

    async fn invoice_commands_print_what_http_answers(server: TestServer) {
        let (document, uid) = fixtures::story_invoice();
        server
            .put(&invoice_path(&uid), &document)
            .await
            .with_status(201);
        server
            .put(&invoice_path("none"), &json!({"metadata": {"uid": "none"}}))
            .await
            .with_status(201);
        server
            .put(
                "/v1/tenants/beta/invoices/b",
                &json!({"metadata": {"uid": "b"}}),
            )
            .await
            .with_status(201);

        for event in fixtures::events() {
            server.deliver(&event).await.with_status(200);
        }

        let shown = server.run(&["invoices", "get", "acme", &uid]).with_code(0);
        let read = server
            .get(&invoice_path(&uid), &server.acme_key)
            .await
            .with_status(200)
            .invoice();
        assert_eq!(testkit::assert_is_invoice(&shown.stdout), read);

        server.run(&["invoices", "get", "beta", &uid]).with_code(1);
        let listed = server
            .get("/v1/tenants/acme/invoices", &server.acme_key)
            .await
            .with_status(200)
            .json();
        let lines = server
            .run(&["invoices", "list", "--tenant", "acme", "--json"])
            .with_code(0)
            .json_lines();
        assert_eq!(json!(lines), listed["items"]);

        let uids = |arguments: &[&str]| {
            let lines = server
                .run(&[&["invoices", "list", "--json"], arguments].concat())
                .with_code(0)
                .json_lines();
            let mut uids: Vec<String> = lines
                .iter()
                .map(|line| line["metadata"]["uid"].as_str().unwrap().to_owned())
                .collect();
            uids.sort();
            uids
        };
        assert_eq!(uids(&[]), ["b", &uid, "none"]);
        assert_eq!(uids(&["--state", "Paid"]), [&*uid]);

        assert_eq!(uids(&["--state", "none", "--tenant", "acme"]), ["none"]);
        assert_eq!(uids(&["--tenant", "nobody"]), [""; 0]);

        server
            .run(&["invoices", "list", "--state", "paid"])
            .with_code(2);
        let table = server
            .run(&["invoices", "list", "--tenant", "acme"])
            .with_code(0)
            .stdout;
        let row = table.lines().find(|line| line.contains(&uid)).unwrap();
        let last = read["status"]["states"].as_array().unwrap().last().unwrap();

        for part in [
            "acme",
            "Paid",
            last["timestamp"].as_str().unwrap(),
            last["paymentMsg"].as_str().unwrap(),
        ] {
            assert!(row.contains(part), "{part} is missing in {row}");
        }
    }

    async fn key_is_printed_once_and_valid_until_revoked(server: TestServer) {
        for (arguments, opens_beta) in [
            (["--tenant", "acme"].as_slice(), 404),
            (&["--operator"], 200),
            (&["--tenant", "acme", "--expires-in", "90d"], 404),
        ] {
            server.put("/v1/tenants/beta/invoices/b", &json!({})).await;
            let output = server
                .run(&[&["keys", "create"], arguments].concat())
                .with_code(0);
            let key = output.stdout.strip_suffix('\n').unwrap();
            assert!(
                key.len() >= 32 && key.bytes().all(|byte| byte.is_ascii_graphic()),
                "alone on standard output: {key:?}"
            );
            server
                .get("/v1/tenants/acme/invoices", key)
                .await
                .with_status(200);
            server
                .get("/v1/tenants/beta/invoices/b", key)
                .await
                .with_status(opens_beta);
            let id = output.stderr.split_once(':').unwrap().0.to_owned();
            let list = server.run(&["keys", "list", "--json"]).with_code(0);
            let listed = list
                .json()
                .as_array()
                .unwrap()
                .iter()
                .find(|listed| listed["id"] == *id)
                .unwrap()
                .clone();
            assert_eq!(
                (listed["operator"] == true, listed["tenantUid"].as_str()),
                (opens_beta == 200, (opens_beta == 404).then_some("acme"))
            );
            assert_eq!(listed["expiresAt"].is_null(), arguments.len() < 4);
            let table = server.run(&["keys", "list"]).with_code(0).stdout;
            assert!(
                table.contains(&id)
                    && !format!("{table}{}{}", list.stdout, output.stderr)
                        .contains(&key[key.len() / 2..])
            );
            server.run(&["keys", "revoke", &id]).with_code(0);
            server
                .get("/v1/tenants/acme/invoices", key)
                .await
                .with_error(401, "Unauthorized");
            server.run(&["keys", "revoke", &id]).with_code(1);
            let table = server.run(&["keys", "list"]).with_code(0).stdout;
            assert!(
                table
                    .lines()
                    .any(|line| line.contains(&id) && line.contains("revoked")),
                "{table}"
            );
        }

        server.run(&["keys", "revoke", "key_unknown"]).with_code(1);
        let unfit = [
            &[][..],
            &["--tenant", "a", "--operator"],
            &["--expires-in", "1d"],
            &["--tenant", ""],
            &["--operator", "--expires-in", "1"],
            &["--operator", "--expires-in", "0d"],
            &["--operator", "--expires-in", "-1d"],
            &["--operator", "--expires-in", "999999999999d"],
        ];

        for arguments in unfit {
            server
                .run(&[&["keys", "create"], arguments].concat())
                .with_code(2);
        }
    }

    async fn migrate_runs_once(server: TestServer) {
        let database = server.empty_database();
        let migrate = || {
            testkit::run(&[("DATABASE_URL", &database.url)], &["migrate"], b"")
                .with_code(0)
                .stdout
        };
        let first = migrate();
        assert!(
            !first.is_empty() && first.lines().all(|line| line.starts_with("applied ")),
            "{first}"
        );
        assert_eq!(migrate(), "nothing to apply\n");

        let as_json = |url| {
            testkit::run(&[("DATABASE_URL", url)], &["migrate", "--json"], b"")
                .with_code(0)
                .json()
        };
        assert_eq!(as_json(&database.url), json!({"applied": []}));

        let applied = as_json(&server.empty_database().url);
        assert_eq!(
            (
                &applied["applied"][0],
                applied["applied"].as_array().unwrap().len()
            ),
            (&json!("start"), first.lines().count())
        );

        testkit::run(
            &[("DATABASE_URL", &database.url)],
            &["invoices", "list"],
            b"",
        )
        .with_code(0);
    }
}

#[test]
fn every_command_exits_4_if_database_is_unreachable() {
    let environment = [
        ("DATABASE_URL", "sqlite:///no/such/folder/test.db"),
        ("STRIPE_WEBHOOK_SECRET", SECRET),
        ("LISTEN_ADDR", "127.0.0.1:0"),
    ];
    let commands = [
        "serve",
        "migrate",
        "rebuild",
        "keys list",
        "keys create --operator",
        "keys revoke key_1",
        "invoices list",
        "invoices get acme a",
        "invoices import --tenant acme -",
        "events list",
        "events show evt_1",
        "events export",
        "why acme a",
        "replay -",
    ];

    for command in commands {
        let output =
            testkit::run(&environment, &command.split(' ').collect::<Vec<_>>(), b"").with_code(4);
        assert!(
            output.stdout.is_empty() && output.stderr.contains("/no/such/folder/test.db"),
            "{command}: {}",
            output.stderr
        );
    }
}

#[test]
fn invalid_command_exits_2_and_creates_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("sqlite://{}/test.db", folder.path().display());
    let commands = [
        "",
        "unknown",
        "keys",
        "keys create",
        "invoices",
        "invoices get acme",
        "invoices import --tenant acme",
        "invoices import -",
        "replay",
        "why acme",
        "events show",
        "serve --unknown",
        "rebuild --dry",
        "migrate more",
        "--log-format xml keys list",
        "--log-filter [[ keys list",
    ];

    for command in commands {
        let arguments: Vec<&str> = command.split(' ').filter(|part| !part.is_empty()).collect();
        let output = testkit::run(&[("DATABASE_URL", &url)], &arguments, b"").with_code(2);
        assert!(
            output.stdout.is_empty() && !output.stderr.is_empty(),
            "{command}: {}",
            output.stdout
        );
    }

    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn help_of_every_command_shows_examples() {
    let mut asked: Vec<Vec<String>> = vec![vec![]];
    let mut commands = 0;
    while let Some(command) = asked.pop() {
        let arguments: Vec<&str> = command
            .iter()
            .map(String::as_str)
            .chain(["--help"])
            .collect();
        let help = testkit::run(&[], &arguments, b"").with_code(0).stdout;
        let examples = help
            .split_once("\nExample")
            .map_or("", |(_, examples)| examples);
        assert!(
            examples.contains("stripe-reconciler "),
            "{command:?} shows none:\n{help}"
        );
        let below = help
            .split_once("\nCommands:\n")
            .map_or("", |(_, below)| below.split("\n\n").next().unwrap());
        let names = below
            .lines()
            .filter_map(|line| line.strip_prefix("  ")?.split(' ').next())
            .filter(|name| !["", "help"].contains(name));
        asked.extend(names.map(|name| [command.clone(), vec![name.to_owned()]].concat()));
        commands += 1;
    }

    assert!(commands > 15, "{commands}");
}
