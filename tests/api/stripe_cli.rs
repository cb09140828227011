//! The real Stripe CLI forwards events to the real server. Only Stripe's side of its protocol is a
//! stand-in.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use stripe_reconciler::clock::Clock;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use testkit::each_database;
use testkit::{SECRET, signature};

const INVOICES: usize = 8;
const EVENTS: usize = 200;
/// Maximum time for 200 events, which take about a second on an idle machine.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Returns the path where `./test` installs it, or `None`, which skips the test unless the
/// environment requires it.
fn stripe_cli() -> Option<PathBuf> {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("node_modules/@stripe/cli-linux-x64/bin/stripe");
    if path.is_file() {
        return Some(path);
    }

    let reason = format!(
        "the Stripe CLI is not at {}: run ./test, which installs it from npm",
        path.display()
    );
    #[expect(
        clippy::disallowed_methods,
        reason = "not a setting of the program: ./test says that nothing may be left out"
    )]
    let required = std::env::var_os("STRIPE_CLI_REQUIRED").is_some_and(|value| value == "1");
    assert!(!required, "{reason}");

    println!("not tested: {reason}");
    None
}

/// Stripe's side: a session, and a socket that sends events and receives answers.
struct StandIn {
    base: String,
    responses: mpsc::UnboundedReceiver<Value>,
    server: JoinHandle<()>,
}

impl StandIn {
    /// Starts a server that pushes these events back to back as soon as a CLI connects.
    async fn start(events: Vec<Value>) -> StandIn {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, responses) = mpsc::unbounded_channel();
        let session = json!({"websocket_id": "cliws_1", "websocket_url": format!("ws://{address}/ws"), "secret": SECRET,
            "websocket_authorized_feature": "webhooks", "reconnect_delay": 3600, "default_version": "2025-11-17.clover",
            "latest_version": "2025-11-17.clover"});
        let socket = async move |upgrade: WebSocketUpgrade| {
            upgrade
                .protocols(["stripecli-devproxy-v1"])
                .on_upgrade(|socket| push(socket, events, sender))
        };
        let router = Router::new()
            .route("/v1/stripecli/sessions", post(async move || Json(session)))
            .route("/ws", get(socket));

        let server = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        StandIn {
            base: format!("http://{address}"),
            responses,
            server,
        }
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// Sends all events, then forwards the endpoint's answers.
async fn push(mut socket: WebSocket, events: Vec<Value>, responses: mpsc::UnboundedSender<Value>) {
    for (number, event) in events.iter().enumerate() {
        let body = serde_json::to_string_pretty(event).unwrap();
        let signature = signature(SECRET, Clock::system().now_s(), body.as_bytes());
        let headers = json!({"Stripe-Signature": signature, "Content-Type": "application/json; charset=utf-8"});
        let message = json!({"type": "webhook_event", "webhook_id": format!("wh_{number}"),
            "webhook_conversation_id": format!("wc_{number}"), "event_payload": body, "http_headers": headers,
            "endpoint": {"api_version": null}});
        socket
            .send(Message::text(message.to_string()))
            .await
            .unwrap();
    }

    while let Some(Ok(message)) = socket.recv().await {
        if let Message::Text(text) = message {
            let message: Value = serde_json::from_str(&text).unwrap();
            if message["type"] == "webhook_response" && responses.send(message).is_err() {
                return;
            }
        }
    }
}

/// A running `stripe listen`. Dropping it kills the process.
struct Listen {
    process: Child,
    home: TempDir,
}

impl Listen {
    fn start(cli: &Path, api_base: &str, forward_to: &str) -> Listen {
        let home = tempfile::tempdir().unwrap();
        let stderr = std::fs::File::create(home.path().join("stderr")).unwrap();
        let mut command = Command::new(cli);
        command
            .env_clear()
            .env("HOME", home.path())
            .env("XDG_CONFIG_HOME", home.path())
            .env("STRIPE_CLI_TELEMETRY_OPTOUT", "1");
        command.args([
            "listen",
            "--api-key",
            "sk_test_123456789012",
            "--api-base",
            api_base,
            "--no-wss",
            "--skip-update",
        ]);

        command.args(["--all-snapshot", "--forward-to", forward_to]);
        let process = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .unwrap();
        Listen { process, home }
    }

    fn stderr(&self) -> String {
        std::fs::read_to_string(self.home.path().join("stderr")).unwrap()
    }
}

impl Drop for Listen {
    fn drop(&mut self) {
        // The process may have ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Returns the n-th event. Each invoice is finalized, fails repeatedly and is paid last.
fn event(n: usize) -> Value {
    let (invoice, step, last) = (n % INVOICES, n / INVOICES, EVENTS / INVOICES - 1);
    let (kind, status, paid) = match step {
        0 => ("invoice.finalized", "open", 0),
        step if step == last => ("invoice.paid", "paid", 5000),
        _ => ("invoice.payment_failed", "open", 0),
    };
    json!({"id": format!("evt_{n}"), "object": "event", "api_version": "2025-11-17.clover", "type": kind, "livemode": false,
        "created": 1_769_850_000 + step, "data": {"object": {"id": format!("in_{invoice}"), "object": "invoice", "status": status,
            "number": format!("№ {invoice}"), "currency": "eur", "amount_due": 5000, "amount_paid": paid,
            "amount_remaining": 5000 - paid, "attempt_count": step}}})
}

/// Returns the expected history of each invoice.
fn history() -> Vec<String> {
    let steps = EVENTS / INVOICES;
    let state = |step| match step {
        0 => "PaymentPending",
        step if step == steps - 1 => "Paid",
        _ => "PaymentFailed",
    };
    (0..steps)
        .map(|step| format!("{} 2026-01-31T09:00:{step:02}.000Z", state(step)))
        .collect()
}

each_database! {
    async fn real_stripe_cli_delivers_two_hundred_events(server: TestServer) {
        let Some(cli) = stripe_cli() else { return };
        for invoice in 0..INVOICES {
            server
                .store(&format!("inv-{invoice}"), &format!("in_{invoice}"))
                .await
                .with_status(201);
        }

        let mut stripe = StandIn::start((0..EVENTS).map(event).collect()).await;
        let listen = Listen::start(
            &cli,
            &stripe.base,
            &format!("{}/webhooks/stripe", server.process.base),
        );
        let mut answers = BTreeMap::new();

        while answers.len() < EVENTS {
            let answer = tokio::time::timeout(TIMEOUT, stripe.responses.recv())
                .await
                .ok()
                .flatten();
            let response = answer.unwrap_or_else(|| {
                panic!(
                    "{} answers came. The CLI says:\n{}",
                    answers.len(),
                    listen.stderr()
                )
            });
            let webhook = response["webhook_id"].as_str().unwrap().to_owned();
            let body: Value = serde_json::from_str(response["body"].as_str().unwrap())
                .unwrap_or_else(|_| panic!("{response}"));
            assert_eq!(response["status"], 200, "{response}");
            assert_eq!(body, json!({"received": true, "outcome": "recorded"}));
            assert!(
                answers.insert(webhook, body).is_none(),
                "answered twice: {response}"
            );
        }

        for invoice in 0..INVOICES {
            assert_eq!(server.history(&format!("inv-{invoice}")).await, history());
        }

        let log = server
            .run(&["events", "list", "--limit", "1000", "--json"])
            .with_code(0)
            .json_lines();
        assert_eq!(log.len(), EVENTS);
    }
}
