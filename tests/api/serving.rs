//! `serve` and its configuration: what it says when it starts, what it refuses to start with, and what it never shows.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdout, Stdio};

use serde_json::{Value, json};
use stripe_reconciler::clock::Clock;
use tempfile::TempDir;

use testkit::each_database;
use testkit::{CommandOutput, SECRET, binary, client, invoice_path, send, signature};

/// A `serve` that ends when it is told to, all its output kept.
struct Served {
    base: String,
    process: Child,
    stdout: BufReader<ChildStdout>,
    folder: TempDir,
}

impl Served {
    /// Returns when it has said where it listens.
    fn start(environment: &[(&str, &str)], arguments: &[&str]) -> Served {
        let folder = tempfile::tempdir().unwrap();
        // A file, for a pipe that nobody reads fills up.
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
        let told = || {
            format!(
                "{line:?}, and {}",
                std::fs::read_to_string(folder.path().join("stderr")).unwrap()
            )
        };
        let base = line
            .strip_prefix("listening on ")
            .and_then(|base| base.strip_suffix('\n'))
            .unwrap_or_else(|| panic!("{}", told()));
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

    /// Sends the signal, waits for the end; stdout is what followed the first line.
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
        // It may have ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn event(id: &str) -> String {
    json!({"id": id, "object": "event", "type": "customer.updated", "created": 1_769_850_000, "data": {"object": {"id": "cus_1", "name": "Payload Inc."}}}).to_string()
}

/// What `serve` refuses to start with.
fn refused(environment: &[(&str, &str)], arguments: &[&str]) -> String {
    let ran = testkit::run(environment, &[&["serve"], arguments].concat(), b"").with_code(2);
    assert_eq!(ran.stdout, "");
    ran.stderr
}

each_database! {
    async fn the_first_line_says_where_it_listens_and_then_it_is_ready(server: TestServer) {
        let empty = server.empty_database();
        for signal in ["-TERM", "-INT"] {
            let environment = [("DATABASE_URL", empty.url.as_str()), ("LISTEN_ADDR", "127.0.0.1:0"), ("STRIPE_WEBHOOK_SECRET", SECRET)];
            let served = Served::start(&environment, &[]);
            assert!(served.base.starts_with("http://127.0.0.1:") && !served.base.ends_with(":0"), "{}", served.base);
            for path in ["/readyz", "/healthz"] {
                assert_eq!(served.get(path, "").await, 200);
            }
            assert_eq!(served.deliver(SECRET, &event("evt_1")).await, 200);
            let ran = served.end(signal).with_code(0);
            assert_eq!(ran.stdout, "", "a script reads one line");
        }
        let events = testkit::run(&[("DATABASE_URL", &empty.url)], &["events", "list", "--json"], b"").with_code(0).json_lines();
        assert_eq!(events.len(), 1, "what was answered before the signal is kept");
    }

    async fn a_setting_may_stand_in_a_file_and_a_flag_wins_over_both(server: TestServer) {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            std::fs::write(folder.path().join(name), text).unwrap();
            folder.path().join(name).to_str().unwrap().to_owned()
        };
        let (url, address) = (file("url", &format!("{}\n", server.database.url)), file("address", " 127.0.0.1:0\n"));
        let secret = file("secret", "old=whsec_of_the_file,\nwhsec_second_of_the_file\n\n");
        let in_files = [("DATABASE_URL_FILE", url.as_str()), ("LISTEN_ADDR_FILE", &address), ("STRIPE_WEBHOOK_SECRET_FILE", &secret)];
        let served = Served::start(&in_files, &[]);
        assert_eq!(served.get("/v1/tenants/acme/invoices", &server.acme_key).await, 200);
        assert_eq!(served.deliver("whsec_of_the_file", &event("evt_1")).await, 200);
        assert_eq!(served.deliver("whsec_second_of_the_file", &event("evt_2")).await, 200);
        assert_eq!(served.deliver("whsec_of_the_flag", &event("evt_3")).await, 400);
        served.end("-TERM").with_code(0);
        let flags = ["--database-url", &server.database.url, "--listen-addr", "127.0.0.1:0", "--stripe-webhook-secret", "whsec_of_the_flag",
            "--log-filter", "warn", "--log-format", "text", "--max-connections", "100"];
        let unfit = [("DATABASE_URL", "unfit"), ("LISTEN_ADDR", "unfit"), ("STRIPE_WEBHOOK_SECRET", "whsec_of_the_variable"), ("RUST_LOG", "[["), ("LOG_FORMAT", "unfit"), ("MAX_CONNECTIONS", "unfit")];
        for environment in [&unfit[..], &in_files[..]] {
            let served = Served::start(environment, &flags);
            assert_eq!(served.get("/v1/tenants/acme/invoices", &server.acme_key).await, 200);
            assert_eq!(served.deliver("whsec_of_the_flag", &event("evt_3")).await, 200);
            assert_eq!(served.deliver("whsec_of_the_variable", &event("evt_4")).await, 400);
            assert_eq!(served.deliver("whsec_of_the_file", &event("evt_4")).await, 400);
            served.end("-TERM").with_code(0);
        }
        let of_other_commands = testkit::run(&[("DATABASE_URL", "unfit")], &["keys", "list", "--database-url", &server.database.url], b"");
        assert!(of_other_commands.with_code(0).stdout.contains("operator"));
    }

