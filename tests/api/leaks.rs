//! Output never contains secrets or personal data.
//!
//! The tests make the program do everything it can, with every log line enabled, and search all of
//! its output for every secret, key, password, e-mail address and name that they gave it. They
//! search the log and the spans of `serve`, the diagnostics of commands and the bodies of errors.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use stripe_reconciler::clock::Clock;

use testkit::collector::Collector;
use testkit::stripe::{Stripe, story};
use testkit::{Database, Engine, Files, PostgresServer, TestServer, invoice_path, run, signature};

const SECRET: &str = "whsec_ofTheLiveEndpoint1";
const OTHER_SECRET: &str = "whsec_ofTheOldEndpoint2";
const STRANGERS_SECRET: &str = "whsec_ofAStranger3";
const STRIPE_KEY: &str = "rk_live_fake_ofStripe4";
const PASSWORD: &str = "passwordOfTheDatabase5";
const COLLECTOR_KEY: &str = "keyOfTheCollector6";
const FORGED_KEY: &str = "forgedKeyOfAReader7";
const INVOICES: &str = include_str!("../../fixtures/invoices.jsonl");
/// Fields of payloads and documents with secret or personal values.
const PERSONAL: [&str; 15] = [
    "email",
    "customer_email",
    "receipt_email",
    "customer_name",
    "account_name",
    "line1",
    "client_secret",
    "hosted_invoice_url",
    "invoice_pdf",
    "pdf",
    "receipt_url",
    "fingerprint",
    "description",
    "name",
    "phone",
];

/// Output by its source.
#[derive(Default)]
struct Output(Vec<(String, String)>);

impl Output {
    fn add(&mut self, source: impl Into<String>, output: impl AsRef<[u8]>) {
        self.0.push((
            source.into(),
            String::from_utf8_lossy(output.as_ref()).into_owned(),
        ));
    }

    /// Panics with the source and the context of text that must not be there.
    fn assert_without(&self, hidden: &str) {
        for (source, output) in &self.0 {
            if let Some(line) = output.lines().find(|line| line.contains(hidden)) {
                panic!("{hidden} stands in {source}: {line}");
            }
        }
    }
}

fn personal(value: &Value, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => fields
            .iter()
            .for_each(|(name, value)| match value.as_str() {
                // Shorter texts occur in words with another meaning.
                Some(text) if PERSONAL.contains(&name.as_str()) && text.len() > 6 => {
                    let _ = found.insert(text.to_owned());
                }
                _ => personal(value, found),
            }),
        Value::Array(items) => items.iter().for_each(|item| personal(item, found)),
        _ => {}
    }
}

/// Returns every recorded event.
fn events() -> Vec<String> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/stories");
    let files = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| std::fs::read_to_string(entry.unwrap().path()).unwrap());
    files
        .flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>())
        .collect()
}

/// A running program and all inputs that it was given.
struct TestProgram {
    server: TestServer,
    collector: Collector,
    stripe: Stripe,
    output: Output,
    hidden: BTreeSet<String>,
}

impl TestProgram {
    fn environment(&self) -> Vec<(&str, &str)> {
        vec![
            ("DATABASE_URL", &self.server.database.url),
            ("RUST_LOG", "trace"),
            ("STRIPE_API_KEY", STRIPE_KEY),
            ("STRIPE_API_BASE", &self.stripe.base),
            ("STRIPE_API_RATE", "1000"),
            ("STRIPE_WEBHOOK_SECRET", SECRETS),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", &self.collector.base),
            ("OTEL_EXPORTER_OTLP_HEADERS", HEADERS),
        ]
    }

    async fn start(database: Database, format: &str) -> TestProgram {
        let (collector, stripe) = (Collector::start(), Stripe::start());
        let mut given = TestProgram {
            server: TestServer::on(database).await,
            collector,
            stripe,
            output: Output::default(),
            hidden: BTreeSet::new(),
        };
        let server = testkit::Server::start_with(
            &[given.environment(), vec![("LOG_FORMAT", format)]].concat(),
        );
        given.server.process = server;

        for hidden in [
            SECRET,
            OTHER_SECRET,
            STRANGERS_SECRET,
            STRIPE_KEY,
            PASSWORD,
            COLLECTOR_KEY,
            FORGED_KEY,
        ] {
            given.hidden.insert(hidden.to_owned());
        }

        let keys = [
            given.server.operator_key.clone(),
            given.server.acme_key.clone(),
        ];
        given.hidden.extend(keys);
        given
    }

    /// Runs a command and keeps its diagnostics.
    ///
    /// Keeps its result too if that intentionally shows nothing.
    fn command(&mut self, arguments: &[&str], input: &str, result_too: bool) {
        let output = run(&self.environment(), arguments, input.as_bytes());
        self.output
            .add(format!("what {arguments:?} prints beside"), output.stderr);
        if result_too {
            self.output
                .add(format!("the result of {arguments:?}"), output.stdout);
        }
    }

