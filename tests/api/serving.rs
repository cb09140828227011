//! `serve` and its configuration: start-up output, rejected configurations, and data that it never
//! shows.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdout, Stdio};

use serde_json::{Value, json};
use stripe_reconciler::clock::Clock;
use tempfile::TempDir;

use testkit::each_database;
use testkit::{CommandOutput, SECRET, binary, client, invoice_path, send, signature};

/// A `serve` process with all its output.
struct Served {
    base: String,
    process: Child,
    stdout: BufReader<ChildStdout>,
    folder: TempDir,
}

impl Served {
    /// Starts `serve`. Returns when it has printed its address.
    fn start(environment: &[(&str, &str)], arguments: &[&str]) -> Served {
        let folder = tempfile::tempdir().unwrap();
        // A file, because a pipe that is not read fills up.
        let stderr = File::create(folder.path().join("stderr")).unwrap();
        let mut command = binary(environment);
        let mut process = command
            .arg("serve")
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .unwrap();
        let mut stdout = BufReader::new(process.stdout.take().unwrap());
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();

        let error = || {
            format!(
                "{line:?}, and {}",
                std::fs::read_to_string(folder.path().join("stderr")).unwrap()
            )
        };
        let base = line
            .strip_prefix("listening on ")
            .and_then(|base| base.strip_suffix('\n'))
            .unwrap_or_else(|| panic!("{}", error()));

        Served {
            base: base.to_owned(),
            process,
            stdout,
            folder,
        }
    }

    async fn deliver(&self, secret: &str, body: &str) -> u16 {
        let signature = signature(secret, Clock::system().now_s(), body.as_bytes());
        let url = format!("{}/webhooks/stripe", self.base);
        send(
            &client(),
            "POST",
            &url,
            &[("Stripe-Signature", &signature)],
            body.into(),
        )
        .await
        .status
        .as_u16()
    }

    async fn get(&self, path: &str, key: &str) -> u16 {
        send(
            &client(),
            "GET",
            &format!("{}{path}", self.base),
            &[("ApiKey", key)],
            vec![],
        )
        .await
        .status
        .as_u16()
    }