    async fn an_address_that_is_taken_is_said_in_words(server: TestServer) {
        let environment = [("DATABASE_URL", server.database.url.as_str()), ("STRIPE_WEBHOOK_SECRET", SECRET)];
        let told = refused(&environment, &["--listen-addr", server.process.authority()]);
        assert!(told.contains(server.process.authority()), "{told}");
    }

    async fn no_secret_and_no_payload_is_ever_logged(server: TestServer) {
        server.store("a", "in_1").await.with_status(201);
        for format in ["json", "text"] {
            let environment = [("DATABASE_URL", server.database.url.as_str()), ("LISTEN_ADDR", "127.0.0.1:0"), ("RUST_LOG", "trace"),
                ("STRIPE_WEBHOOK_SECRET", "live=whsec_never_shown_1,whsec_never_shown_2"), ("LOG_FORMAT", format)];
            let served = Served::start(&environment, &[]);
            let signature = signature("whsec_never_shown_1", Clock::system().now_s(), event("evt_1").as_bytes());
            assert_eq!(served.deliver("whsec_never_shown_1", &event(&format!("evt_{format}"))).await, 200);
            assert_eq!(served.deliver("whsec_never_shown_3", &event("evt_2")).await, 400);
            assert_eq!(served.get(&invoice_path("a"), &server.acme_key).await, 200);
            assert_eq!(served.get(&invoice_path("a"), "never_shown_key").await, 401);
            let ran = served.end("-TERM").with_code(0);
            assert!(ran.stderr.contains("request"), "it does log: {}", ran.stderr);
            let shapes = ran.stderr.lines().filter(|line| serde_json::from_str::<Value>(line).is_ok()).count();
            assert_eq!(shapes, if format == "json" { ran.stderr.lines().count() } else { 0 });
            for hidden in ["never_shown", &server.acme_key, &server.acme_key[8..], "Payload Inc.", &signature[..2 + 10 + 1 + 3 + 8]] {
                assert!(!ran.stderr.contains(hidden), "{hidden} stands in\n{}", ran.stderr);
            }
        }
    }
}

#[test]
fn every_mistake_is_said_at_once_and_in_words() {
    let unfit = [
        ("DATABASE_URL", "mysql://u:hidden@h/x"),
        ("LISTEN_ADDR", "here"),
        ("RUST_LOG", "[["),
        ("LOG_FORMAT", "xml"),
        ("MAX_CONNECTIONS", "15"),
    ];
    let told = refused(&unfit, &[]);
    for name in [
        "DATABASE_URL",
        "LISTEN_ADDR",
        "RUST_LOG",
        "LOG_FORMAT",
        "MAX_CONNECTIONS",
        "STRIPE_WEBHOOK_SECRET",
    ] {
        assert!(told.contains(name), "{name} is missing in\n{told}");
    }
    assert!(!told.contains("hidden"), "{told}");
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
    let told = refused(&[], &flags);
    for word in ["sqlite://", "here", "[[", "xml", "many", "`a`", "`b`"] {
        assert!(told.contains(word), "{word} is missing in\n{told}");
    }
    // Without one, nobody's deliveries could be believed.
    for environment in [
        &[][..],
        &[("STRIPE_WEBHOOK_SECRET", "")],
        &[("STRIPE_WEBHOOK_SECRET", " , ")],
    ] {
        assert!(refused(environment, &[]).contains("STRIPE_WEBHOOK_SECRET"));
    }
}

#[test]
fn a_variable_beside_its_file_and_a_file_that_is_not_there_are_mistakes() {
    for name in [
        "DATABASE_URL",
        "LISTEN_ADDR",
        "STRIPE_WEBHOOK_SECRET",
        "RUST_LOG",
        "LOG_FORMAT",
        "MAX_CONNECTIONS",
    ] {
        let file = format!("{name}_FILE");
        let told = refused(&[(name, "info"), (&file, "/dev/null")], &[]);
        assert!(told.contains(&file) && told.contains("both"), "{told}");
        let told = refused(&[(&file, "/no/such/file")], &[]);
        assert!(
            told.contains(&file) && told.contains("/no/such/file"),
            "{told}"
        );
    }
}

#[test]
fn no_secret_stands_in_a_mistake_or_in_the_help() {
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
        let ran = testkit::run(
            &[("STRIPE_WEBHOOK_SECRET", secrets), ("LISTEN_ADDR", "unfit")],
            &["serve"],
            b"",
        )
        .with_code(2);
        let told = format!("{}{}", ran.stdout, ran.stderr);
        assert!(!told.contains("whsec_hid"), "{secrets} is answered {told}");
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
        let ran = testkit::run(&environment, arguments, b"");
        assert!(
            !format!("{}{}", ran.stdout, ran.stderr).contains("hidden"),
            "{arguments:?}"
        );
    }
}