    /// Sends a request and keeps the answer if it is an error.
    async fn request(
        &mut self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Vec<u8>>,
    ) {
        let answer = self.server.send(method, path, headers, body.into()).await;
        if !answer.status.is_success() {
            self.output.add(
                format!("the answer {} to {method} {path}", answer.status),
                &answer.body,
            );
        }
    }

    async fn deliver(&mut self, secret: &str, time_s: i64, body: &str) {
        let signature = signature(secret, time_s, body.as_bytes());
        self.hidden
            .insert(signature.split_once("v1=").unwrap().1.to_owned());
        self.request(
            "POST",
            "/webhooks/stripe",
            &[("Stripe-Signature", &signature)],
            body,
        )
        .await;
    }

    async fn deliveries(&mut self) {
        let now_s = Clock::system().now_s();
        let events = events();
        for event in &events {
            // One of them is truncated on purpose.
            personal(
                &serde_json::from_str(event).unwrap_or_default(),
                &mut self.hidden,
            );
        }

        for event in &events {
            self.deliver(SECRET, now_s, event).await;
        }

        let event = &events[0];
        self.deliver(OTHER_SECRET, now_s, event).await;
        self.deliver(STRANGERS_SECRET, now_s, event).await;
        self.deliver(SECRET, now_s - 1000, event).await;
        self.deliver(SECRET, now_s + 1000, event).await;

        // Authentic bytes that are not an event are stored, and no log line has their reason.
        for unreadable in [
            &event[..event.len() / 2],
            "unreadable@example.com",
            "[\"unreadable@example.com\"]",
            "{\"id\": \"unreadable@example.com\"}",
        ] {
            self.deliver(SECRET, now_s, unreadable).await;
        }

        self.hidden.insert("unreadable@example.com".to_owned());
        self.deliver(SECRET, now_s, &format!("{event}{}", " ".repeat(1 << 20)))
            .await;
        for odd in [
            "t=1,v1=oddSignatureOf8",
            "oddSignatureOf8",
            &format!("t={now_s},v1=oddSignatureOf8,v1={}", "0".repeat(64)),
        ] {
            self.request(
                "POST",
                "/webhooks/stripe",
                &[("Stripe-Signature", odd)],
                event.as_str(),
            )
            .await;
        }

        self.hidden.insert("oddSignatureOf8".to_owned());
    }

    async fn calls(&mut self) {
        let (operator, acme) = (
            self.server.operator_key.clone(),
            self.server.acme_key.clone(),
        );
        let (invoice, list) = (
            invoice_path("some-invoice"),
            "/v1/tenants/acme/invoices".to_owned(),
        );
        let bearer = format!("Bearer {FORGED_KEY}");
        let document = json!({"metadata": {"uid": "some-invoice", "name": "Somebody in Particular"},
            "spec": {"address": {"email": "somebody@example.com"}}, "status": {"stripeInvoiceId": "in_1Q001Fx"}});
        self.hidden
            .extend(["Somebody in Particular", "somebody@example.com"].map(str::to_owned));
        let mut faulty = document.clone();

        faulty["status"]["billableAmount"] = json!("somebody@example.com");
        faulty["metadata"]["uid"] = json!("somebody@example.com");
        faulty["status"]["states"] =
            json!([{"state": "somebody@example.com", "timestamp": "somebody@example.com"}]);

        for key in [
            ("ApiKey", operator.as_str()),
            ("ApiKey", &acme),
            ("ApiKey", FORGED_KEY),
            ("Authorization", &bearer),
            ("Cookie", FORGED_KEY),
        ] {
            for path in [
                &invoice,
                &list,
                "/v1/events",
                "/v1/events/evt_1",
                "/metrics",
                "/healthz",
                "/readyz",
                "/nowhere",
                &format!("{invoice}/evidence"),
                &format!("{list}?limit=0"),
                &format!("{list}?cursor=somebody@example.com"),
                "/v1/events?type=somebody@example.com&limit=x",
                "/v1/tenants/a%00b/invoices/x",
                "/v1/tenants/%ff/invoices/x",
            ] {
                self.request("GET", path, &[key], "").await;
            }
            self.request("PUT", &invoice, &[key], document.to_string())
                .await;
            self.request("PUT", &invoice, &[key], faulty.to_string())
                .await;
            self.request("PUT", &invoice, &[key], "not JSON: somebody@example.com")
                .await;
            self.request(
                "PUT",
                &invoice_path("other"),
                &[key],
                document.to_string().replace("some-invoice", "other"),
            )
            .await;
            self.request("DELETE", &invoice, &[key], document.to_string())
                .await;
        }
    }