    /// Sends the signal and waits for the end. `stdout` has the lines after the first.
    fn end(mut self, signal: &str) -> CommandOutput {
        let sent = std::process::Command::new("kill")
            .args([signal, &self.process.id().to_string()])
            .status()
            .unwrap();
        assert!(sent.success());

        let code = self
            .process
            .wait()
            .unwrap()
            .code()
            .expect("it ends by itself");
        let mut stdout = String::new();
        self.stdout.read_to_string(&mut stdout).unwrap();

        CommandOutput {
            code,
            stdout,
            stderr: std::fs::read_to_string(self.folder.path().join("stderr")).unwrap(),
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // The process may have ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn event(id: &str) -> String {
    json!({"id": id, "object": "event", "type": "customer.updated", "created": 1_769_850_000, "data": {"object": {"id": "cus_1", "name": "Payload Inc."}}}).to_string()
}

/// Returns the error with which `serve` refuses to start.
fn refused(environment: &[(&str, &str)], arguments: &[&str]) -> String {
    let output = testkit::run(environment, &[&["serve"], arguments].concat(), b"").with_code(2);
    assert_eq!(output.stdout, "");
    output.stderr
}

each_database! {
    async fn serve_prints_its_address_first_and_is_then_ready(server: TestServer) {
        let empty = server.empty_database();
        for signal in ["-TERM", "-INT"] {
            let environment = [
                ("DATABASE_URL", empty.url.as_str()),
                ("LISTEN_ADDR", "127.0.0.1:0"),
                ("STRIPE_WEBHOOK_SECRET", SECRET),
            ];
            let served = Served::start(&environment, &[]);
            assert!(
                served.base.starts_with("http://127.0.0.1:") && !served.base.ends_with(":0"),
                "{}",
                served.base
            );
            for path in ["/readyz", "/healthz"] {
                assert_eq!(served.get(path, "").await, 200);
            }
            assert_eq!(served.deliver(SECRET, &event("evt_1")).await, 200);
            let output = served.end(signal).with_code(0);
            assert_eq!(output.stdout, "", "a script reads one line");
        }

        let events = testkit::run(
            &[("DATABASE_URL", &empty.url)],
            &["events", "list", "--json"],
            b"",
        )
        .with_code(0)
        .json_lines();
        assert_eq!(
            events.len(),
            1,
            "what was answered before the signal is kept"
        );
    }

    async fn setting_is_read_from_file_and_flag_overrides_it(server: TestServer) {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            std::fs::write(folder.path().join(name), text).unwrap();
            folder.path().join(name).to_str().unwrap().to_owned()
        };
        let (url, address) = (
            file("url", &format!("{}\n", server.database.url)),
            file("address", " 127.0.0.1:0\n"),
        );
        let secret = file(
            "secret",
            "old=whsec_of_the_file,\nwhsec_second_of_the_file\n\n",
        );
        let in_files = [
            ("DATABASE_URL_FILE", url.as_str()),
            ("LISTEN_ADDR_FILE", &address),
            ("STRIPE_WEBHOOK_SECRET_FILE", &secret),
        ];

        let served = Served::start(&in_files, &[]);
        assert_eq!(
            served
                .get("/v1/tenants/acme/invoices", &server.acme_key)
                .await,
            200
        );
        assert_eq!(
            served.deliver("whsec_of_the_file", &event("evt_1")).await,
            200
        );
        assert_eq!(
            served
                .deliver("whsec_second_of_the_file", &event("evt_2"))
                .await,
            200
        );

        assert_eq!(
            served.deliver("whsec_of_the_flag", &event("evt_3")).await,
            400
        );

        served.end("-TERM").with_code(0);
        let flags = [
            "--database-url",
            &server.database.url,
            "--listen-addr",
            "127.0.0.1:0",
            "--stripe-webhook-secret",
            "whsec_of_the_flag",
            "--log-filter",
            "warn",
            "--log-format",
            "text",
            "--max-connections",
            "100",
        ];

        let unfit = [
            ("DATABASE_URL", "unfit"),
            ("LISTEN_ADDR", "unfit"),
            ("STRIPE_WEBHOOK_SECRET", "whsec_of_the_variable"),
            ("RUST_LOG", "[["),
            ("LOG_FORMAT", "unfit"),
            ("MAX_CONNECTIONS", "unfit"),
        ];
        for environment in [&unfit[..], &in_files[..]] {
            let served = Served::start(environment, &flags);
            assert_eq!(
                served
                    .get("/v1/tenants/acme/invoices", &server.acme_key)
                    .await,
                200
            );
            assert_eq!(
                served.deliver("whsec_of_the_flag", &event("evt_3")).await,
                200
            );
            assert_eq!(
                served
                    .deliver("whsec_of_the_variable", &event("evt_4"))
                    .await,
                400
            );
            assert_eq!(
                served.deliver("whsec_of_the_file", &event("evt_4")).await,
                400
            );
            served.end("-TERM").with_code(0);
        }

        let of_other_commands = testkit::run(
            &[("DATABASE_URL", "unfit")],
            &["keys", "list", "--database-url", &server.database.url],
            b"",
        );
        assert!(of_other_commands.with_code(0).stdout.contains("operator"));
    }

    async fn occupied_address_is_reported_in_plain_text(server: TestServer) {
        let environment = [
            ("DATABASE_URL", server.database.url.as_str()),
            ("STRIPE_WEBHOOK_SECRET", SECRET),
        ];
        let error = refused(&environment, &["--listen-addr", server.process.authority()]);
        assert!(error.contains(server.process.authority()), "{error}");
    }

    async fn log_contains_no_secret_and_no_payload(server: TestServer) {
        server.store("a", "in_1").await.with_status(201);
        for format in ["json", "text"] {
            let environment = [
                ("DATABASE_URL", server.database.url.as_str()),
                ("LISTEN_ADDR", "127.0.0.1:0"),
                ("RUST_LOG", "trace"),
                (
                    "STRIPE_WEBHOOK_SECRET",
                    "live=whsec_never_shown_1,whsec_never_shown_2",
                ),
                ("LOG_FORMAT", format),
            ];
            let served = Served::start(&environment, &[]);
            let signature = signature(
                "whsec_never_shown_1",
                Clock::system().now_s(),
                event("evt_1").as_bytes(),
            );
            assert_eq!(
                served
                    .deliver("whsec_never_shown_1", &event(&format!("evt_{format}")))
                    .await,
                200
            );
            assert_eq!(
                served.deliver("whsec_never_shown_3", &event("evt_2")).await,
                400
            );
            assert_eq!(served.get(&invoice_path("a"), &server.acme_key).await, 200);
            assert_eq!(served.get(&invoice_path("a"), "never_shown_key").await, 401);
            let output = served.end("-TERM").with_code(0);
            assert!(
                output.stderr.contains("request"),
                "it does log: {}",
                output.stderr
            );
            let shapes = output
                .stderr
                .lines()
                .filter(|line| serde_json::from_str::<Value>(line).is_ok())
                .count();
            assert_eq!(
                shapes,
                if format == "json" {
                    output.stderr.lines().count()
                } else {
                    0
                }
            );
            for hidden in [
                "never_shown",
                &server.acme_key,
                &server.acme_key[8..],
                "Payload Inc.",
                &signature[..2 + 10 + 1 + 3 + 8],
            ] {
                assert!(
                    !output.stderr.contains(hidden),
                    "{hidden} stands in\n{}",
                    output.stderr
                );
            }
        }
    }
}

#[test]
fn every_configuration_error_is_reported_at_once() {
    let unfit = [
        ("DATABASE_URL", "mysql://u:hidden@h/x"),
        ("LISTEN_ADDR", "here"),
        ("RUST_LOG", "[["),
        ("LOG_FORMAT", "xml"),
        ("MAX_CONNECTIONS", "15"),
    ];
    let error = refused(&unfit, &[]);

    for name in [
        "DATABASE_URL",
        "LISTEN_ADDR",
        "RUST_LOG",
        "LOG_FORMAT",
        "MAX_CONNECTIONS",
        "STRIPE_WEBHOOK_SECRET",
    ] {
        assert!(error.contains(name), "{name} is missing in\n{error}");
    }

    assert!(!error.contains("hidden"), "{error}");

    let flags = [
        "--database-url",
        "mysql://x",
        "--listen-addr",
        "here",
        "--log-filter",
        "[[",
        "--log-format",
        "xml",
        "--max-connections",
        "many",
        "--stripe-webhook-secret",
        "a=,b=",
    ];

    let error = refused(&[], &flags);
    for word in ["sqlite://", "here", "[[", "xml", "many", "`a`", "`b`"] {
        assert!(error.contains(word), "{word} is missing in\n{error}");
    }

    // Without a secret, no delivery could be authenticated.
    for environment in [
        &[][..],
        &[("STRIPE_WEBHOOK_SECRET", "")],
        &[("STRIPE_WEBHOOK_SECRET", " , ")],
    ] {
        assert!(refused(environment, &[]).contains("STRIPE_WEBHOOK_SECRET"));
    }
}

#[test]
fn variable_next_to_its_file_or_missing_file_is_rejected() {
    for name in [
        "DATABASE_URL",
        "LISTEN_ADDR",
        "STRIPE_WEBHOOK_SECRET",
        "RUST_LOG",
        "LOG_FORMAT",
        "MAX_CONNECTIONS",
    ] {
        let file = format!("{name}_FILE");
        let error = refused(&[(name, "info"), (&file, "/dev/null")], &[]);
        assert!(error.contains(&file) && error.contains("both"), "{error}");
        let error = refused(&[(&file, "/no/such/file")], &[]);
        assert!(
            error.contains(&file) && error.contains("/no/such/file"),
            "{error}"
        );
    }
}

#[test]
fn configuration_errors_and_help_show_no_secret() {
    let unfit = [
        "whsec_hidden,whsec_hidden",
        "live=whsec_hidden,live=whsec_hidden_too",
        "whsec_hidden=",
        "live=whsec_hid\u{e9}den",
        "=whsec_hidden,=",
        "whsec_hidden,a=",
        "a b=whsec_hidden,a",
    ];
    for secrets in unfit {
        let output = testkit::run(
            &[("STRIPE_WEBHOOK_SECRET", secrets), ("LISTEN_ADDR", "unfit")],
            &["serve"],
            b"",
        )
        .with_code(2);
        let error = format!("{}{}", output.stdout, output.stderr);
        assert!(
            !error.contains("whsec_hid"),
            "{secrets} is answered {error}"
        );
    }

    let environment = [
        ("STRIPE_WEBHOOK_SECRET", "whsec_hidden"),
        ("DATABASE_URL", "postgres://u:hidden@h/x"),
        ("STRIPE_API_KEY", "sk_hidden"),
    ];
    for arguments in [
        &["--help"][..],
        &["serve", "--help"],
        &["replay", "--help"],
        &["serve", "-h"],
        &["serve", "--unknown"],
    ] {
        let output = testkit::run(&environment, arguments, b"");
        assert!(
            !format!("{}{}", output.stdout, output.stderr).contains("hidden"),
            "{arguments:?}"
        );
    }
}