    fn commands(&mut self) {
        let files = Files::new();
        let mut documents: Vec<String> = INVOICES.lines().map(str::to_owned).collect();
        documents.iter().for_each(|document| {
            personal(&serde_json::from_str(document).unwrap(), &mut self.hidden);
        });

        // Titles that also occur in annotations and commands.
        self.hidden
            .retain(|hidden| !hidden.starts_with("January 2026"));
        documents.extend(
            story::play(&self.stripe, 15)
                .iter()
                .map(|invoice| invoice.document().to_string()),
        );
        documents
            .push(r#"{"metadata": {"uid": "x", "name": "Somebody in Particular"}, "spec": "somebody@example.com"}"#.to_owned());
        documents.push("not JSON: somebody@example.com".to_owned());
        self.command(
            &["invoices", "import", "--tenant", "acme", "-"],
            &documents.join("\n"),
            true,
        );

        let recorded = files.add(
            "events.jsonl",
            format!("{}\nnot JSON: somebody@example.com", events().join("\n")),
        );
        self.command(&["replay", &recorded], "", true);
        let url = format!("{}/webhooks/stripe", self.server.process.base);
        self.command(&["replay", &recorded, "--to", &url], "", true);

        for arguments in [
            &["rebuild"][..],
            &["reconcile"],
            &["reconcile", "--json"],
            &["doctor"],
            &["doctor", "--json"],
            &["keys", "list"],
            &["events", "list"],
            &["migrate"],
            &["events", "prune", "--older-than", "90d"],
            &["keys", "revoke", "key_none"],
        ] {
            self.command(arguments, "", true);
        }

        for arguments in [
            &["events", "export"][..],
            &["events", "show", "evt_1Q001Fx001"],
            &["invoices", "list", "--tenant", "acme"],
            &["keys", "create", "--operator"],
        ] {
            self.command(arguments, "", false);
        }
    }

    /// Runs commands with unreachable databases and collectors and with invalid settings.
    fn failures(&mut self) {
        let mut environment = |name: &str, value: &str, arguments: &[&str]| {
            let environment: Vec<_> = self
                .environment()
                .into_iter()
                .filter(|(known, _)| *known != name)
                .chain([(name, value)])
                .collect();
            let output = run(&environment, arguments, b"");
            assert_ne!(output.code, 0, "{name}={value}");
            self.output.add(
                format!("{name}={value}"),
                format!("{}{}", output.stdout, output.stderr),
            );
        };

        for url in [
            format!("postgres://postgres:{PASSWORD}@127.0.0.1:1/none"),
            format!("postgres://postgres:{PASSWORD}@127.0.0.1:port/none"),
            format!("postgres://postgres:{PASSWORD}@127.0.0.1/none?sslmode=odd"),
            format!(
                "postgres://postgres:{PASSWORD}@127.0.0.1/none?password={PASSWORD}&odd={PASSWORD}"
            ),
            format!("postgres://postgres:{PASSWORD}@[::1"),
            format!("mysql://root:{PASSWORD}@127.0.0.1/none"),
            format!("sqlite:///no/such/folder/{PASSWORD}?mode=odd").replace(PASSWORD, "none"),
        ] {
            environment("DATABASE_URL", &url, &["keys", "list"]);
        }

        environment(
            "STRIPE_WEBHOOK_SECRET",
            &format!("{SECRET},{SECRET}"),
            &["serve"],
        );
        environment(
            "STRIPE_API_KEY",
            &format!("{STRIPE_KEY} "),
            &["reconcile", "--since", "x"],
        );
        environment(
            "STRIPE_API_KEY",
            &format!("odd {STRIPE_KEY}"),
            &["reconcile"],
        );

        environment("OTEL_EXPORTER_OTLP_HEADERS", COLLECTOR_KEY, &["serve"]);
        environment(
            "OTEL_EXPORTER_OTLP_ENDPOINT",
            &format!("ftp://x:{COLLECTOR_KEY}@y"),
            &["serve"],
        );
    }

    /// Searches all collected output.
    fn end(mut self) {
        self.server.process.terminate();
        assert_eq!(self.server.process.exit_code(), Some(0));

        let log = self.server.process.log();
        assert!(
            ["DEBUG", "durable", "request"]
                .iter()
                .all(|said| log.contains(said)),
            "it says what it does"
        );

        self.output.add("the log", log);
        let raw = self.collector.raw();
        assert!(
            raw.iter()
                .any(|(headers, _)| headers["x-key"] == COLLECTOR_KEY)
                && self.collector.spans().len() > 1000
        );

        raw.into_iter()
            .for_each(|(_, body)| self.output.add("the spans", &body));
        assert!(self.hidden.len() > 150, "{}", self.hidden.len());

        self.hidden
            .iter()
            .for_each(|hidden| self.output.assert_without(hidden));
    }
}

const SECRETS: &str = "live=whsec_ofTheLiveEndpoint1,old=whsec_ofTheOldEndpoint2";
const HEADERS: &str = "x-key=keyOfTheCollector6";

async fn nothing_is_shown(database: Database, format: &str) {
    let mut given = TestProgram::start(database, format).await;
    given.deliveries().await;
    given.calls().await;
    given.commands();
    given.failures();
    given.end();
}

#[tokio::test]
async fn output_never_contains_secrets_or_personal_data_in_sqlite() {
    nothing_is_shown(Database::create(Engine::Sqlite), "text").await;
}

#[tokio::test]
async fn output_never_contains_secrets_or_personal_data_in_postgres() {
    let port = PostgresServer::shared().port();
    let url = |name: &str| format!("postgres://postgres:{PASSWORD}@127.0.0.1:{port}/{name}");
    nothing_is_shown(Database::create(Engine::Postgres).with_url(url), "json").await;
}
